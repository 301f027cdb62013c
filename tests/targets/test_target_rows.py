"""Every row of the target table resolves, and its CPU gets machine code of its architecture."""

from __future__ import annotations

import pytest

from amx_tvm import targets
from amx_tvm.artifact import cpu
from amx_tvm.errors import TargetError

CPU_ROWS = [row for row in targets.ROWS if row.options and row.device == "cpu"]
MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}  # e_machine of ELF


def test_names_and_states():
    names = [row.name for row in targets.ROWS]
    assert len(set(names)) == len(names)
    assert all(row.state for row in targets.ROWS)


@pytest.mark.parametrize("row", CPU_ROWS, ids=lambda row: row.name)
def test_object_code(row, tmp_path):
    import tvm
    from tvm import relax
    from tvm.script import relax as R  # noqa: N812

    @R.function
    def double(x: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
        return R.add(x, x)

    resolved = targets.resolve(row.name)
    assert resolved.layout == "tile16x32"
    module = tvm.IRModule({"double": double})
    executable = tvm.compile(relax.transform.LegalizeOps()(module), tvm.target.Target(resolved.tvm))
    file = tmp_path / "lib.o"
    executable.mod.imports[0].write_to_file(str(file), "o")
    header = file.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert header[18] == MACHINES[resolved.triple.split("-")[0]]


def test_features_are_those_of_the_board():
    """LLVM's Cortex-A72 has cryptography, the one of a Raspberry Pi 4 has none."""
    four = targets.resolve("raspberry-pi/4b-aarch64").features
    five = targets.resolve("raspberry-pi/5-aarch64").features
    assert cpu.missing_features(four, frozenset({"fparmv8", "neon", "crc"})) == []
    assert "dotprod" in five and "dotprod" not in four
    assert cpu.missing_features(five, frozenset({"neon", "crc", "lse", "rdm", "fullfp16"})) == [
        "dotprod"
    ]


def test_unknown_target():
    with pytest.raises(TargetError, match="raspberry-pi/5-aarch64"):
        targets.resolve("commodore-64")
