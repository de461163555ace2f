"""Each look by itself: a sigmoid of every score in place of a softmax over them.

"Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (Ramapuram et al., 2024). Keys do not compete. The
bias -log(n), n keys, makes the weights of a fresh model sum to about 1. The paper takes the length of the text for n;
here it is the number of keys that the query sees, so that the past does not depend on what follows it.
"""

import torch
from torch import Tensor

from minitf.attention import Attention


class Sigmoid(Attention):
    """weigh: weights = sigmoid(scores - log(n)), n keys seen; their sum is free"""

    def weigh(self, scores_BHTS: Tensor) -> Tensor:
        num_keys_BHT1 = scores_BHTS.isfinite().sum(dim=-1, keepdim=True).clamp(min=1)
        return torch.sigmoid(scores_BHTS - num_keys_BHT1.log().to(scores_BHTS.dtype))
