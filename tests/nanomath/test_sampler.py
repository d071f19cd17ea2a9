"""The group sampler against full forward passes, a cache-free loop and exact distributions."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

from nanomath import sampler
from nanomath.checkpoint import save
from nanomath.dist import setup
from nanomath.model import ModelConfig, Transformer
from nanomath.sampler import choose_tokens, sample_groups, stream_keys, uniform_noise
from nanomath.tokenizer import Tokenizer

CFG = ModelConfig(
    vocab_size=53, num_layers=2, width=24, num_heads=4, num_kv_heads=2, ffn_width=40, max_context=96
)
EOS = (7, 11)


def make_model(cfg: ModelConfig = CFG, *, dtype=torch.float64, std: float = 0.2) -> Transformer:
    model = Transformer(cfg)
    model.init_weights(5, std=std)
    return model.to(dtype)


def make_prompts(lengths, *, seed: int = 0, vocab: int = 53) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


def sample(model, prompts, group_size=4, **kwargs):
    settings = {"max_new_tokens": 24, "eos_ids": EOS} | kwargs
    return sample_groups(model, prompts, group_size, **settings)


def response(rollouts, p: int, g: int) -> list[int]:
    return rollouts.tokens_PGT[p, g, : rollouts.lengths_PG[p, g]].tolist()


def full_logp(model, prompt, tokens, temperature) -> torch.Tensor:
    logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].detach()
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def assert_same(a, b) -> None:
    assert torch.equal(a.lengths_PG, b.lengths_PG)
    assert torch.equal(a.tokens_PGT, b.tokens_PGT)
    assert torch.equal(a.finished_PG, b.finished_PG)
    torch.testing.assert_close(a.logp_PGT, b.logp_PGT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_logp_equals_full_forward(dtype, tolerance, kv_heads, temperature):
    """Every logp equals the full forward pass on that text at that temperature (greedy: at 1)."""
    model = make_model(dataclasses.replace(CFG, num_kv_heads=kv_heads), dtype=dtype)
    prompts = make_prompts([3, 17, 1, 9])
    rollouts = sample(model, prompts, temperature=temperature, max_new_tokens=40)
    lengths = rollouts.lengths_PG.flatten().tolist()
    assert temperature == 0 or (min(lengths) < 10 and max(lengths) > 20)  # rows were dropped
    assert rollouts.logp_PGT.dtype == dtype
    for p, prompt in enumerate(prompts):
        for g in range(4):
            tokens = response(rollouts, p, g)
            expected = full_logp(model, prompt, tokens, temperature or 1.0)
            got = rollouts.logp_PGT[p, g, : len(tokens)]
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
            assert not rollouts.logp_PGT[p, g, len(tokens) :].any()
            assert not rollouts.tokens_PGT[p, g, len(tokens) :].any()


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_greedy_equals_a_loop_without_cache(kv_heads):
    """Temperature 0 gives, for unequal prompts in one batch, the argmax loop's tokens."""
    model = make_model(dataclasses.replace(CFG, num_kv_heads=kv_heads))
    prompts = make_prompts([1, 5, 30, 12, 2], seed=3)
    rollouts = sample(model, prompts, group_size=2, temperature=0.0)
    ended = 0
    for p, prompt in enumerate(prompts):
        text = list(prompt)
        while len(text) - len(prompt) < 24 and (text == prompt or text[-1] not in EOS):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        for g in range(2):
            assert response(rollouts, p, g) == text[len(prompt) :]
            assert bool(rollouts.finished_PG[p, g]) == (text[-1] in EOS)
        ended += text[-1] in EOS
    assert 0 < ended < 5


def test_a_sample_depends_on_nothing_beside_it():
    """Neighbours, order, padding, max_rows and group size change no token (float64)."""
    model = make_model()
    prompts = make_prompts([3, 17, 1, 9, 40])
    ids = [100, 7, 2**40, -3, 0]
    whole = sample(model, prompts, prompt_ids=ids)
    assert len({int(n) for n in whole.lengths_PG.flatten()}) > 4
    order = [4, 2, 0, 3, 1]
    shuffled = sample(model, [prompts[p] for p in order], prompt_ids=[ids[p] for p in order])
    for i, p in enumerate(order):
        for g in range(4):
            assert response(shuffled, i, g) == response(whole, p, g)
    for p in range(5):
        alone = sample(model, [prompts[p]], prompt_ids=[ids[p]])
        assert torch.equal(alone.lengths_PG[0], whole.lengths_PG[p])
        single = sample(model, [prompts[p]], group_size=1, prompt_ids=[ids[p]])
        for g in range(4):
            assert response(alone, 0, g) == response(whole, p, g)
        assert response(single, 0, 0) == response(whole, p, 0)
    for max_rows in (1, 3, 4, 9, 20):
        assert_same(sample(model, prompts, prompt_ids=ids, max_rows=max_rows), whole)
    shorter = sample(model, prompts, prompt_ids=ids, max_new_tokens=6)
    for p in range(5):
        for g in range(4):
            assert response(shorter, p, g) == response(whole, p, g)[:6]


