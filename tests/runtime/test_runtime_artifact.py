"""The artifact on disk: round trip, atomic writing, and refusal of everything that is not whole."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.artifact import (
    SCHEMA,
    ArtifactWriter,
    Manifest,
    open_parameters,
    verify_artifact,
)
from amx_tvm.artifact import manifest as manifest_module
from amx_tvm.artifact import shards as shards_module
from amx_tvm.artifact.cpu import cpu_features, missing_features, normalize
from amx_tvm.artifact.verify import refuse_links_out
from amx_tvm.errors import ArtifactError


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def edit(path, **changes):
    """Change the manifest as somebody with the writer at hand would: digest included."""
    dataclasses.replace(Manifest.load(path), **changes).save(path)


def refusal(path, **options):
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(path, **options)
    return str(caught.value)


def test_manifest_round_trip(artifact):
    manifest = Manifest.load(artifact)
    assert Manifest.from_dict(json.loads(manifest.dumps())) == manifest
    assert "tokenizer.json" in manifest.files


def test_tensors_round_trip_aligned(tmp_path):
    random = np.random.default_rng(1)
    arrays = {
        "a": random.integers(0, 255, (7, 3), dtype=np.uint8),
        "b": random.standard_normal((5, 4)).astype(np.float16),
        "c": random.standard_normal(70).astype(np.float32)[::2],
        "d": np.zeros((0, 4), np.float32),
        "e": np.array(3, np.int32),
    }
    writer = shards_module.ParameterWriter(tmp_path, shard_bytes=200)
    for name, array in arrays.items():
        writer.add(name, array)
    parameters = writer.finish(order=list(reversed(arrays)))
    assert len(parameters.shards) > 1
    assert list(open_parameters(tmp_path, parameters)) == list(reversed(arrays))
    for name, array in open_parameters(tmp_path, parameters).items():
        assert array.dtype == arrays[name].dtype and array.shape == arrays[name].shape
        np.testing.assert_array_equal(array, arrays[name])
        assert array.ctypes.data % 64 == 0 or not array.size


def test_writing_to_a_mapped_tensor_leaves_the_file(copy):
    manifest = Manifest.load(copy)
    name = manifest.parameters.order[0]
    open_parameters(copy, manifest.parameters)[name][:] = 0
    verify_artifact(copy, "full")


@pytest.mark.parametrize("depth", ["quick", "full"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_in_any_shard_is_refused(copy, depth, where):
    for file in sorted((copy / "params").iterdir()):
        original = file.read_bytes()
        data = bytearray(original)
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
        file.write_bytes(data)
        message = refusal(copy, verify=depth)
        assert file.name in message and "damaged" in message
        file.write_bytes(original)
    verify_artifact(copy, depth)


def test_damage_across_checksum_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK_BYTES", 256)
    writer = shards_module.ParameterWriter(tmp_path)
    writer.add("a", np.arange(100, dtype=np.int32))
    writer.add("b", np.arange(300, dtype=np.uint16))
    record = writer.finish().shards[0]
    assert len(record.crc32) == -(-record.bytes // 256)
    import zlib

    data = (tmp_path / record.file).read_bytes()
    assert record.crc32 == [zlib.crc32(data[i : i + 256]) for i in range(0, len(data), 256)]


@pytest.mark.parametrize("name", ["lib.so", "tokenizer.json"])
def test_damaged_file_is_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 3] ^= 4
    (copy / name).write_bytes(data)
    assert name in refusal(copy)


@pytest.mark.parametrize("name", ["lib.so", "params/shard-00001.bin"])
def test_truncated_file_is_refused_at_every_depth(copy, name):
    size = (copy / name).stat().st_size
    with open(copy / name, "r+b") as file:
        file.truncate(size - 1)
    for depth in (False, "quick", "full"):
        message = refusal(copy, verify=depth)
        assert f"{size - 1} bytes" in message and str(size) in message
    (copy / name).unlink()
    assert "missing" in refusal(copy, verify=False)


def test_damaged_manifest(copy):
    file = copy / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"offset": 0', '"offset": 64', 1))
    assert "digest" in refusal(copy)
    file.write_text(text[: len(text) // 2])
    assert "cannot be read" in refusal(copy)
    file.write_text("[]")
    assert "not a manifest" in refusal(copy)
    file.unlink()
    assert "not an artifact" in refusal(copy)
    assert "no such artifact" in refusal(copy / "nothing")


def forge(path, change):
    """Change manifest.json and its digest, whatever that makes of it."""
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    data["digest"] = manifest_module._digest(data)
    file.write_text(json.dumps(data))


FORGED = {
    "parameters.shards[0].bytes": lambda d: d["parameters"]["shards"][0].update(bytes="1"),
    "parameters.shards[0].file": lambda d: d["parameters"]["shards"][0].update(file="../x"),
    "parameters.order": lambda d: d["parameters"].update(order=3),
    "library.file": lambda d: d["library"].update(file="/bin/sh"),
    "a key of files": lambda d: d["files"].update({"../secret": "0"}),
    "model.eos_token_ids[0]": lambda d: d["model"].update(eos_token_ids=["</s>"]),
    "model.vocab_size": lambda d: d["model"].update(vocab_size=-1),
    "kv_cache.head_dim": lambda d: d["kv_cache"].update(head_dim=1 << 40),
    "kv_cache.dtype": lambda d: d["kv_cache"].update(dtype="float31"),
    "model.config.hidden_size": lambda d: d["model"]["config"].update(hidden_size=None),
    "quantization.bits_per_weight": lambda d: d["quantization"].update(bits_per_weight="4"),
    "linears[0].rows": lambda d: d["linears"][0].update(rows=[1]),
    "checksums": lambda d: d["parameters"]["shards"][0].update(crc32=[]),
    "does not fit": lambda d: next(iter(d["parameters"]["tensors"].values())).update(
        offset=1 << 50
    ),
}


@pytest.mark.parametrize("words", FORGED)
def test_a_forged_manifest_is_refused_by_its_field(copy, words):
    forge(copy, FORGED[words])
    assert words in refusal(copy, verify=False)


def test_special_files_and_deep_manifests(copy):
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    assert "no regular file" in refusal(copy)
    (copy / "manifest.json").write_text("[" * 100_000)
    assert "nested deeper" in refusal(copy)


def test_links_out_of_an_artifact_are_not_passed_on(copy, tmp_path):
    manifest = Manifest.load(copy)
    refuse_links_out(copy, manifest)
    (tmp_path / "secret").write_text("secret")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="tokenizer.json is a link to .*secret"):
        refuse_links_out(copy, manifest)


def test_other_schema(copy):
    file = copy / "manifest.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"schema": 99}))
    message = refusal(copy)
    assert "schema 99" in message and f"reads schema {SCHEMA}" in message


def test_other_versions(artifact):
    manifest = verify_artifact(artifact)
    tvm, ffi = manifest.versions.tvm, manifest.versions.tvm_ffi
    verify_artifact(artifact, versions=(tvm, ffi))
    assert f"apache-tvm {tvm}" in refusal(artifact, versions=("0.1", ffi))
    assert f"apache-tvm-ffi {ffi}" in refusal(artifact, versions=(tvm, "0.1"))


def test_other_device_machine_and_features(copy):
    target = Manifest.load(copy).target
    assert "asked for 'cuda'" in refusal(copy, device="cuda")
    edit(copy, target=dataclasses.replace(target, triple="riscv64-linux-gnu"))
    assert "riscv64" in refusal(copy)
    edit(copy, target=dataclasses.replace(target, features=["sse2", "quantumvec", "-avx"]))
    message = refusal(copy)
    assert "quantumvec" in message and "avx" not in message.replace("avx512", "")


def test_feature_names_of_llvm_and_linux_agree():
    assert normalize("avx512_vnni") == normalize("+AVX512VNNI".lstrip("+")) == "avx512vnni"
    assert normalize("sse4_2") == normalize("sse4.2")
    present = frozenset(map(normalize, "pni bmi1 abm avx512_vbmi2 asimddp asimd".split()))
    needed = ["sse3", "bmi", "lzcnt", "avx512vbmi2", "dotprod", "neon"]
    assert missing_features(needed, present) == []
    assert missing_features(["avx2", "+fma", "-avx", "v8.2a", "fast-gather"], present) == [
        "avx2",
        "fma",
    ]
    assert missing_features(["avx2"], frozenset()) == []
    assert cpu_features()


def test_a_level_stands_in_for_an_older_cpu(monkeypatch):
    """What AMX_TVM_CPU takes away is asked of LLVM: the level's own name has these features."""
    import platform

    from amx_tvm.artifact import cpu
    from amx_tvm.errors import TargetError
    from amx_tvm.targets import resolve

    if platform.machine() != "x86_64":
        pytest.skip("levels of x86-64")
    for level, features in cpu.LEVELS.items():
        monkeypatch.setenv(cpu.VARIABLE, level)
        cpu.cpu_features.cache_clear()
        assert set(map(normalize, resolve(f"llvm:{level}").features)) <= features
        assert cpu.cpu_features() <= features
        here = resolve("llvm")
        assert here.key.startswith(f"llvm/x86-64/{level}")
        assert set(map(normalize, here.features)) <= cpu.cpu_features()
    monkeypatch.setenv(cpu.VARIABLE, "pentium")
    with pytest.raises(TargetError, match="AMX_TVM_CPU is 'pentium'; expected x86-64-v2"):
        resolve("llvm")
    monkeypatch.undo()
    cpu.cpu_features.cache_clear()


