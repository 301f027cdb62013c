"""An engine inside a program: threads, forks, signals, streams that nobody reads, unloading."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.errors import GenerationError
from amx_tvm.runtime.worker import Worker
from benchmarks import generations


def tasks():
    return len(os.listdir("/proc/self/task"))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def own(artifact):
    """An engine of four sequences."""
    return amx_tvm.runtime.load(artifact, max_sequences=4)


def test_a_stream_takes_nothing_before_its_first_piece(own):
    streams = [own.stream("the cat", 8) for _ in range(10)]
    assert own.generate("the cat", 2).token_ids
    assert own._cache.sequences == 0
    streams[0].close()
    assert list(streams[0]) == [] and streams[0].result.finish_reason == "cancelled"


@pytest.mark.parametrize("way", ["break", "exception", "with", "close", "drop"])
def test_a_stream_that_is_left_frees_its_sequence_at_once(own, way):
    gc.disable()  # by its owner, not by luck
    try:
        for _ in range(6):
            if way == "break":
                for _ in own.stream("the cat", 200, ignore_eos=True):
                    break
            elif way == "exception":
                with pytest.raises(KeyError):
                    for _ in own.stream("the cat", 200, ignore_eos=True):
                        raise KeyError
            elif way == "with":
                with own.stream("the cat", 200, ignore_eos=True) as stream:
                    next(stream)
            else:
                stream = own.stream("the cat", 200, ignore_eos=True)
                next(stream)
                if way == "close":
                    stream.close()
                    assert stream.result.finish_reason == "cancelled"
                stream = None
            if way != "exception":  # pytest keeps the frame that holds the stream
                assert own._cache.sequences == 0
    finally:
        gc.enable()
    gc.collect()
    assert own.call(lambda: own._cache.sequences) == 0


def test_leaving_a_stream_early_frees_its_sequence_alone(own):
    with own.sequence() as other:
        other.append([1, 2])
        live = own._cache.sequences
        with own.stream("the cat", max_new_tokens=40, ignore_eos=True) as stream:
            next(stream)
        assert own._cache.sequences == live > 0
        other.append([3])


def test_several_readers_of_a_stream_all_end(own):
    stream, parts = own.stream("the cat", 100, ignore_eos=True), []

    def read():
        parts.append(list(stream))

    readers = [threading.Thread(target=read, daemon=True) for _ in "abc"]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert not any(reader.is_alive() for reader in readers)
    pieces = [piece for part in parts for piece in part]
    assert sorted("".join(pieces)) == sorted(stream.result.text)


def test_the_engines_thread_never_waits_for_itself(own):
    """In what `call` runs and in callbacks, a generation could not go on."""
    ways = (lambda: own.generate([1, 2], 2), lambda: list(own.stream([1, 2], 2)))
    found = []

    def ask(_):
        for way in ways:
            with pytest.raises(GenerationError, match="on the engine's own thread"):
                way()
            found.append(way)

    own.call(ask, None)
    with own.scheduler() as scheduler:
        scheduler.add(replace(own.request([1, 2], max_new_tokens=1), on_tokens=ask))
        while scheduler.step():
            pass
    assert found == [*ways, *ways] and own._cache.sequences == 0


def test_a_thread_that_cannot_begin_says_so():
    def fail():
        raise OSError("no threads left")

    worker = Worker(fail)
    with pytest.raises(GenerationError, match="cannot work: no threads left"):
        worker.call(lambda: None)
    with pytest.raises(GenerationError, match="cannot work: no threads left"):
        worker.call(lambda: None)


def test_no_room_for_a_thread(artifact, monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    engine = amx_tvm.runtime.load(artifact)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(GenerationError, match="thread cannot be started: can't start new"):
            engine.generate([1, 2], 2)
    assert engine.generate([1, 2], 2).token_ids


def test_threads_that_share_an_engine_get_what_one_gets(own):
    prompts = ["the cat", "the quick brown", "dog", [5, 6, 7]] * 4
    expected = [own.generate(p, 20, ignore_eos=True).token_ids for p in prompts]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda p: own.generate(p, 20, ignore_eos=True).token_ids, prompts))
    assert found == expected
    streams = [own.stream(p, 20, ignore_eos=True) for p in prompts[:4]]
    pieces = [""] * 4
    for _ in range(40):  # in turns, by one thread
        for index, stream in enumerate(streams):
            pieces[index] += next(stream, "")
    assert [stream.result.token_ids for stream in streams] == expected[:4]
    assert pieces == [stream.result.text for stream in streams]


def test_more_callers_than_sequences_wait_for_each_other(artifact):
    engine = amx_tvm.runtime.load(artifact, max_sequences=2, kv_tokens=64)
    prompts = [list(range(i + 1, i + 30)) for i in range(8)]
    expected = [engine.generate(p, 24, ignore_eos=True).token_ids for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: engine.generate(p, 24, ignore_eos=True).token_ids, prompts))
    assert found == expected


def test_two_engines_of_one_artifact(artifact):
    engines = [amx_tvm.runtime.load(artifact) for _ in range(2)]
    expected = engines[0].generate("the cat", 20, ignore_eos=True).token_ids
    for _ in range(5):
        for engine in engines:
            assert engine.generate("the cat", 20, ignore_eos=True).token_ids == expected
    found = {0: [], 1: []}

    def work(index):
        for _ in range(10):
            found[index].append(engines[index].generate("the cat", 20, ignore_eos=True).token_ids)

    threads = [threading.Thread(target=work, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids == expected for run in found.values() for ids in run)


def test_a_thousand_generations_by_threads_that_come_and_go(artifact):
    """A third of them are left midway: memory, threads and pages stay, and texts are right."""
    engine = amx_tvm.runtime.load(artifact)
    looks, wrong = generations.run(engine, 1000, 20, tokens=3)
    assert not wrong and not generations.grown(looks)


UNLOAD = """
import os, sys, time, amx_tvm.runtime

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def threads():
    for _ in range(200):  # TVM's workers look for work for a second before they end
        count = len(os.listdir("/proc/self/task"))
        if count <= 2:  # tvm_ffi has one of its own
            break
        time.sleep(0.1)
    return count

