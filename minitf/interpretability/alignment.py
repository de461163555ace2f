"""Word alignment of source and target, from the attention of heads that are found by measurement.

A token of the target is predicted at the position before it, and the source tokens that a head looks at from there are
taken as its origin. A word that occurs exactly once in the source and once in the target must be its own origin. The
share of such words for which a head's largest weight is on the origin is the head's alignment score (after Och & Ney,
2003, with identical words as the reference).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.data.batches import Batch
from minitf.data.packing import packed
from minitf.data.tokenized_pairs import PairIds
from minitf.edits import combined, forbid
from minitf.interpretability.heads import Head, evaluating
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

MAX_HEADS = 8  # averaged
NUM_PAIRS = 96  # half to choose heads, half to score them
NUM_TESTED = 32  # words whose alignment is tested at a look,
WORDS_PER_PAIR = 4  # at most this many of one pair
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Units:
    """The units that are aligned: the words of one side, or its tokens if a token is a character."""

    names: list[str]
    members_NT: Tensor  # 1 where token t belongs to unit n, else 0; float32

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> "Units":
        """The units of `text`; whitespace tokens belong to none."""
        spans = tokenizer.spans(text)
        if tokenizer.by_character:
            return cls([text[start:end] for start, end in spans], torch.eye(len(spans)))
        words = [match.span() for match in WORD.finditer(text)]
        members_NT = torch.zeros(len(words), len(spans))
        index = 0
        for token, (start, end) in enumerate(spans):
            if text[start:end].isspace():
                continue
            while index + 1 < len(words) and words[index + 1][0] < end:
                index += 1
            if words and words[index][0] < end:
                members_NT[index, token] = 1.0
        return cls([text[start:end] for start, end in words], members_NT)


@dataclass(frozen=True)
class Alignment:
    """`weights_TS[t, s]` is the share of source word s in target word t; rows sum to 1 or are 0."""

    source: list[str]
    target: list[str]
    weights_TS: Tensor

    def to_json(self) -> dict[str, Any]:
        """Words and weights, rounded to 4 decimals."""
        weights = self.weights_TS.double().nan_to_num().round(decimals=4).tolist()
        return {"source": self.source, "target": self.target, "weights": weights}

    def describe(self) -> str:
        """One line: each target word with its main source word; runs of one source word are grouped."""
        links = [(word, self.source[int(row.argmax())]) for word, row in zip(self.target, self.weights_TS, strict=True)]
        shown: list[tuple[str, str]] = []
        for target, source in links:
            if shown and shown[-1][1] == source:
                shown[-1] = (f"{shown[-1][0]} {target}", source)
            else:
                shown.append((target, source))
        return "   ".join(target if target == source else f"{target} ← {source}" for target, source in shown)


@dataclass(frozen=True)
class AligningHeads:
    """The heads that align, best first, and the alignment score of their average.

    `score` is in [0, 1] and measured on pairs that were not used to choose the heads; `chance` is the score of
    guessing; `scores_LH` are the scores of single heads on all pairs. With fewer than ten words of known origin `heads`
    is empty and `score` is nan.
    """

    heads: list[Head]
    score: float
    chance: float
    scores_LH: Tensor
    causal: "CausalAlignment | None" = None  # of all heads, on the pairs that `score` is of

    def describe(self) -> str:
        """The heads as text: "layer 1 head 2, ..."."""
        return ", ".join(f"layer {layer} head {head}" for layer, head in self.heads)


@dataclass(frozen=True)
class _Measured:
    """A pair's alignment by every head, and its words of known origin."""

    weights_LHTS: Tensor  # by words
    known: list[tuple[int, int]]  # (target word, source word)


@torch.no_grad()
def find_aligning_heads(
    model: Transformer, tokenizer: Tokenizer, pairs: PairIds, indices: Sequence[int]
) -> AligningHeads:
    """Measure every head on the pairs with these indices, which fit into the context, and choose those that align.

    Heads are ranked on one half of the pairs, and the number to average is chosen there too; the other half gives the
    score.
    """
    measured = _measure(model, tokenizer, pairs, indices)
    choosing, judging = measured[::2], measured[1::2]
    num_layers, num_heads = model.config.num_layers, model.config.num_heads
    heads: list[Head] = []
    if sum(len(one.known) for one in choosing) >= 10 and any(one.known for one in judging):
        order = _score(choosing, None).flatten().argsort(descending=True, stable=True)[:MAX_HEADS].tolist()
        ranked = [divmod(index, num_heads) for index in order]
        values = [float(_score(choosing, ranked[: count + 1])) for count in range(len(ranked))]
        heads = ranked[: values.index(max(values)) + 1]
    score = float(_score(judging, heads)) if heads else float("nan")
    lengths = [one.weights_LHTS.shape[-1] for one in judging for _ in one.known]
    chance = sum(1 / length for length in lengths) / max(len(lengths), 1)
    causal = causal_alignment(model, tokenizer, pairs, indices[1::6]) if heads else None
    return AligningHeads(heads, score, chance, _score(measured, None).view(num_layers, num_heads), causal)