def test_exception_leaves_nothing(tmp_path):
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), ArtifactWriter(tmp_path / "out") as writer:
            writer.parameters.add("a", np.zeros(10, np.float32))
            raise error
        assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module.ParameterWriter, "_write", full)
    with (
        pytest.raises(ArtifactError, match="no space left for .* free under .*nothing was kept"),
        ArtifactWriter(tmp_path / "out") as writer,
    ):
        writer.parameters.add("a", np.zeros(10, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_really_full_disk(tmp_path):
    """/dev/full answers every write with ENOSPC; the shard is opened on it."""
    with (
        pytest.raises(ArtifactError, match="no space left"),
        ArtifactWriter(tmp_path / "out") as writer,
    ):
        (writer.directory / "params" / "shard-00000.bin").symlink_to("/dev/full")
        writer.parameters.add("a", np.zeros(1 << 20, np.float32))
        writer.parameters.finish()
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_model_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), ArtifactWriter(tmp_path / "out"):
        open(tmp_path / "elsewhere" / "weights.bin", "rb")


def test_existing_output(artifact, tmp_path):
    existing = shutil.copytree(artifact, tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()  # of a run that was killed behind its last step
    with pytest.raises(ArtifactError, match="--overwrite"), ArtifactWriter(existing):
        pass
    assert not (tmp_path / ".out.partial").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with (
        pytest.raises(ArtifactError, match="never replaced"),
        ArtifactWriter(tmp_path / "mine", overwrite=True),
    ):
        pass
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_overwrite_replaces_only_at_the_end(artifact, tmp_path):
    output = shutil.copytree(artifact, tmp_path / "out")
    manifest = Manifest.load(output)
    with pytest.raises(ValueError), ArtifactWriter(output, overwrite=True):
        raise ValueError
    verify_artifact(output, "full")
    with ArtifactWriter(output, overwrite=True) as writer:
        shutil.copy(artifact / "lib.so", writer.path("lib.so"))
        writer.parameters.add("only", np.ones(4, np.float32))
        writer.finish(
            dataclasses.replace(
                manifest, library=writer.library(), parameters=writer.parameters.finish()
            )
        )
    assert verify_artifact(output, "full").parameters.order == ["only"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".out.partial" / "new").mkdir(parents=True)
    (tmp_path / ".out.partial" / "lock").touch()
    with pytest.raises(ValueError), ArtifactWriter(tmp_path / "out"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_tokenizer_is_named_at_its_first_use(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text('{"model": 5}')
    engine = amx_tvm.runtime.load(tmp_path / "copy", verify=False)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is no tokenizer that can be read"):
        engine.generate("the cat", 2)
