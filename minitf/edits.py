"""Edits of attention: forbid a look, exchange two looks, take over what the look of another text brought.

A weight says where a head looked, not whether that mattered. An edit changes one look and leaves everything else, and
the prediction shows what the look was worth:

    edits.block("it", "cat")                 the look's score is -inf before softmax: knockout (Geva et al., 2023)
    edits.move("it", "cat", "mat")           the weights of the two keys are exchanged
    edits.transplant("it", "The dog ...")    what is gathered at "it" comes from that text: patching (Vig et al., 2020)
    edits.ablate([(0, 2)]), ablate(mlp=0)    the output of heads, or of a feed-forward layer, is zero, or its mean

A word is named by its text ("it": the last occurrence), by text and number ("it:1": the first), or by its position in
tokens, from 0. `heads` are pairs (layer, head), from 0; None: all heads. Edits are immutable; `lm.predict` applies them
in the reference path of `attention.py`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minitf.attention import AttentionRecord, Edits
from minitf.errors import RequestError

Head = tuple[int, int]
"""(layer, head), both counted from 0."""

Word = str | int
LETTER = "[A-Za-zÀ-ÿ0-9]"


class Words:
    """The words of a text, and the tokens that spell them."""

    def __init__(self, text: str, spans: Sequence[tuple[int, int]]) -> None:
        """`spans[t]` is the part of `text` that token t covers: (first character, the one after its last)."""
        self.text = text
        self.spans = spans

    def positions(self, word: Word) -> list[int]:
        """The tokens of `word`, in order. Raises RequestError if the text does not have it."""
        if isinstance(word, int):
            return [self._checked(word)]
        name, _, number = word.rpartition(":")
        if not (name and number.isdecimal()):
            name, number = word, ""
        found = self.occurrences(name)
        if not found and name.isdecimal() and not number:
            return [self._checked(int(name))]
        if not found or (number and not 1 <= int(number) <= len(found)):
            times = f"it has {name!r} {len(found)} times" if found else f"it has no {name!r}"
            raise RequestError(f"the word {word!r} is not in the text {self.text!r}: {times}")
        return found[int(number) - 1 if number else -1]

    def occurrences(self, name: str) -> list[list[int]]:
        """The tokens of each occurrence of `name`, a whole word where it begins or ends with a Latin letter or digit.

        Upper and lower case count as the same if the text has no occurrence otherwise.
        """
        if not name:
            return []
        # Chinese is written without spaces: next to its characters every place is the edge of a word.
        before = f"(?<!{LETTER})" if re.match(LETTER, name[0]) else ""
        after = f"(?!{LETTER})" if re.match(LETTER, name[-1]) else ""
        pattern = before + re.escape(name) + after
        found = list(re.finditer(pattern, self.text)) or list(re.finditer(pattern, self.text, re.IGNORECASE))
        return [tokens for match in found if (tokens := self._covering(*match.span()))]

    def _covering(self, first: int, last: int) -> list[int]:
        return [token for token, (start, end) in enumerate(self.spans) if start < last and first < end]

    def _checked(self, position: int) -> int:
        if not 0 <= position < len(self.spans):
            raise RequestError(f"position {position} is not in the text: it has tokens 0 to {len(self.spans) - 1}")
        return position


class Reading(NamedTuple):
    """What a model read, without edits: the words of the text, and each layer's record."""

    words: Words
    record: list[AttentionRecord]


@dataclass(frozen=True)
class Placed:
    """An edit at the positions of a batch: `change(layer, result, heads)` of the chosen heads' result of one step."""

    step: str  # "match", "weigh", "gather" or "mlp"
    heads: frozenset[Head] | None
    change: Callable[[int, Tensor, list[int]], Tensor]

    def apply(self, layer: int, result: Tensor) -> Tensor:
        """The layer's result, of shape (B, H, ...), with the chosen heads changed."""
        every = range(result.shape[1])
        heads = [head for head in every if self.heads is None or (layer, head) in self.heads]
        if not heads:
            return result
        result = result.clone()
        result[:, heads] = self.change(layer, result[:, heads], heads)
        return result


def combined(placed: Sequence[Placed]) -> Edits:
    """All of them as the model takes them; edits of one step apply in their order."""

    def edited(step: str, layer: int, result: Tensor) -> Tensor:
        for edit in placed:
            if edit.step == step:
                result = edit.apply(layer, result)
        return result

    return edited


