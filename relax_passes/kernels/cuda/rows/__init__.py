"""Kernels on whole rows on GPUs: a block a row, its pieces in registers."""
