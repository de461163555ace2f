"""The transformer around the attention block: token ids in, logits out.

The architecture is Qwen3's (`qk_norm=false`: Llama's) and the parameters carry their Hugging Face names, so a
checkpoint is a Hugging Face model as it stands.

Axes in tensor names, here and everywhere:

    B batch   T query position   S key position   D hidden   H heads   K head width   F feed-forward   V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitf.attention import (
    Attention,
    KeyValueCache,
    Linear,
    RMSNorm,
    causal_mask,
    joint_linear,
    packed_mask,
    rotary_table,
)
from minitf.errors import RequestError
from minitf.loss import add_product, chunk_loss, linear_cross_entropy
from minitf.rope import check_scaling

# On a CPU the fused kernel's backward pass is slow in bfloat16 (at 512 positions 113 ms against 27 ms for the three
# explicit steps); beyond this length the size of the scores turns the balance.
EXPLICIT_MAX_LENGTH = 768


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
    attention: str = "auto"  # auto | explicit (match, weigh, gather as written) | sdpa (one fused kernel)

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "context_length"):
            if getattr(self, name) < 1:
                raise RequestError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("num_kv_heads", "head_dim", "intermediate_size"):
            if getattr(self, name) < 0:
                raise RequestError(f"model.{name}={getattr(self, name)} must be positive, or 0 to derive it")
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        if self.head_dim == 0 and self.hidden_size % self.num_heads:
            raise RequestError(
                f"model.hidden_size={self.hidden_size} does not divide into model.num_heads={self.num_heads} heads: "
                "change one of them, or set model.head_dim"
            )
        self.head_dim = self.head_dim or self.hidden_size // self.num_heads
        if self.head_dim % 2:
            raise RequestError(f"model.head_dim={self.head_dim} must be even: rotary positions turn pairs of channels")
        if self.num_heads % self.num_kv_heads:
            raise RequestError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        self.intermediate_size = self.intermediate_size or -(-8 * self.hidden_size // (3 * 64)) * 64
        if not 0 <= self.dropout < 1:
            raise RequestError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if self.attention not in ("auto", "explicit", "sdpa"):
            raise RequestError(f"model.attention={self.attention} must be one of auto, explicit, sdpa")
        if not 0 < self.rope_theta < float("inf"):
            raise RequestError(f"model.rope_theta={self.rope_theta} must be positive")
        if not 0 < self.rms_norm_eps < 1:
            raise RequestError(f"model.rms_norm_eps={self.rms_norm_eps} must be between 0 and 1")
        check_scaling(self.rope_scaling)


class Embedding(nn.Embedding):
    """A row of weights for each token."""

    def reset_parameters(self) -> None:
        # On the meta device, where shapes are looked up, there is nothing to draw, and to find that out PyTorch imports
        # its compiler: 1 to 3 s of every start.
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
    """One layer: positions exchange what they know (attention), then each thinks by itself (feed-forward)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        c = config
        self.self_attn = Attention(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.qk_norm, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotary_2TK: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        mixed_BTD = self.self_attn(self.input_layernorm(x_BTD), rotary_2TK, mask, cache, layer, weights)
        x_BTD = x_BTD + self.dropout(mixed_BTD)
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))  # type: ignore[no-any-return]


def train_block(block: nn.Module, x_BTD: Tensor, rotary_2TK: Tensor, mask: Tensor | None) -> Tensor:
    """The training path through one block, as a plain function: compiled once, it serves all layers."""
    return Block.forward(block, x_BTD, rotary_2TK, mask)  # type: ignore[arg-type]


def final_norm(norm: nn.Module, x_BTD: Tensor) -> Tensor:
    """The normalisation before the scores, as a plain function for the same reason."""
    return norm(x_BTD)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TrainingFunctions:
    """What a training step spends its time in: the functions above, or faster ones that compute the same.

    Those with `visible` take, instead of a mask, what that makes of segments_BT (None: all that came before), and the
    rotary table in float32. They serve activations of `dtype` (None: of any).
    """

    train_block: Callable[..., Tensor] = train_block
    final_norm: Callable[..., Tensor] = final_norm
    chunk_loss: Callable[..., tuple[Tensor, Tensor]] = chunk_loss
    add_product: Callable[[Tensor, Tensor, Tensor], None] = add_product
    visible: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None


