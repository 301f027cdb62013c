"""The thread that an engine owns: every call of compiled code runs on it, whoever asks.

TVM's pool of workers belongs to the thread that calls, is made at that thread's first parallel
call and ends with it; its virtual machine has no lock. One thread an engine gives one pool, calls
one after another, and no trace of the threads that asked.

Callers hand over whole calls (`Worker.call`) or jobs (`Worker.attach`): a job is stepped, in turn
with the others, until it has nothing more to do. With neither, the thread sleeps.

A process that forks takes the engine along but not its thread. Where the engine was idle, the
child's first call starts a thread of its own; where it was at work, that call is refused.
"""

from __future__ import annotations

import _thread
import atexit
import functools
import os
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.library import return_memory

_Self = TypeVar("_Self")
_P = ParamSpec("_P")
_R = TypeVar("_R")
_EXIT_SECONDS = 10.0  # that the end of the process waits for a step under way
_PATIENCE = 1.0  # seconds that a destructor waits for it
_LOOK = 0.5  # seconds after which one who waits looks for signals


def as_error(problem: BaseException) -> Exception:
    """Return what was raised on the thread as an error of the request or job that it is of.

    SystemExit, CancelledError and such are raised at whoever runs; on the engine's thread they
    would end everybody's work.
    """
    if isinstance(problem, Exception):
        return problem
    error = GenerationError(f"a callback raised {type(problem).__name__}: {problem}")
    error.__cause__ = problem
    return error


class Job(Protocol):
    """Work in steps."""

    def step(self) -> bool:
        """Do a little; return whether anything is left."""

    def fail(self, error: Exception) -> None:
        """End everything: there will be no more steps."""


class _Call:
    """A function on its way through the thread; ``done`` is released behind it."""

    __slots__ = ("function", "arguments", "result", "error", "cancelled", "finished", "done")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]):
        self.function: Callable[..., Any] | None = function
        self.arguments = arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.cancelled = self.finished = False
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        assert self.function is not None
        try:
            self.result = self.function(*self.arguments)
        except BaseException as error:
            self.error = error
        self._end()

    def refuse(self, error: Exception) -> None:
        """End it with an error, without running it."""
        self.error = error
        self._end()

    def _end(self) -> None:
        self.function, self.arguments = None, ()
        self.finished = True
        self.done.release()

    def wait(self) -> None:
        """Wait for the end; a signal that the system gives to another thread is seen too."""
        while not self.finished:
            self.done.acquire(timeout=_LOOK)


class _State:
    """What the thread needs: not the worker, whose end is the thread's."""

    def __init__(self, prepare: Callable[[], None], forks: bool):
        self.prepare, self.forks = prepare, forks
        self.inbox: SimpleQueue[_Call | None] = SimpleQueue()
        self.jobs: list[Job] = []
        self.current: _Call | None = None
        self.thread: threading.Thread | None = None
        self.ident = -1
        self.lock = threading.Lock()  # of what follows, and of calls that enter the inbox
        self.closed = ""  # why no call is taken any more


