"""A window: a query looks back on a fixed number of positions, so decoding needs no older keys.

Longformer (Beltagy et al., 2020), section 3.1; as in Mistral and in Qwen3's `use_sliding_window`. Layers add up: after
L of them a position has heard of L windows.
"""

import torch
from torch import Tensor

from minitf.attention import Attention


class SlidingWindow(Attention):
    """match: scores = -inf where query - key >= 32 positions, else q k^T / sqrt(head_dim)"""

    window = 32  # positions, the query's own included

    def match(self, q_BHTK: Tensor, k_BHSK: Tensor, mask: Tensor) -> Tensor:
        scores_BHTS = super().match(q_BHTK, k_BHSK, mask)
        T, S = scores_BHTS.shape[-2:]
        near_TS = torch.ones(T, S, dtype=torch.bool, device=mask.device).triu(S - T - self.window + 1)
        return scores_BHTS.masked_fill(~near_TS, float("-inf"))
