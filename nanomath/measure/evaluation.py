"""Accuracy, Pass@K and Maj@K over the same samples, with intervals over problems (Sec. 5, 6).

Pass@K: at least one of K samples is right. Maj@K: the most frequent answer of K samples is right.
Both are expectations over all K-subsets of a problem's n samples, exact, not estimated.

95% intervals say how much a figure hangs on which problems were asked, and nothing about other
training seeds. Of problems that are right or wrong: Wilson's score interval. Of other means and of
paired differences: the percentile bootstrap over problems. That one is a point where all problems
are alike, as 0 of 12; what was not seen may be z^2 / (n + z^2) of all problems there, which is
Wilson's bound for 0 of n, and Tango's for n pairs of which none differs.

`sample_problems` and `evaluate_problems` sample and judge; `problem_metrics` says what each problem
is worth, for the evaluations of a training run (`heldout_metrics`) as for those of a command, which
`summarise` turns into figures; `compare` takes the paired difference of two of them over the same
problems. The command is evaluate.py, the tables and pictures are figures.py.
"""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import comb
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from nanomath.dist import Dist, gather_json
from nanomath.engine.stream import sample_stream
from nanomath.rewards import Rewards, format_reward
from nanomath.run.guard import StopSignal
from nanomath.tasks import Problem, encode_prompt
from nanomath.tasks.registry import TASKS

GROUPS = ("level", "type", "grade", "topic")  # of a problem's payload: figures are given by them
PROBLEM = ("id", "nums", "target", "answer")  # of two rows that are of the same problem
MAX_SAMPLES = 1000  # the subset counts below stay within float64
Z2 = NormalDist().inv_cdf(0.975) ** 2  # of a 95% interval


# -------------------------------------------------------------------------------------- metrics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples, c of them right, hold a right one: unbiased Pass@K."""
    if not 0 <= c <= n:
        raise ValueError(f"{c} right samples of {n}")
    if not 1 <= k <= n:
        raise ValueError(f"Pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def group_answers(
    answers: Sequence[Any],
    equal: Callable[[Any, Any], bool] = operator.eq,
    correct: Sequence[bool] | None = None,
) -> list[int | None]:
    """Number the classes of answers in order of appearance; None (unreadable) has none.

    A class holds the answers with one verdict (correct) that equal the same answers. So it is a
    partition that no order of samples changes, also where equality is not transitive: 5 is 5 cm and
    is 5 km, and these three differ; 5 and 5 cm alone are one.
    """
    distinct: list[tuple[Any, bool]] = []
    indices: list[int | None] = []
    for answer, verdict in zip(answers, correct or [False] * len(answers), strict=True):
        if answer is not None and (answer, verdict) not in distinct:
            distinct.append((answer, verdict))
        indices.append(None if answer is None else distinct.index((answer, verdict)))
    equals = [{i} for i in range(len(distinct))]
    for i, (answer, verdict) in enumerate(distinct):
        for j in range(i):
            if verdict == distinct[j][1] and equal(distinct[j][0], answer):
                equals[i].add(j)
                equals[j].add(i)
    classes: dict[frozenset[int], int] = {}
    labels = [classes.setdefault(frozenset(same), len(classes)) for same in equals]
    return [None if index is None else labels[index] for index in indices]


def majority_credits(
    classes: Sequence[int | None], correct: Sequence[bool], ks: Sequence[int]
) -> list[float]:
    """Return Maj@k for each k: the mean over all k-subsets of the samples of the vote's credit.

    classes as from group_answers; correct[i] says whether sample i is right, and a class is right
    when its members are. Samples of class None do not vote. Classes that tie for the most votes
    share the credit: a subset counts (right classes among the tied) / (tied), and 0 without votes.

    Exact, by counting subsets rather than listing them. For a right class of m votes and each
    v <= m: the subsets in which it has v votes, no class has more, and t others have v as well give
    it 1 / (t + 1) each.
    """
    n = len(classes)
    if len(correct) != n:
        raise ValueError(f"{n} classes, but {len(correct)} judgements")
    if n > MAX_SAMPLES or any(not 1 <= k <= n for k in ks):
        raise ValueError(f"Maj@K needs 1 <= K <= n <= {MAX_SAMPLES}; K is {list(ks)}, n is {n}")
    sizes = Counter(label for label in classes if label is not None)
    credits = np.zeros(n + 1)
    for label, size in sizes.items():
        if not correct[list(classes).index(label)]:
            continue
        others = [other for key, other in sizes.items() if key != label]
        for votes in range(1, size + 1):
            ways = _ways(n - size, others, votes)
            shared = ways @ (1.0 / np.arange(1, ways.shape[1] + 1))
            credits[votes : votes + len(shared)] += comb(size, votes) * shared
    return [float(credits[k] / comb(n, k)) for k in ks]


