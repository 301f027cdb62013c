"""export(): a model or an artifact in, a bundle for another machine out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amx_tvm.artifact import Manifest, artifact_bytes, signature
from amx_tvm.artifact.publication import Publication
from amx_tvm.artifact.verify import check_contents, refuse_links_out
from amx_tvm.artifact.writer import check_replaceable, complete
from amx_tvm.compiler import Artifact, compile
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ArtifactError, ModelError, TargetError
from amx_tvm.exporting import device_runtime
from amx_tvm.exporting.archive import check_tool, is_archive, write_archive
from amx_tvm.exporting.artifact_source import ArtifactSource
from amx_tvm.exporting.levels import resolve_levels, with_variants
from amx_tvm.exporting.readme import readme
from amx_tvm.exporting.records import UsedRecords
from amx_tvm.exporting.runner_build import build_runner
from amx_tvm.exporting.wheels import PYTHONS
from amx_tvm.frontends import ModelSource, open_model

RUNTIMES = ("python", "runner")
TEMPLATES = Path(__file__).parent / "templates"
ARCHITECTURES = ("x86_64", "aarch64")  # for which PyPI has TVM's runtime
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Bundle:
    """An exported model.

    Attributes
    ----------
    path : str
        The directory or archive.
    manifest : Manifest
        What is in it.
    bytes : int
        Size of all files, unpacked.
    runtime_bytes : int
        Size of what runs the model: libraries, Python runtime and runner.
    """

    path: str
    manifest: Manifest
    bytes: int
    runtime_bytes: int


def export(
    model: Any,
    target: str | Sequence[str],
    output: str | os.PathLike[str],
    *,
    quantization: str | QuantizationConfig | None = None,
    strict: bool = False,
    records: Any = None,
    runtimes: Sequence[str] = RUNTIMES,
    pythons: Sequence[str] = PYTHONS,
    wheels: str | os.PathLike[str] | None = None,
    link: bool = True,
    overwrite: bool = False,
    sign: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Make a bundle that runs on another machine.

    The same input gives the same bytes, in any process and folder.

    Parameters
    ----------
    model : path, hub id, ModelSource or Artifact
        What `amx_tvm.compile` takes, or an artifact: then its codes and scales are packed for the
        target as they are, and nothing is quantized again.
    target : str or sequence of str
        A row of `amx_tvm.targets`, or what `amx_tvm.compile` takes. Several CPU targets of one
        architecture, such as "x86-64-v3,x86-64-v4", give one bundle with a library for each; the
        most demanding one that the device's CPU can run is chosen when it is loaded.
    output : path
        A directory, or an archive that ends in .tar, .tar.gz or .tar.zst.
    quantization, strict
        As for `amx_tvm.compile`; an artifact has its own.
    records : path, callable or False, optional
        Tuning records, as for `amx_tvm.compile`; those that were used come along in ``tuning/``.
    runtimes : sequence of str
        What runs the model on the device: "python", "runner", both or none.
    pythons : sequence of str
        Python versions of the device; 1 MB each.
    wheels : path, optional
        A folder with the wheels of TVM and tvm_ffi for the device; otherwise pip downloads them.
    link : bool
        False makes a bundle with object files and a script that links them, for targets whose
        linker is not here; until then both runtimes refuse it.
    overwrite : bool
        Replace an earlier bundle.
    sign : path, optional
        A private key (Ed25519, PEM) by which the bundle is signed.
    progress : callable, optional
        As for `amx_tvm.compile`, with the further stage "bundle".

    Raises
    ------
    AmxError
        For anything wrong with the model, target or output, or a runtime that cannot be had;
        nothing is left behind.
    """
    key = signature.private_key(sign, link)
    final = Path(os.path.abspath(output))
    archive = is_archive(final)
    if archive:
        check_tool(final)
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise TargetError(f"runtime {unknown[0]!r} is unknown; known are {', '.join(RUNTIMES)}")
    levels = resolve_levels(target)
    resolved = levels[0]
    arch = _architecture(resolved.triple)
    if not link and len(levels) > 1:
        raise TargetError("a bundle that is not linked serves one target; make one for each")
    if runtimes and (arch not in ARCHITECTURES or "android" in resolved.triple):
        raise TargetError(
            f"PyPI has no TVM runtime for {resolved.triple}; export with `--runtime none` and "
            "build TVM's runtime for that machine"
        )
    if "runner" in runtimes and resolved.device != "cpu":
        raise TargetError("the C++ runner runs CPU artifacts; export with `--runtime python`")
    given, config = _source(model, quantization, strict)
    if isinstance(given, ModelSource) and given.kind == "causal_lm" and given.takes_images:
        raise ModelError(
            f"{given.name} takes images, which no bundle runs; compile it on the device"
        )
    if isinstance(given, ModelSource) and given.kind == "embedding":
        raise ModelError(
            f"{given.name} makes embeddings, which no bundle runs; compile it for the device's CPU "
            "(llvm:CPU) and load the artifact there"
        )
    tell = progress or (lambda *_: None)
    with Publication(final) as new:
        _check_output(final, archive, overwrite)
        # What runs the model comes first: a tool or package that is missing is found at once.
        tell("bundle", 0, 3, "runtime")
        extras = new.workspace / "extras"
        extras.mkdir()
        _add_runtime(
            extras, arch, resolved.device, runtimes, pythons, Path(wheels) if wheels else None
        )
        if not link:
            shutil.copyfile(TEMPLATES / "link.py", extras / "link.py")
        used = [UsedRecords(records, level) for level in levels]
        compiled = [
            compile(
                given,
                level.name,
                config,
                new.workspace / f"compiled-{i}",
                strict=strict,
                records=lookup.records,
                link=link,
                progress=progress,
            )
            for i, (level, lookup) in enumerate(zip(levels, used, strict=True))
        ]
        folder_name = _stem(final)
        place = new.workspace / "bundle" if archive else new.path
        os.rename(new.workspace / "compiled-0", place)
        described = with_variants(place, compiled)
        for lookup in used:
            lookup.write(place)
        for part in extras.iterdir():
            os.rename(part, place / part.name)
        tell("bundle", 1, 3, "manifest")
        (place / "README.md").write_text(
            readme(described, runtimes, final.name if archive else "", folder_name),
            encoding="utf-8",
        )
        manifest = complete(place, described, final, key)
        tell("bundle", 2, 3, "archive" if archive else "")
        total = artifact_bytes(place)
        parts = [place / device_runtime.FOLDER, place / "bin"]
        runtime = sum(artifact_bytes(part) for part in parts if part.is_dir())
        if archive:
            write_archive(place, new.workspace / final.name, folder_name)
            os.rename(new.workspace / final.name, new.path)
        _check_output(final, archive, overwrite)
        new.publish(overwrite)
        tell("bundle", 3, 3, "")
    return Bundle(str(final), manifest, total, runtime)


