"""The Transformer of DeepSeek-LLM (Sec. 2.2, 2.3): a Llama, in one readable file.

Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU; Qwen2's bias on queries, keys
and values and Qwen3's norm of queries and keys are switches. The order of the file is the order of
a forward pass: configuration, norm, rotary, attention, feed-forward, block, Transformer. Parameter
names map one to one to Llama's. What this file leaves to others: sharding (dist.py applies it from
outside), losses (kernels, as `head_fn`), keys and values kept while sampling (a `Cache`, passed
in), choosing tokens (draw.py), reading weights (run/load.py). Next: sampler.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cache(Protocol):
    """What a pass asks of the keys and values of earlier tokens: sampler.py has the plain one,
    engine/cache.py the fast one."""

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return the positions [B, T] of the tokens of this pass."""

    def attend(
        self, layer: int, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor
    ) -> Tensor:
        """Store the keys and values of `layer`; return the attention [B, T, H, E] to all it has."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer. Widths are numbers of features, contexts numbers of tokens."""

    vocab_size: int
    num_layers: int
    width: int  # D
    num_heads: int  # H
    num_kv_heads: int  # K: H = multi-head attention, less = grouped queries
    ffn_width: int  # F
    head_width: int | None = None  # E; None: width / num_heads
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6
    max_context: int = 4096
    tied_head: bool = False  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm of every query and key head, before the rotation
    # Rotary frequencies are divided by rope_factor: all of them (linear scaling, DeepSeek-Coder),
    # or, where rope_original_context is given (Llama 3), only the slow ones.
    rope_factor: float = 1.0
    rope_original_context: int | None = None
    rope_low_freq: float = 1.0  # turns in the original context: fewer are divided,
    rope_high_freq: float = 4.0  # more are left alone, between them both are mixed

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "ffn_width")
        # Sizes also come from other people's config.json: a wrong one is named before it is built.
        for name in (*sizes, "max_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}; it must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; every key/value head serves the same number of query heads"
            )
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(
                f"ModelConfig: width {self.width} is not a multiple of num_heads {self.num_heads}; "
                "change one or give head_width"
            )
        if self.head_size % 2:
            raise ValueError(f"ModelConfig: head width {self.head_size} is odd; rotary needs pairs")
        for name in ("rope_theta", "rms_eps", "rope_factor", "rope_low_freq", "rope_high_freq"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"ModelConfig.{name} is {value}; it must be finite and > 0")
        if self.rope_original_context is not None and self.rope_original_context < 1:
            raise ValueError(f"ModelConfig.rope_original_context is {self.rope_original_context}")
        if self.rope_high_freq <= self.rope_low_freq:
            raise ValueError(
                f"ModelConfig: rope_high_freq {self.rope_high_freq} must be more than "
                f"rope_low_freq {self.rope_low_freq}"
            )

    @property
    def head_size(self) -> int:
        """E: `head_width` where given, else width / num_heads."""
        return self.head_width if self.head_width is not None else self.width // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Count the parameters without building the model; a tied head counts once."""
        # Queries and output are D x HE each, keys and values D x KE; a SwiGLU has three D x F.
        attention = 2 * self.width * self.head_size * (self.num_heads + self.num_kv_heads)
        attention += self.head_size * (self.num_heads + 2 * self.num_kv_heads) * self.qkv_bias
        attention += 2 * self.head_size * self.qk_norm
        block = attention + 3 * self.width * self.ffn_width + 2 * self.width
        embeddings = self.vocab_size * self.width * (1 if self.tied_head else 2)
        return embeddings + self.num_layers * block + self.width


