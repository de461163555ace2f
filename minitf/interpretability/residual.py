"""Where a prediction is made: the residual stream after every half-layer, and what each part of the model adds to it.

lens           the next-token prediction if the model stopped there (the logit lens of nostalgebraist, 2020)
contributions  what each head and each feed-forward layer adds to a token's logit (direct logit attribution, Elhage et
               al., 2021)

Both use that a block only ever adds to its input: the last hidden state is a sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minitf.attention import AttentionRecord, Edits
from minitf.edits import editing
from minitf.errors import RequestError
from minitf.interpretability.heads import evaluating
from minitf.interpretability.interventions import Reader
from minitf.variants import silenced

if TYPE_CHECKING:
    from minitf.model import Transformer
    from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Residual:
    """The residual stream of a text: `streams[s]`, of shape (T, D), after the embedding and every half-layer."""

    names: list[str]  # "embedding", "layer 0 attention", "layer 0 MLP", ...
    streams: list[Tensor]
    record: list[AttentionRecord]


@torch.no_grad()
def residual_of(model: "Transformer", ids_1T: Tensor, edits: Edits | None = None) -> Residual:
    """Read one text, in float32, under `edits`."""
    record: list[AttentionRecord] = []
    with evaluating(model), model.computing_in(torch.float32), editing(model, edits), _streams(model) as streams:
        model.hidden(ids_1T, record=record, edits=edits)
    names = ["embedding"]
    for layer in range(model.config.num_layers):
        names += [f"layer {layer} attention", f"layer {layer} MLP"]
    return Residual(names, [stream[0].cpu() for stream in streams], record)


@contextmanager
def _streams(model: "Transformer") -> Iterator[list[Tensor]]:
    """What every norm reads inside the `with` block: the norms stand before each half-layer and after the last."""
    streams: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        streams.append(inputs[0])

    blocks: Any = model.model.layers
    norms = [norm for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
    handles = [norm.register_forward_pre_hook(keep) for norm in (*norms, model.model.norm)]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Lens:
    """Next-token predictions after every half-layer.

    `best[s][t]` is the likeliest token at position t, with its probability. `actual[s][t]` is the
    probability of the token that follows in the text, None at the last position.
    """

    tokens: list[str]
    names: list[str]
    best: list[list[tuple[str, float]]]
    actual: list[list[float | None]]

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.names, self.best, self.actual, strict=True)
        return {
            "tokens": self.tokens,
            "rows": [
                {
                    "after": name,
                    "best": [{"token": token, "probability": round(p, 6)} for token, p in best],
                    "actual": [None if p is None else round(p, 6) for p in actual],
                }
                for name, best, actual in rows
            ],
        }

    def table(self, position: int = -1) -> str:
        """The predictions at one position, one line a half-layer."""
        lines = [f"{'after':<20}likeliest next token"]
        for name, best, actual in zip(self.names, self.best, self.actual, strict=True):
            token, p = best[position]
            true = actual[position]
            lines.append(f"{name:<20}{token:<14}{p:6.1%}" + ("" if true is None else f"   the true one {true:6.1%}"))
        return "\n".join(lines)


def lens(reader: Reader, text: str) -> Lens:
    """The prediction at every position after every half-layer. Raises RequestError for an empty or too long text."""
    return lens_of_ids(reader.model, reader.tokenizer, reader.ids(text))


def lens_of_ids(model: "Transformer", tokenizer: "Tokenizer", ids_1T: Tensor, edits: Edits | None = None) -> Lens:
    """The same of token ids, under `edits`; each half-layer is read as if it were the last."""
    residual, ids = residual_of(model, ids_1T, edits), ids_1T[0].cpu()
    best: list[list[tuple[str, float]]] = []
    actual: list[list[float | None]] = []
    for stream_TD in residual.streams:
        probabilities_TV = logits_of(model, stream_TD).softmax(-1)
        top = probabilities_TV.max(-1)
        best.append(list(zip(tokenizer.pieces(top.indices.tolist()), top.values.tolist(), strict=True)))
        following = probabilities_TV[:-1].gather(1, ids[1:, None]).squeeze(1)
        actual.append([*following.tolist(), None])
    return Lens(tokenizer.pieces(ids.tolist()), residual.names, best, actual)


@torch.no_grad()
def logits_of(model: "Transformer", stream_TD: Tensor) -> Tensor:
    with evaluating(model), model.computing_in(torch.float32):
        return model.logits(model.model.norm(stream_TD.to(model.device))).cpu()  # type: ignore[operator]


@dataclass(frozen=True)
class Contributions:
    """What each part adds to the logit of `token` after a position of a text; `parts` sum to `logit`.

    The scale of the final normalisation is that of the whole sum (it is divided by one number, so the parts stay
    additive).
    """

    token: str
    logit: float
    parts: dict[str, float]  # "embedding", "layer 0 head 0", ..., "layer 0 MLP", ...

    def to_json(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "logit": round(self.logit, 6),
            "parts": {k: round(v, 6) for k, v in self.parts.items()},
        }

    def table(self) -> str:
        """The parts, largest first."""
        ordered = sorted(self.parts.items(), key=lambda part: -abs(part[1]))
        return "\n".join(
            [f"logit of {self.token!r}: {self.logit:.3f}", *(f"{name:<20}{value:+8.3f}" for name, value in ordered)]
        )


def contributions(reader: Reader, text: str, token: str | None = None) -> Contributions:
    """What adds to the logit of `token`, by default the likeliest next one. RequestError if it is not one token."""
    id_ = None if token is None else one_token(reader, token)
    return contributions_of_ids(reader.model, reader.tokenizer, reader.ids(text), id_)


@torch.no_grad()
def contributions_of_ids(
    model: "Transformer",
    tokenizer: "Tokenizer",
    ids_1T: Tensor,
    id_: int | None = None,
    position: int = -1,
    edits: Edits | None = None,
) -> Contributions:
    """The same for the token with this id (None: the likeliest) after `position`, under `edits`."""
    residual = residual_of(model, ids_1T, edits)
    last_D = residual.streams[-1][position]
    if id_ is None:
        id_ = int(logits_of(model, last_D[None])[0].argmax())
    norm = model.model.norm
    scale = (last_D.square().mean() + norm.eps).rsqrt()  # type: ignore[union-attr, operator]
    direction_D = (norm.weight * model.vocabulary_VD[id_]).float().cpu() * scale  # type: ignore[union-attr, operator]
    vectors = {"embedding": residual.streams[0][position]}
    for layer, record in enumerate(residual.record):
        mixed_HK = record.mixed_BHTK[0, :, position].float()
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        weight_DHK = silenced(name, model.get_parameter(name), model.config).float().view(-1, *mixed_HK.shape)
        added_HD = torch.einsum("hk,dhk->hd", mixed_HK, weight_DHK).cpu()
        vectors |= {f"layer {layer} head {head}": added_D for head, added_D in enumerate(added_HD)}
        vectors[f"layer {layer} MLP"] = (
            residual.streams[2 * layer + 2][position] - residual.streams[2 * layer + 1][position]
        )
    parts = {name: float(vector_D @ direction_D) for name, vector_D in vectors.items()}
    (label,) = tokenizer.pieces([id_])
    return Contributions(label, float(last_D @ direction_D), parts)


def one_token(reader: Reader, token: str) -> int:
    """The id of `token`, which may lack its space: "cat" is " cat" if that is a token. RequestError if it is none."""
    for written in (f" {token}", token):
        try:
            ids = reader.tokenizer.encode(written)
        except RequestError:  # a tokenizer of characters may have no space
            continue
        if len(ids) == 1:
            return ids[0]
    raise RequestError(f"{token!r} is not one token of this model: name a word that the attention view shows as one")
