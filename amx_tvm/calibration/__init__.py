"""Calibrated recipes: better 4-bit weights in a format's own bits, from a little text.

    calibration = calibrate(source, config, windows, "gptq")
    compile(source, quantization=calibration.config, overrides=calibration)

Needs torch; compiled models and their evaluation do not.
"""

import amx_tvm.own_packages  # noqa: F401 - it looks for files in the way
from amx_tvm.calibration.api import Calibration, TrainingDiverged, calibrate
from amx_tvm.calibration.modules import calibrate_module
from amx_tvm.calibration.recipes import (
    RECIPES,
    Gptq,
    MixedPrecision,
    Plain,
    Recipe,
    RotateValues,
    Smooth,
    Train,
)

__all__ = [
    "RECIPES",
    "Calibration",
    "Gptq",
    "MixedPrecision",
    "Plain",
    "Recipe",
    "RotateValues",
    "Smooth",
    "Train",
    "TrainingDiverged",
    "calibrate",
    "calibrate_module",
]