class Worker:
    """A thread that runs calls and jobs; it starts at the first one.

    Parameters
    ----------
    prepare : callable
        Run on the thread before anything else.
    forks : bool
        Whether a forked child may go on with a thread of its own (a GPU's driver may not).
    """

    def __init__(self, prepare: Callable[[], None], forks: bool = True):
        self._state = _State(prepare, forks)
        _STATES.add(self._state)

    def __del__(self) -> None:
        _close(self._state, "this engine is gone", _PATIENCE)
        return_memory()

    @property
    def here(self) -> bool:
        """Whether the caller is on the thread already."""
        return threading.get_ident() == self._state.ident

    @property
    def alive(self) -> bool:
        """Whether it takes calls: it has started, and has not ended."""
        thread = self._state.thread
        return not self._state.closed and thread is not None and thread.is_alive()

    @property
    def cancelled(self) -> bool:
        """Whether the caller of the call that runs now has given up on it (on the thread)."""
        return self._state.current is not None and self._state.current.cancelled

    @property
    def jobs(self) -> list[Job]:
        """The jobs under way (on the thread)."""
        return self._state.jobs

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function on the thread and return its result; what it raises is raised here.

        An exception that strikes the caller while it waits, such as KeyboardInterrupt, makes
        `cancelled` true and is raised once the function has ended; a second one at once.
        """
        state = self._state
        if threading.get_ident() == state.ident:
            return function(*arguments)
        call = _Call(function, arguments)
        self._put(call)
        try:
            call.wait()
        except BaseException:
            call.cancelled = True
            call.wait()
            raise
        if call.error is not None:
            error, call.error = call.error, None
            try:
                raise error
            finally:
                del error  # no cycle through the traceback
        return call.result

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a function on the thread some time, once it has started; nobody waits for it."""
        state = self._state
        if not state.closed and state.thread is not None:
            state.inbox.put(_Call(function, arguments))

    def leave(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a function on the thread, from a destructor; wait for it, but not for long.

        Takes no lock, since a destructor may run in the middle of anything.
        """
        state = self._state
        if state.closed or state.thread is None:
            return
        call = _Call(function, arguments)
        state.inbox.put(call)
        if not self.here:
            try:
                call.done.acquire(timeout=_PATIENCE)
            except KeyboardInterrupt:  # a destructor cannot raise it
                _thread.interrupt_main()

    def take(self, queue: SimpleQueue[Any]) -> Any:
        """Return the next item of a queue that the thread fills; see `_Call.wait` for signals."""
        while True:
            try:
                return queue.get(timeout=_LOOK)
            except Empty:
                continue

    def refuse_here(self) -> None:
        """Refuse to wait for steps on the thread that makes them.

        Raises
        ------
        GenerationError
            In a callback, and in what `call` runs.
        """
        if self.here:
            raise GenerationError(
                "a generation was asked for on the engine's own thread, which would wait for "
                "itself; call generate and stream from another thread than callbacks run on, and "
                "not through engine.call"
            )

    def attach(self, job: Job) -> None:
        """Step a job until it ends (on the thread)."""
        if job not in self._state.jobs:
            self._state.jobs.append(job)

    def close(self) -> None:
        """End the thread once the step under way has ended; later calls are refused."""
        _close(self._state, "this engine is closed; load the artifact again")

    def _put(self, call: _Call) -> None:
        state = self._state
        with state.lock:
            if state.closed:
                raise GenerationError(state.closed)
            if state.thread is None:
                thread = threading.Thread(
                    target=_run, args=(state,), name="amx-engine", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads, or the process is ending
                    raise GenerationError(
                        f"the engine's thread cannot be started: {error}"
                    ) from error
                state.thread = thread
            state.inbox.put(call)


def on_thread(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """Let a method of an object with a ``_worker`` run on the worker's thread.

    Without a worker (None) it runs where it is called.
    """

    @functools.wraps(method)
    def run(self: _Self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        worker: Worker | None = self._worker  # type: ignore[attr-defined]
        if worker is None or worker.here:
            return method(self, *args, **kwargs)
        bound = functools.partial(method, **kwargs) if kwargs else method
        return worker.call(bound, self, *args)

    return run


def _run(state: _State) -> None:
    """Run calls as they come and step the jobs in turn, until None comes."""
    state.ident = threading.get_ident()
    inbox, jobs = state.inbox, state.jobs
    try:
        state.prepare()
    except BaseException as error:
        with state.lock:  # nobody waits for what never comes
            state.closed = f"the engine's thread cannot work: {error}"
            while not inbox.empty():
                call = inbox.get()
                if call is not None:
                    call.refuse(GenerationError(state.closed))
        return
    while True:
        while not jobs or not inbox.empty():
            call = inbox.get()
            if call is None:
                for job in jobs:
                    job.fail(GenerationError(state.closed))
                jobs.clear()
                return
            state.current = call
            call.run()
            state.current = call = None  # nothing keeps what it returned alive
        _step(jobs)


def _step(jobs: list[Job]) -> None:
    for job in jobs.copy():
        try:
            more = job.step()
        except BaseException as error:  # a defect: those who wait for the job must hear of it
            job.fail(as_error(error))
            more = False
        if not more:
            jobs.remove(job)


_STATES: weakref.WeakSet[_State] = weakref.WeakSet()


def _close(state: _State, reason: str, timeout: float = _EXIT_SECONDS) -> None:
    with state.lock:
        state.closed = state.closed or reason
        state.inbox.put(None)
    thread = state.thread
    if thread is not None and thread is not threading.current_thread():
        thread.join(timeout)


@atexit.register
def _close_all() -> None:
    for state in list(_STATES):
        _close(state, "the process is ending, and with it this engine")


def _forked() -> None:
    """In the child: no thread, no calls under way."""
    for state in list(_STATES):
        state.lock = threading.Lock()
        if state.thread is None:
            continue
        busy = state.current is not None or state.jobs
        if busy or not state.forks:
            why = "was at work" if busy else "runs on a GPU"
            state.closed = (
                f"this engine {why} when the process forked, so it cannot be used in the child; "
                "load the artifact there, or start processes with multiprocessing's 'spawn'"
            )
        state.inbox, state.jobs, state.current = SimpleQueue(), [], None
        state.thread, state.ident = None, -1


os.register_at_fork(after_in_child=_forked)
