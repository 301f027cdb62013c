"""What every test runs with: the same examples, no thread that spins, long files first."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from hypothesis import settings

# Threads of TVM's pool, and of torch and BLAS, wait by spinning: beside a second process of tests
# that takes the cores from whoever works. Processes that tests start inherit both.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell that starts tests in its background has them ignore the interrupts that some send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test takes the power away: artifacts of this process need not have reached the disk, for which
# every one of them would wait. Processes that tests start do wait.
os.fsync = lambda _descriptor: None

# Property tests draw the same examples in every run, so that a change is what turns one red; not a
# slow machine either.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The longest folders, first: what comes last should be short, so that all processes end together.
LONGEST = ("end_to_end", "export", "tuning", "models", "kernels")


def pytest_collection_modifyitems(items):
    """Put the longest folders first, each in its own order."""

    def place(item):
        found = [LONGEST.index(folder) for folder in item.path.parts if folder in LONGEST]
        return found[0] if found else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def compile_parameters():
    """Compile without the machine code: a model's parameters and manifest, as unlinked ones are."""
    from amx_tvm.artifact import ArtifactWriter
    from amx_tvm.artifact.manifest import LibraryRecord
    from amx_tvm.compiler.compile import Artifact, manifest_of, write_parameters
    from amx_tvm.compiler.lowered import lower_source
    from amx_tvm.config import QuantizationConfig
    from amx_tvm.frontends import open_model
    from amx_tvm.targets import resolve

    def run(model, target="llvm", quantization="amxfp4", output=None):
        source, resolved = open_model(model), resolve(target)
        config = QuantizationConfig.parse(quantization).resolve(resolved.device)
        with ArtifactWriter(output) as writer:
            lowered = lower_source(source, resolved, config)
            write_parameters(lowered, writer)
            library = LibraryRecord("lib.so", 0, "")
            made = writer.finish(manifest_of(source, lowered, resolved, config, writer, library))
        return Artifact(str(output), made)

    return run


@pytest.fixture(scope="session")
def browser():
    """A real Chromium; what needs one is skipped where there is none, or no Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def key_pair(tmp_path):
    """Return (private, public) key files of a name, in PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    def make(name):
        key = Ed25519PrivateKey.generate()
        encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
        kind = serialization.PublicFormat.SubjectPublicKeyInfo
        (tmp_path / f"{name}.pem").write_bytes(private)
        (tmp_path / f"{name}.pub").write_bytes(key.public_key().public_bytes(encoding, kind))
        return tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"

    return make
