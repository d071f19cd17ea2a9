r"""Answers copied from the question, other questions' answers, and what a reward may read."""

import json
import os
import re
import time

import pytest

from nanomath.judge.copying import is_copied
from nanomath.measure.evaluation import judge_outputs, sample_problems, summarise
from nanomath.rewards import answer_reward
from nanomath.tasks import Problem, benchmarks
from nanomath.tasks.benchmarks import make_prompt, read_benchmark

DATA = os.environ.get("NANOMATH_DATA")


def problem(question, gold, **settings):
    return Problem(0, "math", make_prompt(question, **settings), {"answer": gold})


# question | answer | reference
COPIES = r"""
Simplify $2x+3x$. | 2x+3x | 5x
Simplify $2x+3x$. | x = 2x + 3x | 5x
Simplify $2x+3x$. | (2x+3x) | 5x
Simplify $2x+3x$. | f(x) = 2x+3x | 5x
What is 1/2+1/3? | 1/2+1/3 | \frac56
What is 1/2+1/3? | \frac12+\frac{1}{3} | \frac56
What is $\frac12+\frac13$? | \dfrac{1}{2} + \dfrac{1}{3} | \frac{5}{6}
What is $6 + (8 \div 2)$? | 6+(8/2) | 10
What is $6 + (8 \div 2)$? | x = 6+(8 \div 2) = 6+(8/2) | 10
Simplify $\frac{16}{20}$. | \frac{16}{20} | \frac45
Simplify $\frac{16}{20}$. | 16/20 | \frac45
Write $0.\overline{54}$ as a fraction. | 0.\overline{54} | \frac{6}{11}
Write 0.5 as a common fraction. | 0.5 | \frac12
Write 0.5 as a common fraction. | .50 | \frac12
Write 25\% as a fraction. | 25\% | \frac14
Write $3\frac12$ as an improper fraction. | 3\frac{1}{2} | \frac72
Write 3 million in digits. | 3 million | 3000000
Expand $(x+1)^2$. | (x+1)^2 | x^2+2x+1
Factor $x^2-1$. | x^2 - 1 | (x-1)(x+1)
Compute $\binom{8}{6}$. | \dbinom{8}{6} | 28
Compute $|(1-i)^8|$. | (1-i)^8 | 16
Write $2x - y = -3$ in slope-intercept form. | 2x-y=-3 | y = 2x+3
What interval is $1 \le x \le 3$? | 1 \le x \le 3 | [1,3]
Write $\sqrt{12}$ in simplest form. | \sqrt{12} | 2\sqrt3
Evaluate $2+3$ and $4+4$. | 2+3, 4+4 | 5, 8
Put $3+2x$ in standard form. | 3+2x | 2x+3
The point is $(1/2+1/3, 2)$. Simplify it. | \left(\frac12+\frac13, 2\right) | (5/6, 2)
计算 $12\times 4$ 。 | 12 × 4 | 48
25×4等于多少? | 25*4 | 100
Let $x = -1$. Find $x + x^2 + x^3$. | x = -1 | -1
"""
NOT_COPIED = r"""
Tom is 5 and Ann twice as old less 5. How old is Ann? | 5 | 5
Solve $x+5=10$. | 5 | x = 5
Solve $x+5=10$. | x = 5 | 5
Solve $x+5=10$. | +5 | 5
Solve $3x=8y$ with y=3. | x = 8 | 8
She pays \$60, of which half... How much? | \$60 | 60
She pays $60. How much is it? | $60 | 60
She has 12 apples. How many? | 12 apples | 12
Boxes of 1,000 screws. How many? | 1,000 | 1000
An angle of $60^\circ$ is given. What is the other? | 60^\circ | 60
The area is 15 cm^2. What is it? | 15\text{ cm}^2 | 15
The price rose by 10\%. By how much? | 10\% | 10
A rope of 5 m. How long? | 5\text{ m} | 5
The roots are -3 and 4. Which are they? | 4, -3 | -3, 4
Solve $4x - 1 + \frac12 = \frac32$. | \frac12 | x = \frac{1}{2}
It holds between 3 and 5. Where does it hold? | (3, 5) | 3 < x < 5
The number $\frac12$ is irreducible. Which is it? | 1/2 | \frac{1}{2}
What is 1/2+1/3? | 1/2 + 1/3 = 5/6 | \frac56
What is 1/2+1/3? | 5/6 = 1/2+1/3 | \frac56
What is 2+3? | 2+3=5 | 5
What is $x$ in $2x = 10$? | x = 5 | 5
What is 1/2+1/3? | x = 5/6 | 5/6
Which of (A) 3 (B) 5 is odd and a multiple of 5? | (B) 5 | B
Is $f$ even, odd or neither? | even | \text{even}
On the interval $[1,3]$, find the domain. | [1,3] | [1,3]
Where is it positive for 0 and $\infty$? | (0, \infty) | x > 0
Simplify $x+1+0$. | x+1 | x+1
The vertices are (0,0), (3,4). Which one is farther? | (3, 4) | (3,4)
Find $\pi$ times 1 for a $\pi$. | \pi | \pi
Write $y - 2x = 3$ in slope-intercept form. | y = 2x+3 | y=2x+3
[asy] draw((0.5,1)); [/asy] What is the probability? | 0.5 | \frac12
Simplify $\sqrt{12}$. | 2\sqrt{3} | 2\sqrt3
How many values has $8+4\times6$? | 6 | \frac{12}{2}
"""