def _ways(num_samples: int, sizes: Sequence[int], votes: int) -> np.ndarray:
    """Count the choices among num_samples, which are classes of `sizes` and unreadable ones, where
    no class has more than `votes`: [number chosen, number of classes with exactly `votes`]."""
    large = [size for size in sizes if size >= votes]
    # Classes too small to tie are as free to choose from as unreadable samples.
    free = num_samples - sum(large)
    ways = np.zeros((num_samples + 1, len(large) + 1))
    ways[: free + 1, 0] = [comb(free, chosen) for chosen in range(free + 1)]
    for size in large:
        before, ways = ways, np.zeros_like(ways)
        for chosen in range(votes):
            ways[chosen:] += comb(size, chosen) * before[: len(before) - chosen]
        ways[votes:, 1:] += comb(size, votes) * before[: len(before) - votes, :-1]
    return ways


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean of values, one per problem."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError("an interval needs at least one value")
    rng = np.random.default_rng(0)  # the same values have the same interval
    means = [array[rng.integers(0, len(array), len(array))].mean() for _ in range(2000)]
    tail = (1.0 - 0.95) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean of values from 0 to 1, one per problem."""
    n, right = len(values), math.fsum(values)
    if len({*values}) == 1:
        unseen = Z2 / (n + Z2)
        return values[0] * (1 - unseen), values[0] + (1 - values[0]) * unseen
    if not n or not {*values} <= {0, 1}:
        return bootstrap_interval(values)
    middle = (right + Z2 / 2) / (n + Z2)
    half = math.sqrt(Z2 * (right * (n - right) / n + Z2 / 4)) / (n + Z2)
    return middle - half, middle + half


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, shares: bool = True
) -> dict[str, float]:
    """Return the mean of after - before over the same problems, its interval, wins and losses.

    shares: the values are from 0 to 1; False: of any scale, of which only the bootstrap knows.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} problems against {len(after)}: not the same ones")
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    low, high = bootstrap_interval(gains)
    if shares and low == high and low in (-1, 0, 1):  # all pairs differ alike, or none does
        unseen = Z2 / (len(gains) + Z2)
        low, high = max(low - unseen, -1.0), min(high + unseen, 1.0)
    return {
        "value": float(gains.mean()),
        "low": low,
        "high": high,
        "wins": int((gains > 0).sum()),
        "losses": int((gains < 0).sum()),
    }


# ------------------------------------------------------------------------------------- sampling


def passes(num_samples: int, temperature: float) -> dict[str, dict[str, Any]]:
    """Return how problems are sampled, by kind: once greedily, and num_samples times if any."""
    greedy = {"greedy": {"num_samples": 1, "temperature": 0.0}}
    samples = {"samples": {"num_samples": num_samples, "temperature": temperature}}
    return greedy | samples if num_samples else greedy


