"""The passes, one a file; relax_passes/pipeline.py orders them."""
