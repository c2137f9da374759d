"""OpenAI's HTTP API: middleware, request schemas and responses."""
