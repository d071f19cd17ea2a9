"""Pass@K and Maj@K against all subsets, intervals, and evaluation with a scripted model."""

import json
import math
import random
import time
from collections import Counter
from itertools import combinations
from statistics import mean

import numpy as np
import pytest
import torch

from nanomath.engine.stream import Sample
from nanomath.measure import evaluation
from nanomath.measure.evaluation import (
    bootstrap_interval,
    compare,
    default_ks,
    evaluate_problems,
    group_answers,
    majority_credits,
    paired_difference,
    pass_at_k,
    share_interval,
    summarise,
)
from nanomath.model import ModelConfig, Transformer
from nanomath.tasks.countdown import generate, make_problem, worked_solution
from nanomath.text.tokenizer import Tokenizer

# -------------------------------------------------------------------------------------- metrics


def test_pass_at_k_equals_the_mean_over_all_subsets():
    """Pass@K is the share of the K-subsets of n samples that hold a right one, for all n <= 8."""
    for n in range(1, 9):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            for k in range(1, n + 1):
                share = mean(any(subset) for subset in combinations(right, k))
                assert math.isclose(pass_at_k(n, c, k), share, abs_tol=1e-12)


def test_pass_at_k_closed_forms():
    """Pass@1 is c / n, Pass@n is any right, and large counts neither overflow nor round."""
    assert pass_at_k(64, 16, 1) == 0.25
    assert pass_at_k(64, 1, 64) == 1.0
    assert pass_at_k(64, 0, 64) == 0.0
    assert math.isclose(pass_at_k(10_000, 1, 5_000), 0.5)
    for bad in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def brute_maj(classes: list, correct: list, k: int) -> float:
    """The mean credit of the vote over every k-subset, by listing them."""
    credits = []
    for subset in combinations(range(len(classes)), k):
        votes = Counter(classes[i] for i in subset if classes[i] is not None)
        most = max(votes.values(), default=0)
        tied = [label for label, count in votes.items() if count == most]
        right = sum(correct[classes.index(label)] for label in tied)
        credits.append(right / len(tied) if tied else 0.0)
    return mean(credits)


def test_maj_at_k_equals_the_mean_over_all_subsets():
    """Random votes with ties, unreadable answers, several right classes: all K, all subsets."""
    rng = random.Random(0)
    ties, unreadable, several = 0, 0, 0
    for _ in range(150):
        n = rng.randrange(1, 9)
        classes = [rng.choice([None, 0, 1, 2, 3][: rng.randrange(1, 6)]) for _ in range(n)]
        right = {label: rng.random() < 0.5 for label in range(4)}
        correct = [label is not None and right[label] for label in classes]
        expected = [brute_maj(classes, correct, k) for k in range(1, n + 1)]
        got = majority_credits(classes, correct, range(1, n + 1))
        assert np.allclose(got, expected, atol=1e-12), (classes, correct)
        assert got[n - 1 :] == majority_credits(classes, correct, [n])
        counts = Counter(label for label in classes if label is not None).values()
        ties += len(counts) > 1 and sorted(counts)[-1] == sorted(counts)[-2]
        unreadable += None in classes
        several += len({label for label, c in zip(classes, correct, strict=True) if c}) > 1
    assert min(ties, unreadable, several) > 20


def test_maj_at_k_by_hand():
    """Ties share the credit; unreadable answers do not vote; at K = n it is the plain vote."""
    maj_at_k = lambda classes, correct, k: majority_credits(classes, correct, [k])[0]
    right_first = [True, True, False, False]
    assert maj_at_k([0, 0, 1, 2], right_first, 4) == 1.0
    assert maj_at_k([0, 0, 1, 1], right_first, 4) == 0.5
    assert maj_at_k([0, 1, 2, None], [True, False, False, False], 4) == pytest.approx(1 / 3)
    assert maj_at_k([0, None, None, None], [True, False, False, False], 4) == 1.0
    assert maj_at_k([None] * 4, [False] * 4, 4) == 0.0
    assert maj_at_k([0, 1, 1, 1], [True, False, False, False], 4) == 0.0
    # K = 1 is the mean accuracy; here K = 2 of 2 right, 1 wrong: 1 + (1/2 + 1/2) over 3 subsets
    assert maj_at_k([0, 0, 1], [True, True, False], 1) == pytest.approx(2 / 3)
    assert maj_at_k([0, 0, 1], [True, True, False], 2) == pytest.approx(2 / 3)
    # a class is judged by its first member
    assert maj_at_k([0, 0], [True, False], 2) == 1.0
    for bad in ([0], [True], 2), ([0], [True], 0), ([0], [], 1):
        with pytest.raises(ValueError):
            maj_at_k(*bad)


