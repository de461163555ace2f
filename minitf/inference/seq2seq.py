"""Turn texts into others with a model trained on pairs: sources -> answers, in batches, each stopping by itself.

Sources of like length share a batch; aligned at their ends in the cache, they cost as much as one length would. An
answer does not depend on which others were asked for beside it, unless it is drawn at a temperature.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.sources.files import read_text
from minitf.errors import RequestError
from minitf.inference.beam_search import beam_search
from minitf.inference.decoder import Decoder
from minitf.inference.sampling import Sampling, sample
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

BATCH_SIZE = 64  # answers decoded at once


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are found; by default the likeliest token each time."""

    max_tokens: int = 0  # of an answer; 0: what the context leaves
    beam: int = 1  # answers kept in sight at once; 1: no search
    length_penalty: float = 1.0  # beams are compared by log probability / length ** penalty: above 0 favours long ones
    seed: int | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    engine: str = "auto"  # who decodes, see `Decoder`

    def __post_init__(self) -> None:
        for name in ("max_tokens", "beam", "seed"):
            if type(getattr(self, name)) not in (int, type(None)):
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a whole number")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise RequestError(f"--seed {self.seed} must fit into 64 bits")
        if self.max_tokens < 0:
            raise RequestError(f"--max-tokens {self.max_tokens} must be at least 1")
        if not 1 <= self.beam <= 64:
            raise RequestError(f"--beam {self.beam} must be between 1 and 64")
        if self.beam > 1 and self.sampling.temperature > 0:
            raise RequestError("--beam looks for the likeliest answer: it does not go with --temperature above 0")


def answer(
    model: Transformer, tokenizer: Tokenizer, sources: Sequence[str], options: AnswerOptions | None = None
) -> list[str]:
    """The answer to each source. Raises RequestError when one leaves no room for an answer in the context."""
    options = options or AnswerOptions()
    prompts = [tokenizer.encode_prompt(source) for source in sources]
    for prompt in prompts:
        if not room_for_answer(model, prompt):
            raise RequestError(
                f"the source is {len(prompt)} tokens long, of a context of {model.config.context_length}: shorten it"
            )
    answers = [""] * len(sources)
    for index, ids in answer_ids(model, tokenizer.end_id, prompts, options):
        answers[index] = tokenizer.decode(ids)
    return answers


def room_for_answer(model: Transformer, prompt: Sequence[int]) -> int:
    """Tokens of an answer, its end included, that the context leaves after `prompt`; 0: none."""
    return max(0, model.config.context_length + 1 - len(prompt))


@torch.no_grad()
def answer_ids(
    model: Transformer, end_id: int, prompts: Sequence[Sequence[int]], options: AnswerOptions
) -> Iterator[tuple[int, list[int]]]:
    """(index of the prompt, ids of its answer without the end), batch by batch, short prompts first."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batch_size = max(1, BATCH_SIZE // options.beam)
    generator = None if options.seed is None else torch.Generator(model.device).manual_seed(options.seed)
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        batch = [prompts[index] for index in members]
        wanted = [min(room_for_answer(model, one), options.max_tokens or 1 << 30) for one in batch]
        most = min(wanted)
        decoder = Decoder(model, len(batch) * options.beam, model.config.context_length, options.engine)
        logits_BV = decoder.read_texts(batch, options.beam)
        if options.beam > 1:
            rows = beam_search(decoder, logits_BV, end_id, options.beam, most, options.length_penalty)
        else:
            rows = _one_by_one(decoder, logits_BV, end_id, most, options.sampling, generator, batch)
        for index, row, own in zip(members, rows, wanted, strict=True):
            if len(row) == most < own:  # the longest prompt of the batch has cut it short
                row = next(answer_ids(model, end_id, [prompts[index]], options))[1]
            yield index, row


def _one_by_one(
    decoder: Decoder,
    logits_BV: Tensor,
    end_id: int,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    prompts: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Token after token for every row until all have ended or have `max_tokens`."""
    rows: list[list[int]] = [[] for _ in logits_BV]
    going = set(range(len(rows)))
    seen_BV = None
    if sampling.repetition_penalty != 1:
        seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool, device=logits_BV.device)
        for row, prompt in enumerate(prompts):
            seen_BV[row, list(prompt)] = True
    for count in range(1, max_tokens + 1):
        with decoder.sparing_cores():
            ids_B = sample(logits_BV, seen_BV, sampling, generator)
        if seen_BV is not None:
            seen_BV.scatter_(1, ids_B[:, None], True)
        for row, id_ in enumerate(ids_B.tolist()):
            if id_ == end_id:
                going.discard(row)
            elif row in going:
                rows[row].append(id_)
        if not going or count == max_tokens:
            break
        logits_BV = decoder.read(ids_B[:, None])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# whole files


def answer_file(checkpoint: Checkpoint, source: Path, target: Path, options: AnswerOptions) -> str:
    """Answer every line of `source` into `target`, line by line in its order; returns what was done, in words.

    What is finished is kept beside `target` until all is, so a run that stops is taken up where it was. Lines that
    leave no room for an answer, and empty ones, become empty lines.
    """
    lines = _lines_of(source)
    done_path = target.with_name(f".{target.name}.partial.jsonl")
    identity = hashlib.sha256(
        json.dumps([lines, str(checkpoint.directory), checkpoint.step, asdict(options)], default=str).encode()
    ).hexdigest()
    done = _read_done(done_path, identity)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    prompts = {index: tokenizer.encode_prompt(line) for index, line in enumerate(lines) if line.strip()}
    too_long = [index for index, prompt in prompts.items() if not room_for_answer(model, prompt)]
    left = [index for index in prompts if index not in done and index not in set(too_long)]
    continued = f", {len(done):,} of them before" if done else ""
    target.parent.mkdir(parents=True, exist_ok=True)
    with done_path.open("a", encoding="utf-8") as kept:
        if not done:
            kept.write(json.dumps({"identity": identity}) + "\n")
        found = answer_ids(model, tokenizer.end_id, [prompts[index] for index in left], options)
        for position, ids in _with_progress(found, len(done), len(done) + len(left)):
            index = left[position]
            done[index] = " ".join(tokenizer.decode(ids).split("\n"))
            kept.write(json.dumps([index, done[index]]) + "\n")
            kept.flush()
    text = "".join(done.get(index, "") + "\n" for index in range(len(lines)))
    whole = target.with_name(f".{target.name}.new")
    whole.write_text(text, encoding="utf-8")
    os.replace(whole, target)
    done_path.unlink()
    first = ", ".join(str(index + 1) for index in too_long[:5])
    skipped = f"; {len(too_long)} are too long for the context and left empty (line {first} ...)" if too_long else ""
    return f"{len(lines):,} lines -> {target}{continued}{skipped}"


def _lines_of(path: Path) -> list[str]:
    if not path.is_file():
        raise RequestError(f"--file {path}: no such file")
    return "".join(read_text(path)).splitlines()


def _read_done(path: Path, identity: str) -> dict[int, str]:
    """Answers kept from a run that stopped, if it was this very one; a cut-off last line is left out."""
    if not path.exists():
        return {}
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    if not rows or rows[0] != {"identity": identity}:
        path.unlink()
        return {}
    return {int(index): str(text) for index, text in rows[1:]}


def _with_progress(found: Iterable[tuple[int, list[int]]], done: int, total: int) -> Iterator[tuple[int, list[int]]]:
    """The same, with a progress bar where there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("answers"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done)
        for item in found:
            yield item
            progress.advance(task)
