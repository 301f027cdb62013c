"""The records in the package are for the kernels as they are, and won by what the documents say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amx_tvm.targets import resolve
from tuning.lookup import records_for
from tuning.records import SHIPPED, RecordFile

FILES = sorted(SHIPPED.glob("*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_compile_takes_every_shipped_record(path):
    records = RecordFile(path).records
    assert records
    target = resolve(records[0].target.replace("/", ":"))
    for record in records:
        lookup = records_for(None, replace(target, gpu=record.gpu))
        # an outdated revision would be refused here: tune anew, or drop the record
        assert record in lookup(record.kernel.spec).records
        assert record.ratio[2] < 1 and record.ratio[1] <= 0.98
