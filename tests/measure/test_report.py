"""The report's tables over seeds, of Figure 7 and of time."""

import json
import re
from math import comb
from pathlib import Path

import pytest

from nanomath.measure import report
from nanomath.measure.evaluation import default_ks, problem_metrics


def evaluation(greedy: list[int], nums=(1, 2, 3)) -> dict:
    """An evaluation's figures as far as the table reads them."""
    rows = [
        {"id": i, "nums": [*nums], "target": 6, "greedy_correct": bool(right)}
        for i, right in enumerate(greedy)
    ]
    at_8 = {"value": 1 - 2 ** -sum(greedy)}  # anything that differs between models
    return {"num_samples": 8, "metrics": {"pass@8": at_8}, "problems": rows}


def run(sft: list[int], control: list[int], grpo: list[int], **options) -> dict:
    models = {"base": [0] * len(sft), "sft": sft, "control": control, "grpo": grpo}
    return {model: evaluation(greedy, **options) for model, greedy in models.items()}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_seeds_are_compared_problem_by_problem():
    """A row's accuracies, paired gains and Pass@8 are its run's, the last row's the means over
    runs."""
    table = report.seeds_table(
        {
            "a": run([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]),
            "b": run([0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]),
        }
    )
    header, _, first, second, mean = cells(table)
    assert header[:6] == ["greedy", "sft", "control", "grpo", "GRPO - SFT", "GRPO - control"]
    assert header[6:] == ["pass@8 sft", "pass@8 grpo"]
    assert [row[6:] for row in (first, second, mean)] == [
        ["50.0%", "87.5%"],
        ["0.0%", "93.8%"],
        ["25.0%", "90.6%"],
    ]
    assert first[:4] == ["a", "25.0%", "50.0%", "75.0%"]
    assert second[:4] == ["b", "0.0%", "25.0%", "100.0%"]
    assert mean[:4] == ["mean of 2", "12.5%", "37.5%", "87.5%"]
    gains = [[float(cell.split("%")[0]) for cell in row[4:6]] for row in (first, second, mean)]
    assert gains == [[50.0, 25.0], [100.0, 75.0], [75.0, 50.0]]
    # All four problems gain in b, so any choice among them does; others may not: 1 - z^2/(4 + z^2).
    assert second[4] == "+100.0% [+51.0%, +100.0%]"


def test_other_problems_are_refused():
    """Runs evaluated on different problems have no paired difference."""
    pair = {"a": run([1], [1], [1]), "b": run([1], [1], [1], nums=(2, 2, 2))}
    with pytest.raises(ValueError, match="problem"):
        report.seeds_table(pair)


def samples(correct: list[list[int]]) -> dict:
    """An evaluation of problems with 64 samples each; a wrong sample is one other answer."""
    rows = [
        {
            "id": i,
            "nums": [1, 2, 3],
            "target": 6,
            "greedy_correct": False,
            "correct": right,
            "classes": [0 if sample else 1 for sample in right],
        }
        for i, right in enumerate(correct)
    ]
    ks = default_ks(64)
    values = [problem_metrics(row, ks) for row in rows]
    metrics = {n: {"value": sum(v[n] for v in values) / len(values)} for n in values[0]}
    return {"num_problems": len(rows), "num_samples": 64, "metrics": metrics, "problems": rows}


def test_what_was_not_sampled_is_left_open():
    """The base model answers greedily only; the others' samples still are in the table."""
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    outputs = {"format_failures": 0.25, "truncated": 0.0}
    sampled = dict.fromkeys(("greedy", "pass@1", "pass@8", "maj@8"), metric)
    common = {"num_problems": 9, "num_samples": 8, "greedy_outputs": outputs}
    evals = {model: {**common, "metrics": sampled} for model in report.MODELS}
    evals["base"] = {**common, "num_samples": 0, "metrics": {"greedy": metric}}
    header, _, *rows = cells(report.accuracy_table(evals))
    assert header == ["9 held-out problems", *report.MODELS]
    shown = "50.0% [40.0%, 60.0%]"
    assert rows[0] == ["pass@1 greedy", *[shown] * 4]
    assert rows[1:4] == [
        [name, "-", *[shown] * 3] for name in ("pass@1 sampled", "pass@8", "maj@8")
    ]
    assert rows[4:] == [["format right", *["75.0%"] * 4], ["truncated", *["0.0%"] * 4]]


