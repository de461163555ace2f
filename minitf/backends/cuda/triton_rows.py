"""Triton kernels for what lies between the products of a step: norms, SwiGLU, loss.

Each goes over its data once, computes in float32, and rounds once to the dtype of the activations. Compiled for a shape
when it is first called, in a fraction of a second, and kept by Triton.
"""

import triton
import triton.language as tl

ROWS_EACH = 32  # that one program of a backward pass goes over, summing up its part of a weight's gradient
LOGITS = 4096  # of a row taken at a time


@triton.jit
def rms_norm_forward(
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
def rms_norm_backward(
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
def swiglu_forward(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + f, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(x, dy, dx, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
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
def cross_entropy(logits, targets, scales, losses, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
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
    inside = (target >= 0) & (target < VOCABULARY)
    wanted = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
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


def warps_of(width: int) -> int:
    """Groups of 32 threads for a row."""
    return min(16, max(1, block_of(width) // 256))
