"""The attention of a trained model as one HTML page, and the command that makes it.

python scripts/attention.py "The cat did not cross the road because it was tired." [--run RUN] [--out FILE.html]
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.errors import CommandParser, RequestError, run_command
from minitf.interpretability.attention_maps import AttentionMaps, maps_of_checkpoint
from minitf.interpretability.heads import head_scores
from minitf.system.threads import set_threads
from minitf.viewer import viewer_page


def attention_page(maps: Sequence[AttentionMaps], title: str) -> str:
    """One self-contained HTML page (no network, opens from a file) over `maps`: any number of texts and steps.

    Maps of the same text are the steps of one sentence, in the order given. A map takes 2/3 of a byte for each weight
    of its square: 2 kB for 24 heads on 10 tokens, 30 kB for 48 heads on 30.
    """
    if not maps:
        raise ValueError("a page needs at least one map")
    return viewer_page([one.to_viewer() for one in maps], title)


def main(argv: list[str] | None = None) -> int:
    """The command `attention`: look at what every head of a run's model does with a text."""
    parser = CommandParser(description="Look inside: which words every attention head looks at, as one HTML page.")
    parser.add_argument(
        "text",
        nargs="?",
        help="the text to read, from standard input if absent; of a run on pairs a source, which is answered, or "
        '"SOURCE => TARGET"',
    )
    parser.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--out", type=Path, default=Path("attention.html"), metavar="FILE.html", help="default: %(default)s"
    )
    output.add_argument("--json", action="store_true", help="print the raw weights as JSON instead of writing a page")
    arguments = parser.parse_args(argv)

    text = _text(arguments.text)
    if not arguments.json and not arguments.out.absolute().parent.is_dir():
        raise RequestError(f"--out {arguments.out}: there is no such directory; make it first")
    set_threads()
    checkpoint = load_checkpoint(arguments.run)
    maps = maps_of_checkpoint(checkpoint, text)
    if maps.alignment is not None:
        print(maps.alignment.describe(), file=sys.stderr)
    maps = replace(maps, scores=head_scores(checkpoint.model, torch.tensor([maps.ids])))
    if arguments.json:
        json.dump(maps.to_json(), sys.stdout, allow_nan=False)
        print()
    else:
        _write(arguments.out, attention_page([maps], title="What each word looks at"))
        print(f"{checkpoint.directory}: wrote {arguments.out}", file=sys.stderr)
    return 0


def _text(argument: str | None) -> str:
    if argument is not None:
        return argument
    if sys.stdin.isatty():
        raise RequestError('no text to read: give it as an argument (attention.py "The cat sat.") or pipe it in')
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"the text on standard input is not UTF-8 (byte {error.start}): convert it first") from None


def _write(file: Path, page: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    if file.exists() and not file.is_file():  # a pipe or /dev/stdout
        file.write_text(page, encoding="utf-8")
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
