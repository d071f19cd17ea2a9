"""Write the line counts into README's tree: `python dev/tree.py`.

The tree is the block of README.md under "## The tree": a folder or file a line, what is in it, and
for all that is Python and no test the lines of code (no blank, comment or docstring lines). This
script writes the numbers and nothing else; tests/test_layout.py fails where one is stale or a file
is missing. It also says what counts as a line, and to which room a module belongs.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TITLE = "\n## The tree\n"


def source_files() -> dict[str, Path]:
    """Return every module by its dotted name: kernels, nanomath and the scripts beside them."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("nanomath/**/*.py")]
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    names.pop("setup")
    return names


FILES = source_files()


def room(module: str) -> str:
    """Return kernels, core (a flat file of nanomath), the name of a wing, or scripts."""
    top, *rest = module.split(".")
    if top != "nanomath":
        return top if top == "kernels" else "scripts"
    wings = {name.split(".")[1] for name in FILES if name.count(".") == 2}
    return rest[0] if rest and rest[0] in wings else "core"


def code_lines(path: Path) -> int:
    """Return the number of lines that hold code: no blank, comment or docstring lines."""
    text = path.read_text(encoding="utf-8")
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        is_scope = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if is_scope and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            skipped.update(range(docstring.lineno, docstring.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        number not in skipped and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in lines
    )


def tree_rows(readme: str) -> list[tuple[str, str, str]]:
    """Return (whole line, path from the root, description) of each line of README's tree.

    A name four columns in is at the root; one six columns in lies in the folder above it.
    """
    rows, folder = [], ""
    for line in readme.partition(TITLE)[2].partition("\n## ")[0].split("\n"):
        if match := re.fullmatch(r"(    |      )(\S+)(?: +\d+)?  +(\S.*)", line):
            indent, name, description = match.groups()
            folder = folder if len(indent) == 6 else ""
            rows.append((line, folder + name, description))
            folder = folder or (name if name.endswith("/") else "")
    return rows


def with_counts(readme: str) -> str:
    """Return README with the tree's numbers as they are now; a folder's is that of its files."""
    counts = {path.relative_to(ROOT).as_posix(): code_lines(path) for path in FILES.values()}
    for path in [*counts]:
        folder = path.rpartition("/")[0] + "/"
        counts[folder] = counts.get(folder, 0) + counts[path]
    for line, path, description in tree_rows(readme):
        name = line.split()[0]
        indent = " " * (len(line) - len(line.lstrip()))
        number = str(counts.get(path, ""))
        readme = readme.replace(line, f"{indent + name:<30}{number:>5}  {description}", 1)
    return readme


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_counts(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
