"""Attention maps: the weights of every head on one text, with the queries, keys and values behind them.

The attention block matches, weighs and gathers. A map holds the result of *weigh*: for each query (the word that is
read), how much it takes from each key (the words it looks at), a row of weights that sums to 1. The queries, keys and
values make all three steps visible.
"""

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitf.attention import AttentionRecord, Edits
from minitf.backends import reference_class
from minitf.edits import editing
from minitf.errors import MinitfError, RequestError
from minitf.inference.seq2seq import answer
from minitf.interpretability.alignment import Alignment, align_from
from minitf.interpretability.heads import Head, HeadScores, evaluating, head_pattern, pattern_scores
from minitf.interpretability.token_labels import join_bytes
from minitf.variants import formula, silenced
from minitf.viewer import viewer_page

if TYPE_CHECKING:
    from minitf.checkpoints.checkpoint import Checkpoint
    from minitf.model import Transformer
    from minitf.tokenizer import Tokenizer

GENERAL_PROBE = "The cat sat on the mat."
ARROW = " => "  # separates source and target where a pair is written as one text
# Keeps a page with three sentences at ten steps small enough to mail. Models with more or wider heads store the vectors
# of short sentences only.
MAX_VECTOR_BYTES = 400_000
MAX_EXACT_VECTOR_BYTES = 16_000_000


@dataclass
class AttentionConfig:
    probes: list[str] | None = None  # sentences whose attention is logged; null: a general one and one of the data
    watch: list[str] | None = None  # relations to watch: "TEXT | it>cat"; null: those of the data
    scalars: bool = False  # log the scores of the heads as scalars too: one chart in TensorBoard for each head
    patterns: str | None = None  # FILE.py with head scores of your own: functions of a text's tokens, or matrices
    ablation: bool = False  # at each look, measure what every head is worth: the loss with it at zero; more seconds
    heads: bool = True  # score every head for known patterns (previous token, first token, induction, ...)


