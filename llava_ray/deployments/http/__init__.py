"""The HTTP API, OpenAI's: what stands in front of it, what it takes and what it answers."""
