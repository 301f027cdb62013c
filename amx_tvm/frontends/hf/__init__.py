"""Hugging Face directories and hub ids: configuration, safetensors, quantized checkpoints."""
