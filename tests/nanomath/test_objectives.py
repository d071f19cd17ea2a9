"""Each named objective against a plain loop, and what must never change its update (float64).

The processes of the rank tests run this file as a script (`worker_ranks`).
"""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from kernels import Objective
from nanomath import dist as nd
from nanomath.advantages import outcome_advantages, output_weights
from nanomath.grpo import (
    METRIC_MAXIMA,
    METRIC_SUMS,
    objective_of_rows,
    policy_update,
    update_metrics,
)
from nanomath.model import Transformer
from nanomath.rollouts import Rollouts, make_batch


def load_tests(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dist_tests, grpo_tests = load_tests("test_dist"), load_tests("test_grpo")
ALONE, CPU = grpo_tests.ALONE, grpo_tests.CPU
gradient, tiny_model = grpo_tests.gradient, grpo_tests.tiny_model
EOS, MAX_NEW, TEMPERATURE = 0, 8, 0.9  # 0 is also what rows are padded with
score = partial(grpo_tests.score, temperature=TEMPERATURE, micro_batch_size=4)
SETTINGS = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "kl_coef": 0.3, "kl_estimator": "k3"}
ALTERNATIVES = {
    "paper": {},
    "token": {"loss_norm": "token"},
    "constant": {"loss_norm": "constant"},
    "mean": {"advantage": "mean"},
    "leave_one_out": {"advantage": "leave_one_out"},
    "clip_higher": {"clip_eps_high": 0.5},
    "k1": {"kl_estimator": "k1"},
    "k2": {"kl_estimator": "k2"},
    "mask_truncated": {"mask_truncated": True},
    "drop_constant": {"drop_constant_groups": True},
    "dapo": {
        "loss_norm": "token", "clip_eps_high": 0.28, "kl_coef": 0.0, "mask_truncated": True,
        "drop_constant_groups": True,
    },
    "dr_grpo": {"loss_norm": "constant", "advantage": "mean", "kl_coef": 0.0},
}  # fmt: skip
ON_TWO_RANKS = ("paper", "token", "drop_constant", "dapo")
each_alternative = pytest.mark.parametrize("options", ALTERNATIVES.values(), ids=ALTERNATIVES)


class Group(NamedTuple):
    """One question: prompt, outputs, rewards (None: no reward)."""

    prompt: list[int]
    outputs: list[list[int]]  # without an EOS at the end: truncated
    rewards: list[float | None]


def old_model() -> Transformer:
    """A policy beside tiny_model(), so that ratios fall inside and to both sides of the clip."""
    model, other = tiny_model(), tiny_model(seed=2)
    with torch.no_grad():
        for parameter, far in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(far, 0.3)
    return model


def questions() -> list[Group]:
    """Five questions of three outputs: a constant group, a repeated prompt, an output without
    reward, truncated ones. Of four ranks the second has only the constant group."""
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> list[int]:
        return torch.randint(1, 23, (length,), generator=generator).tolist()

    def outputs(*lengths: int) -> list[list[int]]:
        return [tokens(n) if n == MAX_NEW else [*tokens(n - 1), EOS] for n in lengths]

    prompt = tokens(4)
    return [
        Group(prompt, outputs(3, 7, 8), [1.0, 0.0, 0.25]),
        Group(tokens(2), outputs(5, 4, 1), [0.1, 0.1, 0.1]),
        Group(tokens(6), outputs(6, 2, 8), [0.0, None, 2.0]),
        Group(prompt, outputs(8, 4, 3), [0.0, 1.0, 3.0]),
        Group(tokens(3), outputs(2, 5, 4), [1.0, 0.0, 0.0]),
    ]


