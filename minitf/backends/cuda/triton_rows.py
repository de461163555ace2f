"""Triton kernels for what lies between the products of a step: norms, SwiGLU, loss.

Each goes over its data once, computes in float32, and rounds once to the dtype of the activations. Compiled for a shape
when it is first called, in a fraction of a second, and kept by Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_EACH = 32  # that one program of a backward pass goes over, summing up its part of a weight's gradient
LOGITS = 4096  # of a row taken at a time


@triton.jit
def _rms_norm_forward(
    x, added, weight, total, normed, rstd, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, mask = row * WIDTH + d, d < WIDTH
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDED:
        values += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    tl.store(rstd + row, scale)
    weights = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + at, (values * scale * weights).to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward(
    total, weight, rstd, dnormed, dtotal, dx, parts, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, AT_ONCE: tl.constexpr, HAS_DTOTAL: tl.constexpr,
):  # fmt: skip
    program, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    weights = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros([AT_ONCE, BLOCK], dtype=tl.float32)
    for done in range(0, EACH, AT_ONCE):
        rows = program * EACH + done + tl.arange(0, AT_ONCE)
        at = rows[:, None] * WIDTH + d[None, :]
        mask = (rows < num_rows)[:, None] & (d < WIDTH)[None, :]
        scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
        unit = tl.load(total + at, mask=mask, other=0.0).to(tl.float32) * scale
        dy = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * unit
        dunit = dy * weights[None, :]
        result = (dunit - unit * (tl.sum(dunit * unit, axis=1) / WIDTH)[:, None]) * scale
        if HAS_DTOTAL:
            result += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(parts + program * WIDTH + d, tl.sum(dweight, axis=0), mask=d < WIDTH)


@triton.jit
def _swiglu_forward(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + f, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(x, dy, dx, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < WIDTH
    gates, ups = row * 2 * WIDTH + f, row * 2 * WIDTH + WIDTH + f
    gate = tl.load(x + gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + ups, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + row * WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(dx + gates, (d * up * share * (1 + gate * (1 - share))).to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + ups, (d * gate * share).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy(logits, targets, scales, losses, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits += row * VOCABULARY
    # The largest logit so far in every lane, and the sum of the exponentials relative to it: one exponential a logit
    # (Milakov & Gimelshein, 2018).
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        x = tl.load(logits + start + v, mask=start + v < VOCABULARY, other=float("-inf")).to(tl.float32)
        apart = tl.where(x == largest, 0.0, x - largest)  # two times -inf are not apart
        power = tl.exp(-tl.abs(apart))
        total = tl.where(apart > 0, total * power + 1, total + power)
        largest = tl.maximum(largest, x)
    most = tl.max(largest, axis=0)
    # A lane that saw no number counts nothing; one that saw a NaN makes all NaN.
    total = tl.where(largest == float("-inf"), total * 0.0, total * tl.exp(largest - most))
    log_sum = most + tl.log(tl.sum(total, axis=0))
    scale, target = tl.load(scales + row), tl.load(targets + row)
    wanted = tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(scale != 0, (log_sum - wanted) * scale, 0.0))
    tl.debug_barrier()  # the wanted logit is read before its place is written
    for start in range(0, VOCABULARY, BLOCK):
        at = start + v
        x = tl.load(logits + at, mask=at < VOCABULARY, other=0.0).to(tl.float32)
        gradient = (tl.exp(x - log_sum) - tl.where(at == target, 1.0, 0.0)) * scale
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < VOCABULARY)


def block_of(size: int) -> int:
    """The next power of 2, of which Triton's blocks are."""
    return int(triton.next_power_of_2(size))


def rms_norm_forward(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`x + added` (or x), its norm, and what it was multiplied with, for each row; x is contiguous."""
    width = x.shape[-1]
    total = x if added is None else torch.empty_like(x)
    normed, rstd = torch.empty_like(x), torch.empty(x.numel() // width, device=x.device)
    arguments = (x, x if added is None else added, weight, total, normed, rstd, eps)
    _rms_norm_forward[(len(rstd),)](*arguments, width, block_of(width), added is not None, num_warps=_warps(width))
    return total, normed, rstd


def rms_norm_backward(
    total: Tensor, weight: Tensor, rstd: Tensor, dnormed: Tensor, dtotal: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x (and of what was added to it) and of the weight."""
    width, dx = total.shape[-1], torch.empty_like(total)
    parts = torch.empty(-(-len(rstd) // ROWS_EACH), width, device=total.device)
    at_once = 4 if width <= 1024 else 1
    _rms_norm_backward[(len(parts),)](
        total, weight, rstd, dnormed, dnormed if dtotal is None else dtotal, dx, parts, len(rstd),
        width, block_of(width), ROWS_EACH, at_once, dtotal is not None, num_warps=_warps(width * at_once),
    )  # fmt: skip
    return dx, parts.sum(0)


def _warps(width: int) -> int:
    return min(16, max(1, block_of(width) // 256))


def swiglu_forward(x: Tensor) -> Tensor:
    """`silu(gate) * up`; each row of x holds the gates, then the ups."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    block = min(1024, block_of(width))
    _swiglu_forward[(y.numel() // width, triton.cdiv(width, block))](x, y, width, block)
    return y


def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x."""
    width, dx = dy.shape[-1], torch.empty_like(x)
    block = min(1024, block_of(width))
    _swiglu_backward[(dy.numel() // width, triton.cdiv(width, block))](x, dy, dx, width, block)
    return dx


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> Tensor:
    """Losses_N in nats, times `scales_N`; the gradient takes the logits' place. A target below 0 needs a scale of 0."""
    (N, V), losses_N = logits_NV.shape, torch.empty(len(logits_NV), device=logits_NV.device)
    block = min(LOGITS, block_of(V))
    _cross_entropy[(N,)](
        logits_NV, targets_N, scales_N, losses_N, V, block, num_warps=min(8, max(1, block // 256))
    )  # fmt: skip
    return losses_N
