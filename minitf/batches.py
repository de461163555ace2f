"""Ids on disk, memory-mapped -> batches of inputs and targets, with a position that is one number.

`prepare` turns text into ids once and keeps them; the next start with the same text and tokenizer only maps the files.
"""

import contextlib
import errno
import hashlib
import json
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from minitf.corpus import Corpus, DataConfig, Row, fingerprint, open_corpus, read_rows
from minitf.errors import MinitfError, RequestError
from minitf.loss import IGNORED
from minitf.storage import cache_root, flush
from minitf.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

FORMAT_VERSION = 1  # raise it when the same text and settings give other files than before
ENCODE_CHARS = 1 << 21  # text encoded at once, in parallel by rows; bounds the memory of `prepare`
ENCODE_ROWS = 4096
LOG_EVERY_S = 10.0
STALE_S = 24 * 3600.0  # a temporary directory untouched for so long belongs to no living run

Tokens = npt.NDArray[np.unsignedinteger[Any]]


def _to_stderr(line: str) -> None:
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
    log: Callable[[str], None] = _to_stderr,
) -> TokenizedText:
    """The text of `data` as ids, from the cache or made now.

    `tokenizer_from`: use this one (of an earlier run) instead of the one `tokenizer` describes. `log` gets lines for
    people. Several processes may prepare the same text at once. Raises RequestError or MinitfError, one line each.
    """
    if tokenizer_from is None and tokenizer.kind == "pretrained":
        tokenizer_from = Tokenizer.load(str(tokenizer.file))
    root = cache_root(data.cache_dir)
    if tokenizer_from is not None:  # perhaps it is the one this very text was prepared with
        own = _open(root / _key(data, tokenizer, None))
        if own is not None and own.tokenizer.to_json() == tokenizer_from.to_json():
            return own
    directory = root / _key(data, tokenizer, tokenizer_from)
    found = _open(directory)
    if found is not None:
        return found
    if directory.exists():
        log(f"{directory} is damaged; preparing the text again")
    return _build(data, tokenizer, tokenizer_from, directory, log)


def _key(data: DataConfig, tokenizer: TokenizerConfig, tokenizer_from: Tokenizer | None) -> str:
    identity: dict[str, Any] = {"format": FORMAT_VERSION, "text": fingerprint(data)}
    if tokenizer_from is not None:
        identity["tokenizer"] = tokenizer_from.to_json()
    else:
        identity["tokenizer"] = [tokenizer.kind]
        if tokenizer.kind == "bpe":
            identity["tokenizer"] += [tokenizer.vocab_size, tokenizer.train_megabytes]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def _open(directory: Path) -> TokenizedText | None:
    """What is kept in `directory`; None where nothing or not all of it is there."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if any((directory / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RequestError):
        return None


def _build(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    tokenizer_from: Tokenizer | None,
    directory: Path,
    log: Callable[[str], None],
) -> TokenizedText:
    """Make `directory`: written beside it and renamed, so that it exists either whole or not at all."""
    started = time.monotonic()
    root = directory.parent
    temporary = _temporary_name(directory)
    with _writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        temporary.mkdir()
    try:
        corpus = open_corpus(data)
        log(f"preparing {corpus.description}")
        tokenizer = tokenizer_from or _make_tokenizer(data, tokenizer_config, corpus)
        _write(data, corpus, tokenizer, temporary, log)
        with _writing_to(root):
            text = _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = f"{len(text.train):,} tokens to train on, {len(text.val):,} held out"
    log(f"prepared in {time.monotonic() - started:.1f} s: {counts}; kept in {directory}")
    return text


def _make_tokenizer(data: DataConfig, config: TokenizerConfig, corpus: Corpus) -> Tokenizer:
    train, val = ((row["text"] for row in read_rows(data, rows)) for rows in (corpus.train, corpus.val))
    if config.kind != "bpe":
        return train_tokenizer(config, train, val)
    max_bytes = int(config.train_megabytes * 1e6)
    # Reading a stream to its end only to choose a sample would download it twice.
    return train_tokenizer(config, _first(train, max_bytes) if data.streaming else _sample(train, max_bytes))


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Texts evenly spread over all of `texts`, of `max_bytes` together at most, in one pass."""
    kept: list[str] = []
    size, stride = 0, 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        size += _num_bytes(text)
        while size > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(_num_bytes, kept))
    return kept


