"""The group sampler against full forward passes, a cache-free loop and exact distributions."""

import dataclasses
import itertools
import math
import random
import weakref

import pytest
import torch

from nanomath.base.config import parse
from nanomath.dist import setup
from nanomath.draw import choose_tokens, stream_keys, uniform_noise
from nanomath.engine import packed as packed_weights
from nanomath.engine import scheduler
from nanomath.engine import stream as sampler
from nanomath.engine.stream import sample_groups, sample_stream
from nanomath.hub.hf import llama_name
from nanomath.model import ModelConfig, Transformer
from nanomath.play import sample as sample_module
from nanomath.run.checkpoint import Checkpoints
from nanomath.text.tokenizer import Tokenizer

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
    device = model.embedding.weight.device
    text = torch.tensor([prompt + tokens], device=device)
    logits = model(text)[0, len(prompt) - 1 : -1].detach().cpu()
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
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


@pytest.mark.parametrize("change", [{}, {"qkv_bias": True}, {"tied_head": True}])
def test_packed_weights_are_the_models(monkeypatch, change):
    """With every product repacked, logp stays the full pass's (1e-5); the model is untouched."""
    monkeypatch.setattr(packed_weights, "SMALL_WEIGHT", 0)
    model = make_model(dataclasses.replace(CFG, **change), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {type(m) for m in packed_weights.packed(model).modules()}
    assert packed_weights.PackedLinear in kinds and torch.nn.Linear not in kinds
    prompts = make_prompts([3, 17, 1])
    for turn in range(2):
        rollouts = sample(model, prompts, seed=turn)
        for p, g in itertools.product(range(3), range(4)):
            tokens = response(rollouts, p, g)
            got = rollouts.logp_PGT[p, g, : len(tokens)]
            expected = full_logp(model, prompts[p], tokens, 1.0)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items()) or turn
        model.blocks[1].ffn.up_proj.weight.data.mul_(1.5)  # an update: the next call sees it
    assert packed_weights.packed(model.double()) is model
    monkeypatch.undo()
    assert packed_weights.packed(model.float()) is model  # nothing in it is large


