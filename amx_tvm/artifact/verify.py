"""Check that an artifact is whole and made for this machine, before any of its code is loaded.

Three depths, because reading a large artifact costs time that loading it does not:

======= ============================================================================ ============
verify  what is checked                                                              cost
======= ============================================================================ ============
False   manifest, versions, target, every file's size                                ~ms
"quick" and the library's SHA-256, tokenizer files, CRC-32 of every parameter block  1 to 4 GB/s
"full"  and the SHA-256 of every parameter shard                                     0.5 to 2 GB/s
======= ============================================================================ ============

CRC-32 finds every single flipped bit or byte and any burst up to 32 bits; it does not resist
somebody who forges weights on purpose, which "full" against a trusted manifest does. "quick" is
the default: it also brings the weights into the page cache, which the first token needs anyway.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

from amx_tvm.artifact import signature
from amx_tvm.artifact.cpu import cpu_features, missing_features
from amx_tvm.artifact.manifest import Manifest, ShardRecord
from amx_tvm.errors import ArtifactError

Verify = Literal[False, "quick", "full"]
_READ = 256 << 10  # bytes at a time: they stay in the L2 cache for the checksum
_AGAIN = "copy the artifact anew or compile the model again"


def verify_artifact(
    directory: Path | str,
    verify: Verify | bool = "quick",
    versions: tuple[str, str] | None = None,
    device: str | None = None,
    require_signature: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Read the manifest and check the artifact against it and against this machine.

    Parameters
    ----------
    directory : Path or str
        The artifact.
    verify : False, "quick" or "full"
        How deep to look; see the module's docstring. True means "quick".
    versions : (str, str), optional
        The TVM and tvm_ffi versions that would run it; not compared if left out or "".
    device : str, optional
        The device asked for ("cpu", "cuda"); must be the artifact's.
    require_signature : path-like, optional
        A public key: the artifact must be signed with its private one, and is checked as "full"
        does, whatever ``verify`` says.

    Returns
    -------
    Manifest
        With the target and library for this CPU, where the artifact has several.

    Raises
    ------
    ArtifactError
        With the first thing that is wrong and what to do about it.
    """
    if verify not in (False, True, "quick", "full"):
        raise ArtifactError(f"verify is {verify!r}, expected False, 'quick' or 'full'")
    root = Path(directory)
    manifest = Manifest.load(root)
    if require_signature is not None:
        signature.check(root, manifest.digest, require_signature)
        verify = "full"
    if versions is not None:
        _check_versions(root, manifest, versions)
    manifest = manifest.for_cpu(cpu_features())
    check_target(root, manifest, device)
    check_contents(root, manifest, verify)
    return manifest


def check_contents(
    directory: Path | str, manifest: Manifest, verify: Verify | bool = "quick"
) -> None:
    """Check an artifact's files against its manifest, whatever machine it is for.

    Raises ArtifactError as `verify_artifact` does, of which this is the second half.
    """
    root = Path(directory)
    if not manifest.linked:
        raise ArtifactError(
            f"{root} holds object files for {manifest.target.triple} that are not linked yet; "
            "`python3 link.py COMPILER` in that folder makes lib.so"
        )
    _check_sizes(root, manifest)
    if verify:
        _check_digests(root, manifest, "full" if verify == "full" else "quick")


def _check_versions(root: Path, manifest: Manifest, installed: tuple[str, str]) -> None:
    """TVM promises no stable executable format between versions, so they must be equal."""
    built = (manifest.versions.tvm, manifest.versions.tvm_ffi)
    for package, made, here in zip(("apache-tvm", "apache-tvm-ffi"), built, installed, strict=True):
        if here and made != here:
            raise ArtifactError(
                f"{root} was compiled with {package} {made}, installed is {here}; compile the "
                f"model again or `pip install {package}=={made}`"
            )


