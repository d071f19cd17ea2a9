"""What flows through the loop of Algorithm 1: groups of outputs, as they were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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
        # An empty row more, cut off again, so that no rows at all can be padded, too.
        tokens_PGT, logp_PGT = (
            pad_sequence([*column, empty], batch_first=True)[:-1].unflatten(0, shape)
            for column, empty in ((tokens, torch.zeros(0).long()), (logp, torch.zeros(0)))
        )
        lengths_PG = torch.tensor([len(row) for row in tokens], dtype=torch.long).view(shape)
        finished_PG = torch.tensor(finished, dtype=torch.bool).view(shape)
        return Rollouts(tokens_PGT, lengths_PG, logp_PGT, finished_PG, from_policy)
