"""Images in prompts: how a file becomes pixels, pixels tiles, and tiles rows of a prompt.

What a model wants is an :class:`ImageSettings`, which its artifact's manifest keeps. Nothing here
knows TVM; Pillow is imported where an image is opened, and nowhere else.
"""

from amx_tvm.images.crop import Crop
from amx_tvm.images.reading import ImageInput
from amx_tvm.images.settings import ImageSettings, PromptImage
from amx_tvm.images.tiles import Tiles

__all__ = ["Crop", "ImageInput", "ImageSettings", "PromptImage", "Tiles"]
