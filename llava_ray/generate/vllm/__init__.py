"""The vLLM engine behind the same interface as the built-in one. Imports vllm only where it runs."""
