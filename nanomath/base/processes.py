"""Processes beside one another: how many threads each may take, and a name for their start.

dist.py joins the ranks and needs both. Imports no torch: the store is handed in.
"""

import os
import time
import uuid
from pathlib import Path
from typing import Any


def default_threads(local_world_size: int) -> int:
    """Return the physical cores this process may use divided by the processes sharing them.

    OMP_NUM_THREADS counts for a single process only: torchrun sets it to 1 by itself.
    """
    if local_world_size == 1 and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, _physical_cores() // local_world_size)


def _physical_cores() -> int:
    """Count cores in the affinity mask, hyper-threads as one, within the cgroup's quota."""
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    is_linux = hasattr(os, "sched_getaffinity")
    cpus = os.sched_getaffinity(0) if is_linux else range(os.cpu_count() or 1)
    num_cores = len({_read(siblings.format(cpu), default=str(cpu)) for cpu in cpus})
    quota, period = _read("/sys/fs/cgroup/cpu.max", default="max 100000").split()
    return num_cores if quota == "max" else min(num_cores, max(1, int(quota) // int(period)))


def _read(path: str, default: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def agree_on_life(store: Any, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name that all ranks share and no earlier start of them has used.

    torchrun's store outlives the processes it restarts, with the addresses of the dead: a group set
    up on the same keys connects to those and fails or hangs. Its count of restarts cannot serve as
    a name, because each node has its own. So each rank says who it is now, and rank 0 answers that.
    """
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f"rank-{rank}", me)
        life = store.get(f"life-of-{me}").decode()  # waits for rank 0
        store.set(f"{life}-has-{rank}", "")
        return life
    missing, give_up = set(range(1, world_size)), time.monotonic() + timeout_s
    while missing:
        for other in tuple(missing):
            if store.check([f"rank-{other}"]):  # may be a dead one's: it will not answer
                store.set(f"life-of-{store.get(f'rank-{other}').decode()}", me)
            if store.check([f"{me}-has-{other}"]):
                missing.remove(other)
        if time.monotonic() > give_up:
            raise TimeoutError(f"ranks {sorted(missing)} did not start within {timeout_s:.0f} s")
        time.sleep(0.02)
    return me
