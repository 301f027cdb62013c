"""AMXFP4 large language models, compiled with TVM for the machine at hand.

    artifact = amx_tvm.compile("path/or/hub-id", target="llvm", quantization="amxfp4")
    engine = amx_tvm.load(artifact.path)
    print(engine.generate("The capital of France is", max_new_tokens=64).text)

Names are imported when they are first used, so that loading an artifact imports no compiler.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from amx_tvm import shadowing, without_torch
from amx_tvm.errors import AmxError

without_torch.watch()  # first: a torch.py that nothing wants is in nobody's way
shadowing.watch()
try:
    shadowing.check("numpy", "tvm_ffi", "tokenizers", "jinja2")
    from amx_tvm.version import __version__, guard, use_bundled

    use_bundled()
    guard()
except AmxError as error:
    # The command line ends with one line; it is known by its name, because this import comes
    # before any of its own code: ``python -m amx_tvm`` is "-m" until it runs.
    if sys.argv[0].rpartition("/")[2] not in ("amx-tvm", "-m"):
        raise
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code) from None

_LAZY = {
    "Artifact": "amx_tvm.compiler",
    "Engine": "amx_tvm.runtime",
    "QuantizationConfig": "amx_tvm.config",
    "calibrate": "amx_tvm.calibration",
    "compare": "amx_tvm.evaluation",
    "compile": "amx_tvm.compiler",
    "evaluate": "amx_tvm.evaluation",
    "export": "amx_tvm.exporting",
    "load": "amx_tvm.runtime",
    "tune": "tuning",
}
_MODULES = ("formats",)

__all__ = ["__version__", *_LAZY, *_MODULES]


if TYPE_CHECKING:  # for editors, and for those who check types
    from amx_tvm import formats as formats
    from amx_tvm.calibration import calibrate as calibrate
    from amx_tvm.compiler.compile import Artifact as Artifact
    from amx_tvm.compiler.compile import compile as compile
    from amx_tvm.config import QuantizationConfig as QuantizationConfig
    from amx_tvm.evaluation import compare as compare
    from amx_tvm.evaluation import evaluate as evaluate
    from amx_tvm.exporting import export as export
    from amx_tvm.runtime import Engine as Engine
    from amx_tvm.runtime import load as load
    from tuning.api import tune as tune
else:

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            if _LAZY[name] == "tuning":  # a user's tuning.py may have a function of this name
                import_module("amx_tvm.own_packages")
            return getattr(import_module(_LAZY[name]), name)
        if name in _MODULES:
            return import_module(f"amx_tvm.{name}")
        raise AttributeError(f"module 'amx_tvm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
