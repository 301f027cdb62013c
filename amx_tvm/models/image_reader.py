"""Reads how images are prepared from what a processor of transformers saved."""

from __future__ import annotations

from amx_tvm.errors import ModelError
from amx_tvm.images import Crop, ImageSettings, Tiles
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.vision import TowerConfig

PROCESSOR = "image_processor"  # the field of a configuration that holds it


class ImageReader:
    """What preprocessor_config.json says, refused where it asks for something else."""

    def __init__(self, read: ConfigReader) -> None:
        self._read = read.inside(PROCESSOR, {}, ", as preprocessor_config.json has it")

    @property
    def resample(self) -> int:
        """Pillow's filter."""
        return int(self._read.require("resample"))

    def flag(self, name: str, default: bool) -> bool:
        """Return a field that is true or false."""
        return bool(self._read.get(name, default))

    def only(self, name: str, supported: dict[bool, None], default: bool) -> None:
        """Refuse a field that is something else."""
        self._read.only(name, supported, default)

    def size(self, name: str, part: str, expected: int | None = None) -> int:
        """Return one number of a field that is an object.

        Raises
        ------
        ModelError
            Where it is missing, or not the one that the tower takes.
        """
        given = self._read.get(name, {})
        found = given.get(part) if isinstance(given, dict) else None
        if not isinstance(found, int) or (expected is not None and found != expected):
            wanted = "a number" if expected is None else f"{expected}, as the tower has"
            raise ModelError(
                f"the image processor's {name} is {given!r}; expected {part} to be {wanted}"
            )
        return found

    def settings(
        self, token: int, tower: TowerConfig, rows: int, processing: Tiles | Crop
    ) -> ImageSettings:
        """Return an image model's settings; see `ImageSettings`."""
        for field in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            self._read.only(field, {True: None}, True)
        mean, std = (tuple(self._read.get(f"image_{name}", ())) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not all(std):
            raise ModelError(
                f"the image processor's image_mean and image_std are {list(mean)} and {list(std)}; "
                "expected three numbers each"
            )
        scale = float(self._read.get("rescale_factor", 1 / 255))
        return ImageSettings(token, tower.edge, tower.patch, rows, scale, mean, std, processing)
