"""Modules that are no checkpoints: torch, ONNX, StableHLO and Relax."""
