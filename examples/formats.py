"""What number formats do to weights: python examples/formats.py. NumPy is enough."""

import numpy as np

from amx_tvm import formats

random = np.random.default_rng(0)
plain = random.standard_normal((256, 512)).astype(np.float32)
skewed = np.where(plain > 0, plain * 3, plain)  # AMXFP4's two scales are made for these
outliers = plain.copy()
outliers[:, ::97] *= 20

print(f"{'format':20} {'bits':>5} {'plain':>8} {'skewed':>8} {'outliers':>8}")
for row in formats.summary():
    errors = []
    for weight in (plain, skewed, outliers):
        rounded = formats.quantize_dequantize(row.name, weight)
        errors.append(np.linalg.norm(rounded - weight) / np.linalg.norm(weight))
    print(
        f"{row.name:20} {row.bits_per_value:5.2f} " + " ".join(f"{error:8.4f}" for error in errors)
    )
