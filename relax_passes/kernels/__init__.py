"""Kernels: one rule per kind of hardware, asked in order, the first that answers wins."""