MODEL_PRESETS = {
    # Sec. 2.2: the corpus ablations' 1.3B; its shape is not published, this one is ours.
    "deepseek_llm_1b3": ModelConfig(102400, 24, 2048, 16, 16, 5504),
    # Sec. 2.3: DeepSeekMath 7B's shape (DeepSeek-LLM 7B, DeepSeek-Coder v1.5 7B).
    "deepseek_llm_7b": ModelConfig(102400, 30, 4096, 32, 32, 11008),
}


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Plain operations: on a CPU F.rms_norm's backward takes 2.5 times as long as theirs.
        # In bf16 the mean is taken in fp32, as Llama does; fp32 and float64 stay what they are.
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rotary_frequencies(cfg: ModelConfig, device: torch.device) -> Tensor:
    """Return the angle per position of each feature pair, fp32 [E/2], bit for bit Llama's."""
    pairs = torch.arange(0, cfg.head_size, 2, device=device).float() / cfg.head_size
    freqs = 1.0 / cfg.rope_theta**pairs
    if cfg.rope_original_context is None:
        return freqs / cfg.rope_factor
    # Llama 3: a pair that turns often in the original context stays, one that hardly turns is
    # slowed down as in linear scaling.
    context, low, high = cfg.rope_original_context, cfg.rope_low_freq, cfg.rope_high_freq
    lengths = 2 * math.pi / freqs  # positions per turn
    share = (context / lengths - low) / (high - low)
    mixed = (1 - share) * freqs / cfg.rope_factor + share * freqs
    slowed = torch.where(lengths > context / low, freqs / cfg.rope_factor, mixed)
    return torch.where(lengths < context / high, freqs, slowed)