def test_maj_at_k_of_many_samples():
    """64 and 1,000 samples: probabilities, Maj@1 the accuracy, within a second of CPU time."""
    rng = random.Random(1)
    start = time.thread_time()
    for n, num_classes in ((64, 64), (64, 20), (64, 3), (1000, 40)):
        classes = [rng.randrange(num_classes) for _ in range(n)]
        correct = [label == 0 for label in classes]
        ks = default_ks(n)
        values = majority_credits(classes, correct, ks)
        assert values[0] == pytest.approx(sum(correct) / n)
        assert all(-1e-9 <= value <= 1 + 1e-9 for value in values)
    assert time.thread_time() - start < 1.0


def test_group_answers():
    """A class holds the answers that equal the same answers, under one verdict; None joins none."""
    assert group_answers(["a", None, "b", "a", "c", None, "b"]) == [0, None, 1, 0, 2, None, 1]
    # an equality that is not transitive: 1.0 ~ 1.4 ~ 1.8, but 1.0 is not 1.8
    close = lambda a, b: abs(a - b) <= 0.5  # noqa: E731
    assert group_answers([1.0, 1.4, 1.8, 1.4], close) == [0, 1, 2, 1]
    assert group_answers([1.0, 1.4, 1.0], close) == [0, 0, 0]
    assert group_answers([1.0, 1.4, 1.0], close, [True, False, True]) == [0, 1, 0]
    assert group_answers([]) == []


def test_bootstrap_interval():
    """The interval has the normal width for a mean of many, and is the same twice."""
    values = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_interval(values)
    width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - width, abs=0.004)
    assert high == pytest.approx(0.3 + width, abs=0.004)
    assert (low, high) == bootstrap_interval(values)
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)
    with pytest.raises(ValueError):
        bootstrap_interval([])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # the first four: Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 12, 0.0, 0.2425),
        (12, 12, 0.7575, 1.0),
        (0, 1, 0.0, 0.7935),
        (0, 5000, 0.0, 0.000768),
    ],
)
def test_intervals_of_right_and_wrong_are_wilsons(right, n, low, high):
    """Known values of Wilson's score interval; it holds the share, and at 0 and n ends there."""
    values = [1.0] * right + [0.0] * (n - right)
    found = share_interval(values)
    assert found == pytest.approx((low, high), abs=6e-5)
    assert found == share_interval(values[::-1])
    assert 0.0 <= found[0] <= right / n <= found[1] <= 1.0
    assert (found[0] == 0.0) == (right == 0) and (found[1] == 1.0) == (right == n)


def test_intervals_of_means_are_bootstraps_and_never_points():
    """Means of samples have the bootstrap's interval; where all are alike, that of Wilson's bound
    for what was not seen, towards 0 and 1."""
    values = [0.0, 0.125, 0.5, 1.0]
    assert share_interval(values) == bootstrap_interval(values)
    assert share_interval([0.25] * 12) == pytest.approx((0.25 * 0.7575, 0.25 + 0.75 * 0.2425), 1e-4)
    assert share_interval([1.0]) == pytest.approx((0.2065, 1.0), abs=1e-4)
    with pytest.raises(ValueError):
        share_interval([])


def test_no_pair_that_differs_is_no_certainty():
    """Where no pair differs, or all go one way, the interval of the difference is Tango's (1998),
    z^2 / (n + z^2) to each side; of values that are no shares it is the bootstrap's."""
    for before, after, value, low, high in (
        ([1.0, 0.0] * 6, [1.0, 0.0] * 6, 0.0, -0.2425, 0.2425),
        ([0.25] * 12, [0.25] * 12, 0.0, -0.2425, 0.2425),
        ([0.0] * 12, [1.0] * 12, 1.0, 0.7575, 1.0),
        ([1.0] * 12, [0.0] * 12, -1.0, -1.0, -0.7575),
    ):
        gain = paired_difference(before, after)
        assert (gain["value"], gain["low"], gain["high"]) == pytest.approx(
            (value, low, high), abs=1e-4
        )
    gain = paired_difference([1.5, 0.75], [1.5, 0.75], shares=False)
    assert (gain["low"], gain["high"]) == (0.0, 0.0)


