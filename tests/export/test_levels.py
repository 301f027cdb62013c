"""One bundle with a library for each CPU level: the features decide before anything is loaded."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from export_tools import skip_without

import amx_tvm
from amx_tvm.artifact import Manifest, cpu
from amx_tvm.errors import ArtifactError, TargetError

PROMPT = [5, 6, 7, 8]
V2, V3, V4 = cpu.LEVELS.values()
VNNI = V4 | frozenset("avx512vnni avx512vbmi avx512bf16".split())


@pytest.fixture(scope="module")
def bundle(tiny_artifact, tmp_path_factory):
    output = tmp_path_factory.mktemp("levels") / "bundle"
    targets = "x86-64-v4,x86-64-v2, x86-64-v3"
    return amx_tvm.export(tiny_artifact, targets, output, runtimes=())


def level(manifest):
    return manifest.target.key.rpartition("-")[2]


def test_the_features_decide(bundle):
    manifest = Manifest.load(bundle.path)
    assert manifest == bundle.manifest and level(manifest) == "v2"
    assert [level(variant) for variant in manifest.variants] == ["v4", "v3"]
    chosen = [level(manifest.for_cpu(have)) for have in (V2, V3, V3 | {"avx512f"}, V4)]
    assert chosen == ["v2", "v3", "v3", "v4"]
    assert level(manifest.for_cpu(frozenset())) == "v2"  # nothing is known about the CPU
    files = {manifest.library.file} | {v.library.file for v in manifest.variants}
    assert files == {"lib.so", "lib-x86-64-v3.so", "lib-x86-64-v4.so"}


@pytest.mark.parametrize(("have", "name"), [(V2, "v2"), (V3, "v3"), (V4, "v4")])
def test_every_level_loads(bundle, tiny_artifact, monkeypatch, have, name):
    if not have <= cpu.cpu_features():
        pytest.skip(f"this CPU is no x86-64-{name}")
    with monkeypatch.context() as faked:
        faked.setattr("amx_tvm.artifact.verify.cpu_features", lambda: have)
        engine = amx_tvm.load(bundle.path)
    assert level(engine.manifest) == name
    expected = amx_tvm.load(tiny_artifact.path).logits(PROMPT)
    assert abs(engine.logits(PROMPT) - expected).max() < 1e-4


@pytest.mark.slow
def test_vnni_by_its_name(tiny_model, tmp_path):
    """The level above v4, whose int8 kernels are others: the tokens of v3's."""
    if not VNNI <= cpu.cpu_features():
        pytest.skip("this CPU lacks AVX-512 VNNI, VBMI or BF16")
    made = amx_tvm.compile(tiny_model, "x86-64-v3", output=tmp_path / "v3")
    bundle = amx_tvm.export(made, "x86-64-v3,x86-64-v4+vnni", tmp_path / "bundle", runtimes=())
    engine = amx_tvm.load(bundle.path)
    assert engine.manifest.target.key.endswith("x86-64-v4+avx512bf16+avx512vbmi+avx512vnni")
    assert {"avx512vnni", "avx512vbmi", "avx512bf16"} <= set(engine.manifest.target.features)
    found = engine.generate(PROMPT, 16).token_ids
    assert found == amx_tvm.load(made.path).generate(PROMPT, 16).token_ids


def test_older_cpus_are_refused(bundle, monkeypatch):
    monkeypatch.setattr("amx_tvm.artifact.verify.cpu_features", lambda: V2 - {"sse42"})
    with pytest.raises(ArtifactError, match=r"needs the CPU features sse4\.2"):
        amx_tvm.load(bundle.path)


def test_a_damaged_variant_is_refused(bundle, tmp_path):
    import shutil

    shutil.copytree(bundle.path, tmp_path / "copy")
    file = tmp_path / "copy" / "lib-x86-64-v4.so"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"lib-x86-64-v4\.so (is damaged|has)"):
        amx_tvm.load(tmp_path / "copy")


def test_wrong_levels(tiny_artifact, tmp_path):
    targets = ["x86-64-v3", "raspberry-pi/4b-aarch64"]
    with pytest.raises(TargetError, match="one bundle cannot serve"):
        amx_tvm.export(tiny_artifact, targets, tmp_path / "out", runtimes=())
    with pytest.raises(TargetError, match="no target was given"):
        amx_tvm.export(tiny_artifact, [], tmp_path / "out", runtimes=())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_older_cpus(bundle, tiny_artifact, tmp_path, monkeypatch):
    """The runner and Python on emulated CPUs, which have what CPUID says and not the host's."""
    skip_without("qemu-x86_64-static", "cmake", "g++")
    if platform.machine() != "x86_64":
        pytest.skip("needs the x86-64 runner")
    output = tmp_path / "runner"
    amx_tvm.export(tiny_artifact, "x86-64-v3,x86-64-v4", output, runtimes=("runner",))

    def run(folder, *emulator):
        program = [*emulator, output / "bin" / "amx-run", folder, "--ids"]
        program += [",".join(map(str, PROMPT)), "-n", "16", "--print-ids", "--threads", "1"]
        return subprocess.run(program, capture_output=True, text=True, check=False)

    def expected(folder, have):
        """What the Python runtime gives here with the library of a level."""
        monkeypatch.setattr("amx_tvm.artifact.verify.cpu_features", lambda: have)
        return amx_tvm.load(folder).generate(PROMPT, 16).token_ids

    if not V3 <= cpu.cpu_features():
        pytest.skip("this CPU is no x86-64-v3")
    here = "v4" if V4 <= cpu.cpu_features() else "v3"
    nehalem = ["qemu-x86_64-static", "-cpu", "Nehalem"]
    haswell = ["qemu-x86_64-static", "-cpu", "Haswell"]
    for emulator, folder, name, have in (
        ([], output, here, cpu.cpu_features()),
        (haswell, output, "v3", V3),
        (nehalem, bundle.path, "v2", V2),
    ):
        done = run(folder, *emulator)
        assert done.returncode == 0, done.stderr
        ids = done.stdout.rpartition("ids:")[2].split(",")
        assert [int(token) for token in ids] == expected(folder, have)
        assert f"code for llvm/x86-64/x86-64-{name}" in done.stderr
    done = run(output, *nehalem)
    assert done.returncode == 2 and "needs the CPU features" in done.stderr
    assert "avx2" in done.stderr
    script = "from amx_tvm.artifact import cpu; print(','.join(sorted(cpu.cpu_features())))"
    done = subprocess.run(
        [*nehalem, sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    found = set(done.stdout.strip().split(","))
    assert found >= V2 and not found & {"avx", "avx2", "fma", "avx512f"}