def check_target(root: Path, manifest: Manifest, device: str | None = None) -> None:
    """Raise ArtifactError if the artifact's code cannot run here.

    A library that uses an instruction this CPU lacks would end the process with a bare SIGILL.
    """
    target = manifest.target
    if device is not None and str(device).split(":")[0] != target.device:
        raise ArtifactError(
            f"{root} was compiled for device {target.device!r} ({target.key}), asked for "
            f"{device!r}; load it without `device`, or compile with another --target"
        )
    built = target.triple.split("-")[0].lower() if target.triple else ""
    here = platform.machine().lower()
    same = {"amd64": "x86_64", "arm64": "aarch64"}
    if built and same.get(built, built) != same.get(here, here):
        raise ArtifactError(
            f"{root} was compiled for {target.triple}, this machine is {here}; compile the model "
            "with this machine's --target"
        )
    if target.device != "cpu":
        return  # the driver says what the GPU is; the runtime asks it
    missing = missing_features(target.features, cpu_features())
    if missing:
        raise ArtifactError(
            f"{root} was compiled for {target.key} and needs the CPU features "
            f"{', '.join(missing)}, which this CPU lacks; compile it with `--target llvm` here"
        )


def _check_sizes(root: Path, manifest: Manifest) -> None:
    expected = {manifest.library.file: manifest.library.bytes}
    expected.update({shard.file: shard.bytes for shard in manifest.parameters.shards})
    for name in (*expected, *manifest.files):
        try:
            info = os.stat(root / name)
        except OSError as error:
            raise ArtifactError(f"{root}: {name} is missing ({error.strerror}); {_AGAIN}") from None
        if not stat.S_ISREG(info.st_mode):
            raise ArtifactError(f"{root}: {name} is no regular file; {_AGAIN}")
        size = expected.get(name, info.st_size)
        if info.st_size != size:
            raise ArtifactError(
                f"{root}: {name} has {info.st_size} bytes, the manifest says {size} (truncated or "
                f"replaced); {_AGAIN}"
            )


def refuse_links_out(directory: Path | str, manifest: Manifest) -> None:
    """Refuse an artifact with a file that is a link to somewhere else.

    Whoever passes an artifact on, as `amx_tvm.export` does, would pass that file on as well.

    Raises
    ------
    ArtifactError
        Naming the link and where it leads.
    """
    root = Path(directory).resolve()
    shards = [shard.file for shard in manifest.parameters.shards]
    for name in (manifest.library.file, *shards, *manifest.files):
        place = (root / name).resolve()
        if not place.is_relative_to(root):
            raise ArtifactError(
                f"{directory}: {name} is a link to {place}, outside the artifact; copy the "
                "artifact with its files (cp -rL) first"
            )


def _check_digests(root: Path, manifest: Manifest, depth: str) -> None:
    """Check all content, spread over the cores: SHA-256 and CRC-32 both release the GIL."""
    library = manifest.library
    jobs: list[Callable[[], None]] = [partial(_check_file, root, library.file, library.sha256)]
    for name, digest in manifest.files.items():
        jobs.append(partial(_check_file, root, name, digest))
    for shard in manifest.parameters.shards:
        if depth == "full":
            jobs.append(partial(_check_file, root, shard.file, shard.sha256))
        elif shard.bytes:
            for index in range(len(shard.crc32)):
                jobs.append(partial(_check_block, root, manifest, shard, index))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def _check_file(root: Path, name: str, digest: str) -> None:
    with open(root / name, "rb") as file:
        found = hashlib.sha256()
        while piece := file.read(4 << 20):
            found.update(piece)
    if found.hexdigest() != digest:
        raise ArtifactError(
            f"{root}: {name} is damaged: its SHA-256 is {found.hexdigest()[:12]}..., the manifest "
            f"says {digest[:12]}...; {_AGAIN}"
        )


def _check_block(root: Path, manifest: Manifest, shard: ShardRecord, index: int) -> None:
    """Compare one block's CRC-32. Reading beats mapping: no page fault every 4 KiB."""
    start = index * shard.block_bytes
    end = min(start + shard.block_bytes, shard.bytes)
    found = 0
    buffer = memoryview(bytearray(_READ))
    with open(root / shard.file, "rb", buffering=0) as file:
        file.seek(start)
        left = end - start
        while left and (count := file.readinto(buffer[: min(left, _READ)])):
            found = zlib.crc32(buffer[:count], found)
            left -= count
    if found == shard.crc32[index]:
        return
    number = manifest.parameters.shards.index(shard)
    inside = [
        name
        for name, record in manifest.parameters.tensors.items()
        if record.shard == number and record.offset < end and record.offset + record.bytes > start
    ]
    raise ArtifactError(
        f"{root}: {shard.file} is damaged between bytes {start} and {end} (checksum differs; "
        f"tensors there: {', '.join(inside[:3])}{'...' if len(inside) > 3 else ''}); {_AGAIN}"
    )
