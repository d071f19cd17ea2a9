"""Worker processes for the reward functions in users' files: one that fails costs one reward.

The trainer holds `Workers`; each worker is this file run as a program, which never imports torch:

    python -m nanomath.tasks.workers SECONDS my_file.py:my_function ...

A request (which function, problem, completion) and its reply (reward or null, what failed or null)
are one line of JSON each: nothing is unpickled. A function that raises or returns no number is
caught in the worker. One that takes too long, or ends its process, costs the worker, which is
replaced with whatever it had started itself. What functions print goes to the trainer's stderr,
up to OUTPUT_BYTES a step.

Workers outlive neither the trainer's end nor its death: an idle one sees its input end, and a busy
one has a timer in C, which needs no lock of Python's, that prints where it hangs and ends it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib.util
import inspect
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanomath.judge.child import Child
from nanomath.tasks import Problem

RewardFunction = Callable[[Problem, str], float | None]
Scored = tuple[float | None, str | None]  # a reward, or None and what failed (None: it declined)

START_SECONDS = 300.0  # to load the files, which may load a model
GRACE_SECONDS = 1.0  # beyond its limit, for a worker to end itself
# For all completions of a step. Other ranks wait for this one: with a last start, and a completion
# at --reward_seconds' bound, it is less than run.STEP_TIMEOUT_S.
BATCH_SECONDS = 450.0
OUTPUT_BYTES = 20_000
LARGEST = 1e50  # of rewards and weights: squares of their sums are finite


# --------------------------------------------------------------------------------- in the trainer


class Workers:
    """Processes that score completions by the functions of "/path/to/file.py:function" specs.

    Raises ValueError where a file does not load or has no such function.
    """

    def __init__(self, specs: Sequence[str], *, num_workers: int, seconds: float):
        self._specs, self._seconds = specs, seconds
        self._children: list[Child | None] = [None] * num_workers
        self._closed, self._output_left = False, 0
        errors = self._each(self._start)
        if any(errors):
            self.close()
            raise ValueError(next(filter(None, errors)))

    def score(self, tasks: Sequence[tuple[int, Problem, str]]) -> list[Scored]:
        """Score (number of the function, problem, completion); which worker does it does not
        matter if functions depend on their arguments alone."""
        results: list[Scored] = [(None, "no worker was left to score it")] * len(tasks)
        pending = iter(enumerate(tasks))
        give_up = time.monotonic() + BATCH_SECONDS
        self._output_left = OUTPUT_BYTES
        self._each(lambda slot: self._serve(slot, pending, results, give_up))
        return results

    def close(self) -> None:
        """Kill the workers, and what they started."""
        self._closed = True
        for slot in range(len(self._children)):
            self._end(slot)

    def _each(self, work: Callable[[int], Any]) -> list:
        """Do the work for every worker at the same time, in a thread each, which mostly waits."""
        with ThreadPoolExecutor(len(self._children)) as pool:
            try:
                return list(pool.map(work, range(len(self._children))))
            except BaseException:  # Ctrl-C: without their workers the threads end, too
                self.close()
                raise

    def _serve(self, slot: int, pending: Iterator, results: list[Scored], give_up: float) -> None:
        """Let one worker take tasks until none is left."""
        for index, (function, problem, completion) in pending:
            if time.monotonic() > give_up:
                results[index] = None, f"not scored: the step took {BATCH_SECONDS:.0f} s without it"
                continue
            if self._children[slot] is None:
                error = self._start(slot)
                if error:
                    results[index] = None, error
                    return
            request = _as_line([function, dataclasses.asdict(problem), completion])
            results[index] = self._exchange(slot, request, self._seconds)

    def _start(self, slot: int) -> str | None:
        """Start a worker; return why it cannot score, or None."""
        if self._closed:
            return "the workers are closed"
        root = str(Path(__file__).resolve().parents[2])
        environment = {
            "OMP_NUM_THREADS": "1",  # many workers share the cores
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "PYTHONHASHSEED": "0",  # a set is in the same order in each of them
        }
        # -u: prints show at once; -P: no file of the current folder hides a module.
        program = [sys.executable, "-u", "-P", "-m", "nanomath.tasks.workers", str(self._seconds)]
        try:
            self._children[slot] = Child(
                [*program, *self._specs], environment=environment, on_stderr=self._forward
            )
        except OSError as error:  # no memory or process left
            return f"no worker could be started: {error}"
        _, error = self._exchange(slot, b"", START_SECONDS)
        if error or self._closed:  # closed by Ctrl-C meanwhile
            self._end(slot)
            return f"reward {', '.join(self._specs)} does not load: {error}"
        return None

    def _exchange(self, slot: int, request: bytes, seconds: float) -> Scored:
        """Send a request and wait for the reply; without one, end the worker and say why."""
        start = time.monotonic()
        with suppress(OSError, ValueError):
            reward, failure = json.loads(self._children[slot].ask(request, seconds + GRACE_SECONDS))
            return reward, failure
        late = time.monotonic() - start >= seconds
        status = self._end(slot, wait=0.0 if late else GRACE_SECONDS)
        if late:
            return None, f"it took more than {seconds:g} s"
        is_signal = status is not None and status < 0
        ended = signal.strsignal(-status) if is_signal else f"exit status {status}"
        return None, f"it ended its process ({ended})"

    def _end(self, slot: int, wait: float = 0.0) -> int | None:
        """End a worker and return its status."""
        child, self._children[slot] = self._children[slot], None
        return None if child is None else child.end(wait)

    def _forward(self, chunk: bytes) -> None:
        """Pass on what functions print, until it has been too much."""
        if self._output_left > 0:
            text = chunk[: self._output_left].decode(errors="replace")
            self._output_left -= len(chunk)
            if self._output_left <= 0:
                text += "\n(what else reward functions print in this step is not shown)\n"
            with suppress(OSError, ValueError):  # nobody listens any more
                sys.stderr.write(text)


def default_num_workers() -> int:
    """Return the cores of this process, shared by the ranks of its machine: 1 to 8."""
    is_linux = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    return min(8, max(1, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# ---------------------------------------------------------------------------------- in the worker


def main() -> None:
    """Answer requests until the input ends."""
    seconds, specs = float(sys.argv[1]), sys.argv[2:]
    trainer = _take_socket()
    pid = os.getpid()
    _prepare_process()
    faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=2)
    functions, error = [], None
    try:
        functions = [load_function(spec) for spec in specs]
    except ValueError as problem:
        error = str(problem)
    faulthandler.cancel_dump_traceback_later()
    trainer.sendall(_as_line([None, error]))
    for line in open(trainer.fileno(), encoding="ascii", closefd=False):
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        number, problem, completion = json.loads(line)
        try:
            reply = score_one(functions[number], Problem(**problem), completion)
        except BaseException as error:  # sys.exit
            reply = None, _one_line(error)
        if os.getpid() != pid:
            os._exit(0)  # a child that the function forked has come back here, without the timer
        faulthandler.cancel_dump_traceback_later()
        trainer.sendall(_as_line(reply))
    os._exit(0)  # whatever threads the functions have left


def _as_line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _take_socket() -> socket.socket:
    """Return the socket to the trainer; functions are left an empty stdin, and print on stderr."""
    trainer = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=lambda: os.close(trainer.detach()))
    return trainer


def _prepare_process() -> None:
    # A scheduler's warning goes to every process; handlers, unlike SIG_IGN, are not inherited.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    faulthandler.enable()  # a segfault prints where
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):  # when memory runs out, Linux ends a worker before the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")


def load_function(spec: str) -> RewardFunction:
    """Return the function of "path/to/file.py:function"; the file is run once, and may import what
    lies beside it. Raises ValueError."""
    file, _, name = spec.rpartition(":")
    if file not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(file, file)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[file] = module  # dataclasses look there
        sys.path.insert(0, str(Path(file).parent))
        try:
            module_spec.loader.exec_module(module)
        except BaseException as error:
            raise ValueError(_one_line(error)) from error
    function = getattr(sys.modules[file], name, None)
    if not callable(function):
        functions = [key for key, value in vars(sys.modules[file]).items() if callable(value)]
        raise ValueError(f"{file} has no function {name!r}; it has {', '.join(functions)}")
    try:
        inspect.signature(function).bind(None, "")
    except TypeError as error:
        raise ValueError(f"{name} is called with (problem, completion): {error}") from error
    return function


def score_one(function: RewardFunction, problem: Problem, completion: str) -> Scored:
    """Return (reward, None), (None, None) where the function declines, or (None, what failed)."""
    try:
        reward = function(problem, completion)
        if reward is None:
            return None, None
        if isinstance(reward, str | bytes):  # float() would read them
            raise TypeError(f"a reward must be a number, not {type(reward).__name__}")
        value = float(reward)
    except Exception as error:  # whatever a user's function does must not end a run of hours
        return None, _one_line(error)
    if not abs(value) <= LARGEST:
        return None, f"it returned {value}, not a number within {LARGEST:g}"
    return value, None


def _one_line(error: BaseException) -> str:
    """Describe an error and the last line of a user's file that it came through; it may quote the
    model's text, which must not drive a terminal."""
    try:
        text = str(error)
    except BaseException:
        text = "(an error without a text)"
    tb = traceback.walk_tb(error.__traceback__)
    lines = [(f.f_code.co_filename, n) for f, n in tb if f.f_code.co_filename in sys.modules]
    text = f"{type(error).__name__}: {text}"[:300]
    if lines:
        file, line = lines[-1]
        text += f" ({Path(file).name}, line {line})"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


if __name__ == "__main__":
    main()