def build(options: dict, dist: nd.Dist = ALONE, old: bool = True):
    """Return this rank's (batch, Objective), with log-probabilities of a reference and, if wanted,
    of an old policy."""
    groups = questions()
    mine = groups[dist.rank :: dist.world_size]
    lengths_PG = torch.tensor([[len(output) for output in group.outputs] for group in mine])
    tokens_PGT = torch.full((*lengths_PG.shape, MAX_NEW), 7)
    for p, group in enumerate(mine):
        for g, output in enumerate(group.outputs):
            tokens_PGT[p, g, : len(output)] = torch.tensor(output)
    rollouts = Rollouts(
        tokens_PGT,
        lengths_PG,
        torch.zeros(tokens_PGT.shape, dtype=torch.float64),
        torch.tensor([[output[-1] == EOS for output in group.outputs] for group in mine]),
    )
    rewards = [[float("nan") if r is None else r for r in group.rewards] for group in mine]
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    names = ("loss_norm", "mask_truncated", "drop_constant_groups")
    batch = make_batch(
        [group.prompt for group in mine],
        rollouts,
        outcome_advantages(rewards_PG, options.get("advantage", "std")),
        output_weights(
            rewards_PG, rollouts, max_new_tokens=MAX_NEW, dist=dist,
            **{name: options[name] for name in names if name in options},
        ),
        num_prompts=len(groups),
        world_size=dist.world_size,
    )  # fmt: skip
    # Unsharded, so that each rank scores its own rows alone.
    batch.ref_logp_N = score(tiny_model(seed=1), batch)
    if old:
        batch.old_logp_N = score(old_model(), batch)
    settings = {name: options.get(name, default) for name, default in SETTINGS.items()}
    return batch, Objective(temperature=TEMPERATURE, **settings)


def close(actual, expected, tolerance=1e-10):
    return (actual - expected).abs().max() <= tolerance * expected.abs().max()


# ------------------------------------------------------------------------------ the plain loop


def logp_of(model, prompt, output):
    logits_TV = model(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1]
    logp_TV = (logits_TV / TEMPERATURE).log_softmax(-1)
    return logp_TV.gather(1, torch.tensor(output)[:, None])[:, 0]


def plain_advantages(rewards: list[float], kind: str) -> list[float]:
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    if kind == "leave_one_out":
        n = len(rewards)
        return [rewards[i] - fmean(rewards[:i] + rewards[i + 1 :]) for i in range(n)]
    scale = pstdev(rewards) if kind == "std" else 1.0
    return [(r - fmean(rewards)) / scale for r in rewards]


def plain_loss(model, options: dict, old: bool = True) -> torch.Tensor:
    """The objective of docs/objectives.md, written out group by group and output by output."""
    cfg = SETTINGS | {"advantage": "std", "loss_norm": "response"} | options
    models = {"ref": tiny_model(seed=1), "old": old_model()}
    terms, num_groups, num_tokens = [], 0, 0
    for group in questions():
        scored = [g for g, reward in enumerate(group.rewards) if reward is not None]
        rewards = [group.rewards[g] for g in scored]
        if cfg.get("drop_constant_groups") and len({*rewards}) == 1:
            continue
        num_groups += 1
        for g, advantage in zip(scored, plain_advantages(rewards, cfg["advantage"]), strict=True):
            output = group.outputs[g]
            if cfg.get("mask_truncated") and output[-1] != EOS:
                continue
            num_tokens += len(output)
            logp = logp_of(model, group.prompt, output)
            with torch.no_grad():
                ref = logp_of(models["ref"], group.prompt, output)
                before = logp_of(models["old"], group.prompt, output) if old else logp.detach()
            ratio = (logp - before).exp()
            clipped = ratio.clamp(1 - cfg["clip_eps_low"], 1 + cfg["clip_eps_high"])
            gain = torch.minimum(ratio * advantage, clipped * advantage)  # Eq. 3
            kl = {
                "k1": logp - ref,
                "k2": (logp - ref) ** 2 / 2,
                "k3": (ref - logp).exp() - (ref - logp) - 1,  # Eq. 4
            }[cfg["kl_estimator"]]
            total = (gain - cfg["kl_coef"] * kl).sum()
            terms.append((total, len(scored), len(output)))
    divisors = {
        "response": lambda size, length: num_groups * size * length,
        "constant": lambda size, length: num_groups * size * MAX_NEW,
        "token": lambda size, length: num_tokens,
    }
    divisor = divisors[cfg["loss_norm"]]
    return -sum(total / divisor(size, length) for total, size, length in terms)


