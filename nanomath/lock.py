"""One trainer a run folder: a file lock that ends with its process.

with run_lock(cfg.run_dir, dist) as lock:
    ...
    lock.check(dist)    # before each save: the folder may have been taken over
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nanomath.dist import Dist, all_ok, broadcast_json


class RunInUse(ValueError):
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

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


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
        lock.release()
