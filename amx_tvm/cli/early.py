"""What commands refuse before they import the compiler: misspelled options cost no waiting."""

from __future__ import annotations


def check(
    targets: str | None = None, quantization: str | None = None, strict: bool = False
) -> None:
    """Refuse unknown targets (several with commas between) and number formats.

    Raises
    ------
    AmxError
        As the command would later.
    """
    if quantization is not None:
        from amx_tvm.config import QuantizationConfig

        QuantizationConfig.parse(quantization, strict)
    if targets is not None:
        from amx_tvm.targets import resolve

        for name in targets.split(","):
            resolve(name.strip())
