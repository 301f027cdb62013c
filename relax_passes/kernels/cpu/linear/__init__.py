"""Linears on CPUs."""
