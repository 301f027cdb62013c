"""`calibrate`: a model, a configuration, calibration text and a recipe in; parameters out."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amx_tvm import formats
from amx_tvm.calibration import recipes
from amx_tvm.calibration.block import open_decoder
from amx_tvm.calibration.recipes import MixedPrecision, Recipe, Train
from amx_tvm.calibration.sensitivity import Sensitivity, allocate, sensitivities, with_formats
from amx_tvm.calibration.store import Store
from amx_tvm.calibration.stream import Progress, Stream
from amx_tvm.calibration.texts import all_windows, cut_windows
from amx_tvm.calibration.train import Training
from amx_tvm.config import QuantizationConfig
from amx_tvm.documents import read_documents
from amx_tvm.errors import CalibrationError
from amx_tvm.formats import Quantized
from amx_tvm.frontends import ModelSource
from amx_tvm.scratch import scratch

AT_ONCE = 256  # documents that are tokenized together, in as many threads as there are


@dataclass(frozen=True)
class Calibration:
    """What a recipe made of a model.

    Attributes
    ----------
    config : QuantizationConfig
        The configuration to compile with; mixed precision has added overrides.
    recipe : Recipe
    quantized : mapping of weight name to Quantized
        Rounded weights, read from disk at each access.
    floats : mapping of name to float32 array
        Float parameters that changed (norm weights, weights that stay unquantized).
    errors : dict of str to float
        Relative squared output error of each rounded linear on the calibration text.
    units : list of Sensitivity
        What mixed precision measured; empty without it.
    """

    config: QuantizationConfig
    recipe: Recipe
    quantized: Mapping[str, Quantized]
    floats: Mapping[str, np.ndarray]
    errors: dict[str, float] = field(default_factory=dict)
    units: list[Sensitivity] = field(default_factory=list)
    _keep: Any = field(default=None, repr=False)

    def describe(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values, for the manifest."""
        return self.recipe.describe()


class TrainingDiverged(CalibrationError):
    """A training that was lost on its way.

    Attributes
    ----------
    calibration : Calibration
        The best state that it came through, at worst its start, for ``compile(overrides=)``.
    gained : bool
        Whether that state is better than the start.
    """

    def __init__(self, calibration: Calibration, trainer: Training) -> None:
        self.calibration, self.gained = calibration, trainer.best < trainer.start
        kept = (
            f"its best state, of {trainer.best:.4f}, is kept"
            if self.gained
            else "no state was better than the start"
        )
        super().__init__(
            f"training diverged {trainer.diverged}, from {trainer.start:.4f} at its start; {kept}. "
            "Take lower rates (Train's rate and scale_rate), or recipe best, which trains nothing"
        )


