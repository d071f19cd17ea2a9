"""What a GRPO run shows: figures worked out by hand, the same for any number of ranks."""

import json
import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanomath.dist import Dist
from nanomath.measure import evaluation
from nanomath.measure.evaluation import heldout_metrics
from nanomath.rollouts import RolloutBatch, Rollouts
from nanomath.run import metrics as monitor
from nanomath.run.guard import StopSignal
from nanomath.run.metrics import Clock, cost_metrics, draw_plots, rollout_metrics, sample_lines
from nanomath.tasks import Problem

CPU = torch.device("cpu")
ALONE = Dist(0, 0, 1, CPU)
NAN = float("nan")


def on_ranks(monkeypatch, world_size, function):
    """Return function(dist) of every rank; they are threads, and exchange what they would send."""
    barrier, sent = threading.Barrier(world_size, timeout=20), {}

    def gather_json(obj, dist):
        sent[dist.rank] = json.loads(json.dumps(obj, allow_nan=False))
        barrier.wait()
        parts = [sent[rank] for rank in range(world_size)]
        barrier.wait()
        return parts

    def all_reduce_sum(values, dist):
        parts = gather_json(values, dist)
        assert all(list(part) == list(values) for part in parts)  # or ranks would mix them up
        return {name: sum(part[name] for part in parts) for name in values}

    monkeypatch.setattr(monitor, "gather_json", gather_json)
    monkeypatch.setattr(evaluation, "gather_json", gather_json)
    monkeypatch.setattr(monitor, "all_reduce_sum", all_reduce_sum)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(function, [Dist(r, r, world_size, CPU) for r in range(world_size)]))


# Two questions more than a rank has in a world of 3; a constant group, a missing reward, a group
# without any.
REWARDS_PG = torch.tensor(
    [[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 3.0, NAN, NAN], [NAN] * 4],
    dtype=torch.float64,
)
LENGTHS_PG = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5], [6, 6, 6, 6], [9, 9, 9, 9]])
FINISHED_PG = torch.tensor([[True] * 4, [True, False] * 2, [True] * 4, [False] * 4])


def metrics_of(dist):
    mine = slice(dist.rank, None, dist.world_size)
    rewards_PG = REWARDS_PG[mine]
    none = torch.zeros(*rewards_PG.shape, 0)
    rollouts = Rollouts(none.long(), LENGTHS_PG[mine], none, FINISHED_PG[mine])
    values = [None if math.isnan(r) else r / 2 for r in rewards_PG.flatten().tolist()]
    return rollout_metrics(rewards_PG, {"half": values}, rollouts, dist)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_rollout_metrics_are_those_of_all_outputs(monkeypatch, world_size):
    """Every figure is the one of all outputs together, on every rank, also where the ranks have
    unequally many questions, rewards and tokens, or none at all."""
    known = [0, 0, 2, 2, 1, 1, 1, 1, 0, 3]
    variance = sum(r * r for r in known) / 10 - 1.1**2
    expected = {
        "reward": 1.1,
        "reward_std": math.sqrt(variance),
        "group_std": (1 + 0 + 1.5 + 0) / 4,
        "reward_half": 0.55,
        "no_reward": 6,
        "constant_groups": 2 / 4,
        "length": (10 + 20 + 24 + 36) / 16,
        "truncated": 6 / 16,
    }
    for metrics in on_ranks(monkeypatch, world_size, metrics_of):
        assert metrics == pytest.approx(expected, rel=1e-12)


def test_spreads_of_large_and_of_equal_rewards():
    """Rewards 1, 2, 6 above 2^30 keep their spread; rewards equal to a rounding have none."""
    rewards_PG = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64) + 2.0**30
    rollouts = Rollouts(torch.zeros(1, 3, 0), torch.ones(1, 3).long(), None, torch.ones(1, 3) > 0)
    metrics = rollout_metrics(rewards_PG, {}, rollouts, ALONE)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(14 / 3), rel=1e-12)
    assert metrics["group_std"] == pytest.approx(math.sqrt(14 / 3), rel=1e-12)
    rewards_PG = torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    metrics = rollout_metrics(rewards_PG, {}, rollouts, ALONE)
    assert (metrics["group_std"], metrics["constant_groups"]) == (0.0, 1.0)