class Transformer(nn.Module):
    """Decoder-only language model.

    `compute_dtype` is the dtype of the activations (the parameters stay float32); `functions` may be replaced for
    training. What looks inside, and what decodes, goes another way, on which every step is written out.
    With `activation_checkpointing` a block keeps only its input for the backward pass and computes the rest anew.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.compute_dtype = torch.float32
        self.activation_checkpointing = False
        self.through_hooks = False  # whether blocks are called as modules, for the hooks of FSDP
        self.functions = TrainingFunctions()
        self.model = nn.Module()  # holds the names `model.embed_tokens`, `model.layers`, `model.norm`
        self.model.embed_tokens = Embedding(vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
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

    @torch.no_grad()
    def copy_weights_from(self, other: "Transformer") -> None:
        """The weights of `other`, of the same shape; tokens at the end that it does not know keep theirs."""
        state = other.state_dict()
        for name, parameter in self.state_dict().items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter[: len(state[name])] = state[name]
            else:
                parameter.copy_(state[name])

    @property
    def device(self) -> torch.device:
        return self.rotary.device

    @property
    def vocabulary_VD(self) -> Tensor:  # noqa: N802
        """The matrix whose rows score the next token."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight  # type: ignore

    @property
    def explicit_attention(self) -> bool:
        if self.config.attention == "auto":
            return self.device.type == "cpu" and self.config.context_length <= EXPLICIT_MAX_LENGTH
        return self.config.attention == "explicit"

    @property
    def usable_functions(self) -> TrainingFunctions:
        """`functions`, or the plain ones while the model computes in another dtype than they do."""
        return self.functions if self.functions.dtype in (None, self.compute_dtype) else TrainingFunctions()

    @property
    def attention_path(self) -> str:
        """How a training step computes attention: native (by the C kernels), explicit or sdpa."""
        if self.usable_functions.visible and self.device.type == "cpu":
            return "native"
        return "explicit" if self.explicit_attention else "sdpa"

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Floating point operations of one training token, forward and backward.

        Six per weight of every matrix product, and six per head channel and visible key for each of match and gather
        (PaLM, Chowdhery et al., 2022, appendix B, with the causal half counted as half).
        """
        c = self.config
        matrices = sum(p.numel() for layer in self.model.layers for p in layer.parameters() if p.dim() == 2)  # type: ignore
        attention = 6 * c.num_layers * c.num_heads * c.head_dim * (c.context_length + 1)
        return 6.0 * (matrices + self.vocabulary_VD.numel()) + attention

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        c = self.config
        shape = (c.num_layers, batch_size, c.num_kv_heads, capacity, c.head_dim)
        keys = torch.empty(shape, dtype=self.compute_dtype, device=self.device)
        return KeyValueCache(keys, torch.empty_like(keys))

    def hidden(
        self,
        ids_BT: Tensor,
        cache: KeyValueCache | None = None,
        weights: list[Tensor] | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Last layer's normalised output x_BTD for token ids of shape (B, T).

        With a `cache` the ids continue what it holds, and are added to it. A `weights` list gets one float tensor
        `weights_BHTS` a layer. Past plus new positions are at most `context_length`. `segments_BT` numbers the texts
        packed into a row, of which none sees another; it does not go with a cache.
        """
        start, T = (cache.length if cache else 0), ids_BT.shape[1]
        if start + T > self.config.context_length:
            raise ValueError(f"{start + T} positions exceed the context of {self.config.context_length}")
        explicit = self.explicit_attention or weights is not None or (start > 0 and T > 1)
        plain = cache is not None or weights is not None
        functions = TrainingFunctions() if plain else self.usable_functions
        mask: Tensor | None = None
        if functions.visible:
            mask = None if segments_BT is None else functions.visible(segments_BT)
        elif cache is not None and cache.starts_B is not None:
            positions_S = torch.arange(start + T, device=self.device)
            segments_BS = (positions_S >= cache.starts_B[:, None]).int()
            mask = packed_mask(segments_BS[:, start:], segments_BS, self.compute_dtype if explicit else torch.bool)
        elif segments_BT is not None:
            mask = packed_mask(segments_BT, segments_BT, self.compute_dtype if explicit else torch.bool)
        elif explicit:
            mask = causal_mask(T, start + T, self.device, self.compute_dtype)
        rotary_2TK = self.rotary[:, start : start + T]
        rotary_2TK = rotary_2TK if functions.visible else rotary_2TK.to(self.compute_dtype)
        x_BTD = self.model.embed_tokens(ids_BT).to(self.compute_dtype)  # type: ignore[operator]
        for index, block in enumerate(self.model.layers):  # type: ignore[arg-type]
            if plain:
                x_BTD = block(x_BTD, rotary_2TK, mask, cache, index, weights)
                continue
            arguments = (x_BTD, rotary_2TK, mask)
            run = block if self.through_hooks else partial(functions.train_block, block)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(run, *arguments, use_reentrant=False)
            else:
                x_BTD = run(*arguments)
        if cache is not None:
            cache.length += T
        return functions.final_norm(self.model.norm, x_BTD)

    def forward(
        self, ids_BT: Tensor, cache: KeyValueCache | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        """Next-token logits_BTV in float32; `cache` and `weights` as in `hidden`."""
        x_BTD = self.hidden(ids_BT, cache, weights)
        return F.linear(x_BTD, self.vocabulary_VD.to(x_BTD.dtype)).float()

    def loss(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        segments_BT: Tensor | None = None,
        weights_BT: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats a token, of a `Batch`; targets of -100 do not count."""
        x_BTD = self.hidden(ids_BT, segments_BT=segments_BT)
        chunk_loss, add_product = self.usable_functions.chunk_loss, self.usable_functions.add_product
        return linear_cross_entropy(x_BTD, self.vocabulary_VD, targets_BT, chunk_loss, weights_BT, add_product)

    def loss_value(self, ids_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """The value of `loss` without the work for its gradient."""
        x_BTD, vocabulary_VD = self.hidden(ids_BT, segments_BT=segments_BT).detach(), self.vocabulary_VD.detach()
        return linear_cross_entropy(x_BTD, vocabulary_VD, targets_BT, self.usable_functions.chunk_loss)
