"""Countdown: problems, split, solver, worked solutions and the judge."""

import dataclasses
import itertools
import json
import random
import re
import time
from fractions import Fraction

import pytest

from nanomath.judge.equation import read_equation
from nanomath.rewards import format_reward
from nanomath.tasks import countdown
from nanomath.tasks.countdown import (
    Ranges,
    extract_answer,
    generate,
    judge,
    make_problem,
    problem_at,
    read_answer,
    read_problems,
    split_of,
    worked_solution,
)
from nanomath.tasks.expressions import expressions, is_reachable


def brute_values(values: tuple[Fraction, ...]) -> set[Fraction]:
    """All values of all expressions: join any two, in every way, until one is left."""
    if len(values) == 1:
        return {values[0]}
    found = set()
    for i, j in itertools.permutations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
        for joined in (a + b, a - b, a * b, a / b if b else None):
            if joined is not None:
                found |= brute_values((*rest, joined))
    return found


def quotients(*nums: int) -> tuple[Fraction, ...]:
    return tuple(map(Fraction, nums))


def solve(nums: list[int], target: int) -> list[str]:
    """Every solution as text, sorted."""
    return sorted(form.text for form in expressions(nums) if form.value == target)


# ---------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(("nums", "forms", "values"), [((2, 3), 6, 6), ((101, 211, 307), 68, 68)])
def test_number_of_forms(nums, forms, values):
    """Generic numbers have 6 and 68 forms, all different in value: none is missing or doubled."""
    found = expressions(nums)
    assert len(found) == forms
    assert len({form.value for form in found}) == values


def test_four_numbers_have_every_value_once_up_to_sign_twins():
    """Four generic numbers give 1,170 values (OEIS A140606) by 1,260 forms, as brute force."""
    nums = (1009, 2003, 4001, 8009)
    found = expressions(nums)
    values = {form.value for form in found}
    assert (len(found), len(values)) == (1260, 1170)
    assert values == brute_values(quotients(*nums))


@pytest.mark.parametrize("nums", [(3, 3, 8), (5, 5, 5), (1, 2, 3), (2, 2, 4), (6, 4, 2)])
def test_forms_reach_what_brute_force_reaches(nums):
    """Equal numbers and zeros on the way: the same values as brute force, each text once."""
    found = expressions(nums)
    assert {form.value for form in found} == brute_values(quotients(*nums))
    assert len({form.text for form in found}) == len(found)
    for target in range(-3, 30):
        assert is_reachable(nums, target) == (target in {form.value for form in found})


def test_reachable_agrees_with_brute_force_on_four_numbers():
    """is_reachable is true exactly for the whole values brute force finds."""
    for nums in ((3, 3, 8, 8), (1, 1, 2, 7), (95, 21, 3, 7)):
        values = brute_values(quotients(*nums))
        for target in range(1, 101):
            assert is_reachable(nums, target) == (target in values)


def test_text_steps_and_value_agree():
    """A form's text reads back to its value and numbers; its steps are true and end at it."""
    for nums in ((95, 21, 3), (3, 3, 8, 8), (7, 2, 9, 4)):
        for form in expressions(nums):
            reading = read_equation(form.text)
            assert (reading.value, sorted(reading.numbers)) == (form.value, sorted(nums))
            steps = form.steps
            assert len(steps) == len(nums) - 1
            results = []
            for step in steps:
                left, right = step.split("=")
                results.append(read_equation(right).value)
                assert read_equation(left).value == results[-1], step
            assert results[-1] == form.value
            assert form.is_natural == all(v >= 0 and v.denominator == 1 for v in results)


def test_text_has_no_needless_parentheses():
    """Removing any pair of parentheses changes the value or the meaning of the text."""
    for form in expressions((11, 7, 5, 3)):
        text = form.text
        for match in re.finditer(r"\(", text):
            depth, end = 0, match.start()
            for end in range(match.start(), len(text)):
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                if depth == 0:
                    break
            bare = text[: match.start()] + text[match.start() + 1 : end] + text[end + 1 :]
            assert read_equation(bare).value != form.value, (text, bare)


def test_solve():
    """Known problems have exactly their known solutions."""
    assert solve([95, 21, 3], 88) == ["95-21/3"]
    assert solve([3, 3, 8, 8], 24) == ["8/(3-8/3)"]
    assert solve([3, 3, 3], 3) == ["3*3/3", "3+3-3"]
    assert solve([1, 2], 50) == []
    with pytest.raises(ValueError, match="6 numbers"):
        solve([1, 2, 3, 4, 5, 6], 7)


