"""Triton kernels between a product that makes queries, keys and values, and attention: norms and rotary positions."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitf.backends.cuda.triton_rows import ROWS_EACH, block_of
from minitf.backends.fused import Heads


@triton.jit
def _two_weights(q_weight, k_weight, channel, is_query):
    """The weights of the norm of queries or of keys, a row for each head."""
    return tl.where(is_query, tl.load(q_weight + channel)[None, :], tl.load(k_weight + channel)[None, :])


@triton.jit
def _forward(
    qkv, q_weight, k_weight, cosines, sines, qk, num_positions, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row, h, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, K)
    partner = (k + K // 2) % K  # the channel that a channel is rotated with
    heads, mask = h[:, None] * K, (h < H + G)[:, None] & (k >= 0)[None, :]
    at = qkv + row * (H + 2 * G) * K + heads
    x = tl.load(at + k[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(at + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        is_query = (h < H)[:, None]
        scale = (1 / tl.sqrt(tl.sum(x * x, axis=1) / K + eps))[:, None]
        x *= scale * _two_weights(q_weight, k_weight, k, is_query)
        y *= scale * _two_weights(q_weight, k_weight, partner, is_query)
    angle = row % num_positions * K + k
    cos, sin = tl.load(cosines + angle), tl.load(sines + angle) * tl.where(k < K // 2, -1.0, 1.0)
    turned = x * cos[None, :] + y * sin[None, :]
    tl.store(qk + row * (H + G) * K + heads + k[None, :], turned.to(qk.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(dq, dk, row, h, channel, mask, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr):
    """Those of a channel of all queries and keys, which lie in two places."""
    heads = h[:, None] * K + channel[None, :]
    queries = tl.load(dq + row * H * K + heads, mask=mask & (h < H)[:, None], other=0.0)
    is_key = (h >= H) & (h < H + G)
    keys = tl.load(dk + row * G * K + heads - H * K, mask=mask & is_key[:, None], other=0.0)
    return queries.to(tl.float32) + keys.to(tl.float32)


@triton.jit
def _backward(
    qkv, q_weight, k_weight, cosines, sines, dq, dk, dv, dqkv, parts, num_rows, num_positions, eps, H: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    program, h, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, K)
    is_query, is_value, partner = (h < H)[:, None], (h >= H + G)[:, None], (k + K // 2) % K
    inside = h[:, None] * K + k[None, :]
    dweights = tl.zeros([BLOCK, K], dtype=tl.float32)
    for done in range(EACH):
        row = program * EACH + done
        mask = (h < tl.where(row < num_rows, H + 2 * G, 0))[:, None] & (k >= 0)[None, :]
        angle = row % num_positions * K + k
        cos, sin = tl.load(cosines + angle), tl.load(sines + angle) * tl.where(k < K // 2, 1.0, -1.0)
        dx = _gradients(dq, dk, row, h, k, mask, H, G, K) * cos[None, :]
        dx += _gradients(dq, dk, row, h, partner, mask, H, G, K) * sin[None, :]
        at = row * (H + 2 * G) * K + inside
        if HAS_NORM:
            unit = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
            scale = (1 / tl.sqrt(tl.sum(unit * unit, axis=1) / K + eps))[:, None]
            unit *= scale
            dweights += dx * unit
            dx *= _two_weights(q_weight, k_weight, k, is_query)
            dx = (dx - unit * (tl.sum(dx * unit, axis=1) / K)[:, None]) * scale
        values = tl.load(dv + row * G * K + inside - (H + G) * K, mask=mask & is_value, other=0.0)
        dx = tl.where(is_value, values.to(tl.float32), dx)
        tl.store(dqkv + at, dx.to(dqkv.dtype.element_ty), mask=mask)
    if HAS_NORM:  # of values dx was 0 where their share of the weights' gradient was added up
        tl.store(parts + program * 2 * K + k, tl.sum(tl.where(is_query, dweights, 0.0), axis=0))
        tl.store(parts + program * 2 * K + K + k, tl.sum(tl.where(is_query, 0.0, dweights), axis=0))


def heads_forward(
    heads: Heads, qkv_BTC: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rotary_2TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries_BTHK and keys_BTGK, normalised (if there are weights of norms, float32) and turned by their positions.

    The width of a head is a power of 2.
    """
    (B, T), (H, G, K, eps) = qkv_BTC.shape[:2], heads
    both, weights = qkv_BTC.new_empty(B, T, H + G, K), _weights(q_norm, k_norm, rotary_2TK)
    _forward[(B * T,)](
        qkv_BTC, *weights, rotary_2TK[0], rotary_2TK[1], both, T, eps, H, G, K, block_of(H + G), q_norm is not None
    )
    return both[:, :, :H], both[:, :, H:]


def heads_backward(
    heads: Heads, kept: Sequence[Any], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of qkv_BTC and of both weights, from those of queries_BTHK, keys_BTGK and values_BTGK."""
    qkv_BTC, q_norm, k_norm, rotary_2TK = kept  # as given to `heads_forward`
    (B, T), (H, G, K, eps) = qkv_BTC.shape[:2], heads
    parts = torch.empty(-(-B * T // ROWS_EACH), 2, K, device=qkv_BTC.device)
    dqkv_BTC, weights = torch.empty_like(qkv_BTC), _weights(q_norm, k_norm, rotary_2TK)
    _backward[(len(parts),)](
        qkv_BTC, *weights, rotary_2TK[0], rotary_2TK[1], *gradients, dqkv_BTC, parts, B * T, T, eps,
        H, G, K, block_of(H + 2 * G), ROWS_EACH, q_norm is not None, num_warps=8,
    )  # fmt: skip
    return dqkv_BTC, *((None, None) if q_norm is None else parts.sum(0).unbind())


def _weights(q_norm: Tensor | None, k_norm: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    return (unread, unread) if q_norm is None or k_norm is None else (q_norm, k_norm)
