"""Ids on disk, memory-mapped -> batches of inputs and targets, with a position that is one number.

`prepare` turns text into ids once and keeps them; the next start with the same text and tokenizer only maps the files.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from minitf.corpus import Corpus, DataConfig, Row, fingerprint, open_corpus, read_rows
from minitf.errors import RequestError
from minitf.loss import IGNORED
from minitf.prepared import Progress, keep, open_kept, writing_to
from minitf.storage import cache_root
from minitf.tokenizer import END_OF_TEXT, Tokenizer, TokenizerConfig, train_tokenizer

FORMAT_VERSION = 1  # raise it when the same text and settings give other files than before
ENCODE_CHARS = 1 << 21  # text encoded at once, in parallel by rows; bounds the memory of `prepare`
ENCODE_ROWS = 4096

Tokens = npt.NDArray[np.unsignedinteger[Any]]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class TokenizedText:
    """Train and held-out ids, read-only and memory-mapped, with the tokenizer that made them."""

    tokenizer: Tokenizer
    train: Tokens  # 1-D, uint16 where the vocabulary allows, else uint32
    val: Tokens
    train_bytes: int  # UTF-8 bytes of the text behind `train`
    val_bytes: int
    description: str  # of the text, one line for people
    directory: Path


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    tokenizer_from: Tokenizer | None = None,
    log: Callable[[str], None] = to_stderr,
) -> TokenizedText:
    """The text of `data` as ids, from the cache or made now.

    `tokenizer_from`: use this one (of an earlier run) instead of the one `tokenizer` describes. `log` gets lines for
    people. Several processes may prepare the same text at once. Raises RequestError or MinitfError, one line each.
    """
    if tokenizer_from is None and tokenizer.kind == "pretrained":
        tokenizer_from = Tokenizer.load(str(tokenizer.file))
    root = cache_root(data.cache_dir)
    if tokenizer_from is not None:  # perhaps it is the one this very text was prepared with
        own = open_kept(root / cache_key(data, tokenizer, None), _load)
        if own is not None and own.tokenizer.to_json() == tokenizer_from.to_json():
            return own

    def make(temporary: Path) -> dict[str, Any]:
        started = time.monotonic()
        corpus = open_corpus(data)
        log(f"preparing {corpus.description}")
        made = _write(data, corpus, tokenizer_from or _make_tokenizer(data, tokenizer, corpus), temporary, log)
        train, val = (
            (temporary / f"{part}.bin").stat().st_size // np.dtype(made["dtype"]).itemsize for part in ("train", "val")
        )
        counts = f"{train:,} tokens to train on, {val:,} held out"
        log(f"prepared in {time.monotonic() - started:.1f} s: {counts}; kept in {directory}")
        return made

    directory = root / cache_key(data, tokenizer, tokenizer_from)
    return keep(directory, _load, make, log)


def cache_key(data: DataConfig, tokenizer: TokenizerConfig, tokenizer_from: Tokenizer | None) -> str:
    """The name of what is prepared from this text with this tokenizer."""
    identity: dict[str, Any] = {"format": FORMAT_VERSION, "text": fingerprint(data)}
    if tokenizer_from is not None:
        identity["tokenizer"] = tokenizer_from.to_json()
        if tokenizer_from.end_token != END_OF_TEXT:  # its tokenizer.json does not say which it is
            identity["end"] = tokenizer_from.end_token
    else:
        identity["tokenizer"] = [tokenizer.kind]
        if tokenizer.kind == "bpe":
            identity["tokenizer"] += [tokenizer.vocab_size, tokenizer.train_megabytes]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def _load(directory: Path, meta: dict[str, Any]) -> TokenizedText:
    train, val = (np.memmap(directory / f"{part}.bin", dtype=meta["dtype"], mode="r") for part in ("train", "val"))
    return TokenizedText(
        tokenizer=Tokenizer.load(directory),
        train=train,
        val=val,
        train_bytes=meta["train_bytes"],
        val_bytes=meta["val_bytes"],
        description=meta["description"],
        directory=directory,
    )


def _make_tokenizer(data: DataConfig, config: TokenizerConfig, corpus: Corpus) -> Tokenizer:
    train, val = ((row["text"] for row in read_rows(data, rows)) for rows in (corpus.train, corpus.val))
    if config.kind != "bpe":
        return train_tokenizer(config, train, val)
    max_bytes = int(config.train_megabytes * 1e6)
    # Reading a stream to its end only to choose a sample would download it twice.
    return train_tokenizer(config, _first(train, max_bytes) if data.streaming else evenly_sampled(train, max_bytes))


def evenly_sampled(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Texts evenly spread over all of `texts`, of `max_bytes` together at most, in one pass."""
    kept: list[str] = []
    size, stride = 0, 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        size += num_bytes_of(text)
        while size > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(num_bytes_of, kept))
    return kept


