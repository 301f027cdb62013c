"""The README of a bundle: what it is, and the lines that its user types."""

from __future__ import annotations

from collections.abc import Sequence

from amx_tvm.artifact import Manifest


def readme(manifest: Manifest, runtimes: Sequence[str], archive: str, root: str) -> str:
    """Return the text of README.md.

    Parameters
    ----------
    manifest : Manifest
        The bundle's artifact.
    runtimes : sequence of str
        "python" and "runner", what the bundle has.
    archive : str
        File name of the archive, or "" for a directory.
    root : str
        Name of the bundle's folder.
    """
    model, target = manifest.model, manifest.target
    lines = [f"cd {root}"]
    if archive:
        lines[0] = f"tar -xf {archive} && {lines[0]}"
    if not manifest.linked:
        lines.append(f"python3 link.py {_compiler(target.triple)}")
    if "runner" in runtimes:
        lines.append('./bin/amx-run . "The capital of France is" -n 64')
    if "python" in runtimes:
        lines.append('python3 generate.py "The capital of France is" -n 64')
    features = ", ".join(target.features) or "none beyond the architecture's"
    text = [
        f"# {model['name']} for {' and '.join(manifest.targets)}",
        "",
        *[f"    {line}" for line in lines],
        "",
        f"Weights: {manifest.quantization['format']}, {manifest.parameters.bytes / 1e6:.1f} MB. "
        f"Context: up to {model['context_length']} tokens.",
        f"CPU features that the code uses: {features}; they are checked before anything is loaded.",
        *[
            f"`{v.library.file}` is taken instead on CPUs that also have "
            f"{', '.join(f for f in v.target.features if f not in target.features)}."
            for v in manifest.variants
        ],
        "",
    ]
    if "runner" in runtimes:
        text += [
            "`bin/amx-run` needs the C and C++ libraries of Debian 12 or later (glibc 2.34). "
            "`--max-memory 300M` limits its memory, `--help` lists its options.",
            "",
        ]
    if "python" in runtimes:
        text += [
            "`generate.py` needs Python and NumPy; a text as prompt also needs the package "
            "`tokenizers`, `--ids 1,2,3` does not. For programs of your own, pip installs the "
            "runtime without a network:",
            "",
            "    python3 -m venv --system-site-packages env",
            "    env/bin/pip install --no-index ./runtime",
            "    env/bin/python  # import amx_tvm; engine = amx_tvm.load('.')",
            "",
        ]
    if not runtimes:
        text += [
            f"Run it with amx_tvm {manifest.versions.amx_tvm}, apache-tvm {manifest.versions.tvm} "
            f"and apache-tvm-ffi {manifest.versions.tvm_ffi}.",
            "",
        ]
    if not manifest.linked:
        text += [
            "The code is in `objects`, not linked: link.py makes lib.so with a compiler for "
            f"{target.triple} and completes manifest.json. Until then nothing loads this folder.",
            "",
        ]
    text += ["manifest.json lists every file with its SHA-256; loading checks them.", ""]
    return "\n".join(text)


def _compiler(triple: str) -> str:
    """Return the usual name of a compiler for a triple."""
    if "android" in triple:
        return "$NDK/toolchains/llvm/prebuilt/linux-x86_64/bin/aarch64-linux-android24-clang++"
    return f"{triple.split('-')[0]}-linux-gnu-g++"
