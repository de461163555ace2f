"""Pairs as ids on disk -> batches of full contexts, several pairs to a row, none of which sees another.

A pair is `<|source|> prompt <|target|> completion <|endoftext|>`; predicting each id but the first from those before
it, it takes one position less than it has ids.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minitf.data.batches import Batch, Tokens
from minitf.data.sources.pairs import Pair, PairCorpus, open_pairs
from minitf.data.sources.text import DataConfig, num_bytes_of
from minitf.data.tokenize import Arrays, Preparation, Source, evenly_sampled, ids_dtype, prepare_once, to_stderr
from minitf.errors import RequestError
from minitf.loss import IGNORED
from minitf.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PairIds:
    """Pairs behind each other as ids, memory-mapped."""

    ids: Tokens
    starts: npt.NDArray[np.int64]  # of each pair in `ids`; one more at the end
    prompt_lengths: Lengths  # ids up to and with <|target|>
    completion_bytes: Lengths  # UTF-8 bytes of the completion

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def pair(self, index: int) -> tuple[Tokens, int]:
        """The ids of one pair and how many of them are the prompt's."""
        return self.ids[self.starts[index] : self.starts[index + 1]], int(self.prompt_lengths[index])

    def texts(self, index: int, tokenizer: Tokenizer) -> tuple[str, str]:
        """Source and target of one pair."""
        ids, prompt_length = self.pair(index)
        return tokenizer.decode(ids[1 : prompt_length - 1].tolist()), tokenizer.decode(ids[prompt_length:-1].tolist())


@dataclass(frozen=True)
class TokenizedPairs:
    """Train and held-out pairs with the tokenizer that made their ids."""

    tokenizer: Tokenizer
    train: PairIds
    val: PairIds
    description: str  # one line for people
    directory: Path


def prepare_pairs(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    tokenizer_from: Tokenizer | None = None,
    log: Callable[[str], None] = to_stderr,
) -> TokenizedPairs:
    """The pairs of `data` as ids, from the cache or made now; as `batches.prepare` does with text.

    `tokenizer_from` must be one made for pairs.
    """
    return prepare_once(PairPreparation(data, tokenizer), tokenizer_from, log)


class PairPreparation(Preparation[Pair, TokenizedPairs]):
    """Pairs: their ids behind each other, and how long each is."""

    files = tuple(f"{part}_{name}.bin" for part in ("train", "val") for name in ("ids", "lengths", "prompts", "bytes"))
    for_pairs = True

    def open(self) -> PairCorpus:
        self._pairs = open_pairs(self.data)
        return self._pairs

    def make_tokenizer(self, source: Source[Pair]) -> Tokenizer:
        config, pairs = self.tokenizer, self._pairs
        train = (f"{pair.prompt}\n{pair.completion}" for pair in pairs if not pair.held_out)
        val = (f"{pair.prompt}\n{pair.completion}" for pair in pairs if pair.held_out)
        texts = evenly_sampled(train, int(config.train_megabytes * 1e6)) if config.kind == "bpe" else train
        return train_tokenizer(config, texts, val, for_pairs=True)

    def measure(self, item: Pair) -> tuple[int, int]:
        return num_bytes_of(item.prompt) + num_bytes_of(item.completion), 1

    def encode(self, items: list[Pair], tokenizer: Tokenizer) -> tuple[Arrays, dict[str, int]]:
        dtype = ids_dtype(tokenizer)
        prompts = tokenizer.encode_batch([pair.prompt for pair in items])
        completions = tokenizer.encode_batch([pair.completion for pair in items])
        arrays: Arrays = {}
        counts = {}
        for part in ("train", "val"):
            rows = [row for row, pair in enumerate(items) if pair.held_out == (part == "val")]
            marked = [[tokenizer.source_id, *prompts[row], tokenizer.target_id] for row in rows]
            ids = [p + completions[row] + [tokenizer.end_id] for p, row in zip(marked, rows, strict=True)]
            arrays[f"{part}_ids.bin"] = np.fromiter((id_ for pair_ids in ids for id_ in pair_ids), dtype=dtype)
            columns = {
                "lengths": list(map(len, ids)),
                "prompts": list(map(len, marked)),
                "bytes": [num_bytes_of(items[row].completion) for row in rows],
            }
            arrays |= {f"{part}_{name}.bin": np.asarray(values, np.int32) for name, values in columns.items()}
            counts[f"{part}_pairs"] = len(rows)
        return arrays, counts

    def conclude(self, source: Source[Pair], counts: dict[str, int]) -> tuple[dict[str, Any], str]:
        for part, name in (("train", "to train on"), ("val", "held out")):
            if not counts.get(f"{part}_pairs"):
                raise RequestError(f"no pairs {name}; use more pairs, or another data.val_fraction")
        num_skipped = self._pairs.num_skipped
        skipped = f", {num_skipped:,} bad rows left out" if num_skipped else ""
        meta = {name: counts[name] for name in ("train_pairs", "val_pairs")}
        words = f"{counts['train_pairs']:,} pairs to train on, {counts['val_pairs']:,} held out{skipped}"
        return {**meta, "description": source.description + skipped}, words

    def load(self, directory: Path, meta: dict[str, Any]) -> TokenizedPairs:
        def load(part: str) -> PairIds:
            def mapped(name: str, dtype: str) -> Any:
                return np.memmap(directory / f"{part}_{name}.bin", dtype=dtype, mode="r")

            lengths, prompts = mapped("lengths", "int32"), mapped("prompts", "int32")
            starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            return PairIds(mapped("ids", meta["dtype"]), starts, prompts, mapped("bytes", "int32"))

        return TokenizedPairs(Tokenizer.load(directory), load("train"), load("val"), meta["description"], directory)


