"""The KV cache of CUDA targets that stores keys and values in few bits."""
