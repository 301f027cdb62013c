"""tune(): a model and a target in, tuning records out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amx_tvm.artifact.cpu import cpu_features, normalize
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import TuningError
from amx_tvm.extras import require
from amx_tvm.scratch import scratch
from amx_tvm.targets import ResolvedTarget, resolve
from amx_tvm.targets.cuda.driver import gpus_here
from amx_tvm.targets.cuda.toolchain import require_compiler
from tuning.cost_model import require_xgboost
from tuning.journal import Damage
from tuning.measure import Worker, gpu_workers, remote_workers
from tuning.session import Progress, Session, TaskState
from tuning.tasks import tasks_of

DEFAULT_DIRECTORY = "tuning-records"


@dataclass(frozen=True)
class Tuned:
    """What a session did.

    Attributes
    ----------
    path, log : Path
        The record file (it exists only when something beat its default) and the log of trials.
    states : list of TaskState
        Every task with its search.
    trials : int
        New trials of this session.
    damage : list of Damage
        Lines of the log that could not be read, such as the torn last line of a killed session.
    lost : int
        Remote devices that disappeared.
    """

    path: Path
    log: Path
    states: list[TaskState]
    trials: int
    damage: list[Damage]
    lost: int = 0

    def step_ratio(self, decode: bool = True) -> float:
        """Time of a decode step's (or a prefill's) linears with the records over the defaults'."""
        before = after = 0.0
        for state in self.states:
            count = state.task.decode if decode else state.task.prefill
            cost = (state.default_seconds or 0.0) * count
            before += cost
            after += cost * (state.record.ratio[1] if state.record else 1.0)
        return after / before if before else 1.0


def tune(
    model: str | os.PathLike[str] | Mapping[str, Any] | Any,
    target: str = "llvm",
    quantization: str | QuantizationConfig = "amxfp4",
    *,
    minutes: float | None = None,
    trials: int | None = None,
    records: str | os.PathLike[str] = DEFAULT_DIRECTORY,
    threads: int | None = None,
    limit: float = 60.0,
    jobs: int | None = None,
    remote: str | None = None,
    key: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Tuned:
    """Tune the kernels of a model for this machine, or for remote devices.

    Parameters
    ----------
    model : path, dict or ModelSource
        A model as for ``amx_tvm.compile``, its ``config.json`` or that as a dict, or an artifact;
        weights are not read.
    target : str
        A target that this machine can run, "cuda" for its GPU; records are kept under its exact
        key.
    quantization : str or QuantizationConfig
        As for ``amx_tvm.compile``.
    minutes, trials : optional
        Budget; 10 minutes when neither is given.
    records : path
        Directory of the record file and the log; a session continues what it finds there.
    threads : int, optional
        Threads of a kernel; by default TVM's choice, as at run time.
    limit : float
        Seconds that building and measuring one candidate may take.
    jobs : int, optional
        Processes that build kernels for a GPU; by default as many as there are cores, 8 at most.
    remote, key : str, optional
        HOST:PORT of TVM's RPC tracker and the key of its devices: kernels are built here and
        measured there, on all devices of the key at the same time.
    progress : callable, optional
        Called with a ``Progress`` after every trial.

    Returns
    -------
    Tuned

    Raises
    ------
    TuningError
        For a target that cannot run here, an impossible budget, or a default that fails.
    """
    require_xgboost()
    for package in ("tornado", "cloudpickle", "psutil") if remote is not None else ():
        require(package, "tune", "measuring on remote devices", TuningError)
    budget = (("minutes", minutes), ("trials", trials), ("limit", limit), ("jobs", jobs))
    for name, value in budget:
        if value is not None and value <= 0:
            raise TuningError(f"{name} is {value}, a budget has to be above 0")
    if minutes is None and trials is None:
        minutes = 10.0
    resolved = resolve(target)
    require_measurable(resolved, remote, key)
    tasks = tasks_of(model, resolved, quantization)
    if remote is not None and key is not None:
        workers = remote_workers(target, remote, key, limit)
    elif resolved.device == "cpu":
        workers = [Worker(target, limit, threads=threads)]
    with ExitStack() as stack:
        if resolved.device == "cuda":
            folder = stack.enter_context(scratch("amx-tvm-tune-"))
            workers = gpu_workers(target, folder / "gpu.lock", limit, jobs)
        for worker in workers:
            stack.enter_context(worker)
        session = Session(tasks, resolved, records, workers, tell=progress)
        stack.callback(session.close)
        states = session.run(minutes, trials)
    lost = session.pool.lost
    return Tuned(session.records.path, session.log, states, session.trials, session.damage, lost)


def require_measurable(target: ResolvedTarget, remote: str | None, key: str | None) -> None:
    """Refuse targets and options with which nothing can be measured.

    Raises
    ------
    TuningError
        For a tracker without a key or the reverse, and for GPUs that are not here.
    """
    if (remote is None) != (key is None):
        raise TuningError("a remote tracker and the key of its devices belong together: give both")
    if target.device != "cpu":
        require_gpu_here(target)
    elif remote is None:
        require_here(target)


def gpu_is_here(target: ResolvedTarget) -> bool:
    """Whether this machine's first GPU is what a CUDA target means."""
    return bool(gpus_here()) and resolve("cuda").key == target.key


def require_gpu_here(target: ResolvedTarget) -> None:
    """Refuse a GPU that is elsewhere, and one that PyTorch, which times kernels, cannot use.

    Raises
    ------
    TuningError
        Otherwise.
    """
    if not gpu_is_here(target):
        here = resolve("cuda").key if gpus_here() else "no GPU"
        raise TuningError(
            f"this tunes on the GPU of this machine, which has {here}, and not {target.key}: "
            "`amx-tvm tune package` builds candidates for a GPU elsewhere, `python -m "
            "tuning.package_run` measures them there, and `amx-tvm tune import` makes records of "
            "the results"
        )
    require_compiler()
    torch = require("torch", "torch", "measuring on a GPU", TuningError)
    if not torch.cuda.is_available():
        raise TuningError(
            "measuring on a GPU needs PyTorch with CUDA, and this one has none "
            f"({torch.__version__}); install one for CUDA 13 from pytorch.org"
        )


def require_here(target: ResolvedTarget) -> None:
    """Refuse a CPU whose kernels cannot run in this process.

    Raises
    ------
    TuningError
        For other architectures, and CPUs with extensions that this one lacks.
    """
    here = resolve("llvm")
    if target.triple.split("-")[0] != here.triple.split("-")[0]:
        raise TuningError(
            f"{target.key} cannot run here ({here.key}); run `amx-tvm device-server` on the device "
            "and tune with --remote"
        )
    present = cpu_features()
    lacking = [f for f in target.features if present and normalize(f) not in present]
    if lacking:
        raise TuningError(f"{target.key} cannot run here: this CPU lacks {', '.join(lacking)}")
