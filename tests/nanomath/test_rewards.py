"""Rewards: the format's exact form, sums with and without a reward, user functions that fail."""

import logging
import time

import numpy as np
import pytest

from nanomath.rewards import (
    compute_rewards,
    equation_reward,
    format_reward,
    load_reward,
    reward_label,
    score_one,
)
from nanomath.tasks import Problem
from nanomath.tasks.countdown import generate, make_problem, worked_solution

PROBLEM = make_problem(0, [95, 21, 3], 88)
GOOD = "<think>21/3=7\n95-7=88</think><answer>95-21/3</answer>"
WRONG = "<think>21/3=7\n95-7=88</think><answer>95+21/3</answer>"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (GOOD, 1.0),
        (WRONG, 1.0),  # the format alone
        ("<think></think><answer></answer>", 1.0),
        ("\n<think>a</think>\n\n<answer>b</answer> \n", 1.0),
        ("<think>1 < 2 and 3 > 2</think><answer>b</answer>", 1.0),
        ("x<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think>x<answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>x", 0.0),
        ("<think>a</think>\u00a0<answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think><answer>b</answer></think>", 0.0),
        ("<think>a<answer></think>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<Think>a</Think><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(completion, reward):
    """1.0 for exactly <think>...</think><answer>...</answer>, 0.0 for anything else."""
    assert format_reward(PROBLEM, completion) == reward


def test_rewards_of_worked_solutions():
    """Every worked solution earns 1.0 from each function; cut by one character it loses both."""
    for problem in generate(50):
        solution = worked_solution(problem)
        assert (format_reward(problem, solution), equation_reward(problem, solution)) == (1, 1)
        cut = solution[:-1]
        assert (format_reward(problem, cut), equation_reward(problem, cut)) == (0, 0)


def test_format_is_quick_on_hostile_text():
    """A megabyte that nearly matches takes under 50 ms of CPU time."""
    for completion in (
        "<think>" + "</thin" * 170_000,
        "<think></think><answer></answer>" + " " * 1_000_000 + "x",
        " " * 1_000_000 + "x<think></think><answer></answer>",
        "<think></think>" + " " * 1_000_000 + "x<answer></answer>",
        "<think>" * 150_000,
    ):
        start = time.thread_time()
        assert format_reward(PROBLEM, completion) == 0.0
        assert time.thread_time() - start < 0.05


def test_weighted_sum():
    """Totals are the weighted sums of the parts, in the order of the completions."""
    completions = [GOOD, WRONG, "<answer>95-21/3</answer>", ""]
    totals, parts = compute_rewards([PROBLEM] * 4, completions)
    assert totals == [2.0, 1.0, 1.0, 0.0]
    assert parts == {"format": [1.0, 1.0, 0.0, 0.0], "equation": [1.0, 0.0, 1.0, 0.0]}
    totals, _ = compute_rewards([PROBLEM] * 4, completions, ("equation", "format"), (10.0, -0.5))
    assert totals == [9.5, -0.5, 10.0, 0.0]
    assert compute_rewards([], []) == ([], {"format": [], "equation": []})


def test_label_is_the_functions_name(tmp_path):
    """Rewards come by the function's name, without its file's; two of one name are refused, before
    a file of the user runs, and a file runs once per process."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n"
            "def score(problem, completion):\n    return 0.5\n"
        )
    one, two = f"{tmp_path}/one.py:score", f"{tmp_path}/two.py:score"
    assert [reward_label(spec) for spec in (one, "format")] == ["score", "format"]
    with pytest.raises(ValueError, match="different function names"):
        compute_rewards([PROBLEM], ["x"], (one, two), (1.0, 1.0))
    assert not (tmp_path / "ran").exists()
    for _ in range(3):
        totals, parts = compute_rewards([PROBLEM], ["x"], ("format", one), (1.0, 2.0))
        assert parts == {"format": [0.0], "score": [0.5]} and totals == [1.0]
    assert (tmp_path / "ran").read_text() == "one "


def test_failing_function_gives_none_not_zero(tmp_path, caplog):
    """Exceptions and values that are no finite number give None, counted and named once."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def odd(problem, completion):\n"
        "    return {'raise': 1 // len(completion[5:]), 'nan': float('nan'), 'text': 'one'}"
        ".get(completion, 0.25)\n"
    )
    spec = f"{file}:odd"
    completions = ["raise", "nan", "text", "longer than five"]
    with caplog.at_level(logging.WARNING):
        totals, parts = compute_rewards([PROBLEM] * 4, completions, ("format", spec), (1.0, 2.0))
    # "nan" and "text" are shorter than six characters, so they raise as well
    assert parts["odd"] == [None, None, None, 0.25]
    assert totals == [None, None, None, 0.5]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert f"{spec} gave no reward for 3 of 4" in message
    assert "ZeroDivisionError" in message
    totals, parts = compute_rewards([PROBLEM] * 4, completions, ("format", spec), (1.0, 0.0))
    assert totals == [0.0] * 4  # a function of weight 0 is only shown


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (1, 1.0),
        (True, 1.0),
        (-0.5, -0.5),
        (np.float32(0.25), 0.25),
        (None, None),
        (float("nan"), None),
        (float("inf"), None),
        (-float("inf"), None),
        ("1.0", None),
        ([1.0], None),
        (1j, None),
        (10**400, None),
        (np.bool_(True), 1.0),
    ],
    ids=range(13),
)
def test_what_counts_as_a_number(value, reward):
    """Real finite numbers become floats; everything else is no reward."""
    got, failure = score_one(lambda problem, completion: value, PROBLEM, "")
    assert got == reward
    assert type(got) in (float, type(None))
    assert (failure is not None) == (reward is None and value is not None)