def test_solver_is_fast():
    """Three numbers take under 1 ms and four under 20 ms (CPU time, best of five)."""
    for nums, limit in (((95, 21, 3), 1e-3), ((95, 21, 3, 7), 20e-3)):
        seconds = []
        for _ in range(5):
            start = time.thread_time()
            for _ in range(5):
                solve(nums, 88)
            seconds.append((time.thread_time() - start) / 5)
        assert min(seconds) < limit


# ------------------------------------------------------------------------------------- problems


def test_problem_is_a_pure_function_of_seed_and_index():
    """Problem i needs no other problem; other seeds and indices give other problems."""
    problems = generate(60, seed=3)
    for problem in reversed(problems):
        assert problem_at(problem.id, seed=3) == problem
    other = generate(60, seed=4)
    assert sum(a.payload == b.payload for a, b in zip(problems, other, strict=True)) < 3


def test_problems_do_not_change_between_versions():
    """Problems and split are fixed for all time: the values of the first version."""
    payloads = [problem_at(i, seed=0).payload for i in range(3)]
    assert payloads == GOLDEN_TRAIN
    assert problem_at(0, Ranges((4,)), split="heldout").payload == GOLDEN_HELDOUT


GOLDEN_TRAIN = [
    {"nums": [25, 5, 6], "target": 36},
    {"nums": [67, 69, 80], "target": 40},
    {"nums": [85, 96, 96], "target": 85},
]
GOLDEN_HELDOUT = {"nums": [60, 57, 82, 41], "target": 1}


def test_problems_are_reachable_different_and_in_range():
    """Numbers, targets and counts stay in their ranges, every target is reached, none repeats."""
    problems = generate(300, Ranges((3, 4), 12, 30), seed=1)
    keys = set()
    for problem in problems:
        nums, target = problem.payload["nums"], problem.payload["target"]
        assert all(1 <= n <= 12 for n in nums)
        assert 1 <= target <= 30
        assert solve(nums, target)
        assert split_of(nums, target) == "train"
        keys.add((*sorted(nums), target))
    assert len(keys) == 300
    assert len({problem.id for problem in problems}) == 300
    counts = [len(problem.payload["nums"]) for problem in problems]
    assert 100 < counts.count(3) < 200
    assert set(counts) == {3, 4}


def test_both_ends_of_the_ranges_occur():
    """Every number from 1 to max_number, target 1 and target max_target are drawn."""
    problems = generate(60, Ranges((2,), 9, 18), seed=0)
    nums = [n for problem in problems for n in problem.payload["nums"]]
    assert set(nums) == set(range(1, 10))
    targets = {problem.payload["target"] for problem in problems}
    assert min(targets) == 1
    assert max(targets) == 18


def test_split_never_leaks():
    """Held-out problems are disjoint from training problems of every seed, order and range."""
    heldout = {
        (*sorted(p.payload["nums"]), p.payload["target"])
        for p in generate(100, countdown.RANGES["smoke"], split="heldout")
    }
    for seed in range(3):
        train = generate(400, countdown.RANGES["smoke"], seed=seed)
        assert not heldout & {(*sorted(p.payload["nums"]), p.payload["target"]) for p in train}
    for *nums, target in heldout:
        for order in itertools.permutations(nums):
            assert split_of(order, target) == "heldout"


def test_split_share():
    """One problem in ten is held out."""
    splits = [split_of((a, b, 5), t) for a in range(40) for b in range(a, 40) for t in range(5)]
    assert abs(splits.count("heldout") / len(splits) - 0.1) < 0.015


def test_exhausted_ranges_end_with_an_error():
    """Asking for more problems than exist, or for none that exist, is one clear error."""
    with pytest.raises(ValueError, match="different train problems found of 1000.*widen"):
        generate(1000, Ranges((2,), 3, 5))
    other = "train" if split_of((1, 1), 1) == "heldout" else "heldout"
    with pytest.raises(ValueError, match=f"no {other} problem found"):
        problem_at(0, Ranges((2,), 1, 1), split=other)