def sample_problems(
    model: torch.nn.Module,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    num_samples: int,
    **settings: Any,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (index, judged outputs) of each problem of one task when all its samples have ended.

    A sample depends on (seed, problem id, sample index) alone. settings: the sampler's temperature,
    max_new_tokens, seed and limits. Each output is {"text", "length" in tokens, "finished"} and
    judge_outputs' marks.
    """
    texts = TASKS[problems[0].task].stop_texts(problems[0]) if problems else ()
    if texts and tokenizer.template == "plain":
        # A chat model ends its turn itself, and may restate its question.
        settings |= {"stop": texts, "tokenizer": tokenizer}
    ended: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for sample in sample_stream(
        model,
        [encode_prompt(tokenizer, problem) for problem in problems],
        num_samples,
        eos_ids=tokenizer.stop_ids,
        prompt_ids=[problem.id for problem in problems],
        vocab_limit=tokenizer.sample_limit,
        **settings,
    ):
        tokens, group = sample.tokens_T.tolist(), ended[sample.prompt]
        group[sample.index] = {
            "text": tokenizer.decode(tokens),
            "length": len(tokens),
            "finished": sample.finished,
        }
        if len(group) == num_samples:
            outputs = [group[g] for g in range(num_samples)]
            yield sample.prompt, judge_outputs(problems[sample.prompt], outputs)


def evaluate_problems(
    model: torch.nn.Module,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    num_samples: int,
    temperature: float,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Return `problem_record` of each problem, sampled once greedily and num_samples times.

    settings: those of sample_problems.
    """
    outputs = {
        kind: dict(sample_problems(model, tokenizer, problems, **how, **settings))
        for kind, how in passes(num_samples, temperature).items()
    }
    return [
        problem_record(problem, {kind: judged[i] for kind, judged in outputs.items()})
        for i, problem in enumerate(problems)
    ]


def problem_record(problem: Problem, outputs: dict[str, list[dict]]) -> dict[str, Any]:
    """Return one problem's payload, and every output with its text and judgement."""
    return {
        "id": problem.id,
        "task": problem.task,
        "prompt": problem.prompt,
        "payload": problem.payload,
        "greedy": outputs["greedy"][0],
        "samples": outputs.get("samples", []),
    }


def judge_outputs(problem: Problem, outputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each output of one problem "correct", its "class" for the vote, and its marks:
    "strict" and "format" of every task (where a judge gives none: as correct, and the format
    reward), and what more the judge gives."""
    task = TASKS[problem.task]
    verdicts = [task.judge(problem, output["text"]) for output in outputs]
    votes, correct = [v.vote for v in verdicts], [v.correct for v in verdicts]
    classes = group_answers(votes, task.same_answer, correct)
    judged = []
    for output, verdict, label in zip(outputs, verdicts, classes, strict=True):
        is_formatted = format_reward(problem, output["text"]) == 1.0
        marks = {"correct": verdict.correct, "strict": verdict.correct, "format": is_formatted}
        judged.append({**output, **marks, "class": label, **verdict.marks})
    return judged


# -------------------------------------------------------------------------------------- figures


def default_ks(num_samples: int) -> list[int]:
    """Return 1, 2, 4, ... and num_samples itself."""
    powers = [1 << i for i in range(num_samples.bit_length()) if 1 << i < num_samples]
    return [*powers, num_samples] if num_samples else []


def problem_row(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a problem in a file of figures: all that its metrics depend on."""
    samples = record["samples"]
    return {
        "id": record["id"],
        **record["payload"],
        "greedy_correct": record["greedy"]["correct"],
        "num_correct": sum(sample["correct"] for sample in samples),
        "correct": [int(sample["correct"]) for sample in samples],
        "classes": [sample["class"] for sample in samples],
        "tokens": sum(sample["length"] for sample in samples),
    }


def problem_metrics(row: dict[str, Any], ks: Sequence[int]) -> dict[str, float]:
    """Return what one problem adds to greedy accuracy, and to Pass@K and Maj@K of each K."""
    correct, classes = row["correct"], row["classes"]
    metrics = {"greedy": float(row["greedy_correct"])}
    metrics |= {f"pass@{k}": pass_at_k(len(correct), sum(correct), k) for k in ks}
    majorities = majority_credits(classes, correct, ks) if ks else []
    return metrics | {f"maj@{k}": value for k, value in zip(ks, majorities, strict=True)}


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of problem_record's records, as JSON.

    "metrics": greedy, pass@K and maj@K with 95% intervals; "groups": their means by GROUPS;
    "greedy_outputs" and "sampled_outputs": tokens, and the shares truncated, without the format,
    without a readable answer and strictly right; "problems": what the metrics were computed from.
    """
    if not records:
        raise ValueError("no problems to evaluate")
    num_samples = len(records[0]["samples"])
    rows = [problem_row(record) for record in records]
    values = [problem_metrics(row, default_ks(num_samples)) for row in rows]
    metrics = {}
    for name in values[0]:
        column = [value[name] for value in values]
        low, high = share_interval(column)
        metrics[name] = {"value": float(np.mean(column)), "low": low, "high": high}
    return {
        "task": records[0]["task"],
        "num_problems": len(records),
        "num_samples": num_samples,
        "metrics": metrics,
        "groups": {
            key: _by_group([row.get(key, "none") for row in rows], values)
            for key in GROUPS
            if any(key in row for row in rows)
        },
        "greedy_outputs": _describe([record["greedy"] for record in records]),
        "sampled_outputs": _describe([s for record in records for s in record["samples"]]),
        "problems": rows,
    }


def _by_group(
    labels: Sequence[str], values: Sequence[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the number of problems, and the mean of every metric, for each label."""
    groups = {}
    for label in sorted({*labels}):
        members = [value for value, its in zip(values, labels, strict=True) if its == label]
        means = {name: float(np.mean([value[name] for value in members])) for name in values[0]}
        groups[label] = {"problems": len(members), **means}
    return groups


def _describe(outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    count = max(len(outputs), 1)
    return {
        "outputs": len(outputs),
        "tokens": sum(output["length"] for output in outputs),
        "mean_tokens": sum(output["length"] for output in outputs) / count,
        "truncated": sum(not output["finished"] for output in outputs) / count,
        "format_failures": sum(not output["format"] for output in outputs) / count,
        "unreadable": sum(output["class"] is None for output in outputs) / count,
        "strict": sum(output["strict"] for output in outputs) / count,
        "last_math": sum(output.get("last_math", False) for output in outputs) / count,
    }


def check_same_problems(before: Sequence[dict], after: Sequence[dict]) -> None:
    """Raise ValueError unless two lists of rows, of id and payload, are of the same problems."""
    asked = [[[row.get(k) for k in PROBLEM] for row in rows] for rows in (before, after)]
    if asked[0] != asked[1]:
        raise ValueError("the two evaluations are not of the same problems: nothing to pair")


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the paired difference of each metric that two summaries of the same problems share."""
    check_same_problems(before["problems"], after["problems"])
    shared = [k for k in default_ks(before["num_samples"]) if k in default_ks(after["num_samples"])]
    values = [[problem_metrics(row, shared) for row in s["problems"]] for s in (before, after)]
    return {
        name: paired_difference(*([value[name] for value in side] for side in values))
        for name in values[0][0]
    }


def heldout_metrics(
    model: torch.nn.Module,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    rewards: Rewards,
    num_samples: int,
    dist: Dist,
    stop: StopSignal,
    **settings: Any,
) -> dict[str, float]:
    """Return Pass@1 and mean reward of greedy answers; of K = num_samples samples Pass@K and Maj@K.

    The ranks share the problems out and get the same figures; model is this rank's unsharded one.
    Samples come from a random stream of their own: no training run and no number of ranks changes
    them. num_samples 0: greedy answers only. settings: those of evaluate_problems. A signal to
    `stop` ends the evaluation, on all ranks alike, and {} is returned.
    """
    if not problems:
        raise ValueError("no problems to evaluate")
    mine = problems[dist.rank :: dist.world_size]
    records = stop.unless_signalled(
        lambda: evaluate_problems(model, tokenizer, mine, num_samples=num_samples, **settings)
    )
    if stop.requested(dist):
        return {}
    # All at once: one call is bounded by what other ranks wait (tasks/workers.py).
    totals, _ = rewards.score(mine, [record["greedy"]["text"] for record in records])
    rows = []
    for record, total in zip(records, totals, strict=True):
        metrics = problem_metrics(problem_row(record), [num_samples] if num_samples else [])
        row = {"heldout_reward": total, "heldout_pass@1": metrics.pop("greedy")}
        rows.append(row | {f"heldout_{name}": value for name, value in metrics.items()})
    if stop.requested(dist):  # judging may take long, too
        return {}
    rows = [row for part in gather_json(rows, dist) for row in part]
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    # fsum is exact: the order of the ranks' problems does not show.
    return {name: math.fsum(known) / len(known) for name, known in columns.items() if known}