def plain_gradient(model, options: dict, old: bool = True):
    model.zero_grad(set_to_none=True)
    loss = plain_loss(model, options, old)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.item()


@each_alternative
@pytest.mark.parametrize("old", [True, False])
def test_loss_and_gradient_equal_a_plain_loop(options, old):
    """Loss and gradient (1e-10) are those of the formulas written out; with old log-probabilities
    both sides of the clip occur, and each alternative differs from the paper's."""
    model = tiny_model()
    batch, objective = build(options, old=old)
    flat, sums = gradient(model, batch, objective, [range(len(batch))])
    expected, loss = plain_gradient(model, options, old)
    assert sums["loss"] == pytest.approx(loss, rel=1e-10)
    assert close(flat, expected) and expected.abs().max() > 1e-2
    assert (sums["clip_low"] > 0) == (sums["clip_high"] > 0) == old
    if options and (old or "clip_eps_high" not in options):
        paper, _ = plain_gradient(model, {}, old)
        assert not close(flat, paper, 1e-3)


@each_alternative
def test_micro_batches_row_order_and_padding_change_nothing(options):
    """Any split or order of the rows, hence any padding, gives the same gradient (1e-10), though
    the padding's id is the EOS's."""
    model = tiny_model()
    batch, objective = build(options)
    whole, sums = gradient(model, batch, objective, [range(15)])
    for split in (
        [[row] for row in range(15)],  # no padding at all
        [[14, 0, 7], [3, 13, 6, 2], [], [1, 12, 4, 5, 11], [9, 10, 8]],
        batch.micro_batches(4),
    ):
        part, part_sums = gradient(model, batch, objective, split)
        assert close(part, whole)
        assert part_sums == pytest.approx(sums, rel=1e-10)


@each_alternative
def test_steps_of_one_pass_add_up_to_the_batch(options):
    """The gradients of num_parts parts, as SGD takes them from one policy, average to the whole
    batch's: the weights are of the whole batch, whatever it is split into."""
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    batch, objective = build(options)

    def step(part, num_parts):
        model = tiny_model()
        policy_update(
            model, torch.optim.SGD(model.parameters(), lr=1.0), batch, objective, lr=1.0,
            max_grad_norm=1e9, micro_batch_size=2, dist=ALONE, part=part, num_parts=num_parts,
        )  # fmt: skip
        return start - torch.cat([p.detach().flatten() for p in model.parameters()])

    parts = sum(step(part, 5) for part in range(5)) / 5
    assert close(parts, step(0, 1))


def test_a_repeated_prompt_is_two_groups():
    """Questions 0 and 3 have the same prompt: each one's advantages come from its own rewards."""
    batch, _ = build({})
    assert batch.sequences[0][:4] == batch.sequences[9][:4]
    for first, rewards in ((0, [1.0, 0.0, 0.25]), (9, [0.0, 1.0, 3.0])):
        expected = plain_advantages(rewards, "std")
        advantages = [batch.advantages_N[batch.token_positions([first + g])] for g in range(3)]
        assert [float(values.max()) for values in advantages] == pytest.approx(expected)
        assert all(values.min() == values.max() for values in advantages)