def rows(text):
    return [tuple(part.strip() for part in line.split(" | ")) for line in text.strip().splitlines()]


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize(("question", "answer", "gold"), rows(COPIES))
def test_copies_do_not_count(question, answer, gold, few_shot):
    """What stands in the question earns nothing unless it is the reference as a string, and votes
    apart from right answers."""
    asked = problem(question, gold, few_shot=few_shot)
    text = rf"So it is \boxed{{{answer}}}"
    assert not benchmarks.judge(asked, text).correct
    assert answer_reward(asked, text) == 0.0
    texts = [text, rf"\boxed{{{gold}}}", text]
    judged = judge_outputs(asked, [{"text": t, "length": 1, "finished": True} for t in texts])
    assert [output["class"] for output in judged] == [0, 1, 0]
    assert [output["correct"] for output in judged] == [False, True, False]
    other = problem("What is it?", gold, few_shot=few_shot)
    if answer not in ("3+2x", "2x-y=-3"):
        assert benchmarks.judge(other, text).correct or "=" in answer


@pytest.mark.parametrize(("question", "answer", "gold"), rows(NOT_COPIED))
def test_right_answers_of_the_questions_words_count(question, answer, gold):
    """Whole numbers, with a unit or not, options, words and the reference's own string count."""
    assert not is_copied(answer, question, gold)
    assert benchmarks.judge(problem(question, gold), rf"So it is \boxed{{{answer}}}").correct


