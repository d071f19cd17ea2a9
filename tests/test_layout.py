"""The house: who may import whom, what imports no torch, and how large each part may be.

    python -m pytest tests/test_layout.py -s        prints the counts

The flat files of nanomath/, kernels/ and the trainers are the core; each folder of nanomath/ is a
wing. A room imports from lower floors, and from its own; a circle fails, whether it is closed by an
import at the top, inside a function or under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dev.tree import FILES, ROOT, code_lines, room, tree_rows, with_counts

FLOORS = (
    {"kernels", "base", "judge"},
    {"text"},
    {"tasks"},
    {"corpus", "core"},
    {"engine", "hub"},
    {"run"},
    {"measure", "play"},
    {"scripts"},
)
WITHOUT_TORCH = ("base", "judge", "text", "tasks", "corpus")
CORE_MAY = {"kernels", "base", "text", "tasks", "core"}  # and nothing else of the lower floors
TRAINERS = ("train_pretrain.py", "train_sft.py", "train_grpo.py")

# Lines of code: without blank lines, comments and docstrings. A number is raised, or lowered, in
# the commit that says why.
BUDGETS = {"core": 2_900, "all": 10_750}
FILE_LINES = {"core": 375, "wing": 520}
README_LINES = 160


def imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in parts if name in FILES}
            found |= modules
            if len(modules) < len(parts):
                found.add(node.module)
    return {name for name in found if name in FILES}


IMPORTS = {module: imports(path) for module, path in FILES.items()}


def test_imports_run_down_the_floors():
    """No module imports from a higher floor, or from another room of its own floor."""
    floor_of = {name: floor for floor, rooms in enumerate(FLOORS) for name in rooms}
    wrong = [
        f"{module} imports {other}"
        for module, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if room(module) != room(other) and floor_of[room(other)] >= floor_of[room(module)]
    ]
    assert not wrong, "\n".join(wrong)
    assert {room(module) for module in FILES} == set().union(*FLOORS)


def test_the_core_knows_no_wing_but_those_it_stands_on():
    """A flat file never imports judge, corpus or a wing above; kernels import torch and triton."""
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room(module) == "core" and room(other) not in CORE_MAY
    ]
    assert not wrong, "\n".join(wrong)
    for module, path in FILES.items():
        if room(module) == "kernels":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    top = name.split(".")[0]
                    assert top in {"kernels", "torch", "triton", *sys.stdlib_module_names}, path


def test_there_is_no_circle():
    """The modules can be put in an order in which each imports only earlier ones."""
    left = {module: set(others) - {module} for module, others in IMPORTS.items()}
    while left:
        ready = {module for module, others in left.items() if not others & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {module: others for module, others in left.items() if module not in ready}


@pytest.mark.parametrize("wing", WITHOUT_TORCH)
def test_wings_that_import_no_torch(wing):
    """Every module of the wing can be imported where there is no torch."""
    modules = [module for module in FILES if room(module) == wing]
    code = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import {m}" for m in modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_budgets():
    """The core can be read in a weekend, and the whole does not outgrow what it does."""
    counts = {module: code_lines(path) for module, path in FILES.items()}
    rooms: dict[str, dict[str, int]] = {}
    for module, count in sorted(counts.items()):
        is_trainer = FILES[module].name in TRAINERS
        rooms.setdefault("core" if is_trainer else room(module), {})[module] = count
    rooms["core"] |= rooms.pop("kernels")
    totals = {name: sum(modules.values()) for name, modules in rooms.items()}
    for name in sorted(rooms, key=lambda name: (name != "core", name)):
        print(f"\n{totals[name]:6d}  {name}")
        print("\n".join(f"{count:10d}  {module}" for module, count in rooms[name].items()))
    print(f"\n{sum(totals.values()):6d}  all, of at most {BUDGETS['all']}")
    print(f"{totals['core']:6d}  the core, of at most {BUDGETS['core']}")
    assert totals["core"] <= BUDGETS["core"]
    assert sum(totals.values()) <= BUDGETS["all"]
    for module, path in FILES.items():
        limit = FILE_LINES["core" if room(module) in ("core", "kernels") else "wing"]
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= limit, f"{path.relative_to(ROOT)} has {num_lines} lines, over {limit}"


def test_the_readme_is_short_and_its_tree_is_true():
    """README has at most 160 lines; its tree has every file of the core, every wing and script, and
    nothing else of them, with their lines of code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= README_LINES
    shown = [path for _, path, _ in tree_rows(readme)]
    assert not [path for path in shown if not (ROOT / path).exists()]
    paths = {FILES[module].relative_to(ROOT).as_posix() for module in FILES}
    wings = {path.rpartition("/")[0] + "/" for path in paths if path.count("/") == 2}
    expected = {*(path for path in paths if path.count("/") < 2), *wings}
    expected -= {"kernels/__init__.py"}
    assert sorted(path for path in shown if path in paths | wings) == sorted(expected)
    assert with_counts(readme) == readme, "python dev/tree.py writes the numbers"
