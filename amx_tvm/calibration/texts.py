"""Calibration text: from strings or files to windows of token ids, checked before hours are spent.

Windows are cut evenly out of all the text that is given, so that every document takes part
whatever its place, and none of them overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from amx_tvm.calibration.recipes import Recipe
from amx_tvm.errors import CalibrationError

Encode = Callable[[str], Sequence[int]]


def calibration_windows(
    texts: Iterable[str], encode: Encode, recipe: Recipe, vocab_size: int
) -> Tensor:
    """Cut texts into the windows that a recipe asks for.

    Parameters
    ----------
    texts : documents; they are joined in order
    encode : text -> token ids, without special tokens
    recipe : says how many windows of how many tokens
    vocab_size : the model's; larger ids are another tokenizer's

    Returns
    -------
    int64 tensor [recipe.windows, recipe.window]

    Raises
    ------
    CalibrationError
        When the text is too short or the tokenizer does not fit.
    """
    ids = [int(token) for text in texts for token in encode(text)]
    return cut_windows(ids, recipe.windows, recipe.window, vocab_size)


def cut_windows(ids: Sequence[int], windows: int, window: int, vocab_size: int) -> Tensor:
    """Cut token ids into evenly spaced windows; see `calibration_windows`."""
    need = windows * window
    if len(ids) < need:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens; the recipe needs {need} ({windows} "
            f"windows of {window}). Give more text, or take fewer windows, such as recipe best:12"
        )
    tokens = torch.as_tensor(np.asarray(ids, np.int64))
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer makes token id {int(tokens.max())}, but the model's vocabulary has "
            f"{vocab_size} entries; use the model's own tokenizer"
        )
    stride = len(tokens) // windows
    return torch.stack([tokens[i * stride : i * stride + window] for i in range(windows)])
