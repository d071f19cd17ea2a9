"""What the benchmarks share: where they ran, peak memory, the JSON file.

Importing it puts the project's folder in the place of this one on sys.path, for here lies a file
called kernels as well: import it before anything of the project.
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
from nanomath.base.config import write_json  # noqa: E402


def record(device: str, *packages: str) -> dict[str, Any]:
    """Return what a result must say of its run: machine, load, versions, command, date."""
    versions = {"python": platform.python_version()}
    for package in ("torch", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def peak_bytes(device: str) -> int:
    """Return the most memory held so far: on the GPU, or by this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"written: {path}")
