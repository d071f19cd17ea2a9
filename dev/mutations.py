"""Break one line at a time; a test must see each: `python dev/mutations.py`.

    python dev/mutations.py --only grpo        entries whose file, lines or reason hold this text
    python dev/mutations.py --list             show them, run nothing

The entries are in dev/mutations.txt: a file and the tests that must fail, then per entry the
reason, a piece of one line that occurs once in the file, and what replaces it. No test that
measures time should be named there. Works on a copy of the tree, made anew. First the tests of all
entries must pass there unbroken. An entry is

    killed      a test failed: an assertion, or an exception that the code itself raises
    SURVIVED    all its tests passed: one is missing
    stale       its text does not occur exactly once in the file: said before anything runs
    broken      no test spoke: it did not load, or a NameError and the like ended it

and all but killed make the exit code 1. Each entry runs in a fork of this process, which has torch
loaded and nothing of nanomath: that is most of the time saved.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import copyfile
from typing import NamedTuple

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 120  # of one entry: a loop that does not end was not seen by a test
# What the tests import, at seconds each; not nanomath, which is to be broken.
PRELOADED = ("torch._dynamo", "torch.distributed.fsdp", "transformers", "hypothesis", "triton")
NO_VERDICT = ("NameError", "ImportError", "ModuleNotFoundError", "AttributeError", "TypeError")


class Mutation(NamedTuple):
    file: str
    tests: tuple[str, ...]
    why: str
    old: str
    new: str

    def describe(self) -> str:
        return f"{self.file}: {self.why}\n  - {self.old}\n  + {self.new}"


def read_mutations(text: str) -> list[Mutation]:
    """Return the entries of dev/mutations.txt; its own first lines say how it is laid out."""
    mutations, file, tests, why, old = [], "", (), "", ""
    for number, line in enumerate(text.splitlines(), 1):
        kind, _, rest = line.partition(" ")
        if kind == "==":
            file, tests = rest, ()
        elif kind == "=":
            tests = (*tests, rest)
        elif kind == "#":
            why = rest
        elif kind == "-":
            old = rest
        elif kind == "+" and file and tests and why and old:
            mutations.append(Mutation(file, tests, why, old, rest))
            why = old = ""
        elif line.strip() and mutations:
            raise ValueError(f"dev/mutations.txt:{number}: not part of an entry: {line}")
    return mutations


def copy_tree(folder: Path) -> None:
    """Copy what git tracks, and new files it does not ignore, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copyfile(ROOT / name, folder / name)


class Verdict:
    """A pytest plugin: writes what failed, in its own phase or a fixture's, to a file."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_exception_interact(self, node, call, report) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{report.when} {call.excinfo.typename} {node.nodeid}\n")


def run_tests(folder: Path, tests: tuple[str, ...], *options: str) -> tuple[int, str]:
    """Run tests of the copy in a fork; return pytest's exit code (-1: time-out, or it died) and
    the first failure as "phase exception test"."""
    output, verdict = folder / ".output", folder / ".verdict"
    verdict.write_text("")
    child = os.fork()
    if child == 0:
        os.setsid()  # so that what a test starts ends with it
        os.chdir(folder)
        with open(output, "w") as file, contextlib.suppress(BaseException):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.path.insert(0, str(folder))
            os.environ["PYTHONPATH"] = str(folder)
            arguments = [*options, "-q", "-p", "no:cacheprovider", *(f"tests/{t}" for t in tests)]
            os._exit(pytest.main(arguments, plugins=[Verdict(verdict)]))
        os._exit(99)
    deadline = time.monotonic() + TIME_LIMIT_S * (1 if "-x" in options else 10)
    code = None
    while code is None and time.monotonic() < deadline:
        time.sleep(0.02)
        pid, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    first = verdict.read_text().partition("\n")[0]
    return -1 if code is None or code < 0 else code, first


def is_stale(mutation: Mutation) -> bool:
    path = ROOT / mutation.file
    return not path.is_file() or path.read_text(encoding="utf-8").count(mutation.old) != 1


def try_mutation(folder: Path, mutation: Mutation) -> tuple[str, str]:
    """Return "killed", "SURVIVED" or "broken", and what says so."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, failure = run_tests(folder, mutation.tests, "-x")
    finally:
        path.write_text(text, encoding="utf-8")
    if code == 0:
        return "SURVIVED", ""
    phase, exception, test = (failure.split(" ", 2) + ["", "", ""])[:3]
    if code == 1 and phase == "call" and exception not in NO_VERDICT:
        return "killed", f"{exception} in {test}"
    return "broken", failure or f"pytest's exit code is {code} (-1: it took too long)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a text of the file, the lines or the reason")
    parser.add_argument("--list", action="store_true", help="show the entries, run nothing")
    args = parser.parse_args()
    mutations = read_mutations((ROOT / "dev" / "mutations.txt").read_text(encoding="utf-8"))
    mutations = [m for m in mutations if args.only in m.describe()]
    if args.list:
        print("\n".join(m.describe() for m in mutations))
        print(f"{len(mutations)} mutations")
        return 0
    if not mutations:
        print(f"no entry of dev/mutations.txt holds {args.only!r}")
        return 1
    if stale := [mutation for mutation in mutations if is_stale(mutation)]:
        print("\n".join(mutation.describe() for mutation in stale))
        print(f"{len(stale)} entries are stale: their text does not occur exactly once in the file")
        return 1
    began = time.monotonic()
    for module in PRELOADED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    # A file changed twice in a second, to the same size, would be taken from the cache.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    results: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_tree(folder)
        tests = tuple(dict.fromkeys(test for m in mutations for test in m.tests))
        code, failure = run_tests(folder, tests)
        if code:
            print((folder / ".output").read_text()[-4000:])
            print(f"unbroken, the tests must pass: exit code {code}, {failure}")
            return 1
        print(f"unbroken, the tests pass in {time.monotonic() - began:.0f} s", flush=True)
        for mutation in tqdm(mutations, desc="mutations", disable=None):
            result, detail = try_mutation(folder, mutation)
            results[result] = results.get(result, 0) + 1
            if result == "killed":
                tqdm.write(f"killed  {mutation.file}: {mutation.why} ({detail})")
            else:
                tqdm.write(f"{result}  {mutation.describe()}\n  {detail}")
            sys.stdout.flush()
    summary = ", ".join(f"{count} {result}" for result, count in results.items())
    print(f"{len(mutations)} mutations: {summary}; {time.monotonic() - began:.0f} s")
    return 0 if results.keys() <= {"killed"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