def test_prompts():
    """The short prompt is numbers and target alone; the full one shows an answer that passes."""
    short = make_problem(0, [95, 21, 3], 88)
    assert short.prompt == "95 21 3 -> 88\n"
    full = make_problem(0, [95, 21, 3], 88, style="full")
    for part in ("[95, 21, 3]", "88", "<think>", "</think>", "<answer>(1 + 2) / 3</answer>"):
        assert part in full.prompt
    example = re.search(r"<answer>\(.*?</answer>", full.prompt)[0]
    assert judge(make_problem(0, [1, 2, 3], 1), example).correct
    # The judge sees completions only: the example in the prompt is never an answer.
    assert not judge(make_problem(0, [1, 2, 3], 1, style="full"), "").correct


# ------------------------------------------------------------------------------ worked solutions


def search_lines(solution: str) -> list[str]:
    """Return the attempts of a worked solution's search; none where it goes straight there."""
    think = re.fullmatch(r"<think>(.*)</think><answer>.*</answer>", solution, re.DOTALL)[1]
    return think.split("\n")[1:]


def attempt(line: str) -> tuple[list[tuple[str, str]], str]:
    """Return (left, right) of each step of an attempt, with what a step goes on from, and the
    distance."""
    text, _, distance = line.partition(":")
    steps = []
    for chain in text.split(" "):
        left, *rights = chain.split("=")
        for right in rights:
            value = re.match(r"\d+|\(.*?\)", right)[0]
            steps.append((left, value))
            left = right
    return steps, distance


def test_worked_solution_form():
    """Worked solutions, character by character: straight there, and as a search in which nearest
    forms come in the order of their texts; one of steps on fractions."""
    problem = make_problem(0, [95, 21, 3], 88)
    drawn = {worked_solution(problem, seed) for seed in range(50)}
    straight = "<think>21/3=7 95-7=88</think><answer>95-21/3</answer>"
    # In the order of texts the other near ones, 95+21=116-3=113 and such, come after the right one.
    search = """<think>
21*3=63 95+63=158:70
21*3=63 95-63=32:56
21/3=7 95+7=102:14
21/3=7 95-7=88:0</think><answer>95-21/3</answer>"""
    assert drawn == {straight, search}
    hard = {worked_solution(make_problem(0, [3, 3, 8, 8], 24), seed) for seed in range(20)}
    assert "<think>8/3=(8/3) 3-(8/3)=(1/3) 8/(1/3)=24</think><answer>8/(3-8/3)</answer>" in hard
    with pytest.raises(ValueError, match="cannot be reached"):
        worked_solution(make_problem(0, [1, 2], 50))


def test_worked_solutions_are_right():
    """Every solution earns both rewards, DIRECT_SHARE of them have no search (3 sigma), all or none
    where that is asked for; steps are true, and whole where that is possible; each attempt ends
    with its distance from the target, 0 for the last one only; they come in order, none twice."""
    problems = generate(400, Ranges((3, 4)), seed=5)
    num_direct = 0
    for problem in problems:
        solution, target = worked_solution(problem, seed=2), problem.payload["target"]
        assert judge(problem, solution).correct and format_reward(problem, solution) == 1.0
        naturals = [e for e in expressions(problem.payload["nums"]) if e.is_natural]
        whole = any(e.value == target for e in naturals)
        lines = search_lines(solution)
        num_direct += not lines
        direct = re.search(r"<think>(.*)</think>", solution, re.DOTALL)[1] + ":0"
        parsed = [attempt(line) for line in lines or [direct]]
        for i, (steps, distance) in enumerate(parsed):
            assert len(steps) == len(problem.payload["nums"]) - 1
            for left, right in steps:
                assert read_equation(left).value == read_equation(right).value
                assert right.isdigit() or not whole
            missed = abs(read_equation(steps[-1][1]).value - target)
            assert read_equation(distance).value == missed
            assert (missed == 0) == (i == len(parsed) - 1)
        order = [[f"{left}={right}" for left, right in steps] for steps, _ in parsed]
        assert order == sorted(order) and len({*map(tuple, order)}) == len(order)
    share = countdown.DIRECT_SHARE
    sigma = (len(problems) * share * (1 - share)) ** 0.5
    assert abs(num_direct - len(problems) * share) < 3 * sigma
    for share in (0.0, 1.0):
        shown = [worked_solution(problem, direct_share=share) for problem in problems[:20]]
        assert [bool(search_lines(solution)) for solution in shown] == [share == 0.0] * 20


