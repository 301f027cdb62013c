"""CUDA linears: fragments straight into mma.sync for few rows, tiles through shared memory."""
