"""Attention with linear biases: what is farther back scores less, in place of rotary positions.

"Train Short, Test Long" (Press et al., 2022): the penalty of head h (from 1) of H is 2^(-8h/H) for each position of
distance, fixed. The paper computes other slopes where H is no power of two; here the same sequence serves for all.
"""

import torch
from torch import Tensor

from minitf.attention import Attention


class Alibi(Attention):
    """match: scores = q k^T / sqrt(head_dim) - 2^(-8 h / H) * (query - key), without rotation; h = 1 to H"""

    def rotate(self, x_BHTK: Tensor, rotary_2TK: Tensor) -> Tensor:
        return x_BHTK

    def match(self, q_BHTK: Tensor, k_BHSK: Tensor, mask: Tensor) -> Tensor:
        H, T, S = q_BHTK.shape[1], q_BHTK.shape[2], k_BHSK.shape[2]
        distance_TS = torch.arange(S - T, S, device=mask.device)[:, None] - torch.arange(S, device=mask.device)
        slopes_H = 2.0 ** (-8.0 * torch.arange(1, H + 1, device=mask.device) / H)
        penalty_HTS = slopes_H[:, None, None] * distance_TS.clamp(min=0)
        return super().match(q_BHTK, k_BHSK, mask) - penalty_HTS.to(q_BHTK.dtype)