# ------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("advantage", ["std", "mean", "leave_one_out"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_loss_is_beta_times_the_mean_kl_with_the_papers_weights_only(advantage, estimator):
    """With one step per batch and weights 1/(P G |o_i|) the loss is beta * the mean over outputs of
    their mean token KL, though the gradient is not 0; with the other weights it is not (Sec. 4)."""
    model = tiny_model()
    for loss_norm in ("response", "token", "constant"):
        options = {"advantage": advantage, "kl_estimator": estimator, "loss_norm": loss_norm}
        batch, objective = build(options, old=False)
        out_kl = []
        for group in questions():
            for g in [g for g, reward in enumerate(group.rewards) if reward is not None]:
                logp = logp_of(model, group.prompt, group.outputs[g]).detach()
                ref = logp_of(tiny_model(seed=1), group.prompt, group.outputs[g]).detach()
                difference = ref - logp
                values = {
                    "k1": -difference,
                    "k2": difference**2 / 2,
                    "k3": difference.exp() - difference - 1,
                }
                out_kl.append(
                    (values[estimator].mean().item(), sum(r is not None for r in group.rewards))
                )
        expected = 0.3 * sum(kl / size for kl, size in out_kl) / 5
        flat, sums = gradient(model, batch, objective, [range(15)])
        assert (sums["loss"] == pytest.approx(expected, rel=1e-10)) == (loss_norm == "response")
        assert flat.norm() > 0.01


@pytest.mark.parametrize(
    ("loss_norm", "loss"), [("response", 0.0), ("token", 0.5), ("constant", 1 / MAX_NEW)]
)
def test_loss_of_two_outputs_by_hand(loss_norm, loss):
    """Lengths 1 and 3, A = +1 and -1, no KL, rho = 1: 0 by Eq. 3; (3 - 1)/4 by tokens; (3 - 1) / 2L
    by the constant."""
    lengths_PG = torch.tensor([[1, 3]])
    tokens_PGT = torch.arange(6).view(1, 2, 3)
    finished_PG = torch.ones(1, 2, dtype=torch.bool)
    rollouts = Rollouts(tokens_PGT, lengths_PG, torch.zeros(1, 2, 3).double(), finished_PG)
    rewards_PG = torch.tensor([[1.0, 0.0]])
    weights_PG = output_weights(
        rewards_PG, rollouts, max_new_tokens=MAX_NEW, dist=ALONE, loss_norm=loss_norm
    )
    advantages_PG = outcome_advantages(rewards_PG)
    batch = make_batch([[5, 6]], rollouts, advantages_PG, weights_PG, num_prompts=1, world_size=1)
    objective = Objective(0.2, 0.2, 0.0, 1.0)
    flat, sums = gradient(tiny_model(), batch, objective, [range(2)])
    assert sums["loss"] == pytest.approx(loss, abs=1e-15)
    assert flat.norm() > 0.01


# ------------------------------------------------------------------------------ the update


