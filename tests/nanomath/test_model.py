"""Packing, causality and head_fn change nothing; transformers is the peer in test_hf.py."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from nanomath.model import MODEL_PRESETS, ModelConfig, Transformer

SMALL = ModelConfig(
    vocab_size=61, num_layers=2, width=24, num_heads=4, num_kv_heads=2, ffn_width=40, max_context=64
)


def small_model(cfg: ModelConfig = SMALL, *, seed: int = 0) -> Transformer:
    """Weights ten times larger than at the start of training: attention then is not flat."""
    model = Transformer(cfg)
    model.init_weights(seed, std=0.2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def random_tokens(rows: int, length: int, *, seed: int = 1, vocab: int = 61) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_packed_segments_equal_separate_sequences():
    """Sequences packed in one row with segments and restarted positions give the same logits."""
    model = small_model()
    lengths = (7, 1, 12, 5)
    parts = [random_tokens(1, n, seed=n)[0] for n in lengths]
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(torch.cat(parts)[None], segments_BT=segments, positions_BT=positions)[0]
    apart = torch.cat([model(part[None])[0] for part in parts])
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-6)  # fp32 angles
    unpacked = model(torch.cat(parts)[None])[0]
    assert (unpacked - apart).abs().max() > 0.1  # the segments did matter


def test_causal_and_relative():
    """A token changes no earlier logits; shifting all positions changes none (rotary)."""
    model = small_model()
    tokens_BT = random_tokens(2, 20)
    logits = model(tokens_BT)
    changed = tokens_BT.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 61
    other = model(changed)
    assert torch.equal(other[:, :11], logits[:, :11])
    assert (other[:, 11:] - logits[:, 11:]).abs().amax(-1).min() > 1e-6
    shifted = model(tokens_BT, positions_BT=torch.arange(30, 50)[None])
    torch.testing.assert_close(shifted, logits, rtol=0, atol=1e-4)  # fp32 angles
    assert not torch.equal(shifted, logits)


def test_head_fn_equals_logits():
    """head_fn gets the final hidden states and the head's weight: their product is the logits."""
    model = small_model()
    tokens_BT = random_tokens(2, 9)
    seen = model(tokens_BT, head_fn=lambda hidden, head: (hidden, head))
    assert seen[1] is model.head.weight
    assert torch.equal(F.linear(*seen), model(tokens_BT))


def test_init_is_a_function_of_the_seed():
    """init_weights depends on its seed alone, not on the global generator or earlier weights."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True)
    first, second, third = (Transformer(cfg) for _ in range(3))
    first.init_weights(3)
    state = torch.get_rng_state()
    torch.randn(10)
    second.init_weights(3)
    second.init_weights(3)
    third.init_weights(4)
    torch.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), third.parameters()):
        assert torch.equal(a, b), name
        if a.ndim > 1:
            assert not torch.equal(a, c), name
            assert abs(float(a.detach().std()) / 0.02 - 1) < 0.15, name
        else:
            assert torch.equal(a, torch.full_like(a, 0.0 if "bias" in name else 1.0)), name


def test_num_parameters():
    """The count equals the modules', and those of the paper's shapes: 6.91B and, embeddings
    included, 1.63B."""
    for cfg in (SMALL, dataclasses.replace(SMALL, tied_head=True, head_width=10, num_heads=6)):
        counted = sum(p.numel() for p in Transformer(cfg).parameters())
        assert cfg.num_parameters == counted
    for name, billions in (("deepseek_llm_7b", 6.91), ("deepseek_llm_1b3", 1.63)):
        cfg = MODEL_PRESETS[name]
        with torch.device("meta"):
            counted = sum(p.numel() for p in Transformer(cfg).parameters())
        assert cfg.num_parameters == counted
        assert round(counted / 1e9, 2) == billions


def test_bf16_keeps_positions_apart():
    """In bf16 the angles stay fp32: positions 256 to 260 give different rotations."""
    model = small_model(dataclasses.replace(SMALL, max_context=512)).bfloat16()
    tokens_BT = random_tokens(1, 8)
    outs = [
        model(tokens_BT, positions_BT=torch.tensor([[0, 1, 2, 3, 4, 5, 6, last]]))
        for last in (256, 257)
    ]
    exact = [
        small_model(dataclasses.replace(SMALL, max_context=512))(
            tokens_BT, positions_BT=torch.tensor([[0, 1, 2, 3, 4, 5, 6, last]])
        )
        for last in (256, 257)
    ]
    assert not torch.equal(outs[0][0, -1], outs[1][0, -1])
    moved = (outs[1] - outs[0])[0, -1].double()
    truth = (exact[1] - exact[0])[0, -1]
    assert F.cosine_similarity(moved, truth, dim=0) > 0.9


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_heads": 5, "num_kv_heads": 5}, "width 24 is not a multiple of num_heads 5"),
        ({"head_width": 7}, "head width 7 is odd"),
        ({"ffn_width": 0}, "ffn_width is 0"),
        ({"rope_factor": 0.0}, "rope_factor is 0.0; it must be finite and > 0"),
        ({"rope_original_context": 0}, "rope_original_context is 0"),
        ({"rope_low_freq": 4.0}, "rope_high_freq 4.0 must be more than rope_low_freq 4.0"),
    ],
)
def test_impossible_shapes_are_named(change, words):
    """A configuration that cannot be built says which fields disagree."""
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


def test_rows_longer_than_the_context_are_refused():
    """More tokens than max_context is an error that names both numbers."""
    with pytest.raises(ValueError, match="65 tokens in a row, but max_context is 64"):
        small_model()(random_tokens(1, 65))
