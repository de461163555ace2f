"""Data sets of the Hugging Face hub: found by name, read at one commit in resumable blocks, their code never run."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitf.data.config import DataConfig
from minitf.data.resumable import Position
from minitf.data.sources.corpus import is_held_out, which_held_out
from minitf.data.sources.files import PLAIN, find_files
from minitf.data.sources.hub_errors import describe_error, is_unreachable, naming_errors
from minitf.data.sources.tables import TABLES
from minitf.errors import MinitfError, RequestError

LOADABLE = (*TABLES, *PLAIN)  # files of a folder, for data.hub_path=json and the like
BLOCK_ROWS = 64  # read at once where rows are not shuffled
READ_RETRIES = 2  # after a connection dropped; before each the hub's client has itself tried six times, in 23 s

Block = tuple[list[dict[str, Any]], Any]  # rows, and the state to resume after them


@dataclass(frozen=True, slots=True)
class HubRow:
    """A row of a data set; `index` counts from 0 in the order of reading, within `split`."""

    split: str
    index: int
    held_out: bool
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.split}, row {self.index + 1}"


class HubData:
    """The splits a config names, at one commit; errors are MinitfError or RequestError, also while it is read."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.split_names = [config.hub_split, *([config.hub_val_split] if config.hub_val_split else [])]
        self.commit, self.unreachable = _find_commit(config)
        self._opened: dict[tuple[str, str | None], _Split] = {}
        self._splits = [self._split(name, self.commit) for name in self.split_names]
        self.columns = self._splits[0].columns
        self.num_rows = self._splits[0].num_rows  # None: unknown
        self.num_documents = _sum([split.num_rows for split in self._splits])
        self.description = f"{config.hub_path}{f' ({config.hub_name})' if config.hub_name else ''}"
        if self.unreachable:
            self.description += ", from the cache, as the hub cannot be reached"

    @property
    def which_held_out(self) -> str:
        val_split = self.config.hub_val_split
        return f"split {val_split}" if val_split else which_held_out(self.config.val_fraction)

    def num_bytes(self, column: str) -> int | None:
        """About the bytes of a column of text; None where they are unknown before reading."""
        return _sum([split.num_bytes(column) for split in self._splits])

    def first_row(self) -> dict[str, Any] | None:
        with naming_errors(self.config):
            return self._splits[0].first_row()

    def read(self, state: Any, val_fraction: float) -> Iterator[HubRow | Position]:
        """All rows, with a position after each block; `state` is that of a position, or None for the start.

        Rows are held out by `val_fraction` where the config names no split for it. Resumed, the commit is still the
        one that was read before.
        """
        part, index, commit, inner = state or (0, 0, self.commit, None)
        with naming_errors(self.config):
            while part < len(self.split_names):
                name = self.split_names[part]
                for rows, after in self._split(name, commit).blocks(inner):
                    for row in rows:
                        held_out = part == 1 if self.config.hub_val_split else is_held_out(index, val_fraction)
                        yield HubRow(name, index, held_out, row)
                        index += 1
                    yield Position([part, index, commit, after])
                part, index, inner = part + 1, 0, None

    def _split(self, name: str, commit: str | None) -> "_Split":
        if (name, commit) not in self._opened:
            self._opened[name, commit] = _open(self.config, name, commit, self.unreachable)
        return self._opened[name, commit]


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