def test_paired_difference():
    """Differences are taken problem by problem: a constant gain has an interval of width 0."""
    before, after = [0.0, 0.5, 0.25, 0.75], [0.25, 0.75, 0.5, 1.0]
    gain = paired_difference(before, after)
    assert gain == {"value": 0.25, "low": 0.25, "high": 0.25, "wins": 4, "losses": 0}
    assert paired_difference(after, before)["losses"] == 4
    with pytest.raises(ValueError, match="same"):
        paired_difference([0.0], [0.0, 1.0])


def test_default_ks():
    """Powers of two up to n, and n."""
    assert default_ks(0) == []
    assert default_ks(1) == [1]
    assert default_ks(8) == [1, 2, 4, 8]
    assert default_ks(12) == [1, 2, 4, 8, 12]


# --------------------------------------------------------------------------------- the whole way


class Characters:
    """A tokenizer of one id per character; 0 is the end."""

    eos_id, bos_id, stop_ids, template = 0, 0, (0,), "plain"
    vocab_size, sample_limit = 256, 250

    def encode(self, text, *, bos=False, eos=False):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


def scripted(monkeypatch, script):
    """Replace sampling by script(prompt text, temperature, sample index) -> (text, finished)."""
    calls = []

    def sample_stream(model, prompts, group_size, *, temperature, prompt_ids, **settings):
        calls.append((len(prompts), group_size, temperature, list(prompt_ids), settings))
        pairs = [(p, g) for p in range(len(prompts)) for g in range(group_size)]
        for p, g in reversed(pairs):  # they may end in any order
            text, finished = script(Characters().decode(prompts[p]), temperature, g)
            ids = torch.tensor([ord(c) for c in text] + [0] * bool(finished))
            yield Sample(p, g, ids, torch.zeros(len(ids)), bool(finished))

    monkeypatch.setattr(evaluation, "sample_stream", sample_stream)
    return calls


PROBLEMS = [make_problem(10, [95, 21, 3], 88), make_problem(11, [1, 2], 3)]
THINK = "<think>t</think>"
ANSWERS = {  # three right of one class, one wrong, one with a number missing, three unreadable
    "88": ["95-21/3", "(95-21/3)", "95 - 21/3", "95+21*3", "88", "x", "", "95-21/3=88"],
    "3": ["2-1"] * 4 + ["1+2"] * 3 + ["3"],
}


def script(prompt, temperature, sample):
    target = prompt.split(" -> ")[1].strip()
    if temperature == 0:
        return (THINK + "<answer>1+2</answer>", True) if target == "3" else (THINK, False)
    return f"{THINK}<answer>{ANSWERS[target][sample]}</answer>", sample != 7


def evaluated():
    settings = {"num_samples": 8, "temperature": 0.7, "max_new_tokens": 50, "seed": 5}
    return evaluate_problems(None, Characters(), PROBLEMS, **settings)