# ---------------------------------------------------------------------------------------------------------------------
# packing


def pack(lengths: Lengths, capacity: int) -> list[tuple[list[int], int]]:
    """How to fill rows of `capacity` positions with pairs of these lengths, each at most the capacity.

    Returns (lengths of the pairs in a row, how many rows are filled so). The longest length left is put down first and
    the longest that still fits beside it again and again (best fit decreasing); the pattern is used as often as there
    are pairs for it, so the work depends on the number of different lengths, not of pairs.
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


class PairBatches:
    """Shuffled training batches of packed pairs; the batch of an index depends on the seed and that index alone.

    Every epoch goes through all pairs once; which pairs share a row, and the order of rows, are drawn anew for each.
    """

    def __init__(self, pairs: PairIds, data: DataConfig, context_length: int, batch_size: int, seed: int) -> None:
        """Raises RequestError when no pair fits into the context."""
        self._pairs, self._data = pairs, data
        self._context_length, self._batch_size = context_length, batch_size
        self._seed = seed % (1 << 64)
        self.lengths, self.report = fit(pairs, context_length, data.long_pairs)
        used = np.flatnonzero(self.lengths)
        # Pairs of one length are interchangeable: kept side by side, an epoch shuffles them among themselves.
        self._by_length = used[np.argsort(self.lengths[used], kind="stable")]
        values, first = np.unique(self.lengths[self._by_length], return_index=True)
        self._bounds = dict(zip(values.tolist(), zip(first, [*first[1:], len(used)], strict=True), strict=True))
        patterns = pack(self.lengths[used], context_length)
        self._patterns = [pattern for pattern, times in patterns for _ in range(times)]
        self.windows_per_epoch = len(self._patterns)
        self.fill = float(self.lengths.sum()) / (self.windows_per_epoch * context_length)
        self._epoch = -1
        self._rows: list[list[int]] = []

    @property
    def tokens_per_epoch(self) -> int:
        """Positions of one epoch, empty ones included."""
        return self.windows_per_epoch * self._context_length

    def batch(self, index: int) -> Batch:
        """Batch `index` >= 0; what is left of a row behind its last pair is a segment of its own, without targets."""
        rows = []
        for row in range(self._batch_size):
            epoch, position = divmod(index * self._batch_size + row, self.windows_per_epoch)
            rows.append(self._rows_of(epoch)[position])
        return packed(self._pairs, self.lengths, rows, self._context_length, self._data.prompt_loss_share)

    def _rows_of(self, epoch: int) -> list[list[int]]:
        """The pairs in each row of `epoch`, in the order in which they are used."""
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            dealt = {
                length: iter(rng.permutation(self._by_length[first:last]).tolist())
                for length, (first, last) in self._bounds.items()
            }
            rows = [[next(dealt[length]) for length in pattern] for pattern in self._patterns]
            self._rows = [rows[row] for row in rng.permutation(len(rows))]
            self._epoch = epoch
        return self._rows


def fit(pairs: PairIds, context_length: int, long_pairs: str) -> tuple[Lengths, str]:
    """The positions each pair takes, 0 for one that is left out, and a line on those that are too long, or ""."""
    lengths = (np.diff(pairs.starts) - 1).astype(np.int32)
    too_long = lengths > context_length
    num_long = int(too_long.sum())
    if long_pairs == "truncate":
        # Of a prompt that fills the context alone nothing would be left to learn.
        lengths = np.where(too_long & (pairs.prompt_lengths <= context_length), context_length, lengths)
        num_dropped = int((lengths > context_length).sum())
    else:
        num_dropped = num_long
    lengths = np.where(lengths > context_length, 0, lengths).astype(np.int32)
    if not lengths.any():
        longest = int(np.diff(pairs.starts).max())
        raise RequestError(
            f"none of {len(pairs):,} pairs fits into model.context_length={context_length}: the longest has {longest} "
            "tokens; set a longer one, or data.long_pairs=truncate"
        )
    parts = [f"{num_dropped:,} left out"] if num_dropped else []
    parts += [f"{num_long - num_dropped:,} cut at the end of the completion"] if num_long > num_dropped else []
    longest = int(np.diff(pairs.starts).max())
    many = f"{num_long:,} of {len(pairs):,} pairs are longer than the context of {context_length} tokens (the longest: "
    return lengths, f"{many}{longest:,}): {', '.join(parts)}" if parts else ""


def packed(
    pairs: PairIds, lengths: Lengths, rows: Sequence[Sequence[int]], context_length: int, prompt_share: float
) -> Batch:
    """The pairs of each row behind each other, cut to `lengths` positions; segments count from 1, the rest is 0."""
    shape = (len(rows), context_length)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    segments, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        start = 0
        for number, index in enumerate(members, start=1):
            ids, prompt_length = pairs.pair(index)
            end, first = start + int(lengths[index]), start + prompt_length - 1
            inputs[row, start:end] = ids[: end - start]
            counted = start if prompt_share else first
            targets[row, counted:end] = ids[counted - start + 1 : end - start + 1]
            segments[row, start:end] = number
            weights[row, start:first], weights[row, first:end] = prompt_share, 1.0
            start = end
    tensors = [torch.from_numpy(part) for part in (inputs, targets, segments)]
    return Batch(tensors[0], tensors[1], tensors[2], torch.from_numpy(weights) if prompt_share else None)


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
