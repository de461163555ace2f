"""Linear attention: running sums over the past in place of a map, so a token costs the same wherever it stands.

"Transformers are RNNs" (Katharopoulos et al., 2020), equations 9 and 16 to 20, with phi(x) = elu(x) + 1. Training sums
phi(k) v^T over blocks of positions and never has the weights of a pair. A look at a head shows the weights that these
sums imply: `match` and `weigh` compute them, for maps, edits, packed texts and the cache. The output is the same.

Vectors are not rotated: phi of a rotated vector depends on where the text begins, not on distances alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.attention import Attention, AttentionContext, match

BLOCK = 64  # positions whose pairs are computed at once


class LinearAttention(Attention):
    """match, weigh: weights = phi(q) phi(k)^T / sum(phi(q) phi(k)^T), phi(x) = elu(x) + 1; training makes no map"""

    def rotate(self, x_BHTK: Tensor, rotary_2TK: Tensor) -> Tensor:
        return x_BHTK

    def match(self, q_BHTK: Tensor, k_BHSK: Tensor, mask: Tensor) -> Tensor:
        return match(F.elu(q_BHTK) + 1, F.elu(k_BHSK) + 1, mask)  # its 1 / sqrt(head_dim) cancels in `weigh`

    def weigh(self, scores_BHTS: Tensor) -> Tensor:
        scores_BHTS = scores_BHTS.clamp(min=0)  # the mask's -inf
        return scores_BHTS / scores_BHTS.sum(dim=-1, keepdim=True).clamp(min=1e-6)

    def attend(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, context: AttentionContext, layer: int) -> Tensor:
        if not context.plain or context.segments_BT is not None:
            return super().attend(q_BHTK, k_BHSK, v_BHSK, context, layer)
        group = q_BHTK.shape[1] // k_BHSK.shape[1]
        k_BHSK, v_BHSK = k_BHSK.repeat_interleave(group, dim=1), v_BHSK.repeat_interleave(group, dim=1)
        mixed, total_BH1K = [], torch.zeros_like(k_BHSK[:, :, :1])
        state_BHKK = torch.zeros_like(k_BHSK[:, :, :1].mT @ v_BHSK[:, :, :1])
        for start in range(0, q_BHTK.shape[2], BLOCK):
            q, k, v = (x[:, :, start : start + BLOCK] for x in (F.elu(q_BHTK) + 1, F.elu(k_BHSK) + 1, v_BHSK))
            scores = (q @ k.mT).tril()
            sums = scores.sum(dim=-1, keepdim=True) + (q * total_BH1K).sum(dim=-1, keepdim=True)
            mixed.append((scores @ v + q @ state_BHKK) / sums)
            state_BHKK, total_BH1K = state_BHKK + k.mT @ v, total_BH1K + k.sum(dim=2, keepdim=True)
        return torch.cat(mixed, dim=2)

    @staticmethod
    def reference(q_TK: Tensor, k_TK: Tensor, v_TK: Tensor) -> Tensor:
        """One head of one text, a position at a time: equations 18 to 20."""
        state_KK, total_K, mixed = torch.zeros_like(k_TK.T @ v_TK), torch.zeros_like(k_TK[0]), []
        for q_K, k_K, v_K in zip(F.elu(q_TK) + 1, F.elu(k_TK) + 1, v_TK, strict=True):
            state_KK, total_K = state_KK + torch.outer(k_K, v_K), total_K + k_K
            mixed.append(q_K @ state_KK / (q_K @ total_K))
        return torch.stack(mixed)
