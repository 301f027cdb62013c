"""A torch module, compiled and called like a function: python examples/torch_module.py.

It needs the extra `torch`.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

import amx_tvm

torch.manual_seed(0)
module = torch.nn.Sequential(
    torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)
).eval()
x = torch.randn(8, 256)
with tempfile.TemporaryDirectory() as folder:
    artifact = amx_tvm.compile(
        module, example_inputs=(x,), output=Path(folder) / "module", strict=True
    )
    compiled = amx_tvm.load(artifact.path)
    y = np.asarray(compiled(x.numpy()))
with torch.no_grad():
    error = np.linalg.norm(y - module(x).numpy()) / np.linalg.norm(module(x).numpy())
print(f"{artifact.bits_per_weight:.2f} bits a weight, output error {error:.3f}")
