"""Sentences in which a pronoun means one of two nouns, as token ids: what `reference.py` measures on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minitf.data.sources.references import Case, Version
from minitf.edits import Words
from minitf.errors import RequestError
from minitf.interpretability.attention_maps import ARROW
from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sentences:
    """N sentences, each up to the place where it is decided who is meant: its last token, the query.

    `ids_NT` is filled up at the end, which no earlier token sees; `answer_N` is the token that is right next.
    """

    ids_NT: Tensor
    query_N: Tensor
    answer_N: Tensor

    @property
    def query_NT(self) -> Tensor:  # noqa: N802
        """True at the query of each sentence."""
        return torch.arange(self.ids_NT.shape[1]) == self.query_N[:, None]


@dataclass(frozen=True)
class TokenizedCases:
    """N cases. `referent_NT` and `other_NT` are true at the tokens of the noun that is meant, and of the other.

    `candidates_NC` are the first tokens of all possible answers. `twin` and `control` are the
    sentences of the same name in `Case`.
    """

    said: Sentences
    twin: Sentences
    control: Sentences
    referent_NT: Tensor
    other_NT: Tensor
    candidates_NC: Tensor
    choosing_N: Tensor
    pairs_N: Tensor  # the number of each case's pair of nouns
    groups: list[str]

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def guess(self) -> float:
        """The share of right answers of a guess among the candidates."""
        return 1 / self.candidates_NC.shape[1]

    def part(self, chosen_N: Tensor) -> "TokenizedCases":
        """The cases where `chosen_N` is true."""

        def taken(value: Tensor | Sentences | list[str]) -> Tensor | Sentences | list[str]:
            if isinstance(value, Sentences):
                return Sentences(value.ids_NT[chosen_N], value.query_N[chosen_N], value.answer_N[chosen_N])
            if isinstance(value, Tensor):
                return value[chosen_N]
            return [name for name, keep in zip(value, chosen_N.tolist(), strict=True) if keep]

        return TokenizedCases(**{field.name: taken(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


def tokenized(cases: Sequence[Case], tokenizer: Tokenizer, context_length: int) -> TokenizedCases:
    """The cases as ids. RequestError if they do not fit the tokenizer or the context."""
    if cases[0].said.source and tokenizer.target_id is None:
        raise RequestError("these sentences are pairs: only a model trained on pairs can read them")
    first = {word: _read(tokenizer, case.said._replace(answer=word))[1] for case in cases for word in case.candidates}
    said = _sentences(tokenizer, [case.said for case in cases])
    if said.ids_NT.shape[1] > context_length:
        raise RequestError(f"a sentence has {said.ids_NT.shape[1]} tokens, the model reads at most {context_length}")
    places = [places_of(case, tokenizer, said.ids_NT.shape[1]) for case in cases]
    return TokenizedCases(
        said=said,
        twin=_sentences(tokenizer, [case.twin for case in cases]),
        control=_sentences(tokenizer, [case.control for case in cases]),
        referent_NT=torch.stack([referent for referent, _ in places]),
        other_NT=torch.stack([other for _, other in places]),
        candidates_NC=torch.tensor([[first[word] for word in case.candidates] for case in cases]),
        choosing_N=torch.tensor([case.choosing for case in cases]),
        pairs_N=_numbered([frozenset((case.referent, case.other)) for case in cases]),
        groups=[case.group for case in cases],
    )


def _numbered(keys: Sequence[object]) -> Tensor:
    """A number for each key, the same for equal keys."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])


def places_of(case: Case, tokenizer: Tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Where the noun that is meant stands, and the other: bool, of shape (length,), every occurrence."""
    words = words_of(tokenizer, case.text, pair=bool(case.said.source))
    masks = []
    for noun in (case.referent, case.other):
        mask_T = torch.zeros(length, dtype=torch.bool)
        mask_T[[position for tokens in words.occurrences(noun) for position in tokens]] = True
        masks.append(mask_T)
    return masks[0], masks[1]


def words_of(tokenizer: Tokenizer, text: str, pair: bool = False) -> Words:
    """The words of `text` and their tokens as a model reads them; of a pair: "SOURCE => TARGET"."""
    if not pair:
        return Words(text, [(0, 0)] * len(tokenizer.start_ids) + tokenizer.spans(text))
    source, _, target = text.partition(ARROW)
    shift = len(source) + len(ARROW)
    moved = [(start + shift, end + shift) for start, end in tokenizer.spans(target)]
    return Words(text, [(0, 0), *tokenizer.spans(source), (0, 0), *moved])


def ids_of(tokenizer: Tokenizer, text: str, pair: bool = False) -> list[int]:
    """The ids of `text` as a model reads it; of a pair: "SOURCE => TARGET", where the target may be absent."""
    if not pair:
        return [*tokenizer.start_ids, *tokenizer.encode(text)]
    source, _, target = text.partition(ARROW)
    return [*tokenizer.encode_prompt(source), *tokenizer.encode(target)]


def _sentences(tokenizer: Tokenizer, versions: Sequence[Version]) -> Sentences:
    read = [_read(tokenizer, version) for version in versions]
    longest = max(len(ids) for ids, _ in read)
    padded = [ids + [0] * (longest - len(ids)) for ids, _ in read]
    query = [len(ids) - 1 for ids, _ in read]
    return Sentences(torch.tensor(padded), torch.tensor(query), torch.tensor([answer for _, answer in read]))


def _read(tokenizer: Tokenizer, version: Version) -> tuple[list[int], int]:
    """The ids up to the answer, and the first token of the answer."""
    before = tokenizer.encode(version.prefix)
    whole = tokenizer.encode(version.prefix + version.answer)
    if whole[: len(before)] != before or len(whole) == len(before):
        raise RequestError(f"this tokenizer joins {version.answer!r} with what stands before it: use another tokenizer")
    start = tokenizer.encode_prompt(version.source) if version.source else tokenizer.start_ids
    return [*start, *before], whole[len(before)]