@dataclass(frozen=True)
class _Split:
    """One split, downloaded (`datasets.Dataset`) or streamed (`datasets.IterableDataset`)."""

    dataset: Any
    config: DataConfig

    @property
    def num_rows(self) -> int | None:
        if self.config.streaming:
            return self.config.max_documents
        return min(len(self.dataset), self.config.max_documents or len(self.dataset))

    def num_bytes(self, column: str) -> int | None:
        if self.config.streaming or not len(self.dataset):
            return None
        share = (self.num_rows or 0) / len(self.dataset)
        return int(self.dataset.data.column(column).nbytes * share)

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names or self.first_row() or ())

    def first_row(self) -> dict[str, Any] | None:
        return next(iter(self.dataset), None)

    def blocks(self, state: Any) -> Iterator[Block]:
        """At most `max_documents` rows in blocks.

        Rows are shuffled within a block, by the block's number alone, so that a block that is read again keeps its
        order. A buffer that yields one row for each it takes would itself have to be saved.
        """
        buffer, most = self.config.shuffle_buffer, self.config.max_documents
        number, taken, inner = state or (0, 0, None)
        read = self._streamed if self.config.streaming else self._downloaded
        for rows, after in read(inner, buffer or BLOCK_ROWS):
            if buffer:
                order = np.random.default_rng((self.config.shuffle_seed, number)).permutation(len(rows))
                rows = [rows[i] for i in order]
            rows = rows if most is None else rows[: most - taken]
            number += 1
            taken += len(rows)
            yield rows, [number, taken, after]
            if taken == most:
                return

    def _downloaded(self, start: int | None, size: int) -> Iterator[Block]:
        for first in range(start or 0, len(self.dataset), size):
            columns = self.dataset[first : first + size]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield rows, first + size

    def _streamed(self, state: Any, size: int) -> Iterator[Block]:
        """File by file, shuffled too if rows are; the state is the number of a file and the position within it.

        Only shuffled blocks span several files: otherwise a finished file is never opened again. Resuming within a
        file reads it from its start and skips the rows taken before. (With `reshard`, which splits a parquet file
        into its row groups, that is unnecessary, but the file is opened for each of them: ten times the traffic.)
        """
        count, shuffled = self.dataset.num_shards, self.config.shuffle_buffer
        order = np.random.default_rng(self.config.shuffle_seed).permutation(count) if shuffled else range(count)
        first, within = state or (0, None)
        block: list[dict[str, Any]] = []
        for place in range(first, count):
            file = self.dataset.shard(count, int(order[place]))
            if within is not None:
                file.load_state_dict(within)
                within = None
            for row in file:
                block.append(row)
                if len(block) == size:
                    yield block, [place, file.state_dict()]
                    block = []
            if block and (not shuffled or place + 1 == count):
                yield block, [place + 1, None]
                block = []


def _find_commit(config: DataConfig) -> tuple[str | None, MinitfError | None]:
    """The commit to read; and, where the hub cannot be reached, the error to raise if it is not in the cache either.

    The hub's client repeats requests for files for half a minute. This one request is not repeated, so that an
    unreachable hub, a wrong name and a data set that would run code are found at once.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # a line for each retry
    datasets.utils.logging.set_verbosity_error()
    datasets.config.STREAMING_READ_MAX_RETRIES = READ_RETRIES
    name = str(config.hub_path)
    if config.files or Path(name).exists() or datasets.config.HF_HUB_OFFLINE:
        return config.hub_revision, None
    api = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
    try:
        info = api.dataset_info(name, revision=config.hub_revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        described = describe_error(config, error)
        if is_unreachable(error):
            return config.hub_revision, described
        raise described from error
    script = f"{name.split('/')[-1]}.py"
    if script in {file.rfilename for file in info.siblings or ()}:
        raise RequestError(
            f"{name} is loaded by a program of its own ({script}), which is never run; there may be a copy without "
            "one: data.hub_revision=refs/convert/parquet"
        )
    return info.sha, None


def _open(config: DataConfig, split: str, commit: str | None, unreachable: MinitfError | None) -> _Split:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    options: dict[str, Any] = {"revision": commit, "streaming": config.streaming}
    if config.files:
        options["data_files"] = [str(path) for path in find_files(config.files, LOADABLE).paths]
    if config.hub_path == "text":
        options["sample_by"] = "document"  # the default drops the newlines
    before = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = before or unreachable is not None
        with naming_errors(config, split):
            dataset = datasets.load_dataset(config.hub_path, config.hub_name, split=split, **options)
        if datasets.config.HF_HUB_OFFLINE and config.hub_revision and not config.files:
            _check_revision_cached(config, dataset)
        return _Split(dataset, config)
    except MinitfError as error:
        raise (unreachable or error) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _check_revision_cached(config: DataConfig, dataset: Any) -> None:
    """From the cache the client takes whichever revision it downloaded last."""
    files = [Path(file["filename"]) for file in getattr(dataset, "cache_files", [])]
    if not Path(str(config.hub_path)).exists() and not all(config.hub_revision in file.parts for file in files):
        raise MinitfError(
            f"{config.hub_path}: without the hub nothing says whether the copy in the cache is revision "
            f"{config.hub_revision}; name the commit with data.hub_revision, or leave it out"
        )
