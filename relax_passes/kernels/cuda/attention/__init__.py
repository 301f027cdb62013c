"""Attention on CUDA: pages of keys and values, RoPE, decode split over clusters, and prefill."""
