"""How a token is drawn: inverse-CDF sampling, at a uniform number that is a hash of counters.

Put the probabilities end to end on [0, 1); the token is the one on whose piece the uniform falls.
One uniform a token is then all the randomness there is, and it is a hash of (seed, step, prompt id,
sample index, position): a sample does not depend on batch layout, order or number of processes, and
a resumed run draws what the whole one would have drawn, without a generator's state to save.
Nothing here reads a number from the device. Next: rollouts.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def choose_tokens(
    logits_RV: Tensor,
    uniform_R: Tensor,
    *,
    temperature: float,
    vocab_limit: int,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution at `uniform_R` (float64); return token ids and logp, [R].

    Only ids below `vocab_limit` that top_k and top_p keep are chosen, in proportion to their
    probabilities; logp is that of the full softmax. Suffixes of this function: M blocks, C ids.
    """
    # bf16 has 8 bits: many tokens of a large vocabulary would share one probability.
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    if temperature == 0:
        token_R1 = logits_RV[:, :vocab_limit].argmax(-1, keepdim=True)
        return token_R1[:, 0], logits_RV.log_softmax(-1).gather(1, token_R1)[:, 0]
    if temperature != 1:
        logits_RV = logits_RV / temperature
    # logp is that of the whole softmax, as the trainer's; what is kept only narrows the choice.
    probs_RV = logits_RV.softmax(-1)
    kept_RV = probs_RV[:, :vocab_limit]
    if top_k or top_p < 1:
        kept_RV = _most_likely(kept_RV, top_k, top_p)
    # Two levels, as one looks up a word: first the block of sqrt(V) ids in which the running sum
    # passes u, then the id in that block. Running sums in fp32 over a whole vocabulary would lose
    # the rare tokens; in float64 they would be half the time of choosing. Over sqrt(V) numbers
    # float64 costs nothing.
    block = math.ceil(vocab_limit**0.5)
    whole = vocab_limit - vocab_limit % block
    sums_RM = kept_RV[:, :whole].unflatten(-1, (-1, block)).sum(-1)
    sums_RM = torch.cat((sums_RM, kept_RV[:, whole:].sum(-1, keepdim=True)), -1).double()
    ends_RM = sums_RM.cumsum(-1)
    # Of the kept total, not of 1: that is the renormalising which top-k, top-p and vocab_limit ask.
    target_R1 = uniform_R[:, None] * ends_RM[:, -1:]
    block_R1 = _first_above(ends_RM, target_R1)
    # What is left of u inside the block, against the running sum of the block's own ids.
    target_R1 = (target_R1 - (ends_RM - sums_RM).gather(1, block_R1)).clamp_(min=0)
    id_RC = block_R1 * block + torch.arange(block, device=uniform_R.device)
    weight_RC = kept_RV.gather(1, id_RC.clamp(max=vocab_limit - 1)).double()
    ends_RC = weight_RC.masked_fill_(id_RC >= vocab_limit, 0.0).cumsum(-1)
    # The block's sum was rounded: below its last running sum there always is an id of weight > 0.
    target_R1 = torch.minimum(target_R1, ends_RC[:, -1:] * (1 - 1e-15))
    token_R1 = block_R1 * block + _first_above(ends_RC, target_R1)
    token_R1 = token_R1.clamp_(max=vocab_limit - 1)  # NaN logits: the caller reports them
    return token_R1[:, 0], probs_RV.gather(1, token_R1)[:, 0].log()


def _most_likely(probs_RV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top_k most likely ids, and of those all beyond the share top_p.

    Of equal ones the lowest ids stay. The id that reaches top_p is kept.
    """
    # A stable sort makes ties fall the same way on every device.
    sorted_RV, ids_RV = probs_RV.double().sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_RV[:, top_k:] = 0
    # An id goes if those before it have reached the share already.
    sums_RV = sorted_RV.cumsum(-1)
    sorted_RV[sums_RV - sorted_RV >= top_p * sums_RV[:, -1:]] = 0
    return torch.zeros_like(probs_RV).scatter(1, ids_RV, sorted_RV.to(probs_RV.dtype))


def _first_above(ends_RM: Tensor, target_R1: Tensor) -> Tensor:
    """Return the first index [R, 1] whose running sum exceeds the target: its weight is not 0."""
    return torch.searchsorted(ends_RM, target_R1, right=True).clamp_(max=ends_RM.shape[1] - 1)


_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment and multipliers (Steele et al., 2014)


def stream_keys(
    seed: int, step: int, prompt_ids: Sequence[int], sample_ids: Sequence[int]
) -> Tensor:
    """Return the key, int64 [P, G], of each sample's random stream: a hash of the counters."""
    # One counter after another is mixed in: adding them up first would make (1, 2) of (2, 1).
    key = torch.zeros((), dtype=torch.long)
    for counter in (seed, step):
        key = _splitmix(key + _signed(counter))
    for counters in (prompt_ids, sample_ids):
        key = _splitmix(key[..., None] + torch.tensor([_signed(n) for n in counters]).long())
    return key


def uniform_noise(key_R: Tensor, place_R: Tensor) -> Tensor:
    """Return a uniform in [0, 1), float64, for each key and place in its stream."""
    # splitmix64 itself walks by its odd increment: stepping by it gives each place its own state.
    bits_R = _splitmix(key_R + place_R * _signed(_GOLDEN))
    # The upper 53 bits, all that a float64 holds, as a multiple of 2^-53: never 1.
    return _shift_right(bits_R, 11).double() * 2.0**-53


def _splitmix(x: Tensor) -> Tensor:
    """One step of splitmix64 in int64, whose products wrap as uint64's do."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # without the sign's copies


def _signed(value: int) -> int:
    """Return the int64 with the same bits as a uint64; torch has no arithmetic on the latter."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
