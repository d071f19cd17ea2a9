"""The report's tables over seeds and of time."""

import json

import pytest

from nanomath import report


def evaluation(greedy: list[int], nums=(1, 2, 3)) -> dict:
    """An evaluation's figures as far as the table reads them."""
    rows = [
        {"id": i, "nums": [*nums], "target": 6, "greedy_correct": bool(right)}
        for i, right in enumerate(greedy)
    ]
    return {"problems": rows}


def run(sft: list[int], control: list[int], grpo: list[int], **options) -> dict:
    models = {"base": [0] * len(sft), "sft": sft, "control": control, "grpo": grpo}
    return {model: evaluation(greedy, **options) for model, greedy in models.items()}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_seeds_are_compared_problem_by_problem():
    """A row's accuracies and paired gains are its run's, the last row's the means over runs."""
    table = report.seeds_table(
        {
            "a": run([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]),
            "b": run([0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]),
        }
    )
    header, _, first, second, mean = cells(table)
    assert header == ["greedy", "sft", "control", "grpo", "GRPO - SFT", "GRPO - control"]
    assert first[:4] == ["a", "25.0%", "50.0%", "75.0%"]
    assert second[:4] == ["b", "0.0%", "25.0%", "100.0%"]
    assert mean[:4] == ["mean of 2", "12.5%", "37.5%", "87.5%"]
    gains = [[float(cell.split("%")[0]) for cell in row[4:]] for row in (first, second, mean)]
    assert gains == [[50.0, 25.0], [100.0, 75.0], [75.0, 50.0]]
    # All four problems gain in b, so any choice among them does: its interval is one point.
    assert second[4] == "+100.0% [+100.0%, +100.0%]"


def test_other_problems_are_refused():
    """Runs evaluated on different problems have no paired difference."""
    pair = {"a": run([1], [1], [1]), "b": run([1], [1], [1], nums=(2, 2, 2))}
    with pytest.raises(ValueError, match="problem"):
        report.seeds_table(pair)


def test_time_is_shared_out(tmp_path):
    """The phases' seconds are summed over steps; what the stage took beyond them is the rest."""
    (tmp_path / "grpo").mkdir()
    step = {"seconds_sampling": 30, "seconds_rewards": 0, "seconds_logprobs": 6}
    rows = [{"step": i, **step, "seconds_update": 12, "seconds_evaluation": 3} for i in range(2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "grpo" / "metrics.jsonl").write_text(text)
    (tmp_path / "seconds.tsv").write_text("grpo\t100\nsft\t9\ngrpo\t20\n")
    assert cells(report.time_table(tmp_path))[2:] == [
        ["sampling", "1.0", "50%"],
        ["rewards", "0.0", "0%"],
        ["logprobs", "0.2", "10%"],
        ["update", "0.4", "20%"],
        ["evaluation", "0.1", "5%"],
        ["checkpoints, start", "0.3", "15%"],
    ]
