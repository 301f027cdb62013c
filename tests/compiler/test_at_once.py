"""compile() from several threads and processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import amx_tvm
from amx_tvm.compiler import exclusive
from amx_tvm.errors import ArtifactError

PROCESS = (
    "import sys, amx_tvm\n"
    "try: amx_tvm.compile(sys.argv[1], quantization='none', output=sys.argv[2])\n"
    "except amx_tvm.errors.ArtifactError as error: sys.exit(str(error))"
)


def test_threads_and_processes(model, tmp_path):
    """Threads take turns; of those that want one place, one gets it and the others say so."""
    places = ["a", "b", "shared", "shared"]

    def make(name):
        try:
            return amx_tvm.compile(model, quantization="none", output=tmp_path / name)
        except ArtifactError as error:
            return str(error)

    command = [sys.executable, "-c", PROCESS, str(model), str(tmp_path / "shared")]
    with ThreadPoolExecutor(len(places)) as pool:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        made = list(pool.map(make, places))
    _, said = process.communicate(timeout=120)
    refused = [result for result in made if isinstance(result, str)]
    refused += [said] if process.returncode else []
    assert len(refused) == 2 and all("shared" in text for text in refused), refused
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "shared"]
    texts = [
        amx_tvm.load(tmp_path / name, threads=1).generate([5, 6, 7], 4, ignore_eos=True).token_ids
        for name in ("a", "b", "shared")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_forked_child_has_a_lock_of_its_own():
    @exclusive.one_at_a_time
    def fork():
        child = os.fork()
        if child == 0:
            os._exit(0 if exclusive._lock.acquire(timeout=5) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with ThreadPoolExecutor(1) as pool:  # the lock's owner is a thread that the child lacks
        assert pool.submit(fork).result() == 0
