"""Data sets of the Hugging Face hub by name: found, read in blocks that can be gone on after, and never run.

What goes wrong there, and how little of it the hub's own errors say, becomes one line each.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitf.data.config import DataConfig
from minitf.data.resumable import Mark
from minitf.data.sources.files import PLAIN, TABLES, find_files
from minitf.errors import MinitfError, RequestError

LOADABLE = (*TABLES, *PLAIN, ".json", ".ndjson")  # of a folder, by data.hub_path=json and the like
BLOCK_ROWS = 64  # read at once where none are shuffled
READ_RETRIES = 2  # of a connection that dropped; before each the hub's client has tried six times itself, in 23 s
# What a lost connection, or none, is called by the libraries between here and the hub. By name: the hub's client has
# changed its HTTP library, and importing either to name its errors is slow.
UNREACHABLE = {
    "ConnectionError", "TimeoutError", "TransportError", "TimeoutException", "LocalEntryNotFoundError",
    "OfflineModeIsEnabled", "IncompleteRead",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubRow:
    """A row of a data set's columns; `index` counts from 0 in the order read; `part`: 1 if it is of `hub_val_split`."""

    part: int
    index: int
    values: dict[str, Any]


class HubData:
    """The splits a config names, at one commit; errors are MinitfError or RequestError, also while it is read."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.names = [config.hub_split, *([config.hub_val_split] if config.hub_val_split else [])]
        self.commit, self.away = _find_commit(config)
        self._splits: dict[tuple[str, str | None], _Split] = {}
        first = self.split(0)
        splits = [first, *(self.split(part) for part in range(1, len(self.names)))]
        self.columns = first.columns
        self.num_rows = first.num_rows  # of the first split; None: not known
        counts = [split.num_rows for split in splits]
        self.num_documents = None if None in counts else sum(count or 0 for count in counts)
        self._splits_in_order = splits
        remark = f"{config.hub_path}{f' ({config.hub_name})' if config.hub_name else ''}"
        self.description = remark + (", from the cache, as the hub cannot be reached" if self.away else "")

    def num_bytes(self, column: str) -> int | None:
        """About the bytes of a column of text; None where they are not known before they are read."""
        sizes = [split.num_bytes(column) for split in self._splits_in_order]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def split(self, part: int, commit: str | None = None) -> "_Split":
        key = (self.names[part], commit or self.commit)
        if key not in self._splits:
            self._splits[key] = _open(self.config, *key, self.away)
        return self._splits[key]

    def first_row(self) -> dict[str, Any] | None:
        with naming_errors(self.config):
            return self.split(0).first_row()

    def read(self, state: Any = None) -> Iterator[HubRow | Mark]:
        """All rows with marks between their blocks; `state` as in `reading.Reader`.

        Gone on with later, it is still the commit it began with that is read.
        """
        part, index, commit, inner = state or (0, 0, self.commit, None)
        with naming_errors(self.config):
            while part < len(self.names):
                for rows, after in self.split(part, commit).blocks(inner):
                    for offset, row in enumerate(rows):
                        yield HubRow(part, index + offset, row)
                    index += len(rows)
                    yield Mark([part, index, commit, after])
                part, index, inner = part + 1, 0, None


@dataclass(frozen=True)
class _Split:
    """One split, downloaded (`datasets.Dataset`) or streamed (`IterableDataset`)."""

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

    def blocks(self, state: Any) -> Iterator[tuple[list[dict[str, Any]], Any]]:
        """At most `max_documents` rows in blocks, each with the state to go on after it.

        The order is drawn block by block, from the number of the block alone: a block that is read again, after an
        interruption within it, has the order it had. A buffer that gives one row for each it takes would have to be
        kept itself.
        """
        buffer, most = self.config.shuffle_buffer, self.config.max_documents
        number, taken, inner = state or (0, 0, None)
        read = self._streamed if self.config.streaming else self._stored
        for rows, after in read(inner, buffer or BLOCK_ROWS):
            if buffer:
                order = np.random.default_rng((self.config.shuffle_seed, number)).permutation(len(rows))
                rows = [rows[i] for i in order]
            rows = rows if most is None else rows[: most - taken]
            number, taken = number + 1, taken + len(rows)
            yield rows, [number, taken, after]
            if taken == most:
                return

    def _stored(self, start: int | None, size: int) -> Iterator[tuple[list[dict[str, Any]], Any]]:
        for first in range(start or 0, len(self.dataset), size):
            columns = self.dataset[first : first + size]
            yield (
                [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
                (first + size),
            )

    def _streamed(self, state: Any, size: int) -> Iterator[tuple[list[dict[str, Any]], Any]]:
        """File by file, in drawn order if shuffled; the state is the number of a file and its own position.

        Only what is shuffled is gathered from several files: else a file that is done need not be opened again. Going
        on within a file reads it from its beginning and passes over the rows that were had. (Split into its row groups
        with `reshard`, a parquet file need not, but is opened for each of them: ten times its bytes were sent.)
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
    """The commit to read, and what to say if it is not in the cache because the hub cannot be reached.

    The one question that is not repeated for half a minute, as the hub's client repeats those for files: a hub that
    cannot be reached, a name that is not there and a data set that would run code are found out at once.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its lines about each retry
    datasets.utils.logging.set_verbosity_error()
    datasets.config.STREAMING_READ_MAX_RETRIES = READ_RETRIES
    if config.files or Path(str(config.hub_path)).exists() or datasets.config.HF_HUB_OFFLINE:
        return config.hub_revision, None
    api = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
    try:
        info = api.dataset_info(
            str(config.hub_path), revision=config.hub_revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:
        told = hub_error(config, error)
        if _is_unreachable(error):
            return config.hub_revision, told
        raise told from error
    script = f"{str(config.hub_path).split('/')[-1]}.py"
    if script in {file.rfilename for file in info.siblings or ()}:
        raise RequestError(
            f"{config.hub_path} is loaded by a program of its own ({script}), which is never run; there may be a copy "
            "without one: data.hub_revision=refs/convert/parquet"
        )
    return info.sha, None


def _open(config: DataConfig, split: str, commit: str | None, away: MinitfError | None) -> _Split:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    options: dict[str, Any] = {"revision": commit, "streaming": config.streaming}
    if config.files:
        options["data_files"] = [str(path) for path in find_files(config.files, LOADABLE)]
    if config.hub_path == "text":
        options["sample_by"] = "document"  # its default drops the newlines
    before = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = before or away is not None
        with naming_errors(config, split):
            dataset = datasets.load_dataset(config.hub_path, config.hub_name, split=split, **options)
        if datasets.config.HF_HUB_OFFLINE and config.hub_revision and not config.files:
            _check_cached(config, dataset)
        return _Split(dataset, config)
    except MinitfError as error:
        raise (away or error) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _check_cached(config: DataConfig, dataset: Any) -> None:
    """From the cache the client takes whichever revision it fetched last."""
    files = [Path(file["filename"]) for file in getattr(dataset, "cache_files", [])]
    if not Path(str(config.hub_path)).exists() and not all(config.hub_revision in file.parts for file in files):
        raise MinitfError(
            f"{config.hub_path}: whether its copy in the cache is revision {config.hub_revision} cannot be told "
            "without the hub; name the commit with data.hub_revision, or leave it out"
        )


class naming_errors:  # noqa: N801  # a context manager that reads as the statement it is
    """What the hub's client raises inside becomes one line; our own errors pass."""

    def __init__(self, config: DataConfig, split: str = "") -> None:
        self.config, self.split = config, split

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, MinitfError):
            raise hub_error(self.config, error, self.split) from error


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _is_unreachable(error: BaseException) -> bool:
    return bool(UNREACHABLE & {cls.__name__ for link in _chain(error) for cls in type(link).__mro__})


