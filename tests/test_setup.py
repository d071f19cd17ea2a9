"""dev/setup.sh and the versions it installs, on Pythons and machines other than this one."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# A Python whose pip installs nothing but notes its arguments, and whose pytest only says its name.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$2 ${{3:-}}" in
    "pip install") sleep "${{PIP_SECONDS:-0}}"; echo "$*" >>"$PIP_LOG" ;;
    "pytest "*) echo "pytest ran" ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what set-up reads, under a path with a blank, and beside it a fake $VENV."""
    tree = tmp_path / "a tree é"
    (tree / "dev").mkdir(parents=True)
    for name in ("dev/setup.sh", "test.sh", "speedrun.sh", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tree / name)
    fake = tmp_path / "my env" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    return tree


def start(tree: Path, *command: str, **env: str) -> subprocess.Popen:
    """Start a script of the tree as a user without HOME, in another folder and a bare locale."""
    base = {"PATH": os.environ["PATH"], "LC_ALL": "C", "VENV": "my env", "PYTHON": sys.executable}
    base |= {"PIP_LOG": str(tree.parent / "pip.log"), "https_proxy": "http://127.0.0.1:9"}
    return subprocess.Popen(
        ["bash", *(command or (str(tree / "test.sh"),))], cwd=tree.parent, env=base | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    return process.wait(timeout=60), process.stdout.read()


def installs(tree: Path) -> list[str]:
    log = tree.parent / "pip.log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def test_two_calls_at_once_set_up_once_and_a_later_one_does_nothing(tree):
    """Setuptools, then the project, by one of the two; afterwards no pip at all. The source
    is left as it was: a read-only one would do."""
    before = sorted(tree.rglob("*"))
    both = [start(tree, PIP_SECONDS="2"), start(tree, PIP_SECONDS="2")]
    outputs = [finish(process) for process in both]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert all("pytest ran" in text for _, text in outputs)
    assert sorted("waiting for another" in text for _, text in outputs) == [False, True]
    assert [line.split()[-1] for line in installs(tree)] == ["setuptools>=77", "env/src[test]"]
    assert finish(start(tree)) == (0, "pytest ran\n")
    assert len(installs(tree)) == 2
    assert sorted(tree.rglob("*")) == before


def test_a_set_up_serves_whoever_needs_no_more(tree):
    """The tests' serves speedrun.sh, that with the peers serves the tests, not the other way."""
    script = 'CALLER_DIR="$PWD"; cd "a tree é"; source dev/setup.sh; setup_environment "$0"'
    counts = []
    for extra in ("", "test", "", "test,peers", "test", ""):
        assert finish(start(tree, "-c", script, extra))[0] == 0
        counts.append(len(installs(tree)))
    assert counts == [2, 4, 4, 6, 6, 6]


def test_what_changes_the_versions_sets_up_again(tree):
    """Constraints, setup.py and TORCH do, and going back does, too; the text of setup.sh does not.
    Another torch comes without pins of torch's and triton's own."""
    counts = []
    for change in ("", "dev/setup.sh", "constraints.txt", "setup.py"):
        if change:
            with open(tree / change, "a") as file:
                file.write("\n# changed\n")
        assert finish(start(tree))[0] == 0
        counts.append(len(installs(tree)))
    pins = (tree.parent / "my env" / "constraints.txt").read_text().split()
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(pins)
    for torch in ("2.14.1", ""):
        assert finish(start(tree, TORCH=torch))[0] == 0
        counts.append(len(installs(tree)))
        if torch:
            other = (tree.parent / "my env" / "constraints.txt").read_text().split()
    assert counts == [2, 2, 4, 6, 8, 10]
    assert set(other) - set(pins) == {"torch==2.14.1"}
    assert set(pins) - set(other) == {"torch==2.13.0", "triton==3.7.1"}


@pytest.mark.parametrize(
    "env, message",
    [
        (
            {"PYTHON": "python2"},
            r"needs Python 3\.11 to 3\.14; found none as python2\. Set PYTHON=",
        ),
        ({"PYTHON": "no such/python"}, r"found none as no such/python\. Set PYTHON="),
        ({"TORCH": "2.14; rm"}, r"TORCH is '2\.14; rm', but must be a version"),
        ({"VENV": "file/env"}, r"cannot write \S+/file/env: set VENV to a folder of your own"),
        ({"VENV": "new", "PYTHONPATH": ".."}, r"make a virtual .*: apt install python3\.1\d-venv"),
        ({"PYTHON": "./python"}, r"my env is not of PYTHON=\./python: remove that folder, or set"),
        ({"PIP_LOG": "/no/such/log"}, r"the set-up did not end, see above: is PyPI within reach\?"),
    ],
)
def test_what_cannot_be_set_up_says_what_to_do(tree, env, message):
    """The last line names the cure, and the call fails."""
    (tree.parent / "file").touch()
    (tree.parent / "ensurepip.py").write_text("raise ImportError\n")
    # Another Python that is fit: all but its -V is this one's.
    (tree.parent / "python").write_text(
        f'#!/bin/sh\n[ "$1" = -V ] && echo Python 3.12.99 || exec "{sys.executable}" "$@"\n'
    )
    (tree.parent / "python").chmod(0o755)
    code, text = finish(start(tree, **env))
    assert code == 1 and "pytest ran" not in text
    assert re.search(message, text.splitlines()[-1]), text


def test_a_run_folder_that_cannot_be_written_is_refused(tree):
    """--run_dir counts from the caller's folder, and the message names the flag."""
    (tree.parent / "file").touch()
    command = (str(tree / "speedrun.sh"), "--preset", "smoke", "--run_dir", "file/run")
    code, text = finish(start(tree, *command))
    assert code == 2
    assert f"cannot write {tree.parent}/file/run: choose another folder with --run_dir" in text


# ---- what pip chooses on other Pythons, machines and torches (needs PyPI; installs nothing) ----


def project(monkeypatch) -> dict:
    """What setup.py hands to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def torch_releases() -> list[str]:
    """All releases of torch on PyPI; skip where there is no connection."""
    request = urllib.request.Request(
        "https://pypi.org/simple/torch/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            files = [file["filename"] for file in json.load(reply)["files"]]
    except OSError as error:
        pytest.skip(f"PyPI is not within reach: {error}")
    return sorted({name.split("-")[1] for name in files if name.endswith(".whl")}, key=Version)


def resolve(folder: Path, env: dict, name: str, arch: str, lines: list[str], pins: str) -> str:
    """Return what pip would install for these requirements, or how it failed."""
    python = name.split()[0]
    (folder / f"{name}.txt").write_text("\n".join(lines))
    (folder / f"{name}.pins").write_text(pins)
    tags = [f"manylinux_2_{minor}" for minor in range(28, 4, -1)]
    tags += ["manylinux2014", "manylinux2010", "manylinux1"]
    command = [
        *(sys.executable, "-m", "pip", "--no-cache-dir", "--use-feature=fast-deps", "install"),
        *("--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version", python),
        *(f"--platform={tag}_{arch}" for tag in tags),
        *("--target", "target", "-r", f"{name}.txt", "-c", f"{name}.pins"),
    ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    would = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    return would[0] if done.returncode == 0 and would else "failed: " + done.stderr[-1500:]


@pytest.mark.slow
def test_every_torch_resolves_on_every_python(tmp_path, monkeypatch):
    """The pinned torch and triton on four Pythons and two machines, with all extras; every other
    torch that setup.py admits, with the triton it asks for; and the newest of all without pins."""
    setup = project(monkeypatch)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in pins.splitlines() if "==" in line)
    releases = torch_releases()
    needs = [Requirement(line) for line in setup["install_requires"]]
    admits = next(need.specifier for need in needs if need.name == "torch")
    admitted = [release for release in releases if release in admits]
    assert pinned["torch"] in admitted
    for python in PYTHONS:
        assert python in SpecifierSet(setup["python_requires"])
    # As a user has it: no settings of this machine but its connection. An older pip would download.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    kept = ("PIP_CERT", "PIP_PROXY", "PIP_INDEX_URL")
    env |= {key: os.environ[key] for key in kept if key in os.environ}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(tmp_path / "pip")}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--target",
        tmp_path / "pip",
        "pip>=25",
    ]
    subprocess.run(command, check=True, env=env, timeout=120)

    everything = [line for extra in setup["extras_require"].values() for line in extra]
    cases = {
        f"{python} {arch}": (arch, setup["install_requires"] + everything, pins)
        for python in PYTHONS
        for arch in ("x86_64", "aarch64")
    }
    without = re.sub(r"(?m)^(torch|triton)==.*\n", "", pins)
    for torch in admitted:
        for python, arch in (("3.11", "x86_64"), ("3.14", "aarch64")):
            if torch != pinned["torch"]:
                this = f"{without}torch=={torch}\n"
                cases[f"{python} {arch} {torch}"] = (arch, setup["install_requires"], this)
    for python in (PYTHONS[0], PYTHONS[-1]):
        cases[f"{python} no pins"] = ("x86_64", setup["install_requires"], "")
    with ThreadPoolExecutor(8) as pool:
        chosen = pool.map(lambda name: resolve(tmp_path, env, name, *cases[name]), cases)
        chosen = dict(zip(cases, chosen, strict=True))
    failed = {name: text for name, text in chosen.items() if text.startswith("failed")}
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())
    for name, text in chosen.items():
        torch = name.split()[2] if name.count(" ") == 2 else pinned["torch"]
        torch = admitted[-1] if name.endswith("no pins") else torch
        assert f" torch-{torch} " in text, name
        if torch == pinned["torch"]:
            assert f" triton-{pinned['triton']} " in text, name
