"""Checkpoints and snapshots, and maps with their vectors, in the directories of TensorBoard's runs.

Everything is found by listing directories: no path ever comes from a request.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitf.tensorboard.summary import sentence_tag
from minitf.viewer import heads_found

FORK_RECORD = "forked_from.json"  # see runs/fork.py
MAX_RECORD_BYTES = 10_000
STEP_NAME = re.compile(r"step_(\d{8,15})")
ROW_START = re.compile(rb'\{"text": ("(?:[^"\\]|\\.)*"), "step": (\d+), ')


class RunFolders:
    """The run directories below TensorBoard's --logdir."""

    def __init__(self, logdir: str | None) -> None:
        self.logdir = os.path.realpath(os.path.expanduser(logdir)) if logdir and "://" not in logdir else None
        self.indexed: tuple[tuple[str, int, int], dict[tuple[str, int], tuple[int, int]]] | None = None

    def steps(self, run: str) -> list[int]:
        """Steps of a run's checkpoints and snapshots, ascending."""
        return sorted(self._checkpoints(run))

    def checkpoint(self, run: str, step: int) -> Path | None:
        """A run's checkpoint at a step, or else its snapshot, if there is one that lies within the run."""
        return self._checkpoints(run, step).get(step)

    def maps(self, run: str, tag: str, step: int) -> bytes | None:
        """The row of the run's attention.jsonl with the maps of a sentence at a step, if it exists."""
        directory = self._directory(run)
        path = os.path.realpath(os.path.join(directory, "attention.jsonl")) if directory else ""
        if not directory or not _is_within(path, directory):
            return None
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                key = (path, status.st_size, status.st_mtime_ns)
                indexed = self.indexed  # read once: another request's thread may replace it
                if indexed is None or indexed[0] != key:
                    self.indexed = indexed = key, _index(file)
                start, length = indexed[1].get((tag, step), (0, 0))
                file.seek(start)
                return file.read(length) or None
        except OSError:
            return None

    def heads_found(self, run: str) -> dict[str, list[tuple[int, list[list[int]]]]]:
        """The heads that the run found to align words or to refer to one, see `viewer.heads_found`."""
        directory = self._directory(run)
        path = os.path.realpath(os.path.join(directory, "metrics.jsonl")) if directory else ""
        if not directory or not _is_within(path, directory):
            return {}
        try:
            with open(path, "rb") as file:
                return heads_found(_rows(line for line in file if b'"heads"' in line))
        except OSError:
            return {}

    def forked_from(self, run: str) -> dict[str, Any] | None:
        """{"run": name, "step": N} of the run that this one continues from that step, if it is below the logdir too."""
        directory = self._directory(run)
        path = os.path.realpath(os.path.join(directory, FORK_RECORD)) if directory else ""
        if not directory or not _is_within(path, directory):
            return None
        try:
            with open(path, "rb") as file:
                record = json.loads(file.read(MAX_RECORD_BYTES))
            parent = os.path.normpath(os.path.join(run, record["run"]))
            step = int(record["step"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        known = self._directory(parent)
        return {"run": parent, "step": step} if known and os.path.isdir(known) else None

    def _directory(self, run: str) -> str | None:
        if self.logdir is None or "\0" in run:
            return None
        directory = os.path.realpath(os.path.join(self.logdir, run))
        return directory if _is_within(directory, self.logdir) else None

    def _checkpoints(self, run: str, wanted: int | None = None) -> dict[int, Path]:
        """All by step, or only that of the step wanted: each takes a dozen calls of the file system."""
        directory = self._directory(run)
        if directory is None:
            return {}
        found: dict[int, Path] = {}
        for folder in ("snapshots", "checkpoints"):  # a checkpoint has the exact weights
            with suppress(OSError), os.scandir(os.path.join(directory, folder)) as entries:  # absent, or not readable
                for entry in entries:
                    match = STEP_NAME.fullmatch(entry.name)
                    if match and wanted in (None, int(match[1])) and _is_complete(entry.path, directory):
                        found[int(match[1])] = Path(os.path.realpath(entry.path))
        return found


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The rows of JSON lines; damaged ones are left out."""
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _index(rows: Iterable[bytes]) -> dict[tuple[str, int], tuple[int, int]]:
    """(tag, step) -> (offset, length) of complete rows; the last row if a step was written more than once."""
    found = {}
    offset = 0
    for row in rows:
        match = ROW_START.match(row)
        if match and row.endswith(b"}\n"):
            with suppress(ValueError):  # a damaged row
                found[sentence_tag(json.loads(match[1])), int(match[2])] = (offset, len(row))
        offset += len(row)
    return found


def _is_complete(checkpoint: str, run_directory: str) -> bool:
    """Whether this is a checkpoint or a snapshot whose files, links resolved, all lie within the run."""
    real = os.path.realpath(checkpoint)
    if not _is_within(real, run_directory):
        return False
    required = [os.path.join(real, name) for name in ("model.safetensors", "config.json", "tokenizer.json")]
    files = map(os.path.realpath, [*required, os.path.join(real, "trainer_state.json")])
    return all(map(os.path.isfile, required)) and all(_is_within(file, run_directory) for file in files)


def _is_within(path: str, directory: str) -> bool:
    return os.path.commonpath([path, directory]) == directory
