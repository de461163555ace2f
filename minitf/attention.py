"""The attention block: every position *matches* its query with all keys, *weighs* the matches, *gathers* the values.

    match    scores  = q @ k.T / sqrt(head_dim)     how well does each earlier word answer what this word asks for?
    weigh    weights = softmax(scores)              turn the scores of one query into shares that sum to 1
    gather   mixed   = weights @ v                  add up the values of the earlier words, by their shares

"Attention Is All You Need" (Vaswani et al., 2017), equation 1; with rotary positions (Su et al., 2021), normalised
queries and keys (Henry et al., 2020) and grouped queries (Ainslie et al., 2023), arranged as in Qwen3.

Axes in names, as everywhere: B batch, T query position, S key position, D hidden, H heads, K head width.

Change a line and train: what is written here is what trains, what the maps show and what generates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitf.rope import rotate


class Linear(nn.Linear):
    """`y = x W^T` without bias, computed in the dtype of x: float32 weights serve bfloat16 activations."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def joint_linear(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same input, by one product: fewer calls, which count at small sizes."""
    weight = torch.cat([layer.weight.to(x.dtype) for layer in layers])
    return torch.split(F.linear(x, weight), [layer.out_features for layer in layers], dim=-1)


class RMSNorm(nn.RMSNorm):
    """`y = x / rms(x) * weight` over the last axis (Zhang & Sennrich, 2019), in the dtype of x."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def match(q_BHTK: Tensor, k_BHSK: Tensor, mask: Tensor) -> Tensor:
    """Compare every query with every key: `scores_BHTS = q @ k.T / sqrt(head_dim) + mask`.

    `mask`, of shape (T, S) or (B, T, S), is 0 where a query may look and -inf where it may not. With fewer key heads
    than query heads, consecutive query heads share a key head (grouped queries).
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BHSK.shape[1], k_BHSK.shape[2]
    # Queries that share a key head are adjacent, so one batched product serves the group without copying keys. The
    # queries are divided, not the scores: there are fewer of them.
    queries = (q_BHTK / math.sqrt(K)).reshape(B * G, H // G * T, K)
    scores = torch.bmm(queries, k_BHSK.reshape(B * G, S, K).transpose(1, 2)).view(B, G, H // G * T, S)
    return (scores + torch.cat([mask.unsqueeze(-3)] * (H // G), dim=-2)).view(B, H, T, S)


def weigh(scores_BHTS: Tensor) -> Tensor:
    """Turn each query's scores into weights between 0 and 1 that sum to 1 over the keys."""
    return torch.softmax(scores_BHTS, dim=-1)


def gather(weights_BHTS: Tensor, v_BHSK: Tensor) -> Tensor:
    """Add up the values by their weights: `mixed_BHTK = weights @ v`."""
    B, H, T, S = weights_BHTS.shape
    G, K = v_BHSK.shape[1], v_BHSK.shape[3]
    mixed = torch.bmm(weights_BHTS.reshape(B * G, H // G * T, S), v_BHSK.reshape(B * G, S, K))
    return mixed.view(B, H, T, K)


def visible_keys(num_queries: int, num_keys: int, device: torch.device, segments_BS: Tensor | None = None) -> Tensor:
    """Whether a query may look at a key, bool (T, S) or (B, T, S): itself and what came before it, in its own segment.

    The queries are the last of the keys. Rotary positions need no restart in a segment: they encode distances.
    """
    past_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    if segments_BS is None:
        return past_TS
    return (segments_BS[:, -num_queries:, None] == segments_BS[:, None, :]) & past_TS


@dataclass
class KeyValueCache:
    """Keys and values of the positions read so far, so that decoding computes each only once.

    `keys` and `values` have shape (layers, B, key heads, capacity, K) and are filled up to `length`. Rows of texts of
    different lengths end together: row b begins at `starts_B[b]` and ignores what is before; None: all begin at 0.
    """

    keys: Tensor
    values: Tensor
    length: int = 0
    starts_B: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values and return all so far; the model calls `advance` after the layers."""
        end = self.length + k_BHTK.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BHTK
        self.values[layer, :, :, self.length : end] = v_BHTK
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_positions: int) -> None:
        self.length += num_positions

    def rotary(self, rotary_2TK: Tensor, num_positions: int) -> Tensor:
        """The part of the rotary table for the next positions."""
        return rotary_2TK[:, self.length : self.length + num_positions]

    def visible(self, num_positions: int) -> Tensor:
        """Which keys the next positions may look at, bool (T, S) or (B, T, S)."""
        end, device, segments_BS = self.length + num_positions, self.keys.device, None
        if self.starts_B is not None:
            segments_BS = (torch.arange(end, device=device) >= self.starts_B[:, None]).int()
        return visible_keys(num_positions, end, device, segments_BS)


class AttentionRecord(NamedTuple):
    """What one layer matched, weighed and gathered; queries and keys are rotated, as `match` reads them."""

    q_BHTK: Tensor
    k_BHSK: Tensor
    v_BHSK: Tensor
    weights_BHTS: Tensor
    mixed_BHTK: Tensor


Edits = Callable[[str, int, Tensor], Tensor]  # "match", "weigh" or "gather", the layer, its result -> the result to use


@dataclass
class AttentionContext:
    """What one forward pass gives to all its blocks.

    `rotary_2TK` is the rotary table of the positions read, `segments_BT` numbers the texts packed into a row (None: one
    text), `dtype` is that of the activations. A `record` list gets one `AttentionRecord` a layer; `edits` change it.
    """

    rotary_2TK: Tensor
    dtype: torch.dtype
    segments_BT: Tensor | None = None
    cache: KeyValueCache | None = None
    record: list[AttentionRecord] | None = None
    edits: Edits | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)  # a variant's own: for its other steps, for later layers
    _mask: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether only the output is wanted: no cache, no record, no edits."""
        return self.cache is None and self.record is None and self.edits is None

    def visible(self) -> Tensor:
        """Whether a query may look at a key, bool (T, S) or (B, T, S)."""
        T = self.rotary_2TK.shape[1]
        return self.cache.visible(T) if self.cache else visible_keys(T, T, self.rotary_2TK.device, self.segments_BT)

    def mask(self) -> Tensor:
        """The mask for `match`, made once for all layers."""
        if self._mask is None:
            visible = self.visible()
            self._mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
            self._mask.masked_fill_(~visible, float("-inf"))
        return self._mask


# Queries taken together. A block of queries meets only the keys up to its end: most of what a mask hides is never
# computed. With 8 heads at 512 positions blocks of 64, 128, 256 and 512 took 25, 20, 25 and 30 ms.
QUERY_BLOCK = 128


class Attention(nn.Module):
    """Multi-head causal self-attention; parameter names are those of Qwen3 and Llama in Hugging Face transformers."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(hidden_size, num_heads * head_dim)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.o_proj = Linear(num_heads * head_dim, hidden_size)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else nn.Identity()

    # The three steps, and the positions of queries and keys, which a variant of attention may override.

    def rotate(self, x_BHTK: Tensor, rotary_2TK: Tensor) -> Tensor:
        return rotate(x_BHTK, rotary_2TK)

    def match(self, q_BHTK: Tensor, k_BHSK: Tensor, mask: Tensor) -> Tensor:
        return match(q_BHTK, k_BHSK, mask)

    def weigh(self, scores_BHTS: Tensor) -> Tensor:
        return weigh(scores_BHTS)

    def gather(self, weights_BHTS: Tensor, v_BHSK: Tensor) -> Tensor:
        return gather(weights_BHTS, v_BHSK)

    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        """Let every position of `x_BTD` look at the positions up to itself; returns the gathered values, same shape."""
        B, T, _ = x_BTD.shape
        q, k, v = joint_linear(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BHTK = self.q_norm(q.view(B, T, -1, self.head_dim)).transpose(1, 2)
        k_BHSK = self.k_norm(k.view(B, T, -1, self.head_dim)).transpose(1, 2)
        v_BHSK = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        q_BHTK, k_BHSK = self.rotate(q_BHTK, context.rotary_2TK), self.rotate(k_BHSK, context.rotary_2TK)
        if context.cache is not None:
            k_BHSK, v_BHSK = context.cache.append(layer, k_BHSK, v_BHSK)
        mixed_BHTK = self.attend(q_BHTK, k_BHSK, v_BHSK, context, layer)
        return self.o_proj(mixed_BHTK.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]

    def attend(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Match, weigh and gather; returns mixed_BHTK. The queries are the last of the keys."""
        mask, edited = context.mask(), context.edits or (lambda step, layer, result: result)
        T, S = mask.shape[-2:]
        size = QUERY_BLOCK if context.record is None and context.edits is None else T
        blocks = []
        for start in range(0, T, size):
            end = min(start + size, T)
            seen = S - T + end
            scores_BHTS = self.match(q_BHTK[:, :, start:end], k_BHSK[:, :, :seen], mask[..., start:end, :seen])
            weights_BHTS = edited("weigh", layer, self.weigh(edited("match", layer, scores_BHTS)))
            blocks.append(edited("gather", layer, self.gather(weights_BHTS, v_BHSK[:, :, :seen])))
            if context.record is not None:
                context.record.append(AttentionRecord(q_BHTK, k_BHSK, v_BHSK, weights_BHTS, blocks[0]))
        return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]


if __name__ == "__main__":  # `python -m minitf.attention "TEXT"` shows the attention of a trained model
    import runpy

    runpy.run_module("minitf.interpretability.page", run_name="__main__")
