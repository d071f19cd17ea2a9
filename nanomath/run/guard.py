"""What ends a run early, on all ranks alike: one rank's error, a signal to stop.

Left to others: collectives (dist.py), saving when asked to stop (loop.py), disks (checkpoint.py).

    dist = setup(cfg.device, cfg.threads)
    with raise_together(dist), StopSignal() as stop:
        for step in ...:
            ...
            if stop.requested(dist):
                save(...)
                break
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nanomath.dist import Dist, all_ok, barrier, broadcast_json, cleanup

POLL_S = 0.25  # how often a rank looks for another rank's error
LINGER_S = 4 * POLL_S  # the store ends with the process that holds it: first all others look
LAST_WORDS_S = 20  # after an error, a process that has not ended by itself is killed


class ErrorWatch(threading.Thread):
    """Carry one rank's error to the others outside the collectives, which may be waiting for it.

    gloo notices a rank that is gone, NCCL waits for it until its time is up, and a SIGTERM from
    torchrun or Slurm only asks for a save. So this thread looks at the rendezvous store a few times
    a second; on an error it prints the message and ends the process, wherever the main thread is.
    """

    def __init__(self, dist: Dist):
        super().__init__(daemon=True)
        self.rank, self.ended = dist.rank, threading.Event()
        self.store = dist.store.clone()  # a connection of its own: the other one may be waiting
        self.start()

    def stop(self) -> None:
        self.ended.set()
        self.join()

    def tell(self, message: str) -> bool:
        """Publish this rank's error; False if another rank's came first."""
        self.stop()
        text = f"rank {self.rank}: {message}"
        with suppress(RuntimeError):  # the process that held the store may have gone already
            first = self.store.compare_set("error", "", text).decode()
            time.sleep(LINGER_S)
            return first == text
        return True

    def run(self) -> None:
        message = None
        while message is None:
            if self.ended.wait(POLL_S):
                return
            try:
                if self.store.check(["error"]):
                    message = self.store.get("error").decode()
            except RuntimeError as error:
                message = f"lost contact with the other ranks ({str(error).splitlines()[0]})"
        print(f"nanomath: rank {self.rank} ends: {message}", file=sys.stderr, flush=True)
        time.sleep(LINGER_S)
        os._exit(1)


@contextmanager
def raise_together(dist: Dist) -> Iterator[None]:
    """End all ranks when the body raises on one of them, each with that error's message.

    The first rank to fail raises its exception; ranks that fail after it end silently with status
    1, for theirs is mostly a lost connection; ranks that wait in a collective are ended by their
    watch. Put it around everything after setup: the processes do not survive it.
    The end of the body, or SystemExit with status 0 (a stop they agreed on), must come on all ranks
    alike: they then leave the process group together.
    """
    watch = ErrorWatch(dist) if dist.world_size > 1 else None
    try:
        yield
        _leave(dist, watch)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            _leave(dist, watch)
            raise
        if watch is None:
            raise
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LAST_WORDS_S)  # leaving a broken NCCL group may hang
        text = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        if not watch.tell(text):
            raise SystemExit(1) from None
        raise


def wait_for_all(dist: Dist, where: str) -> None:
    """Wait until every rank is here, however long: not in a collective, whose timeout ends it.

    where: a name used once. Another rank's error ends the wait, inside raise_together.
    """
    if dist.store is None:
        return
    dist.store.add(where, 1)
    while dist.store.add(where, 0) < dist.world_size:
        time.sleep(POLL_S)


def _leave(dist: Dist, watch: ErrorWatch | None) -> None:
    if watch is not None:
        barrier(dist)
        watch.stop()
    cleanup(dist)


class _Signalled(BaseException):
    """A signal came while work was done that it may cut; no handler of errors may keep it."""


class StopSignal:
    """Turn SIGTERM and SIGUSR1 into a question asked at the end of a step; a second one kills.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.requested(dist):
                    save(...); break

    Schedulers and torchrun both forward a SIGTERM, so copies within a second count as one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
    SAME_SIGNAL_S = 1.0

    def __init__(self):
        self._first = math.inf  # when the first signal came
        self._may_cut = False

    def _handle(self, number: int, frame: object) -> None:
        if time.monotonic() - self._first > self.SAME_SIGNAL_S:
            os._exit(128 + number)
        self._first = min(self._first, time.monotonic())
        if self._may_cut:
            self._may_cut = False
            raise _Signalled

    def unless_signalled(self, work: Callable[[], Any]) -> Any:
        """Return work(), or None at once when this rank is signalled before it is done.

        The work may be cut anywhere, so it must be such as can be thrown away, and wait for no
        other rank. Ask `requested` after it, for the other ranks may have done theirs.
        """
        try:
            self._may_cut = True
            result = work() if self._first == math.inf else None
            self._may_cut = False
            return result
        except _Signalled:
            return None
        finally:
            self._may_cut = False

    def requested(self, dist: Dist) -> bool:
        """Return True on all ranks if any rank was signalled. Call it at the same step on all."""
        return not all_ok(self._first == math.inf, dist)

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class RunInUse(SystemExit):
    """Another trainer holds the run folder, or took it from this one."""


class RunLock:
    """A held lock on a run folder (rank 0), or the knowledge that rank 0 holds it."""

    def __init__(self, path: Path):
        self.path, self._file = path, None
        self.doing = "before the first step"  # what its holder is at, for the line that ends it

    def take(self) -> str | None:
        """Lock the file, or return a message that names folder and holder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+", errors="replace")
        # A lock lives as long as any copy of its handle: workers forked from here must not keep it.
        os.register_at_fork(after_in_child=self._file.close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(200).strip()
            self._file.close()
            return (
                f"{self.path.parent} is in use by another trainer ({holder}); "
                f"end that one first, or choose another --run_dir"
            )
        self._file.truncate(0)
        print(f"pid {os.getpid()} on {socket.gethostname()}", file=self._file, flush=True)
        return None

    def check(self, dist: Dist) -> None:
        """Raise RunInUse on every rank if the lock file is no longer the one locked here."""
        held = self._file is None or (
            self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        )
        if not all_ok(held, dist):
            raise RunInUse(
                f"{self.path} was removed or replaced while this trainer ran; another one may be "
                f"writing to {self.path.parent}, so this one saves nothing more"
            )


@contextmanager
def run_lock(run_dir: str | Path, dist: Dist | None = None) -> Iterator[RunLock]:
    """Hold a run folder for one trainer; raise RunInUse on every rank if another one has it.

    The kernel drops the lock when the process ends, however it ends. Only rank 0 locks.
    """
    dist = dist or Dist(0, 0, 1, torch.device("cpu"))
    lock = RunLock(Path(run_dir) / ".lock")
    problem = broadcast_json(lock.take() if dist.is_main else None, dist)
    if problem is not None:
        raise RunInUse(problem)
    try:
        yield lock
    finally:
        if lock._file is not None:
            lock._file.close()
