"""One engine with one model in a process of its own, told over stdin what to time.

    {"op": "load", "engine": "amx" | "llama.cpp", "path": ..., "threads": 2, "context": 4096}
    {"op": "prefill", "tokens": 512}                          {"s": seconds}
    {"op": "decode", "context": 128, "batch": 1, "steps": 16} {"s": seconds for all steps}
    {"op": "bandwidth"}                                       {"bytes_per_s": ...}

One JSON object a line, one answer a line. Sequences are filled when a (context, batch) is first
asked for and rolled back after each timing. A step ends with the logits where the caller can read
them. llama.cpp is driven through its C interface, batches made beforehand, so that Python costs it
nothing; this project's engine is timed as its Python interface is used. It runs under any Python
that has NumPy and the engine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MAX_BATCH = 8


def leave_pinned_cores() -> None:
    """Keep the calling thread off the cores that TVM's workers are pinned to.

    On a busy machine it would share one with a worker, and each would wait for the other's turn.
    """
    mine = os.sched_getaffinity(0)
    threads = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")]
    pinned = {core for cores in threads if len(cores) == 1 for core in cores}
    os.sched_setaffinity(0, mine - pinned or mine)


class AmxEngine:
    """This project's engine."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import amx_tvm

        self.threads = threads
        self.engine = amx_tvm.load(
            path,
            threads=threads,
            context_length=context,
            max_sequences=2 * MAX_BATCH + 4,
            kv_tokens=2 * context + MAX_BATCH * 512,
        )
        self.engine.call(leave_pinned_cores)
        self.vocab = int(self.engine.manifest.model["vocab_size"])
        self.random = np.random.default_rng(0)
        self.cached: dict[tuple[int, int], list[Any]] = {}

    def facts(self) -> dict[str, Any]:
        from amx_tvm.bench.measure import weight_bytes
        from amx_tvm.runtime.budget import kv_bytes

        manifest = self.engine.manifest
        return {"weight_bytes": weight_bytes(manifest), "kv_bytes": kv_bytes(manifest)}

    def _tokens(self, count: int) -> list[int]:
        return self.random.integers(0, self.vocab, count).tolist()

    def prefill(self, tokens: int) -> float:
        ids = self._tokens(tokens)
        with self.engine.sequence() as sequence:
            start = time.perf_counter()
            sequence.append(ids)
            return time.perf_counter() - start

    def decode(self, context: int, batch: int, steps: int) -> float:
        from amx_tvm.runtime.session import decode_batch

        if (context, batch) not in self.cached:
            made = [self.engine.sequence() for _ in range(batch)]
            for sequence in made:
                sequence.append(self._tokens(context))
            self.cached[context, batch] = made
        sequences, ids = self.cached[context, batch], self._tokens(batch)

        def run() -> float:  # on the engine's thread: nothing is handed over in a step
            start = time.perf_counter()
            for _ in range(steps):
                decode_batch(sequences, ids)
            return time.perf_counter() - start

        seconds = self.engine.call(run)
        for sequence in sequences:
            sequence.rollback(steps)
        return seconds

    def bandwidth(self) -> float:
        from amx_tvm.bench.memory import read_bandwidth

        return read_bandwidth(self.threads, repeats=5)


class LlamaCpp:
    """llama.cpp's C interface; one context for each (context, batch), all of one model."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp as c

        self.c, self.threads, self.context = c, threads, context
        self._quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._quiet, None)
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        if not self.model:
            raise OSError(f"llama.cpp does not load {path}")
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.random = np.random.default_rng(0)
        self.cached: dict[tuple[int, int], Any] = {}

    def facts(self) -> dict[str, Any]:
        return {"model_bytes": int(self.c.llama_model_size(self.model))}

    def _make(self, context: int, batch: int) -> Any:
        c, options = self.c, self.c.llama_context_default_params()
        options.n_ctx = batch * (-(-context // 256) * 256)
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = self.threads
        options.no_perf = True
        made = c.llama_init_from_model(self.model, options)
        if not made:
            raise OSError("llama.cpp does not make a context")
        return made

    def _run(self, state: Any, rows: list[tuple[int, int, int, bool]]) -> float:
        """Run (token, position, sequence, logits wanted) rows; return seconds."""
        c = self.c
        batch = c.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        start = time.perf_counter()
        code = c.llama_decode(state, batch)
        c.llama_synchronize(state)
        seconds = time.perf_counter() - start
        c.llama_batch_free(batch)
        if code:
            raise OSError(f"llama_decode returned {code}")
        return seconds

    def _fill(self, state: Any, sequence: int, count: int) -> float:
        """Prefill one sequence in chunks of 512; return seconds."""
        ids = self.random.integers(0, self.vocab, count).tolist()
        rows = [(token, i, sequence, i == count - 1) for i, token in enumerate(ids)]
        return sum(self._run(state, rows[i : i + 512]) for i in range(0, count, 512))

    def prefill(self, tokens: int) -> float:
        key = (-1, tokens)
        if key not in self.cached:
            self.cached[key] = self._make(tokens, 1)
        state = self.cached[key]
        self.c.llama_memory_clear(self.c.llama_get_memory(state), False)
        return self._fill(state, 0, tokens)

    def decode(self, context: int, batch: int, steps: int) -> float:
        if (context, batch) not in self.cached:
            state = self.cached[context, batch] = self._make(context + steps, batch)
            for sequence in range(batch):
                self._fill(state, sequence, context)
        state = self.cached[context, batch]
        ids = self.random.integers(0, self.vocab, batch).tolist()
        seconds = sum(
            self._run(state, [(ids[s], context + i, s, True) for s in range(batch)])
            for i in range(steps)
        )
        memory = self.c.llama_get_memory(state)
        for sequence in range(batch):
            self.c.llama_memory_seq_rm(memory, sequence, context, -1)
        return seconds


ENGINES = {"amx": AmxEngine, "llama.cpp": LlamaCpp}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    engine: Any = None
    for line in sys.stdin:
        ask = json.loads(line)
        op = ask.pop("op")
        try:
            if op == "load":
                start = time.perf_counter()
                engine = ENGINES[ask.pop("engine")](**ask)
                answer = {"s": time.perf_counter() - start, **engine.facts()}
            elif op == "bandwidth":
                answer = {"bytes_per_s": engine.bandwidth()}
            else:
                answer = {"s": getattr(engine, op)(**ask)}
        except Exception as error:  # the caller decides whether it can go on without
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
