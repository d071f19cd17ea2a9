"""README.md and docs/ speak of what is there: files, modules, flags, tests and links."""

import ast
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
READERS_OWN = re.compile(r"my_\w+\.py|runs/NAME\.sh")
FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)")
COMMAND = re.compile(r"(?:-m (nanomath[\w.]*)|(?:^|\s)((?:\w+/)*\w+\.(?:py|sh)))(?=\s|$)([^&|;#]*)")
# What a flag without its command may belong to.
SCRIPTS = ("train_grpo.py", "train_sft.py", "train_pretrain.py", "evaluate.py", "build_corpus.py")
MODULES = ("nanomath.measure.plan", "nanomath.play.export")
OTHERS = {"threads": "bench/kernels.py", "list": "dev/mutations.py"}


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def code_of(page: str) -> list[str]:
    """Return a page's `code` and the lines of its indented blocks, those with a \\ joined."""
    text = text_of(page).replace("\\\n", " ")
    blocks = [line.strip() for line in text.splitlines() if re.match(r"    +\S", line)]
    return blocks + [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`", text)]


@cache
def flags_of(command: str) -> frozenset[str]:
    """Return the flags that a script or module of the project names in its --help."""
    if command.endswith(".sh"):
        done = subprocess.run(
            ["bash", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        # The real models' scripts pass their flags on to the trainer.
        passed_on = flags_of("train_grpo.py") if command.startswith("runs/") else frozenset()
        return frozenset(FLAG.findall(done.stdout)) | passed_on
    path = ROOT / (command if command.endswith(".py") else f"{command.replace('.', '/')}.py")
    # In this process: importing torch again for each of them would take half a minute.
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
        patch.setattr(sys, "argv", [str(path), "--help"])
        patch.syspath_prepend(str(path.parent))
        with pytest.raises(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
    return frozenset(FLAG.findall(shown.getvalue()))


@cache
def functions_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """A link within the project finds its file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path = (ROOT / page).parent / target.partition("#")[0]
        assert target.startswith(("http://", "https://")) or path.exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_exist(page):
    """Every file and folder in `code` exists (a test's path may begin below tests/; a name alone
    is some file's), and every test is in the file it is said to be in."""
    folders = [ROOT / name for name in ("nanomath", "kernels", "docs", "tests", "bench", "dev")]
    names = {path.name for folder in folders for path in folder.rglob("*.*")}
    names |= {path.name for path in ROOT.iterdir()}
    for code in code_of(page):
        for word in re.findall(r"(?:[\w./-]+\.(?:py|sh|md)|dev/\w+\.txt)\b(?:::\w+)?", code):
            path, _, test = word.removeprefix("./").partition("::")
            found = [p for p in (path, f"tests/{path}") if (ROOT / p).is_file()]
            known = found or READERS_OWN.fullmatch(path) or "/" not in path and path in names
            assert known, (page, word)
            assert not test or test in functions_in(found[0]), (page, word)
        for folder in re.findall(
            r"(?<![\w/.])(?:nanomath|kernels|tests|dev|bench)/(?:\w+/)*", code
        ):
            assert (ROOT / folder).is_dir(), (page, folder)
        if re.fullmatch(r"test_\w+", code):
            files = (path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))
            assert any(code in functions_in(path) for path in files), (page, code)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_and_have_their_flags(page):
    """Each module named in `code` exists, and each command has every flag of its line."""
    for line in code_of(page):
        for module in re.findall(r"nanomath(?:\.\w+)+", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), (page, line)
        line = line.split(" # ")[0].removeprefix("sbatch runs/slurm.sh")  # it runs the rest
        for module, script, rest in COMMAND.findall(line):
            given, name = set(FLAG.findall(rest)), module or script
            if module:
                source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
                assert '__name__ == "__main__"' in source, (page, line)
            if given and not READERS_OWN.fullmatch(name):
                assert given <= flags_of(name), (page, line, given - flags_of(name))


def test_flags_named_alone_exist():
    """A flag in `code` without its command belongs to some command of the project."""
    known = frozenset().union(*map(flags_of, (*SCRIPTS, *MODULES, "speedrun.sh")))
    known |= {flag for flag, command in OTHERS.items() if flag in flags_of(command)}
    for page in PAGES:
        for code in code_of(page):
            if code.startswith("--"):
                wrong = set(FLAG.findall(code)) - known
                assert not wrong, (page, code, wrong)


def test_every_deviation_has_a_row():
    """The files of docs/deviations.md's table are those with a `# DEVIATION:` comment."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("nanomath/**/*.py")]
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in sources
        if "DEVIATION:" in path.read_text(encoding="utf-8")
    }
    assert {*re.findall(r"(?m)^\| `([^`]+)`", text_of("docs/deviations.md"))} == marked
