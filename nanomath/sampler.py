"""The group sampler, plainly: run a prompt once, copy its keys and values G times, decode.

    prompt   The sum of 3 and 4 is      run once: keys and values of 7 tokens
    output 0                      7 .   each output has its own copy of them, and goes on
    output 1                      s     from there, one token a pass, all G in one batch
    output 2                      8 .

One group after the other; outputs that have ended run on with the others, and are cut afterwards.
`python train_grpo.py --sampler plain` trains with it. The fast form is engine/, which holds the
prompt once for the whole group, samples many groups at a time and fills the rows of outputs that
have ended with the next ones; tests/nanomath/test_sampler.py holds the two to the same tokens.
Next: draw.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import NotFinite
from nanomath.draw import choose_tokens, stream_keys, uniform_noise
from nanomath.model import Transformer, attend, attention_mask, visible
from nanomath.rollouts import Rollouts


class KeyValues:
    """A model's Cache: the keys and values of all tokens so far, [G, S, K, E] for each layer."""

    def __init__(self, device: torch.device):
        self.device, self.length = device, 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return where the tokens of this pass stand, [1, T]: behind those that are here."""
        self.length += num_tokens
        return torch.arange(self.length - num_tokens, self.length, device=self.device)[None]

    def attend(
        self, layer: int, query_GTHE: Tensor, key_GTKE: Tensor, value_GTKE: Tensor
    ) -> Tensor:
        """Append keys and values; return the attention of the queries to all of them."""
        for kept, new in ((self.keys, key_GTKE), (self.values, value_GTKE)):
            # Copies all that was there, for every token anew: the price of having no fixed size.
            kept[layer] = torch.cat((kept[layer], new), dim=1) if layer in kept else new
        # The queries are the last of the tokens so far: all of a prompt, or the one new token.
        place_S = torch.arange(self.length, device=self.device)
        seen_1TS = visible(place_S[-query_GTHE.shape[1] :, None], place_S)[None]
        mask = attention_mask(seen_1TS, query_GTHE.dtype)
        return attend(query_GTHE, self.keys[layer], self.values[layer], mask)

    def copy(self, group_size: int) -> None:
        """Give each of G outputs its own copy of a prompt's keys and values."""
        # G times the memory of the prompt: what engine/cache.py saves by holding it once a group.
        for kept in (self.keys, self.values):
            for layer, prompt_1SKE in kept.items():
                kept[layer] = prompt_1SKE.repeat(group_size, 1, 1, 1)


@torch.no_grad()
def sample_group(
    model: Transformer,
    prompt: Sequence[int],
    keys_G: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float,
    vocab_limit: int,
) -> list[tuple[Tensor, Tensor, bool]]:
    """Sample G outputs of one prompt: tokens, log-probabilities, and whether it ended, of each.

    keys_G: each output's random stream (draw.py).
    """
    # The first token of every output is drawn from the same logits, those behind the prompt.
    device = model.embedding.weight.device
    cache, keys_G, eos = KeyValues(device), keys_G.to(device), torch.tensor(eos_ids, device=device)
    logits_GV = model(torch.tensor([prompt], device=device), cache=cache)[:, -1]  # prefill
    logits_GV = logits_GV.expand(len(keys_G), -1)
    cache.copy(len(keys_G))
    tokens_GT, logp_GT = torch.zeros(2, len(keys_G), 0, device=device)
    for position in range(min(max_new_tokens, model.cfg.max_context - len(prompt))):
        # The position is the place in the output's stream: the engine draws there with other
        # neighbours, and at other times, the same number.
        uniform_G = uniform_noise(keys_G, torch.tensor(position, device=device))
        token_G, logp_G = choose_tokens(
            logits_GV, uniform_G, temperature=temperature, vocab_limit=vocab_limit
        )
        tokens_GT = torch.cat((tokens_GT.long(), token_G[:, None]), dim=1)
        logp_GT = torch.cat((logp_GT.to(logp_G.dtype), logp_G[:, None]), dim=1)
        # An output that has ended runs on until the last one ends: G rows a pass, always.
        is_eos_GT = torch.isin(tokens_GT, eos)
        if is_eos_GT.any(dim=1).all():
            break
        logits_GV = model(token_G[:, None], cache=cache)[:, -1]  # decode
    # An output ends with its first EOS, which belongs to it; what was drawn behind that is cut.
    rows = []
    for tokens_T, logp_T, is_eos_T in zip(tokens_GT.cpu(), logp_GT.cpu(), is_eos_GT.cpu()):
        ended = bool(is_eos_T.any())
        length = int(is_eos_T.int().argmax()) + 1 if ended else len(tokens_T)
        rows.append((tokens_T[:length], logp_T[:length], ended))
    return rows


def sample_groups(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    vocab_limit: int | None = None,
    seed: int = 0,
    step: int = 0,
    prompt_ids: Sequence[int] | None = None,
    **refused,
) -> Rollouts:
    """Sample G outputs of each prompt, with the tokens that engine.stream.sample_groups draws.

    The arguments are that function's. Raises ValueError for those that only it has, for a prompt
    that leaves no room, and for logits that are not finite.
    """
    # A setting that was ignored in silence would sample from another distribution than asked for.
    if refused:
        raise ValueError(f"the plain sampler has no {', '.join(refused)}: take the engine")
    if not all(0 < len(prompt) < model.cfg.max_context for prompt in prompts):
        raise ValueError("the plain sampler needs prompts of 1 to max_context - 1 tokens")
    # A question that is drawn twice in a batch has two prompt ids, hence two different groups.
    keys_PG = stream_keys(seed, step, prompt_ids or range(len(prompts)), range(group_size))
    limits = {"max_new_tokens": max_new_tokens, "vocab_limit": vocab_limit or model.cfg.vocab_size}
    how = {"eos_ids": eos_ids, "temperature": temperature, **limits}
    rows = []
    for prompt, keys_G in zip(prompts, keys_PG, strict=True):
        rows += sample_group(model, prompt, keys_G, **how)
    # A NaN would still draw some token, and its log-probability would reach the update.
    if not all(bool(logp_T.isfinite().all()) for _, logp_T, _ in rows):
        raise NotFinite("sample_groups: the model's logits are not finite")
    # The most likely token is not a draw from the policy: Eq. 3's expectation needs draws.
    return Rollouts.of_rows(rows, group_size, from_policy=temperature > 0)
