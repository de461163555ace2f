"""Predictions under edits (`minitf/edits.py`), and relations that a run watches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitf.attention import AttentionRecord, Edits
from minitf.edits import Ablate, Edit, Reading, Relation, block, combined, editing
from minitf.errors import RequestError
from minitf.interpretability.heads import evaluating
from minitf.interpretability.reference_cases import ids_of, words_of

if TYPE_CHECKING:
    from minitf.model import Transformer
    from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reader:
    """A model that reads texts, in float32; with `pairs` a text is "SOURCE => TARGET"."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    pairs: bool = False

    def ids(self, text: str) -> Tensor:
        """The ids of `text`, of shape (1, T). Raises RequestError if it is empty or too long."""
        ids, limit = ids_of(self.tokenizer, text, self.pairs), self.model.config.context_length
        if not text or len(ids) > limit:
            raise RequestError(f"the text has {len(ids)} tokens, the model reads 1 to {limit}: {text[:60]!r}")
        return torch.tensor([ids], device=self.model.device)

    @torch.no_grad()
    def read(self, text: str, edits: Edits | None = None) -> tuple[Tensor, list[AttentionRecord]]:
        """Probabilities_TV of the token after each position, on the CPU, and each layer's record."""
        record: list[AttentionRecord] = []
        with evaluating(self.model), self.model.computing_in(torch.float32), editing(self.model, edits):
            logits_BTV = self.model(self.ids(text), record=record, edits=edits)
        return logits_BTV[0].softmax(-1).cpu(), record

    def reading(self, text: str) -> Reading:
        """What `text` is without edits."""
        return Reading(words_of(self.tokenizer, text, self.pairs), self.read(text)[1])

    def place(self, text: str, edits: Sequence[Edit]) -> Edits | None:
        """`edits` at the positions of `text`. Raises RequestError if a word or a head is missing."""
        config, words = self.model.config, words_of(self.tokenizer, text, self.pairs)
        for layer, head in (head for edit in edits for head in edit.heads or ()):
            if not (0 <= layer < config.num_layers and 0 <= head < config.num_heads):
                raise RequestError(
                    f"there is no layer {layer}, head {head}: the model has {config.num_layers} layers of "
                    f"{config.num_heads} heads"
                )
        for layer in (edit.mlp for edit in edits if isinstance(edit, Ablate) and edit.mlp is not None):
            if not 0 <= layer < config.num_layers:
                raise RequestError(f"there is no layer {layer}: the model has {config.num_layers} layers")
        return combined([edit.place(words, self.reading) for edit in edits]) if edits else None

    def predict(self, text: str, edits: Sequence[Edit] = (), top_k: int = 5) -> list[tuple[str, float]]:
        """The `top_k` likeliest next tokens of `text` under `edits`, with their probabilities."""
        probabilities_TV, _ = self.read(text, self.place(text, edits))
        top = probabilities_TV[-1].topk(min(top_k, probabilities_TV.shape[1]))
        return list(zip(self.tokenizer.pieces(top.indices.tolist()), top.values.tolist(), strict=True))


@dataclass(frozen=True)
class Watched:
    """A relation in a model: the weight of the look in every head, and what it is worth.

    `weight_LH` sums over the tokens of the key, at the last token of the query. `probability` is that of the token that
    follows the query in the text (of the likeliest one, if the text ends there), `blocked` the same with the look
    forbidden in all heads.
    """

    relation: Relation
    weight_LH: Tensor
    next_token: str
    probability: float
    blocked: float

    def row(self) -> dict[str, Any]:
        """A row of metrics.jsonl."""
        return {
            "relation": self.relation.name,
            "text": self.relation.text,
            "weight": [[round(value, 4) for value in row] for row in self.weight_LH.tolist()],
            "next": self.next_token,
            "probability": round(self.probability, 5),
            "blocked": round(self.blocked, 5),
        }

    def scalars(self) -> dict[str, float]:
        """The curves for TensorBoard, without the weights of the heads."""
        start = f"watch/{self.relation.name}"
        return {f"{start}/probability": self.probability, f"{start}/probability_blocked": self.blocked}


def watch(reader: Reader, relation: Relation) -> Watched:
    """Measure a relation; two forward passes. Raises RequestError if the text or a word of it cannot be read."""
    text, query, key = relation
    words = words_of(reader.tokenizer, text, reader.pairs)
    edits = reader.place(text, [block(query, key)])
    at, keys = words.positions(query)[-1], words.positions(key)
    (probabilities_TV, record), (blocked_TV, _) = reader.read(text), reader.read(text, edits)
    weight_LH = torch.stack([layer.weights_BHTS[0, :, at, keys].sum(-1) for layer in record]).cpu()
    ids = reader.ids(text)[0]
    following = int(ids[at + 1]) if at + 1 < len(ids) else int(probabilities_TV[at].argmax())
    (label,) = reader.tokenizer.pieces([following])
    return Watched(relation, weight_LH, label, float(probabilities_TV[at, following]), float(blocked_TV[at, following]))
