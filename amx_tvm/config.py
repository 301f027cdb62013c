"""What the user chooses about numbers: weight format, activations, exceptions per layer.

``QuantizationConfig.parse("amxfp4-w4a4")`` reads the short names that ``compile`` and the command
line take; the dataclass itself gives full control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch

import amx_tvm.own_packages  # noqa: F401 - it looks for files in the way
from amx_tvm import formats
from amx_tvm.errors import FormatError, TargetError
from relax_passes.activation import E4M3, FLOAT16, FLOAT32, INT8, four_bit
from relax_passes.cache_spec import FORMATS
from relax_passes.policy import LinearPolicy

W4A4_SUFFIX, W4A8_SUFFIX = "-w4a4", "-w4a8"
FOUR_OVER_SIX_SUFFIX = "-46"
KV_CACHES = ("auto", "float32", "float16", *FORMATS)
ACTIVATIONS = ("float32", "float16", "int8", "w4a4", "w4a8")
# What weights of more than four bits are multiplied with; "auto" until the device is known.
WIDE = {
    "auto": FLOAT32,
    "float32": FLOAT32,
    "float16": FLOAT16,
    "int8": INT8,
    "w4a4": INT8,
    "w4a8": FLOAT16,
}


@dataclass(frozen=True)
class QuantizationConfig:
    """How a model's linears, embedding and head are quantized.

    Parameters
    ----------
    format : str
        Weight format of the linears: a name of ``amx_tvm.formats.names()`` or "none".
    activation : str
        "auto" (int8 on CPUs, the compute type on GPUs), "float32" (exact products: the strict
        mode), "int8" (groups of 32, 16 bits in those with outliers), "float16", "w4a4"
        (inputs quantized to ``format`` as well) or "w4a8" (8 bits: int8 on CPUs; on GPUs that
        multiply FP8 E4M3 with a scale a row, from 65 rows on).
    head : str
        Format of the LM head, and of the embedding table where the two are tied. The paper leaves
        them alone. "auto" is int8 (8.5 bits), lossless for a GGUF that stores them as Q8_0.
    vision : str
        Format of the linears of what sees, in models that take images. "auto" is int8.
    ignored : tuple of str
        Glob patterns of linears left in float32, such as ``"model.layers.0.*"``.
    overrides : dict of str to str
        Glob pattern to format, first match wins.
    attention : bool
        Round queries, keys, attention weights and values to ``format`` too, as the paper does; only
        with "w4a4".
    kv_cache : str
        What keys and values in the cache are: "float32", "float16" (half the memory), a format
        of few bits ("int8", "amxfp4", "amxfp4-e4m3", "nvfp4"; see ``relax_passes.cache_spec``), or
        "auto": float16 on GPUs, and with int8 activations where a CPU converts it by instruction,
        else float32.
    four_over_six : bool
        Choose each activation's scale so that the largest value becomes 6 or 4, whichever errs less
        (``amx_tvm.formats.four_over_six``); only with "w4a4", on CPUs.
    """

    format: str = "amxfp4"
    activation: str = "auto"
    head: str = "auto"
    vision: str = "auto"
    ignored: tuple[str, ...] = ()
    overrides: dict[str, str] = field(default_factory=dict)
    attention: bool = False
    four_over_six: bool = False
    kv_cache: str = "auto"

    @staticmethod
    def parse(given: str | QuantizationConfig, strict: bool = False) -> QuantizationConfig:
        """Read a short name or take a config as it is.

        Names are "amxfp4", "nvfp4-w4a4", "amxfp4-w4a4-46" (four over six), "amxfp4-w4a8", "none"
        and the like.

        Raises
        ------
        FormatError
            For an unknown format or scheme; the message lists the known ones.
        """
        if isinstance(given, QuantizationConfig):
            config = given
        elif given == "none":
            config = QuantizationConfig(
                format="none", activation="float32", head="none", vision="none"
            )
        elif given.removesuffix(FOUR_OVER_SIX_SUFFIX).endswith(W4A4_SUFFIX):
            better = given.endswith(FOUR_OVER_SIX_SUFFIX)
            name = given.removesuffix(FOUR_OVER_SIX_SUFFIX).removesuffix(W4A4_SUFFIX)
            config = QuantizationConfig(format=name, activation="w4a4", four_over_six=better)
        elif given.endswith(W4A8_SUFFIX):
            name = given.removesuffix(W4A8_SUFFIX)
            config = QuantizationConfig(format=name, activation="w4a8")
        else:
            config = QuantizationConfig(format=given)
        if strict:
            if config.activation in ("w4a4", "w4a8"):
                raise FormatError(
                    "strict mode computes with float32 activations and cannot be combined with "
                    f"{given!r}; drop strict or use {config.format!r}"
                )
            config = replace(config, activation="float32")
        known = (*formats.names(), "none")
        chosen = [name for name in (config.head, config.vision) if name != "auto"]
        for name in (config.format, *chosen, *config.overrides.values()):
            if name not in known:
                raise FormatError(
                    f"unknown number format {name!r}; known are {', '.join(known)}, each 4-bit one "
                    f"also as NAME{W4A4_SUFFIX} and NAME{W4A8_SUFFIX}"
                )
        if config.activation not in ("auto", *ACTIVATIONS):
            raise FormatError(
                f"unknown activation scheme {config.activation!r}; known are auto, "
                + ", ".join(ACTIVATIONS)
            )
        if config.kv_cache not in KV_CACHES:
            raise FormatError(
                f"unknown type of the KV cache {config.kv_cache!r}; known are "
                + ", ".join(KV_CACHES)
            )
        if config.four_over_six and config.activation != "w4a4":
            raise FormatError(
                f"four over six rounds activations, but activations are {config.activation}; "
                f"use {config.format}{W4A4_SUFFIX}{FOUR_OVER_SIX_SUFFIX}"
            )
        if config.attention and config.activation != "w4a4":
            raise FormatError(
                f"quantized attention rounds activations, but activations are {config.activation}; "
                f"use {config.format}{W4A4_SUFFIX}"
            )
        return config

    @property
    def strict(self) -> bool:
        """Whether products are computed with unrounded float32 activations."""
        return self.activation == "float32"

    def resolve(self, device: str, architectures: Sequence[str] = ()) -> QuantizationConfig:
        """Replace "auto" by what the device's kernels compute with.

        Parameters
        ----------
        device : str
            "cpu" or "cuda".
        architectures : sequence of str
            The GPUs' of a CUDA target.

        Raises
        ------
        TargetError
            When the device has no kernels for what is asked.
        """
        if self.four_over_six and device != "cpu":
            raise TargetError(
                f"four over six has kernels for CPUs only, and the target's device is {device}; "
                f"use {self.format}{W4A4_SUFFIX}"
            )
        activation, head, vision = self.activation, self.head, self.vision
        if activation == "w4a8" and device == "cpu":
            activation = "int8"
        if activation == "w4a8":
            self._check_fp8(architectures)
        if activation == "auto":
            activation = "int8" if device == "cpu" else "float16"
        if head == "auto":
            head = "int8"
        if vision == "auto":
            vision = "int8"
        return replace(self, activation=activation, head=head, vision=vision)

    def _check_fp8(self, architectures: Sequence[str]) -> None:
        """Refuse GPUs without kernels that multiply FP8."""
        from amx_tvm.targets.cuda.gpus import gpu

        for found in map(gpu, architectures):
            if not found.wgmma:
                why = "has no kernels for it yet" if found.fp8 else "does not multiply FP8"
                raise TargetError(
                    f"{self.format}{W4A8_SUFFIX} multiplies FP8 on GPUs, and {found.arch} {why}; "
                    f"compile for sm_90a, or use {self.format}"
                )

    def linear(self, name: str) -> LinearPolicy:
        """Answer the passes: format and activation of the linear of this name.

        The router of a mixture of experts and what images' pixels meet first stay in float32,
        unless an override names them.
        """
        if any(fnmatch(name, pattern) for pattern in self.ignored):
            return LinearPolicy()
        for pattern, chosen in self.overrides.items():
            if fnmatch(name, pattern):
                return self._policy(chosen)
        if name.endswith((".router", ".patch_embed")):
            return LinearPolicy()
        if _is_head(name):
            head = self.head
            return LinearPolicy(head, WIDE[self.activation]) if head != "none" else LinearPolicy()
        return self._policy(self.vision if name.startswith("vision.") else self.format)

    def table(self, name: str) -> str:
        """Answer the passes: format of the embedding table of this name."""
        return self.linear(name).format if _is_head(name) else "none"

    def _policy(self, chosen: str) -> LinearPolicy:
        if chosen == "none":
            return LinearPolicy()
        if self.activation == "w4a4" and formats.get(chosen).code_bits == 4:
            return LinearPolicy(chosen, four_bit(chosen, self.four_over_six))
        if self.activation == "w4a8" and formats.get(chosen).code_bits == 4:
            return LinearPolicy(chosen, E4M3)
        return LinearPolicy(chosen, WIDE[self.activation])

    def describe(self) -> dict:
        """Return the configuration as JSON-ready values, for the manifest."""
        return {**asdict(self), "ignored": list(self.ignored), "strict": self.strict}


def _is_head(name: str) -> bool:
    """The LM head or the token embedding: the two ends of the residual stream, maybe tied."""
    return name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens")
