"""Which columns of a row hold a pair: two under usual names, an instruction with an input, a translation, a chat."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitf.data.config import DataConfig
from minitf.data.sources.tables import BadRowError, Row, is_missing, listed, text_of

# Names of the two columns; the first that a row has are taken.
COLUMN_NAMES = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("source", "target"), ("src", "tgt"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("instruction", "completion"), ("input", "output"),
    ("input", "target"), ("document", "summary"), ("article", "highlights"), ("text", "summary"),
    ("dialogue", "summary"),
)  # fmt: skip
# What a question or an instruction refers to, put below it.
ASKING, INPUTS = ("instruction", "question", "query"), ("input", "context")
CHATS = ("messages", "conversations", "conversation")
ASSISTANTS = ("assistant", "gpt", "model", "bot")


@dataclass(frozen=True)
class Layout:
    """`read` returns the prompt and the completion of a row, or raises BadRowError; `description` is for people."""

    description: str
    used: tuple[str, ...]
    read: Callable[[Row], tuple[str, str]]


@dataclass
class PairReader:
    """Reads the pair of each row by its own columns, and records which were used and which were not."""

    config: DataConfig
    _layouts: dict[tuple[str, ...], Layout] = field(default_factory=dict)  # by the columns with a value, and all
    _unused: dict[str, None] = field(default_factory=dict)

    def read(self, row: Row) -> tuple[str, str]:
        """The prompt and the completion. Raises BadRowError for a row that holds no pair."""
        filled = tuple(name for name, value in row.items() if not (is_missing(value) or value == ""))
        if filled not in self._layouts:
            # A row that lacks a column is read like the first, which says what it lacks.
            known = next(iter(self._layouts.values()), None)
            layout = self._choose(row, filled) or self._choose(row, tuple(row)) or known
            if layout is None:
                raise BadRowError(
                    f"none of its columns is known to hold pairs ({listed(row)}); "
                    "set data.prompt_column and data.completion_column"
                )
            self._layouts[filled] = layout
        layout = self._layouts[filled]
        pair = layout.read(row)
        self._unused |= dict.fromkeys(name for name in filled if name not in layout.used)
        return pair

    def __str__(self) -> str:
        """For example "instruction and input -> output; not used: id"."""
        used = ", ".join(dict.fromkeys(layout.description for layout in self._layouts.values()))
        return used + (f"; not used: {listed(self._unused)}" if self._unused else "")

    def _choose(self, row: Row, names: tuple[str, ...]) -> Layout | None:
        """The columns of the config, else the first usual ones among `names`."""
        prompt, completion = self.config.prompt_column, self.config.completion_column
        for option, name in (("prompt_column", prompt), ("completion_column", completion)):
            if name is not None and name not in row:
                raise BadRowError(f"no column {name!r} (data.{option}), only {listed(row)}")
        if prompt and completion:
            return _two_columns(prompt, completion)
        for first, second in COLUMN_NAMES:
            first, second = prompt or first, completion or second
            if first != second and first in names and second in names:
                inputs = [name for name in INPUTS if name in names and name != second and first in ASKING]
                return _two_columns(first, second, *inputs)
        if "translation" in names and isinstance(row["translation"], Mapping) and len(row["translation"]) >= 2:
            return next(filter(_is_translation, self._layouts.values()), None) or _translation(row["translation"])
        return next((_chat(name) for name in CHATS if name in names), None)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, float) and math.isinf(value):
        raise BadRowError(f"{name} is {value}, which is no value")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value)
    text = text_of({name: str(value) if is_number else value}, name)
    if text is None:
        raise BadRowError(f"{name} is missing")
    if not text.strip():
        raise BadRowError(f"{name} is empty")
    return text.strip()


def _two_columns(prompt: str, completion: str, *inputs: str) -> Layout:
    def read(row: Row) -> tuple[str, str]:
        filled = [name for name in inputs if not is_missing(row.get(name)) and str(row[name]).strip()]
        return "\n".join(_text(row, name) for name in (prompt, *filled)), _text(row, completion)

    return Layout(f"{' and '.join((prompt, *inputs))} -> {completion}", (prompt, completion, *inputs), read)


def _translation(languages: Mapping[str, Any]) -> Layout:
    """From the first language to the second, in every row, whatever their order there."""
    first, second, *_ = languages

    def read(row: Row) -> tuple[str, str]:
        both = row.get("translation")
        if not isinstance(both, Mapping):
            raise BadRowError("translation is missing")
        return _text(both, first), _text(both, second)

    return Layout(f"translation, {first} -> {second}", ("translation",), read)


def _is_translation(layout: Layout) -> bool:
    return layout.used == ("translation",)


def _chat(name: str) -> Layout:
    """All turns before the last answer of the assistant -> that answer."""

    def read(row: Row) -> tuple[str, str]:
        turns = row.get(name)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise BadRowError(f"{name} is not a list of turns")
        texts = [_text(turn, "content" if "content" in turn else "value") for turn in turns]
        roles = [str(turn.get("role", turn.get("from"))) for turn in turns]
        answers = [index for index, role in enumerate(roles) if role in ASSISTANTS]
        if not answers or answers[-1] == 0:
            raise BadRowError(f"{name} has no question with an answer by the assistant")
        return "\n".join(texts[: answers[-1]]), texts[answers[-1]]

    return Layout(f"{name}, earlier turns -> last answer", (name,), read)