def _check_output(final: Path, archive: bool, overwrite: bool) -> None:
    """Refuse an output that must not be replaced."""
    if not archive:
        check_replaceable(final, overwrite)
    elif final.is_dir() or (final.exists() and not overwrite):
        raise ArtifactError(f"{final} exists; choose another output or pass overwrite")


def _source(
    model: Any, quantization: str | QuantizationConfig | None, strict: bool
) -> tuple[Any, QuantizationConfig | str]:
    """Return what to compile, opened, and its settings."""
    path = model.path if isinstance(model, Artifact) else model
    is_path = isinstance(path, str | os.PathLike)
    if not is_path:
        return model, "amxfp4" if quantization is None else quantization
    if not (Path(path) / "manifest.json").is_file():
        wanted = QuantizationConfig.parse("amxfp4" if quantization is None else quantization)
        return open_model(path), wanted
    if quantization is not None or strict:
        raise ArtifactError(
            f"{path} is an artifact and keeps its quantization "
            f"({Manifest.load(path).quantization.get('format')}); leave the option out, or export "
            "from the model"
        )
    manifest = Manifest.load(path)
    check_contents(path, manifest)
    refuse_links_out(path, manifest)
    source = ArtifactSource(path)
    return source, source.quantization


def _architecture(triple: str) -> str:
    arch = triple.split("-")[0]
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(arch, arch)


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (".zst", ".gz", ".tar"):
        name = name.removesuffix(suffix)
    return name


def _add_runtime(
    directory: Path,
    arch: str,
    device: str,
    runtimes: Sequence[str],
    pythons: Sequence[str],
    wheels: Path | None,
) -> None:
    """Add what runs the model on the device."""
    if not runtimes:
        return
    folder = directory / device_runtime.FOLDER
    device_runtime.write_libraries(folder, arch, device, wheels)
    if "python" in runtimes:
        device_runtime.write_python(folder, arch, pythons, wheels)
        shutil.copyfile(TEMPLATES / "generate.py", directory / "generate.py")
    if "runner" in runtimes:
        (directory / "bin").mkdir()
        shutil.copy2(build_runner(arch, wheels), directory / "bin" / "amx-run")
