"""PyTorch's fused attention: match, weigh and gather in one call, without ever storing the weights."""

import torch.nn.functional as F
from torch import Tensor

from minitf.attention import Attention, AttentionContext
from minitf.backends import Reference, custom_module, substitute
from minitf.model import Transformer
from minitf.optim import Optimizer

# On a CPU the fused kernel's backward pass is slow in bfloat16 (at 512 positions 113 ms against 27 ms for the three
# explicit steps); above this length the size of the scores tips the balance.
EXPLICIT_MAX_LENGTH = 768


class SdpaAttention(Attention):
    def attend(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, context: AttentionContext, layer: int) -> Tensor:
        if not context.plain:
            return super().attend(q_BHTK, k_BHSK, v_BHSK, context, layer)
        causal, grouped = context.segments_BT is None, k_BHSK.shape[1] != q_BHTK.shape[1]
        mask = None if causal else context.mask().unsqueeze(-3)
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, mask, is_causal=causal, enable_gqa=grouped)


class Sdpa:
    name = "sdpa"
    description = "PyTorch's fused attention"
    replaces: tuple[str, ...] = (
        *("attention.Attention.attend", "attention.Attention.match", "attention.Attention.weigh"),
        *("attention.Attention.gather", "attention.AttentionContext.visible", "attention.AttentionContext.mask"),
    )

    def unsupported(self, model: Transformer) -> str | None:
        if model.config.attention == "explicit":
            return "model.attention=explicit asks for the three steps as written"
        if custom := custom_module(model):
            return f"it does not know {custom}"
        short = model.device.type == "cpu" and model.config.context_length <= EXPLICIT_MAX_LENGTH
        if model.config.attention == "auto" and short:
            return f"on a CPU the three steps are faster up to {EXPLICIT_MAX_LENGTH} positions"
        return None

    def install(self, model: Transformer, optimizer: Optimizer | None = None) -> None:
        Reference().install(model, optimizer)
        for block in model.model.layers:  # type: ignore[union-attr]
            substitute(block.self_attn, SdpaAttention)
