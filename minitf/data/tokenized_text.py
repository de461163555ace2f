"""Text as ids on disk: train and held-out ids, each one long array, memory-mapped; tokenized once, then cached."""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitf.data.cache import Builder, Log, Meta, Partial, get_or_build
from minitf.data.config import DataConfig
from minitf.data.losses import describe_losses, losses
from minitf.data.sources.corpus import Item, num_bytes_of
from minitf.data.sources.files import kind_of
from minitf.data.sources.tables import TABLES
from minitf.data.sources.text import items_of_file, open_text
from minitf.data.tokenize import Arrays, Counts, Preparation, ids_dtype, to_stderr, tokenize
from minitf.data.tokenizer_training import load_pretrained
from minitf.errors import RequestError
from minitf.tokenizer import Tokenizer, TokenizerConfig

FILES = ("train.bin", "val.bin")
Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenizedText:
    """Train and held-out ids, read-only and memory-mapped, with the tokenizer that made them."""

    tokenizer: Tokenizer
    train: Tokens  # 1-D, uint16 where the vocabulary allows, else uint32
    val: Tokens
    train_bytes: int  # UTF-8 bytes of the text that became `train`
    val_bytes: int
    description: str  # of the text, one line for people
    directory: Path


def prepare(
    data: DataConfig,
    config: TokenizerConfig,
    tokenizer_from: Tokenizer | None = None,
    log: Log = to_stderr,
    recorded: str = "",
) -> TokenizedText:
    """The text of `data` as ids, from the cache or tokenized now.

    `tokenizer_from`: use this tokenizer, of an earlier run, instead of the one `config` describes. `recorded`: the
    fingerprint of that run's text, which is taken from the cache even if its files are gone; RequestError if it is not
    there and `data` is another text. `log` gets lines for people. Several processes may prepare the
    same text at once; an interrupted preparation is resumed by the next.
    Raises RequestError or MinitfError, one line each.
    """
    job = Preparation(data, config, tokenizer_from or load_pretrained(config), log, recorded)
    load = functools.partial(_load, tokenizer=job.tokenizer)
    return get_or_build(job.directory, Builder(FILES, functools.partial(_build, job), load), log)


def _build(job: Preparation, partial: Partial) -> tuple[Meta, str]:
    corpus = job.open(open_text)
    encode = functools.partial(encode_text, separated=corpus.separated)
    tokenizer, counts = tokenize(job, corpus, encode, partial)
    for part, name in (("train", "text to train on"), ("val", "held-out text")):
        if not counts.get(f"{part}_bytes"):
            raise RequestError(f"{corpus.summary}: no {name}; use more text, or another data.val_fraction")
    lost = describe_losses(counts)
    meta = {
        "train_bytes": counts["train_bytes"],
        "val_bytes": counts["val_bytes"],
        "dtype": ids_dtype(tokenizer).name,
        "description": corpus.summary + lost,
    }
    return meta, f"{counts['train_tokens']:,} tokens to train on, {counts['val_tokens']:,} held out{lost}"


def read_whole(path: Path, column: str, tokenizer: Tokenizer) -> tuple[Tokens, int]:
    """All text of a file (of a table: in `column`) as ids, as training reads it, and its bytes."""
    items = list(items_of_file(path, column))
    arrays, counts = encode_text(items, tokenizer, separated=kind_of(path) in TABLES)
    return arrays["val.bin"], counts["val_bytes"]


def _load(directory: Path, meta: Meta, tokenizer: Tokenizer | None = None) -> TokenizedText:
    """A complete entry. A given tokenizer is kept: it has what the entry's key leaves out, such as a chat template."""
    train, val = (np.memmap(directory / name, dtype=meta["dtype"], mode="r") for name in FILES)
    sizes = meta["train_bytes"], meta["val_bytes"]
    return TokenizedText(tokenizer or Tokenizer.load(directory), train, val, *sizes, meta["description"], directory)


def encode_text(items: list[Item], tokenizer: Tokenizer, separated: bool) -> tuple[Arrays, Counts]:
    """The ids of `items` for each file, if `separated` with an end-of-text token after each document; and counts.

    Bytes are those of the text that the ids can write: a tokenizer that loses some predicts none of it.
    """
    parts: dict[str, list[int]] = {"train": [], "val": []}
    num_bytes = {"train": 0, "val": 0}
    lost: Counter[str] = Counter()
    for ids, item in zip(tokenizer.encode_batch([item.text for item in items]), items, strict=True):
        part = "val" if item.held_out else "train"
        parts[part] += ids
        if separated and item.end:
            parts[part].append(tokenizer.end_id)
        kept = tokenizer.kept(item.text, ids)
        num_bytes[part] += num_bytes_of(kept)
        lost.update(losses(item.text, kept))
    counts = {f"{part}_tokens": len(ids) for part, ids in parts.items()}
    counts |= {f"{part}_bytes": size for part, size in num_bytes.items()}
    counts |= lost
    arrays = {f"{part}.bin": np.array(ids, dtype=ids_dtype(tokenizer)) for part, ids in parts.items()}
    return arrays, counts
