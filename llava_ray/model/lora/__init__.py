"""LoRA adapters: injection into a model, loading, saving and merging."""