def forbid(looks_BTS: Tensor, heads: Iterable[Head] | None = None) -> Placed:
    """No head of `heads` may look where `looks_BTS` is true: those scores are -inf."""
    return Placed(
        "match", _frozen(heads), lambda _, scores_BHTS, __: scores_BHTS.masked_fill(looks_BTS[:, None], -torch.inf)
    )


def exchange(query_BT: Tensor, one_BS: Tensor, other_BS: Tensor, heads: Iterable[Head] | None = None) -> Placed:
    """At the queries `query_BT` the keys `one_BS` together get the weight of the keys `other_BS`, and the other way."""

    def change(_: int, weights_BHTS: Tensor, __: list[int]) -> Tensor:
        one_B11S, other_B11S = one_BS[:, None, None].to(weights_BHTS), other_BS[:, None, None].to(weights_BHTS)
        shares = [_shares(weights_BHTS, keys_B11S) for keys_B11S in (one_B11S, other_B11S)]
        totals = [(weights_BHTS * keys_B11S).sum(-1, keepdim=True) for keys_B11S in (one_B11S, other_B11S)]
        rest_BHTS = weights_BHTS * (1 - one_B11S) * (1 - other_B11S)
        return torch.where(
            query_BT[:, None, :, None], rest_BHTS + shares[0] * totals[1] + shares[1] * totals[0], weights_BHTS
        )

    return Placed("weigh", _frozen(heads), change)


def _shares(weights_BHTS: Tensor, keys_B11S: Tensor) -> Tensor:
    """How each query divides its weight among `keys`: its own proportions, or evenly where it has none on them."""
    kept_BHTS = weights_BHTS * keys_B11S
    total_BHT1 = kept_BHTS.sum(-1, keepdim=True)
    even_B11S = keys_B11S / keys_B11S.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(total_BHT1 > 0, kept_BHTS / total_BHT1.clamp(min=1e-30), even_B11S)


def replace_gathered(query_BT: Tensor, mixed_LBHK: Tensor, heads: Iterable[Head] | None = None) -> Placed:
    """At the queries `query_BT` the heads have gathered `mixed_LBHK[layer]` instead."""

    def change(layer: int, mixed_BHTK: Tensor, chosen: list[int]) -> Tensor:
        return torch.where(query_BT[:, None, :, None], mixed_LBHK[layer][:, chosen, None].to(mixed_BHTK), mixed_BHTK)

    return Placed("gather", _frozen(heads), change)


def _frozen(heads: Iterable[Head] | None) -> frozenset[Head] | None:
    return None if heads is None else frozenset((int(layer), int(head)) for layer, head in heads)


@dataclass(frozen=True)
class Edit(ABC):
    """One edit of a text's reading, by words. See the module."""

    heads: tuple[Head, ...] | None

    @abstractmethod
    def place(self, words: Words, read: Callable[[str], Reading]) -> Placed:
        """The edit at the positions of `words`; `read` reads another text. RequestError if a word is missing."""


@dataclass(frozen=True)
class LookEdit(Edit):
    """An edit of what one word, the query, looks at."""

    query: Word

    def _looks(self, words: Words, *keys: Word) -> tuple[list[int], list[list[int]]]:
        """The positions of the query and of each key. RequestError for a key that the query cannot look at."""
        queries, found = words.positions(self.query), [words.positions(key) for key in keys]
        for key, positions in zip(keys, found, strict=True):
            if min(positions) > max(queries):
                raise RequestError(
                    f"{self.query!r} cannot look at {key!r}, which comes later: a decoder reads from left to right"
                )
        return queries, found


@dataclass(frozen=True)
class Block(LookEdit):
    key: Word

    def place(self, words: Words, read: Callable[[str], Reading]) -> Placed:
        queries, (keys,) = self._looks(words, self.key)
        T = len(words.spans)
        looks_TS = mask_of(queries, T)[:, None] & mask_of(keys, T)
        left_TS = torch.ones(T, T, dtype=torch.bool).tril() & ~looks_TS
        if not left_TS.any(-1).all():
            raise RequestError(f"without {self.key!r}, {self.query!r} has nothing left to look at: block a later word")
        return forbid(looks_TS[None], self.heads)


@dataclass(frozen=True)
class Move(LookEdit):
    key: Word
    to: Word

    def place(self, words: Words, read: Callable[[str], Reading]) -> Placed:
        queries, (keys, others) = self._looks(words, self.key, self.to)
        if set(keys) & set(others):
            raise RequestError(f"{self.key!r} and {self.to!r} are the same word: name two")
        if max(keys + others) > min(queries):
            raise RequestError(f"{self.query!r} must come after both {self.key!r} and {self.to!r}")
        T = len(words.spans)
        return exchange(mask_of(queries, T)[None], mask_of(keys, T)[None], mask_of(others, T)[None], self.heads)


