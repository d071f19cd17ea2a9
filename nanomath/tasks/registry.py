"""The tasks by name: `--tasks` offers these, and a problem's task is one of them.

A task of your own is a module with the functions of `Task`, and one line here. For a reward of your
own over your own questions no task is needed: `--problems` and `--reward` (docs/objectives.md).
"""

from nanomath.tasks import Task, benchmarks, countdown

TASKS: dict[str, Task] = {
    "countdown": countdown,
    **dict.fromkeys(benchmarks.BENCHMARKS, benchmarks),
    "jsonl": benchmarks,  # your own problems
}
