"""A sink: a learned score per head that takes weight and gives nothing.

"Efficient Streaming Language Models with Attention Sinks" (Xiao et al., 2023) found that models make a sink of the
first token; gpt-oss (OpenAI, 2025) gives each head one of its own, under this parameter's name.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minitf.attention import Attention


class Sink(Attention):
    """weigh: weights = exp(scores) / (exp(sink) + sum(exp(scores))), sink: one learned number a head"""

    def __init__(self, hidden_size: int, num_heads: int, *shape: Any) -> None:
        super().__init__(hidden_size, num_heads, *shape)
        self.sinks = nn.Parameter(torch.zeros(num_heads))

    def weigh(self, scores_BHTS: Tensor) -> Tensor:
        sinks_BHT1 = self.sinks.to(scores_BHTS.dtype)[:, None, None].expand_as(scores_BHTS[..., :1])
        return torch.softmax(torch.cat([sinks_BHT1, scores_BHTS], dim=-1), dim=-1)[..., 1:]
