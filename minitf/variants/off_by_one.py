"""Softmax with a one in its denominator: a head that has nothing to look at may look nowhere.

"Attention Is Off By One" (Miller, 2023). Softmax makes every head give away a weight of 1; heads without a use for it
park it on the first token. The one is a key of score 0 that has no value.
"""

import torch
from torch import Tensor

from minitf.attention import Attention


class OffByOne(Attention):
    """weigh: weights = exp(scores) / (1 + sum(exp(scores))), which sum to less than 1"""

    def weigh(self, scores_BHTS: Tensor) -> Tensor:
        nowhere_BHT1 = torch.zeros_like(scores_BHTS[..., :1])
        return torch.softmax(torch.cat([nowhere_BHT1, scores_BHTS], dim=-1), dim=-1)[..., 1:]
