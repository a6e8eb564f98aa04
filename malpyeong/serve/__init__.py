"""A server with OpenAI's chat API, a page to ask on, and the check of the 2026 contest's container."""