def test_samples_differ_by_every_counter():
    """Sample index, prompt id, step and seed each open another stream."""
    model = make_model(std=0.02)  # nearly uniform over 53 ids
    prompt = make_prompts([5])[0]
    first = sample(model, [prompt, prompt], group_size=8, eos_ids=())
    rows = [tuple(response(first, p, g)) for p in range(2) for g in range(8)]
    assert len(set(rows)) == 16
    assert len({row[0] for row in rows}) > 6  # they part at the first token
    for change in ({"seed": 1}, {"step": 1}, {"prompt_ids": [1, 2]}):
        other = sample(model, [prompt, prompt], group_size=8, eos_ids=(), **change)
        assert (other.tokens_PGT == first.tokens_PGT).float().mean() < 0.3 + 0.5 * (
            "prompt_ids" in change
        )
    assert_same(sample(model, [prompt, prompt], group_size=8, eos_ids=()), first)


def test_uniform_noise_is_splitmix64():
    """The hash equals splitmix64 in Python integers, and its uniforms are flat and independent."""
    mask = (1 << 64) - 1

    def splitmix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    prompts, samples = [3, 2**70, -9], [0, 2**31]
    keys_PG = stream_keys(-1, 2**63 + 5, prompts, samples)
    for p, g in itertools.product(range(3), range(2)):
        key = 0
        for counter in (-1, 2**63 + 5, prompts[p], samples[g]):
            key = splitmix((key + counter) & mask)
        for t in range(4):
            expected = (splitmix((key + t * 0x9E3779B97F4A7C15) & mask) >> 11) * 2.0**-53
            assert float(uniform_noise(keys_PG[p, g], torch.tensor(t))) == expected
    keys_R = stream_keys(0, 0, range(40), range(25)).flatten()
    many = uniform_noise(keys_R, torch.arange(50)[:, None])
    counts = torch.histc(many.float(), bins=64, min=0, max=1).double()
    expected = many.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * math.sqrt(126)
    centred = many - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs(float((a * b).mean()) * 12) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("temperature, vocab_limit", [(1.0, 53), (0.6, 53), (1.3, 40)])
def test_frequencies_match_the_distribution(temperature, vocab_limit):
    """Chi-square: the first and second tokens follow softmax(logits / temperature)."""
    model = make_model(dtype=torch.float32)
    prompt, num = make_prompts([6])[0], 20_000
    rollouts = sample(
        model,
        [prompt],
        group_size=num,
        temperature=temperature,
        vocab_limit=vocab_limit,
        max_new_tokens=2,
        eos_ids=(),
        max_rows=num,
    )
    logits = model(torch.tensor([prompt]))[0, -1].detach().double() / temperature
    first = logits[:vocab_limit].softmax(-1)
    everything = [prompt + [token] for token in range(vocab_limit)]
    after = (model(torch.tensor(everything))[:, -1].detach().double() / temperature)[
        :, :vocab_limit
    ]
    second = first @ after.softmax(-1)
    for t, probs in enumerate((first, second)):
        counts = torch.bincount(rollouts.tokens_PGT[0, :, t], minlength=vocab_limit).double()
        assert len(counts) == vocab_limit
        expected = probs * num
        keep = expected >= 5
        assert keep.sum() >= 10
        statistic = float(((counts - expected) ** 2 / expected)[keep].sum())
        freedom = int(keep.sum())
        assert statistic < freedom + 4 * math.sqrt(2 * freedom), (t, statistic, freedom)


