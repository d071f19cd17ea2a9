"""Count lines of code, comments and docstrings apart: `python dev/lines.py`.

The core (what one reads in a weekend) and the rest are counted apart, against the plan for each.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE_MODULES = (
    "__init__", "activations", "config", "dist", "failures", "lock", "log", "run",
    "tokenizer", "tokenizer_json", "model", "optim", "checkpoint", "data", "cache", "draw",
    "batch", "sampler", "rewards", "reward_workers", "advantages", "grpo", "grpo_config", "monitor",
)  # fmt: skip
CORE = ["kernels/*.py", *(f"nanomath/{name}.py" for name in CORE_MODULES), "train_*.py"]
RL_PATH = [
    "kernels/*.py",
    *(f"nanomath/{name}.py" for name in ["model", "cache", "draw", "batch", "sampler"]),
    *(f"nanomath/{name}.py" for name in ["rewards", "reward_workers", "advantages"]),
    *(f"nanomath/{name}.py" for name in ["grpo", "grpo_config"]),
    "train_grpo.py",
]
PLAN = {"core": 3500, "RL path (in core)": 2000, "rest": 2500}


def code_lines(path: Path) -> int:
    """Return the number of lines that hold code: no blank, comment or docstring lines."""
    text = path.read_text(encoding="utf-8")
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            skipped.update(range(docstring.lineno, docstring.end_lineno + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if number not in skipped and line.strip() and not line.strip().startswith("#")
    )


def files(patterns: list[str]) -> set[Path]:
    return {path for pattern in patterns for path in ROOT.glob(pattern)}


def main() -> None:
    core, rl_path = files(CORE), files(RL_PATH)
    everything = files(["*.py", "kernels/**/*.py", "nanomath/**/*.py"]) - {ROOT / "setup.py"}
    groups = {"core": core, "RL path (in core)": rl_path, "rest": everything - core}
    for name, paths in groups.items():
        counts = {path: code_lines(path) for path in sorted(paths)}
        total, plan = sum(counts.values()), PLAN[name]
        over = f", {total - plan} over" if total > plan else ""
        print(f"{name}: {total} lines of code (plan: at most {plan}{over})")
        if name != "RL path (in core)":
            for path, count in counts.items():
                print(f"  {count:5d}  {path.relative_to(ROOT)}")
    tests = sum(code_lines(path) for path in files(["tests/**/*.py"]))
    print(f"tests: {tests} lines of code")


if __name__ == "__main__":
    main()
