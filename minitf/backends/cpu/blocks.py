"""The C kernels: norms, attention, SwiGLU, loss and the gradients of weights, as functions of PyTorch's tensors.

They compute what attention.py, model.py, loss.py and optim.py compute, each with its gradient, and go over their data
once or twice where PyTorch's operations go over them ten times. torch.compile comes close after half a minute of
compiling; these take two seconds, once. Products of activations and weights stay with PyTorch, whose are as fast, but
where the processor has AMX: there ours take half its time, and what follows them is done while they are in the cache.

In bfloat16, with sums in float32, they are for processors with AVX-512 BF16; in float32 for all, and there Muon and the
gradients of weights are PyTorch's too. A CUDA device has kernels of its own (kernels/cuda/), in Triton.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitf.attention import Attention, AttentionContext, Linear, RMSNorm
from minitf.backends import Reference, custom_module, substitute
from minitf.backends.cpu.bindings import (
    AttentionArguments,
    as_rows,
    call,
    has_fast_products,
    library,
    places_of,
)
from minitf.backends.cpu.muon import CpuMuon, CpuOptimizer
from minitf.errors import Unavailable
from minitf.loss import IGNORED, LinearCrossEntropy
from minitf.model import Block, FeedForward, Transformer
from minitf.optim import Muon, Optimizer

PIECE_ROWS = 64  # whose part of the gradient of a norm's weight is summed up by itself


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        x, weight = as_rows(x), joined(weights, x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.kinds = [(len(weight), weight.dtype) for weight in weights]
        return product(x, weight, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (x, weight), dy = ctx.saved_tensors, as_rows(gradients[0])
        if x.dtype == torch.float32:
            dweight = dy.flatten(0, -2).mT @ x.flatten(0, -2)
        else:
            dweight = weight_gradient(dy, x, *weight.shape)
        return product(dy, weight, transposed=False), *parts_of(dweight, ctx.kinds)


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights of one input below each other."""
    if dtype == torch.bfloat16 and has_fast_products() and all(weight.dtype == torch.float32 for weight in weights):
        places, kept = places_of(weights)
        sizes = (ctypes.c_int64 * len(kept))(*[weight.numel() for weight in kept])
        result = torch.empty(sum(map(len, kept)), *kept[0].shape[1:], dtype=dtype)
        call("join_weights", dtype, len(kept), places, sizes, result)
        return result
    rounded = [weight.to(dtype) for weight in weights]
    return torch.cat(rounded) if len(rounded) > 1 else rounded[0]


