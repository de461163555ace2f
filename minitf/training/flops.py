"""How much a training step computes."""

from minitf.model import Transformer


def flops_per_token(model: Transformer) -> float:
    """Floating point operations of one training token, forward and backward.

    Six per weight of every matrix product, and six per head channel and visible key for each of match and gather (PaLM,
    Chowdhery et al., 2022, appendix B, with the causal half counted as half).
    """
    c = model.config
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)  # type: ignore
    attention = 6 * c.num_layers * c.num_heads * c.head_dim * (c.context_length + 1)
    return 6.0 * (matrices + model.vocabulary_VD.numel()) + attention
