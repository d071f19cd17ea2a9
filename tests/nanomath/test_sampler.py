"""The plain sampler draws the engine's tokens; one function says who sees whom, everywhere."""

import dataclasses
import random

import pytest
import torch

from nanomath import model as models
from nanomath import sampler
from nanomath.engine import stream
from nanomath.model import ModelConfig, Transformer

CFG = ModelConfig(
    vocab_size=53, num_layers=2, width=24, num_heads=4, num_kv_heads=2, ffn_width=40, max_context=96
)
HOW = {"max_new_tokens": 30, "eos_ids": (7, 11), "seed": 3, "step": 2}


def make_model(dtype=torch.float64, **changes) -> Transformer:
    model = Transformer(dataclasses.replace(CFG, **changes))
    model.init_weights(5, std=0.2)
    return model.to(dtype)


def make_prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(53) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_the_engine_draws_the_plain_samplers_tokens(kv_heads, temperature, dtype, atol):
    """Tokens, lengths and ends are the same, log-probabilities to rounding; a prompt that all but
    fills the context is cut off by it."""
    model, prompts = make_model(dtype, num_kv_heads=kv_heads), make_prompts(3, 17, 1, 90)
    how = {**HOW, "temperature": temperature, "vocab_limit": 50, "prompt_ids": [5, 5, 0, 9]}
    plain = sampler.sample_groups(model, prompts, 4, **how)
    fast = stream.sample_groups(model, prompts, 4, max_rows=6, **how)
    assert torch.equal(plain.tokens_PGT, fast.tokens_PGT)
    assert torch.equal(plain.lengths_PG, fast.lengths_PG)
    assert torch.equal(plain.finished_PG, fast.finished_PG)
    torch.testing.assert_close(plain.logp_PGT, fast.logp_PGT, rtol=0, atol=atol)
    assert plain.from_policy == fast.from_policy == (temperature > 0)
    assert plain.lengths_PG[3].max() <= 6 and plain.tokens_PGT.max() < 50
    if temperature:
        assert plain.finished_PG.any() and not plain.finished_PG.all()
        assert len(set(plain.lengths_PG.flatten().tolist())) > 4


def test_a_prompt_is_run_once_and_then_one_token_of_each_output_a_pass(monkeypatch):
    """The passes of a group are [1, prompt], then [G, 1] for every token but the last."""
    model, shapes = make_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: (shapes.append(tuple(a[0].shape)), forward(*a, **k))[1]
    )
    rollouts = sampler.sample_groups(model, make_prompts(9), 3, **HOW)
    longest = int(rollouts.lengths_PG.max())
    ran_on = not rollouts.finished_PG.all()  # the pass after the last token is not left out
    assert shapes == [(1, 9)] + [(3, 1)] * (longest - 1 + ran_on)


@pytest.mark.parametrize("name, value", [("stop", ("a",)), ("max_rows", 8), ("top_k", 5)])
def test_what_the_plain_sampler_has_not_is_one_clear_error(name, value):
    """Stop strings, refill and truncated distributions are refused by name."""
    with pytest.raises(ValueError, match=f"the plain sampler has no {name}: take the engine"):
        sampler.sample_groups(make_model(), make_prompts(3), 2, **HOW, **{name: value})
    with pytest.raises(ValueError, match="prompts of 1 to max_context - 1 tokens"):
        sampler.sample_groups(make_model(), make_prompts(96), 2, **HOW)


def test_no_prompts_are_no_rollouts():
    """A rank without questions gets empty rollouts of the right shape."""
    for module in (sampler, stream):
        rollouts = module.sample_groups(make_model(), [], 4, **HOW)
        assert rollouts.lengths_PG.shape == (0, 4) and rollouts.tokens_PGT.shape[:2] == (0, 4)


def test_diverged_weights_are_named():
    """NaN logits end sampling with a line that says so."""
    model = make_model()
    model.final_norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sampler.sample_groups(model, make_prompts(3), 2, **HOW)


WINDOW = 5


def windowed(query_position, key_position):
    distance = query_position - key_position
    return (distance >= 0) & (distance < WINDOW)


def logits_by_hand(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """The logits of a full pass with an explicit mask of a sliding window."""
    place_T = torch.arange(len(tokens))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    mask.masked_fill_(~windowed(place_T[:, None], place_T), float("-inf"))
    real = models.attend
    try:
        models.attend = lambda query, key, value, _: real(query, key, value, mask[None, None])
        return model(torch.tensor([tokens]))[0]
    finally:
        models.attend = real


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_sliding_window_is_one_change(monkeypatch, kv_heads):
    """With another `visible` a full pass, packed segments, the plain sampler and the engine, with
    rows that join and leave, all compute the sliding window's attention."""
    model, prompts = make_model(num_kv_heads=kv_heads), make_prompts(3, 17, 1, 30)
    tokens = make_prompts(40)[0]
    causal, expected = model(torch.tensor([tokens]))[0], logits_by_hand(model, tokens)
    assert (causal - expected).abs().max() > 0.1
    monkeypatch.setattr(models, "visible", windowed)
    monkeypatch.setattr(sampler, "visible", windowed)
    monkeypatch.setattr(models, "IS_CAUSAL", False)
    torch.testing.assert_close(model(torch.tensor([tokens]))[0], expected, rtol=0, atol=1e-12)
    segments = torch.tensor([[0] * 13 + [1] * 27])
    positions = torch.cat((torch.arange(13), torch.arange(27)))[None]
    packed = model(torch.tensor([tokens]), segments_BT=segments, positions_BT=positions)[0]
    apart = torch.cat([logits_by_hand(model, part) for part in (tokens[:13], tokens[13:])])
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-6)  # fp32 angles
    for module, limits in ((sampler, {}), (stream, {"max_rows": 5})):
        rollouts = module.sample_groups(model, prompts, 4, **HOW, **limits)
        for p, prompt in enumerate(prompts):
            for g in range(4):
                length = rollouts.lengths_PG[p, g]
                output = rollouts.tokens_PGT[p, g, :length].tolist()
                logp_TV = logits_by_hand(model, prompt + output)[len(prompt) - 1 : -1]
                logp_T = logp_TV.log_softmax(-1).gather(1, torch.tensor(output)[:, None])[:, 0]
                got_T = rollouts.logp_PGT[p, g, :length]
                torch.testing.assert_close(got_T, logp_T, rtol=0, atol=1e-10)
