"""Errors that a user can cause, each with one message that says what was given, expected and to do.

The command line prints the message of an :class:`AmxError` on one line and exits with code 2; any
other exception is a defect of this package and keeps its traceback.
"""

from __future__ import annotations


class AmxError(Exception):
    """Base of every error that the input, the environment or an option caused."""

    exit_code = 2


class ModelError(AmxError):
    """A model, checkpoint, configuration or tokenizer that cannot be read or is not supported."""


class FormatError(AmxError):
    """A number format that is unknown, or data that it cannot hold (NaN, too few columns)."""


class TargetError(AmxError):
    """A compilation target that is unknown, underspecified or not this machine."""


class ArtifactError(AmxError):
    """An artifact that is damaged, incomplete, or made for another machine, version or schema."""


class GenerationError(AmxError):
    """A generation request that cannot be carried out, such as a prompt beyond the context."""


class CalibrationError(AmxError):
    """A recipe, a calibration text or a model that calibration cannot work with."""


class EvaluationError(AmxError):
    """A text, a reference or an option that an evaluation cannot work with."""


class TuningError(AmxError):
    """A tuning record, budget or model that tuning cannot work with."""