def test_interrupt_is_not_swallowed():
    """Ctrl-C inside a reward function ends the run."""

    def interrupted(problem, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_one(interrupted, PROBLEM, "")


def test_other_tasks_have_no_equation_reward():
    """The equation reward declines a problem it cannot judge, without a warning."""
    other = Problem(0, "poetry", "Write.", {})
    assert equation_reward(other, GOOD) is None
    assert compute_rewards([other], [GOOD])[0] == [None]


def test_bad_specs(tmp_path):
    """Unknown names, missing files, files that do not load, missing functions: one clear error."""
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "fails.py").write_text("1 / 0\n")
    (tmp_path / "good.py").write_text("number = 3\ndef f(problem, completion):\n    return 1\n")
    for spec, error, message in (
        ("accuracy", ValueError, "unknown reward 'accuracy': choose from format, equation"),
        ("mine:f", ValueError, "my_file.py:my_function"),
        (f"{tmp_path}/none.py:f", FileNotFoundError, "there is no file"),
        (f"{tmp_path}/broken.py:f", ValueError, "does not load: SyntaxError"),
        (f"{tmp_path}/fails.py:f", ValueError, "does not load: ZeroDivisionError"),
        (f"{tmp_path}/good.py:g", ValueError, "has no function 'g'; it has f"),
        (f"{tmp_path}/good.py:number", ValueError, "has no function 'number'"),
    ):
        with pytest.raises(error, match=message):
            load_reward(spec)
    assert load_reward(f"{tmp_path}/good.py:f")(PROBLEM, "") == 1


def test_bad_arguments():
    """Lengths that differ, repeated names and weights that are not finite are errors."""
    for arguments in (
        ([PROBLEM], []),
        ([PROBLEM], [GOOD], ("format",), (1.0, 1.0)),
        ([PROBLEM], [GOOD], ("format", "format"), (1.0, 1.0)),
        ([PROBLEM], [GOOD], (), ()),
        ([PROBLEM], [GOOD], ("format",), (float("nan"),)),
    ):
        with pytest.raises(ValueError):
            compute_rewards(*arguments)
