"""Mixtures of experts on CUDA: scores, choice, order of rows, and the sum behind the products."""
