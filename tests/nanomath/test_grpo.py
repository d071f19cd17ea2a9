"""GRPO's batch, scoring and update against closed forms, in float64.

What its objective is, by default and by the other names: test_objectives.py.
"""

import pytest
import torch
import torch.distributed as td
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from kernels import Objective
from nanomath.advantages import drop_without_gradient, outcome_advantages, output_weights
from nanomath.dist import Dist, shard
from nanomath.grpo import (
    METRIC_MAXIMA,
    METRIC_SUMS,
    PER_TOKEN,
    objective_of_rows,
    pad_rows,
    policy_update,
    response_logprobs,
    update_metrics,
)
from nanomath.model import ModelConfig, Transformer
from nanomath.rollouts import RolloutBatch, Rollouts, make_batch

ALONE = Dist(0, 0, 1, torch.device("cpu"))
CPU = torch.device("cpu")


def tiny_model(seed: int = 0) -> Transformer:
    model = Transformer(ModelConfig(23, 2, 16, 2, 1, 24, max_context=64)).double()
    model.init_weights(seed, std=0.3)
    return model


def random_batch(
    lengths=((3, 7), (1, 5), (6, 2)), prompt_lengths=(4, 2, 6), advantages=None, seed=0
) -> RolloutBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths_PG = torch.tensor(lengths)
    tokens_PGT = torch.randint(
        0, 23, (*lengths_PG.shape, int(lengths_PG.max())), generator=generator
    )
    prompts = [torch.randint(0, 23, (n,), generator=generator).tolist() for n in prompt_lengths]
    rollouts = Rollouts(
        tokens_PGT,
        lengths_PG,
        torch.zeros(tokens_PGT.shape, dtype=torch.float64),
        torch.ones_like(lengths_PG, dtype=torch.bool),
    )
    rewards_PG = torch.rand(lengths_PG.shape, generator=generator, dtype=torch.float64)
    if advantages is None:
        advantages = outcome_advantages(rewards_PG)
    weights_PG = output_weights(rewards_PG, rollouts, max_new_tokens=10, dist=ALONE)
    return make_batch(
        prompts, rollouts, advantages, weights_PG, num_prompts=len(prompts), world_size=1
    )


def score(model, batch, **settings):
    settings = {"temperature": 1.0, "micro_batch_size": 8, **settings}
    return response_logprobs(model, batch, device=CPU, **settings)


def gradient(model, batch, objective, micro_batches):
    model.zero_grad(set_to_none=True)
    sums = 0.0
    for rows in micro_batches:
        loss, part, _ = objective_of_rows(model, batch, rows, objective, CPU)
        loss.backward()
        sums = sums + part
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    return flat, dict(zip(METRIC_SUMS, sums.tolist(), strict=True))


def update(model, optimizer, batch):
    """One policy_update without a KL."""
    return policy_update(
        model, optimizer, batch, Objective(0.2, 0.2, 0.0, 1.0),
        lr=optimizer.param_groups[0]["lr"], max_grad_norm=1.0, micro_batch_size=3, dist=ALONE,
    )  # fmt: skip


# ------------------------------------------------------------------------------ batch layout


def test_outputs_of_another_distribution_are_refused():
    """Greedy, top-k and top-p: their log-probabilities are not those of what drew them."""
    rollouts = Rollouts(torch.ones(1, 2, 4).long(), torch.ones(1, 2).long(), None, None)
    rollouts.from_policy = False
    with pytest.raises(ValueError, match="not the policy's own"):
        make_batch([[5]], rollouts, None, None, num_prompts=1, world_size=1)


def test_response_tokens_are_predicted_from_the_position_before():
    """The first response token is predicted at the prompt's last position, the last at T - 2."""
    batch = random_batch(lengths=((2, 3),), prompt_lengths=(4,))
    tokens_BT, predicted_N, targets_N = pad_rows(batch, [1, 0], CPU)
    assert tokens_BT.shape == (2, 7)
    assert predicted_N.tolist() == [3, 4, 5, 7 + 3, 7 + 4]
    assert targets_N.tolist() == batch.sequences[1][4:] + batch.sequences[0][4:]
    assert batch.token_positions([1, 0]).tolist() == [2, 3, 4, 0, 1]


