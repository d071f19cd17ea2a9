"""Schedules against the paper's numbers, splits of rows, and updates that do not depend on them."""

import dataclasses

import pytest
import torch

from nanomath.data import PackedExamples, TrainBatch
from nanomath.dist import Dist
from nanomath.model import ModelConfig, Transformer
from nanomath.optim import (
    constant_lr,
    cosine_lr,
    make_adamw,
    multi_step_lr,
    split_rows,
    supervised_step,
)

ALONE = Dist(0, 0, 1, torch.device("cpu"))


def test_multi_step_schedule_has_the_papers_values():
    """Warm-up over 2000 steps, 31.6% of the peak from 80%, 10.0% from 90% (Sec. 2.2)."""
    lr = [multi_step_lr(s, num_steps=10_000, peak=4.2e-4, warmup_steps=2000) for s in range(10_000)]
    expected = {
        0: 4.2e-4 / 2000, 999: 2.1e-4, 1999: 4.2e-4, 2000: 4.2e-4, 7999: 4.2e-4,
        8000: 0.316 * 4.2e-4, 8999: 0.316 * 4.2e-4, 9000: 4.2e-5, 9999: 4.2e-5,
    }  # fmt: skip
    for step, value in expected.items():
        assert lr[step] == pytest.approx(value, rel=1e-12), step


def test_other_schedules_warm_up_and_end_where_they_should():
    """The cosine ends at zero, the constant stays; both reach the peak after warm-up."""
    cosine = [cosine_lr(s, num_steps=100, peak=1.0, warmup_steps=10) for s in range(101)]
    assert cosine[9] == 1.0 and cosine[55] == pytest.approx(0.5) and cosine[100] == 0.0
    constant = [constant_lr(s, num_steps=100, peak=2.0, warmup_steps=4) for s in range(100)]
    assert constant[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and constant[99] == 2.0
    assert constant_lr(0, num_steps=9, peak=2.0, warmup_steps=0) == 2.0


def test_every_rank_gets_the_same_number_of_micro_batches():
    """A rank with fewer rows gets empty micro-batches at the end; no row is lost or doubled."""
    assert split_rows([4, 1, 7], 3, 2) == [[4, 1], [7]]
    assert split_rows([4], 5, 2) == [[4], [], []]
    assert split_rows([], 0, 2) == [[]]


def make_batch(num_rows=6, context=12):
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(0, 31, (num_rows, context), generator=generator)
    weights_BT = (torch.rand(num_rows, context, generator=generator) < 0.5).double()
    weights_BT[:, -1] = 0.0
    weights_BT[1] = 0.0  # a row without any trained token
    return TrainBatch(tokens_BT, weights_BT / weights_BT.sum())


def updated(batch, micro_batch_size, lr=1e-2):
    """Return loss and gradient norm of one supervised step on batch, and all weights after it, in
    float64. AdamW and clipping forget the gradient's scale, its norm does not."""
    model = Transformer(ModelConfig(31, 2, 16, 2, 2, 24, max_context=16)).double()
    model.init_weights(0, std=0.2)
    metrics = supervised_step(
        model, make_adamw(model, lr=1.0), batch, lr=lr, max_grad_norm=0.1,
        micro_batch_size=micro_batch_size, dist=ALONE,
    )  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return (metrics["loss"], metrics["grad_norm"]), weights


def assert_same_update(left, right):
    assert left[0] == pytest.approx(right[0], rel=1e-10)
    assert (left[1] - right[1]).abs().max() < 1e-10


def test_the_rate_of_the_step_counts():
    """A step moves weights in proportion to its own rate, not the one AdamW was made with."""
    still, one, two = (updated(make_batch(), 6, lr)[1] for lr in (0.0, 1e-3, 2e-3))
    torch.testing.assert_close(two - still, 2 * (one - still), rtol=1e-9, atol=1e-15)
    assert 0 < (one - still).abs().max() < 1.2e-3


def test_micro_batch_size_does_not_change_the_update():
    """One supervised step is the same for any micro-batch size, and its loss is the token mean."""
    batch = make_batch()
    model = Transformer(ModelConfig(31, 2, 16, 2, 2, 24, max_context=16)).double()
    model.init_weights(0, std=0.2)
    logp_BTV = model(batch.tokens_BT).log_softmax(-1)
    logp_BT = logp_BTV[:, :-1].gather(-1, batch.tokens_BT[:, 1:, None])[..., 0]
    expected = -(logp_BT * batch.weights_BT[:, :-1]).sum().item()
    first = updated(batch, 1)
    assert first[0][0] == pytest.approx(expected, rel=1e-10)
    for micro_batch_size in (2, 4, 6):
        assert_same_update(updated(batch, micro_batch_size), first)


def test_row_order_and_padding_do_not_change_the_update():
    """Rows in another order, and rows made longer by tokens without weight, give the same step."""
    batch = make_batch()
    expected = updated(batch, 2)
    assert_same_update(updated(batch.rows([4, 1, 5, 0, 3, 2]), 2), expected)
    padding = torch.randint(0, 31, (6, 4), generator=torch.Generator().manual_seed(1))
    tokens_BT = torch.cat([batch.tokens_BT, padding], 1)
    weights_BT = torch.nn.functional.pad(batch.weights_BT, (0, 4))
    assert_same_update(updated(TrainBatch(tokens_BT, weights_BT), 2), expected)


def test_packing_does_not_change_the_update():
    """Examples packed into two rows give the step of one example a row, padded at its end."""
    examples = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([9, 8], [7, 6, 5]), ([2], [1])]
    packed = PackedExamples(examples, context=9, pad_id=30)
    assert packed.num_rows == 2
    batch = packed.batch(0, batch_size=2, seed=0)
    alone = [PackedExamples([example], context=12).batch(0, 1, 0) for example in examples]
    tokens_BT = torch.cat([row.tokens_BT for row in alone])
    trained_BT = torch.cat([row.weights_BT for row in alone]) > 0
    assert trained_BT.sum() == (batch.weights_BT > 0).sum() == 9
    batch = dataclasses.replace(batch, weights_BT=(batch.weights_BT > 0).double() / 9)
    expected = updated(TrainBatch(tokens_BT, trained_BT.double() / 9), 3)
    assert_same_update(updated(batch, 1), expected)


def test_norm_scales_do_not_decay():
    """Weight decay is on matrices only."""
    model = Transformer(ModelConfig(31, 1, 16, 2, 2, 24))
    groups = make_adamw(model, lr=1e-2, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in groups[0]["params"])
    assert len(groups[1]["params"]) == 3
