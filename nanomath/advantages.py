"""From rewards to what each output counts for in the loss: its advantage and its weight (Sec. 4.1).

Other objectives than the paper's are other advantages and weights (docs/objectives.md): the loss
itself knows nothing of them. Weights are fixed here, from counts over all ranks, before
anything is split, so that micro-batch size and world size never change the update.
Next: grpo.py.
"""

import torch

from nanomath.dist import Dist, all_reduce_sum
from nanomath.rollouts import Rollouts

ADVANTAGES = ("std", "mean", "leave_one_out")
LOSS_NORMS = ("response", "token", "constant")
# Rewards are equal when they differ by no more than this share of the largest: 0.1 + 0.2 and 0.3
# differ by a rounding, which divided by its own std would be an advantage of full size.
SAME_REWARDS = 1e-9


def outcome_advantages(rewards_PG: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """Return A_i = (r_i - mean(r)) / std(r) within each group, in float64 (Sec. 4.1.2).

    rewards_PG: [P, G]; NaN marks an output without a reward, which leaves its group: it gets
    advantage 0 and counts in neither mean nor std. std is the population's (ddof 0), without an
    epsilon; a group whose rewards are all equal, to SAME_REWARDS, gets exactly 0. Raises ValueError
    for G < 2.
    kind: std; mean, without the division; leave_one_out, r_i less the mean of the other rewards.
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError("a group needs at least 2 outputs: with one, every advantage is 0")
    centred_PG, std_P, unit_P = centred_rewards(rewards_PG)
    if kind == "std":
        # A_i = (r_i - mean) / std (Sec. 4.1.2). The unit cancels. Where all rewards are equal the
        # numerators are 0 already, and a divisor of 1 keeps 0 / 0 out.
        return centred_PG / std_P.where(std_P > 0.0, 1.0)[:, None]
    if kind == "mean":
        # A_i = r_i - mean: questions that nearly all outputs solve are not scaled up.
        return centred_PG * unit_P[:, None]
    if kind == "leave_one_out":
        # A_i = r_i - mean of the other n - 1, a baseline that does not depend on r_i itself. It
        # need not be computed per output, since r_i - mean = (1 - 1/n) (r_i - mean of the others).
        count_P = (~rewards_PG.isnan()).sum(dim=1).double()
        share_P = 1.0 - 1.0 / count_P.clamp(min=2)
        return centred_PG / share_P[:, None] * unit_P[:, None]
    raise ValueError(f"advantage {kind!r}: choose from {', '.join(ADVANTAGES)}")


def centred_rewards(rewards_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return r_i - mean(r) [P, G] and the population std [P] of each group, and their unit [P].

    Both are float64, in units of a power of two near the group's largest reward, so that squares of
    1e-200 or 1e200 stay numbers and nothing else is rounded. Where rewards are equal all are
    exactly 0, and so is an output without a reward (NaN).
    """
    rewards_PG = rewards_PG.double()
    missing_PG = rewards_PG.isnan()
    size_P = rewards_PG.abs().masked_fill(missing_PG, 0.0).amax(dim=1)
    # Dividing by a power of two changes only exponents; frexp's mantissa lies in [0.5, 1).
    unit_P = (size_P / (2.0 * torch.frexp(size_P).mantissa)).where(size_P > 0, 1.0)
    scaled_PG = rewards_PG / unit_P[:, None]
    low_P1 = scaled_PG.masked_fill(missing_PG, torch.inf).amin(dim=1, keepdim=True)
    # The lowest is subtracted before the mean is taken: for rewards near each other that is exact,
    # whereas their mean is rounded.
    above_PG = (scaled_PG - low_P1).masked_fill(missing_PG, 0.0)
    is_equal_P1 = (above_PG.amax(dim=1) <= SAME_REWARDS * size_P / unit_P)[:, None]
    above_PG = above_PG.masked_fill(is_equal_P1, 0.0)
    count_P1 = (~missing_PG).sum(dim=1, keepdim=True).clamp(min=1).double()
    mean_P1 = above_PG.sum(dim=1, keepdim=True) / count_P1
    centred_PG = (above_PG - mean_P1).masked_fill(missing_PG, 0.0)
    # The population's std (ddof 0): the group is all there is, not a sample from a larger one.
    std_P1 = (centred_PG.square().sum(dim=1, keepdim=True) / count_P1).sqrt()
    return centred_PG, std_P1[:, 0], unit_P


def constant_groups(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Return for each group whether all its rewards are equal (or none is known): [P] bool."""
    return centred_rewards(rewards_PG)[1] == 0.0


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
    # The only thing ranks have to agree on. A mean per rank would weigh a question by how many
    # others happened to share its rank.
    counts = {"groups": groups_P.sum(), "tokens": (lengths_PG * in_loss_PG).sum()}
    totals = all_reduce_sum(counts, dist)
    # P G: G is counted group by group, because outputs without a reward have left theirs.
    outputs_P1 = totals["groups"] * scored_PG.sum(dim=1, keepdim=True).double()
    if loss_norm == "response":
        # 1 / (P G |o_i|), Eq. 3: every output counts the same, a token of a long one less.
        denominators_PG = outputs_P1 * lengths_PG
    elif loss_norm == "constant":
        # 1 / (P G max_new_tokens): every token counts the same, whatever the batch holds.
        denominators_PG = outputs_P1 * max_new_tokens
    elif loss_norm == "token":
        # 1 / sum of |o_i|: every token counts the same, and the weights of the batch sum to 1.
        denominators_PG = torch.full_like(lengths_PG, totals["tokens"])
    else:
        raise ValueError(f"loss_norm {loss_norm!r}: choose from {', '.join(LOSS_NORMS)}")
    # The division is made for every output, also where it is 1 / 0; what is not in the loss is 0.
    return torch.where(in_loss_PG, 1.0 / denominators_PG, 0.0)


def drop_without_gradient(weights_PG: torch.Tensor, advantages_PG: torch.Tensor) -> torch.Tensor:
    """Return the weights with 0 where the advantage is 0, for an objective without a KL.

    Such an output adds exactly 0 to the loss and to its gradient, so it need not pass the model;
    the others' weights were fixed with it counted, and stay.
    """
    return weights_PG.where(advantages_PG != 0, 0.0)
