"""The results page and README's table: what is replaced, and which rollout is shown."""

import json
from pathlib import Path

import pytest

from dev import first_screen
from nanomath.measure import report


def example(name: str, *, correct: bool) -> dict:
    return {"prompt": "1 2 3 -> 6\n", "text": f"{name}\n<answer>", "correct": correct}


def test_only_what_is_between_the_marks_is_replaced():
    """The section takes the old one's place, all else stays, and a second time changes nothing."""
    begin, end = first_screen.MARKS
    before = f"# top\n\n{begin}old\n{end}\n## more\n"
    after = first_screen.replaced(before, "new\n")
    assert after == f"# top\n\n{begin}new\n{end}\n## more\n"
    assert first_screen.replaced(after, "new\n") == after
    for name in ("docs/results.md", "README.md"):
        page = (Path(first_screen.ROOT) / name).read_text(encoding="utf-8")
        assert "new\n" in first_screen.replaced(page, "new\n")  # the page has the marks
    for broken in ("# top\n", f"{begin}{begin}{end}"):
        with pytest.raises(ValueError, match="once"):
            first_screen.replaced(broken, "new\n")


def test_the_readme_has_the_figures_of_the_results_page():
    """README's table of four models is what the tables of docs/results.md give."""
    root = Path(first_screen.ROOT)
    section = (root / "docs" / "results.md").read_text(encoding="utf-8")
    section = section.split(first_screen.MARKS[0])[1].split(first_screen.MARKS[1])[0]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert first_screen.MARKS[0] + first_screen.four_rows(section).strip() + "\n" in readme


def test_the_rollout_is_the_first_that_grpo_mended():
    """Wrong before and right after, both outputs set off as code; none, where there is none."""
    right = {
        f"{model}{i}": example(f"{model}{i}", correct=i != 1) for model in "sg" for i in (0, 1)
    }
    evals = {
        "sft": {"examples": [right["s0"], right["s1"], right["s1"]]},
        "grpo": {"examples": [right["g0"], right["g1"], right["g0"]]},
    }
    text = first_screen.rollout(evals)
    assert text.splitlines()[2:] == [
        *("    1 2 3 -> 6", "", "    SFT:", "    s1", "    <answer>", ""),
        *("    GRPO:", "    g0", "    <answer>"),
    ]
    assert first_screen.rollout({"sft": evals["sft"], "grpo": evals["sft"]}) == ""


def finished_run(folder: Path, *, seed: int, minutes: float) -> tuple[str, dict]:
    """Write what the section reads of a run beside its evaluations; return what write_report does:
    of four problems SFT has one right, GRPO three."""
    (folder / "grpo").mkdir(parents=True)
    (folder / "grpo" / "config.json").write_text(json.dumps({"seed": seed, "num_eval_problems": 3}))
    row = {f"seconds_{phase}": 6.0 for phase in report.PHASES}
    (folder / "grpo" / "metrics.jsonl").write_text(json.dumps({"step": 0, **row}) + "\n")
    seconds = {"sft": 60 * minutes, "control": 120, "grpo": 60, "table 1": 6000}
    (folder / "seconds.tsv").write_text("".join(f"{k}\t{v}\n" for k, v in seconds.items()))
    evals = {}
    for model, num_right in {"base": 0, "sft": 1, "control": 2, "grpo": 3}.items():
        problems = [{"id": i, "greedy_correct": i < num_right} for i in range(4)]
        metric = dict.fromkeys(("value", "low", "high"), num_right / 4)
        evals[model] = {
            "num_problems": 4,
            "num_samples": 8,
            "settings": {"temperature": 0.5},
            "metrics": dict.fromkeys(("greedy", "pass@1", "pass@8", "maj@8"), metric),
            "greedy_outputs": {"format_failures": 0.0, "truncated": 0.0},
            "problems": problems,
            "examples": [example(model, correct=row["greedy_correct"]) for row in problems],
        }
    return "", evals


def test_the_section_shows_every_seed_and_the_first_runs_figures(tmp_path, monkeypatch):
    """Minutes from the least to the most, without Table 1; a row per seed; the first run's tables
    and rollout; Table 1 where it was made. One run given twice is refused."""
    runs = [tmp_path / "a", tmp_path / "b"]
    reports = {
        run: finished_run(run, seed=seed, minutes=minutes)
        for run, seed, minutes in zip(runs, (0, 3), (7, 9), strict=True)
    }
    monkeypatch.setattr(report, "write_report", lambda run: reports[run])
    monkeypatch.setattr(first_screen, "draw_curves", lambda runs, panels, path: None)
    text = first_screen.first_screen(runs, "a machine")
    said = "on a machine: 10.0 to 12.0 minutes each after set-up, 1.0 of them GRPO and 2.0 its"
    assert said in text
    assert "temperature 0.5; pass@8: any of 8 samples is right; maj@8" in text
    assert "on the first 3 problems." in text
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines()]
    for name in ("seed 0", "seed 3", "mean of 2"):
        assert [name, "25.0%", "50.0%", "75.0%"] in rows
    assert "GRPO right:\n\n    1 2 3 -> 6\n\n    SFT:\n    sft\n" in text
    assert "| where the time goes" in text and "Table 1" not in text
    short = [
        [c.strip() for c in row.split("|")] for row in first_screen.four_rows(text).split("\n")
    ]
    assert [row[1:3] for row in short[2:6]] == [
        *(["base (seed 0)", "0.0%"], ["SFT", "25.0%"]),
        *(["control: SFT continued", "50.0%"], ["GRPO", "75.0%"]),
    ]
    assert [row[3].split(" ")[0] for row in short[3:5]] == ["+50.0%", "+25.0%"]
    (runs[0] / "table1.md").write_text("| a table |\n\nand its notes\n")
    with_table = first_screen.first_screen(runs, "a machine")
    assert with_table.startswith(text.rstrip("\n"))
    assert with_table.endswith("seed 0):\n\n| a table |\n\nand its notes\n")
    with pytest.raises(ValueError, match=r"different seeds.*\[0, 0\]"):
        first_screen.first_screen([runs[0], runs[0]], "a machine")
