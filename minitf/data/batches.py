"""Ids on disk, memory-mapped -> batches of inputs and targets, with a position that is one number.

`prepare` turns text into ids once and keeps them; the next start with the same text and tokenizer only maps the files.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from minitf.data.sources.text import Corpus, DataConfig, Row, num_bytes_of, open_corpus
from minitf.data.tokenize import Arrays, Preparation, Source, evenly_sampled, ids_dtype, prepare_once, to_stderr
from minitf.errors import RequestError
from minitf.loss import IGNORED
from minitf.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

Tokens = npt.NDArray[np.unsignedinteger[Any]]


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
    people. Several processes may prepare the same text at once. Interrupted, it goes on where it was the next time.
    Raises RequestError or MinitfError, one line each.
    """
    return prepare_once(TextPreparation(data, tokenizer), tokenizer_from, log)


class TextPreparation(Preparation[Row, TokenizedText]):
    """Text: all ids behind each other, documents ending with a token of their own."""

    files = ("train.bin", "val.bin")

    def open(self) -> Corpus:
        self._corpus = open_corpus(self.data)
        return self._corpus

    def make_tokenizer(self, source: Source[Row]) -> Tokenizer:
        config = self.tokenizer
        train, val = ((row["text"] for row in rows) for rows in (self._corpus.train, self._corpus.val))
        if config.kind != "bpe":
            return train_tokenizer(config, train, val)
        max_bytes = int(config.train_megabytes * 1e6)
        # Reading a stream to its end only to choose a sample would download it twice.
        sample = _first(train, max_bytes) if self.data.streaming else evenly_sampled(train, max_bytes)
        return train_tokenizer(config, sample)

    def measure(self, item: Row) -> tuple[int, int]:
        return num_bytes_of(item["text"]), int(item["end"])

    def encode(self, items: list[Row], tokenizer: Tokenizer) -> tuple[Arrays, dict[str, int]]:
        dtype = ids_dtype(tokenizer)
        parts: dict[str, list[npt.NDArray[Any]]] = {"train": [], "val": []}
        counts = {"train_bytes": 0, "val_bytes": 0, "train_tokens": 0, "val_tokens": 0}
        for ids, row in zip(tokenizer.encode_batch([row["text"] for row in items]), items, strict=True):
            if self._corpus.separated and row["end"]:
                ids.append(tokenizer.end_id)
            part = "val" if row["held_out"] else "train"
            parts[part].append(np.asarray(ids, dtype=dtype))
            counts[f"{part}_bytes"] += num_bytes_of(row["text"])
            counts[f"{part}_tokens"] += len(ids)
        return {f"{part}.bin": np.concatenate([np.empty(0, dtype), *ids]) for part, ids in parts.items()}, counts

    def conclude(self, source: Source[Row], counts: dict[str, int]) -> tuple[dict[str, Any], str]:
        for part, name in (("train", "text to train on"), ("val", "held-out text")):
            if not counts.get(f"{part}_bytes"):
                raise RequestError(f"{source.description}: no {name}; use more text, or another data.val_fraction")
        meta = {name: counts[name] for name in ("train_bytes", "val_bytes")}
        return meta, f"{counts['train_tokens']:,} tokens to train on, {counts['val_tokens']:,} held out"

    def load(self, directory: Path, meta: dict[str, Any]) -> TokenizedText:
        train, val = (np.memmap(directory / name, dtype=meta["dtype"], mode="r") for name in self.files)
        return TokenizedText(
            tokenizer=Tokenizer.load(directory),
            train=train,
            val=val,
            train_bytes=meta["train_bytes"],
            val_bytes=meta["val_bytes"],
            description=meta["description"],
            directory=directory,
        )


def _first(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        yield text
        left -= num_bytes_of(text)
        if left <= 0:
            return


class Batch(NamedTuple):
    """What a step trains on. Targets of -100 do not count.

    `segments_BT` numbers the texts packed into a row: a position sees only its own; None: a row is one text.
    `weights_BT` is what each target counts; None: one.
    """

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    segments_BT: torch.Tensor | None = None
    weights_BT: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; to a GPU the copy goes on while it still computes."""
        if device.type == "cpu":
            return self

        def moved(part: torch.Tensor) -> torch.Tensor:
            return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)

        rest = (None if part is None else moved(part) for part in self[2:])
        return Batch(moved(self.inputs_BT), moved(self.targets_BT), *rest)

    def rows(self, rows: slice) -> tuple["Batch", float]:
        """Some rows of a batch on the CPU, and the share of the targets, by their weights, that they hold."""
        counts_BT = (self.targets_BT != IGNORED).float()
        if self.weights_BT is not None:
            counts_BT *= self.weights_BT
        share = float(counts_BT[rows].sum() / counts_BT.sum().clamp(min=1e-9))
        rest = (None if part is None else part[rows] for part in self[2:])
        return Batch(self.inputs_BT[rows], self.targets_BT[rows], *rest), share

    def pieces(self, most_rows: int) -> Iterator[tuple["Batch", float]]:
        """As few parts of at most so many rows as possible, alike in size, each with its share."""
        num_rows = len(self.inputs_BT)
        if num_rows <= most_rows:
            yield self, 1.0
            return
        size = -(-num_rows // -(-num_rows // most_rows))
        for first in range(0, num_rows, size):
            yield self.rows(slice(first, first + size))


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