def rotary_table(cfg: ModelConfig, positions_BT: Tensor, dtype: torch.dtype):
    """Return cos and signed sin, each [B, T, 1, E], for `rotate`; once per forward pass.

    The angles are fp32 whatever the model's dtype: bf16 cannot tell position 257 from 258. They are
    computed from the positions, not kept in a buffer, so no `.to(bfloat16)` can round them.
    """
    freqs = rotary_frequencies(cfg, positions_BT.device)
    angles = positions_BT[:, :, None, None].float() * freqs
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x_BTHE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate feature i with feature i + E/2 (the order of Hugging Face's Llama weights)."""
    cos, signed_sin = rope
    # roll swaps the halves and the sign sits in the sine: half of rotate_half's operations. No
    # addcmul: its fused rounding would save one more, but logits then differ from Llama's by 1 ulp.
    return x_BTHE * cos + x_BTHE.roll(x_BTHE.shape[-1] // 2, -1) * signed_sin


def visible(query_position: Tensor, key_position: Tensor) -> Tensor:
    """Who sees whom: a token sees itself and what came before it. Positions broadcast; bool.

    The one place that says so: a full pass, packed segments, the plain sampler and the engine all
    ask here. A sliding window is one more condition, `& (query_position - key_position < window)`,
    and IS_CAUSAL = False.
    """
    return key_position <= query_position


# True lets a full pass skip the mask: `visible` then is what SDPA itself calls causal, at half the
# time. Set it to False with every change of `visible`.
IS_CAUSAL = True


def attention_mask(visible_BTS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, [B, 1, T, S]: 0 where a token is seen, else -inf.

    A mask of numbers, made once a pass: from bools each layer would make, and keep, its own.
    """
    mask = torch.zeros_like(visible_BTS, dtype=dtype)
    return mask.masked_fill_(~visible_BTS, float("-inf"))[:, None]


def attend(query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, [B, T, H, E], under a mask from `attention_mask`; None: of T tokens in order."""
    if mask is None and not IS_CAUSAL:
        place_T = torch.arange(query_BTHE.shape[1], device=query_BTHE.device)
        seen_1TT = visible(place_T[:, None], place_T)[None]
        mask = attention_mask(seen_1TT, query_BTHE.dtype)
    out_BHTE = F.scaled_dot_product_attention(
        query_BTHE.transpose(1, 2),
        key_BTKE.transpose(1, 2),
        value_BTKE.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        # H / K query heads share one key and value head, which is not copied for each of them.
        enable_gqa=query_BTHE.shape[2] != key_BTKE.shape[2],
    )
    return out_BHTE.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_size = layer, cfg.head_size
        query_width, kv_width = cfg.num_heads * cfg.head_size, cfg.num_kv_heads * cfg.head_size
        # Three products, not one fused: as fast within 10% at these sizes, and with Llama's names.
        self.q_proj = nn.Linear(cfg.width, query_width, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.width, kv_width, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.width, kv_width, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(query_width, cfg.width, bias=False)
        self.q_norm = RMSNorm(cfg.head_size, cfg.rms_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_size, cfg.rms_eps) if cfg.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        query_BTHE = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_size))
        key_BTKE = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_size))
        # Only queries and keys turn: their product then depends on how far apart two tokens are.
        query_BTHE = rotate(self.q_norm(query_BTHE), rope)
        key_BTKE = rotate(self.k_norm(key_BTKE), rope)
        value_BTKE = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_size))
        # While sampling, the keys and values of earlier tokens are the cache's to keep and to find.
        if cache is None:
            out_BTHE = attend(query_BTHE, key_BTKE, value_BTKE, mask)
        else:
            out_BTHE = cache.attend(self.layer, query_BTHE, key_BTKE, value_BTKE)
        return self.o_proj(out_BTHE.flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn_width, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn_width, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_width, cfg.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # Three matrices for two: at F = 8/3 D it has the size of a plain feed-forward of 4 D.
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.width, cfg.rms_eps)
        self.attention = Attention(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.width, cfg.rms_eps)
        self.ffn = SwiGLU(cfg)

    def forward(self, x_BTD, rope, mask, cache) -> Tensor:
        # Pre-norm: x itself is only ever added to, so the gradient reaches every block undamped.
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, mask, cache)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Transformer(nn.Module):
    """The language model. Its weights are torch's defaults until `init_weights` or a checkpoint."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.final_norm = RMSNorm(cfg.width, cfg.rms_eps)
        # The widest product of the model: 0.8 GB in bf16 at the 7B's shape, as is the embedding.
        self.head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        if cfg.tied_head:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self, seed: int, *, std: float = 0.02) -> None:
        """Draw matrices from normal(0, std), norms 1, biases 0; alike on every device for a seed.

        DeepSeek-LLM draws with std 0.006 (arXiv:2401.02954 section 2.3) at widths of 2048 and more;
        the default 0.02 (GPT-2) suits the widths of 128 to 1024 that are trained from nothing here.
        """
        # Drawn on the CPU and copied: a GPU's generator would give other numbers.
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():  # a tied head appears once
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        head_fn: Callable[[Tensor, Tensor], object] | None = None,
        segments_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
    ):
        """Return logits [B, T, V], or what `head_fn(hidden_BTD, head_VD)` returns.

        The head is applied only in here: a fused loss gets it as `head_fn`, where FSDP2 has
        gathered its weight. `segments_BT` (int): a token sees earlier tokens of its own segment
        only (packing). `positions_BT`: default 0, 1, ..., or where the cache stands.
        """
        num_rows, num_tokens = tokens_BT.shape
        if cache is not None and segments_BT is not None:
            raise ValueError("Transformer.forward: give a cache or segments_BT, not both")
        if positions_BT is None:
            if num_tokens > self.cfg.max_context:
                raise ValueError(
                    f"Transformer.forward: {num_tokens} tokens in a row, but max_context is "
                    f"{self.cfg.max_context}; shorten the rows or build the model with more"
                )
            if cache is not None:
                positions_BT = cache.positions(num_rows, num_tokens)
            else:
                positions_BT = torch.arange(num_tokens, device=tokens_BT.device)[None]
        hidden_BTD = self.embedding(tokens_BT)
        mask = None
        if segments_BT is not None:
            place_T = torch.arange(num_tokens, device=tokens_BT.device)
            # Packed examples share a row, not their text: block-diagonal, and causal inside.
            same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
            seen_BTT = same_BTT & visible(place_T[:, None], place_T)
            mask = attention_mask(seen_BTT, hidden_BTD.dtype)
        rope = rotary_table(self.cfg, positions_BT, hidden_BTD.dtype)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, rope, mask, cache)
        hidden_BTD = self.final_norm(hidden_BTD)
        if head_fn is None:
            return self.head(hidden_BTD)
        return head_fn(hidden_BTD, self.head.weight)
