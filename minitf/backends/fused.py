"""A model of fused functions: what the kernels in C and in Triton share.

The functions compute what attention.py, model.py and loss.py compute, each with its gradient, and go over their data
once or twice where PyTorch's operations go over them ten times. torch.compile comes close after half a minute of
compiling. Products of activations and weights are PyTorch's, unless a set of kernels has its own.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minitf import loss
from minitf.attention import Attention, AttentionContext, Linear, RMSNorm
from minitf.backends import Reference, custom_module, substitute
from minitf.loss import LinearCrossEntropy
from minitf.model import Block, FeedForward, Transformer
from minitf.optim import Optimizer

# Of some inputs: the outputs, the tensors to keep, and the gradients of the inputs by what was kept and those of the
# outputs.
Backward = Callable[..., tuple[Tensor | None, ...]]
Run = Callable[..., tuple[Any, Sequence[Tensor | None], Backward]]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, *inputs: Tensor | None) -> Any:
        outputs, kept, ctx.gradients = run(*inputs)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        contiguous = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        return None, *ctx.gradients(ctx.saved_tensors, *contiguous)


def fused(run: Run, *inputs: Tensor | None) -> Any:
    """What `run` makes of contiguous inputs, as one function with its gradient."""
    return _Fused.apply(run, *[None if x is None else x.contiguous() for x in inputs])  # type: ignore[no-untyped-call]


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights of one input below each other, in the dtype of the activations."""
    if len(weights) == 1:
        return weights[0].to(dtype)
    sizes = [len(weight) for weight in weights]
    result = weights[0].new_empty(sum(sizes), *weights[0].shape[1:], dtype=dtype)
    for part, weight in zip(torch.split(result, sizes), weights, strict=True):
        part.copy_(weight)
    return result


class Heads(NamedTuple):
    """Numbers of query heads and of key heads, their width, and the epsilon of their norms."""

    H: int
    G: int
    K: int
    eps: float


