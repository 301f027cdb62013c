"""Readers of others' files as the fuzzer calls them: given an empty folder and one input.

They return or raise an AmxError; `limited.WrongError` is for what should not have been taken.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import good
from . import mutations as damage
from .limited import WrongError


def read_safetensors(folder: Path, content: bytes) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from amx_tvm.frontends.hf.safetensors_file import ITEM_BYTES, LOADABLE, SafetensorsFile

    path = folder / "m.safetensors"
    path.write_bytes(content)
    file = SafetensorsFile(path)
    for name, entry in file.tensors.items():
        if entry.dtype in LOADABLE:
            file.load(name)
    if all(entry.dtype in ITEM_BYTES for entry in file.tensors.values()):
        try:
            load(content)
        except SafetensorError as error:
            raise WrongError(f"the reference refuses it: {error}") from None
        except (TypeError, KeyError):
            pass  # a type that NumPy lacks


def _identify(source: Any) -> None:
    from amx_tvm.frontends.checkpoint import identify
    from amx_tvm.models.rope import rotation

    _, decoder = identify(source)
    for layer in range(min(decoder.num_layers, 4)):
        rotation(decoder, layer)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _model() -> dict[str, bytes]:
    header, data = good.safetensors_parts(good.weights())
    return {
        "config.json": damage.text_of(good.CONFIG),
        "model.safetensors": good.safetensors(damage.text_of(header), data),
        "tokenizer.json": damage.text_of(good.tokenizer()),
        "tokenizer_config.json": b'{"eos_token": "</s>"}',
    }


def read_adapter(folder: Path, files: dict[str, bytes]) -> None:
    from amx_tvm.frontends import open_model
    from amx_tvm.frontends.lora import MergedLora

    header, data = good.safetensors_parts(good.adapter())
    weights = {"adapter_model.safetensors": good.safetensors(damage.text_of(header), data)}
    _write(folder, {**_model(), **weights, **files})
    source = MergedLora(open_model(folder), folder)
    for name in source.names():
        source.check(name)
        if source.load(name).shape != tuple(source.shape(name)):
            raise WrongError(f"{name} has another shape than the base's")


def read_directory(folder: Path, files: dict[str, bytes]) -> None:
    from amx_tvm.frontends import open_model

    _write(folder, {**_model(), **files})
    source = open_model(folder)
    _identify(source)
    _ = source.generation_config
    source.write_tokenizer(folder / "out")


def read_gguf(folder: Path, content: bytes) -> None:
    from amx_tvm.frontends.gguf.source import GgufSource

    path = folder / "m.gguf"
    path.write_bytes(content)
    source = GgufSource(path)
    _identify(source)
    source.write_tokenizer(folder)
    for name in source.names()[:3]:
        source.check(name)
        source.load(name)


def read_artifact(files: dict[str, bytes]) -> Callable[[Path, Any], None]:
    def read(folder: Path, case: tuple[str, Any]) -> None:
        from amx_tvm.artifact import Manifest, verify_artifact
        from amx_tvm.artifact.manifest import _digest
        from amx_tvm.cli.inspect_command import _facts, rows
        from amx_tvm.exporting.artifact_source import ArtifactSource
        from relax_passes.chosen import chosen_kernels

        name, changed = case
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        if name == "forged":  # by somebody who knows the digest
            data = changed if isinstance(changed, dict) else {"": changed}
            data["digest"] = _digest(data)
            changed, name = damage.text_of(data), "manifest.json"
        (folder / name).write_bytes(changed)
        verify_artifact(folder, "quick")
        manifest = Manifest.load(folder)
        if case[0] not in ("forged", "manifest.json") and changed != files[name]:
            raise WrongError(f"{name} was changed and verification passed")
        list(_facts(folder, manifest))
        rows(chosen_kernels(manifest.linears), True)
        ArtifactSource(folder)

    return read


def read_template(folder: Path, source: str) -> None:
    from amx_tvm.runtime.chat import ChatTemplate

    messages = [{"role": "system", "content": "a b"}, {"role": "user", "content": "hé"}]
    ChatTemplate(source, {"eos_token": "</s>"}).render(messages, tools=None)


def read_onnx(folder: Path, content: bytes) -> None:
    from amx_tvm.frontends.importers.onnx_file import from_onnx_file

    (folder / "m.onnx").write_bytes(content)
    from_onnx_file(folder / "m.onnx")


def read_stablehlo(folder: Path, text: str) -> None:
    from amx_tvm.frontends.importers.stablehlo import from_stablehlo

    from_stablehlo(text.encode("utf-8", "surrogatepass"))


def read_records(folder: Path, lines: bytes) -> None:
    from tuning.records import RecordFile, refusal

    (folder / "records.jsonl").write_bytes(lines)
    file = RecordFile(folder / "records.jsonl")
    for record in file.records:
        refusal(record, record.target)
    file.best()
    list(map(str, file.damage))


def read_journal(folder: Path, lines: bytes) -> None:
    from tuning import journal

    (folder / "journal.jsonl").write_bytes(lines)
    entries, damaged = journal.read(folder / "journal.jsonl")
    journal.append(folder / "journal.jsonl", {"kind": "end"})
    again, _ = journal.read(folder / "journal.jsonl")
    if len(again) != len(entries) + 1 or again[:-1] != entries:
        raise WrongError("a line was lost or changed by an append")
    list(map(str, damaged))