def hub_error(config: DataConfig, error: Exception, split: str = "") -> MinitfError:
    """What went wrong at the hub in one line, and what to do."""
    from huggingface_hub import constants

    name, chain = config.hub_path, _chain(error)
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if "GatedRepoError" in names or "is a gated dataset" in str(error):
        return RequestError(
            f"{name} is gated: accept its terms on {constants.ENDPOINT}/datasets/{name}, then log in with: hf auth "
            "login, or set HF_TOKEN"
        )
    if "RevisionNotFoundError" in names:
        return RequestError(f"{name} has no revision {config.hub_revision}; check data.hub_revision")
    if "RepositoryNotFoundError" in names:
        return RequestError(
            f"{name} is no data set of the hub, or a private one: check data.hub_path, or log in with: hf auth login"
        )
    if _is_unreachable(error):
        return _unreachable(config, chain)
    told: BaseException = error
    while told.__cause__ is not None and str(told.__cause__).strip():  # "An error occurred ...": the cause tells which
        told = told.__cause__
    reason = " ".join(str(told).split()).rstrip(".") or type(error).__name__
    found = re.search(r"\[('[^\]]*)\]", reason)
    known = f", one of: {found[1]}".replace("'", "") if found else ""
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        wanted = f"has no configuration {config.hub_name!r}" if config.hub_name else "has several configurations"
        return RequestError(f"{name} {wanted}; set data.hub_name{known}")
    if "split" in reason.lower() and found:
        key = "hub_val_split" if split and split == config.hub_val_split else "hub_split"
        return RequestError(f"{name} has no split {split!r}; set data.{key}{known}")
    return RequestError(f"cannot load {name}: {reason[:200]}; check data.hub_path, data.hub_name and data.hub_split")


def _unreachable(config: DataConfig, chain: list[BaseException]) -> MinitfError:
    import datasets
    from huggingface_hub import constants

    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if datasets.config.HF_HUB_OFFLINE:
        return MinitfError(
            f"{config.hub_path} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; data=kjv and data=web "
            "work offline"
        )
    if any("Timeout" in name for name in names):
        waits = f"{constants.HF_HUB_ETAG_TIMEOUT} and {constants.HF_HUB_DOWNLOAD_TIMEOUT} s"
        return MinitfError(
            f"no answer from the hub at {constants.ENDPOINT} for {config.hub_path}; a slow one is waited for longer "
            f"with HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT, now {waits}"
        )
    return MinitfError(f"cannot reach the Hugging Face hub for {config.hub_path}; data=kjv and data=web work offline")
