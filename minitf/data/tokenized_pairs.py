"""Pairs as ids on disk: the ids of all pairs in one long array, and how long each is; tokenized once, then cached.

A pair is `<|source|> prompt <|target|> completion <|endoftext|>`.
"""

import functools
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minitf.data.cache import Builder, Log, Meta, Partial, get_or_build
from minitf.data.config import DataConfig
from minitf.data.losses import describe_losses, losses
from minitf.data.sources.columns import PairReader
from minitf.data.sources.corpus import Item, num_bytes_of
from minitf.data.sources.pairs import open_pairs, pairs_of_file
from minitf.data.sources.tables import LeftOut
from minitf.data.tokenize import Arrays, Counts, Preparation, ids_dtype, to_stderr, tokenize
from minitf.data.tokenized_text import Tokens
from minitf.data.tokenizer_training import load_pretrained
from minitf.errors import RequestError
from minitf.tokenizer import Tokenizer, TokenizerConfig

COLUMNS = ("lengths", "prompts", "bytes")  # int32, one number a pair, as in `PairIds`
FILES = tuple(f"{part}_{name}.bin" for part in ("train", "val") for name in ("ids", *COLUMNS))
Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PairIds:
    """The ids of all pairs, one pair after the other, memory-mapped."""

    ids: Tokens
    starts: npt.NDArray[np.int64]  # of each pair in `ids`, and the end of the last
    prompt_lengths: Lengths  # ids up to and including <|target|>
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
    config: TokenizerConfig,
    tokenizer_from: Tokenizer | None = None,
    log: Log = to_stderr,
    recorded: str = "",
) -> TokenizedPairs:
    """The pairs of `data` as ids, as `prepare` does with text; `tokenizer_from` must be one made for pairs."""
    job = Preparation(data, config, tokenizer_from or load_pretrained(config, for_pairs=True), log, recorded)
    load = functools.partial(_load, tokenizer=job.tokenizer)
    return get_or_build(job.directory, Builder(FILES, functools.partial(_build, job), load), log)


def _build(job: Preparation, partial: Partial) -> tuple[Meta, str]:
    corpus = job.open(open_pairs)
    tokenizer, counts = tokenize(job, corpus, encode_pairs, partial)
    for part, name in (("train", "to train on"), ("val", "held out")):
        if not counts.get(f"{part}_pairs"):
            raise RequestError(f"{corpus.summary}: no pairs {name}; use more pairs, or another data.val_fraction")
    lost = describe_losses(counts)
    meta = {
        "train_pairs": counts["train_pairs"],
        "val_pairs": counts["val_pairs"],
        "description": corpus.summary + lost,
        "dtype": ids_dtype(tokenizer).name,
    }
    return meta, f"{counts['train_pairs']:,} pairs to train on, {counts['val_pairs']:,} held out{lost}"


def read_all_pairs(path: Path, data: DataConfig, tokenizer: Tokenizer) -> PairIds:
    """All pairs in a table as ids, found in its columns as `data` says."""
    items = [Item(texts, held_out=True) for texts in pairs_of_file(path, PairReader(data), LeftOut())]
    if not items:
        raise RequestError(f"{path}: no rows with a pair")
    arrays, _ = encode_pairs(items, tokenizer)
    return _pair_ids(arrays["val_ids.bin"], *(arrays[f"val_{name}.bin"] for name in COLUMNS))


def _load(directory: Path, meta: Meta, tokenizer: Tokenizer | None = None) -> TokenizedPairs:
    train, val = (_load_part(directory, part, meta["dtype"]) for part in ("train", "val"))
    return TokenizedPairs(tokenizer or Tokenizer.load(directory), train, val, meta["description"], directory)


def _load_part(directory: Path, part: str, ids_dtype: str) -> PairIds:
    ids = np.memmap(directory / f"{part}_ids.bin", dtype=ids_dtype, mode="r")
    columns = (np.memmap(directory / f"{part}_{name}.bin", dtype=np.int32, mode="r") for name in COLUMNS)
    return _pair_ids(ids, *columns)


def _pair_ids(ids: Tokens, lengths: Lengths, prompts: Lengths, num_bytes: Lengths) -> PairIds:
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return PairIds(ids, starts, prompts, num_bytes)


def encode_pairs(items: list[Item], tokenizer: Tokenizer) -> tuple[Arrays, Counts]:
    """The ids and lengths of pairs for each file, and counts."""
    prompts = tokenizer.encode_batch([item.texts[0] for item in items])
    completions = tokenizer.encode_batch([item.texts[1] for item in items])
    kept = [
        tuple(tokenizer.kept(text, ids) for text, ids in zip(item.texts, pair, strict=True))
        for item, *pair in zip(items, prompts, completions, strict=True)
    ]
    arrays: Arrays = {}
    counts: Counter[str] = Counter()
    for item, texts in zip(items, kept, strict=True):
        for text, kept_text in zip(item.texts, texts, strict=True):
            counts.update(losses(text, kept_text))
    for part in ("train", "val"):
        rows = [row for row, item in enumerate(items) if item.held_out == (part == "val")]
        marked = [[tokenizer.source_id, *prompts[row], tokenizer.target_id] for row in rows]
        ids = [[*prompt, *completions[row], tokenizer.end_id] for prompt, row in zip(marked, rows, strict=True)]
        flat = itertools.chain.from_iterable(ids)
        arrays[f"{part}_ids.bin"] = np.fromiter(flat, dtype=ids_dtype(tokenizer))
        columns = {
            "lengths": list(map(len, ids)),
            "prompts": list(map(len, marked)),
            "bytes": [num_bytes_of(kept[row][1]) for row in rows],
        }
        arrays |= {f"{part}_{name}.bin": np.asarray(values, np.int32) for name, values in columns.items()}
        counts[f"{part}_pairs"] = len(rows)
    return arrays, counts
