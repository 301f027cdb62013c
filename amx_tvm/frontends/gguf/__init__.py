"""GGUF files: the container, its configuration, tokenizer and tensor types."""
