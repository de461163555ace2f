"""The command `attention`: the attention of a trained model as one HTML page.

python scripts/attention.py "The cat did not cross the road because it was tired." [--run RUN] [--out FILE.html]
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.errors import CommandParser, RequestError, read_text_argument, run_command
from minitf.interpretability import experiments
from minitf.interpretability.attention_maps import AttentionMaps, maps_of_checkpoint
from minitf.interpretability.heads import head_scores
from minitf.interpretability.page_model import page_model
from minitf.system.files import write_whole
from minitf.system.threads import set_threads
from minitf.viewer import viewer_page

DEFAULT_PAGE = "attention.html"


def attention_page(maps: Sequence[AttentionMaps], title: str, scored_on: str = "held_out") -> str:
    """One self-contained HTML page (no network, opens from a file) with `maps`, of any number of texts and steps.

    Maps of the same text are the steps of one sentence, in the order given. A map takes 2/3 of a byte for each entry of
    its square of weights: 2 kB for 24 heads on 10 tokens, 30 kB for 48 heads on 30 tokens. `scored_on` says where the
    scores of the maps were measured, see `viewer_page`.
    """
    if not maps:
        raise ValueError("a page needs at least one map")
    return viewer_page([one.to_viewer() for one in maps], title, scored_on=scored_on)


def main(argv: list[str] | None = None) -> int:
    """The command `attention`: write a page, or print JSON, with the attention of every head on a text."""
    parser = CommandParser(description="Show which words every attention head looks at, as one HTML page.")
    parser.add_argument(
        "text",
        nargs="?",
        help='the text to read, from standard input if absent; for a run on pairs a source to answer, or "SOURCE => '
        'TARGET"',
    )
    parser.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--out", type=Path, metavar="FILE.html", help=f"default: {DEFAULT_PAGE}")
    output.add_argument(
        "--json", action="store_true", help="print the raw weights, or the result of an experiment, as JSON"
    )
    experiments.add_arguments(parser)
    arguments = parser.parse_args(argv)

    text = read_text_argument(arguments.text, "text")
    out = arguments.out or Path(DEFAULT_PAGE)
    experiment = experiments.wanted(arguments)
    if not arguments.json and not out.absolute().parent.is_dir():
        raise RequestError(f"--out {out}: there is no such directory; create it first")
    set_threads()
    checkpoint = load_checkpoint(arguments.run)
    if experiment and not arguments.out:
        finding = experiments.run(arguments, checkpoint, text)
        print(json.dumps(finding.content, allow_nan=False) if arguments.json else finding.text)
        return 0
    maps = maps_of_checkpoint(checkpoint, text)
    if maps.alignment is not None:
        print(maps.alignment.describe(), file=sys.stderr)
    maps = replace(maps, scores=head_scores(checkpoint.model, torch.tensor([maps.ids])))
    if arguments.json:
        json.dump(maps.to_json(), sys.stdout, allow_nan=False)
        print()
        return 0
    stored = {}
    if experiment:
        finding = experiments.run(arguments, checkpoint, maps.text)  # of a pair with its answer, as in the maps
        print(finding.text)
        stored = finding.for_viewer
    page = _page(checkpoint, maps, stored, _title(checkpoint, arguments.run))
    _write(out, page)
    print(f"{checkpoint.directory}: wrote {out} ({len(page.encode()) / 1e6:.1f} MB)", file=sys.stderr)
    return 0


def _page(checkpoint: Checkpoint, maps: AttentionMaps, stored: Mapping[str, Any], title: str) -> str:
    """The page of one text, with the results `stored` for the viewer and, if it is small, with the model."""
    model = page_model(checkpoint.model, checkpoint.tokenizer, checkpoint.step, [maps.text], checkpoint.answers)
    return viewer_page([{**maps.to_viewer(), **stored}], title, scored_on="sentence", model=model)


def _title(checkpoint: Checkpoint, run: str) -> str:
    """The model and its step: a page that is passed on says what it is of."""
    if checkpoint.step is None:  # a model of the hub
        return f"Attention of {run}"
    place = checkpoint.directory
    name = os.path.relpath(place.parent.parent if place.parent.name == "checkpoints" else place)
    return f"Attention of {name}, step {checkpoint.step:,}"


def _write(file: Path, page: str) -> None:
    if file.exists() and not file.is_file():  # a pipe or /dev/stdout, which cannot be replaced
        file.write_text(page, encoding="utf-8")
    else:
        write_whole(file, page)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
