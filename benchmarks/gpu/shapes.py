"""The linears of a Llama-3-8B step and the numbers of rows that the benchmark times."""

from __future__ import annotations

from dataclasses import dataclass

# name: (N, K, launches in one step)
SHAPES = {
    "qkv": (6144, 4096, 32),
    "o": (4096, 4096, 32),
    "gate_up": (28672, 4096, 32),
    "down": (4096, 14336, 32),
    "lm_head": (128256, 4096, 1),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)


@dataclass(frozen=True)
class Variant:
    """One kernel to time: a shape, a format, the rows it is for and the knobs as text.

    knobs : "default", "gemv:warps,inflight,tiles,buffers,diagonal" (and ",1": scaled_weights),
        "tile:block_m,groups,stages,cluster,share,parallel", "tilep:..." (with a producer),
        "walk:..." (persistent blocks) or "mma:..." (without wgmma); a trailing "p" asks for
        dependent launch.
    """

    shape: str
    rows: int
    knobs: str = "default"
    format: str = "amxfp4"

    @property
    def key(self) -> str:
        """File name of the library; the default kernels of all rows are in one."""
        rows = "" if self.knobs.startswith("default") else f"-m{self.rows}"
        text = f"{self.format}-{self.shape}{rows}-{self.knobs}"
        return "".join(c if c.isalnum() else "_" for c in text)
