"""Programs of others that use or test such servers, each from an environment of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import amx_tvm
from benchmarks.serving.contenders import Served, ours
from benchmarks.serving.prompts import Prompts

NAME = "model"
_HERE = Path(__file__).parent
_CLAUSES = (
    "the miller went to the river|he saw a heron|it rained for three days|nobody was at home",
    "so he waited|and the lamp went out|because the bridge was old|while the bells rang",
)
_OPTIONS = {"schemathesis": ("--context-length", "512")}  # most bodies say nothing of a length
_EXAMPLES = 490  # of an operation: more than 5000 cases over all of them
_LONGEST = 1800  # seconds of a judge


def judges(args: argparse.Namespace, _: Prompts) -> dict[str, Any]:
    """Run each judge that the folders of ``--judges`` have."""
    known: dict[str, Callable[[argparse.Namespace, Served], dict[str, Any]]] = {
        "clients": _clients,
        "lm-eval": _likelihoods,
        "schemathesis": _schemathesis,
        "aiperf": _aiperf,
    }
    found = {}
    for name in args.only or known:
        options = ("--name", NAME, *_OPTIONS.get(name, ()))
        with ours(args.artifact, 16, args.threads, *options) as server:
            started = time.perf_counter()
            found[name] = known[name](args, server)
            found[name]["seconds"] = time.perf_counter() - started
            healthy = server.answer("/health")[0] == 200
        code, told = found[name]["code"], found[name]["told"]
        state = "the server is well" if healthy else "THE SERVER IS NOT"
        print(f"{name}: exit code {code}, {found[name]['seconds']:.0f} s, {state}\n{told}\n")
    return found


def _clients(args: argparse.Namespace, server: Served) -> dict[str, Any]:
    script = [str(_HERE / "clients.py"), f"http://127.0.0.1:{server.port}/v1", NAME]
    return _run([_program(args, "python", "openai"), *script])


def _likelihoods(args: argparse.Namespace, server: Served) -> dict[str, Any]:
    """Compare with the engine in this process."""
    pairs = [[f"Once {a}", f" {b}, and {c}."] for a, b, c in _sentences()]
    script = [str(_HERE / "likelihoods.py"), f"http://127.0.0.1:{server.port}/v1", NAME]
    command = [_program(args, "python", "lm_eval"), *script, str(args.artifact)]
    row = _run(command, json.dumps(pairs))
    if row["code"]:
        return row
    told = json.loads(row["out"].splitlines()[-1])
    engine = amx_tvm.load(args.artifact, threads=args.threads)
    worst = 0.0
    for (context, continuation), value in zip(pairs, told, strict=True):
        ids = engine.tokenizer.encode(context + continuation, add_special_tokens=False).ids
        start = len(engine.tokenizer.encode(context, add_special_tokens=False).ids)
        rows = engine.logits(ids)[start - 1 : -1].astype(np.float64)
        chosen = rows[np.arange(len(rows)), ids[start:]]
        top = rows.max(axis=-1)
        totals = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1))
        worst = max(worst, abs(float((chosen - totals).sum()) - value))
    engine.close()
    row["told"] = f"{len(pairs)} log-likelihoods, worst difference to the engine's {worst:.1e}"
    return row | {"worst": worst}


def _sentences() -> Iterable[tuple[str, str, str]]:
    first, second = (one.split("|") for one in _CLAUSES)
    return [(a, b, c) for a in first for b in second for c in first if a != c]


def _schemathesis(args: argparse.Namespace, server: Served) -> dict[str, Any]:
    command = [_program(args, "schemathesis"), "run"]
    command += [f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--phases", "examples,coverage,fuzzing", "--mode", "all", "--seed", "12"]
    command += ["--request-timeout", "120", "--workers", "4"]
    return _run([*command, "-n", str(_EXAMPLES), "--no-color"])


def _aiperf(args: argparse.Namespace, server: Served) -> dict[str, Any]:
    command = [_program(args, "aiperf"), "profile", "-m", NAME, "--tokenizer", str(args.artifact)]
    command += ["--endpoint-type", "chat", "--streaming"]
    command += ["--url", f"http://127.0.0.1:{server.port}", "--ui", "none"]
    command += ["--concurrency", "16", "--request-count", "64"]
    command += ["--synthetic-input-tokens-mean", str(args.prompt), "--output-tokens-mean", "32"]
    with tempfile.TemporaryDirectory() as written:
        return _run([*command, "--artifact-dir", written])


def _run(command: list[str], asked: str | None = None) -> dict[str, Any]:
    try:
        ended = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=_LONGEST
        )
    except subprocess.TimeoutExpired as error:
        told = bytes(error.stdout or b"").decode(errors="replace")
        return {"code": None, "out": told, "told": f"cut off after {_LONGEST} s\n{told[-1500:]}"}
    told = ended.stdout[-2500:] + (ended.stderr[-1500:] if ended.returncode else "")
    return {"code": ended.returncode, "out": ended.stdout, "told": told}


def _program(args: argparse.Namespace, name: str, module: str | None = None) -> str:
    """Return a program of the folders given, of an environment that has a module."""
    for folder in args.judges:
        has = module is None or any(folder.parent.glob(f"lib/python*/site-packages/{module}"))
        if (folder / name).exists() and has:
            return str(folder / name)
    raise SystemExit(
        f"none of the folders of --judges has {name}" + (f" with {module}" if module else "")
    )
