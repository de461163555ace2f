"""Cross-entropy of the next token straight from the last layer's output, without ever holding all the logits.

The logits of a batch are by far its largest tensor (4096 tokens x 4096 words in float32: 67 MB, read several times).
Here they exist for a few rows at a time: scored, turned into loss and gradient while they are in the cache, and
dropped. The gradient is the textbook one, `softmax(logits) - one_hot(target)`, so nothing is computed twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a target that does not count, PyTorch's convention
# Logits held at a time: about the size of a cache on a CPU; on a GPU enough to fill it, a hundredth of its memory.
CHUNK_LOGITS = 1 << 21
CHUNK_LOGITS_ELSEWHERE = 1 << 28
MEMORY_BYTES_PER_LOGIT = 200


def chunk_loss(logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of some rows in nats, summed with `scales_N`, and its gradient with respect to their logits."""
    logits = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_sum_N1 = logits.logsumexp(-1, keepdim=True)
    scales_N1 = torch.where(targets_N != IGNORED, scales_N, 0.0)[:, None]
    is_target_NV = torch.arange(logits.shape[1], device=logits.device) == targets_N[:, None]
    # A row has one target, so the sum over the words picks its logit.
    losses_N1 = log_sum_N1 - torch.where(is_target_NV, logits, 0.0).sum(-1, keepdim=True)
    gradient_NV = ((logits - log_sum_N1).exp() - is_target_NV.to(logits.dtype)) * scales_N1
    return torch.where(scales_N1 != 0, losses_N1 * scales_N1, 0.0).sum(), gradient_NV.to(logits_NV.dtype)


def add_product(dy_NR: Tensor, x_NC: Tensor, to_RC: Tensor) -> None:
    """`to += dy^T x` in place: some rows' part of the gradient of weights."""
    if to_RC.device.type == "cuda" and to_RC.dtype != x_NC.dtype:
        # Summed in float32 by the product itself, without rounding in between.
        torch.addmm(to_RC, dy_NR.mT, x_NC, out_dtype=to_RC.dtype, out=to_RC)
    else:
        to_RC += dy_NR.mT @ x_NC


def rows_at_a_time(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """How many rows of logits are held at a time: chunks of one size where possible, so that shapes repeat."""
    most_logits = CHUNK_LOGITS if device.type == "cpu" else CHUNK_LOGITS_ELSEWHERE
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        most_logits = max(most_logits, memory // MEMORY_BYTES_PER_LOGIT)
    fewest = -(-num_rows // max(1, most_logits // vocab_size))
    num_chunks = next((n for n in range(fewest, 2 * fewest + 1) if num_rows % n == 0), fewest)
    return -(-num_rows // num_chunks)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        vocabulary_VD: Tensor,
        targets_N: Tensor,
        scales_N: Tensor,
        num_rows: int,
        steps: "LinearCrossEntropy",
    ) -> Tensor:
        words_VD = vocabulary_VD.to(x_ND.dtype)
        with_gradient = any(ctx.needs_input_grad)
        dx_ND = torch.empty_like(x_ND) if with_gradient else None
        sums = torch.promote_types(vocabulary_VD.dtype, torch.float32)
        dwords_VD = torch.zeros_like(vocabulary_VD, dtype=sums) if with_gradient else None
        total = torch.zeros((), device=x_ND.device, dtype=vocabulary_VD.dtype)
        for start in range(0, x_ND.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            loss, gradient_NV = steps.chunk_loss(F.linear(x_ND[rows], words_VD), targets_N[rows], scales_N[rows])
            total += loss
            if dx_ND is not None and dwords_VD is not None:
                torch.mm(gradient_NV, words_VD, out=dx_ND[rows])
                steps.add_product(gradient_NV, x_ND[rows], dwords_VD)
        ctx.save_for_backward(dx_ND, dwords_VD)
        ctx.dtype = vocabulary_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dwords_VD = ctx.saved_tensors
        dx_ND = dx_ND * gradients[0].to(dx_ND.dtype)
        return dx_ND, (dwords_VD * gradients[0]).to(ctx.dtype), None, None, None, None


class LinearCrossEntropy(nn.Module):
    """Mean of `-log softmax(x @ vocabulary.T)[target]` in nats, over the targets that are not -100."""

    def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_loss(logits_NV, targets_N, scales_N)

    def add_product(self, dy_NR: Tensor, x_NC: Tensor, to_RC: Tensor) -> None:
        add_product(dy_NR, x_NC, to_RC)

    def forward(
        self, x_BTD: Tensor, vocabulary_VD: Tensor, targets_BT: Tensor, weights_BT: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; without gradients (`torch.no_grad`) the work for them is not done.

        `weights_BT` is what each target counts (default 1), at least 0; the mean is the weighted one. The products are
        computed in the dtype of x, the softmax in float32.
        """
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        counts_N = (targets_N != IGNORED).to(vocabulary_VD.dtype)
        if weights_BT is not None:
            counts_N = counts_N * weights_BT.flatten()
        scales_N = counts_N / counts_N.sum().clamp(min=1e-9)
        N, on_cpu = len(x_ND), x_ND.device.type == "cpu"
        num_rows = rows_at_a_time(N, vocabulary_VD.shape[0], x_ND.device)
        # The number of targets that count is not asked of a GPU: that would force a synchronisation.
        if on_cpu and (num_counted := int((counts_N != 0).sum())) <= N - num_rows:
            # Of pairs only about every other target counts: leave out the others, but for what fills the last chunk.
            num_kept = max(1, -(-num_counted // num_rows)) * num_rows
            kept = (counts_N == 0).to(torch.int8).argsort(stable=True)[:num_kept]
            x_ND, targets_N, scales_N = x_ND[kept], targets_N[kept], scales_N[kept]
        return _ChunkedCrossEntropy.apply(x_ND, vocabulary_VD, targets_N, scales_N, num_rows, self)  # type: ignore


linear_cross_entropy = LinearCrossEntropy()