@pytest.mark.parametrize(
    "options", [ALTERNATIVES["paper"], ALTERNATIVES["dapo"]], ids=["paper", "dapo"]
)
def test_nothing_that_goes_in_is_changed(options):
    """Scoring and updating leave every field of the batch as it was, to the last bit."""
    batch, objective = build(options)
    before = {name: _copy(value) for name, value in vars(batch).items()}
    model = tiny_model()
    score(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    policy_update(
        model, optimizer, batch, objective, lr=1.0, max_grad_norm=1.0, micro_batch_size=4,
        dist=ALONE,
    )  # fmt: skip
    for name, value in vars(batch).items():
        same = torch.equal(value, before[name]) if torch.is_tensor(value) else value == before[name]
        assert same, name


def _copy(value):
    return (
        value.clone() if torch.is_tensor(value) else [*value] if isinstance(value, list) else value
    )


def adamw_update(model, optimizer, batch, objective, lr=1e-2):
    return policy_update(
        model, optimizer, batch, objective, lr=lr, max_grad_norm=1.0, micro_batch_size=4, dist=ALONE
    )


def test_batch_without_coefficients_is_skipped_and_counted():
    """All advantages 0 without a KL, or no reward at all: weights and moments stay as they are
    though AdamW has momentum and weight decay, and the step counts as empty, not as failed. With a
    KL the constant groups still step."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch, objective = build({})
    metrics = adamw_update(model, optimizer, batch, objective)  # there is momentum now
    assert metrics["empty_steps"] == 0.0 and metrics["stepped"] == 1.0
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    constant, unscored = build({})[0], build({})[0]
    constant.advantages_N = torch.zeros_like(constant.advantages_N)
    unscored.weights_N = torch.zeros_like(unscored.weights_N)
    for empty, kl_coef in ((constant, 0.0), (unscored, 0.3)):
        metrics = adamw_update(model, optimizer, empty, replace(objective, kl_coef=kl_coef))
        assert metrics["empty_steps"] == 1.0 and metrics["stepped"] == 1.0
        assert all(map(torch.equal, weights, model.parameters()))
        after = [state["exp_avg"] for state in optimizer.state.values()]
        assert all(map(torch.equal, moments, after))
    assert (metrics["tokens"], metrics["ratio_max"]) == (0, 0)
    assert adamw_update(model, optimizer, constant, objective)["empty_steps"] == 0.0
    assert not all(map(torch.equal, weights, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"mask_truncated": True}], ids=["paper", "masked"])
def test_kl_is_exactly_zero_after_a_refresh_and_a_kl_alone_then_does_not_move(dtype, options):
    """With reference = policy each token's KL is 0 to the last bit, in any part of the batch and
    with outputs that are not in the loss, and then a batch of constant groups is an empty one."""
    for estimator in ("k1", "k2", "k3"):
        model = tiny_model().to(dtype)
        batch, objective = build({"kl_estimator": estimator, **options}, old=False)
        for num_parts in (1, 5):
            batch.ref_logp_N = score(model, batch, num_parts=num_parts)
            for part in range(num_parts):
                split = batch.micro_batches(4, part, num_parts)
                _, sums = gradient(model, batch, objective, split)
                assert sums["tokens"] > 0
                assert sums["kl"] == sums["kl_weighted"] == 0.0
    batch.ref_logp_N = score(model, batch)
    batch.advantages_N = torch.zeros_like(batch.advantages_N)
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    metrics = adamw_update(model, optimizer, batch, objective)
    assert metrics["empty_steps"] == 1.0 and metrics["ratio_max"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_alternative
def test_first_of_two_updates_is_the_only_one_of_one(options, dtype):
    """Given the policy's own log-probabilities as the old ones, the first update equals that of
    mu = 1, which computes none (to the last bit); every ratio is 1 to the last bit."""
    results = []
    for old in (False, True):
        model = tiny_model().to(dtype)
        batch, objective = build(options, old=False)
        if old:
            batch.old_logp_N = score(model, batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        metrics = adamw_update(model, optimizer, batch, objective)
        assert metrics["ratio_max"] == 1.0 and metrics["kl_old"] == 0.0
        assert metrics["clip_low"] == metrics["clip_high"] == 0.0
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])


def test_metrics_of_ratios_are_those_of_the_trained_tokens():
    """The largest ratio, the KL to the old policy, the gap to the sampler and the share clipped, by
    hand: only over tokens in the loss, and over a batch's steps as sums over sums and maxima."""
    model = tiny_model()
    batch, objective = build({"mask_truncated": True})
    batch.old_logp_N[batch.token_positions([2])] -= 20.0  # a truncated output
    logp_N = score(model, batch)
    batch.sampler_logp_N = logp_N + torch.linspace(-0.3, 0.2, len(logp_N))
    steps = [
        policy_update(
            tiny_model(), torch.optim.SGD(model.parameters(), lr=0.0), batch, objective, lr=0.0,
            max_grad_norm=1.0, micro_batch_size=4, dist=ALONE, part=part, num_parts=5,
        )
        for part in range(5)
    ]  # fmt: skip
    metrics = update_metrics(steps, objective.kl_coef)
    trained_N, advantages_N = batch.weights_N > 0, batch.advantages_N
    ratio_N = (logp_N - batch.old_logp_N).exp()
    kl_old_N = ratio_N - ratio_N.log() - 1
    low_N = (ratio_N < 0.8) & (advantages_N < 0) & trained_N
    count = trained_N.sum().item()
    assert metrics["ratio_max"] == pytest.approx(ratio_N[trained_N].max().item(), rel=1e-12)
    assert metrics["ratio_max"] < ratio_N.max().item()  # the largest of all is not in the loss
    assert metrics["kl_old"] == pytest.approx(kl_old_N[trained_N].mean().item(), rel=1e-12)
    gap_N = (logp_N - batch.sampler_logp_N).abs()[trained_N]
    assert metrics["sampler_gap"] == pytest.approx(gap_N.mean().item(), rel=1e-9)
    assert metrics["sampler_gap_max"] == pytest.approx(gap_N.max().item(), rel=1e-9)
    assert metrics["clip_low"] == low_N.sum().item() / count > 0
    assert len({step["tokens"] for step in steps}) > 1  # a mean of means would be another number
    assert sum(step["tokens"] for step in steps) == count
    assert metrics["loss"] == pytest.approx(plain_loss(model, {"mask_truncated": True}).item())
    assert metrics["loss_policy"] + metrics["loss_kl"] == pytest.approx(metrics["loss"])


# ------------------------------------------------------------------------------ ranks


def worker_ranks(out):
    """Leave the gradient, sums and largest ratio of each objective, made by all ranks together."""
    dist = nd.setup("cpu", 1, timeout_s=60)
    results = {}
    for name in ON_TWO_RANKS if dist.world_size == 2 else ALTERNATIVES:
        options, model = ALTERNATIVES[name], nd.shard(tiny_model(), dist)
        batch, objective = build(options, dist)
        if name == "paper" and dist.rank == dist.world_size - 1:
            assert len(batch.micro_batches(2)[-1]) < 2  # this rank runs out of rows first
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = _full(model)
        step = policy_update(
            model, optimizer, batch, objective, lr=1.0, max_grad_norm=1e9, micro_batch_size=2,
            dist=dist,
        )  # fmt: skip
        numbers = [step[metric] for metric in (*METRIC_SUMS, *METRIC_MAXIMA, "grad_norm")]
        results[f"{name} gradient"] = before - _full(model)
        results[f"{name} numbers"] = torch.tensor(numbers, dtype=torch.float64)
    if dist.rank == dist.world_size - 1:  # not the one with most rows
        save_file(results, out / "results.safetensors")
    nd.cleanup(dist)


def _full(model) -> torch.Tensor:
    parts = [p.detach() for p in model.parameters()]
    return torch.cat(
        [(p.full_tensor() if isinstance(p, DTensor) else p).flatten().clone() for p in parts]
    )


def assert_ranks_equal_one(tmp_path, num_ranks):
    statuses = dist_tests.launch("ranks", tmp_path, num_ranks, file=__file__)
    assert [status for status, _ in statuses] == [0] * num_ranks, statuses
    results = load_file(tmp_path / "results.safetensors")
    for name in ON_TWO_RANKS if num_ranks == 2 else ALTERNATIVES:
        model = tiny_model()
        batch, objective = build(ALTERNATIVES[name])
        whole, sums = gradient(model, batch, objective, [range(15)])
        assert close(results[f"{name} gradient"], whole), name
        _, _, maxima = objective_of_rows(model, batch, range(15), objective, CPU)
        expected = [*sums.values(), *maxima.tolist(), whole.norm().item()]
        assert results[f"{name} numbers"].tolist() == pytest.approx(expected, rel=1e-10), name


def test_two_ranks_update_as_one_does(tmp_path):
    """Two processes give the gradient (1e-10), sums and largest ratio of one."""
    assert_ranks_equal_one(tmp_path, 2)


@pytest.mark.slow
def test_four_ranks_update_as_one_does(tmp_path):
    """So do four, with any objective; one has only a constant group, three have fewer rows."""
    assert_ranks_equal_one(tmp_path, 4)


if __name__ == "__main__":
    globals()[f"worker_{sys.argv[1]}"](Path(sys.argv[2]))