def test_evaluate_by_hand(monkeypatch):
    """Scripted outputs give the figures worked out by hand, and nothing is sampled twice."""
    calls = scripted(monkeypatch, script)
    result = summarise(evaluated())
    assert [call[:4] for call in calls] == [(2, 1, 0.0, [10, 11]), (2, 8, 0.7, [10, 11])]
    assert calls[0][4] == {
        "max_new_tokens": 50,
        "eos_ids": (0,),
        "seed": 5,
        "vocab_limit": 250,
    }
    value = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert value["greedy"] == 0.5
    assert value["pass@1"] == pytest.approx(3 / 8)
    assert value["pass@8"] == 1.0
    assert value["pass@2"] == pytest.approx(1 - math.comb(5, 2) / math.comb(8, 2))
    # first problem: 3 votes of the right class against 1 and 1; second: 3 right against 4 wrong
    assert value["maj@8"] == 0.5
    assert value["maj@1"] == pytest.approx(3 / 8)
    assert [row["num_correct"] for row in result["problems"]] == [3, 3]
    assert result["problems"][0]["classes"] == [0, 0, 0, 1, 2, None, None, None]
    assert result["problems"][1]["classes"] == [0, 0, 0, 0, 1, 1, 1, 2]
    sampled = result["sampled_outputs"]
    assert (sampled["outputs"], sampled["truncated"]) == (16, 2 / 16)
    assert (sampled["unreadable"], sampled["format_failures"]) == (3 / 16, 1 / 16)
    lengths = [
        len(THINK + a) + len("<answer></answer>") for group in ANSWERS.values() for a in group
    ]
    assert sampled["tokens"] == sum(lengths) + 14  # an end token on each that finished
    greedy = result["greedy_outputs"]
    assert (greedy["truncated"], greedy["format_failures"], greedy["unreadable"]) == (0.5, 0.5, 0.5)
    low, high = result["metrics"]["greedy"]["low"], result["metrics"]["greedy"]["high"]
    assert (low, high) == pytest.approx((0.0945, 0.9055), abs=1e-4)  # Wilson's of 1 of 2
    assert json.loads(json.dumps(result)) == result  # plain JSON: what a file gives back


def test_a_problem_without_a_group_is_of_none(monkeypatch):
    """Groups are those that any problem has; one without a level is counted as of none."""
    scripted(monkeypatch, script)
    records = evaluated()
    for first in (0, 1):
        for number, record in enumerate(records):
            record["payload"] = {"level": "Level 1"} if number == first else {}
        groups = summarise(records)["groups"]
        assert {label: row["problems"] for label, row in groups["level"].items()} == {
            "Level 1": 1,
            "none": 1,
        }


def test_compare(monkeypatch):
    """A summary against itself differs by exactly 0; against other problems it is an error."""
    scripted(monkeypatch, script)
    records = evaluated()
    summary = summarise(records)
    assert {gain["value"] for gain in compare(summary, summary).values()} == {0.0}
    better = json.loads(json.dumps(summary))
    better["problems"][0]["greedy_correct"] = True
    assert compare(summary, better)["greedy"]["value"] == 0.5
    with pytest.raises(ValueError, match="same problems"):
        compare(summary, summarise(records[:1]))
    with pytest.raises(ValueError, match="no problems"):
        summarise([])


def test_control_tokens_are_never_sampled(monkeypatch):
    """A model that wants nothing but bos and pad never writes them: text that decoding would hide
    inside an answer, as in 1<pad>2, does not occur, neither greedily nor at any temperature."""
    problems = generate(3)
    tokenizer = Tokenizer.train([problem.prompt for problem in problems] * 3, 300)
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=2,
        ffn_width=32,
    )
    model = Transformer(cfg)
    model.init_weights(0)
    forward = model.forward

    def biased(*args, **kwargs):
        logits = forward(*args, **kwargs)
        logits[..., [tokenizer.bos_id, tokenizer.pad_id]] += 6.0  # about half of the probability
        return logits

    monkeypatch.setattr(model, "forward", biased)
    sampled = []
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids: sampled.extend(ids) or Tokenizer.decode(tokenizer, ids)
    )
    evaluate_problems(
        model, tokenizer, problems, num_samples=8, temperature=1.0, max_new_tokens=12
    )  # fmt: skip
    assert len(sampled) > 100
    assert max(sampled) <= tokenizer.eos_id < tokenizer.bos_id


def test_real_model_and_tokenizer():
    """A random Transformer runs the whole way, with all problems or one at a time alike."""
    problems = generate(6)
    texts = [problem.prompt + worked_solution(problem) for problem in generate(50)]
    tokenizer = Tokenizer.train(texts, 300)
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size + 4,
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=2,
        ffn_width=32,
    )
    model = Transformer(cfg)
    model.init_weights(0)
    settings = {"num_samples": 3, "max_new_tokens": 12, "seed": 1, "temperature": 1.0}
    whole = evaluate_problems(model, tokenizer, problems, **settings)
    parts = [
        record
        for problem in problems
        for record in evaluate_problems(model, tokenizer, [problem], **settings)
    ]
    assert whole == parts
    result = summarise(whole)
    assert result["sampled_outputs"]["tokens"] > 0
    assert result["metrics"]["pass@3"]["value"] == 0.0
    assert len({record["samples"][0]["text"] for record in whole}) > 1
