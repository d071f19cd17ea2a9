"""Rewards: the format's exact form, sums with and without a reward, user functions that fail."""

import gc
import logging
import os
import time

import numpy as np
import pytest

from nanomath.rewards import BUILT_IN, Rewards, equation_reward, format_reward, reward_label
from nanomath.tasks import Problem
from nanomath.tasks.countdown import generate, make_problem, worked_solution
from nanomath.tasks.workers import score_one

PROBLEM = make_problem(0, [95, 21, 3], 88)
GOOD = "<think>21/3=7\n95-7=88</think><answer>95-21/3</answer>"
HOSTILE_UNITS = ("(", "9", "9^", "9**", "{", "\\frac{", "\\boxed{", "$", "-", "1+", "1/(", " ",
                 "\n", "<answer>", "####", "The answer is ", "\\sqrt", "10^{", "!", "答案是",
                 "\ud800", "</answer><answer>", "1,", "\\begin{matrix}", "((1)", "\0")  # fmt: skip
WRONG = "<think>21/3=7\n95-7=88</think><answer>95+21/3</answer>"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (GOOD, 1.0),
        (WRONG, 1.0),  # the format alone
        ("<think></think><answer></answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think></think><answer>5</answer>", 0.0),
        ("<think> \n</think><answer>5</answer>", 0.0),
        ("<think>a</think><answer>\u200b</answer>", 0.0),
        ("<think>...</think><answer>...</answer>", 0.0),
        ("<think>\u6240\u4ee5</think><answer>5</answer>", 1.0),
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
    rewards = Rewards(("format", "equation"))
    totals, parts = rewards.score([PROBLEM] * 4, completions)
    assert totals == [2.0, 1.0, 1.0, 0.0]
    assert parts == {"format": [1.0, 1.0, 0.0, 0.0], "equation": [1.0, 0.0, 1.0, 0.0]}
    weighted = Rewards(("equation", "format"), (10.0, -0.5))
    assert weighted.score([PROBLEM] * 4, completions)[0] == [9.5, -0.5, 10.0, 0.0]
    assert rewards.score([], []) == ([], {"format": [], "equation": []})
    with pytest.raises(ValueError):
        rewards.score([PROBLEM], [])


def test_label_is_the_functions_name(tmp_path, monkeypatch):
    """Rewards come by the function's name, without its file's; two of one name are refused, before
    a file of the user runs; a file, found from here, runs once in each worker and never here."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            f"import os\nopen({str(tmp_path / 'ran')!r}, 'a').write(f'{name} {{os.getpid()}}\\n')\n"
            "def score(problem, text):\n    return os._exit(1) if text == 'end' else 0.5\n"
            "def other(problem, completion):\n    return -0.5\n"
        )
    monkeypatch.chdir(tmp_path)
    assert [reward_label(name) for name in ("one.py:score", "format")] == ["score", "format"]
    with pytest.raises(ValueError, match="different function names"):
        Rewards(("one.py:score", "two.py:score"))
    assert not (tmp_path / "ran").exists()
    names = ("format", "one.py:score", "one.py:other")
    with Rewards(names, (1.0, 2.0, 1.0), num_workers=2) as rewards:
        monkeypatch.chdir("/")
        for _ in range(3):
            totals, parts = rewards.score([PROBLEM], ["x"])
            assert parts == {"format": [0.0], "score": [0.5], "other": [-0.5]} and totals == [0.5]
        assert rewards.score([PROBLEM], ["end"])[0] == [None]
        assert rewards.score([PROBLEM], ["x"])[0] == [0.5]  # by a worker started from elsewhere
    runs = (tmp_path / "ran").read_text().split()
    assert runs[::2] == ["one"] * 3 and len({*runs[1::2], str(os.getpid())}) == 4


def test_failing_function_gives_none_not_zero(tmp_path, caplog):
    """Exceptions and values that are no finite number give None, counted and named once."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def odd(problem, completion):\n"
        "    return {'raise': 1 // len(completion[5:]), 'nan': float('nan'), 'text': 'one'}"
        ".get(completion, 0.25)\n"
    )
    name = f"{file}:odd"
    completions = ["raise", "nan", "text", "longer than five", "raise"]
    with caplog.at_level(logging.WARNING), Rewards(("format", name), (1.0, 2.0)) as rewards:
        totals, parts = rewards.score([PROBLEM] * 5, completions)
    # "nan" and "text" are shorter than six characters, so they raise as well
    assert parts["odd"] == [None, None, None, 0.25, None]
    assert totals == [None, None, None, 0.5, None]
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage() == (
        f"reward {name} gave no reward for 4 of 5 completions: problem 0: ZeroDivisionError: "
        "integer division or modulo by zero (mine.py, line 2)"
    )
    with Rewards(("format", name), (1.0, 0.0)) as rewards:
        assert rewards.score([PROBLEM] * 5, completions)[0] == [0.0] * 5  # of weight 0: only shown


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
        (-1e50, -1e50),
        (1.01e50, None),
        (np.bool_(True), 1.0),
    ],
    ids=range(15),
)
def test_what_counts_as_a_number(value, reward):
    """Real numbers within 1e50 become floats: sums of their squares stay finite; everything else is
    no reward."""
    got, failure = score_one(lambda problem, completion: value, PROBLEM, "")
    assert got == reward
    assert type(got) in (float, type(None))
    assert (failure is not None) == (reward is None and value is not None)


def test_interrupt_is_not_swallowed():
    """Ctrl-C inside a built-in reward function ends the run."""

    def interrupted(problem, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_one(interrupted, PROBLEM, "")


def test_other_tasks_have_no_equation_reward():
    """The equation reward declines a problem it cannot judge, without a warning."""
    other = Problem(0, "poetry", "Write.", {})
    assert equation_reward(other, GOOD) is None
    assert Rewards(("equation",)).score([other], [GOOD])[0] == [None]


def test_bad_arguments(tmp_path):
    """Unknown names, missing files, repeated names, weights that do not fit: one clear error."""
    weights = "give one number for each of --reward format"
    for arguments, error, message in (
        ((("accuracy",),), ValueError, "unknown reward 'accuracy': choose from format, equation"),
        ((("mine:f",),), ValueError, "my_file.py:my_function"),
        (((f"{tmp_path}/none.py:f",),), FileNotFoundError, "there is no file"),
        ((("format", "format"),), ValueError, "different function names"),
        (((),), ValueError, "different function names"),
        ((("format",), (1.0, 1.0)), ValueError, weights),
        ((("format",), (float("nan"),)), ValueError, weights),
        ((("format",), (1e51,)), ValueError, weights),
        (((f"{tmp_path}/mine.py:std",),), ValueError, "other than std"),
    ):
        with pytest.raises(error, match=message):
            Rewards(*arguments)


@pytest.mark.parametrize("name", ["format", "equation", "answer"])
def test_built_in_functions_are_bounded(name):
    """They run in the trainer's process: no text of 50,000 characters takes 0.2 s of CPU time."""
    problem = Problem(0, "countdown", "", {"nums": [1, 2, 3], "target": 6, "answer": "6"})
    gc.freeze()  # what the tests before have left in memory is not theirs to look through
    for unit in HOSTILE_UNITS:
        for opening in ("", "<think></think><answer>", "\\boxed{", "The answer is "):
            text = opening + unit * (50_000 // len(unit))
            start = time.thread_time()
            assert BUILT_IN[name](problem, text + "</answer>") in (0.0, 1.0)
            assert time.thread_time() - start < 0.2, (opening, unit)
    gc.unfreeze()