def test_copying_is_quick_and_never_raises():
    """Hostile questions, answers and references cost under 50 ms."""
    for unit in ("(", ")", "[asy]", "\\frac{", "1/2+", "x=", "1,", "\\", "5 km ", "=", "\\text{"):
        text = unit * (1000 // len(unit))
        for answer, question, gold in (
            (text, text * 20, "1"),
            ("1", text * 20, text),
            ("1.5",) * 3,
        ):
            seconds = []
            for _ in range(3):  # the best of three: a garbage collection may fall into one
                start = time.thread_time()
                is_copied(answer, question, gold)
                seconds.append(time.thread_time() - start)
            assert min(seconds) < 0.05, unit


@pytest.mark.skipif(not DATA, reason="NANOMATH_DATA is not set: no public benchmark files")
def test_copying_maths_questions_does_not_pay():
    """Boxing a formula of the question earns at most 0.3% of MATH, where 5.4% of its first formulas
    have the reference's value, and nearly all that is left is the reference's string."""
    formula = re.compile(r"\$\$?((?:\\.|[^$\\])+)\$\$?|\\\[(.+?)\\\]", re.DOTALL)
    with open(f"{DATA}/math_test.jsonl", encoding="utf-8") as file:
        questions = [json.loads(line)["problem"] for line in file]
    counts = {"first": 0, "last": 0, "not the string": 0}
    for asked, question in zip(read_benchmark("math", DATA), questions, strict=True):
        boxes = [rf"\boxed{{{a or b}}}" for a, b in formula.findall(question)]
        right = [benchmarks.judge(asked, box).correct for box in boxes]
        if right:
            counts["first"] += right[0]
            counts["last"] += right[-1]
            strict = [benchmarks.judge(asked, box).marks["strict"] for box in boxes]
            counts["not the string"] += right != [a and b for a, b in zip(right, strict)]
    assert counts["first"] <= 8 and counts["last"] <= 11
    assert counts["not the string"] <= 3  # "20\%" for 20, "\$60" for 60


# -------------------------------------------------------------------------------- other questions


def test_another_questions_answer_does_not_count():
    """After a few-shot answer the next question ends the completion, with or without a blank; a
    question that is asked again, or stands before the answer of a chat model, does not."""
    for chinese, marks in (
        (False, ("\nQuestion:", "\n\nQuestion: ")),
        (True, ("\n问题:", "\n问题：")),
    ):
        base = problem("What is 3+4?", "7", few_shot=True, chinese=chinese)
        chat = problem("What is 3+4?", "7", chinese=chinese)
        for mark in marks:
            for asked in (base, chat):
                assert benchmarks.judge(
                    asked, f" The answer is 7.{mark}x\nThe answer is 8."
                ).correct
                assert not benchmarks.judge(
                    asked, f" The answer is 8.{mark}x\nThe answer is 7."
                ).correct
                assert benchmarks.judge(
                    asked, f"Well.{mark} What is 3+4?\nThe answer is 7."
                ).correct
                assert benchmarks.judge(
                    asked, f"The answer is what is asked.{mark} What is 3+4?\nThe answer is 7."
                ).correct
            assert not benchmarks.judge(base, f" I do not know.{mark}x\nThe answer is 7.").correct
            assert benchmarks.judge(chat, f"Well.{mark} Add 3 and 4.\n\\boxed{{7}}").correct
    assert benchmarks.judge(chat, "Question: What is 3+4?\n\nAnswer: \\boxed{7}").correct


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_stop_texts_are_for_base_models(monkeypatch, few_shot, template):
    """Samples stop at the next question only after a few-shot prompt given as plain text."""

    class Tokenizer:
        bos_id, eos_id, stop_ids, sample_limit = 0, 0, (0,), 256
        control = {"<|im_start|>": 1, "<|im_end|>": 2}

        def encode(self, text, bos=False):
            return [5]

    Tokenizer.template = template
    given = {}
    monkeypatch.setattr(
        "nanomath.measure.evaluation.sample_stream",
        lambda *args, **settings: given.update(settings) or (),
    )
    asked = [problem("q", "1", few_shot=few_shot)]
    settings = {"num_samples": 1, "temperature": 1.0, "max_new_tokens": 9}
    assert list(sample_problems(None, Tokenizer(), asked, **settings)) == []
    assert (given.get("stop") == benchmarks.STOPS) == (few_shot and template == "plain")
    assert ("stop" in given) == (few_shot and template == "plain")
    assert {"\nQuestion:", "\n问题:"} <= {*benchmarks.STOPS}


def test_last_math_is_for_base_models_and_never_paid():
    """The last formula answers a few-shot prompt, by verdict and vote alike, and is reported; it
    answers no zero-shot prompt and earns no reward."""
    text = "Adding them, we find $x = 7$."
    records = []
    for few_shot in (False, True):
        asked = problem("What is it?", "7", few_shot=few_shot)
        assert answer_reward(asked, text) == 0.0
        assert answer_reward(asked, r"\boxed{7}") == 1.0
        outputs = [{"text": t, "length": 1, "finished": True} for t in (text, r"\boxed{7}")]
        judged = judge_outputs(asked, outputs)
        assert [output["correct"] for output in judged] == [few_shot, True]
        assert [output["class"] for output in judged] == ([0, 0] if few_shot else [None, 0])
        assert [output["last_math"] for output in judged] == [few_shot, False]
        records.append({"id": 0, "task": "math", "prompt": "", "payload": asked.payload})
        records[-1] |= {"greedy": judged[0], "samples": judged}
    assert summarise(records[1:])["sampled_outputs"]["last_math"] == 0.5
    assert summarise(records[:1])["greedy_outputs"]["last_math"] == 0.0
