"""Which columns of a table hold pairs: two under usual names, an instruction with an input, a translation, a chat."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minitf.data.config import DataConfig
from minitf.data.sources.tables import BadRowError, Row, listed, text_of
from minitf.errors import RequestError

# Names of the two columns, the first that a table has are taken.
COLUMN_NAMES = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("source", "target"), ("src", "tgt"),
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("instruction", "output"),
    ("instruction", "response"), ("instruction", "completion"), ("input", "output"), ("input", "target"),
    ("document", "summary"), ("article", "highlights"), ("text", "summary"), ("dialogue", "summary"),
)  # fmt: skip
INSTRUCTION_INPUTS = ("input", "context")  # what an instruction refers to, put below it
CHATS = ("messages", "conversations", "conversation")
ASSISTANTS = ("assistant", "gpt", "model", "bot")


@dataclass(frozen=True)
class Columns:
    """`read` returns the prompt and the completion of a row, or raises BadRowError; `description` is for people."""

    description: str
    read: Callable[[Row], tuple[str, str]]


def choose_columns(config: DataConfig, names: list[str], row: Row, where: str) -> Columns:
    """The columns of the config, else the first usual ones among `names`. RequestError where there are none."""
    prompt, completion = config.prompt_column, config.completion_column
    for option, name in (("prompt_column", prompt), ("completion_column", completion)):
        if name is not None and name not in names:
            raise RequestError(f"{where} has no column {name!r} (data.{option}); it has: {listed(names)}")
    if prompt and completion:
        return _two_columns(prompt, completion)
    for first, second in COLUMN_NAMES:
        first, second = prompt or first, completion or second
        if first != second and first in names and second in names:
            inputs = INSTRUCTION_INPUTS if first == "instruction" else ()
            return _two_columns(first, second, next((n for n in inputs if n in names and n != second), None))
    if "translation" in names and isinstance(row["translation"], Mapping) and len(row["translation"]) >= 2:
        return _translation(*list(row["translation"])[:2])
    for name in CHATS:
        if name in names:
            return _chat(name)
    raise RequestError(
        f"{where}: none of its columns is known to hold pairs ({listed(names)}); "
        "set data.prompt_column and data.completion_column"
    )


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    text = text_of({name: value}, name)
    if text is None:
        raise BadRowError(f"{name} is missing")
    if not text.strip():
        raise BadRowError(f"{name} is empty")
    return text.strip()


def _two_columns(prompt: str, completion: str, extra: str | None = None) -> Columns:
    def read(row: Row) -> tuple[str, str]:
        text = _text(row, prompt)
        if extra is not None and str(row.get(extra) or "").strip():
            text += "\n" + _text(row, extra)
        return text, _text(row, completion)

    return Columns(f"{prompt}{f' and {extra}' if extra else ''} -> {completion}", read)


def _translation(first: str, second: str) -> Columns:
    def read(row: Row) -> tuple[str, str]:
        both = row.get("translation")
        if not isinstance(both, Mapping):
            raise BadRowError("translation is missing")
        return _text(both, first), _text(both, second)

    return Columns(f"translation, {first} -> {second}", read)


def _chat(name: str) -> Columns:
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

    return Columns(f"{name}, earlier turns -> last answer", read)