def _first(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        yield text
        left -= _num_bytes(text)
        if left <= 0:
            return


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _write(data: DataConfig, corpus: Corpus, tokenizer: Tokenizer, directory: Path, log: Callable[[str], None]) -> None:
    """Write all files of a cache directory."""
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    meta: dict[str, Any] = {"description": corpus.description, "dtype": dtype.name}
    progress = _Progress(log)
    for part, rows in (("train", corpus.train), ("val", corpus.val)):
        with _writing_to(directory.parent):
            file = (directory / f"{part}.bin").open("wb")
        with file:
            meta[f"{part}_bytes"] = _write_ids(
                read_rows(data, rows), corpus.separated, tokenizer, file, dtype, progress
            )
        if not meta[f"{part}_bytes"]:
            name = "text to train on" if part == "train" else "held-out text"
            raise RequestError(f"{corpus.description}: no {name}; use more text, or another data.val_fraction")
    with _writing_to(directory.parent):
        tokenizer.save(directory)
        meta["sizes"] = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
        (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for path in (*directory.iterdir(), directory):
            flush(path)


def _write_ids(
    rows: Iterable[Row],
    separated: bool,
    tokenizer: Tokenizer,
    file: BinaryIO,
    dtype: np.dtype[Any],
    progress: "_Progress",
) -> int:
    """Append the ids of all rows to `file`. Returns the number of UTF-8 bytes of their text."""
    num_bytes = 0
    for group in _groups(rows):
        batch = tokenizer.encode_batch([row["text"] for row in group])
        for ids, row in zip(batch, group, strict=True):
            if separated and row["end"]:
                ids.append(tokenizer.end_id)
            with _writing_to(Path(file.name).parent.parent):
                file.write(np.asarray(ids, dtype=dtype).data)
        group_bytes = sum(_num_bytes(row["text"]) for row in group)
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


class _Progress:
    """A line about every ten seconds of a long preparation."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._num_bytes = 0
        self._started = self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        now = time.monotonic()
        if now - self._last >= LOG_EVERY_S:
            self._last = now
            megabytes = self._num_bytes / 1e6
            self._log(f"preparing: {megabytes:,.0f} MB of text, {megabytes / (now - self._started):.1f} MB/s")


def _publish(temporary: Path, directory: Path) -> TokenizedText:
    """Rename `temporary` to `directory`, unless another process was first and its result is whole."""
    for _ in range(10):
        try:
            temporary.rename(directory)
            flush(directory.parent)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        text = _open(directory)
        if text is not None:
            return text
        if not temporary.exists():
            break
        damaged = _temporary_name(directory)
        with contextlib.suppress(FileNotFoundError):  # another process moves it away at the same time
            directory.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise MinitfError(f"{directory}: what was just written cannot be read back; check the disk")


def _temporary_name(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.{secrets.token_hex(6)}")


def _remove_stale(root: Path) -> None:
    """Remove what killed runs left behind."""
    for path in root.iterdir():
        if not re.fullmatch(r"\.[0-9a-f]{20}\.[0-9a-f]{12}", path.name):
            continue
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if time.time() - newest > STALE_S:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _writing_to(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise MinitfError(
            f"cannot write prepared data to {root}: {reason}; set data.cache_dir to a directory with room to write"
        ) from error


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

    def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch `index` >= 0: (inputs_BT, targets_BT), int64, the targets being the inputs shifted by one."""
        starts = np.empty(self._batch_size, dtype=np.int64)
        row = 0
        while row < self._batch_size:
            epoch, position = divmod(index * self._batch_size + row, self.windows_per_epoch)
            window_starts = self._starts_of(epoch)[position : position + self._batch_size - row]
            starts[row : row + len(window_starts)] = window_starts
            row += len(window_starts)
        windows = torch.from_numpy(self._tokens[starts[:, None] + self._span].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

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
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every target of `tokens` once, in a fixed order: (inputs_BT, targets_BT), int64, of up to `batch_size` rows.

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
        yield inputs_BT, targets_BT
