"""No positional encoding: only the causal mask says what comes first.

"The Impact of Positional Encoding on Length Generalization in Transformers" (Kazemnejad et al., 2023): NoPE. A query
sees how many keys there are before it, from which layers above can learn positions.
"""

from torch import Tensor

from minitf.attention import Attention


class NoPositions(Attention):
    """match: scores = q k^T / sqrt(head_dim), with queries and keys that are not rotated"""

    def rotate(self, x_BHTK: Tensor, rotary_2TK: Tensor) -> Tensor:
        return x_BHTK
