"""Ids of pairs -> batches of full contexts, several pairs to a row, none of which attends to another.

Each id of a pair but the first is predicted from those before it, so a pair takes one position fewer than it has ids.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from minitf.data.batches import Batch, BatchSource
from minitf.data.config import DataConfig
from minitf.data.tokenized_pairs import Lengths, PairIds
from minitf.errors import RequestError
from minitf.loss import IGNORED


def pack(lengths: Lengths, capacity: int) -> list[tuple[list[int], int]]:
    """How to fill rows of `capacity` positions with pairs of these lengths, each at most the capacity.

    Returns patterns: (lengths of the pairs in a row, number of such rows). A row takes the longest pair left, then
    again and again the longest that still fits (best-fit decreasing). Each pattern is used as often as there are pairs
    for it, so the work depends on the number of different lengths, not of pairs.
    """
    left = Counter(lengths.tolist())
    patterns = []
    while left:
        pattern: Counter[int] = Counter()
        room = capacity
        while fitting := [length for length in left if length <= room and left[length] > pattern[length]]:
            pattern[max(fitting)] += 1
            room -= max(fitting)
        times = min(left[length] // count for length, count in pattern.items())
        patterns.append((sorted(pattern.elements(), reverse=True), times))
        left.subtract({length: count * times for length, count in pattern.items()})
        left = +left
    return patterns


class PairBatches(BatchSource):
    """Batches of packed pairs; each epoch draws anew which pairs share a row.

    The rest of a row after its last pair is padding: a separate segment without targets.
    """

    def __init__(self, pairs: PairIds, data: DataConfig, context_length: int, batch_size: int, seed: int) -> None:
        """Raises RequestError when no pair fits into the context."""
        self._pairs = pairs
        self._prompt_share = data.prompt_loss_share
        self.lengths, self.report = fit(pairs, context_length, data.long_pairs)
        used = np.flatnonzero(self.lengths)
        # Pairs of one length are interchangeable: an epoch shuffles them among themselves.
        by_length = used[np.argsort(self.lengths[used], kind="stable")]
        values, first = np.unique(self.lengths[by_length], return_index=True)
        self._by_length = dict(zip(values.tolist(), np.split(by_length, first[1:]), strict=True))
        patterns = pack(self.lengths[used], context_length)
        self._patterns = [pattern for pattern, times in patterns for _ in range(times)]
        super().__init__(context_length, batch_size, seed, windows_per_epoch=len(self._patterns))
        self.fill = float(self.lengths.sum()) / self.tokens_per_epoch

    def _shuffled(self, rng: np.random.Generator) -> Sequence[list[int]]:
        """The pairs of each row."""
        drawn = {length: iter(rng.permutation(pairs).tolist()) for length, pairs in self._by_length.items()}
        rows = [[next(drawn[length]) for length in pattern] for pattern in self._patterns]
        return [rows[row] for row in rng.permutation(len(rows))]

    def _batch_of(self, windows: Sequence[list[int]]) -> Batch:
        return packed(self._pairs, self.lengths, windows, self.context_length, self._prompt_share)


def fit(pairs: PairIds, context_length: int, long_pairs: str) -> tuple[Lengths, str]:
    """The positions each pair takes, 0 for one that is left out, and a line on those that are too long, or ""."""
    lengths = (np.diff(pairs.starts) - 1).astype(np.int32)
    longest = int(lengths.max()) + 1
    too_long = lengths > context_length
    num_long = int(too_long.sum())
    if long_pairs == "truncate":  # but not where the prompt alone fills the context: nothing would be left to learn
        lengths[too_long & (pairs.prompt_lengths <= context_length)] = context_length
    dropped = lengths > context_length
    num_dropped = int(dropped.sum())
    lengths[dropped] = 0
    if not lengths.any():
        raise RequestError(
            f"none of {len(pairs):,} pairs fits into model.context_length={context_length}: the longest has {longest} "
            "tokens; set a longer one, or data.long_pairs=truncate"
        )
    if not num_long:
        return lengths, ""
    parts = [f"{num_dropped:,} left out"] if num_dropped else []
    parts += [f"{num_long - num_dropped:,} cut at the end of the completion"] if num_long > num_dropped else []
    return lengths, (
        f"{num_long:,} of {len(pairs):,} pairs are longer than the context of {context_length} tokens (the longest: "
        f"{longest:,}): {', '.join(parts)}"
    )


def packed(
    pairs: PairIds, lengths: Lengths, rows: Sequence[Sequence[int]], context_length: int, prompt_share: float
) -> Batch:
    """The pairs of each row one after the other, cut to `lengths` positions; segments count from 1, the rest is 0."""
    shape = (len(rows), context_length)
    inputs = np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    segments = np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        start = 0
        for number, index in enumerate(members, start=1):
            ids, prompt_length = pairs.pair(index)
            end = start + int(lengths[index])
            first = start + prompt_length - 1  # the position whose target is the first of the completion
            inputs[row, start:end] = ids[: end - start]
            counted = start if prompt_share else first
            targets[row, counted:end] = ids[counted - start + 1 : end - start + 1]
            segments[row, start:end] = number
            weights[row, start:first] = prompt_share
            weights[row, first:end] = 1.0
            start = end
    inputs_BT, targets_BT, segments_BT = (torch.from_numpy(array) for array in (inputs, targets, segments))
    return Batch(inputs_BT, targets_BT, segments_BT, torch.from_numpy(weights) if prompt_share else None)


def held_out_pairs(
    pairs: PairIds, lengths: Lengths, indices: Sequence[int], context_length: int, batch_size: int
) -> Iterator[Batch]:
    """The pairs of these `indices` (of `lengths` above 0), packed in order, in batches of up to `batch_size` rows."""
    rows: list[list[int]] = []
    room = 0
    for index in indices:
        if lengths[index] > room:
            rows.append([])
            room = context_length
        rows[-1].append(index)
        room -= int(lengths[index])
    for first in range(0, len(rows), batch_size):
        yield packed(pairs, lengths, rows[first : first + batch_size], context_length, 0.0)