sizes = []
for cycles in (10, 15, 15):
    for _ in range(cycles):
        engine = amx_tvm.runtime.load(sys.argv[1], threads=1)
        engine.generate([1, 2, 3], 4)
        del engine
    count = threads()
    sizes.append(resident())
mapped = sum(sys.argv[1] in line for line in open("/proc/self/maps"))
print(min(sizes[1] - sizes[0], sizes[2] - sizes[1]), count, mapped)  # a leak is in both
"""


def test_unloading_returns_memory_and_threads(artifact):
    done = subprocess.run(
        [sys.executable, "-c", UNLOAD, str(artifact)], capture_output=True, text=True, check=True
    )
    growth, threads, mapped = map(int, done.stdout.split())
    assert growth < 1 << 19 and threads <= 2 and mapped == 0


def test_a_dropped_engine_is_gone_without_the_collector(artifact):
    gc.collect()
    gc.disable()  # a frame that a cycle keeps alive keeps what it loaded
    try:
        engine = amx_tvm.runtime.load(artifact)
        machine = weakref.ref(engine._machine)
        del engine
        assert machine() is None
    finally:
        gc.enable()


def test_a_closed_engine_says_so(artifact):
    engine = amx_tvm.runtime.load(artifact)
    stream = engine.stream("the cat", 200, ignore_eos=True)
    next(stream)
    engine.close()
    with pytest.raises(GenerationError, match="closed"):
        list(stream)
    with pytest.raises(GenerationError, match="closed; load"):
        engine.generate("the cat", 2)
    engine.close()


def child(work):
    """Run in a forked child; return its exit code, None where it hangs."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            code = work()
        finally:
            os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


@pytest.mark.parametrize("used", [False, True])
def test_a_forked_child_has_a_working_engine(artifact, used):
    engine = amx_tvm.runtime.load(artifact, threads=2)
    expected = None
    if used:
        expected = engine.generate("the cat", 6, ignore_eos=True).token_ids
        engine.call(lambda: None)  # the generation has left the thread

    def work():
        return int(engine.generate("the cat", 6, ignore_eos=True).token_ids != expected)

    assert child(work) == (0 if used else 1)
    if used:
        assert work() == 0  # the parent goes on


def test_a_fork_in_the_middle_of_work_is_refused_in_the_child(artifact):
    engine = amx_tvm.runtime.load(artifact)
    stream = engine.stream("the cat", 200, ignore_eos=True)
    next(stream)
    begun, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=engine.call, args=(lambda: begun.set() or release.wait(),))
    thread.start()
    assert begun.wait(60)

    def work():
        try:
            engine.generate("the cat", 2)
        except GenerationError as error:
            return 0 if "was at work when the process forked" in str(error) else 2
        return 1

    assert child(work) == 0
    release.set()
    thread.join()
    assert len(list(stream)) > 100


@pytest.mark.parametrize("after", [0.0, 0.01, 0.05, 0.1, 0.3])
def test_an_interrupt_at_any_moment_leaves_nothing_behind(own, after):
    """The signal strikes the main thread in `generate`, or between two of them."""
    own.generate("the cat", 2)
    for _ in range(3):
        timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                own.generate("the quick brown", 60, ignore_eos=True)
                with own.sequence() as sequence:
                    sequence.append([1, 2, 3])
        timer.join()
        assert own.call(lambda: own._cache.sequences) == 0
    assert own.generate("the cat", 2).token_ids


def test_an_interrupted_call_is_told_to_stop():
    worker = Worker(lambda: None)
    seen = []

    def work():
        while not worker.cancelled:
            time.sleep(0.01)
        seen.append(True)

    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.call(work)
    assert seen == [True]
    assert worker.call(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)


def test_a_process_ends_at_once_whatever_runs(artifact):
    script = (
        "import sys, amx_tvm.runtime as r; e = r.load(sys.argv[1], threads=2);"
        "s = e.stream('the cat', 240, ignore_eos=True); next(s); print('ready')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_logits_of_other_threads_are_whole(own):
    expected = own.logits(range(1, 100))
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: own.logits(range(1, 100)), range(8)):
            np.testing.assert_array_equal(rows, expected)
