"""From prompts to answers: engines, constrained decoding, votes."""
