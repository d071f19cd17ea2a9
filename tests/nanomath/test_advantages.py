"""Advantages and weights of outputs against closed forms, in float64."""

import math

import pytest
import torch

from nanomath.advantages import constant_groups, outcome_advantages, output_weights
from nanomath.dist import Dist
from nanomath.rollouts import Rollouts

ALONE = Dist(0, 0, 1, torch.device("cpu"))
NAN = float("nan")


@pytest.mark.parametrize("group_size", [4, 8, 64])
def test_one_success_has_advantage_sqrt_of_g_minus_1(group_size):
    """One success in a group of G gets A = sqrt(G-1): population std, no epsilon (Sec. 4.1.2)."""
    rewards_PG = torch.zeros(1, group_size)
    rewards_PG[0, 2] = 1.0
    advantages_PG = outcome_advantages(rewards_PG)
    assert advantages_PG[0, 2].item() == pytest.approx(math.sqrt(group_size - 1), abs=1e-12)
    assert advantages_PG[0, 0].item() == pytest.approx(-1 / math.sqrt(group_size - 1), abs=1e-12)


def test_advantages_by_hand():
    """Rewards 1, 2, 6: mean 3, variance 14/3; the mean of the others is 4, 3.5, 1.5."""
    rewards_PG = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    std = math.sqrt(14 / 3)
    for kind, expected in (
        ("std", [-2 / std, -1 / std, 3 / std]),
        ("mean", [-2.0, -1.0, 3.0]),
        ("leave_one_out", [-3.0, -1.5, 4.5]),
    ):
        advantages_PG = outcome_advantages(rewards_PG, kind)
        assert advantages_PG.dtype == torch.float64
        assert advantages_PG[0].tolist() == pytest.approx(expected, abs=1e-14)
        assert advantages_PG[1].tolist() == [0.0] * 3
        # Rewards keep float64's digits.
        shifted_PG = outcome_advantages(rewards_PG.double() + 2**30, kind)
        assert shifted_PG[0].tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 0.0, 1e9, -3.3])
def test_constant_group_has_advantage_exactly_zero(reward, kind):
    """Equal rewards give exactly 0, though rounding leaves their std above 0 (three of 0.1)."""
    for size in range(2, 12):
        equal_PG = torch.full((1, size), reward, dtype=torch.float64)
        assert (outcome_advantages(equal_PG, kind) == 0).all()
    rewards_PG = torch.full((2, 8), reward, dtype=torch.float32)
    rewards_PG[1, 3] += 1.0
    advantages_PG = outcome_advantages(rewards_PG, kind)
    assert (advantages_PG[0] == 0).all()
    assert constant_groups(rewards_PG).tolist() == [True, reward == 1e9]
    if reward != 1e9:
        expected = {"std": math.sqrt(7), "mean": 7 / 8, "leave_one_out": 1.0}[kind]
        assert advantages_PG[1, 3].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
@pytest.mark.parametrize("unit", [1.0, -1.0, 3.0, 1e-200, 1e200, 5e-324, 1e308])
def test_rewards_that_differ_by_a_rounding_are_equal(kind, unit):
    """A spread of at most 1e-9 of the largest reward is none; a larger one counts, and the
    advantages sum to 0, whatever the rewards' size."""
    groups = [[0.1 + 0.2, 0.3, 0.3, NAN], [1.0, 1.0 - 9e-10, 1.0, 1.0], [NAN, 1.0, NAN, NAN]]
    if unit == 5e-324:
        groups = [[3.0] * 4, [NAN, 1.0, NAN, NAN]]
    equal_PG = torch.tensor(groups, dtype=torch.float64) * unit
    assert constant_groups(equal_PG).all()
    assert (outcome_advantages(equal_PG, kind) == 0).all()
    unequal_PG = torch.tensor([[1.0, 0.0, NAN, 1.0, 0.0]], dtype=torch.float64) * unit
    assert not constant_groups(unequal_PG).any()
    expected = {"std": 1.0 * (-1 if unit < 0 else 1), "mean": unit / 2, "leave_one_out": unit / 1.5}
    if unit != 5e-324 or kind == "std":  # half of the smallest number is not a number
        assert outcome_advantages(unequal_PG, kind)[0, 0].item() == pytest.approx(expected[kind])
    assert outcome_advantages(unequal_PG, kind).sum() == 0


