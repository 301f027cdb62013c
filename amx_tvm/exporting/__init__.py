"""Bundles for other machines: compiled here, copied there, run there with a few megabytes.

    bundle = amx_tvm.export("dist/smollm2", target="raspberry-pi/4b-aarch64", output="pi.tar.zst")

A bundle is an artifact directory with more in it::

    lib.so params/ manifest.json tokenizer.json ...   the artifact, for the device's CPU
    runtime/                                          tvm_ffi, libtvm_runtime, the Python runtime;
                                                      `pip install --no-index ./runtime` takes it
    bin/amx-run                                       the C++ runner
    generate.py README.md                             how to start it
    objects/ link.py                                  instead of lib.so, where nothing links it here

Every added file is listed with its SHA-256 in the manifest, like the tokenizer's.
"""

from amx_tvm.exporting.api import Bundle, export
from amx_tvm.exporting.artifact_source import ArtifactSource

__all__ = ["ArtifactSource", "Bundle", "export"]
