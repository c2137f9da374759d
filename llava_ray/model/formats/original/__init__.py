"""The layout of the original LLaVA: a whole model, a LoRA folder, or a projector only."""