def test_a_spread_just_above_a_rounding_sums_to_zero():
    """Rewards 2e-9 apart are centred to rounding of their spread, not of their size."""
    near_PG = torch.tensor([[0.7, 0.7 + 2e-9, 0.7, 0.7, 0.7]], dtype=torch.float64)
    advantages_PG = outcome_advantages(near_PG)
    assert advantages_PG[0, 1].item() == pytest.approx(2.0, abs=1e-14)
    assert abs(advantages_PG.sum().item()) < 1e-14


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
def test_output_without_reward_leaves_mean_std_and_group_size(kind):
    """NaN (no reward) is left out of the group; 0.0 is a reward like any other."""
    rewards_PG = torch.tensor([[1.0, NAN, 0.0, 0.0], [NAN] * 4, [NAN, NAN, NAN, 2.0]])
    with_missing = outcome_advantages(rewards_PG, kind)
    without = outcome_advantages(torch.tensor([[1.0, 0.0, 0.0]]), kind)
    assert torch.equal(with_missing[0, [0, 2, 3]], without[0])
    assert with_missing[0, 1] == 0 and (with_missing[1:] == 0).all()
    assert not with_missing.isnan().any()


def test_group_of_one_is_an_error():
    """G = 1 has no advantage: it must be an error, not a silent zero."""
    with pytest.raises(ValueError, match="at least 2"):
        outcome_advantages(torch.zeros(3, 1))


# One output without a reward, one truncated in each of two groups, a constant group.
REWARDS_PG = torch.tensor([[1.0, 0.0, NAN], [1.0, 1.0, 1.0], [0.0, 0.5, 2.0]])
LENGTHS_PG = torch.tensor([[2, 8, 3], [1, 4, 8], [5, 6, 8]])


def weights(**options):
    rollouts = Rollouts(
        torch.zeros(3, 3, 8, dtype=torch.int64),
        LENGTHS_PG,
        torch.zeros(3, 3, 8),
        finished_PG=LENGTHS_PG < 8,
    )
    weights_PG = output_weights(REWARDS_PG, rollouts, max_new_tokens=8, dist=ALONE, **options)
    assert weights_PG.dtype == torch.float64
    return weights_PG.tolist()


def close(rows):
    return [pytest.approx(row, rel=1e-15, abs=0.0) for row in rows]


def test_weights_are_one_over_p_g_and_length():
    """Every token of o_i weighs 1 / (P G |o_i|) (Eq. 3): P counts constant groups too, G of a group
    its outputs with a reward, truncated ones among them."""
    assert weights() == close(
        [[1 / (3 * 2 * 2), 1 / (3 * 2 * 8), 0]]
        + [[1 / (3 * 3 * n) for n in row] for row in LENGTHS_PG.tolist()[1:]]
    )


def test_weights_of_the_other_normalisations():
    """token: 1 / all tokens in the loss, 2+8 + 1+4+8 + 5+6+8 = 42; constant: 1 / (P G L)."""
    assert weights(loss_norm="token") == close([[1 / 42, 1 / 42, 0], [1 / 42] * 3, [1 / 42] * 3])
    assert weights(loss_norm="constant") == close([[1 / 48, 1 / 48, 0], [1 / 72] * 3, [1 / 72] * 3])


def test_truncated_outputs_leave_the_loss_but_not_their_group():
    """mask_truncated: weight 0 and no token of the token mean, but G stays."""
    assert weights(mask_truncated=True) == close(
        [[1 / 12, 0, 0], [1 / 9, 1 / 36, 0], [1 / 45, 1 / 54, 0]]
    )
    w = 1 / (2 + 1 + 4 + 5 + 6)
    assert weights(mask_truncated=True, loss_norm="token") == close(
        [[w, 0, 0], [w, w, 0], [w, w, 0]]
    )


def test_dropped_constant_groups_leave_the_loss_and_p():
    """drop_constant_groups: their outputs weigh 0, and P counts the two other groups."""
    assert weights(drop_constant_groups=True) == close(
        [[1 / 8, 1 / 32, 0], [0, 0, 0], [1 / 30, 1 / 36, 1 / 48]]
    )
    w = 1 / (2 + 8 + 5 + 6 + 8)
    assert weights(drop_constant_groups=True, loss_norm="token") == close(
        [[w, w, 0], [0, 0, 0], [w, w, w]]
    )


def test_nothing_in_the_loss_is_no_division_by_zero(monkeypatch):
    """Without any reward, or with only constant groups dropped, all weights are 0."""
    for rewards_PG, options in (
        (torch.full((3, 3), NAN), {}),
        (torch.full((3, 3), NAN), {"drop_constant_groups": True}),
        (torch.zeros(3, 3), {"drop_constant_groups": True}),
    ):
        for loss_norm in ("response", "token", "constant"):
            monkeypatch.setitem(globals(), "REWARDS_PG", rewards_PG)
            assert weights(loss_norm=loss_norm, **options) == [[0.0] * 3] * 3
