"""NVIDIA GPUs: what is known of them, TVM targets for them, and the tools that build their code."""