def test_a_prompt_without_room_is_not_run(monkeypatch):
    """No new tokens, or a prompt that fills the context: its samples come without a pass."""
    model, lengths = make_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: (lengths.append(a[0].shape[1]), forward(*a, **k))[1]
    )
    sample(model, make_prompts([3, 4]), max_new_tokens=0)
    sample(model, make_prompts([96, 96]))
    assert lengths == []
    mixed = sample(model, make_prompts([96, 5, 96]))
    assert max(lengths) == 5 and mixed.lengths_PG[[0, 2]].sum() == 0 < mixed.lengths_PG[1].min()


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


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_equals_transformers_generate(kv_heads):
    """Temperature 0 gives, token for token, what Llama's greedy generate does on these weights."""
    transformers = pytest.importorskip("transformers")
    cfg = dataclasses.replace(CFG, num_kv_heads=kv_heads)
    model = make_model(cfg)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.width,
            intermediate_size=cfg.ffn_width,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=cfg.max_context,
            rms_norm_eps=cfg.rms_eps,
            rope_theta=cfg.rope_theta,
        )
    ).double()
    peer.load_state_dict({llama_name(name): weight for name, weight in model.state_dict().items()})
    prompts = make_prompts([1, 5, 30, 12, 2, 17], seed=3)
    rollouts = sample(model, prompts, group_size=1, temperature=0.0, max_rows=4)
    ids = torch.tensor([[0] * (30 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (30 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": list(EOS)}
    out = peer.generate(ids, attention_mask=mask, pad_token_id=0, **settings)[:, 30:]
    assert len({int(n) for n in rollouts.lengths_PG}) > 2
    for p in range(6):
        length = int(rollouts.lengths_PG[p, 0])
        assert response(rollouts, p, 0) == out[p, :length].tolist()
        assert not out[p, length:].any()


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
    for max_rows, static in itertools.product((1, 3, 4, 9, 20), (False, True)):
        parts = sample(model, prompts, prompt_ids=ids, max_rows=max_rows, static=static)
        assert_same(parts, whole)
    shorter = sample(model, prompts, prompt_ids=ids, max_new_tokens=6)
    for p in range(5):
        for g in range(4):
            assert response(shorter, p, g) == response(whole, p, g)[:6]


@pytest.mark.parametrize("group_size, max_rows", [(4, 7), (1, 3), (9, 4)])
@pytest.mark.parametrize("static", [False, True])
def test_rows_are_refilled_and_memory_is_bounded(monkeypatch, group_size, max_rows, static):
    """Waiting samples take the rows of ended ones; nothing moves in memory; no result changes."""
    model, decoders, busy, shapes = make_model(), [], [], set()

    class Watched(scheduler.Scheduler):
        def __init__(self, *args):
            super().__init__(*args)
            decoders.append(self)
            self.addresses = self.where()

        def where(self) -> list[int]:
            tensors = [*vars(self).values(), *vars(self.cache).values()]
            tensors += [
                t for value in vars(self.cache).values() if type(value) is list for t in value
            ]
            keep = [t for t in tensors if isinstance(t, torch.Tensor)]
            return sorted({t.data_ptr() for t in keep if t.numel() >= 3})

        def decode(self):
            super().decode()
            assert set(self.addresses) <= set(self.where())
            busy.append(int((self.cache.slot_R >= 0).sum()))
            shapes.add(self.cache.shape[0])

    prompts = make_prompts([3, 17, 1, 9, 40, 2, 8, 5], seed=2)
    whole = sample(model, prompts, group_size)
    monkeypatch.setattr(sampler, "Scheduler", Watched)
    parts = sample(model, prompts, group_size, max_rows=max_rows, static=static)
    assert_same(parts, whole)
    total = int(whole.lengths_PG.sum())
    assert max(busy) <= max_rows and max(shapes) == max_rows
    if not static:  # in waves of max_rows the rows that have ended would stand idle
        assert len(busy) < 1.35 * total / max_rows + 24
        assert len(shapes) >= max_rows - 1  # then the batch steps down
    else:
        assert shapes <= {max_rows >> k for k in range(4)}


def test_cache_gb_bounds_what_is_allocated(monkeypatch):
    """cache_gb is the most that keys and values take; fewer rows change no token."""
    model, prompts = make_model(), make_prompts([3, 17, 1, 9, 40])
    per_token = 2 * 2 * 2 * 6 * 8  # keys and values, layers, heads, width, float64
    whole = sample(model, prompts)
    budget = (6 * 24 + 5 * 40) * per_token / 1e9
    assert sampler.fit_rows(5, 4, 512, budget, 40 * per_token, 24 * per_token) == (6, 5)
    assert sampler.fit_rows(5, 4, 512, budget - 1e-9, 40 * per_token, 24 * per_token) == (5, 5)
    assert sampler.fit_rows(1000, 1, 64, math.inf, 1, 1) == (64, 64)
    original, taken = sampler.GroupCache.set_layout, set()

    def set_layout(self, *args):
        original(self, *args)
        caches = self.own_keys + self.own_values + self.prompt_keys + self.prompt_values
        taken.add(sum(cache.nbytes for cache in caches))

    monkeypatch.setattr(sampler.GroupCache, "set_layout", set_layout)
    assert_same(sample(model, prompts, cache_gb=budget), whole)
    assert taken == {round(budget * 1e9)}
    sample(model, prompts, cache_gb=budget, max_new_tokens=50)  # blocks of 25
    assert max(taken) == round(budget * 1e9)


def test_step_reads_nothing_from_the_device(monkeypatch):
    """A step synchronises with no host and compiles without a break, so that graphs can hold it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
            return func(*args, **kwargs or {})

    model, prompts = make_model(), make_prompts([3, 17, 1])
    whole, plain = sample(model, prompts, top_k=30), scheduler.Scheduler.decode

    def guarded(self):
        with NoRead():
            plain(self)

    monkeypatch.setattr(scheduler.Scheduler, "decode", guarded)
    assert_same(sample(model, prompts, top_k=30, max_rows=5, static=True), whole)
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    monkeypatch.setattr(scheduler.Scheduler, "decode", compiled)
    assert_same(sample(model, prompts, top_k=30, static=True), whole)


def test_a_recorded_step_can_be_replayed(monkeypatch):
    """Tensor operations recorded once per shape, run again without Python, give the same samples.

    What a CUDA graph would freeze (a number of the host, an address) is frozen here, too.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    model, prompts, recorded = make_model(), make_prompts([3, 17, 1, 9, 40]), []
    whole = sample(model, prompts, max_new_tokens=40)

    def replay(self):
        shape = self.cache.shape
        if shape in self.graphs:
            self.graphs[shape](torch.zeros(1))
            recorded.append(shape)
        else:
            self.graphs[shape] = make_fx(lambda _: self.decode())(torch.zeros(1))  # runs it

    monkeypatch.setattr(scheduler.Scheduler, "_replay", replay)
    assert_same(sample(model, prompts, max_new_tokens=40, max_rows=8, static=True), whole)
    assert len(set(recorded)) >= 3 and len(recorded) > 40


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_graphs_equal_eager_steps(monkeypatch, dtype):
    """On a GPU the CUDA graphs give the tokens and logp of the steps run one by one, to the bit."""
    model, prompts, replays = make_model(dtype=dtype).cuda(), make_prompts([3, 17, 1, 9, 40]), []
    original = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(id(self)), original(self))
    )
    settings = {"max_rows": 8, "max_new_tokens": 48}
    turns = [sample(model, prompts, **settings) for _ in range(2)]
    assert len(set(replays)) >= 3 and len(replays) > 40
    count = len(replays)
    monkeypatch.setattr(scheduler.Scheduler, "_replay", lambda self: self.decode())
    eager = sample(model, prompts, **settings)
    assert len(replays) == count
    for graphs in turns:
        assert torch.equal(graphs.tokens_PGT, eager.tokens_PGT)
        assert torch.equal(graphs.logp_PGT, eager.logp_PGT)
        assert torch.equal(graphs.finished_PG, eager.finished_PG)
    if dtype == torch.float64:  # and the CPU's, but for the rounding of fp32 rotary angles
        there = sample(model.cpu(), prompts, **settings)
        assert torch.equal(there.tokens_PGT, eager.tokens_PGT)
        torch.testing.assert_close(there.logp_PGT, eager.logp_PGT, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_launches_per_step(capsys):
    """On a GPU a replayed step is one launch by the host; the kernels of a step are printed."""
    model, prompts = make_model(dtype=torch.bfloat16).cuda(), make_prompts([3, 17])
    settings = {"eos_ids": (), "max_new_tokens": 90}
    sample(model, prompts, **settings)
    with torch.profiler.profile() as profile:
        sample(model, prompts, **settings)
    calls = {event.key: event.count for event in profile.key_averages()}
    kernels = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
    with capsys.disabled():
        print(f"[{kernels / 89:.0f} kernels a step, 2 layers]", end=" ")
    # The first step of a shape runs one by one and its capture launches nothing.
    assert calls["cudaGraphLaunch"] == 88


def test_flips_in_fp32_are_near_ties():
    """In fp32, batches of other sizes part only where u is within 1e-5 of a step of the CDF."""
    model, exact = make_model(dtype=torch.float32), make_model()
    prompts, flips = make_prompts([3, 17, 1, 9]), 0
    settings = {"group_size": 64, "eos_ids": (), "max_new_tokens": 60}
    a = sample(model, prompts, **settings)
    keys_PG = stream_keys(0, 0, range(4), range(64))
    for b in (sample(exact, prompts, **settings), sample(model, prompts, **settings, max_rows=37)):
        for p, g in (a.tokens_PGT != b.tokens_PGT).any(-1).nonzero().tolist():
            flips += 1
            t = int((a.tokens_PGT[p, g] != b.tokens_PGT[p, g]).nonzero()[0])
            text = prompts[p] + a.tokens_PGT[p, g, :t].tolist()
            steps = exact(torch.tensor([text]))[0, -1].softmax(-1).cumsum(-1).detach()
            u = uniform_noise(keys_PG[p, g], torch.tensor(t))
            pair = sorted((int(a.tokens_PGT[p, g, t]), int(b.tokens_PGT[p, g, t])))
            assert pair[1] - pair[0] == 1 and abs(float(steps[pair[0]] - u)) < 1e-5
    assert flips < 5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_gap(capsys, device):
    """In bf16 the logp of every token stays near the full pass's; the gap is printed."""
    model = make_model(dtype=torch.bfloat16).to(device)
    prompts = make_prompts([3, 17, 1, 9])
    rollouts = sample(model, prompts, group_size=8, max_rows=20)
    gaps = []
    for p, g in itertools.product(range(4), range(8)):
        tokens = response(rollouts, p, g)
        logp = full_logp(model, prompts[p], tokens, 1.0)
        gaps.append((rollouts.logp_PGT[p, g, : len(tokens)] - logp).abs())
    gap = torch.cat(gaps)
    with capsys.disabled():
        print(
            f"[bf16 on {device}: |logp gap| max {gap.max():.4f}, mean {gap.mean():.4f} nats]",
            end=" ",
        )
    assert rollouts.logp_PGT.dtype == torch.float32
    assert gap.mean() < 0.02 and gap.max() < 0.2


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


def kept_probs(logits, top_k: int, top_p: float) -> torch.Tensor:
    """Restrict softmax(logits) to the top_k, of those to the fewest that reach top_p: by loops."""
    rows = []
    for probs in logits.softmax(-1).tolist():
        order = sorted(range(len(probs)), key=lambda i: -probs[i])[: top_k or None]
        total, kept = sum(probs[i] for i in order), []
        while not kept or sum(probs[i] for i in kept) < top_p * total:
            kept.append(order[len(kept)])
        share = sum(probs[i] for i in kept)
        rows.append([probs[i] / share if i in kept else 0.0 for i in range(len(probs))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "temperature, vocab_limit, top_k, top_p",
    [
        (1.0, 53, 0, 1.0),
        (0.6, 53, 0, 1.0),
        (1.3, 40, 0, 1.0),
        (1.3, 53, 12, 1.0),
        (1.0, 53, 0, 0.8),
        (1.5, 47, 20, 0.9),
    ],
)
def test_frequencies_match_the_distribution(temperature, vocab_limit, top_k, top_p):
    """Chi-square: the first two tokens follow softmax(logits / temperature), cut by k and p."""
    model = make_model(dtype=torch.float32)
    prompt, num = make_prompts([6])[0], 20_000
    rollouts = sample(
        model,
        [prompt],
        group_size=num,
        temperature=temperature,
        vocab_limit=vocab_limit,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=2,
        eos_ids=(),
        max_rows=num,
    )
    assert rollouts.from_policy == (top_k == 0 and top_p == 1.0)
    logits = model(torch.tensor([prompt]))[0, -1].detach().double() / temperature
    first = kept_probs(logits[None, :vocab_limit], top_k, top_p)[0]
    everything = [prompt + [token] for token in range(vocab_limit)]
    after = (model(torch.tensor(everything))[:, -1].detach().double() / temperature)[
        :, :vocab_limit
    ]
    second = first @ kept_probs(after, top_k, top_p)
    for t, probs in enumerate((first, second)):
        counts = torch.bincount(rollouts.tokens_PGT[0, :, t], minlength=vocab_limit).double()
        assert len(counts) == vocab_limit and not counts[probs == 0].any()
        expected = probs * num
        keep = expected >= 5
        assert keep.sum() >= 10 or (top_p < 1 and keep.sum() >= 5)
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


def test_whose_outputs_may_be_trained_on():
    """Only samples of the whole distribution are the policy's own, at whatever temperature."""
    model, prompts = make_model(), make_prompts([3])
    for settings, expected in (
        ({}, True), ({"temperature": 0.7}, True), ({"temperature": 0.0}, False),
        ({"top_p": 0.9}, False), ({"top_k": 5}, False),
    ):  # fmt: skip
        rollouts = sample(model, prompts, max_new_tokens=2, **settings)
        assert rollouts.from_policy is expected, settings


def test_nothing_to_do():
    """No new tokens and no prompts give empty results of the right shapes."""
    model = make_model()
    none = sample(model, make_prompts([3, 4]), max_new_tokens=0)
    assert none.tokens_PGT.shape == none.logp_PGT.shape == (2, 4, 0)
    assert none.lengths_PG.tolist() == [[0] * 4] * 2 and not none.finished_PG.any()
    assert sample(model, []).lengths_PG.shape == (0, 4)


def test_all_end_at_once_or_none_does(monkeypatch):
    """Every id an EOS: one token each; no EOS at all: max_new_tokens each, one prompt token too.

    Where all rows end at once, a prompt whose samples still wait stays in the cache.
    """
    model, prompts, runs = make_model(), make_prompts([1, 6, 3]), []
    prefill = scheduler.Scheduler._prefill
    monkeypatch.setattr(
        scheduler.Scheduler, "_prefill", lambda self, new: (runs.extend(new), prefill(self, new))
    )
    for static in (False, True):
        runs.clear()
        at_once = sample(model, prompts, eos_ids=range(53), max_rows=5, static=static)
        assert runs == [0, 1, 2]
        assert at_once.lengths_PG.tolist() == [[1] * 4] * 3 and at_once.finished_PG.all()
        never = sample(model, prompts, eos_ids=(), max_rows=5, static=static)
        assert never.lengths_PG.tolist() == [[24] * 4] * 3 and not never.finished_PG.any()
        one = sample(model, prompts, eos_ids=(), max_new_tokens=1, static=static)
        assert torch.equal(one.tokens_PGT, never.tokens_PGT[..., :1])


def test_stop_strings_cut_tokens_and_logp_alike():
    """A sample ends with the token that completes a stop string, also one across tokens."""
    tokenizer = Tokenizer.train(["ab ba abba"] * 3, 270)
    cfg = dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size)
    model, prompts = make_model(cfg, std=0.02), [[5], [7, 8]]
    settings = {"max_new_tokens": 60, "eos_ids": (), "vocab_limit": tokenizer.sample_limit}
    free = sample(model, prompts, group_size=40, **settings)
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.sample_limit)]
    row = [pieces[token] for token in free.tokens_PGT[0, 0].tolist()]
    both = [t for t in range(59) if row[t].isascii() and row[t + 1].isascii()]
    across = both[0]  # two tokens, of which each alone is no stop string
    stops = ["a", "z", (row[across] + row[across + 1]).decode()]
    assert not any(stop.encode() in b"".join(row[: across + 1]) for stop in stops)
    settings |= {"stop": stops, "tokenizer": tokenizer}
    for static, max_rows in ((False, 512), (True, 11)):
        cut = sample(model, prompts, group_size=40, static=static, max_rows=max_rows, **settings)
        for p, g in itertools.product(range(2), range(40)):
            tokens, length = free.tokens_PGT[p, g].tolist(), 60
            for n in range(60, 0, -1):
                text = tokenizer.decode_bytes(tokens[:n])
                length = n if any(stop.encode() in text for stop in stops) else length
            ended = any(s.encode() in tokenizer.decode_bytes(tokens[:length]) for s in stops)
            assert response(cut, p, g) == tokens[:length]
            assert bool(cut.finished_PG[p, g]) == ended
            expected = free.logp_PGT[p, g, :length]
            torch.testing.assert_close(cut.logp_PGT[p, g, :length], expected)
        assert cut.lengths_PG[0, 0] == across + 2
        assert 10 < cut.finished_PG.sum() < 80 and len(cut.lengths_PG.unique()) > 10


def test_stream_yields_samples_as_they_end(capsys):
    """Each sample comes once, short ones first, while others are still being drawn; with a bar."""
    model, prompts = make_model(), make_prompts([3, 17, 96])
    whole = sample(model, prompts, group_size=6)
    settings = {"max_new_tokens": 24, "eos_ids": EOS, "progress": 0.0}
    samples = list(sample_stream(model, prompts, 6, **settings))
    seen = [(s.prompt, s.index) for s in samples]
    assert sorted(seen) == list(itertools.product(range(3), range(6))) != seen
    lengths = whole.lengths_PG.clamp(min=1).flatten().tolist()  # none or one: at the first look
    assert [max(len(s.tokens_T), 1) for s in samples] == sorted(lengths)
    for s in samples:
        assert s.tokens_T.tolist() == response(whole, s.prompt, s.index)
        assert s.finished == bool(whole.finished_PG[s.prompt, s.index])
    bar = capsys.readouterr().err
    assert "18/18" in bar and "tokens/s" in bar and "rows" in bar
    list(sample_stream(model, prompts, 6, **settings | {"progress": 60.0}))
    assert capsys.readouterr().err == ""  # it took less
    with pytest.raises(ValueError, match="group_size"):
        sample_stream(model, prompts, 0, **settings)  # at once, not at the first sample


@pytest.mark.parametrize("how", ["close", "interrupt", "end"])
def test_leaving_the_stream_frees_the_cache(monkeypatch, how):
    """However a stream is left, its tensors are gone, also while a traceback holds its frames."""
    kept = []
    original = scheduler.Scheduler._prefill

    def interrupted(self):
        raise KeyboardInterrupt

    def prefill(self, *args):
        kept.extend(weakref.ref(t) for t in (self.tokens_RT, *self.cache.own_keys))
        original(self, *args)

    monkeypatch.setattr(scheduler.Scheduler, "_prefill", prefill)
    model = make_model()
    stream = sample_stream(model, make_prompts([3, 9]), 4, max_new_tokens=24, eos_ids=EOS)
    next(stream)
    assert kept and all(ref() is not None for ref in kept)
    if how == "close":
        stream.close()
    elif how == "end":
        assert len(list(stream)) == 7
    else:
        # Not by a signal: where a shell has it ignored, the loop would never end.
        monkeypatch.setattr(scheduler.Scheduler, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            list(stream)
        assert caught.tb is not None
    assert all(ref() is None for ref in kept)


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
        (
            {"prompts": [[1], []], "prompt_ids": [4, 9]},
            r"prompt 1 \(id 9\) has 0 ids .* takes 1",
        ),
        ({"prompts": [[1] * 97]}, r"prompt 0 \(id 0\) has 97 ids .* 1 to 96 \(its max_context\)"),
        ({"prompts": [[1, 53]]}, "prompt 0 .* has 2 ids from 1 to 53, .* from 0 to 52"),
        ({"prompts": [[1, -1]]}, "prompt 0 .* has 2 ids from -1 to 1, .* from 0 to 52"),
        ({"prompt_ids": [1, 2]}, "the number of prompt_ids must be between 1 and 1, not 2"),
        ({"temperature": -0.5}, "temperature must be between 0"),
        ({"temperature": math.nan}, "temperature must be between 0"),
        ({"vocab_limit": 54}, "vocab_limit must be between 1 and 53, not 54"),
        ({"group_size": 0}, "group_size must be >= 1, not 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, not -1"),
        ({"max_rows": 0}, "max_rows must be >= 1, not 0"),
        ({"top_k": -1}, "top_k must be >= 0, not -1"),
        ({"top_p": 0.0}, "top_p must be between 1e-09 and 1, not 0"),
        ({"cache_gb": 1e-6}, "cache_gb 1e-06 holds no single sample; it needs 9.98e-06"),
        ({"stop": ("x",)}, "stop strings must not be empty and need a tokenizer"),
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
    with pytest.raises(ValueError, match="--checkpoint DIR is missing"):
        sample_module.main(sample_module.Config())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sample_module.main(sample_module.Config(checkpoint=str(tmp_path / "nowhere")))
    tokenizer = Tokenizer.train(["1 + 2 = 3, 4 - 3 = 1"] * 5, 280)
    cfg = dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size + 8)
    model = make_model(cfg, dtype=torch.float32)
    alone = setup("cpu", threads=1)
    Checkpoints(tmp_path, {"model": model}, None, tokenizer, alone).save(1, {})
    seen = set()
    for flags, settings in (
        ("", {}),
        ("--top_k 3", {"top_k": 3}),
        ("--top_p 0.2", {"top_p": 0.2}),
        ("--stop 1 = --temperature 0.5", {"stop": ("1", "="), "temperature": 0.5}),
    ):
        argv = f"--checkpoint {tmp_path} --prompt 1+ -n 3 --max_new_tokens 9 --device cpu {flags}"
        sample_module.main(parse(sample_module.Config, argv=argv.split()))
        printed = capsys.readouterr().out
        expected = sample_groups(
            model,
            [tokenizer.encode("1+", bos=True)],
            3,
            max_new_tokens=9,
            eos_ids=tokenizer.stop_ids,
            vocab_limit=tokenizer.sample_limit,
            tokenizer=tokenizer,
            **settings,
        )
        for g in range(3):
            length = int(expected.lengths_PG[0, g])
            mean = float(expected.logp_PGT[0, g, :length].mean())
            line = f"sample {g}: {length} tokens, "
            assert line in printed and f"mean logp {mean:.3f}" in printed
        seen.add(printed)
    assert len(seen) == 4  # every flag changed what is printed
