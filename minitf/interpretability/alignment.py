"""Which source words a target word was made from: read off the heads that do the aligning, found by measurement.

The token at a position of the completion was chosen at the position before it; what a head looked at there, in the
source, is what the token was made from. A word that stands once in the source and once, the same, in the completion
must have been made from itself: how often the largest weight says so is a head's alignment score (after the measures of
Och & Ney, 2003, with identical words as the reference).
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.data.batches import Batch
from minitf.data.packing import packed
from minitf.data.tokenized_pairs import PairIds
from minitf.interpretability.heads import Head, evaluating
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

MOST_HEADS = 8  # averaged at most
NUM_PAIRS = 96  # on which heads are found and scored, half for each
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Units:
    """What is aligned: the words of one side, or its tokens where a token is a character."""

    names: list[str]
    members_NT: Tensor  # 1 where token t belongs to unit n, else 0; float32

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> "Units":
        """The units of `text`. Tokens of white space belong to none."""
        spans = tokenizer.spans(text)
        if tokenizer.by_character:
            return cls([text[start:end] for start, end in spans], torch.eye(len(spans)))
        words = [match.span() for match in WORD.finditer(text)]
        members_NT = torch.zeros(len(words), len(spans))
        number = 0
        for token, (start, end) in enumerate(spans):
            if text[start:end].isspace():
                continue
            while number + 1 < len(words) and words[number + 1][0] < end:
                number += 1
            if words and words[number][0] < end:
                members_NT[number, token] = 1.0
        return cls([text[start:end] for start, end in words], members_NT)


@dataclass(frozen=True)
class Alignment:
    """`weights_TS[t, s]` is the share of source word s in target word t; rows sum to 1, or are 0."""

    source: list[str]
    target: list[str]
    weights_TS: Tensor

    def to_json(self) -> dict[str, Any]:
        """Words and weights, rounded to 4 decimals."""
        weights = self.weights_TS.double().nan_to_num().round(decimals=4).tolist()
        return {"source": self.source, "target": self.target, "weights": weights}

    def describe(self) -> str:
        """A line: each target word with the source word it was made from most, those of one run of words together."""
        links = [(word, self.source[int(row.argmax())]) for word, row in zip(self.target, self.weights_TS, strict=True)]
        shown: list[tuple[str, str]] = []
        for new, old in links:
            if shown and shown[-1][1] == old:
                shown[-1] = (f"{shown[-1][0]} {new}", old)
            else:
                shown.append((new, old))
        return "   ".join(new if new == old else f"{new} ← {old}" for new, old in shown)


@dataclass(frozen=True)
class AligningHeads:
    """The heads that align, best first, and what the average of them is worth.

    `score` is the share of words with a known origin for which it is right, on pairs the heads were not chosen by;
    `chance` is what guessing would reach; `scores_LH` are those of each head on all pairs. With fewer than ten words of
    known origin there is nothing to go by: `heads` is empty and `score` nan.
    """

    heads: list[Head]
    score: float
    chance: float
    scores_LH: Tensor

    def describe(self) -> str:
        """The heads in words."""
        return ", ".join(f"layer {layer} head {head}" for layer, head in self.heads)


@dataclass(frozen=True)
class _Measured:
    """A pair's alignment by every head, and the words whose origin is known."""

    weights_LHTS: Tensor  # by words
    known: list[tuple[int, int]]  # (target word, source word)


@torch.no_grad()
def find_aligning_heads(
    model: Transformer, tokenizer: Tokenizer, pairs: PairIds, indices: Sequence[int]
) -> AligningHeads:
    """Measure every head on the pairs of these indices (which fit into the context) and choose those that align.

    On every other pair heads are ranked, and as many of the best are averaged as gives the best score there; the
    others say how good that is.
    """
    measured = list(_measure(model, tokenizer, pairs, indices))
    choosing, judging = measured[::2], measured[1::2]
    num_layers, num_heads = model.config.num_layers, model.config.num_heads
    scores_LH = _score(measured, None)
    heads: list[Head] = []
    if sum(len(one.known) for one in choosing) >= 10 and any(one.known for one in judging):
        order = _score(choosing, None).flatten().argsort(descending=True, stable=True)[:MOST_HEADS].tolist()
        ranked = [divmod(place, num_heads) for place in order]
        values = [float(_score(choosing, ranked[: count + 1])) for count in range(len(ranked))]
        heads = ranked[: values.index(max(values)) + 1]
    score = float(_score(judging, heads)) if heads else float("nan")
    lengths = [one.weights_LHTS.shape[-1] for one in judging for _ in one.known]
    chance = sum(1 / length for length in lengths) / max(len(lengths), 1)
    return AligningHeads(heads, score, chance, scores_LH.view(num_layers, num_heads))


