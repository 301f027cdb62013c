"""CUDA schedules: weights in tensor-core fragment order, decode (gemv) and tile schedules."""