# -------------------------------------------------------------------------------- held-out


# Of each problem: is the greedy answer right, and of four samples (right, class of answer).
JUDGED = [
    (True, [(True, 0), (True, 0), (False, 1), (False, None)]),
    (False, [(False, 0), (False, 0), (True, 1), (False, 2)]),
    (False, [(True, 0), (False, 1), (False, 2), (False, None)]),  # three classes tie
    (False, [(False, None)] * 4),
    (True, [(True, 0)] * 4),
]
PROBLEMS = [Problem(100 + i, "countdown", f"prompt {i}", {}) for i in range(len(JUDGED))]


def judged(calls):
    def evaluate_problems(model, tokenizer, problems, *, num_samples, **settings):
        calls.append((len(problems), num_samples, settings))
        return [
            {
                "id": p.id,
                "payload": {},
                "greedy": {"correct": JUDGED[p.id - 100][0], "text": f"greedy {p.id}"},
                "samples": [
                    {"correct": right, "class": label, "length": 1}
                    for right, label in JUDGED[p.id - 100][1][:num_samples]
                ],
            }
            for p in problems
        ]

    return evaluate_problems


class TenthsOfTheId:
    """Stands for Rewards: a tenth of the number in a greedy answer; 101 cannot be judged."""

    num_calls = 0

    def score(self, problems, completions):
        self.num_calls += 1
        assert completions == [f"greedy {problem.id}" for problem in problems]
        return [None if problem.id == 101 else problem.id / 10 for problem in problems], {}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_heldout_metrics_by_hand_on_any_number_of_ranks(monkeypatch, world_size):
    """Pass@1 counts greedy answers, Pass@4 and Maj@4 the samples, and the reward is the mean of
    those there are; the ranks share the problems, and all get the very same figures, also one that
    has no problem."""
    calls = []
    monkeypatch.setattr(evaluation, "evaluate_problems", judged(calls))
    settings = {"temperature": 0.7, "max_new_tokens": 9}

    def metrics(dist, num_samples=4):
        rewards = TenthsOfTheId()
        figures = heldout_metrics(
            None, None, PROBLEMS, num_samples=num_samples, dist=dist, max_rows=7,
            rewards=rewards, stop=StopSignal(), **settings,
        )  # fmt: skip
        assert rewards.num_calls == 1  # each may take as long as other ranks wait
        return figures

    reward = {"heldout_reward": math.fsum([10.0, 10.2, 10.3, 10.4]) / 4}
    expected = {
        **reward,
        "heldout_pass@1": 2 / 5,
        "heldout_pass@4": 4 / 5,
        "heldout_maj@4": math.fsum([1, 0, 1 / 3, 0, 1]) / 5,
    }
    assert on_ranks(monkeypatch, world_size, metrics) == [expected] * world_size
    assert sum(call[0] for call in calls) == 5 and len(calls) == world_size
    assert all(call[2] == {**settings, "max_rows": 7} for call in calls)
    greedy = on_ranks(monkeypatch, world_size, lambda dist: metrics(dist, 0))
    assert greedy == [reward | {"heldout_pass@1": 2 / 5}] * world_size


def test_no_heldout_problem_is_an_error():
    """An evaluation of nothing has no figure."""
    settings = {"num_samples": 0, "temperature": 1.0, "max_new_tokens": 9, "dist": ALONE}
    with pytest.raises(ValueError, match="no problems"):
        heldout_metrics(None, None, [], rewards=TenthsOfTheId(), stop=StopSignal(), **settings)


# ------------------------------------------------------------------------------------ cost


def rollout_batch(lengths, sequences, weights) -> RolloutBatch:
    weights_N = torch.tensor(weights).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    prompt_lengths = [len(row) - length for row, length in zip(sequences, lengths)]
    return RolloutBatch(
        sequences, prompt_lengths, lengths, len(lengths), weights_N, weights_N, weights_N
    )


