"""The layout of transformers' LLaVA classes (llava-hf), which vLLM takes too."""
