"""LoRA adapters that are loaded and unloaded while the service runs: where they may lie, who knows and holds them."""
