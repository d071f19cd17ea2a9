"""Benchmarks: layouts, prompts, golds, the judge of a completion, the answer reward."""

import json
import os

import pytest

from nanomath.measure.evaluation import judge_outputs, summarise
from nanomath.rewards import Rewards, answer_reward
from nanomath.tasks import Problem, benchmarks
from nanomath.tasks.benchmarks import BENCHMARKS, make_prompt, read_benchmark, read_own

DATA = os.environ.get("NANOMATH_DATA")


def problem(gold, task="math", **payload):
    return Problem(0, task, make_prompt("q"), {"answer": gold, **payload})


def test_layouts(tmp_path):
    """Bodies, options, messages and groups are read; golds come out of worked solutions."""
    rows = {
        "math": {
            "problem": "p",
            "solution": r"so \boxed{\frac12}",
            "level": "Level 2",
            "type": "A",
        },
        "asdiv": {"body": "Two apples.", "question": "How many?", "answer": "2 (apples)"},
        "mgsm_zh": {"messages": [{"role": "user", "content": "几?"}], "answer": "2,125"},
        "gaokao_qa": {"question": "q", "options": ["(A)1", "(B)2"], "label": "B"},
        "mmlu_stem": {"question": "q", "options": ["1", 2.5], "answer": "B", "topic": "t"},
        "mawps": {"input": "q", "target": 43.0},
    }
    found = {}
    for name, row in rows.items():
        (tmp_path / BENCHMARKS[name].file).write_text(json.dumps(row) + "\n")
        (found[name],) = read_benchmark(name, tmp_path)
    assert found["math"].payload == {"answer": r"\frac12", "level": "Level 2", "type": "A"}
    assert found["asdiv"].prompt.startswith("Two apples.\nHow many?\n")
    assert found["mgsm_zh"].prompt.startswith("几?\n请")
    assert found["gaokao_qa"].prompt.startswith("q\n(A)1\n(B)2\n答案是选项的字母。\n")
    assert found["mmlu_stem"].prompt.startswith("q\n(A) 1\n(B) 2.5\nThe answer is the letter")
    assert found["mmlu_stem"].payload == {"answer": "B", "topic": "t"}
    assert found["mawps"].payload == {"answer": "43.0"}
    (tmp_path / BENCHMARKS["math"].file).write_text('{"problem": "p", "solution": ""}\n')
    with pytest.raises(ValueError, match="math_test.jsonl:1: 'solution' is an empty text"):
        read_benchmark("math", tmp_path)
    for messages in ([], ["q"], [{}]):
        row = json.dumps({"messages": messages, "answer": "1"}) + "\n"
        (tmp_path / BENCHMARKS["mgsm_zh"].file).write_text(row)
        with pytest.raises(ValueError, match="mgsm_zh.jsonl:1: '(messages|content)' is "):
            read_benchmark("mgsm_zh", tmp_path)


def test_own_files(tmp_path):
    """Question and answer or problem and solution, English or Chinese; a bad line is named."""
    path = tmp_path / "own.jsonl"
    rows = [{"question": "How?", "answer": 5}, {"problem": "多少?", "solution": "#### 7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_own(path)
    assert (first.payload["answer"], second.payload["answer"]) == ("5", "7")
    assert "Reason" in first.prompt
    assert "一步" in second.prompt
    path.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"own.jsonl:1: wanted question .* found \['text'\]"):
        read_own(path)


@pytest.mark.parametrize("chinese", [False, True])
def test_few_shot_examples_are_judged_right(chinese):
    """Every worked example ends with an answer that the judge finds; the prompt ends where the
    model goes on; a question it asks itself afterwards does not count."""
    before, between = benchmarks._QUESTION[chinese].split("{}")
    examples = benchmarks._SHOWN[chinese].removeprefix(before).split(before)
    examples = [example.strip().split(between + " ") for example in examples]
    golds = ["110", "7/12", "25", r"3\sqrt2"] if chinese else ["20", "3/28", r"2\sqrt{10}", "4, -3"]
    shown = make_prompt("NEW", few_shot=True, chinese=chinese)
    again = benchmarks._QUESTION[chinese].format("again?")
    for (asked, solution), gold in zip(examples, golds, strict=True):
        assert shown.count(asked) == shown.count(solution) == 1
        for completion in (solution, f" {solution}\n\n{again} {examples[0][1]}"):
            assert benchmarks.judge(problem(gold), completion).correct
    assert shown.endswith(benchmarks._QUESTION[chinese].format("NEW"))


def test_judgements_of_one_problem():
    """Correct by value, strict by string; equal answers vote together, without an answer not."""
    texts = [r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", "The answer is 2/4.", r"\boxed{2}", "no", ""]
    outputs = [{"text": text, "length": 1, "finished": True} for text in texts]
    judged = judge_outputs(problem(r"\frac12"), outputs)
    assert [output["correct"] for output in judged] == [True, True, True, False, False, False]
    assert [output["strict"] for output in judged] == [False, True, False, False, False, False]
    assert [output["class"] for output in judged] == [0, 0, 0, 1, None, None]
    assert [output["format"] for output in judged] == [True] * 4 + [False] * 2


def test_figures_by_group():
    """MATH's figures are also given by level and subject: means over their problems."""
    records = []
    for number, (level, right) in enumerate([("Level 1", 1), ("Level 1", 0), ("Level 2", 1)]):
        asked = problem("5", level=level, type="Algebra")
        texts = [rf"\boxed{{{5 if right else 4}}}"] * 2
        outputs = [{"text": text, "length": 3, "finished": True} for text in texts]
        judged = judge_outputs(asked, outputs)
        record = {"id": number, "task": "math", "prompt": "", "payload": asked.payload}
        records.append({**record, "greedy": judged[0], "samples": judged})
    result = summarise(records)
    levels = result["groups"]["level"]
    assert {label: (row["problems"], row["greedy"]) for label, row in levels.items()} == {
        "Level 1": (2, 0.5),
        "Level 2": (1, 1.0),
    }
    assert result["groups"]["type"]["Algebra"]["pass@2"] == pytest.approx(2 / 3)
    assert result["sampled_outputs"]["strict"] == pytest.approx(2 / 3)


def test_answer_reward():
    """1.0 for the reference's value, else 0.0; None without a reference that can be judged by."""
    assert answer_reward(problem(r"\frac12"), r"\boxed{0.5}") == 1.0
    assert answer_reward(problem(r"\frac12"), r"\boxed{0.25}") == 0.0
    assert answer_reward(problem(r"\frac12"), "0.5") == 0.0
    assert answer_reward(problem(r"\text{Monday}"), "The answer is Monday.") == 1.0
    assert answer_reward(problem(r"\int_0^{9^{9^9}} {"), r"\boxed{1}") is None
    assert answer_reward(Problem(0, "countdown", "", {"nums": [1], "target": 1}), "1") is None
    totals, _ = Rewards(("answer",)).score([problem("2")], [r"\boxed{2}"])
    assert totals == [1.0]


@pytest.mark.skipif(not DATA, reason="NANOMATH_DATA is not set: no public benchmark files")
def test_public_files():
    """Every benchmark file is read whole, and its own answers, boxed, are judged right."""
    counts = {}
    for name in BENCHMARKS:
        problems = read_benchmark(name, DATA)
        counts[name] = len(problems)
        for asked in problems:
            assert benchmarks.judge(asked, rf"\boxed{{{asked.payload['answer']}}}").correct, asked
    expected = (1319, 5000, 600, 250, 118, 351, 32, 3018, 272, 2215, 1000, 2065)
    assert tuple(counts.values()) == expected
