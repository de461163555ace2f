"""The first layer's values come back in every layer: what a word is stays within reach of all heads.

"Value Residual Learning" (Zhou et al., 2024): ResFormer, with two learned factors a layer that begin at a half. In the
first layer both are of the same values.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minitf.attention import Attention, AttentionContext


class ValueResidual(Attention):
    """gather: output = weights @ (a v + b v_first), v_first: the first layer's values; a, b: learned, one a layer"""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))

    def attend(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, context: AttentionContext, layer: int) -> Tensor:
        if layer == 0:
            context.shared["first_values"] = v_BHSK
        own, first = self.value_mix.to(v_BHSK.dtype)
        return super().attend(q_BHTK, k_BHSK, own * v_BHSK + first * context.shared["first_values"], context, layer)
