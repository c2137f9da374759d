"""OpenAI's Responses API, without storage: each request holds its whole conversation."""
