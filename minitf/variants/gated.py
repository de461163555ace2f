"""A gate: each channel of what a head gathered passes as far as the query's own position lets it.

"Gated Attention for Large Language Models" (Qiu et al., 2025), in its best variant: elementwise, after gathering; as in
Qwen3-Next. There the gate's matrix is a part of q_proj, here it is one of its own.
"""

from typing import Any

import torch
from torch import Tensor

from minitf.attention import Attention, AttentionContext, AttentionRecord, Linear


class Gated(Attention):
    """gather: output = (weights @ v) * sigmoid(gate_proj(x)), before the output projection"""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *others: Any) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, *others)
        self.gate_proj = Linear(hidden_size, num_heads * head_dim)

    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        context.shared["gate"] = torch.sigmoid(self.gate_proj(x_BTD))
        return super().forward(x_BTD, context, layer)

    def attend(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, context: AttentionContext, layer: int) -> Tensor:
        mask, edited = context.mask(), context.edits or (lambda step, layer, result: result)
        scores_BHTS = edited("match", layer, self.match(q_BHTK, k_BHSK, mask))
        weights_BHTS = edited("weigh", layer, self.weigh(scores_BHTS))
        gate_BHTK = context.shared.pop("gate").view(*q_BHTK.transpose(1, 2).shape).transpose(1, 2)
        mixed_BHTK = edited("gather", layer, self.gather(weights_BHTS, v_BHSK) * gate_BHTK)
        if context.record is not None:
            context.record.append(AttentionRecord(q_BHTK, k_BHSK, v_BHSK, weights_BHTS, mixed_BHTK))
        return mixed_BHTK