def _first(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        yield text
        left -= num_bytes_of(text)
        if left <= 0:
            return


def num_bytes_of(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _write(
    data: DataConfig, corpus: Corpus, tokenizer: Tokenizer, directory: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Write the files of a cache directory; returns its meta data."""
    dtype = ids_dtype(tokenizer)
    meta: dict[str, Any] = {"description": corpus.description, "dtype": dtype.name}
    progress = Progress(log)
    for part, rows in (("train", corpus.train), ("val", corpus.val)):
        with writing_to(directory.parent):
            file = (directory / f"{part}.bin").open("wb")
        with file:
            meta[f"{part}_bytes"] = _write_ids(
                read_rows(data, rows), corpus.separated, tokenizer, file, dtype, progress
            )
        if not meta[f"{part}_bytes"]:
            name = "text to train on" if part == "train" else "held-out text"
            raise RequestError(f"{corpus.description}: no {name}; use more text, or another data.val_fraction")
    with writing_to(directory.parent):
        tokenizer.save(directory)
    return meta


def ids_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")


def _write_ids(
    rows: Iterable[Row],
    separated: bool,
    tokenizer: Tokenizer,
    file: BinaryIO,
    dtype: np.dtype[Any],
    progress: Progress,
) -> int:
    """Append the ids of all rows to `file`. Returns the number of UTF-8 bytes of their text."""
    num_bytes = 0
    for group in _groups(rows):
        batch = tokenizer.encode_batch([row["text"] for row in group])
        for ids, row in zip(batch, group, strict=True):
            if separated and row["end"]:
                ids.append(tokenizer.end_id)
            with writing_to(Path(file.name).parent.parent):
                file.write(np.asarray(ids, dtype=dtype).data)
        group_bytes = sum(num_bytes_of(row["text"]) for row in group)
        num_bytes += group_bytes
        progress.add(group_bytes)
    return num_bytes


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Consecutive rows, as many as are encoded at once."""
    group: list[Row] = []
    num_chars = 0
    for row in rows:
        group.append(row)
        num_chars += len(row["text"])
        if num_chars >= ENCODE_CHARS or len(group) >= ENCODE_ROWS:
            yield group
            group, num_chars = [], 0
    if group:
        yield group


class Batch(NamedTuple):
    """What a step trains on. Targets of -100 do not count.

    `segments_BT` numbers the texts packed into a row: a position sees only its own; None: a row is one text.
    `weights_BT` is what each target counts; None: one.
    """

    inputs_BT: torch.Tensor  # noqa: N815
    targets_BT: torch.Tensor  # noqa: N815
    segments_BT: torch.Tensor | None = None  # noqa: N815
    weights_BT: torch.Tensor | None = None  # noqa: N815

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; to a GPU the copy goes on while it still computes."""
        if device.type == "cpu":
            return self

        def moved(part: torch.Tensor) -> torch.Tensor:
            return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)

        rest = (None if part is None else moved(part) for part in self[2:])
        return Batch(moved(self.inputs_BT), moved(self.targets_BT), *rest)


class BatchSource(Protocol):
    """Training batches by number."""

    @property
    def tokens_per_epoch(self) -> int:
        """Positions of one epoch."""

    def batch(self, index: int) -> Batch:
        """Batch `index` >= 0: the same one whenever it is asked for."""


class Batches:
    """Shuffled training batches; the batch of an index depends on nothing but the seed and that index.

    Each epoch cuts the text into windows from a fresh offset and goes through them once, in a fresh order, so a run
    that stops is resumed by its number of batches alone.
    """

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int, seed: int) -> None:
        """`tokens` is 1-D. Raises RequestError when it is shorter than one window and its targets."""
        if len(tokens) <= context_length:
            raise RequestError(
                f"the text to train on has {len(tokens):,} tokens, but one context and its targets need "
                f"{context_length + 1:,}; use more text or a smaller model.context_length"
            )
        self._tokens = np.asarray(tokens)  # indexing a memmap object itself is slower
        self._context_length = context_length
        self._batch_size = batch_size
        self._seed = seed % (1 << 64)
        self._span = np.arange(context_length + 1)
        self._epoch = -1
        self._starts: npt.NDArray[np.integer[Any]] = np.empty(0, dtype=np.int64)
        # One number for all epochs: what is left over is room for offsets of at least one whole window.
        self.windows_per_epoch = max(1, (len(tokens) - context_length) // context_length)

    @property
    def tokens_per_epoch(self) -> int:
        """Targets seen in one epoch."""
        return self.windows_per_epoch * self._context_length

    def batch(self, index: int) -> Batch:
        """Batch `index` >= 0, int64, the targets being the inputs shifted by one."""
        starts = np.empty(self._batch_size, dtype=np.int64)
        row = 0
        while row < self._batch_size:
            epoch, position = divmod(index * self._batch_size + row, self.windows_per_epoch)
            window_starts = self._starts_of(epoch)[position : position + self._batch_size - row]
            starts[row : row + len(window_starts)] = window_starts
            row += len(window_starts)
        windows = torch.from_numpy(self._tokens[starts[:, None] + self._span].astype(np.int64))
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def _starts_of(self, epoch: int) -> npt.NDArray[np.integer[Any]]:
        """Where the windows of `epoch` begin, in the order in which they are used."""
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            num_windows, length = self.windows_per_epoch, self._context_length
            offset = int(rng.integers(len(self._tokens) - num_windows * length))
            self._starts = offset + length * rng.permutation(num_windows)
            self._epoch = epoch
        return self._starts


def held_out_batches(
    tokens: Tokens, context_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Every target of `tokens` once, in a fixed order, int64, of up to `batch_size` rows.

    The windows do not overlap; the last one is filled up with targets of -100, which count for nothing. `max_tokens`
    takes evenly spread windows with about so many targets instead. Raises RequestError when there is no target.
    """
    if len(tokens) < 2:
        raise RequestError(f"the held-out text has {len(tokens)} tokens, too few to predict any; use more text")
    num_windows = -(-(len(tokens) - 1) // context_length)
    num_taken = num_windows if max_tokens is None else min(num_windows, max(1, max_tokens // context_length))
    taken: Sequence[int] = [i * num_windows // num_taken for i in range(num_taken)]
    for first in range(0, num_taken, batch_size):
        rows = taken[first : first + batch_size]
        inputs_BT = torch.zeros(len(rows), context_length, dtype=torch.int64)
        targets_BT = torch.full((len(rows), context_length), IGNORED, dtype=torch.int64)
        for row, window in enumerate(rows):
            start = window * context_length
            ids = torch.from_numpy(tokens[start : start + context_length + 1].astype(np.int64))
            inputs_BT[row, : len(ids) - 1] = ids[:-1]
            targets_BT[row, : len(ids) - 1] = ids[1:]
        yield Batch(inputs_BT, targets_BT)
