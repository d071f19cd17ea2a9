"""Recomputed blocks: the same bits, less memory, the same names."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nanomath.dist import Dist, shard
from nanomath.model import ModelConfig, Transformer, attend
from nanomath.run import checkpoint as ck

ALONE = Dist(0, 0, 1, torch.device("cpu"))
CFG = ModelConfig(101, 3, 32, 4, 2, 88, max_context=64)
MODES = ["selective", "full"]
TOKENS_BT = torch.randint(0, 101, (3, 40), generator=torch.Generator().manual_seed(0))
SEGMENTS_BT = (torch.arange(40) // 13).expand(3, -1)


def build(mode="none", dtype=torch.float32, compile="off"):
    model = Transformer(CFG).to(dtype)
    model.init_weights(0, std=0.2)
    return shard(model, ALONE, mode, compile)


def loss_of(model, segments_BT=None):
    return model(TOKENS_BT, segments_BT=segments_BT).log_softmax(-1).square().mean()


def gradients(model, segments_BT=None):
    loss = loss_of(model, segments_BT)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT], ids=["causal", "packed"])
def test_gradients_are_the_same_bits(dtype, segments_BT):
    """Loss and every gradient equal those without recomputation, bit for bit."""
    expected = gradients(build(dtype=dtype), segments_BT)
    assert all(value.abs().max() > 0 for value in expected.values())
    for mode in MODES:
        actual = gradients(build(mode, dtype), segments_BT)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (mode, name)


def kept_bytes(mode):
    """Return the bytes that a forward pass leaves allocated for its backward pass."""
    model = build(mode)
    gradients(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = loss_of(model)
    events = recorded.profiler.kineto_results.events()
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    loss.backward()
    return kept


def test_less_memory_is_kept():
    """Per token and block, full keeps D numbers, selective the outputs of products, none more."""
    tokens = TOKENS_BT.numel()
    rest = tokens * (3 * CFG.vocab_size + 6 * CFG.width) * 4  # logits, final norm, embedding
    none, selective, full = (kept_bytes(mode) for mode in ("none", *MODES))
    blocks = CFG.num_layers * tokens * 4
    head_share = 2 * CFG.num_kv_heads / CFG.num_heads
    products = (4 + head_share) * CFG.width + 2 * CFG.ffn_width  # q, k, v, attention, o, gate, up
    products += CFG.width  # down
    assert blocks * CFG.width <= full <= blocks * CFG.width + rest
    assert blocks * products <= selective <= blocks * (products + 2 * CFG.width) + rest
    assert selective < 0.75 * none and full < 0.4 * selective


@pytest.mark.parametrize(("mode", "num_calls"), [("none", 1), ("selective", 1), ("full", 2)])
def test_matrix_products_are_done_twice_in_full_only(mode, num_calls):
    """Selective recomputation repeats no matrix product; full repeats all but the last."""

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.products += op is torch.ops.aten.mm.default
            return op(*args, **(kwargs or {}))

    model = build(mode)
    loss = loss_of(model)
    with Count() as backward:
        loss.backward()
    forward_products = 7 * CFG.num_layers
    gradient_products = 2 * (forward_products + 1)  # and the head's
    repeated = (num_calls - 1) * (forward_products - CFG.num_layers)  # the last one's output is out
    assert backward.products == gradient_products + repeated


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_do_not_know_of_it(tmp_path, mode):
    """Names of parameters stay, so that what one policy saved any other loads."""
    wrapped, plain = build(mode), build()
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        wrapped.head.weight.mul_(2.0)
    ck.Checkpoints(tmp_path, {"m": wrapped}, None, None, ALONE).save(1, {})
    ck.Checkpoints(tmp_path, {"m": plain}, None, None, ALONE).load_latest()
    assert torch.equal(loss_of(plain), loss_of(wrapped))


class NoCache:
    """Stands where a key/value cache would, and keeps nothing."""

    def positions(self, num_rows, num_tokens):
        return torch.arange(num_tokens).expand(num_rows, -1)

    def attend(self, layer, query_BTHE, key_BTKE, value_BTKE):
        return attend(query_BTHE, key_BTKE, value_BTKE, None)

    def advance(self):
        pass


def test_compiled_blocks_compute_the_same(monkeypatch):
    """Compiled blocks, recomputing or not, with and without gradients, are the model in float64;
    passes with a cache stay uncompiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    expected = gradients(build(dtype=torch.float64))
    for mode in ("none", *MODES):
        torch._dynamo.reset()
        model = build(mode, torch.float64, compile="on")
        for name, value in gradients(model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-14)
        with torch.no_grad():
            assert loss_of(model).item() == pytest.approx(expected["loss"].item(), rel=1e-12)
            num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert num_graphs > 0
            logits_BTV = model(TOKENS_BT, cache=NoCache())
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
            torch.testing.assert_close(logits_BTV, build(dtype=torch.float64)(TOKENS_BT))
    torch._dynamo.reset()


def test_auto_compiles_on_a_gpu_only(monkeypatch):
    """auto leaves a CPU's blocks as they are; on and off mean what they say."""
    for compile, is_compiled in (("auto", False), ("off", False), ("on", True)):
        monkeypatch.setattr(torch, "compile", lambda function: function)
        model = build(compile=compile)
        assert ("forward" in vars(model.blocks[0])) == is_compiled
