"""Answer every line of a file with a model trained on pairs; an interrupted run resumes where it stopped."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.sources.files import kind_of, read_text
from minitf.data.sources.tables import TABLES
from minitf.errors import RequestError
from minitf.inference.seq2seq import AnswerOptions, answer_ids, room_for_answer
from minitf.system.files import write_whole


def translate_file(checkpoint: Checkpoint, source: Path, target: Path, options: AnswerOptions) -> str:
    """Write the answer to each line of `source` to the same line of `target`; returns a summary in one line.

    Finished answers are kept in a file next to `target` until all are there. Empty lines, and lines that leave no room
    for an answer in the context, become empty lines. Raises RequestError if there is no `source`, or if `target` is it.
    """
    lines = _lines_of(source)
    _check_target(source, target)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    journal = _Journal(target, [lines, str(checkpoint.directory), checkpoint.step, asdict(options)])
    done = journal.read()
    num_resumed = len(done)
    prompts = {index: tokenizer.encode_prompt(line) for index, line in enumerate(lines) if line.strip()}
    too_long = {index for index, prompt in prompts.items() if not room_for_answer(model, prompt)}
    left = [index for index in prompts if index not in done and index not in too_long]
    found = answer_ids(model, tokenizer.end_id, [prompts[index] for index in left], options)
    for position, ids in _with_progress(found, num_resumed, num_resumed + len(left)):
        index = left[position]
        done[index] = re.sub(r"\r*\n|\r+\Z", " ", tokenizer.decode(ids))
        journal.add(index, done[index])
    write_whole(target, "".join(done.get(index, "") + "\n" for index in range(len(lines))))
    journal.path.unlink()

    resumed = f", {num_resumed:,} of them before" if num_resumed else ""
    first = ", ".join(str(index + 1) for index in sorted(too_long)[:5])
    skipped = f"; {len(too_long)} are too long for the context and left empty (line {first} ...)" if too_long else ""
    return f"{len(lines):,} lines -> {target}{resumed}{skipped}"


class _Journal:
    """Finished answers next to `target`, one JSON line each, after a line that identifies the work."""

    def __init__(self, target: Path, work: object) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path = target.with_name(f".{target.name}.partial.jsonl")
        self.header = {"identity": hashlib.sha256(json.dumps(work, default=str).encode()).hexdigest()}

    def read(self) -> dict[int, str]:
        """Answers by line number from 0, if they are those of the same work; else the journal starts anew.

        A line that was cut off is left out.
        """
        rows = []
        for line in self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        if not rows or rows[0] != self.header:
            self.path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")
            return {}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n")  # ends a line that was cut off
        return {int(row[0]): str(row[1]) for row in rows if isinstance(row, list)}

    def add(self, index: int, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([index, text]) + "\n")


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file; each ends with \\n or \\r\\n, and with nothing else."""
    if not path.is_file():
        raise RequestError(f"--file {path}: no such file")
    if kind_of(path) in TABLES:
        raise RequestError(f"--file {path}: a table; give a text with one source a line")
    *lines, rest = "".join(read_text(path)).split("\n")
    return [line.removesuffix("\r") for line in (*lines, *([rest] if rest else []))]


def _check_target(source: Path, target: Path) -> None:
    """RequestError if the answers could not be written in the end, or would replace the sources."""
    if target.exists() and target.samefile(source):
        raise RequestError(f"--out {target} is the file that --file names: its sources would be lost")
    if target.is_dir():
        raise RequestError(f"--out {target} is a directory; name a file")


def _with_progress(found: Iterable[tuple[int, list[int]]], done: int, total: int) -> Iterator[tuple[int, list[int]]]:
    """The same items, with a progress bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("answers"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done)
        for item in found:
            yield item
            progress.advance(task)
