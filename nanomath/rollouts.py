"""What flows through the loop of Algorithm 1: groups of outputs, then rows to train on.

    sampler --> Rollouts, [P, G, T], padded;  with advantages and weights, --make_batch-->
    RolloutBatch: rows of prompt and response, and one number per response token of everything else

Masks come from lengths, never from token ids. Next: optim.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanomath.dist import Dist, all_reduce_max
from nanomath.optim import split_rows


@dataclass
class Rollouts:
    """Samples of P prompts, G each, on the CPU; T is the length of the longest one."""

    tokens_PGT: Tensor  # int64, the sampled EOS included; 0 after the end, which lengths_PG tell
    lengths_PG: Tensor  # int64, tokens in the sample
    logp_PGT: Tensor  # fp32, under the full softmax at the sampling temperature; 0 after the end
    finished_PG: Tensor  # bool, ended by an EOS or a stop string; False: truncated
    from_policy: bool = True  # False: greedy, top-k or top-p; no training on those

    @staticmethod
    def of_rows(
        rows: Sequence[tuple[Tensor, Tensor, bool]], group_size: int, *, from_policy: bool
    ) -> Rollouts:
        """Lay out (tokens, log-probabilities, finished) of every output, group after group."""
        tokens, logp, finished = zip(*rows) if rows else ((), (), ())
        shape = len(rows) // group_size, group_size
        # An empty row is added and cut off again, because pad_sequence refuses an empty list.
        tokens_PGT, logp_PGT = (
            pad_sequence([*column, empty], batch_first=True)[:-1].unflatten(0, shape)
            for column, empty in ((tokens, torch.zeros(0).long()), (logp, torch.zeros(0)))
        )
        lengths_PG = torch.tensor([len(row) for row in tokens], dtype=torch.long).view(shape)
        finished_PG = torch.tensor(finished, dtype=torch.bool).view(shape)
        return Rollouts(tokens_PGT, lengths_PG, logp_PGT, finished_PG, from_policy)


@dataclass
class RolloutBatch:
    """This rank's sampled outputs as training rows; B = its questions times G.

    sequences: per output, prompt and response token ids in one list.
    prompt_lengths, response_lengths: B ints each; the sampled EOS is part of the response.
    num_rows_longest: the largest B of any rank, or less, by `agree_on_passes`. All ranks run as
        many passes as that takes, some without rows, because sharded ranks must run each pass
        together.
    The others are packed over response tokens: one axis N runs over the tokens of all rows, row by
    row, without padding. advantages_N, weights_N: float64. sampler_logp_N, ref_logp_N, old_logp_N:
    fp32 or wider, the last two as response_logprobs gives them.
    """

    sequences: list[list[int]]
    prompt_lengths: list[int]
    response_lengths: list[int]
    num_rows_longest: int
    advantages_N: Tensor
    weights_N: Tensor
    sampler_logp_N: Tensor
    ref_logp_N: Tensor | None = None
    old_logp_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def rows_in_loss(self) -> list[int]:
        """Return the rows of which a token weighs anything; the others are not even run."""
        weights = self.weights_N.split(self.response_lengths)
        return [row for row, weights_T in enumerate(weights) if weights_T.any()]

    def _rows_of_part(self, part: int, num_parts: int) -> list[int]:
        # Cut before rows leave the loss: a part is a share of the questions, whatever they weigh.
        first, end = (len(self) * k // num_parts for k in (part, part + 1))
        return [row for row in self.rows_in_loss() if first <= row < end]

    def agree_on_passes(self, num_parts: int, dist: Dist) -> None:
        """Run no more passes than the rank with most rows in the loss needs."""
        mine = max(len(self._rows_of_part(part, num_parts)) for part in range(num_parts))
        self.num_rows_longest = num_parts * int(all_reduce_max(float(mine), dist))

    def micro_batches(self, size: int, part: int = 0, num_parts: int = 1) -> list[list[int]]:
        """Return the rows of one part of the batch that are in the loss, `size` at a time.

        Rows of similar length share a micro-batch, so that little of it is padding. Scoring and
        updating split alike, so that the first ratio is 1 to the last bit.
        """
        # split_rows gives every rank the same number of micro-batches, the last of them empty where
        # a rank has fewer rows: under sharding all ranks must run each pass together.
        rows = self._rows_of_part(part, num_parts)
        rows.sort(key=lambda row: len(self.sequences[row]))
        return split_rows(rows, self.num_rows_longest // num_parts, size)

    def token_positions(self, rows: Sequence[int]) -> Tensor:
        """Return the positions on the packed axis N of the response tokens of `rows`."""
        ends = torch.tensor(self.response_lengths, dtype=torch.int64).cumsum(0)
        parts = [torch.arange(ends[row] - self.response_lengths[row], ends[row]) for row in rows]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def make_batch(
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    advantages: Tensor,
    weights: Tensor,
    *,
    num_prompts: int,
    world_size: int,
) -> RolloutBatch:
    """Lay out rollouts of this rank's prompts as rows; num_prompts, of world_size ranks, is all.

    advantages, weights: of each token, [P, G, T], or the same for all tokens of an output, [P, G].
    Raises ValueError for outputs that greedy, top-k or top-p choice took from another distribution.
    """
    if not rollouts.from_policy:
        raise ValueError("outputs drawn greedily, by top-k or by top-p are not the policy's own")
    lengths_PG, tokens_PGT = rollouts.lengths_PG.cpu(), rollouts.tokens_PGT.cpu()
    group_size = lengths_PG.shape[1]
    is_response_PGT = torch.arange(tokens_PGT.shape[2]) < lengths_PG[:, :, None]

    def packed(values: Tensor) -> Tensor:
        # An advantage of an output is one of each of its tokens (outcome supervision, Sec. 4.1.2).
        values_PGT = values if values.dim() == 3 else values[:, :, None]
        return values_PGT.expand(tokens_PGT.shape)[is_response_PGT]

    response_lengths = lengths_PG.flatten().tolist()
    outputs = packed(tokens_PGT).split(response_lengths)
    owners = [prompt for prompt in prompts for _ in range(group_size)]
    return RolloutBatch(
        sequences=[[*prompt, *output.tolist()] for prompt, output in zip(owners, outputs)],
        prompt_lengths=[len(prompt) for prompt in owners],
        response_lengths=response_lengths,
        # Questions are dealt out in turn, so the first rank has the most; all must know how many.
        num_rows_longest=math.ceil(num_prompts / world_size) * group_size,
        advantages_N=packed(advantages),
        weights_N=packed(weights),
        sampler_logp_N=packed(rollouts.logp_PGT.cpu()),
    )
