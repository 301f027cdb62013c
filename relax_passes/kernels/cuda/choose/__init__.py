"""Tokens chosen on the GPU, every row by its own settings; ids instead of logits to the host."""
