"""What the Attention tab may ask the live route: its fields, checked before anything is loaded.

run, step, text                    the checkpoint, and the sentence it reads
new_tokens, temperature, seed      how it continues the sentence
heads_off, edits                   what is changed in the model: see interpretability/position_edits.py
kind                               "maps", "lens", "contributions" or "patch"
position, token                    contributions and patch: after which token; contributions: to which next token
changed, layer, heads              patch: the other sentence, the layer, and whether each of its heads is patched
count_only                         only how many tokens the text has
page                               a name of the page, whose newer requests end older ones
"""

import re
from dataclasses import dataclass, fields
from typing import Any

from minitf.edits import Head
from minitf.errors import RequestError
from minitf.interpretability.position_edits import PositionEdit, parse_edits
from minitf.tensorboard.gate import RefusedError

MAX_TOKENS = 256  # text and continuation together
MAX_PATCHED_TOKENS = 96  # a pass reads as many texts as tokens
MAX_CHARACTERS = 20_000
MAX_HEADS_OFF = 1024
KINDS = ("maps", "lens", "contributions", "patch")
OF_KIND = {"position": ("contributions", "patch"), "token": ("contributions",), "changed": ("patch",)}
OF_KIND |= {"layer": ("patch",), "heads": ("patch",)}


@dataclass(frozen=True)
class Question:
    """A validated request."""

    run: str
    step: int
    text: str
    new_tokens: int
    temperature: float
    seed: int
    heads_off: tuple[Head, ...]
    edits: tuple[PositionEdit, ...]
    count_only: bool
    kind: str
    position: int | None
    token: str | None
    changed: str
    layer: int
    heads: bool
    page: str

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Question":
        """RefusedError (400) for anything unknown, missing, of the wrong type, or out of range."""
        if set(body) - {field.name for field in fields(cls)}:
            raise RefusedError(400, "the request has unknown fields")
        kind = body.get("kind", "maps")
        if kind not in KINDS:
            raise RefusedError(400, f"kind must be one of {', '.join(KINDS)}")
        for name in body.keys() & OF_KIND.keys():
            if kind not in OF_KIND[name]:
                raise RefusedError(400, f"{name} does not belong to a request for {kind}")
        if kind == "patch" and (body.get("heads_off") or body.get("edits")):
            raise RefusedError(400, "two sentences are compared without edits")
        temperature = body.get("temperature", 0.8)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 100:
            raise RefusedError(400, "temperature must be a number from 0 to 100")
        page = _text(body, "page", "")
        if not re.fullmatch(r"[\w-]{0,64}", page, re.ASCII):
            raise RefusedError(400, "page must be letters and digits")
        return cls(
            run=_text(body, "run"),
            step=_integer(body, "step", None, 10**15),
            text=_text(body, "text"),
            new_tokens=_integer(body, "new_tokens", 0, MAX_TOKENS),
            temperature=float(temperature),
            seed=_integer(body, "seed", 0, 2**31),
            heads_off=_heads(body.get("heads_off", [])),
            edits=_edits(body.get("edits", [])),
            count_only=_flag(body, "count_only"),
            kind=kind,
            position=None if body.get("position") is None else _integer(body, "position", None, MAX_TOKENS),
            token=None if body.get("token") is None else _text(body, "token"),
            changed=_text(body, "changed", None if kind == "patch" else ""),
            layer=_integer(body, "layer", 0, 10_000),
            heads=_flag(body, "heads"),
            page=page,
        )

    @property
    def sentence(self) -> tuple[Any, ...]:
        """What decides which tokens are read."""
        return self.text, self.new_tokens, self.temperature, self.seed, self.heads_off, self.edits


def _edits(value: Any) -> tuple[PositionEdit, ...]:
    try:
        return parse_edits(value)
    except RequestError as error:
        raise RefusedError(400, str(error)) from None


def _heads(value: Any) -> tuple[Head, ...]:
    if not isinstance(value, list) or len(value) > MAX_HEADS_OFF:
        raise RefusedError(400, "heads_off must be a list of [layer, head]")
    for head in value:
        if not isinstance(head, list) or len(head) != 2 or not all(_is_integer(index, 100_000) for index in head):
            raise RefusedError(400, "heads_off must be a list of [layer, head]")
    return tuple(sorted({(layer, head) for layer, head in value}))


def _text(body: dict[str, Any], name: str, default: str | None = None) -> str:
    value: Any = body.get(name, default)
    if not isinstance(value, str):
        raise RefusedError(400, f"{name} must be a string")
    if len(value) > MAX_CHARACTERS:
        message = f"{name} is longer than {MAX_CHARACTERS} characters"
        raise RefusedError(400, message, "too_many_characters", limit=MAX_CHARACTERS)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value: Any = body.get(name, False)
    if not isinstance(value, bool):
        raise RefusedError(400, f"{name} must be true or false")
    return value


def _integer(body: dict[str, Any], name: str, default: int | None, largest: int) -> int:
    value: Any = body.get(name, default)
    if not _is_integer(value, largest):
        raise RefusedError(400, f"{name} must be a whole number from 0 to {largest}")
    return int(value)


def _is_integer(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
