"""Triton kernels between a product that makes queries, keys and values, and attention: norms and rotary positions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitf.backends.cuda.triton_rows import ROWS_EACH, block_of


@triton.jit
def _heads_forward(
    qkv, q_weight, k_weight, cosines, sines, q, k, num_positions, eps,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row, h, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, HALF)
    mask = (h < H + G)[:, None] & (j >= 0)[None, :]
    at = row * (H + 2 * G) * 2 * HALF + h[:, None] * 2 * HALF + j[None, :]
    first = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        is_query = (h < H)[:, None]
        scale = 1 / tl.sqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)
        first *= scale[:, None] * tl.where(is_query, tl.load(q_weight + j)[None, :], tl.load(k_weight + j)[None, :])
        second *= scale[:, None] * tl.where(
            is_query, tl.load(q_weight + HALF + j)[None, :], tl.load(k_weight + HALF + j)[None, :]
        )
    angle = row % num_positions * 2 * HALF + j
    cos, sin = tl.load(cosines + angle)[None, :], tl.load(sines + angle)[None, :]
    turned = first * cos - second * sin
    turned_second = second * cos + first * sin
    to_q = row * H * 2 * HALF + h[:, None] * 2 * HALF + j[None, :]
    to_k = row * G * 2 * HALF + (h - H)[:, None] * 2 * HALF + j[None, :]
    queries, keys = mask & (h < H)[:, None], mask & (h >= H)[:, None]
    tl.store(q + to_q, turned.to(q.dtype.element_ty), mask=queries)
    tl.store(q + to_q + HALF, turned_second.to(q.dtype.element_ty), mask=queries)
    tl.store(k + to_k, turned.to(k.dtype.element_ty), mask=keys)
    tl.store(k + to_k + HALF, turned_second.to(k.dtype.element_ty), mask=keys)


@triton.jit
def _heads_backward(
    qkv, q_weight, k_weight, cosines, sines, dq, dk, dv, dqkv, parts, num_rows, num_positions, eps, H: tl.constexpr,
    G: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    program, h, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, HALF)
    is_query, is_key, is_value = h[:, None] < H, (h[:, None] >= H) & (h[:, None] < H + G), h[:, None] >= H + G
    dfirst_weight = tl.zeros([BLOCK, HALF], dtype=tl.float32)
    dsecond_weight = tl.zeros([BLOCK, HALF], dtype=tl.float32)
    inside = h[:, None] * 2 * HALF + j[None, :]
    for done in range(EACH):
        row = program * EACH + done
        num_heads = tl.where(row < num_rows, H + 2 * G, 0)
        mask = (h < num_heads)[:, None] & (j >= 0)[None, :]
        # Queries, keys and values lie in three places, and their gradients side by side.
        from_q, from_k = row * H * 2 * HALF + inside, row * G * 2 * HALF + inside - H * 2 * HALF
        from_v = from_k - G * 2 * HALF
        queries, keys, values = mask & is_query, mask & is_key, mask & is_value
        d1 = tl.load(dq + from_q, mask=queries, other=0.0).to(tl.float32)
        d1 += tl.load(dk + from_k, mask=keys, other=0.0).to(tl.float32)
        d2 = tl.load(dq + from_q + HALF, mask=queries, other=0.0).to(tl.float32)
        d2 += tl.load(dk + from_k + HALF, mask=keys, other=0.0).to(tl.float32)
        angle = row % num_positions * 2 * HALF + j
        cos, sin = tl.load(cosines + angle)[None, :], tl.load(sines + angle)[None, :]
        first, second = d1 * cos + d2 * sin, d2 * cos - d1 * sin
        at = row * (H + 2 * G) * 2 * HALF + inside
        if HAS_NORM:
            unit1 = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
            unit2 = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(unit1 * unit1, axis=1) + tl.sum(unit2 * unit2, axis=1)
            scale = (1 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
            unit1 *= scale
            unit2 *= scale
            dfirst_weight += first * unit1
            dsecond_weight += second * unit2
            first *= tl.where(is_query, tl.load(q_weight + j)[None, :], tl.load(k_weight + j)[None, :])
            second *= tl.where(is_query, tl.load(q_weight + HALF + j)[None, :], tl.load(k_weight + HALF + j)[None, :])
            along = ((tl.sum(first * unit1, axis=1) + tl.sum(second * unit2, axis=1)) / (2 * HALF))[:, None]
            first = (first - unit1 * along) * scale
            second = (second - unit2 * along) * scale
        first = tl.where(is_value, tl.load(dv + from_v, mask=values, other=0.0).to(tl.float32), first)
        second = tl.where(is_value, tl.load(dv + from_v + HALF, mask=values, other=0.0).to(tl.float32), second)
        tl.store(dqkv + at, first.to(dqkv.dtype.element_ty), mask=mask)
        tl.store(dqkv + at + HALF, second.to(dqkv.dtype.element_ty), mask=mask)
    if HAS_NORM:
        to = parts + program * 4 * HALF + j
        tl.store(to, tl.sum(tl.where(is_query, dfirst_weight, 0.0), axis=0))
        tl.store(to + HALF, tl.sum(tl.where(is_query, dsecond_weight, 0.0), axis=0))
        tl.store(to + 2 * HALF, tl.sum(tl.where(is_key, dfirst_weight, 0.0), axis=0))
        tl.store(to + 3 * HALF, tl.sum(tl.where(is_key, dsecond_weight, 0.0), axis=0))


def heads_forward(
    qkv_BTC: Tensor, heads: tuple[int, int, int], norms: tuple[Tensor, Tensor] | None, rotary_2TK: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries_BTHK and keys_BTGK, normalised (if `norms`, float32, says how) and turned by their positions.

    `heads` are the numbers of query heads H, of key heads G, and their width K, a power of 2.
    """
    (B, T), (H, G, K) = qkv_BTC.shape[:2], heads
    q, k = qkv_BTC.new_empty(B, T, H, K), qkv_BTC.new_empty(B, T, G, K)
    weights = norms or (rotary_2TK, rotary_2TK)  # not read
    _heads_forward[(B * T,)](
        qkv_BTC, *weights, rotary_2TK[0], rotary_2TK[1], q, k, T, eps, H, G, K // 2, block_of(H + G), norms is not None
    )
    return q, k


def heads_backward(
    qkv_BTC: Tensor, heads: tuple[int, int, int], norms: tuple[Tensor, Tensor] | None, rotary_2TK: Tensor, eps: float,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of qkv_BTC and of both weights, from those of queries_BTHK, keys_BTGK and values_BTGK."""
    (B, T), (H, G, K) = qkv_BTC.shape[:2], heads
    parts = torch.empty(-(-B * T // ROWS_EACH), 2, K, device=qkv_BTC.device)
    dqkv_BTC, weights = torch.empty_like(qkv_BTC), norms or (rotary_2TK, rotary_2TK)
    _heads_backward[(len(parts),)](
        qkv_BTC, *weights, rotary_2TK[0], rotary_2TK[1], *gradients, dqkv_BTC, parts, B * T, T, eps,
        H, G, K // 2, block_of(H + 2 * G), ROWS_EACH, norms is not None, num_warps=8,
    )  # fmt: skip
    dq_weight, dk_weight = parts.sum(0).unbind()
    return (dqkv_BTC, dq_weight, dk_weight) if norms else (dqkv_BTC, None, None)