def test_scoring_leaves_no_weight_gathered():
    """A sharded model scores alike, and all its weights are shards again: the reference's embedding
    and head would else stay whole beside the update."""
    model, batch = tiny_model(), random_batch()
    expected_N = score(model, batch)
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    try:
        model = shard(model, Dist(0, 0, 1, CPU, init_device_mesh("cpu", (1,))))
        assert torch.equal(score(model, batch), expected_N)
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
    finally:
        td.destroy_process_group()


def test_response_logprobs_equal_log_softmax_at_the_temperature():
    """Packed log-probabilities equal log_softmax(logits / T) of each row run alone, no padding."""
    model, batch = tiny_model(), random_batch()
    logp_N = score(model, batch, temperature=0.7, micro_batch_size=4)
    expected = []
    for row, start in zip(batch.sequences, batch.prompt_lengths, strict=True):
        logits_TV = model(torch.tensor([row]))[0].detach() / 0.7
        logp_TV = logits_TV.log_softmax(-1)
        expected += [logp_TV[t, row[t + 1]] for t in range(start - 1, len(row) - 1)]
    assert torch.allclose(logp_N, torch.stack(expected), atol=1e-12)


# ------------------------------------------------------------------------------ the objective


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_is_the_coefficient_times_grad_logp(kl_coef, temperature):
    """At rho = 1 the gradient is sum_t w (A + beta (pi_ref/pi - 1)) grad logp (Sec. 4, 5.2)."""
    model, batch = tiny_model(), random_batch()
    batch.ref_logp_N = score(tiny_model(seed=1), batch, temperature=temperature)
    flat, _ = gradient(model, batch, Objective(0.2, 0.2, kl_coef, temperature), [range(6)])
    surrogate, offset = 0.0, 0
    for r, row in enumerate(batch.sequences):
        logp_TV = model(torch.tensor([row]))[0].div(temperature).log_softmax(-1)
        for t in range(batch.prompt_lengths[r] - 1, len(row) - 1):
            logp = logp_TV[t, row[t + 1]]
            ref_over_pi = (batch.ref_logp_N[offset] - logp.detach()).exp()
            coefficient = batch.advantages_N[offset] + kl_coef * (ref_over_pi - 1)
            surrogate = surrogate - batch.weights_N[offset] * coefficient * logp
            offset += 1
    model.zero_grad()
    surrogate.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (flat - expected).abs().max() < 1e-9 * expected.abs().max() + 1e-12
    assert expected.norm() > 0.01


