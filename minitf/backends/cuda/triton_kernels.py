"""A training step on a CUDA device: products and attention by PyTorch's libraries, what lies between by Triton."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.attention import AttentionContext
from minitf.backends.cuda import triton_rows as rows
from minitf.backends.cuda.triton_qk import heads_backward, heads_forward
from minitf.backends.cuda.triton_rows import LOGITS, ROWS_EACH, block_of, warps_of
from minitf.backends.fused import Backward, FusedKernels, Heads
from minitf.loss import IGNORED
from minitf.model import Transformer

MAX_WIDTH = 16384  # of a row that one Triton program holds


class TritonKernels(FusedKernels):
    """Training by Triton on a CUDA device."""

    name = "triton"
    description = "our Triton kernels"
    device = "cuda"

    def unsupported(self, model: Transformer) -> str | None:
        c = model.config
        if reason := super().unsupported(model):
            return reason
        if c.head_dim & (c.head_dim - 1) or max(c.head_dim, c.hidden_size) > MAX_WIDTH:
            return f"heads of {c.head_dim} channels in {c.hidden_size}: they take powers of 2 up to {MAX_WIDTH}"
        return None

    def rms_norm_forward(
        self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        D = x.shape[-1]
        total = x if added is None else torch.empty_like(x)
        normed, rstd = torch.empty_like(x), torch.empty(x.numel() // D, device=x.device)
        arguments = (x, x if added is None else added, weight, total, normed, rstd, eps)
        rows.rms_norm_forward[(len(rstd),)](*arguments, D, block_of(D), added is not None, num_warps=warps_of(D))
        return total.view_as(total), normed, rstd

    def rms_norm_backward(
        self, kept: tuple[Tensor, Tensor, Tensor], dtotal: Tensor | None, dnormed: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, weight, rstd = kept
        N, D, dx = len(rstd), total.shape[-1], torch.empty_like(total)
        parts = torch.empty(-(-N // ROWS_EACH), D, device=total.device)
        at_once = 4 if D <= 1024 else 1
        arguments = (total, weight, rstd, dnormed, dnormed if dtotal is None else dtotal, dx, parts, N)
        sizes = (D, block_of(D), ROWS_EACH, at_once, dtotal is not None)
        rows.rms_norm_backward[(len(parts),)](*arguments, *sizes, num_warps=warps_of(D * at_once))
        return dx, parts.sum(0)

    def swiglu_forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1] // 2
        y, block = x.new_empty(*x.shape[:-1], width), min(1024, block_of(width))
        rows.swiglu_forward[(y.numel() // width, -(-width // block))](x, y, width, block)
        return y

    def swiglu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        width, dx = dy.shape[-1], torch.empty_like(x)
        block = min(1024, block_of(width))
        rows.swiglu_backward[(dy.numel() // width, -(-width // block))](x, dy, dx, width, block)
        return dx

    def weight_gradient(self, dy_NR: Tensor, x_NC: Tensor) -> Tensor:
        """Added up in float32 by the product and never rounded in between."""
        if x_NC.dtype == torch.float32 or not x_NC.is_cuda:
            return (dy_NR.mT @ x_NC).float()
        return torch.mm(dy_NR.mT, x_NC, out_dtype=torch.float32)

    def attention(self, heads: Heads, qkv: Tensor, *others: Any) -> tuple[Tensor, Sequence[Tensor | None], Backward]:
        (B, T), (H, G, K, _) = qkv.shape[:2], heads
        q_norm, k_norm, rotary, visible = others
        v = qkv[..., (H + G) * K :].view(B, T, G, K)
        parts = (*heads_forward(heads, qkv, q_norm, k_norm, rotary), v)
        # PyTorch's own gradient of its attention, whichever library it takes that from.
        with torch.enable_grad():
            inputs = [part.detach().transpose(1, 2).requires_grad_() for part in parts]
            q, k, v = inputs
            options: dict[str, Any] = {"is_causal": visible is None, "enable_gqa": G != H}
            outputs = [F.scaled_dot_product_attention(q, k, v, visible, **options)]

        def gradients(kept: Any, dmixed: Tensor) -> tuple[Tensor | None, ...]:
            mixed = outputs.pop()  # so that its memory is free afterwards
            found = torch.autograd.grad(mixed, inputs, dmixed.view(B, T, H, K).transpose(1, 2))
            inputs.clear()
            dq, dk, dv = (gradient.transpose(1, 2).contiguous() for gradient in found)
            return *heads_backward(heads, kept, (dq, dk, dv)), None, None

        mixed_BTHK = outputs[0].detach().transpose(1, 2)
        return mixed_BTHK.reshape(B, T, H * K), (qkv, q_norm, k_norm, rotary), gradients

    def visible(self, context: AttentionContext) -> Tensor | None:
        return None if context.segments_BT is None else context.mask().unsqueeze(1)

    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient takes the place of the logits."""
        (N, V), losses_N = logits_NV.shape, torch.empty(len(logits_NV), device=logits_NV.device)
        scales_N = torch.where(targets_N != IGNORED, scales_N, 0.0).float()
        block = min(LOGITS, block_of(V))
        arguments = (logits_NV, targets_N, scales_N, losses_N, V, block)
        rows.cross_entropy[(N,)](*arguments, num_warps=min(8, max(1, block // 256)))
        return losses_N.sum(), logits_NV