def test_figure_7_is_before_after_and_the_paired_gain():
    """A row's values are the models' Pass@K and Maj@K, its gains their differences by problem."""
    half, one, all_right, none = [1, 0] * 32, [1] + [0] * 63, [1] * 64, [0] * 64
    table = report.figure7_table(samples([half, one]), samples([all_right, none]))
    header, _, *rows = cells(table)
    names = ["pass@K sft", "pass@K grpo", "GRPO - SFT", "maj@K sft", "maj@K grpo", "GRPO - SFT"]
    assert header == ["K, 2 held-out problems", *names]
    assert [row[0] for row in rows] == ["1", "4", "8", "16", "32", "64"]
    shown = [[float(cell.split("%")[0]) for cell in row[1:]] for row in rows]
    # One right sample of 64 is among K with chance K / 64; 32 wrong ones are all K by binomials.
    # By votes, half and half is even, and one of 64 loses but to no one else at K = 1.
    for k, (before, after, gain, maj_before, maj_after, maj_gain) in zip(report.FIGURE7_KS, shown):
        expected = (1 - comb(32, k) / comb(64, k) + k / 64) / 2
        assert before == pytest.approx(100 * expected, abs=0.05)
        assert maj_before == (before if k == 1 else 25.0)
        assert after == maj_after == 50.0
        assert gain == pytest.approx(50 - 100 * expected, abs=0.05)
        assert maj_gain == pytest.approx(50 - maj_before, abs=0.05)


def test_a_sample_page_has_a_heading_for_each_problem():
    """The prompt is one line of heading, be it one line or two, then each model's output."""
    example = {"text": "<think>", "format": False, "correct": True}
    prompts = ("3 4 5 -> 17\n", "Two lines,\nthis is one\n")
    examples = [{**example, "prompt": prompt} for prompt in prompts]
    page = report.sample_page({model: {"examples": examples} for model in report.MODELS})
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## 3 4 5 -> 17",
        "## Two lines,, this is one",
    ]
    assert page.count("\n\nbase (rewards: format 0, equation 1)\n\n    <think>\n") == 2


def test_time_is_shared_out(tmp_path):
    """Every stage and phase counts once: the phases' seconds are summed over steps, what the GRPO
    stage took beyond them is its start; table 1 is no part of the run."""
    (tmp_path / "grpo").mkdir()
    step = {"seconds_sampling": 30, "seconds_rewards": 0, "seconds_logprobs": 6}
    rows = [{"step": i, **step, "seconds_update": 12, "seconds_evaluation": 3} for i in range(2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "grpo" / "metrics.jsonl").write_text(text)
    stages = ["grpo\t100", "sft\t24", "grpo\t20", "corpus\t60", "control\t120", "report\t6"]
    stages += ["evaluate sft\t18", "figure 7 grpo\t12", "table 1 seed: sft\t600"]
    (tmp_path / "seconds.tsv").write_text("\n".join(stages) + "\n")
    assert cells(report.time_table(tmp_path))[2:] == [
        ["data", "1.0", "17%", "corpus 1.0"],
        ["training", "1.0", "17%", "sft 0.4, GRPO's logprobs 0.2, GRPO's update 0.4"],
        ["training the control", "2.0", "33%", "control 2.0"],
        ["sampling", "1.0", "17%", "GRPO's sampling 1.0"],
        ["evaluation", "0.6", "10%", "evaluate sft 0.3, figure 7 grpo 0.2, GRPO's evaluation 0.1"],
        [
            "the rest",
            "0.4",
            "7%",
            "report 0.1, GRPO's rewards 0.0, GRPO's start and checkpoints 0.3",
        ],
        ["all", "6.0", "100%", ""],
    ]


def test_every_stage_of_the_speedrun_has_a_kind_of_time():
    """speedrun.sh's stages are those that the time table sorts; only its report is unsorted."""
    text = (Path(report.__file__).parents[2] / "speedrun.sh").read_text()
    stages = set(re.findall(r'^ *stage (?:"([^"]+)"|(\S+))', text, re.M))
    named = {a or b for a, b in stages if not a.startswith("table 1")}
    models = {"evaluate $model": report.MODELS[1:], "figure 7 $model": ("sft", "grpo")}
    expanded = named - set(models)
    expanded |= {n.replace("$model", m) for n, each in models.items() if n in named for m in each}
    known = {name for names in report.TIME_FOR.values() for name in names}
    assert expanded - known == {"grpo", "report"}  # GRPO's own phases are sorted one by one
    assert {name for name in known if "GRPO" not in name} <= expanded