def calibrate(
    source: ModelSource,
    config: QuantizationConfig | str,
    text: Iterable[str] | Tensor | np.ndarray,
    recipe: str | Recipe = "gptq",
    *,
    directory: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Round a model's linears by a recipe, layer by layer.

    Parameters
    ----------
    source : ModelSource
        The float model. Weights that the file already holds in the format asked for pass through.
    config : QuantizationConfig or str
        Formats and activations, as for ``compile``; "auto" activations count as exact.
    text : documents, or integer token ids [windows, tokens]
        Calibration text, other than what the result is tested on. Documents are tokenized by the
        model's own tokenizer and cut into the recipe's windows.
    recipe : str or Recipe
        A name of ``RECIPES``, or steps of your own.
    directory : path, optional
        An empty directory for the results; by default a temporary one that lives as long as the
        returned object.
    device : str, optional
        A torch device, such as "cuda", on which everything is computed; by default the GPU that
        torch sees for a recipe that trains, else the CPU.
    progress : callable, optional
        Called with (stage, done, total, detail).

    Returns
    -------
    Calibration

    Raises
    ------
    CalibrationError
        For a model, recipe or text that does not fit; the message says what does. A training that
        diverges raises `TrainingDiverged`, which holds the best state.
    """
    config = QuantizationConfig.parse(config)
    chosen = recipes.get(recipe)
    if source.takes_images:
        raise CalibrationError(
            f"{source.name} takes images, which no recipe shows it; compile without calibration"
        )
    if config.format == "none" and not config.overrides:
        raise CalibrationError(
            "quantization 'none' rounds nothing, so there is nothing to calibrate; choose a "
            f"format: {', '.join(n for n in formats.names() if formats.get(n).code_bits == 4)}"
        )
    _, decoder = open_decoder(source)
    if device is None:
        trains = chosen.find(Train) is not None
        device = "cuda" if trains and torch.cuda.is_available() else "cpu"
    _check_device(device)
    if config.attention and (chosen.find(Train) is not None or device != "cpu"):
        raise CalibrationError(
            f"recipes round attention's operands on a CPU only, and {chosen.name!r} runs on "
            f"{device} or trains; choose recipe best, or leave quantized attention out"
        )
    windows, training = _windows(source, text, chosen, decoder.vocab_size)
    keep = None
    if directory is None:
        keep = tempfile.TemporaryDirectory(prefix="amx-calibration-")
        directory = keep.name
    store = Store(Path(directory))
    units: list[Sensitivity] = []
    step = chosen.find(MixedPrecision)
    if step is not None:
        names = (config.format, step.better)
        units = list(sensitivities(Stream(source, config, windows, chosen), names, progress))
        config = with_formats(config, allocate(units, config.format, step), step.better)
    errors: dict[str, float] = {}
    step = chosen.find(Train)
    made = Calibration(config, chosen, store.quantized, store.floats, errors, units, keep)
    with _enough_memory(source, chosen, device), scratch("amx-targets-") as folder:
        targets = Store(Path(folder) / "targets")
        for result in Stream(source, config, windows, chosen, device).run(progress):
            store.put(result.name, result.value)
            if isinstance(result.value, Quantized):
                errors[result.name] = result.error
            if step is not None and result.target is not None:
                targets.put(result.name, result.target.cpu().numpy())
        if step is not None:
            start = store.quantized, targets.floats, store.floats
            trainer = Training(source, config, *start, training, step, device)
            for name, value in trainer.run(progress):
                store.put(name, value)
            if trainer.diverged:
                raise TrainingDiverged(made, trainer)
    return made


@contextmanager
def _enough_memory(source: ModelSource, recipe: Recipe, device: str) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise CalibrationError(
            f"{device} has too little memory for recipe {recipe.name!r} on {source.name} "
            f"({str(error).splitlines()[0]}). End what else uses it, train with recompute=True and "
            "smaller at_once (Train), or take recipe best, which needs one layer at a time"
        ) from None


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # without CUDA torch asserts
        raise CalibrationError(
            f"torch cannot compute on {device!r} ({str(error).splitlines()[0]}); expected cpu, or "
            "cuda where torch sees a GPU"
        ) from None


def sensitivity_report(
    source: ModelSource,
    names: Sequence[str],
    text: str | os.PathLike[str] | Tensor,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """Measure how much each group of linears suffers under formats, by a text or token ids.

    Parameters
    ----------
    source : ModelSource
    names : formats
    text : path of a text, or integer token ids [windows, tokens]
    progress : callable, optional
        Called with (stage, done, total, detail).
    """
    documents = text if isinstance(text, Tensor) else read_documents(text)
    recipe = recipes.get("plain")
    windows, _ = _windows(source, documents, recipe, open_decoder(source)[1].vocab_size)
    stream = Stream(source, QuantizationConfig(format="none"), windows, recipe)
    return list(sensitivities(stream, names, progress))


def _windows(
    source: ModelSource, text: Iterable[str] | Tensor | np.ndarray, recipe: Recipe, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [windows, tokens] of either kind of input, to calibrate and to train on."""
    if isinstance(text, str):
        text = [text]
    if isinstance(text, np.ndarray | Tensor):
        ids = torch.as_tensor(text).long()
        if ids.dim() != 2 or not ids.numel():
            raise CalibrationError(
                f"calibration token ids have shape {tuple(ids.shape)}; expected [windows, tokens]"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise CalibrationError(
                f"calibration token ids reach from {int(ids.min())} to {int(ids.max())}, but the "
                f"model's vocabulary has {vocab_size} entries; use the model's own tokenizer"
            )
        if recipe.find(Train) is None:
            return ids, ids
        return ids[:: -(-len(ids) // recipe.windows)], ids
    tokenizer = tokenizer_of(source)
    tokens: list[int] = []
    documents = iter(text)
    while part := list(itertools.islice(documents, AT_ONCE)):
        for encoded in tokenizer.encode_batch(part, add_special_tokens=False):
            tokens += encoded.ids
    windows = cut_windows(tokens, recipe.windows, recipe.window, vocab_size)
    step = recipe.find(Train)
    trained = windows if step is None else all_windows(tokens, recipe.window, step.windows)
    start = tokenizer.encode("", add_special_tokens=True).ids
    if len(start) == 1:  # every text begins so, and some models see nothing without it
        windows[:, 0] = trained[:, 0] = start[0]
    return windows, trained


def tokenizer_of(source: ModelSource) -> Any:
    """Build the model's own tokenizer, a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    with scratch("amx-tokenizer-") as folder:
        source.write_tokenizer(folder)
        return Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