def test_a_search_passes_all_near_forms():
    """A search passes those forms, and only those, which are among the nearest and stand before the
    first right one."""
    problem = make_problem(0, [7, 11, 20], 24)
    forms = [e for e in expressions([7, 11, 20]) if e.is_natural]
    right = [e.steps for e in forms if e.value == 24]
    wrong = [e for e in forms if e.value != 24]
    misses = sorted(abs(e.value - 24) for e in wrong)
    bound = misses[countdown.NUM_NEAR - 1]
    before = [e for e in wrong if e.steps < min(right)]
    surely = {abs(e.value - 24) for e in before if abs(e.value - 24) < bound}
    searches = [search_lines(worked_solution(problem, seed)) for seed in range(50)]
    for lines in filter(None, searches):
        passed = [read_equation(attempt(line)[1]).value for line in lines[:-1]]
        assert surely <= set(passed) and max(passed) <= bound
        assert len(passed) <= countdown.NUM_NEAR


def test_solution_is_drawn_among_all():
    """Over seeds every solution with whole steps is drawn; one seed always draws the same."""
    problem = make_problem(0, [2, 3, 4], 24)
    drawn = {worked_solution(problem, seed) for seed in range(200)}
    assert {extract_answer(text) for text in drawn} == set(solve([2, 3, 4], 24))
    assert worked_solution(problem, 7) == worked_solution(problem, 7)


# ----------------------------------------------------------------------------------------- judge


PROBLEM = make_problem(0, [95, 21, 3], 88)
GOOD = "<think>21/3=7</think><answer>95-21/3</answer>"


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        (GOOD, True),
        ("<answer> 95 - (21 / 3) </answer>", True),  # accuracy is the equation alone
        ("<answer>\n95-21/3\n</answer>", True),
        ("so it is</think> <answer>95-21/3</answer> done", True),  # <think> given in the prompt
        ("<answer>-21/3+95</answer>", True),
        ("95-21/3", False),  # no tags
        ("<answer>95-21/3", False),  # cut off
        ("<answer>95-21/3</answer", False),
        ("</answer>95-21/3<answer>", False),
        ("<answer>95-21/3</answer><answer>95-21/3</answer>", False),  # two answers
        ("<answer>1+1</answer><answer>95-21/3</answer>", False),
        ("<answer>95-21/3</answer><answer>95", False),  # a second one cut off
        ("<answer><answer>95-21/3</answer></answer>", False),
        ("<answer>1</answer>95-21/3</answer>", False),
        ("<think><answer>95-21/3</answer></think>", False),  # inside the reasoning
        ("<think>hm <answer>95-21/3</answer>", False),
        ("<think>a</think><think><answer>95-21/3</answer>", False),
        ("<answer>95-21/3</answer></think>", False),
        ("<answer>95-21/3</think></answer>", False),
        ("<answer>95-21/3</answer><think>", False),
        ("<answer>88</answer>", False),  # numbers left out
        ("<answer>95-21/3+0</answer>", False),  # a number not given
        ("<answer>95-21/3*3/3</answer>", False),  # a number twice
        ("<answer>95-(3+4)</answer>", False),
        ("<answer>9 5-21/3</answer>", False),
        ("<answer>95-21/3=88</answer>", False),
        ("<answer>95-21/3.</answer>", False),
        ("<answer>95+21*3</answer>", False),
        ("<answer>95-21/03</answer>", False),
        ("<answer>95-21//3</answer>", False),
        ("<answer>$95-21/3$</answer>", False),
        ("<ANSWER>95-21/3</ANSWER>", False),
        ("<answer></answer>", False),
        ("", False),
    ],
)
def test_judge(completion, correct):
    """Each completion has its stated result: one readable answer after the reasoning, or none."""
    assert judge(PROBLEM, completion).correct is correct


def test_judge_is_exact():
    """Nearly is not equal: a value off by less than 1e-9 is wrong, thirds sum exactly."""
    near = make_problem(0, [1, 999999999, 1], 1)
    assert not judge(near, "<answer>1+1/999999999</answer>").correct
    thirds = make_problem(0, [1, 3, 1, 3, 1, 3], 1)
    assert judge(thirds, "<answer>1/3+1/3+1/3</answer>").correct
    assert not judge(thirds, "<answer>1*1*1*3/3</answer>").correct


def test_multiplicity():
    """A number given twice is used twice, one given once is used once."""
    twice = make_problem(0, [5, 5, 1], 9)
    assert judge(twice, "<answer>5+5-1</answer>").correct
    assert not judge(make_problem(0, [5, 1, 1], 9), "<answer>5+5-1</answer>").correct


