"""The attention block: every position *matches* its query with all keys, *weighs* the matches, *gathers* the values.

    match    scores  = q @ k.T / sqrt(head_dim)     how well does each earlier word answer what this word looks for?
    weigh    weights = softmax(scores)              turn the scores of one query into shares that sum to 1
    gather   mixed   = weights @ v                  add up the values of the earlier words, by their shares

"Attention Is All You Need" (Vaswani et al., 2017), equation 1; with rotary positions (Su et al., 2021), normalised
queries and keys (Henry et al., 2020) and grouped queries (Ainslie et al., 2023), arranged as in Qwen3.

Axes in names, as everywhere: B batch, T query position, S key position, D hidden, H heads, K head width.

This is what attention is, and what looks inside a model computes; where a processor allows, training computes the same
by attention.c of kernels/bfloat16 or float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitf.rope import scaled_frequencies


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
    # Queries that share a key head lie side by side, so one batched product serves the group without copying keys. The
    # division is the queries', which are fewer than the scores.
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


# Queries taken together on the explicit path. A block meets only the keys up to its end: of what the mask would hide,
# most is never computed. With 8 heads at 512 positions blocks of 64, 128, 256 and 512 took 25, 20, 25 and 30 ms.
QUERY_BLOCK = 128


def attend(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor) -> Tensor:
    """Match, weigh and gather, block by block of queries, which are the last of the keys; returns mixed_BHTK."""
    T, S = mask.shape[-2:]
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        seen = S - T + end
        scores_BHTS = match(q_BHTK[:, :, start:end], k_BHSK[:, :, :seen], mask[..., start:end, :seen])
        blocks.append(gather(weigh(scores_BHTS), v_BHSK[:, :, :seen]))
    return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]


def rotary_table(head_dim: int, num_positions: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Cosines and sines of the rotation of each pair of channels at each position, shape (2, num_positions, head_dim).

    Channel pair i turns by `position * theta^(-2i / head_dim)` radians (RoFormer, equation 15), which the `scaling` of
    a pretrained model may change.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies, factor = scaled_frequencies(frequencies, theta, scaling or {})
    angles_TK = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies).repeat(1, 2)
    return torch.stack([angles_TK.cos(), angles_TK.sin()]) * factor


def rotate(x_BHTK: Tensor, rotary_2TK: Tensor) -> Tensor:
    """Turn queries or keys by their position, so that their product depends on the distance between them.

    Pairs are (i, i + head_dim / 2), the arrangement of Llama and Qwen checkpoints.
    """
    cos, sin = rotary_2TK[..., : x_BHTK.shape[-1] // 2].to(x_BHTK.dtype).unbind()  # both halves turn alike
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_mask(num_queries: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Mask_TS that lets each query see itself and what came before; the queries are the last of the keys."""
    future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu(num_keys - num_queries + 1)
    return torch.zeros(num_queries, num_keys, dtype=dtype, device=device).masked_fill_(future, float("-inf"))


def packed_mask(segments_BT: Tensor, segments_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask_BTS that lets each query see itself and what came before in its own segment of the row.

    Of dtype bool it is True where a query may look, else 0 there and -inf elsewhere. Rotary positions need no fresh
    start in a segment: what they tell is distance.
    """
    T, S = segments_BT.shape[1], segments_BS.shape[1]
    past_TS = torch.ones(T, S, dtype=torch.bool, device=segments_BT.device).tril(S - T)
    seen_BTS = (segments_BT[:, :, None] == segments_BS[:, None, :]) & past_TS
    if dtype == torch.bool:
        return seen_BTS
    return torch.zeros(seen_BTS.shape, dtype=dtype, device=seen_BTS.device).masked_fill_(~seen_BTS, float("-inf"))


def segment_starts(segments_BT: Tensor) -> Tensor:
    """The first position of each position's segment, int32 of shape (B, T): another form of `packed_mask`.

    The positions of a segment lie side by side.
    """
    positions_BT = torch.arange(segments_BT.shape[1], dtype=torch.int32, device=segments_BT.device).expand_as(
        segments_BT
    )
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.where(begins_BT, positions_BT, 0).cummax(dim=1).values


@dataclass
class KeyValueCache:
    """Keys and values of the positions read so far, so that decoding computes each only once.

    `keys` and `values` have shape (layers, B, key heads, capacity, K) and are filled up to `length`. Rows of texts of
    different lengths end together: `starts_B` is where each begins, what is before counts for nothing; None: all at 0.
    """

    keys: Tensor
    values: Tensor
    length: int = 0
    starts_B: Tensor | None = None  # noqa: N815

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values and return all so far; the model advances `length` after the layers."""
        end = self.length + k_BHTK.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BHTK
        self.values[layer, :, :, self.length : end] = v_BHTK
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


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

    def forward(
        self,
        x_BTD: Tensor,
        rotary_2TK: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Let every position of `x_BTD` look at the positions up to itself; returns what they gathered, same shape.

        With a mask to add, (T, S) or (B, T, S), the three steps are computed as they are written (the explicit path),
        and a `weights` list gets this layer's `weights_BHTS` appended; with a boolean one or none, which means causal,
        PyTorch's fused kernel computes the same in one call.
        """
        B, T, _ = x_BTD.shape
        q, k, v = joint_linear(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BHTK = self.q_norm(q.view(B, T, -1, self.head_dim)).transpose(1, 2)
        k_BHSK = self.k_norm(k.view(B, T, -1, self.head_dim)).transpose(1, 2)
        v_BHSK = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        q_BHTK, k_BHSK = rotate(q_BHTK, rotary_2TK), rotate(k_BHSK, rotary_2TK)
        if cache is not None:
            k_BHSK, v_BHSK = cache.append(layer, k_BHSK, v_BHSK)

        if mask is None or mask.dtype == torch.bool:
            grouped, causal = k_BHSK.shape[1] != q_BHTK.shape[1], mask is None and T > 1
            seen = None if mask is None else mask.unsqueeze(-3)
            mixed_BHTK = F.scaled_dot_product_attention(
                q_BHTK, k_BHSK, v_BHSK, seen, is_causal=causal, enable_gqa=grouped
            )
        elif weights is None:
            mixed_BHTK = attend(q_BHTK, k_BHSK, v_BHSK, mask)
        else:
            weights.append(weigh(match(q_BHTK, k_BHSK, mask)))
            mixed_BHTK = gather(weights[-1], v_BHSK)
        return self.o_proj(mixed_BHTK.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


if __name__ == "__main__":  # `python -m minitf.attention "TEXT"` looks inside a trained model
    import runpy

    runpy.run_module("minitf.interpretability.page", run_name="__main__")
