"""torch.compile: the model as written, with its operations fused by PyTorch's compiler (8 to 60 s, kept on disk)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitf.attention import AttentionContext, RMSNorm
from minitf.backends import Reference, substitute
from minitf.backends.sdpa import Sdpa, SdpaAttention
from minitf.loss import LinearCrossEntropy, chunk_loss
from minitf.model import Block, Transformer
from minitf.optim import Optimizer
from minitf.system.hardware import compiled, compiler_missing


def _block(block: Block, x_BTD: Tensor, rotary_2TK: Tensor, mask: Tensor | None, segments_BT: Tensor | None) -> Tensor:
    context = AttentionContext(rotary_2TK, x_BTD.dtype, segments_BT, _mask=mask)
    return Block.forward(block, x_BTD, context)


def _norm(norm: RMSNorm, x_BTD: Tensor) -> Tensor:
    return RMSNorm.forward(norm, x_BTD)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function that takes a block as an argument is compiled once for all blocks, inside FSDP's hooks."""
    return compiled(function)


class CompiledBlock(Block):
    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        evaluating = not self.training
        if context.cache is not None or context.record is not None or (evaluating and self.dropout.p > 0):
            return super().forward(x_BTD, context, layer)
        fused = isinstance(self.self_attn, SdpaAttention)
        mask, segments_BT = (None, context.segments_BT) if fused else (context.mask(), None)
        arguments = (self, x_BTD, context.rotary_2TK, mask, segments_BT)
        if torch.is_grad_enabled() and not evaluating:
            return _compiled(_block)(*arguments)  # type: ignore[no-any-return]
        # Without dropout the training graph serves evaluation: compiling a graph without gradients would take longer
        # than all evaluations of a short run.
        self.train()
        with torch.enable_grad():
            y_BTD = _compiled(_block)(*arguments)
        self.train(not evaluating)
        return y_BTD if torch.is_grad_enabled() else y_BTD.detach()  # type: ignore[no-any-return]


class CompiledRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _compiled(_norm)(self, x)  # type: ignore[no-any-return]
        with torch.enable_grad():
            y = _compiled(_norm)(self, x)
        return y.detach()  # type: ignore[no-any-return]


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