def test_votes():
    """A class is the exact value with whether the numbers are used once; unreadable is None."""
    assert judge(PROBLEM, GOOD).vote == (Fraction(88), True)
    assert judge(PROBLEM, "<answer>88</answer>").vote == (Fraction(88), False)
    assert judge(PROBLEM, "<answer>21/95*3</answer>").vote == (Fraction(63, 95), True)
    assert judge(PROBLEM, "<answer>21*3/95</answer>").vote == (Fraction(63, 95), True)
    assert judge(PROBLEM, "<answer>eighty-eight</answer>").vote is None
    assert read_answer("nothing").error == "no answer"


def test_judge_bounds_hostile_completions():
    """A megabyte of tags or digits is judged within 50 ms of CPU time and is wrong."""
    for completion in (
        "<answer>" + "9" * 1_000_000 + "</answer>",
        "<answer>" * 100_000,
        "<answer>" + "(" * 1_000_000,
        "<think>" * 100_000 + "<answer>88</answer>",
        "<answer>9**9**9**9**9</answer>",
        "<" * 1_000_000,
    ):
        start = time.thread_time()
        assert not judge(PROBLEM, completion).correct
        assert time.thread_time() - start < 0.05


def test_judge_fuzz():
    """Random pieces of tags and text never raise, and are right only if one answer is there."""
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "95-21/3", "95", " ", "\n", "=", "<"]
    right = 0
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 8)))
        if judge(PROBLEM, text).correct:
            right += 1
            assert text.count("<answer>") == text.count("</answer>") == 1
            assert "95-21/3" in text
    assert right > 0


# ----------------------------------------------------------------------------------------- files


def test_read_problems(tmp_path, capsys):
    """Good rows become problems, in their order and once each; each bad row is named with its line
    and reason; a file without one good row is refused."""
    path = tmp_path / "rows.jsonl"
    bad = {
        '{"nums": [1, 2], "target": 50}': "50 cannot be reached from [1, 2]",
        '{"nums": [1, "2"], "target": 3}': "wanted",
        '{"nums": [1, true], "target": 2}': "wanted",
        '{"nums": [1, 2], "target": 3.0}': "wanted",
        '{"nums": [1, 2]}': "wanted",
        '{"nums": 12, "target": 12}': "wanted",
        '{"nums": [1], "target": 1}': "1 numbers",
        '{"nums": [1, 2, 3, 4, 5, 6, 7], "target": 1}': "7 numbers",
    }
    good = '{"nums": [95, 21, 3], "target": 88}'
    again = '{"nums": [3, 95, 21], "target": 88}'
    for row, reason in bad.items():
        last = '{"nums": [2, 3], "target": 6, "extra": 1}'
        path.write_text("\n".join([good, again, row, "", last]) + "\n")
        assert [(p.id, p.payload) for p in read_problems(path)] == [
            (0, {"nums": [95, 21, 3], "target": 88}),
            (4, {"nums": [2, 3], "target": 6}),
        ]
        assert f"{path}:3: {reason}" in capsys.readouterr().err
    path.write_text("\n".join([*bad, "not json", "[" * 100_000]))
    with pytest.raises(ValueError, match="no Countdown problem"):
        read_problems(path)


def test_command_writes_worked_solutions(tmp_path, capsys):
    """The command's rows are the seed's training problems, each with its own solution, and no
    temporary stays."""
    out = tmp_path / "data" / "sft.jsonl"
    flags = ["--num", "25", "--direct_share", "0.4", "--seed", "3"]
    cfg = countdown.parse(countdown.CountdownConfig, countdown.PRESETS, flags)
    assert (cfg.num, cfg.num_numbers) == (25, (3,))
    countdown.main(dataclasses.replace(cfg, out=str(out)))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    problems = generate(25, seed=3)
    expected = [worked_solution(problem, 3, direct_share=0.4) for problem in problems]
    assert [row["solution"] for row in rows] == expected
    for row in rows:
        assert list(row) == ["prompt", "solution", "nums", "target"]
        problem = make_problem(0, row["nums"], row["target"])
        assert row["prompt"] == problem.prompt
        assert judge(problem, row["solution"]).correct
        assert split_of(row["nums"], row["target"]) == "train"
    assert [path.name for path in out.parent.iterdir()] == ["sft.jsonl"]
    assert "25 worked solutions" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(countdown.PRESETS))
def test_presets_hold_enough_problems(name):
    """Every preset's ranges hold its number of training problems (checked on a part for gpu)."""
    num = min(countdown.PRESETS[name]["num"], 10_000 if name != "gpu" else 200)
    assert len(generate(num, countdown.RANGES[name])) == num