@dataclass(frozen=True)
class CausalAlignment:
    """Whether words depend on their origin: shares of `num_words` target words that the model predicts.

    `changed` is the share that it no longer predicts when no head may look at the aligned source word, `control` when
    none may look at another source word; `error` and `control_error` are their standard errors.
    """

    changed: float
    control: float
    num_words: int

    @property
    def error(self) -> float:
        return standard_error(self.changed, self.num_words)

    @property
    def control_error(self) -> float:
        return standard_error(self.control, self.num_words)

    def row(self) -> dict[str, float]:
        """All numbers by the columns of metrics.jsonl, rounded to 4 decimals."""
        shares = {"changed": self.changed, "changed_error": self.error}
        shares |= {"control": self.control, "control_error": self.control_error}
        return {name: round(value, 4) for name, value in shares.items()} | {"num_words": self.num_words}

    def describe(self) -> str:
        return (
            f"{self.changed:.0%} ± {self.error:.0%} of {self.num_words} words change if they may not look at their "
            f"origin, {self.control:.0%} ± {self.control_error:.0%} if not at another source word"
        )


def standard_error(share: float, count: int) -> float:
    return float((share * (1 - share) / count) ** 0.5)


@torch.no_grad()
def causal_alignment(
    model: Transformer, tokenizer: Tokenizer, pairs: PairIds, indices: Sequence[int], most: int = NUM_TESTED
) -> CausalAlignment | None:
    """Forbid words of known origin to look at it, at most `most` words, a few of each pair; None if there are none.

    A word counts if the model predicts all its tokens, given those before. The control forbids a source word that no
    word of the target is known to come from, or else the next one.
    """
    results: list[tuple[bool, bool]] = []
    for index in indices:
        if len(results) >= most:
            break
        results += _tested(model, tokenizer, pairs, index)[: most - len(results)]
    if not results:
        return None
    changed, control = (sum(side) / len(results) for side in zip(*results, strict=True))
    return CausalAlignment(changed, control, len(results))


def _tested(model: Transformer, tokenizer: Tokenizer, pairs: PairIds, index: int) -> list[tuple[bool, bool]]:
    """(changed, control) of some words of a pair, each by a row of one batch."""
    ids_T = torch.from_numpy(pairs.ids[pairs.starts[index] : pairs.starts[index + 1]].astype("int64"))
    source, target = (Units.of(tokenizer, text) for text in pairs.texts(index, tokenizer))
    first = int(pairs.prompt_lengths[index])  # the first token of the target
    known = [pair for pair in _known(source.names, target.names) if len(source.names) > 1][:WORDS_PER_PAIR]
    T = len(ids_T) - 1
    complete = source.members_NT.shape[1] == first - 2 and target.members_NT.shape[1] == T - first
    if not (known and complete and model.config.context_length >= T):
        return []
    with evaluating(model):
        plain_T = model(ids_T[None, :-1].to(model.device))[0].argmax(-1).cpu() == ids_T[1:]
    # Most of the time is that of the edited texts: only for words that can change.
    known = [(word, origin) for word, origin in known if plain_T[first - 1 : T - 1][target.members_NT[word] > 0].all()]
    if not known:
        return []
    origins = {origin for _, origin in known}
    looks_BTS = torch.zeros(2 * len(known), T, T, dtype=torch.bool)
    words_NT = torch.zeros(len(known), T, dtype=torch.bool)
    for n, (word, origin) in enumerate(known):
        words_NT[n, first - 1 : T - 1] = target.members_NT[word] > 0  # the positions that predict the word
        spelt = [other for other, members_T in enumerate(source.members_NT) if members_T.any()]
        others = [other for other in spelt if other not in origins]
        other = others[n % len(others)] if others else (origin + 1) % len(source.names)
        for row, key in ((2 * n, origin), (2 * n + 1, other)):
            keys_T = torch.zeros(T, dtype=torch.bool)
            keys_T[1 : first - 1] = source.members_NT[key] > 0
            looks_BTS[row] = words_NT[n][:, None] & keys_T
    device = model.device
    with evaluating(model):
        edits = combined([forbid(looks_BTS.to(device))])
        ids_BT = ids_T[None, :-1].expand(len(looks_BTS), -1).to(device)
        right_BT = model(ids_BT, edits=edits).argmax(-1).cpu() == ids_T[1:]
    return [
        (not bool(right_BT[2 * n][word_T].all()), not bool(right_BT[2 * n + 1][word_T].all()))
        for n, word_T in enumerate(words_NT)
    ]