def test_costs_are_the_slowest_rank_over_all_tokens(monkeypatch):
    """Seconds are the slowest rank's in each phase, tokens those of all ranks: responses when
    sampled, sequences in the loss, whole, once per pass when trained; memory the fullest rank's."""
    batches = [
        rollout_batch(lengths, rows, weights)
        for lengths, rows, weights in (
            ([2, 3, 1], [[1] * 5, [1] * 7, [1] * 2], [0.25, 0.5, 0.0]),
            ([4], [[1] * 6], [0.1]),
            ([], [], []),
        )
    ]
    seconds = [
        {"sampling": 1.0, "update": 8.0},
        {"sampling": 3.0, "update": 4.0},
        {"sampling": 0.5, "update": 0.5},
    ]
    monkeypatch.setattr(monitor, "peak_gb", lambda dist: [2.0, 1.0, 5.0][dist.rank])
    got = on_ranks(
        monkeypatch, 3, lambda dist: cost_metrics(seconds[dist.rank], batches[dist.rank], 2, dist)
    )
    expected = {
        "seconds_sampling": 3.0,
        "seconds_update": 8.0,
        "memory_gb": 5.0,
        "sampling_tokens_per_s": 10 / 3.0,
        "training_tokens_per_s": 2 * 18 / 8.0,
    }
    assert got == [expected] * 3


def test_clock_splits_the_time_without_a_gap():
    """The phases of a step add up to the whole of it, also where one comes twice."""
    started = time.perf_counter()
    clock = Clock(CPU)
    for phase, seconds in (("one", 0.02), ("two", 0.05), ("one", 0.03)):
        time.sleep(seconds)
        clock.lap(phase)
    whole = time.perf_counter() - started
    assert list(clock.seconds) == ["one", "two"]
    assert clock.seconds["one"] >= 0.05 and clock.seconds["two"] >= 0.05
    assert whole - 0.005 < sum(clock.seconds.values()) <= whole


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_peak_memory_is_what_the_system_counts():
    """On a CPU the peak is the kernel's VmHWM, in 10^9 bytes."""
    peak = monitor.peak_gb(ALONE)
    with open("/proc/self/status") as file:
        counted = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak == pytest.approx(counted * 1024 / 1e9, rel=0.02)


# --------------------------------------------------------------------------------- samples


def test_samples_show_whole_outputs_with_their_worth():
    """The first question with what its judge knows, then each output whole: reward, advantage,
    length, and whether it was cut."""
    problem = Problem(1, "jsonl", "What is 2 + 3?", {"answer": "5 \u5143"})
    rollouts = Rollouts(
        None, torch.tensor([[3, 9], [1, 1]]), None, torch.tensor([[True, False]] * 2)
    )
    rewards_PG = torch.tensor([[1.0, NAN], [0.0, 0.0]])
    advantages_PG = torch.tensor([[1.25, 0.0], [0.0, 0.0]])
    texts = ["it is\n5", "x" * 5000, "another question's", "too"]
    assert sample_lines(problem, texts, rollouts, rewards_PG, advantages_PG) == [
        "prompt: What is 2 + 3?",
        'problem: {"answer": "5 \u5143"}',
        "reward 1.00 advantage +1.25 tokens 3: it is\n5",
        "reward none advantage +0.00 tokens 9, truncated: " + "x" * 5000,
    ]


def test_plots_are_drawn_as_the_run_goes_but_not_more_than_once_a_minute(tmp_path):
    """The first picture is due a minute after the start, each next one a minute later, and at the
    end in any case."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1}\n{"step": 1, "reward": 2}\n')
    (tmp_path / "config.json").write_text("{}")
    picture = tmp_path / "plots" / "metrics.png"

    def drawn(at_end=False) -> bool:
        before = picture.stat().st_mtime_ns if picture.exists() else 0
        draw_plots(tmp_path, at_end=at_end)
        return picture.exists() and picture.stat().st_mtime_ns != before

    def age(path, seconds):
        os.utime(path, (time.time() - seconds,) * 2)

    age(tmp_path / "config.json", 50)
    assert not drawn()
    age(tmp_path / "config.json", 70)
    assert drawn() and not drawn() and drawn(at_end=True)
    age(picture, 70)
    assert drawn()
