"""Ids -> batches of inputs and targets, shuffled; the position of a run in its data is one number."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minitf.data.tokenized_text import Tokens
from minitf.errors import RequestError
from minitf.loss import IGNORED

EVALUATION_TOKENS = 4096  # of a batch without gradients


class Batch(NamedTuple):
    """Inputs and targets of a step. Targets of -100 (`IGNORED`) do not count.

    `segments_BT` numbers the texts packed into a row, each attending only to itself; None: a row is one text.
    `weights_BT` weighs each target's loss; None: all alike.
    """

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    segments_BT: torch.Tensor | None = None
    weights_BT: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the copy to a GPU overlaps with its computation."""
        if device.type == "cpu":
            return self

        def moved(part: torch.Tensor) -> torch.Tensor:
            return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)

        rest = (None if part is None else moved(part) for part in self[2:])
        return Batch(moved(self.inputs_BT), moved(self.targets_BT), *rest)

    def rows(self, rows: slice) -> tuple["Batch", float]:
        """Some rows of a batch on the CPU, and their share of all targets, weighted."""
        counts_BT = (self.targets_BT != IGNORED).float()
        if self.weights_BT is not None:
            counts_BT *= self.weights_BT
        share = float(counts_BT[rows].sum() / counts_BT.sum().clamp(min=1e-9))
        rest = (None if part is None else part[rows] for part in self[2:])
        return Batch(self.inputs_BT[rows], self.targets_BT[rows], *rest), share

    def micro_batches(self, max_rows: int) -> Iterator[tuple["Batch", float]]:
        """The fewest parts of at most `max_rows` rows, of similar size, each with its share of all targets."""
        num_rows = len(self.inputs_BT)
        if num_rows <= max_rows:
            yield self, 1.0
            return
        size = -(-num_rows // -(-num_rows // max_rows))
        for first in range(0, num_rows, size):
            yield self.rows(slice(first, first + size))


class BatchSource(ABC):
    """Shuffled training batches; a batch depends on nothing but the seed and its index.

    Each epoch takes every window (the content of a row) once, in a new order. A run is therefore resumed by its number
    of batches alone.
    """

    def __init__(self, context_length: int, batch_size: int, seed: int, windows_per_epoch: int) -> None:
        self.context_length = context_length
        self.windows_per_epoch = windows_per_epoch
        self._batch_size = batch_size
        self._seed = seed % (1 << 64)
        self._epoch = -1
        self._windows: Any = ()

    @property
    def tokens_per_epoch(self) -> int:
        """Positions of one epoch, empty ones included."""
        return self.windows_per_epoch * self.context_length

    def batch(self, index: int) -> Batch:
        """Batch `index` >= 0, the same one at every call."""
        windows: list[Any] = []
        while (missing := self._batch_size - len(windows)) > 0:
            epoch, position = divmod(index * self._batch_size + len(windows), self.windows_per_epoch)
            if epoch != self._epoch:
                self._windows = self._shuffled(np.random.default_rng((self._seed, epoch)))
                self._epoch = epoch
            windows.extend(self._windows[position : position + missing])
        return self._batch_of(windows)

    @abstractmethod
    def _shuffled(self, rng: np.random.Generator) -> Any:
        """A sequence of all windows, in a new order."""

    @abstractmethod
    def _batch_of(self, windows: Sequence[Any]) -> Batch:
        """The batch with these windows as its rows."""


class Batches(BatchSource):
    """Batches of text; each epoch cuts it into windows of a full context from a new offset."""

    def __init__(
        self, tokens: Tokens, context_length: int, batch_size: int, seed: int, document_end: int | None = None
    ) -> None:
        """`tokens` is 1-D. Raises RequestError when it is shorter than one window and its targets.

        Attention stays inside a document if `document_end`, the token at the end of each, is given.
        """
        if len(tokens) <= context_length:
            raise RequestError(
                f"the text to train on has {len(tokens):,} tokens, but one context and its targets need "
                f"{context_length + 1:,}; use more text or a smaller model.context_length"
            )
        # The same in all epochs: the rest leaves room for offsets of at least one whole window.
        windows_per_epoch = max(1, (len(tokens) - context_length) // context_length)
        super().__init__(context_length, batch_size, seed, windows_per_epoch)
        self._tokens = np.asarray(tokens)  # indexing a memmap object itself is slower
        self._span = np.arange(context_length + 1)
        self._document_end = document_end

    def _shuffled(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The starts of all windows."""
        offset = int(rng.integers(len(self._tokens) - self.windows_per_epoch * self.context_length))
        return offset + self.context_length * rng.permutation(self.windows_per_epoch)

    def _batch_of(self, windows: Sequence[Any]) -> Batch:
        """Int64, the targets being the inputs shifted by one."""
        starts = np.asarray(windows, dtype=np.int64)
        ids = torch.from_numpy(self._tokens[starts[:, None] + self._span].astype(np.int64))
        inputs_BT = ids[:, :-1].contiguous()
        return Batch(inputs_BT, ids[:, 1:].contiguous(), document_segments(inputs_BT, self._document_end))


def document_segments(inputs_BT: torch.Tensor, document_end: int | None) -> torch.Tensor | None:
    """The number of each token's document in its row, from 1; None without a `document_end`."""
    if document_end is None:
        return None
    ends_BT = (inputs_BT == document_end).int()
    return (1 + ends_BT.cumsum(-1) - ends_BT).int()


def evenly_spaced(total: int, count: int | None = None) -> npt.NDArray[np.int64]:
    """`count` evenly spaced indices below `total`; all of them where `count` is None or larger."""
    taken = total if count is None else min(count, total)
    return np.arange(taken, dtype=np.int64) * total // max(taken, 1)


def evaluation_batch_size(context_length: int) -> int:
    """Rows of a batch that is evaluated without gradients."""
    return max(1, EVALUATION_TOKENS // context_length)


def held_out_batches(
    tokens: Tokens,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    document_end: int | None = None,
) -> Iterator[Batch]:
    """Every target of `tokens` once, in a fixed order, int64, in batches of up to `batch_size` rows.

    The windows do not overlap; the last one is padded with targets of -100. `max_tokens` takes evenly spaced windows
    with about that many targets instead. `document_end` as in `Batches`. Raises RequestError when there is no target.
    """
    if len(tokens) < 2:
        raise RequestError(f"the held-out text has {len(tokens)} tokens, too few to predict any; use more text")
    num_windows = -(-(len(tokens) - 1) // context_length)
    max_windows = None if max_tokens is None else max(1, max_tokens // context_length)
    windows = evenly_spaced(num_windows, max_windows).tolist()
    for first in range(0, len(windows), batch_size):
        rows = windows[first : first + batch_size]
        inputs_BT = torch.zeros(len(rows), context_length, dtype=torch.int64)
        targets_BT = torch.full((len(rows), context_length), IGNORED, dtype=torch.int64)
        for row, window in enumerate(rows):
            start = window * context_length
            ids = torch.from_numpy(tokens[start : start + context_length + 1].astype(np.int64))
            inputs_BT[row, : len(ids) - 1] = ids[:-1]
            targets_BT[row, : len(ids) - 1] = ids[1:]
        yield Batch(inputs_BT, targets_BT, document_segments(inputs_BT, document_end))
