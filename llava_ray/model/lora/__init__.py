"""LoRA adapters: laid over a language model, read, saved and merged."""
