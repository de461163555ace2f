"""A training step on a CUDA device: products and attention by PyTorch's libraries, what lies between by Triton.

The same functions as those of the C kernels, without torch.compile's half a minute of compiling, and in fewer passes.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitf.attention import Attention, AttentionContext, Linear, RMSNorm
from minitf.backends import Reference, custom_module, substitute
from minitf.backends.cuda.triton_qk import heads_backward, heads_forward
from minitf.backends.cuda.triton_rows import (
    cross_entropy,
    rms_norm_backward,
    rms_norm_forward,
    swiglu_backward,
    swiglu_forward,
)
from minitf.loss import IGNORED, LinearCrossEntropy
from minitf.model import Block, Transformer
from minitf.optim import Optimizer

MAX_WIDTH = 16384  # of a row that one Triton program holds


class _Linear(torch.autograd.Function):
    """Weights are float32 and so are their gradients, added up so by the product and never rounded in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        weight = torch.cat([weight.to(x.dtype) for weight in weights]) if len(weights) > 1 else weights[0].to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.sizes = [len(weight) for weight in weights]
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        dy_NR, x_NC = dy.flatten(0, -2), x.flatten(0, -2)
        if x.dtype == torch.float32 or not x.is_cuda:
            dweight = (dy_NR.mT @ x_NC).float()
        else:
            dweight = torch.mm(dy_NR.mT, x_NC, out_dtype=torch.float32)
        return dy @ weight, *dweight.split(ctx.sizes)


def linear(x: Tensor, *layers: Linear) -> Tensor:
    """What layers make of the same input, side by side, in one product."""
    return _Linear.apply(x, *[layer.weight for layer in layers])  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """(x + added, its norm); x goes through alone too, so that both its gradients arrive here and are added at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        added = None if added is None else added.contiguous()
        total, normed, rstd = rms_norm_forward(x.contiguous(), added, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.has_added = added is not None
        return total.view_as(total), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        if dnormed is None:
            return dtotal, dtotal if ctx.has_added else None, None, None
        dtotal = None if dtotal is None else dtotal.contiguous()
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(total, weight, rstd, dnormed.contiguous(), dtotal)
        return dx, dx if ctx.has_added else None, dweight, None


def rms_norm(norm: torch.nn.RMSNorm, x_BTD: Tensor, added_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x + added` (or x) and its norm, both of the dtype of x."""
    assert norm.weight is not None
    return _RMSNorm.apply(x_BTD, added_BTD, norm.weight, norm.eps)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return swiglu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return swiglu_backward(x, dy.contiguous())


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up`; each row of x holds the gates, then the ups."""
    return _SwiGLU.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """Of qkv, the weights of the norms of queries and keys (or None), the rotary table and a mask (None: causal)."""

    @staticmethod
    def forward(
        ctx: Any, heads: tuple[int, int, int], eps: float, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
        rotary: Tensor, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        (B, T), (H, G, K) = qkv.shape[:2], heads
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        q, k = heads_forward(qkv, heads, norms, rotary, eps)
        v = qkv[..., (H + G) * K :].view(B, T, G, K)
        # PyTorch's own gradient of its attention, whichever library it takes that from.
        with torch.enable_grad():
            q, k, v = (part.detach().transpose(1, 2).requires_grad_() for part in (q, k, v))
            ctx.mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=G != H)
        ctx.inputs, ctx.heads, ctx.eps = (q, k, v), heads, eps
        ctx.save_for_backward(qkv, q_norm, k_norm, rotary)
        mixed_BTHK: Tensor = ctx.mixed.detach().transpose(1, 2)
        return mixed_BTHK.reshape(B, T, H * K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_norm, k_norm, rotary = ctx.saved_tensors
        (B, T), (H, _, K) = qkv.shape[:2], ctx.heads
        gradients = torch.autograd.grad(ctx.mixed, ctx.inputs, dmixed.reshape(B, T, H, K).transpose(1, 2))
        ctx.mixed = ctx.inputs = None
        dq, dk, dv = (gradient.transpose(1, 2).contiguous() for gradient in gradients)
        norms = None if q_norm is None else (q_norm, k_norm)
        return None, None, *heads_backward(qkv, ctx.heads, norms, rotary, ctx.eps, (dq, dk, dv)), None, None


def attend(attention: Attention, qkv_BTC: Tensor, rotary_2TK: Tensor, mask: Tensor | None) -> Tensor:
    """From queries, keys and values as their product made them to mixed_BTC: norm, positions, match, weigh, gather.

    C are the channels of heads side by side: of all queries, then all keys, then all values; of what is gathered.
    """
    K = attention.head_dim
    heads = attention.q_proj.out_features // K, attention.k_proj.out_features // K, K
    norms = [
        norm.weight if isinstance(norm, torch.nn.RMSNorm) else None for norm in (attention.q_norm, attention.k_norm)
    ]
    eps = getattr(attention.q_norm, "eps", 0.0)
    return _Attend.apply(heads, eps, qkv_BTC, *norms, rotary_2TK, mask)  # type: ignore[no-any-return, no-untyped-call]


def chunk_loss(logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of some rows in nats, summed with `scales_N`, and its gradient, which takes the place of the logits."""
    scales_N = torch.where(targets_N != IGNORED, scales_N, 0.0).float()
    return cross_entropy(logits_NV, targets_N, scales_N).sum(), logits_NV


class TritonBlock(Block):
    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        if not context.plain:
            return super().forward(x_BTD, context, layer)
        attention, mlp = self.self_attn, self.mlp
        mask = None if context.segments_BT is None else context.visible().unsqueeze(1)
        x_BTD, normed_BTD = rms_norm(self.input_layernorm, x_BTD)
        qkv_BTC = linear(normed_BTD, attention.q_proj, attention.k_proj, attention.v_proj)
        mixed_BTD = linear(attend(attention, qkv_BTC, context.rotary_2TK, mask), attention.o_proj)
        x_BTD, normed_BTD = rms_norm(self.post_attention_layernorm, x_BTD, self.dropout(mixed_BTD))
        hidden_BTF = swiglu(linear(normed_BTD, mlp.gate_proj, mlp.up_proj))
        return x_BTD + self.dropout(linear(hidden_BTF, mlp.down_proj))  # type: ignore[no-any-return]


class TritonRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(self, x)[1]


class TritonCrossEntropy(LinearCrossEntropy):
    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_loss(logits_NV, targets_N, scales_N)


class TritonKernels:
    name = "triton"
    description = "our Triton kernels"
    replaces: tuple[str, ...] = (
        *("model.Block", "attention.AttentionContext", "attention.RMSNorm", "loss.chunk_loss"),
        "loss.LinearCrossEntropy.chunk_loss",
    )

    def unsupported(self, model: Transformer) -> str | None:
        c = model.config
        if model.device.type != "cuda":
            return f"they are for cuda, and the model is on {model.device.type}"
        if c.attention != "auto":
            return f"model.attention={c.attention} is another way to compute attention; leave it at auto"
        if custom := custom_module(model):
            return f"they do not know {custom}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if c.head_dim & (c.head_dim - 1) or max(c.head_dim, c.hidden_size) > MAX_WIDTH:
            return f"heads of {c.head_dim} channels in {c.hidden_size}: they take powers of 2 up to {MAX_WIDTH}"
        return None

    def install(self, model: Transformer, optimizer: Optimizer | None = None) -> None:
        Reference().install(model, optimizer)
        for block in model.model.layers:  # type: ignore[union-attr]
            substitute(block, TritonBlock)
        substitute(model.model.norm, TritonRMSNorm)
        substitute(model.cross_entropy, TritonCrossEntropy)
