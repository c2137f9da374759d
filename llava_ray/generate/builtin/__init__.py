"""The built-in engine: continuous batching over a transformers model, on CPU or GPU."""
