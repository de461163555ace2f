"""The transformer around the attention block: token ids in, logits out.

The architecture is Qwen3's (`qk_norm=false`: Llama's), and the parameters carry their Hugging Face names.

Axes in tensor names, here and everywhere:

    B batch   T query position   S key position   D hidden   H heads   K head width   F feed-forward   V vocabulary
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitf.attention import (
    Attention,
    AttentionContext,
    AttentionRecord,
    Edits,
    KeyValueCache,
    Linear,
    RMSNorm,
    joint_linear,
)
from minitf.errors import RequestError
from minitf.loss import LinearCrossEntropy
from minitf.rope import check_scaling, rotary_table
from minitf.variants import attention_class, check_variant, switch_off


@dataclass
class ModelConfig:
    num_layers: int = 4  # blocks of attention + feed-forward
    hidden_size: int = 192  # width of the residual stream
    num_heads: int = 6  # query heads in each block
    num_kv_heads: int = 0  # key/value heads, shared by groups of query heads; auto: num_heads
    head_dim: int = 0  # width of a head, even; auto: hidden_size / num_heads
    intermediate_size: int = 0  # width of the feed-forward layer; auto: 8/3 hidden_size, rounded up to 64s
    context_length: int = 128  # tokens the model can look back on
    rope_theta: float = 10000.0  # base of the rotary position frequencies
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # of a stretched context, as in config.json; {}: none
    rms_norm_eps: float = 1e-6  # added to the mean square in every normalisation
    qk_norm: bool = True  # normalise queries and keys (the Qwen3 architecture); false: the Llama one
    tie_embeddings: bool = True  # one matrix embeds the input tokens and scores the output tokens
    dropout: float = 0.0  # share of each block's output dropped in training, 0 to below 1
    attention: str = "auto"  # auto | explicit (match, weigh, gather as written) | sdpa (PyTorch's fused attention)
    variant: str = "softmax"  # another way to attend, a file of minitf/variants: sliding_window, sink, gated, ...
    attention_class: str = ""  # your own way, FILE.py:CLASS: a subclass of minitf.attention.Attention
    heads_off: list[list[int]] = field(default_factory=list)  # [layer, head] that are off for good, from 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "context_length"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("num_kv_heads", "head_dim", "intermediate_size"):
            self._check(name, getattr(self, name) >= 0, "must be positive, or 0 to derive it")
        divides = bool(self.head_dim) or self.hidden_size % self.num_heads == 0
        heads = f"does not divide into model.num_heads={self.num_heads} heads: change one, or set model.head_dim"
        self._check("hidden_size", divides, heads)
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_heads
        self.intermediate_size = self.intermediate_size or -(-8 * self.hidden_size // (3 * 64)) * 64
        self._check("head_dim", self.head_dim % 2 == 0, "must be even: rotary positions turn pairs of channels")
        grouped = self.num_heads % self.num_kv_heads == 0
        self._check("num_heads", grouped, f"must be a multiple of model.num_kv_heads={self.num_kv_heads}")
        self._check("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self._check("attention", self.attention in ("auto", "explicit", "sdpa"), "must be one of auto, explicit, sdpa")
        self._check("rope_theta", 0 < self.rope_theta < float("inf"), "must be positive")
        self._check("rms_norm_eps", 0 < self.rms_norm_eps < 1, "must be between 0 and 1")
        check_scaling(self.rope_scaling)
        check_variant(self)

    def _check(self, key: str, valid: bool, rule: str) -> None:
        if not valid:
            raise RequestError(f"model.{key}={getattr(self, key)} {rule}")


class Embedding(nn.Embedding):
    """A row of weights for each token."""

    def reset_parameters(self) -> None:
        # On the meta device nothing is drawn, and PyTorch would import most of itself to find that out: 1 to 3 s.
        if not self.weight.is_meta:
            super().reset_parameters()


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = joint_linear(x_BTD, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: positions exchange what they know (attention), then each is transformed by itself (feed-forward)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        attention: type[Attention] = attention_class(c.variant, c.attention_class)
        self.self_attn = attention(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.qk_norm, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = FeedForward(c.hidden_size, c.intermediate_size)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x_BTD: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), context, layer))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Decoder-only language model.

    `compute_dtype` is the dtype of the activations; the parameters stay float32. With `activation_checkpointing` a
    block keeps only its input for the backward pass and computes the rest again.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.compute_dtype = torch.float32
        self.activation_checkpointing = False
        self.model = nn.Module()  # holds the names `model.embed_tokens`, `model.layers`, `model.norm`
        self.model.embed_tokens = Embedding(vocab_size, config.hidden_size)
        self.model.layers = switch_off(nn.ModuleList(Block(config) for _ in range(config.num_layers)), config)
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
        self.cross_entropy = LinearCrossEntropy()
        with torch.device("cpu"):  # the same numbers on every device, and not on the meta device, as above
            rotary = rotary_table(config.head_dim, config.context_length, config.rope_theta, config.rope_scaling)
        self.register_buffer("rotary", rotary.to(self.model.embed_tokens.weight.device), persistent=False)
        self.rotary: Tensor
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights: normal with standard deviation 0.02 for embeddings and 1/sqrt(inputs) for matrices.

        The matrices that write into the residual stream start at zero, so every block starts as the identity and
        learns what to add (as in Fixup, Zhang et al., 2019).
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    @property
    def device(self) -> torch.device:
        return self.rotary.device

    @property
    def vocabulary_VD(self) -> Tensor:  # noqa: N802
        """The matrix whose rows score the next token."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight  # type: ignore

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        c = self.config
        shape = (c.num_layers, batch_size, c.num_kv_heads, capacity, c.head_dim)
        keys = torch.empty(shape, dtype=self.compute_dtype, device=self.device)
        return KeyValueCache(keys, torch.empty_like(keys))

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute activations in `dtype` inside."""
        before, self.compute_dtype = self.compute_dtype, dtype
        try:
            yield
        finally:
            self.compute_dtype = before

    def hidden(
        self,
        ids_BT: Tensor,
        cache: KeyValueCache | None = None,
        record: list[AttentionRecord] | None = None,
        segments_BT: Tensor | None = None,
        edits: Edits | None = None,
    ) -> Tensor:
        """Last layer's normalised output x_BTD for token ids of shape (B, T).

        With a `cache` the ids continue its texts and are added to it. A `record` list gets one `AttentionRecord` a
        layer, `edits` change its three steps. Past plus new positions are at most `context_length` (else ValueError).
        `segments_BT` numbers the texts packed into a row, which do not see each other; it excludes a cache.
        """
        start, T = (cache.length if cache else 0), ids_BT.shape[1]
        if start + T > self.config.context_length:
            raise ValueError(f"{start + T} positions exceed the context of {self.config.context_length}")
        rotary_2TK = cache.rotary(self.rotary, T) if cache else self.rotary[:, :T]
        context = AttentionContext(rotary_2TK, self.compute_dtype, segments_BT, cache, record, edits)
        x_BTD = self.model.embed_tokens(ids_BT).to(self.compute_dtype)  # type: ignore[operator]
        for layer, block in enumerate(self.model.layers):  # type: ignore[arg-type]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, context, layer, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, context, layer)
        if cache is not None:
            cache.advance(T)
        return self.model.norm(x_BTD)  # type: ignore[operator, no-any-return]

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Next-token logits_BTV in float32, from what `hidden` returns."""
        return F.linear(x_BTD, self.vocabulary_VD.to(x_BTD.dtype)).float()

    def forward(self, ids_BT: Tensor, *reading: Any, **named: Any) -> Tensor:
        """Next-token logits_BTV in float32; the arguments are those of `hidden`."""
        return self.logits(self.hidden(ids_BT, *reading, **named))

    def loss(
        self, ids_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None = None, weights_BT: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats a token, of a `Batch`; targets of -100 do not count."""
        x_BTD = self.hidden(ids_BT, segments_BT=segments_BT)
        return self.cross_entropy(x_BTD, self.vocabulary_VD, targets_BT, weights_BT)  # type: ignore[no-any-return]
