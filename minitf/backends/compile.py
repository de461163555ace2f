"""torch.compile: the model as written, with its operations fused by PyTorch's compiler (8 to 60 s, kept on disk)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minitf.attention import AttentionContext, RMSNorm
from minitf.backends import Reference, substitute
from minitf.backends.sdpa import Sdpa, SdpaAttention
from minitf.loss import LinearCrossEntropy, chunk_loss
from minitf.model import Block, Transformer
from minitf.optim import Optimizer
from minitf.system.hardware import compiled, compiler_missing


def _block(
    block: Block,
    x_BTD: Tensor,
    rotary_2TK: Tensor,
    mask: Tensor | None,
    segments_BT: Tensor | None,
    layer: int,
    shared: dict[str, Tensor],
) -> Tensor:
    context = AttentionContext(rotary_2TK, x_BTD.dtype, segments_BT, shared=shared, _mask=mask)
    return Block.forward(block, x_BTD, context, layer)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function that takes a block as an argument is compiled once for all blocks, inside FSDP's hooks."""
    return compiled(function)


def _has_trained_shape(module: Any, x_BTD: Tensor) -> bool:
    """Whether the input belongs to a training step, or has the shape of one.

    Compiling for the shape of every prompt would take longer than computing it as written.
    """
    if torch.is_grad_enabled() and module.training:
        module.trained_shape = x_BTD.shape
    return bool(module.trained_shape == x_BTD.shape)


def _as_in_training(function: Callable[..., Any], module: nn.Module, x_BTD: Tensor, *others: Any) -> Tensor:
    """A compiled function, by the graph that trains also where no gradient is wanted.

    A graph without gradients would have to be compiled first, which takes longer than all evaluations of a short run.
    """
    if torch.is_grad_enabled() and module.training:
        return _compiled(function)(module, x_BTD, *others)  # type: ignore[no-any-return]
    training, wanted = module.training, torch.is_grad_enabled()
    module.train()
    with torch.enable_grad():
        y_BTD: Tensor = _compiled(function)(module, x_BTD if wanted else x_BTD.detach().requires_grad_(), *others)
    module.train(training)
    return y_BTD if wanted else y_BTD.detach()


class CompiledBlock(Block):
    trained_shape: torch.Size | None = None

    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        same_network = self.training or self.dropout.p == 0
        if not context.plain or not same_network or not _has_trained_shape(self, x_BTD):
            return super().forward(x_BTD, context, layer)
        fused = isinstance(self.self_attn, SdpaAttention)
        mask = None if fused else context.mask()
        inputs = (context.rotary_2TK, mask, context.segments_BT, layer, context.shared)
        return _as_in_training(_block, self, x_BTD, *inputs)


class CompiledRMSNorm(RMSNorm):
    trained_shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _as_in_training(RMSNorm.forward, self, x) if _has_trained_shape(self, x) else super().forward(x)


class CompiledCrossEntropy(LinearCrossEntropy):
    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        return _compiled(chunk_loss)(logits_NV, targets_N, scales_N)  # type: ignore[no-any-return]


class Compile:
    name = "compile"
    description = "torch.compile"
    replaces: tuple[str, ...] = ()  # it compiles whatever is written

    def unsupported(self, model: Transformer) -> str | None:
        return compiler_missing(model.device)

    def install(self, model: Transformer, optimizer: Optimizer | None = None) -> None:
        base = Reference() if Sdpa().unsupported(model) else Sdpa()
        base.install(model, optimizer)
        for block in model.model.layers:  # type: ignore[union-attr]
            substitute(block, CompiledBlock)
        substitute(model.model.norm, CompiledRMSNorm)
        substitute(model.cross_entropy, CompiledCrossEntropy)
