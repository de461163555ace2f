"""The kernels in C: a training step on a processor.

They compile in two seconds, once. Products of activations and weights stay with PyTorch, whose are as fast, but where
the processor has AMX: there ours take half its time, and what follows them is done while they are in the cache.

In bfloat16, with sums in float32, they are for processors with AVX-512 BF16; in float32 for all, and there Muon and the
gradients of weights are PyTorch's too.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minitf.attention import AttentionContext
from minitf.backends import substitute
from minitf.backends.cpu.bindings import AttentionArguments, call, has_fast_products, library
from minitf.backends.cpu.muon import CpuMuon
from minitf.backends.fused import Backward, FusedKernels, Heads, fused, joined
from minitf.errors import Unavailable
from minitf.loss import IGNORED
from minitf.model import FeedForward, Transformer
from minitf.optim import Muon, Optimizer

PIECE_ROWS = 64  # whose part of the gradient of a norm's weight is summed up by itself


class CpuKernels(FusedKernels):
    """Training by C on a processor: float32 everywhere, bfloat16 with AVX-512 BF16; there the update too."""

    name = "cpu"
    description = "our C kernels"
    replaces = (
        *FusedKernels.replaces,
        *("loss.add_product", "loss.LinearCrossEntropy.add_product"),
        *("optim.Muon.average_gradients", "optim.Muon.orthogonalise", "optim.Muon.move_weights"),
    )
    device = "cpu"

    def __init__(self) -> None:
        self._starts: tuple[Callable[[], AttentionContext | None], Tensor | None] = (lambda: None), None

    def unsupported(self, model: Transformer) -> str | None:
        if reason := super().unsupported(model):
            return reason
        try:
            library(model.compute_dtype)
        except Unavailable as error:
            return str(error)
        return None

    def install(self, model: Transformer, optimizer: Optimizer | None = None) -> None:
        super().install(model, optimizer)
        if optimizer is not None and model.compute_dtype == torch.bfloat16:  # in float32 PyTorch's is as fast
            for part in optimizer.optimizers:
                if isinstance(part, Muon):
                    substitute(part, CpuMuon)

    def rms_norm_forward(
        self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = x.view_as(x) if added is None else torch.empty_like(x)
        normed, rstd = torch.empty_like(x), torch.empty(x.numel() // x.shape[-1])
        call("rms_norm_forward", x.dtype, len(rstd), x.shape[-1], x, added, weight, eps, total, normed, rstd)
        return total, normed, rstd

    def rms_norm_backward(
        self, kept: tuple[Tensor, Tensor, Tensor], dtotal: Tensor | None, dnormed: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, weight, rstd = kept
        N, D = len(rstd), total.shape[-1]
        parts, dx = torch.empty(-(-N // PIECE_ROWS), D), torch.empty_like(total)
        call("rms_norm_backward", total.dtype, N, D, PIECE_ROWS, total, weight, rstd, dnormed, dtotal, dx, parts)
        return dx, parts[0]

    def swiglu_forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        call("swiglu_forward", x.dtype, y.numel() // width, width, x, y)
        return y

    def swiglu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        dx = torch.empty_like(x)
        call("swiglu_backward", x.dtype, dy.numel() // dy.shape[-1], dy.shape[-1], x, dy, dx)
        return dx

    def product(self, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        if not products_are_ours(x.dtype, weight.shape):
            return super().product(x, weight, transposed)
        K, M = weight.shape[::-1] if transposed else weight.shape
        y = x.new_empty(*x.shape[:-1], M)
        call("linear", x.dtype, x.numel() // K, K, M, x, weight, transposed, y)
        return y

    def weight_gradient(self, dy_NR: Tensor, x_NC: Tensor) -> Tensor:
        if dy_NR.dtype == torch.float32:
            return dy_NR.mT @ x_NC
        out = torch.empty(dy_NR.shape[1], x_NC.shape[1])
        call("weight_gradient", dy_NR.dtype, len(x_NC), *out.shape, dy_NR, x_NC, 0, False, out)
        return out

    def add_product(self, dy_NR: Tensor, x_NC: Tensor, to_RC: Tensor) -> None:
        if dy_NR.dtype == torch.float32:
            to_RC.addmm_(dy_NR.mT, x_NC)
        else:
            dy_NR, x_NC = dy_NR.contiguous(), x_NC.contiguous()
            call("weight_gradient", dy_NR.dtype, len(x_NC), *to_RC.shape, dy_NR, x_NC, 0, True, to_RC)

    def feed_forward(self, mlp: FeedForward, z: Tensor, x: Tensor | None = None) -> Tensor:
        """With AMX and whole tiles all of it is one function, whose intermediate values stay in the cache."""
        if not products_are_ours(z.dtype, mlp.down_proj.weight.shape):
            return super().feed_forward(mlp, z, x)
        weights = [layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        return fused(_feed_forward, z, x, *weights)  # type: ignore[no-any-return]

    def attention(self, heads: Heads, qkv: Tensor, *others: Any) -> tuple[Tensor, Sequence[Tensor | None], Backward]:
        (B, T), (H, G, K, _) = qkv.shape[:2], heads
        mixed, log_sums = qkv.new_empty(B, T, H * K), torch.empty(B, H, T)
        kept = qkv, *others, mixed, log_sums
        call("attention_forward", qkv.dtype, _description(heads, kept))

        def gradients(kept: Any, dmixed: Tensor) -> tuple[Tensor | None, ...]:
            dqkv, parts = torch.empty_like(kept[0]), torch.empty(B * G, 2, K)
            call("attention_backward", dqkv.dtype, _description(heads, kept), dmixed, dqkv, parts)
            return dqkv, *((None, None) if kept[1] is None else parts[0].unbind()), None, None

        return mixed, kept, gradients

    def visible(self, context: AttentionContext) -> Tensor | None:
        if context.segments_BT is None:
            return None
        last, starts_BT = self._starts
        if last() is not context:  # made once for all blocks of a pass
            starts_BT = segment_starts(context.segments_BT)
            self._starts = weakref.ref(context), starts_BT
        return starts_BT

    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        N, V = logits_NV.shape
        logits_NV, targets_N = logits_NV.contiguous(), targets_N.long().contiguous()
        losses_N, gradient_NV = torch.empty(N), torch.empty_like(logits_NV)
        scales_N = torch.where(targets_N != IGNORED, scales_N, 0.0).float()
        call("cross_entropy", logits_NV.dtype, N, V, logits_NV, targets_N, scales_N, losses_N, gradient_NV)
        return losses_N.sum(), gradient_NV


def products_are_ours(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether products of activations and weights of such a shape are computed here: by AMX, in whole tiles."""
    return dtype == torch.bfloat16 and not any(size % 32 for size in shape) and has_fast_products()