def align_from(
    weights_LHTT: Tensor, tokenizer: Tokenizer, source: str, target: str, heads: Sequence[Head]
) -> Alignment:
    """The alignment of a pair averaged over `heads` (at least one), from the weights of a pass over the pair."""
    source_units, target_units = Units.of(tokenizer, source), Units.of(tokenizer, target)
    words_LHTS = _by_words(weights_LHTT, 0, source_units, target_units)
    mean_TS = torch.stack([words_LHTS[layer, head] for layer, head in heads]).mean(0)
    return Alignment(source_units.names, target_units.names, mean_TS / mean_TS.sum(-1, keepdim=True).clamp(min=1e-9))


def _by_words(weights_LHTT: Tensor, start: int, source: Units, target: Units) -> Tensor:
    """The weights of the pair that begins at position `start`, summed over source and averaged over target words."""
    num_source, num_target = source.members_NT.shape[1], target.members_NT.shape[1]
    first = start + 1  # after <|source|>
    predicting = first + num_source  # <|target|>, which predicts the first token of the target
    tokens_LHTS = weights_LHTT[..., predicting : predicting + num_target, first : first + num_source]
    averaging_NT = target.members_NT / target.members_NT.sum(-1, keepdim=True).clamp(min=1)
    return averaging_NT @ tokens_LHTS @ source.members_NT.T


def _measure(model: Transformer, tokenizer: Tokenizer, pairs: PairIds, indices: Sequence[int]) -> list[_Measured]:
    """Every pair whose text gives exactly its ids and fits into the context, in the order of `indices`."""
    context = model.config.context_length
    lengths = torch.diff(torch.from_numpy(pairs.starts)).sub(1).clamp(max=context).to(torch.int32).numpy()
    rows: list[list[int]] = []
    for index in sorted(indices, key=lambda index: int(lengths[index])):  # similar lengths leave little padding
        if not rows or sum(int(lengths[member]) for member in rows[-1]) + int(lengths[index]) > context:
            rows.append([])
        rows[-1].append(index)
    measured = {}
    for first in range(0, len(rows), 4):
        batch = packed(pairs, lengths, rows[first : first + 4], context, 0.0)
        weights_LBHTT = _weights(model, batch)
        for row, members in enumerate(rows[first : first + 4]):
            start = 0
            for index in members:
                prompt_length = int(pairs.prompt_lengths[index])
                source, target = (Units.of(tokenizer, text) for text in pairs.texts(index, tokenizer))
                complete = source.members_NT.shape[1] == prompt_length - 2
                complete &= target.members_NT.shape[1] == int(lengths[index]) - prompt_length
                if complete:
                    words_LHTS = _by_words(weights_LBHTT[:, row], start, source, target)
                    measured[index] = _Measured(words_LHTS, _known(source.names, target.names))
                start += int(lengths[index])
    return [measured[index] for index in indices if index in measured]


def _weights(model: Transformer, batch: Batch) -> Tensor:
    """The attention weights of a batch, of shape (layers, B, heads, T, T), float32 on the CPU."""
    record: list[AttentionRecord] = []
    segments_BT = None if batch.segments_BT is None else batch.segments_BT.to(model.device)
    with evaluating(model):
        model.hidden(batch.inputs_BT.to(model.device), record=record, segments_BT=segments_BT)
    return torch.stack([layer.weights_BHTS for layer in record]).float().cpu()


def _known(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """(target word, source word) of the words that occur exactly once on each side, ignoring case."""
    old, new = ([word.lower() for word in side] for side in (source, target))
    once = {word for word, count in Counter(old).items() if count == 1 and any(map(str.isalnum, word))}
    once &= {word for word, count in Counter(new).items() if count == 1}
    return [(new.index(word), old.index(word)) for word in sorted(once)]


def _score(measured: Sequence[_Measured], heads: Sequence[Head] | None) -> Tensor:
    """Share of words whose largest weight is on their known origin: for the mean of `heads`, or for each head."""
    correct: Tensor | float = 0.0
    count = 0
    for one in measured:
        if not one.known:
            continue
        target, source = (torch.tensor(side) for side in zip(*one.known, strict=True))
        weights = one.weights_LHTS
        if heads is not None:
            weights = torch.stack([weights[layer, head] for layer, head in heads]).mean(0)
        correct = correct + (weights[..., target, :].argmax(-1) == source).sum(-1)
        count += len(one.known)
    shape = measured[0].weights_LHTS.shape[:2] if measured and heads is None else ()
    return torch.as_tensor(correct, dtype=torch.float32).expand(shape) / max(count, 1)