def align_from(
    weights_LHTT: Tensor, tokenizer: Tokenizer, source: str, target: str, heads: Sequence[Head]
) -> Alignment:
    """The alignment of a pair, averaged over `heads` (at least one), from the weights of a forward over all its ids."""
    old, new = Units.of(tokenizer, source), Units.of(tokenizer, target)
    by_words = _by_words(weights_LHTT, 0, old, new)
    mean_TS = torch.stack([by_words[layer, head] for layer, head in heads]).mean(0)
    return Alignment(old.names, new.names, mean_TS / mean_TS.sum(-1, keepdim=True).clamp(min=1e-9))


def _by_words(weights_LHTT: Tensor, start: int, source: Units, target: Units) -> Tensor:
    """Weights of a pair that begins at position `start`: summed over a source word, averaged over a target word."""
    num_source, num_target = source.members_NT.shape[1], target.members_NT.shape[1]
    first = start + 1  # behind <|source|>
    chosen = first + num_source  # at <|target|> the first token of the completion is chosen
    tokens = weights_LHTT[..., chosen : chosen + num_target, first : first + num_source]
    averaging = target.members_NT / target.members_NT.sum(-1, keepdim=True).clamp(min=1)
    return averaging @ tokens @ source.members_NT.T


def _measure(model: Transformer, tokenizer: Tokenizer, pairs: PairIds, indices: Sequence[int]) -> Iterator[_Measured]:
    context = model.config.context_length
    lengths = torch.diff(torch.from_numpy(pairs.starts)).sub(1).clamp(max=context).to(torch.int32).numpy()
    rows: list[list[int]] = []
    for index in sorted(indices, key=lambda index: int(lengths[index])):  # of like length: little is left empty
        if not rows or sum(int(lengths[member]) for member in rows[-1]) + int(lengths[index]) > context:
            rows.append([])
        rows[-1].append(index)
    found = {}
    for first in range(0, len(rows), 4):
        batch = packed(pairs, lengths, rows[first : first + 4], context, 0.0)
        weights = _weights(model, batch)
        for row, members in enumerate(rows[first : first + 4]):
            start = 0
            for index in members:
                prompt_length = int(pairs.prompt_lengths[index])
                old, new = pairs.texts(index, tokenizer)
                source, target = Units.of(tokenizer, old), Units.of(tokenizer, new)
                whole = source.members_NT.shape[1] == prompt_length - 2
                whole &= target.members_NT.shape[1] == int(lengths[index]) - prompt_length
                if whole:  # its text gives these very ids, and none of it was cut off
                    words = _by_words(weights[:, row], start, source, target)
                    found[index] = _Measured(words, _known(source.names, target.names))
                start += int(lengths[index])
    return iter([found[index] for index in indices if index in found])


def _weights(model: Transformer, batch: Batch) -> Tensor:
    """Weights of shape (layers, B, heads, T, T), float32 on the CPU; layers and heads as axes 0 and 2."""
    record: list[AttentionRecord] = []
    segments_BT = None if batch.segments_BT is None else batch.segments_BT.to(model.device)
    with evaluating(model):
        model.hidden(batch.inputs_BT.to(model.device), record=record, segments_BT=segments_BT)
    return torch.stack([layer.weights_BHTS for layer in record]).float().cpu()


def _known(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """(target word, source word) for the words that stand once on each side, whatever their case."""
    old, new = ([word.lower() for word in side] for side in (source, target))
    once = {word for word, count in Counter(old).items() if count == 1 and any(map(str.isalnum, word))}
    once &= {word for word, count in Counter(new).items() if count == 1}
    return [(new.index(word), old.index(word)) for word in sorted(once)]


def _score(measured: Sequence[_Measured], heads: Sequence[Head] | None) -> Tensor:
    """Share of known words whose largest weight is on their origin: of the average of `heads`, or of each head."""
    right: Tensor | float = 0.0
    count = 0
    for one in measured:
        if not one.known:
            continue
        target, source = (torch.tensor(side) for side in zip(*one.known, strict=True))
        weights = one.weights_LHTS
        if heads is not None:
            weights = torch.stack([weights[layer, head] for layer, head in heads]).mean(0)
        right = right + (weights[..., target, :].argmax(-1) == source).sum(-1)
        count += len(one.known)
    shape = measured[0].weights_LHTS.shape[:2] if measured and heads is None else ()
    return torch.as_tensor(right, dtype=torch.float32).expand(shape) / max(count, 1)
