#!/usr/bin/env python3
"""Link this bundle's object files to lib.so and complete its manifest.

    python3 link.py COMPILER [OPTION...]

COMPILER is one for the device, such as the NDK's aarch64-linux-android24-clang++ or Debian's
riscv64-linux-gnu-g++; options go to it as they are. lib.so finds TVM's symbols in the process
that loads it, so nothing else is linked.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MANIFEST = ROOT / "manifest.json"


def sha256(path):
    """Return a file's SHA-256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link(compiler, options, objects):
    """Link the object files; end with the compiler's exit code if it fails."""
    command = [compiler, "-shared", "-fPIC", "-o", ROOT / "lib.so", "-O2", "-s", *objects, *options]
    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        sys.exit(f"error: {compiler} cannot be run ({error.strerror})")
    if done.returncode:
        sys.exit(done.returncode)


def complete(manifest):
    """Write the library's size and SHA-256 into the manifest, and its own digest."""
    library = ROOT / manifest["library"]["file"]
    manifest["library"].update(bytes=library.stat().st_size, sha256=sha256(library))
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    partial = MANIFEST.with_suffix(".partial")
    partial.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(MANIFEST)


def main():
    """Run the command line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    names = [name for name in manifest["files"] if name.startswith("objects/")]
    for name in names:
        if sha256(ROOT / name) != manifest["files"][name]:
            sys.exit(f"error: {name} is damaged; copy the bundle anew")
    # The model's code before the packed executable, as TVM orders them.
    objects = [ROOT / name for name in sorted(names, key=lambda n: (n.endswith("devc.o"), n))]
    link(sys.argv[1], sys.argv[2:], objects)
    complete(manifest)
    print(f"lib.so has {manifest['library']['bytes']} bytes; manifest.json is complete")


if __name__ == "__main__":
    main()
