"""Experiments on one text, for the command `attention`: edits of its attention, and where its prediction is made."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.edits import Edit, Head, ablate, block, move
from minitf.errors import RequestError
from minitf.interpretability.interventions import Reader
from minitf.interpretability.patching import patch
from minitf.interpretability.residual import contributions, lens

NUM_SHOWN = 5  # predictions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of experiments."""
    edits = parser.add_argument_group(
        "edits", "change what the heads do, and see the next token before and after; all may be repeated"
    )
    edits.add_argument(
        "--block", action="append", default=[], metavar="it>cat", help="forbid a word to look at another"
    )
    edits.add_argument(
        "--move", action="append", default=[], metavar="it>cat>mat", help="exchange the weights it gives to two words"
    )
    edits.add_argument(
        "--ablate", action="append", default=[], metavar="L0H2", help="switch off a head, or a feed-forward layer: MLP0"
    )
    edits.add_argument("--heads", metavar="L0H2,L1H0", help="the heads that --block and --move change (default: all)")
    edits.add_argument("--mean", action="store_true", help="--ablate by the mean over the text instead of zero")
    group = parser.add_argument_group("where the prediction is made", "printed, and with --out stored in the page")
    group.add_argument("--lens", action="store_true", help="the next token, if the model stopped after each half-layer")
    group.add_argument(
        "--contributions",
        nargs="?",
        const="",
        metavar="TOKEN",
        help="what each head and feed-forward layer adds to the logit of TOKEN (default: the likeliest next one)",
    )
    group.add_argument(
        "--patch", metavar="CHANGED", help="the places that carry the difference to the text CHANGED, of as many tokens"
    )
    group.add_argument(
        "--answers",
        nargs=2,
        metavar=("A", "B"),
        help="--patch: the tokens to compare (default: the likeliest of each text)",
    )


@dataclass(frozen=True)
class Finding:
    """The result of one or more experiments: JSON values, and the same as text."""

    content: dict[str, Any]
    text: str

    @property
    def for_viewer(self) -> dict[str, Any]:
        """What the viewer stores with a map: see viewer/source.js."""
        names = {"lens": "lens", "contributions": "contributions", "patching": "patch"}
        return {names[name]: value for name, value in self.content.items() if name in names}


def wanted(arguments: argparse.Namespace) -> bool:
    """Whether the command line asks for an experiment. RequestError if its options do not fit together."""
    edits = bool(arguments.block or arguments.move or arguments.ablate)
    where = arguments.lens or arguments.contributions is not None or arguments.patch is not None
    if edits and where:
        raise RequestError("edits and --lens, --contributions, --patch are experiments of their own: choose one")
    if edits and arguments.out:
        raise RequestError("--out is for the page; what edits change is printed (--json: as JSON)")
    if arguments.heads and not (arguments.block or arguments.move):
        raise RequestError("--heads says where --block and --move apply: add one of them")
    if arguments.answers and arguments.patch is None:
        raise RequestError("--answers names the tokens that --patch compares: add --patch TEXT")
    if arguments.mean and not arguments.ablate:
        raise RequestError("--mean sets what --ablate puts in place of a head: add --ablate L0H2")
    return edits or where


def edits_of(arguments: argparse.Namespace) -> list[Edit]:
    """The edits of the command line. Raises RequestError for one that is written wrongly."""
    heads = None if arguments.heads is None else [_head(name) for name in arguments.heads.split(",")]
    found: list[Edit] = []
    for written in arguments.block:
        query, key = _words("--block", written, 2)
        found.append(block(query, key, heads))
    for written in arguments.move:
        query, key, to = _words("--move", written, 3)
        found.append(move(query, key, to, heads))
    by = "mean" if arguments.mean else "zero"
    for name in arguments.ablate:
        if layer := re.fullmatch(r"MLP(\d+)", name):
            found.append(ablate(mlp=int(layer[1]), by=by))
        else:
            found.append(ablate([_head(name)], by=by))
    return found


def run(arguments: argparse.Namespace, checkpoint: Checkpoint, text: str) -> Finding:
    """The experiments that the command line asks for. Raises RequestError if one cannot be done on this text."""
    reader = Reader(checkpoint.model, checkpoint.tokenizer, checkpoint.answers)
    edits = edits_of(arguments)
    if edits:
        return before_and_after(reader, text, edits)
    content: dict[str, Any] = {}
    tables = []
    if arguments.lens:
        found = lens(reader, text)
        content["lens"] = found.to_json()
        tables.append(found.table())
    if arguments.contributions is not None:
        parts = contributions(reader, text, arguments.contributions or None)
        content["contributions"] = parts.to_json()
        tables.append(parts.table())
    if arguments.patch is not None:
        patching = patch(reader, text, arguments.patch, *(arguments.answers or (None, None)))
        content["patching"] = patching.to_json()
        tables.append(patching.table())
    return Finding(content, "\n\n".join(tables))


def before_and_after(reader: Reader, text: str, edits: Sequence[Edit]) -> Finding:
    """The likeliest next tokens with and without `edits`."""
    before, after = (dict(reader.predict(text, chosen, reader.model.vocab_size)) for chosen in ((), edits))
    shown = list(dict.fromkeys([*list(before)[:NUM_SHOWN], *list(after)[:NUM_SHOWN]]))
    best = next(iter(before))
    width = max(12, *(len(token) + 2 for token in shown))
    lines = [f"{'next token':{width}}{'as it is':>10}{'edited':>10}"]
    lines += [f"{token:{width}}{before[token]:>10.1%}{after[token]:>10.1%}" for token in shown]
    change = "stays the likeliest" if next(iter(after)) == best else f"gives way to {next(iter(after))!r}"
    lines.append(f"{best!r} goes from {before[best]:.1%} to {after[best]:.1%} and {change}.")
    content = {
        "before": [{"token": token, "probability": round(before[token], 6)} for token in list(before)[:NUM_SHOWN]],
        "after": [{"token": token, "probability": round(after[token], 6)} for token in list(after)[:NUM_SHOWN]],
    }
    return Finding({"text": text, **content}, "\n".join(lines))


def _words(option: str, written: str, count: int) -> list[str]:
    words = [word.strip() for word in written.split(">")]
    if len(words) != count or not all(words):
        form = ">".join(["it", "cat", "mat"][:count])
        raise RequestError(f"{option} {written!r} must be {count} words with > between them, such as {form!r}")
    return words


def _head(name: str) -> Head:
    found = re.fullmatch(r"L(\d+)H(\d+)", name.strip())
    if not found:
        raise RequestError(f"{name!r} is no head: write L0H2 for head 2 of layer 0")
    return int(found[1]), int(found[2])