class FusedKernels(ABC):
    """A set of kernels, and the backend that trains a model with it. Tensors given to kernels are contiguous."""

    name: str
    description: str
    replaces: tuple[str, ...] = (
        *("model.Block", "attention.AttentionContext", "attention.RMSNorm", "loss.chunk_loss"),
        "loss.LinearCrossEntropy.chunk_loss",
    )
    device: str

    def unsupported(self, model: Transformer) -> str | None:
        if model.device.type != self.device:
            return (
                f"they are for {self.device}, and the model is on {model.device.type}; set trainer.device={self.device}"
            )
        if model.config.attention != "auto":
            return f"model.attention={model.config.attention} is another way to compute attention; leave it at auto"
        if custom := custom_module(model):
            return f"they do not know {custom}"
        return None

    def install(self, model: Transformer, optimizer: Optimizer | None = None) -> None:
        Reference().install(model, optimizer)
        for block in model.model.layers:  # type: ignore[union-attr]
            substitute(block, _with(FusedBlock, type(self), model.compute_dtype))
        substitute(model.model.norm, _with(FusedRMSNorm, type(self), model.compute_dtype))
        substitute(model.cross_entropy, _with(FusedCrossEntropy, type(self), model.compute_dtype))

    # What each set has to compute.

    @abstractmethod
    def rms_norm_forward(
        self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x + added` (or x), its norm, and for each row what it was multiplied with."""

    @abstractmethod
    def rms_norm_backward(
        self, kept: tuple[Tensor, Tensor, Tensor], dtotal: Tensor | None, dnormed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x (and of what was added to it) and of the weight; kept are the sum, the weight, `rstd`."""

    @abstractmethod
    def swiglu_forward(self, x: Tensor) -> Tensor:
        """`silu(gate) * up`; each row of x holds the gates, then the ups."""

    @abstractmethod
    def swiglu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """The gradient of x."""

    @abstractmethod
    def attention(self, heads: Heads, qkv: Tensor, *others: Any) -> tuple[Tensor, Sequence[Tensor | None], Backward]:
        """`attend` as a `Run`; `others` are both norms' weights or None, the rotary table and `visible`."""

    @abstractmethod
    def visible(self, context: AttentionContext) -> Tensor | None:
        """Which keys a query may look at, as `attend` takes it; None: all up to its own."""

    @abstractmethod
    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        """`chunk_loss` of loss.py; the gradient may take the place of the logits."""

    # What PyTorch computes for a set that does not.

    def product(self, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """`x @ weight`, or with its transpose."""
        return F.linear(x, weight) if transposed else x @ weight

    @abstractmethod
    def weight_gradient(self, dy_NR: Tensor, x_NC: Tensor) -> Tensor:
        """`dy^T x` in float32."""

    def add_product(self, dy_NR: Tensor, x_NC: Tensor, to_RC: Tensor) -> None:
        """`to += dy^T x` in place, in float32."""
        loss.add_product(dy_NR, x_NC, to_RC)

    # The functions that make a block.

    def linear(self, x: Tensor, *layers: Linear) -> Tensor:
        """What layers make of the same input, side by side, in one product."""
        sizes = [layer.out_features for layer in layers]

        def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, Sequence[Tensor], Backward]:
            weight = joined(weights, x.dtype)
            return self.product(x, weight, transposed=True), (x, weight), gradients

        def gradients(kept: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, weight = kept
            dweight = self.weight_gradient(dy.flatten(0, -2), x.flatten(0, -2))
            return self.product(dy, weight, transposed=False), *torch.split(dweight, sizes)

        return fused(run, x, *[layer.weight for layer in layers])  # type: ignore[no-any-return]

    def rms_norm(self, norm: nn.RMSNorm, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x + added` (or x) and its norm, both of the dtype of x.

        x goes through alone too, so that both its gradients arrive here and are added at once.
        """
        eps, adds = norm.eps or 0.0, added is not None

        def run(
            x: Tensor, added: Tensor | None, weight: Tensor
        ) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor], Backward]:
            total, normed, rstd = self.rms_norm_forward(x, added, weight, eps)
            return (total, normed), (total, weight, rstd), gradients

        def gradients(kept: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
            dx, dweight = (dtotal, None) if dnormed is None else self.rms_norm_backward(kept, dtotal, dnormed)
            return dx, dx if adds else None, dweight

        return fused(run, x, added, norm.weight.float())  # type: ignore[no-any-return]

    def swiglu(self, x: Tensor) -> Tensor:
        """`silu(gate) * up`; each row of x holds the gates, then the ups."""

        def run(x: Tensor) -> tuple[Tensor, Sequence[Tensor], Backward]:
            return self.swiglu_forward(x), (x,), lambda kept, dy: (self.swiglu_backward(kept[0], dy),)

        return fused(run, x)  # type: ignore[no-any-return]

    def feed_forward(self, mlp: FeedForward, z: Tensor, x: Tensor | None = None) -> Tensor:
        """`FeedForward` of z, added to x if that is given."""
        y = self.linear(self.swiglu(self.linear(z, mlp.gate_proj, mlp.up_proj)), mlp.down_proj)
        return y if x is None else x + y

    def attend(self, attention: Attention, qkv_BTC: Tensor, rotary_2TK: Tensor, visible: Tensor | None) -> Tensor:
        """From queries, keys and values as their product made them to mixed_BTC: norm, positions, three steps.

        C are the channels of heads side by side: of all queries, then all keys, then all values; of what is gathered.
        `rotary_2TK` is of float32; `visible` as the method of this name returns it.
        """
        norms, K = (attention.q_norm, attention.k_norm), attention.head_dim
        weights = [norm.weight.float() if isinstance(norm, nn.RMSNorm) else None for norm in norms]
        eps = getattr(attention.q_norm, "eps", 0.0)
        heads = Heads(attention.q_proj.out_features // K, attention.k_proj.out_features // K, K, eps)
        run = functools.partial(self.attention, heads)
        return fused(run, qkv_BTC, *weights, rotary_2TK, visible)  # type: ignore[no-any-return]


class FusedBlock(Block):
    kernels: FusedKernels
    dtype: torch.dtype  # of the activations it is for; others take the reference

    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        if not context.plain or x_BTD.dtype != self.dtype:
            return super().forward(x_BTD, context, layer)
        kernels, attention, visible = self.kernels, self.self_attn, self.kernels.visible(context)
        x_BTD, normed_BTD = kernels.rms_norm(self.input_layernorm, x_BTD)
        qkv_BTC = kernels.linear(normed_BTD, attention.q_proj, attention.k_proj, attention.v_proj)
        mixed_BTC = kernels.attend(attention, qkv_BTC, context.rotary_2TK, visible)
        mixed_BTD = self.dropout(kernels.linear(mixed_BTC, attention.o_proj))
        x_BTD, normed_BTD = kernels.rms_norm(self.post_attention_layernorm, x_BTD, mixed_BTD)
        if self.training and self.dropout.p > 0:
            return x_BTD + self.dropout(kernels.feed_forward(self.mlp, normed_BTD))  # type: ignore[no-any-return]
        return kernels.feed_forward(self.mlp, normed_BTD, x_BTD)


class FusedRMSNorm(RMSNorm):
    kernels: FusedKernels
    dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(self, x)[1] if x.dtype == self.dtype else super().forward(x)


class FusedCrossEntropy(LinearCrossEntropy):
    kernels: FusedKernels
    dtype: torch.dtype

    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        if logits_NV.dtype != self.dtype:
            return super().chunk_loss(logits_NV, targets_N, scales_N)
        return self.kernels.chunk_loss(logits_NV, targets_N, scales_N)

    def add_product(self, dy_NR: Tensor, x_NC: Tensor, to_RC: Tensor) -> None:
        if dy_NR.dtype != self.dtype:
            super().add_product(dy_NR, x_NC, to_RC)
        else:
            self.kernels.add_product(dy_NR, x_NC, to_RC)


@functools.cache
def _with(cls: type, kernels: type[FusedKernels], dtype: torch.dtype) -> type:
    return type(cls.__name__, (cls,), {"kernels": kernels(), "dtype": dtype})
