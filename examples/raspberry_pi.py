"""A bundle for a Raspberry Pi 5: python examples/raspberry_pi.py MODEL OUTPUT.

With g++-aarch64-linux-gnu here the library is linked; without it the board does that, by the
`link.py` in the bundle.
"""

import shutil
import sys

import amx_tvm

model, output = sys.argv[1:3]
linker = shutil.which("aarch64-linux-gnu-g++")
bundle = amx_tvm.export(
    model,
    "raspberry-pi/5-aarch64",
    output,
    runtimes=("python",) if linker else (),
    pythons=("3.11",),
    link=linker is not None,
)
print(f"{bundle.path}: {'linked' if linker else 'run python3 link.py on the board'}")