@dataclass(frozen=True)
class Transplant(LookEdit):
    text: str
    text_query: Word

    def place(self, words: Words, read: Callable[[str], Reading]) -> Placed:
        other = read(self.text)
        source, target = other.words.positions(self.text_query)[-1], words.positions(self.query)[-1]
        mixed_LBHK = torch.stack([layer.mixed_BHTK[:, :, source] for layer in other.record])
        return replace_gathered(mask_of([target], len(words.spans))[None], mixed_LBHK, self.heads)


@dataclass(frozen=True)
class Ablate(Edit):
    mlp: int | None
    by: str

    def place(self, words: Words, read: Callable[[str], Reading]) -> Placed:
        return without(self.heads, self.mlp, self.by)


def without(heads: Iterable[Head] | None, mlp: int | None = None, by: str = "zero") -> Placed:
    """The output of `heads`, or of the feed-forward layer `mlp`, is zero everywhere, or its mean over all positions."""

    def change(_: int, result: Tensor, __: list[int]) -> Tensor:
        if by == "zero":
            return torch.zeros_like(result)
        axes = (0, result.dim() - 2)  # texts and positions
        return result.mean(axes, keepdim=True).expand_as(result)

    return Placed("mlp", frozenset({(mlp, 0)}), change) if mlp is not None else Placed("gather", _frozen(heads), change)


@contextmanager
def editing(model: nn.Module, edits: Edits | None) -> Iterator[None]:
    """Let `edits` change the feed-forward layers too, in the `with` block: their step is "mlp"."""
    if edits is None:
        yield
        return

    def hook(layer: int) -> Callable[..., Tensor]:
        # One "head": the axes of an edit are those of attention.
        return lambda _, __, output_BTD: edits("mlp", layer, output_BTD[:, None])[:, 0]

    layers: Any = model.get_submodule("model.layers")
    handles = [block.mlp.register_forward_hook(hook(layer)) for layer, block in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mask_of(positions: Sequence[int], length: int) -> Tensor:
    """True at `positions`, bool of shape (length,)."""
    mask_T = torch.zeros(length, dtype=torch.bool)
    mask_T[list(positions)] = True
    return mask_T


def block(query: Word, key: Word, heads: Iterable[Head] | None = None) -> Edit:
    """Forbid `query` to look at `key`: all tokens of both."""
    return Block(_ordered(heads), query, key)


def move(query: Word, key: Word, to: Word, heads: Iterable[Head] | None = None) -> Edit:
    """Exchange the weights that `query` gives to `key` and to `to`."""
    return Move(_ordered(heads), query, key, to)


def transplant(query: Word, text: str, text_query: Word | None = None, heads: Iterable[Head] | None = None) -> Edit:
    """Let the heads gather at the last token of `query` what they gather in `text` at `text_query`, or at `query`."""
    return Transplant(_ordered(heads), query, text, query if text_query is None else text_query)


def ablate(heads: Iterable[Head] | None = None, mlp: int | None = None, by: str = "zero") -> Edit:
    """Replace the output of `heads`, or of the feed-forward layer `mlp`, by zero or by its mean over the text.

    RequestError unless exactly one of them is given, and `by` is "zero" or "mean".
    """
    if (heads is None) == (mlp is None) or by not in ("zero", "mean"):
        raise RequestError(f'ablate takes either heads or mlp=LAYER, and by="zero" or "mean", not by={by!r}')
    return Ablate(_ordered(heads), mlp, by)


def _ordered(heads: Iterable[Head] | None) -> tuple[Head, ...] | None:
    return None if heads is None else tuple(sorted(_frozen(heads) or ()))


class Relation(NamedTuple):
    """A text, and a look in it: "TEXT | query>key"."""

    text: str
    query: str
    key: str

    @property
    def name(self) -> str:
        return f"{self.query}>{self.key}"

    @classmethod
    def parse(cls, written: str) -> "Relation":
        """The relation in "TEXT | it>cat", split at the last " | ". Raises RequestError."""
        text, bar, look = written.rpartition(" | ")
        query, arrow, key = (part.strip() for part in look.partition(">"))
        if not (bar and text.strip() and query and arrow and key):
            raise RequestError(
                f'{written!r} is no relation: write "TEXT | it>cat", the text and then who looks at whom'
            )
        return cls(text, query, key)
