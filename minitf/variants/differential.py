"""Differential attention: one map minus another, so that what both look at cancels.

"Differential Transformer" (Ye et al., 2024), equations 1 to 3. A head's queries and keys are halved into two maps; the
second, times a learned lambda, is subtracted, and what the head gathers is normalised. Lambda begins at 0.8 in every
layer, which the paper found as good as its schedule over the depth. The halves are the even and the odd channels:
rotary positions turn pairs (i, i + head_dim / 2), and a pair must stay together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minitf.attention import Attention, AttentionContext, AttentionRecord, RMSNorm
from minitf.errors import RequestError

LAMBDA_INIT = 0.8


class Differential(Attention):
    """weigh, gather: weights = softmax(scores 1) - lambda softmax(scores 2); output = 0.2 norm(weights @ v)"""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *others: Any) -> None:
        if head_dim % 4:
            raise RequestError(f"model.variant=differential needs heads whose width divides by 4: {head_dim} does not")
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, *others)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(head_dim // 2)) for _ in range(4)
        )
        self.mixed_norm = RMSNorm(head_dim)

    def subtracted(self) -> Tensor:
        """Lambda."""
        return (self.lambda_q1 @ self.lambda_k1).exp() - (self.lambda_q2 @ self.lambda_k2).exp() + LAMBDA_INIT

    def attend(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, context: AttentionContext, layer: int) -> Tensor:
        mask, edited = context.mask(), context.edits or (lambda step, layer, result: result)
        first, second = (
            self.weigh(edited("match", layer, self.match(q_BHTK[..., half::2], k_BHSK[..., half::2], mask)))
            for half in (0, 1)
        )
        weights_BHTS = edited("weigh", layer, first - self.subtracted().to(first.dtype) * second)
        mixed_BHTK = self.mixed_norm(self.gather(weights_BHTS, v_BHSK)) * (1 - LAMBDA_INIT)
        mixed_BHTK = edited("gather", layer, mixed_BHTK)
        if context.record is not None:
            context.record.append(AttentionRecord(q_BHTK, k_BHSK, v_BHSK, weights_BHTS, mixed_BHTK))
        return mixed_BHTK
