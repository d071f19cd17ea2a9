"""From rewards to what each output counts for in the loss: its advantage and its weight (Sec. 4.1).

Other objectives than the paper's are other advantages and weights (docs/objectives.md): the loss
itself knows nothing of them. Weights are fixed here, from counts over all ranks, before
anything is split, so that micro-batch size and world size never change the update.
"""

import torch

from nanomath.dist import Dist, all_reduce_sum
from nanomath.rollouts import Rollouts

ADVANTAGES = ("std", "mean", "leave_one_out")
LOSS_NORMS = ("response", "token", "constant")


def outcome_advantages(rewards_PG: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """Return A_i = (r_i - mean(r)) / std(r) within each group, in float64 (Sec. 4.1.2).

    rewards_PG: [P, G]; NaN marks an output without a reward, which leaves its group: it gets
    advantage 0 and counts in neither mean nor std. std is the population's (ddof 0), without an
    epsilon; a group whose rewards are all equal gets exactly 0. Raises ValueError for G < 2.
    kind: std; mean, without the division; leave_one_out, r_i less the mean of the other rewards.
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError("a group needs at least 2 outputs: with one, every advantage is 0")
    rewards_PG = rewards_PG.double()
    scored_PG = ~rewards_PG.isnan()
    count_P1 = scored_PG.sum(dim=1, keepdim=True).clamp(min=1).double()
    filled_PG = rewards_PG.masked_fill(~scored_PG, 0.0)
    mean_P1 = filled_PG.sum(dim=1, keepdim=True) / count_P1
    centred_PG = (filled_PG - mean_P1).masked_fill(~scored_PG, 0.0)
    scale_P1 = {
        "std": (centred_PG.square().sum(dim=1, keepdim=True) / count_P1).sqrt(),
        "mean": torch.ones_like(mean_P1),
        # r_i - mean = (1 - 1/n) (r_i - mean of the others)
        "leave_one_out": 1.0 - 1.0 / count_P1,
    }[kind]
    # Test equality, not std == 0: eight rewards of 0.1 have a tiny std by rounding.
    return torch.where(constant_groups(rewards_PG)[:, None], 0.0, centred_PG / scale_P1)


def constant_groups(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Return for each group whether all its rewards are equal (or none is known): [P] bool."""
    missing_PG = rewards_PG.isnan()
    high_P = rewards_PG.masked_fill(missing_PG, -torch.inf).amax(dim=1)
    low_P = rewards_PG.masked_fill(missing_PG, torch.inf).amin(dim=1)
    return high_P <= low_P


def output_weights(
    rewards_PG: torch.Tensor,
    rollouts: Rollouts,
    *,
    max_new_tokens: int,
    dist: Dist,
    loss_norm: str = "response",
    mask_truncated: bool = False,
    drop_constant_groups: bool = False,
) -> torch.Tensor:
    """Return what each token of each output weighs in the loss: [P, G] float64, for this rank.

    loss_norm: response, 1 / (P G |o_i|) (Eq. 3); constant, 1 / (P G max_new_tokens); token, 1 / the
    number of tokens in the loss. P is the number of groups of all ranks, G that of a group's
    outputs with a reward; the others weigh 0. With mask_truncated outputs without an end weigh 0 as
    well, but stay in G, as in mean and std. drop_constant_groups takes these out of the loss and P.
    """
    scored_PG = ~rewards_PG.isnan()
    groups_P = ~(constant_groups(rewards_PG) & drop_constant_groups)
    ended_PG = rollouts.finished_PG.cpu() | (not mask_truncated)
    in_loss_PG = scored_PG & groups_P[:, None] & ended_PG
    lengths_PG = rollouts.lengths_PG.cpu().double()
    counts = {"groups": groups_P.sum(), "tokens": (lengths_PG * in_loss_PG).sum()}
    totals = all_reduce_sum(counts, dist)
    outputs_P1 = totals["groups"] * scored_PG.sum(dim=1, keepdim=True).double()
    denominators_PG = {
        "response": outputs_P1 * lengths_PG,  # Eq. 3
        "constant": outputs_P1 * max_new_tokens,
        "token": torch.full_like(lengths_PG, totals["tokens"]),
    }[loss_norm]
    return torch.where(in_loss_PG, 1.0 / denominators_PG, 0.0)
