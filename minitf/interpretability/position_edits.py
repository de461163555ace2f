"""Edits as the viewer sends them: JSON values that name tokens by their positions, from 0.

    {"kind": "block", "query": 9, "keys": [1], "heads": null}               forbid the looks
    {"kind": "move", "query": 9, "keys": [1], "to": [5], "heads": [[0, 2]]} exchange the weights
    {"kind": "ablate", "heads": [[0, 2]], "by": "zero"}                     or "mean": of the text
    {"kind": "ablate", "mlp": 0, "by": "zero"}

`heads` are [layer, head], null: all. In Python and in the shell edits name words: `minitf.edits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitf.attention import Edits
from minitf.edits import Head, Placed, combined, exchange, forbid, mask_of, without
from minitf.errors import RequestError
from minitf.model import ModelConfig

MAX_EDITS = 64
MAX_HEADS = 1024
MAX_INDEX = 100_000
FIELDS = {"block": {"kind", "query", "keys", "heads"}, "move": {"kind", "query", "keys", "to", "heads"}}


@dataclass(frozen=True)
class PositionEdit:
    """A checked edit; what its kind does not have is empty. `heads` is None for all, and for a feed-forward layer."""

    kind: str
    heads: tuple[Head, ...] | None
    query: int = 0
    keys: tuple[int, ...] = ()
    to: tuple[int, ...] = ()
    mlp: int | None = None
    by: str = "zero"

    def place(self, num_tokens: int) -> Placed:
        """The edit in a text of `num_tokens`."""
        if self.kind == "ablate":
            return without(self.heads, self.mlp, self.by)
        query_1T = mask_of([self.query], num_tokens)[None]
        keys_1T, to_1T = (mask_of(positions, num_tokens)[None] for positions in (self.keys, self.to))
        if self.kind == "move":
            return exchange(query_1T, keys_1T, to_1T, self.heads)
        return forbid(query_1T[..., None] & keys_1T[:, None], self.heads)


def parse_edits(value: Any) -> tuple[PositionEdit, ...]:
    """The edits in a JSON value. Raises RequestError for anything but the forms above."""
    if not isinstance(value, list) or len(value) > MAX_EDITS:
        raise RequestError(f"edits must be a list of at most {MAX_EDITS}")
    return tuple(map(_edit, value))


def place_edits(edits: Sequence[PositionEdit], num_tokens: int, config: ModelConfig) -> Edits | None:
    """The edits as the model takes them, None without any. RequestError for what the text or the model lacks."""
    for edit in edits:
        if edit.kind != "ablate" and edit.query >= num_tokens:
            message = f"position {edit.query} is not in the text: it has {num_tokens} tokens"
            raise RequestError(message, "no_position", position=edit.query + 1, tokens=num_tokens)
        if edit.mlp is not None and edit.mlp >= config.num_layers:
            message = f"there is no layer {edit.mlp}: the model has {config.num_layers} layers"
            raise RequestError(message, "no_layer", layer=edit.mlp)
        for layer, head in edit.heads or ():
            if layer >= config.num_layers or head >= config.num_heads:
                raise RequestError(
                    f"there is no layer {layer}, head {head}: the model has {config.num_layers} layers of "
                    f"{config.num_heads} heads",
                    "no_head",
                    layer=layer,
                    head=head,
                )
    _check_something_is_left(edits, config)
    return combined([edit.place(num_tokens) for edit in edits]) if edits else None


def _check_something_is_left(edits: Sequence[PositionEdit], config: ModelConfig) -> None:
    """RequestError if a query has no key left in a head: softmax would divide by zero."""
    forbidden: dict[tuple[Head, int], set[int]] = {}
    every = [(layer, head) for layer in range(config.num_layers) for head in range(config.num_heads)]
    for edit in edits:
        for head in (every if edit.heads is None else edit.heads) if edit.kind == "block" else ():
            keys = forbidden.setdefault((head, edit.query), set())
            keys.update(edit.keys)
            if len(keys) == edit.query + 1:
                message = f"the word at position {edit.query} has nothing left to look at: allow one look"
                raise RequestError(message, "nothing_left", position=edit.query + 1)


def _edit(value: Any) -> PositionEdit:
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "ablate":
        return _ablation(value)
    if not isinstance(kind, str) or set(value) != FIELDS.get(kind):
        raise RequestError("an edit must be a block, a move or an ablate, with all its fields and no others")
    query, keys = value["query"], _positions(value, "keys")
    to = _positions(value, "to") if kind == "move" else ()
    if not _is_index(query) or max(keys + to) > query:
        raise RequestError("an edit's query must be a position, and its keys not after it")
    if set(keys) & set(to):
        raise RequestError("a look must be moved to another word")
    heads = None if value["heads"] is None else _heads(value["heads"])
    return PositionEdit(kind, heads, query, keys, to)


def _ablation(value: dict[str, Any]) -> PositionEdit:
    if set(value) not in ({"kind", "heads", "by"}, {"kind", "mlp", "by"}) or value["by"] not in ("zero", "mean"):
        raise RequestError('an ablate takes either heads or mlp, and by: "zero" or "mean"')
    if "heads" in value:
        return PositionEdit("ablate", _heads(value["heads"]), by=value["by"])
    if not _is_index(value["mlp"]):
        raise RequestError("mlp must be the number of a layer")
    return PositionEdit("ablate", None, mlp=value["mlp"], by=value["by"])


def _positions(value: dict[str, Any], name: str) -> tuple[int, ...]:
    positions = value[name]
    if not isinstance(positions, list) or not 0 < len(positions) <= MAX_HEADS or not all(map(_is_index, positions)):
        raise RequestError(f"{name} must be a list of positions")
    return tuple(sorted(set(positions)))


def _heads(value: Any) -> tuple[Head, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_HEADS:
        raise RequestError("heads must be null or a list of [layer, head]")
    for head in value:
        if not isinstance(head, list) or len(head) != 2 or not all(map(_is_index, head)):
            raise RequestError("heads must be null or a list of [layer, head]")
    return tuple(sorted({(layer, head) for layer, head in value}))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INDEX