def parts_of(dweight: Tensor, kinds: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The gradients of `joined` weights, given their numbers of rows and dtypes."""
    parts = torch.split(dweight, [rows for rows, _ in kinds]) if len(kinds) > 1 else [dweight]
    return [part.to(dtype) for part, (_, dtype) in zip(parts, kinds, strict=True)]


def products_are_ours(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether products of activations and weights of such a shape are computed here: by AMX, in whole tiles."""
    return dtype == torch.bfloat16 and not any(size % 32 for size in shape) and has_fast_products()


def product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """`x @ weight`, or with its transpose."""
    if not products_are_ours(x.dtype, weight.shape):
        return F.linear(x, weight) if transposed else x @ weight
    K, M = weight.shape[::-1] if transposed else weight.shape
    y = x.new_empty(*x.shape[:-1], M)
    call("linear", x.dtype, x.numel() // K, K, M, x, weight, transposed, y)
    return y


def weight_gradient(dy: Tensor, x: Tensor, R: int, C: int) -> Tensor:
    """`dy^T x` in float32, of rows of R and of C values of bfloat16."""
    out = torch.empty(R, C)
    call("weight_gradient", dy.dtype, x.numel() // C, R, C, dy, x, 0, False, out)
    return out


def linear(x: Tensor, *layers: Linear) -> Tensor:
    """What layers make of the same input, side by side, in one product."""
    return _Linear.apply(x, *[layer.weight for layer in layers])  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """(x + added, its norm); x goes through alone too, so that both its gradients arrive here and are added at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, width = as_rows(x), x.shape[-1]
        total = x.view_as(x) if added is None else torch.empty_like(x)
        normed, rstd = torch.empty_like(x), torch.empty(x.numel() // width)
        added = None if added is None else as_rows(added)
        call("rms_norm_forward", x.dtype, len(rstd), width, x, added, weight, eps, total, normed, rstd)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.has_added = added is not None
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dtotal, dnormed = (None if gradient is None else as_rows(gradient) for gradient in gradients)
        if dnormed is None:
            return dtotal, dtotal if ctx.has_added else None, None, None
        total, weight, rstd = ctx.saved_tensors
        parts, dx = torch.empty(-(-len(rstd) // PIECE_ROWS), total.shape[-1]), torch.empty_like(total)
        sizes = len(rstd), total.shape[-1], PIECE_ROWS
        call("rms_norm_backward", total.dtype, *sizes, total, weight, rstd, dnormed, dtotal, dx, parts)
        return dx, dx if ctx.has_added else None, parts[0], None


def rms_norm(norm: torch.nn.RMSNorm, x_BTD: Tensor, added_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x + added` (or x) and its norm, both of the dtype of x."""
    assert norm.weight is not None
    assert norm.eps is not None
    return _RMSNorm.apply(x_BTD, added_BTD, norm.weight.float(), norm.eps)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x, width = as_rows(x), x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        call("swiglu_forward", x.dtype, y.numel() // width, width, x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), dy = ctx.saved_tensors, as_rows(gradients[0])
        dx = torch.empty_like(x)
        call("swiglu_backward", x.dtype, dy.numel() // dy.shape[-1], dy.shape[-1], x, dy, dx)
        return dx


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up`; each row of x holds the gates, then the ups."""
    return _SwiGLU.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _FeedForward(torch.autograd.Function):
    """x + down (silu(gate z) * up z), of z, x or None, and the weights of gate, up and down."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor | None, *weights: Tensor) -> Tensor:
        z, x = as_rows(z), None if x is None else as_rows(x)
        gate_up, down = joined(weights[:2], z.dtype), joined(weights[2:], z.dtype)
        N, (D, width) = z.numel() // z.shape[-1], down.shape
        kept, y = z.new_empty(N, 2 * width), torch.empty_like(z)
        call("feed_forward", z.dtype, N, D, width, z, x, gate_up, down, kept, y)
        ctx.save_for_backward(z, kept, gate_up, down)
        ctx.kinds, ctx.adds = [(len(weight), weight.dtype) for weight in weights], x is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (z, kept, gate_up, down), dy = ctx.saved_tensors, as_rows(gradients[0])
        N, (D, width) = len(kept), down.shape
        dz, rows = torch.empty_like(z), -(-N // 32) * 32
        dkept, hidden = z.new_empty(rows, 2 * width), z.new_empty(rows, width)
        call("feed_forward_backward", z.dtype, N, D, width, dy, kept, gate_up, down, dkept, hidden, dz)
        outer = torch.empty(2 * width, D), torch.empty(D, width)
        call("weight_gradient", z.dtype, N, 2 * width, D, dkept, z, 1, False, outer[0])
        call("weight_gradient", z.dtype, N, D, width, dy, hidden, 2, False, outer[1])
        dweights = [*parts_of(outer[0], ctx.kinds[:2]), *parts_of(outer[1], ctx.kinds[2:])]
        return dz, dy if ctx.adds else None, *dweights


def feed_forward(mlp: FeedForward, z_BTD: Tensor, x_BTD: Tensor | None) -> Tensor:
    """`FeedForward` of z, added to x if that is given."""
    weights = [layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    return _FeedForward.apply(z_BTD, x_BTD, *weights)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """Of qkv, the weights of the norms of queries and keys (or None), the rotary table and the starts (or None)."""

    @staticmethod
    def forward(ctx: Any, heads: Sequence[int], eps: float, qkv: Tensor, *others: Tensor | None) -> Tensor:
        qkv, (B, T), (H, _, K) = as_rows(qkv), qkv.shape[:2], heads
        mixed, log_sums = qkv.new_empty(B, T, H * K), torch.empty(B, H, T)
        kept = qkv, *others, mixed, log_sums
        ctx.save_for_backward(*kept)
        ctx.heads, ctx.eps = heads, eps
        call("attention_forward", qkv.dtype, _description(heads, eps, kept))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_norm, *_ = kept = ctx.saved_tensors
        dmixed, dqkv, (_, G, K) = as_rows(gradients[0]), torch.empty_like(qkv), ctx.heads
        parts = torch.empty(qkv.shape[0] * G, 2, K)
        call("attention_backward", qkv.dtype, _description(ctx.heads, ctx.eps, kept), dmixed, dqkv, parts)
        dq_norm, dk_norm = (None, None) if q_norm is None else parts[0].unbind()
        return None, None, dqkv, dq_norm, dk_norm, None, None


def _description(heads: Sequence[int], eps: float, kept: Sequence[Any]) -> AttentionArguments:
    qkv, q_norm, k_norm, rotary, starts, mixed, log_sums = kept
    given = (*qkv.shape[:2], *heads, qkv, q_norm, k_norm, eps, rotary[0], rotary[1], starts, mixed, log_sums)
    return AttentionArguments(*[a.data_ptr() if isinstance(a, Tensor) else a for a in given])


def attend(attention: Attention, qkv_BTC: Tensor, rotary_2TK: Tensor, visible: Tensor | None) -> Tensor:
    """From queries, keys and values as their product made them to mixed_BTC: norm, positions, match, weigh, gather.

    C are the channels of heads side by side: of all queries, then all keys, then all values; of what is gathered.
    `rotary_2TK` is of float32; `visible` what `segment_starts` makes of segments, or None.
    """
    assert rotary_2TK.dtype == torch.float32
    assert rotary_2TK[0].is_contiguous()
    K = attention.head_dim
    heads = attention.q_proj.out_features // K, attention.k_proj.out_features // K, K
    norms = (attention.q_norm, attention.k_norm)
    weights = [norm.weight.float() if isinstance(norm, torch.nn.RMSNorm) else None for norm in norms]
    eps = getattr(attention.q_norm, "eps", 0.0)
    return _Attend.apply(heads, eps, qkv_BTC, *weights, rotary_2TK, visible)  # type: ignore[no-any-return, no-untyped-call]


def chunk_loss(logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of some rows in nats, summed with `scales_N`, and its gradient with respect to their logits."""
    N, V = logits_NV.shape
    logits_NV, targets_N = as_rows(logits_NV), targets_N.long().contiguous()
    losses_N, gradient_NV = torch.empty(N), torch.empty_like(logits_NV)
    scales_N = torch.where(targets_N != IGNORED, scales_N, 0.0).float()
    call("cross_entropy", logits_NV.dtype, N, V, logits_NV, targets_N, scales_N, losses_N, gradient_NV)
    return losses_N.sum(), gradient_NV


def add_product(dy_NR: Tensor, x_NC: Tensor, to_RC: Tensor) -> None:
    """`to += dy^T x` in place, in float32."""
    assert to_RC.dtype == torch.float32
    assert to_RC.is_contiguous()
    if dy_NR.dtype == torch.float32:
        to_RC.addmm_(dy_NR.mT, x_NC)
    else:
        call("weight_gradient", dy_NR.dtype, len(x_NC), *to_RC.shape, as_rows(dy_NR), as_rows(x_NC), 0, True, to_RC)


def segment_starts(segments_BT: Tensor) -> Tensor:
    """The first position of each position's segment, int32 of shape (B, T): what the kernels take for a mask.

    The positions of a segment are adjacent.
    """
    positions_BT = torch.arange(segments_BT.shape[1], dtype=torch.int32, device=segments_BT.device).expand_as(
        segments_BT
    )
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.where(begins_BT, positions_BT, 0).cummax(dim=1).values


class CpuBlock(Block):
    dtype: torch.dtype  # of the activations it is for; others take the reference

    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        if not context.plain or x_BTD.dtype != self.dtype:
            return super().forward(x_BTD, context, layer)
        attention, mlp = self.self_attn, self.mlp
        starts_BT = None if context.segments_BT is None else segment_starts(context.segments_BT)
        x_BTD, normed_BTD = rms_norm(self.input_layernorm, x_BTD)
        qkv_BTC = linear(normed_BTD, attention.q_proj, attention.k_proj, attention.v_proj)
        mixed_BTD = linear(attend(attention, qkv_BTC, context.rotary_2TK, starts_BT), attention.o_proj)
        x_BTD, normed_BTD = rms_norm(self.post_attention_layernorm, x_BTD, self.dropout(mixed_BTD))
        if products_are_ours(x_BTD.dtype, mlp.down_proj.weight.shape):
            drops = self.training and self.dropout.p > 0
            y_BTD = feed_forward(mlp, normed_BTD, None if drops else x_BTD)
            return x_BTD + self.dropout(y_BTD) if drops else y_BTD
        hidden_BTF = swiglu(linear(normed_BTD, mlp.gate_proj, mlp.up_proj))
        return x_BTD + self.dropout(linear(hidden_BTF, mlp.down_proj))  # type: ignore[no-any-return]


class CpuRMSNorm(RMSNorm):
    dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(self, x)[1] if x.dtype == self.dtype else super().forward(x)


class CpuCrossEntropy(LinearCrossEntropy):
    dtype: torch.dtype

    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        if logits_NV.dtype != self.dtype:
            return super().chunk_loss(logits_NV, targets_N, scales_N)
        return chunk_loss(logits_NV, targets_N, scales_N)

    def add_product(self, dy_NR: Tensor, x_NC: Tensor, to_RC: Tensor) -> None:
        if dy_NR.dtype != self.dtype:
            super().add_product(dy_NR, x_NC, to_RC)
        else:
            add_product(dy_NR, x_NC, to_RC)


@functools.cache
def _for_dtype(cls: type, dtype: torch.dtype) -> type:
    return type(cls.__name__, (cls,), {"dtype": dtype})


class CpuKernels:
    """Training by C on a processor: float32 everywhere, bfloat16 with AVX-512 BF16; there the update too."""

    name = "cpu"
    description = "our C kernels"
    replaces: tuple[str, ...] = (
        *("model.Block", "attention.AttentionContext", "attention.RMSNorm", "loss.chunk_loss", "loss.add_product"),
        *("loss.LinearCrossEntropy.chunk_loss", "loss.LinearCrossEntropy.add_product", "optim.Optimizer.total_norm"),
        *("optim.Muon.average_gradients", "optim.Muon.orthogonalise", "optim.Muon.move_weights"),
    )

    def unsupported(self, model: Transformer) -> str | None:
        if model.device.type != "cpu":
            return f"they are for cpu, and the model is on {model.device.type}; set trainer.device=cpu"
        if model.config.attention != "auto":
            return f"model.attention={model.config.attention} is another way to compute attention; leave it at auto"
        if custom := custom_module(model):
            return f"they do not know {custom}"
        try:
            library(model.compute_dtype)
        except Unavailable as reason:
            return str(reason)
        return None

    def install(self, model: Transformer, optimizer: Optimizer | None = None) -> None:
        Reference().install(model, optimizer)
        dtype = model.compute_dtype
        for block in model.model.layers:  # type: ignore[union-attr]
            substitute(block, _for_dtype(CpuBlock, dtype))
        substitute(model.model.norm, _for_dtype(CpuRMSNorm, dtype))
        substitute(model.cross_entropy, _for_dtype(CpuCrossEntropy, dtype))
        if optimizer is not None and dtype == torch.bfloat16:  # in float32 PyTorch's update is as fast
            substitute(optimizer, CpuOptimizer)
            for part in optimizer.optimizers:
                if isinstance(part, Muon):
                    substitute(part, CpuMuon)