@dataclass(frozen=True)
class HeadVectors:
    """Queries, keys and values of all layers on one text, as match and gather receive them: float32 on the CPU.

    Axes: L layers, H heads, G key/value heads, T positions, K head_dim. Query head h uses key head h // (H / G).
    """

    q_LHTK: Tensor
    k_LGTK: Tensor
    v_LGTK: Tensor
    mixed_LHTK: Tensor

    @staticmethod
    def of(record: Sequence[AttentionRecord]) -> "HeadVectors":
        """The vectors of a forward pass over one text (B = 1)."""
        parts = ((*layer[:3], layer.mixed_BHTK) for layer in record)
        return HeadVectors(*(torch.cat(tensors).float().cpu() for tensors in zip(*parts, strict=True)))

    def standard(self, weights_LHTS: Tensor) -> bool:
        """Whether weights and gathered values follow the standard formula, which *Three steps* computes."""
        _, H, T, K = self.q_LHTK.shape
        G = self.k_LGTK.shape[1]
        scores_LHTS = self.q_LHTK @ self.k_LGTK.repeat_interleave(H // G, 1).mT / math.sqrt(K)
        future_TS = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores_LHTS.masked_fill(future_TS, -math.inf).softmax(-1)
        return torch.allclose(weights, weights_LHTS, rtol=0, atol=1e-3) and self.only_gathers(weights_LHTS)

    def only_gathers(self, weights_LHTS: Tensor) -> bool:
        """Whether what reaches the output projection is the values, summed with the weights."""
        H, G = self.q_LHTK.shape[1], self.k_LGTK.shape[1]
        mixed_LHTK = weights_LHTS @ self.v_LGTK.repeat_interleave(H // G, 1)
        tolerance = 1e-3 * (mixed_LHTK.abs().max() + self.mixed_LHTK.abs())
        return bool(((mixed_LHTK - self.mixed_LHTK).abs() <= tolerance).all())  # never true of a diverged model

    def to_viewer(self, exact: bool) -> dict[str, Any] | None:
        """Base64 of float32 if `exact`, else of int8 with one float32 scale per vector; None if too large."""
        tensors = {"q": self.q_LHTK, "k": self.k_LGTK, "v": self.v_LGTK}
        num_values = sum(tensor.numel() for tensor in tensors.values())
        if exact:
            if 4 * num_values > MAX_EXACT_VECTOR_BYTES:
                return None
            return {"encoding": "float32"} | {name: {"values": _base64(tensor)} for name, tensor in tensors.items()}
        if num_values > MAX_VECTOR_BYTES:
            return None
        quantised: dict[str, Any] = {"encoding": "int8"}
        for name, tensor in tensors.items():
            finite = tensor.nan_to_num()
            scale = finite.abs().amax(-1).clamp(min=1e-30) / 127
            values = (finite / scale[..., None]).round().to(torch.int8)
            quantised[name] = {"values": _base64(values), "scale": _base64(scale)}
        return quantised


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of every head on one text, and the model's next-token predictions.

    `weights_LHTS[l, h, t, s]` is the weight that query position t gives to key position s in head h of layer l: float32
    on the CPU; zero for s > t; rows sum to 1, unless `rows_sum_to_one` is false. `next_tokens[t]` are the most probable
    tokens after position t with their probabilities, in descending order; `actual[t]` is the probability of the token
    that follows position t. `scores` come from `head_scores`, if they were measured.
    """

    text: str
    tokens: list[str]
    ids: list[int]
    weights_LHTS: Tensor
    next_tokens: list[list[tuple[str, float]]]
    step: int | None = None
    scores: HeadScores | None = None
    actual: list[float] | None = None
    vectors: HeadVectors | None = None
    output_norms_LHT: Tensor | None = None  # of what a weight of 1 on position t would add to the residual stream
    alignment: Alignment | None = None  # of source and target words, if the text is a pair
    formula: str = ""  # what a variant of attention computes instead: "weigh: weights = ..."

    @property
    def rows_sum_to_one(self) -> bool:
        """Whether each query gives away a weight of 1, as softmax makes it; not so in some variants."""
        return bool(((self.weights_LHTS.sum(-1) - 1).abs() < 1e-3).all())

    @property
    def measured_scores(self) -> HeadScores:
        """`scores`, or else the pattern scores of the weights on this text."""
        return pattern_scores(self.weights_LHTS[:, :, None]) if self.scores is None else self.scores

    def to_json(self) -> dict[str, Any]:
        """JSON values; weights are rounded to 6 decimals and indexed [layer][head][query][key]."""
        if not self.weights_LHTS.isfinite().all():
            message = "the attention weights are not finite: the model diverged, use an earlier step"
            raise MinitfError(message, "diverged")
        return {
            "text": self.text,
            "step": self.step,
            "tokens": self.tokens,
            "ids": self.ids,
            "weights_shape": dict(zip(("layers", "heads", "queries", "keys"), self.weights_LHTS.shape, strict=True)),
            "weights": self.weights_LHTS.double().round(decimals=6).tolist(),
            "next_tokens": [[{"token": token, "probability": p} for token, p in top] for top in self.next_tokens],
            "scores": {name: values.tolist() for name, values in (self.scores or {}).items()},
            **({"alignment": self.alignment.to_json()} if self.alignment else {}),
            **({"formula": self.formula, "rows_sum_to_one": self.rows_sum_to_one} if self.formula else {}),
        }

    def to_viewer(self, exact: bool = False) -> dict[str, Any]:
        """The viewer's data: JSON values, with arrays as little-endian base64.

        `weights` are the lower triangles, row by row: a byte `round(255 * w)` each, or float32 if `exact`. A byte is 0
        for a negative weight, as some variants have them.
        `value_norms` are float32 of shape (L, G, T). For `vectors` see `HeadVectors.to_viewer`.
        """
        num_layers, num_heads, num_tokens, _ = self.weights_LHTS.shape
        query, key = torch.tril_indices(num_tokens, num_tokens)
        triangles = self.weights_LHTS[:, :, query, key].nan_to_num()
        scores, vectors = self.measured_scores, self.vectors
        digits = 8 if exact else 6
        return {
            "text": self.text,
            "step": self.step,
            "tokens": self.tokens,
            "layers": num_layers,
            "heads": num_heads,
            "encoding": "float32" if exact else "uint8",
            "weights": _base64(triangles if exact else triangles.clamp(0, 1).mul(255).round().to(torch.uint8)),
            "next_tokens": [[[token, round(p, digits)] for token, p in top] for top in self.next_tokens],
            "actual": None if self.actual is None else [round(p, digits) for p in self.actual],
            "labels": _labels(scores),
            # What the heads do in this text; induction and same word cannot be measured on it.
            "here": None if self.scores is None else _labels(pattern_scores(self.weights_LHTS[:, :, None])),
            "scores": {
                name: values.double().nan_to_num().round(decimals=3).tolist()
                for name, values in (self.scores or {}).items()
            },
            "kv_heads": num_heads if vectors is None else vectors.k_LGTK.shape[1],
            "head_dim": None if vectors is None else vectors.q_LHTK.shape[-1],
            "value_norms": None if vectors is None else _base64(vectors.v_LGTK.nan_to_num().norm(dim=-1)),
            "output_norms": None if self.output_norms_LHT is None else _base64(self.output_norms_LHT.nan_to_num()),
            "vectors": None if vectors is None else vectors.to_viewer(exact),
            "standard_formula": vectors is None or vectors.standard(self.weights_LHTS),
            "formula": self.formula or None,
            "rows_sum_to_one": self.rows_sum_to_one,
            "alignment": self.alignment.to_json() if self.alignment else None,
        }

    def _repr_html_(self) -> str:
        """The viewer in a sandboxed frame, for notebooks."""
        page = html.escape(viewer_page([self.to_viewer()], title=self.text))
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{page}" title="attention" '
            'style="width: 100%; height: 960px; border: 0"></iframe>'
        )


@torch.no_grad()
def attention_maps(
    model: "Transformer",
    tokenizer: "Tokenizer",
    text: str,
    step: int | None = None,
    top_k: int = 5,
    scores: HeadScores | None = None,
) -> AttentionMaps:
    """The maps of `text`, by one forward pass; RequestError if it is empty or longer than the model's context."""
    ids = tokenizer.encode(text)
    limit = model.config.context_length
    if not ids:
        raise RequestError("the text is empty: give at least one word")
    ids = [*tokenizer.start_ids, *ids]
    if len(ids) > limit:
        raise RequestError(f"the text is {len(ids)} tokens long, the model reads at most {limit}: shorten it")
    return attention_maps_of_ids(model, tokenizer, ids, text, step, top_k, scores)


@torch.no_grad()
def attention_maps_of_ids(
    model: "Transformer",
    tokenizer: "Tokenizer",
    ids: list[int],
    text: str,
    step: int | None = None,
    top_k: int = 5,
    scores: HeadScores | None = None,
    edits: Edits | None = None,
) -> AttentionMaps:
    """The maps of `ids`, the tokens of `text`: at least one, at most the model's context; under `edits`, if any."""
    record: list[AttentionRecord] = []
    # float32 gives the same numbers as a checkpoint, and is faster for a sentence: casting all weights to bfloat16
    # takes longer than its products save (25 ms a sentence against 8).
    with evaluating(model), model.computing_in(torch.float32), editing(model, edits):
        ids_BT = torch.tensor([ids], device=next(model.parameters()).device)
        logits_BTV = model(ids_BT, record=record, edits=edits)
    vectors = HeadVectors.of(record)
    next_tokens, actual = _predictions(logits_BTV[0], tokenizer, ids_BT[0], top_k)
    tokens = join_bytes(tokenizer.pieces(ids))
    weights_LHTS = torch.cat([layer.weights_BHTS for layer in record]).float().cpu()
    norms_LHT = output_norms(model, vectors) if edits or vectors.only_gathers(weights_LHTS) else None
    return AttentionMaps(
        text,
        tokens,
        ids,
        weights_LHTS,
        next_tokens,
        step,
        scores,
        actual,
        vectors,
        norms_LHT,
        formula=formula(reference_class(model.model.layers[0].self_attn)),  # type: ignore[index, union-attr]
    )


@torch.no_grad()
def predictions_of_ids(
    model: "Transformer", tokenizer: "Tokenizer", ids: list[int], top_k: int = 5
) -> tuple[list[list[tuple[str, float]]], list[float]]:
    """`next_tokens` and `actual` of the maps of `ids`, alone."""
    ids_1T = torch.tensor([ids], device=model.device)
    with evaluating(model), model.computing_in(torch.float32):
        return _predictions(model(ids_1T)[0], tokenizer, ids_1T[0], top_k)


def _predictions(
    logits_TV: Tensor, tokenizer: "Tokenizer", ids_T: Tensor, top_k: int
) -> tuple[list[list[tuple[str, float]]], list[float]]:
    probabilities_TV = logits_TV.float().softmax(-1)
    top = probabilities_TV.topk(min(top_k, logits_TV.shape[-1]))
    ids = sorted(set(top.indices.flatten().tolist()))
    pieces = dict(zip(ids, tokenizer.pieces(ids), strict=True))
    next_tokens = [
        [(pieces[id_], probability) for id_, probability in zip(*row, strict=True)]
        for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    actual = probabilities_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1).nan_to_num()
    return next_tokens, actual.tolist()


def output_norms(model: "Transformer", vectors: HeadVectors) -> Tensor:
    """`|| v W_O ||` of every head and position, of shape (L, H, T): what reaches the residual stream of a value.

    A weight times this norm is the length of what the look adds (Kobayashi et al., 2020).
    """
    L, H, _, K = vectors.q_LHTK.shape
    v_LHTK = vectors.v_LGTK.repeat_interleave(H // vectors.v_LGTK.shape[1], 1)
    norms = []
    for layer in range(L):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        weight_DHK = silenced(name, model.get_parameter(name), model.config).float().view(-1, H, K)
        norms.append(torch.einsum("htk,dhk->htd", v_LHTK[layer], weight_DHK.cpu()).norm(dim=-1))
    return torch.stack(norms)


def pair_maps(
    model: "Transformer",
    tokenizer: "Tokenizer",
    source: str,
    target: str,
    heads: Sequence[Head],
    step: int | None = None,
    scores: HeadScores | None = None,
    edits: Edits | None = None,
) -> AttentionMaps:
    """The maps of a pair in the format of training, with the alignment by `heads` unless there are none.

    RequestError if the pair is longer than the model's context.
    """
    ids = [*tokenizer.encode_prompt(source), *tokenizer.encode(target)]
    limit = model.config.context_length
    if len(ids) > limit:
        message = f"the pair is {len(ids)} tokens long, the model reads at most {limit}: shorten it"
        raise RequestError(message, "too_long", tokens=len(ids), added=0, limit=limit)
    maps = attention_maps_of_ids(model, tokenizer, ids, f"{source}{ARROW}{target}", step, scores=scores, edits=edits)
    if not heads or not target:
        return maps
    return replace(maps, alignment=align_from(maps.weights_LHTS, tokenizer, source, target, heads))


def maps_of_checkpoint(checkpoint: "Checkpoint", text: str) -> AttentionMaps:
    """The maps of `text` by a loaded checkpoint.

    A model trained on pairs takes `text` as the source and answers it, or reads "SOURCE => TARGET".
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if not checkpoint.answers:
        return attention_maps(model, tokenizer, text, checkpoint.step)
    source, target = pair_of(checkpoint, text)
    return pair_maps(model, tokenizer, source, target, checkpoint.aligning_heads, checkpoint.step)


def pair_of(checkpoint: "Checkpoint", text: str) -> tuple[str, str]:
    """The source and the target in `text`; if it is a source alone, the model's answer to it."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    source, _, target = text.partition(ARROW)
    if not target:
        target = answer(model, tokenizer, [source])[0]
        room = model.config.context_length - len(tokenizer.encode_prompt(source))
        while len(tokenizer.encode(target)) > max(room, 0):  # no end token, or a partial character became a whole one
            target = target[:-1]
    return source, target


def _base64(tensor: Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def _labels(scores: HeadScores) -> list[list[list[str | float] | None]]:
    """[layer][head] -> [pattern, score], or None where no pattern is clear."""
    num_layers, num_heads = next(iter(scores.values())).shape
    return [[_rounded(head_pattern(scores, i, j)) for j in range(num_heads)] for i in range(num_layers)]


def _rounded(pattern: tuple[str, float] | None) -> list[str | float] | None:
    return [pattern[0], round(pattern[1], 3)] if pattern else None