def test_choose_tokens_at_the_edges():
    """Ids of probability 0 are never drawn, u = 0 and u just below 1 stay inside, both levels."""
    for vocab in (1, 2, 5, 9, 50, 1024):
        logits = torch.full((vocab,), -math.inf)
        alive = sorted({0, vocab // 3, vocab - 1} - ({0} if vocab > 3 else set()))
        logits[alive] = torch.linspace(-1, 1, len(alive))
        uniform = torch.cat([torch.linspace(0, 1, 200, dtype=torch.float64)[:-1]] * 2)
        uniform[-1] = 1 - 2**-53
        rows = logits.expand(len(uniform), vocab)
        tokens, logp = choose_tokens(rows, uniform, temperature=1.0, vocab_limit=vocab)
        assert set(tokens.tolist()) == set(alive)
        assert tokens[0] == alive[0] and tokens[-1] == alive[-1]
        torch.testing.assert_close(logp, rows.log_softmax(-1)[0, tokens], rtol=0, atol=1e-6)
        assert (tokens[:199].diff() >= 0).all()  # the inverse CDF is monotone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choose_tokens_at_block_boundaries(dtype):
    """Where rounding puts u on the wrong side of a block's end, no id of weight 0 is drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(400, 64, generator=generator, dtype=dtype)
    logits.view(400, 8, 8)[..., [0, 7]] = -math.inf  # each block of 8 begins and ends with none
    blocks = logits.softmax(-1).view(400, 8, 8).sum(-1).double()
    ends = blocks.cumsum(-1) / blocks.sum(-1, keepdim=True)
    for k in range(7):
        below, above = (torch.nextafter(ends[:, k], torch.tensor(x).double()) for x in (0, 1))
        for uniform in (below, ends[:, k], above):
            tokens, logp = choose_tokens(logits, uniform, temperature=1.0, vocab_limit=64)
            assert logp.isfinite().all()
            assert ((tokens // 8 == k) | (tokens // 8 == k + 1)).all()


def test_vocab_limit_is_never_exceeded():
    """Ids from vocab_limit on are never sampled, whatever their logits; logp is the full one."""
    model = make_model()
    model.head.weight.data[30:] *= 8
    prompts = make_prompts([4, 6], vocab=30)
    for temperature in (0.0, 1.0):
        free = sample(model, prompts, temperature=temperature)
        assert free.tokens_PGT.max() >= 30
        bound = sample(model, prompts, temperature=temperature, vocab_limit=30)
        assert bound.tokens_PGT.max() < 30
        tokens = response(bound, 0, 1)
        expected = full_logp(model, prompts[0], tokens, 1.0)
        torch.testing.assert_close(bound.logp_PGT[0, 1, : len(tokens)], expected)


def test_eos_is_kept_and_counted():
    """The sampled EOS is the last token; a row without one is truncated at max_new_tokens."""
    rollouts = sample(make_model(), make_prompts([3, 8, 2]), group_size=8)
    kinds = set()
    for p in range(3):
        for g in range(8):
            tokens = response(rollouts, p, g)
            finished = bool(rollouts.finished_PG[p, g])
            assert not set(tokens[:-1]) & set(EOS)
            assert finished == (tokens[-1] in EOS)
            assert finished or len(tokens) == 24
            kinds.add((finished, tokens[-1] if finished else None))
    assert len(kinds) == 3  # either EOS, and truncation


def test_padding_value_may_be_an_eos():
    """Id 0 pads the result; as an EOS and as an ordinary token it is counted by lengths alone."""
    model = make_model()
    prompts = make_prompts([3, 8])
    as_eos = sample(model, prompts, eos_ids=(0,), group_size=16, max_new_tokens=60)
    assert as_eos.finished_PG.any() and not as_eos.finished_PG.all()
    for p in range(2):
        for g in range(16):
            tokens = response(as_eos, p, g)
            assert tokens.count(0) == int(as_eos.finished_PG[p, g])
    never = sample(model, prompts, eos_ids=(), group_size=16, max_new_tokens=60)
    assert (never.lengths_PG == 60).all() and not never.finished_PG.any()
    assert (never.tokens_PGT == 0).any()


def test_context_limit():
    """Prompt and response never exceed max_context; rows that fill it are truncated there."""
    model = make_model()
    lengths = [96, 95, 90, 4]
    rollouts = sample(model, make_prompts(lengths), eos_ids=(), max_new_tokens=12)
    assert rollouts.lengths_PG.tolist() == [[0] * 4, [1] * 4, [6] * 4, [12] * 4]
    assert not rollouts.finished_PG.any()
    only_full = sample(model, make_prompts([96]), eos_ids=(0,))
    beside = sample(model, make_prompts([96, 3]), eos_ids=(0,))
    assert beside.lengths_PG[0].tolist() == [0] * 4 and not beside.finished_PG[0].any()
    assert only_full.tokens_PGT.shape == (1, 4, 0) and not only_full.finished_PG.any()


def test_nothing_to_do():
    """No new tokens and no prompts give empty results of the right shapes."""
    model = make_model()
    none = sample(model, make_prompts([3, 4]), max_new_tokens=0)
    assert none.tokens_PGT.shape == none.logp_PGT.shape == (2, 4, 0)
    assert none.lengths_PG.tolist() == [[0] * 4] * 2 and not none.finished_PG.any()
    assert sample(model, []).lengths_PG.shape == (0, 4)


def test_model_stays_trainable():
    """Sampling leaves no inference tensors behind: its results and the model still train."""
    model = make_model(dtype=torch.float32)
    rollouts = sample(model, make_prompts([3]))
    assert not rollouts.tokens_PGT.is_inference() and model.training
    tokens_BT = torch.cat((torch.ones(4, 1, dtype=torch.long), rollouts.tokens_PGT[0]), 1)
    logp = model(tokens_BT)[:, :-1].log_softmax(-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
    (logp.exp() * rollouts.logp_PGT[0]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompts": [[1], []], "prompt_ids": [4, 9]}, r"prompt 1 \(id 9\) is empty"),
        ({"prompts": [[1] * 97]}, r"prompt 0 \(id 0\) has 97 tokens, but .* max_context is 96"),
        ({"prompts": [[1, 53]]}, "prompt 0 .* ids outside 0..52"),
        ({"prompt_ids": [1, 2]}, "2 prompt_ids for 1 prompts"),
        ({"temperature": -0.5}, "temperature must be between 0"),
        ({"temperature": math.nan}, "temperature must be between 0"),
        ({"vocab_limit": 54}, "vocab_limit must be between 1 and 53, not 54"),
        ({"group_size": 0}, "group_size must be >= 1, not 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, not -1"),
        ({"max_rows": 0}, "max_rows must be >= 1, not 0"),
        ({"eos_ids": (7, 60)}, "every id in eos_ids must be between 0 and 52, not 60"),
    ],
)
def test_bad_arguments_are_named(change, words):
    """Each impossible argument is one error that names it and its bounds."""
    change = {"prompts": [[1, 2]], "group_size": 2} | change
    with pytest.raises(ValueError, match=words):
        sample(make_model(), change.pop("prompts"), **change)


def test_nan_weights_are_an_error():
    """A diverged model is reported, not sampled from."""
    model = make_model()
    model.final_norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        sample(model, [[1, 2]])


def test_command_prints_samples_of_a_checkpoint(tmp_path, capsys):
    """The command shows each sample's length and mean logp; the text is the decoded tokens."""
    with pytest.raises(SystemExit, match="--checkpoint DIR is missing"):
        sampler.main(sampler.Config())
    with pytest.raises(SystemExit, match="nowhere"):
        sampler.main(sampler.Config(checkpoint=str(tmp_path / "nowhere")))
    tokenizer = Tokenizer.train(["1 + 2 = 3, 4 - 3 = 1"] * 5, 280)
    cfg = dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size + 8)
    model = make_model(cfg, dtype=torch.float32)
    save(
        tmp_path,
        1,
        modules={"model": model},
        optimizer=None,
        state={},
        model_cfg=cfg,
        tokenizer=tokenizer,
        dist=setup("cpu", threads=1),
    )
    arguments = sampler.Config(
        checkpoint=str(tmp_path), prompt="1 +", num_samples=3, max_new_tokens=5
    )
    sampler.main(arguments)
    printed = capsys.readouterr().out
    expected = sample_groups(
        model,
        [tokenizer.encode("1 +", bos=True)],
        3,
        max_new_tokens=5,
        eos_ids=tokenizer.stop_ids,
        vocab_limit=tokenizer.sample_limit,
    )
    for g in range(3):
        length = int(expected.lengths_PG[0, g])
        mean = float(expected.logp_PGT[0, g, :length].mean())
        assert f"sample {g}: {length} tokens, " in printed and f"mean logp {mean:.3f}" in printed
