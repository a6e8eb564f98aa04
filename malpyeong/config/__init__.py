"""Recipe files: their blocks and what a card presets."""
