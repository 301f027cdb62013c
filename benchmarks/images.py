"""Seconds from an image to the first token: of one tile, and as the model's processor cuts it.

python benchmarks/images.py ARTIFACT --image 512 --repeats 5
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
from PIL import Image

import amx_tvm
from amx_tvm.images import ImageSettings, Tiles


def picture(edge: int, seed: int) -> Image.Image:
    """Return smooth noise: another image each time, which nothing is kept of."""
    small = np.random.default_rng(seed).integers(0, 256, (37, 41, 3), np.uint8)
    return Image.fromarray(small).resize((edge, edge), Image.Resampling.BICUBIC)


def run(engine: amx_tvm.runtime.Engine, settings: ImageSettings, edge: int, seed: int) -> None:
    token = engine.tokenizer.id_to_token(settings.token)
    start = time.perf_counter()
    image = settings.prepare(picture(edge, seed), token)
    prepared = time.perf_counter() - start
    found = engine.generate(f"What is this? {token} ", 1, images=[image], ignore_eos=True).timings
    whole = time.perf_counter() - start
    print(
        f"{len(image.tiles)} tiles: {whole:.3f} s to the first token; preparing {prepared:.3f}, "
        f"tower {found.image_s:.3f}, prompt of {found.prefill_tokens} {found.prefill_s:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--image", type=int, default=512, help="pixels of its edge")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    engine = amx_tvm.load(given.artifact, threads=given.threads)
    whole = engine.images
    assert whole is not None, "the model takes no images"
    forms = [whole]
    if isinstance(whole.processing, Tiles):
        forms.insert(0, replace(whole, processing=replace(whole.processing, split=False)))
    for form in forms:
        run(engine, form, given.image, 1000)
        for seed in range(given.repeats):
            run(engine, form, given.image, seed)


if __name__ == "__main__":
    main()