def test_clipping_stops_the_gradient_only_where_the_ratio_leaves_on_the_gaining_side():
    """Clipped are A > 0 above 1 + eps and A < 0 below 1 - eps, and only those (Eq. 3)."""
    model = tiny_model()
    batch = random_batch(((4, 4),), (3,), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    logp_N = score(model, batch)
    ratios = torch.tensor([1.21, 0.6, 1.19, 0.81, 1.6, 0.79, 1.19, 0.81], dtype=torch.float64)
    shift = ratios.log()
    batch.old_logp_N = logp_N - shift
    flat, sums = gradient(model, batch, Objective(0.2, 0.2, 0.0, 1.0), [range(2)])
    assert (sums["clip_high"], sums["clip_low"]) == (1, 1)
    surrogate, kept = 0.0, [1, 2, 3, 4, 6, 7]  # token 0 (A>0, high) and token 5 (A<0, low) drop
    offset = 0
    for r, row in enumerate(batch.sequences):
        logp_TV = model(torch.tensor([row]))[0].log_softmax(-1)
        for t in range(batch.prompt_lengths[r] - 1, len(row) - 1):
            if offset in kept:
                logp = logp_TV[t, row[t + 1]]
                weight = batch.weights_N[offset] * batch.advantages_N[offset]
                surrogate = surrogate - weight * shift[offset].exp() * logp
            offset += 1
    model.zero_grad()
    surrogate.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (flat - expected).abs().max() < 1e-10 * expected.abs().max()


def test_update_raises_the_probability_of_the_better_output():
    """One update moves log-probability from the output with A < 0 to the one with A > 0."""
    model = tiny_model()
    batch = random_batch(((4, 4),), (3,), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    before = score(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    update(model, optimizer, batch)
    change = score(model, batch) - before
    assert change[:4].sum() > 0 > change[4:].sum()


def test_gradient_that_is_not_finite_leaves_the_weights_alone():
    """A NaN in the gradient skips the step: weights and optimizer state stay as they were."""
    model, batch = tiny_model(), random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    model.blocks[0].ffn.up_proj.weight.register_hook(lambda grad: grad * float("nan"))
    metrics = update(model, optimizer, batch)
    assert metrics["stepped"] == 0.0 and not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_sampler_gap_is_that_of_trained_tokens():
    """Mean and largest difference of the sampler's log-probabilities are worked out over the tokens
    that have a weight; what an output without one differs by counts in neither."""
    model, batch = tiny_model(), random_batch()
    batch.weights_N[batch.token_positions([1])] = 0.0
    logp_N, gaps_N = score(model, batch), torch.linspace(-0.3, 0.2, sum(batch.response_lengths))
    batch.sampler_logp_N = logp_N + gaps_N
    skipped_N = batch.token_positions([1])
    batch.sampler_logp_N[skipped_N] += 9.0
    trained = torch.ones(len(gaps_N), dtype=torch.bool)
    trained[skipped_N] = False
    step = update(model, torch.optim.SGD(model.parameters(), lr=1.0), batch)
    metrics = update_metrics([step, {**step, "sampler_gap_max": 0.0}], 0.0)
    expected_N = gaps_N[trained].abs().double()
    assert metrics["sampler_gap"] == pytest.approx(expected_N.mean().item(), rel=1e-6)
    assert metrics["sampler_gap_max"] == pytest.approx(expected_N.max().item(), rel=1e-6)


def test_a_batch_holds_advantages_and_weights_per_token():
    """[P, G, T] values land on their token; [P, G] ones on every token of their output; the
    gradient is the sum of each token's own coefficient."""
    model, batch = tiny_model(), random_batch()
    rollouts_PGT = torch.zeros(2, 3, max(batch.response_lengths), dtype=torch.float64)
    lengths_PG = torch.tensor(batch.response_lengths).view(2, 3)
    place_PGT = torch.arange(rollouts_PGT.numel()).view(rollouts_PGT.shape).double()
    prompts = [batch.sequences[r][: batch.prompt_lengths[r]] for r in (0, 3)]
    rollouts = Rollouts(place_PGT.long(), lengths_PG, rollouts_PGT, lengths_PG > 0)
    per_token = make_batch(
        prompts, rollouts, place_PGT, lengths_PG.double(), num_prompts=2, world_size=1
    )
    is_response_PGT = torch.arange(rollouts_PGT.shape[2]) < lengths_PG[..., None]
    assert per_token.advantages_N.tolist() == place_PGT[is_response_PGT].tolist()
    expected = [float(n) for n in batch.response_lengths for _ in range(n)]
    assert per_token.weights_N.tolist() == expected
    for row, (sequence, length) in enumerate(zip(per_token.sequences, per_token.response_lengths)):
        assert sequence == [
            *prompts[row // 3],
            *place_PGT.flatten(0, 1)[row, :length].int().tolist(),
        ]
    signs_N = torch.tensor([1.0, -2.0, 0.5]).double().repeat(len(batch.advantages_N))
    batch.advantages_N = signs_N[: len(batch.advantages_N)]
    flat, _ = gradient(model, batch, Objective(0.2, 0.2, 0.0, 1.0), [range(6)])
    surrogate, offset = 0.0, 0
    for r, row in enumerate(batch.sequences):
        logp_TV = model(torch.tensor([row]))[0].log_softmax(-1)
        for t in range(batch.prompt_lengths[r] - 1, len(row) - 1):
            weight = batch.weights_N[offset] * batch.advantages_N[offset]
            surrogate, offset = surrogate - weight * logp_TV[t, row[t + 1]], offset + 1
    model.zero_grad()
    surrogate.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (flat - exact).abs().max() < 1e-10 * exact.abs().max()


# ------------------------------------------------------------------------------ without a KL


@pytest.mark.parametrize("num_parts", [1, 3])
def test_outputs_of_advantage_0_need_not_pass_the_model(num_parts):
    """Without a KL they have no gradient: the update is the same with and without them, the passes
    are as few as the others fill, and metrics are means over the tokens of the others."""
    advantages_PG = torch.tensor([[0.0, 0.0], [0.7, -0.7], [0.0, 0.4]], dtype=torch.float64)
    results = []
    for passes_all in (True, False):
        batch = random_batch(advantages=advantages_PG)
        if not passes_all:
            batch.weights_N = drop_without_gradient(batch.weights_N, batch.advantages_N)
        batch.agree_on_passes(num_parts, ALONE)
        model = tiny_model()
        if num_parts > 1:
            batch.old_logp_N = score(tiny_model(seed=1), batch, num_parts=num_parts)
        passed = [len(tokens) for tokens in passed_tokens(model, batch, num_parts)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        steps = [
            policy_update(
                model, optimizer, batch, Objective(0.2, 0.2, 0.0, 1.0), lr=0.5, max_grad_norm=None,
                micro_batch_size=1, dist=ALONE, part=part, num_parts=num_parts,
            )
            for part in range(num_parts)
        ]  # fmt: skip
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        results.append(
            (weights, update_metrics(steps, 0.0), sum(s["tokens"] for s in steps), passed)
        )
    (full, all_metrics, all_tokens, all_passed), (fewer, metrics, tokens, passed) = results
    assert torch.allclose(full, fewer, rtol=0, atol=1e-14)
    assert (all_tokens, tokens) == (24, 1 + 5 + 2)
    assert metrics["loss"] == pytest.approx(all_metrics["loss"], abs=1e-14)
    assert metrics["grad_norm"] == pytest.approx(all_metrics["grad_norm"], rel=1e-12)
    assert metrics["entropy"] != all_metrics["entropy"]
    assert len(all_passed) == 6 and all(all_passed)
    assert sum(1 for length in passed if length) == 3
    assert len(passed) == {1: 3, 3: 6}[num_parts]  # each part as many as the fullest: 0, 2, 1


def passed_tokens(model, batch, num_parts):
    rows = [batch.micro_batches(1, part, num_parts) for part in range(num_parts)]
    return [[batch.sequences[row] for row in few] for part in rows for few in part]


def test_metrics_of_no_token_are_not_numbers():
    """With every group constant and no KL nothing passes: the step is empty, and what is said of
    tokens (entropy, gap, ratio) is NaN, not an entropy of 0."""
    batch = random_batch(advantages=torch.zeros(3, 2, dtype=torch.float64))
    batch.weights_N = drop_without_gradient(batch.weights_N, batch.advantages_N)
    batch.agree_on_passes(1, ALONE)
    model = tiny_model()
    metrics = update_metrics(
        [update(model, torch.optim.SGD(model.parameters(), lr=1.0), batch)], 0.0
    )
    named = {name for name, value in metrics.items() if value != value}
    assert named == {*PER_TOKEN, *METRIC_MAXIMA}
    assert (metrics["loss"], metrics["empty_steps"], metrics["stepped"]) == (0.0, 1.0, 1.0)