def _feed_forward(z: Tensor, x: Tensor | None, *weights: Tensor) -> tuple[Tensor, Sequence[Tensor], Backward]:
    """x + down (silu(gate z) * up z), of z, x or None, and the weights of gate, up and down."""
    gate_up, down = joined(weights[:2], z.dtype), joined(weights[2:], z.dtype)
    N, (D, width), adds = z.numel() // z.shape[-1], down.shape, x is not None
    kept, y = z.new_empty(N, 2 * width), torch.empty_like(z)
    call("feed_forward", z.dtype, N, D, width, z, x, gate_up, down, kept, y)

    def gradients(saved: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, kept, gate_up, down = saved
        dz, rows = torch.empty_like(z), -(-N // 32) * 32
        dkept, hidden = z.new_empty(rows, 2 * width), z.new_empty(rows, width)
        call("feed_forward_backward", z.dtype, N, D, width, dy, kept, gate_up, down, dkept, hidden, dz)
        dgate_up, ddown = torch.empty(2 * width, D), torch.empty(D, width)
        call("weight_gradient", z.dtype, N, 2 * width, D, dkept, z, 1, False, dgate_up)
        call("weight_gradient", z.dtype, N, D, width, dy, hidden, 2, False, ddown)
        return dz, dy if adds else None, *torch.split(dgate_up, width), ddown

    return y, (z, kept, gate_up, down), gradients


def _description(heads: Heads, kept: Sequence[Tensor | None]) -> Any:
    qkv, q_norm, k_norm, rotary, starts, mixed, log_sums = kept
    assert qkv is not None
    assert rotary is not None
    assert rotary.dtype == torch.float32
    H, G, K, eps = heads
    given = *qkv.shape[:2], H, G, K, qkv, q_norm, k_norm, eps, rotary[0], rotary[1], starts, mixed, log_sums
    return ctypes.byref(AttentionArguments(*[a.data_ptr() if isinstance(a, Tensor) else a for a in given]))


def segment_starts(segments_BT: Tensor) -> Tensor:
    """The first position of each position's segment, int32 of shape (B, T): what the kernels take for a mask.

    The positions of a segment are adjacent.
    """
    positions_T = torch.arange(segments_BT.shape[1], dtype=torch.int32)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.where(begins_BT, positions_T, 0).cummax(dim=1).values
