"""Calibration text: from strings or files to windows of token ids, checked before hours are spent.

Windows are cut evenly out of all the text that is given, so that every document takes part
whatever its place, and none of them overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from amx_tvm.errors import CalibrationError


def all_windows(ids: Sequence[int], window: int, most: int) -> Tensor:
    """Cut token ids into as many windows as they fill, `most` of them evenly spaced.

    Raises
    ------
    CalibrationError
        When they do not fill one.
    """
    count = min(len(ids) // window, most)
    if not count:
        raise CalibrationError(
            f"the training text has {len(ids)} tokens, less than one window of {window}; give more"
        )
    tokens = torch.as_tensor(np.asarray(ids, np.int64))
    stride = len(tokens) // count
    return torch.stack([tokens[i * stride : i * stride + window] for i in range(count)])


def cut_windows(ids: Sequence[int], windows: int, window: int, vocab_size: int) -> Tensor:
    """Cut token ids into the windows that a recipe asks for, evenly spaced.

    Parameters
    ----------
    ids : of the documents, in order, without special tokens
    windows, window : how many, of how many tokens
    vocab_size : the model's; larger ids are another tokenizer's

    Returns
    -------
    int64 tensor [windows, window]

    Raises
    ------
    CalibrationError
        When the text is too short or the tokenizer does not fit.
    """
    need = windows * window
    if len(ids) < need:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens; the recipe needs {need} ({windows} "
            f"windows of {window}). Give more text, or take fewer windows, with a number behind "
            "the recipe's name: best:12, train:12"
        )
    tokens = torch.as_tensor(np.asarray(ids, np.int64))
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer makes token id {int(tokens.max())}, but the model's vocabulary has "
            f"{vocab_size} entries; use the model's own tokenizer"
        )
    stride = len(tokens) // windows
    return torch.stack([tokens[i * stride : i * stride + window] for i in range(windows)])
