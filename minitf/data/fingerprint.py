"""The identity of prepared data: equal digests, equal ids."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from minitf.data.config import DataConfig
from minitf.data.sources.books import BOOKS
from minitf.data.sources.files import find_files, kind_of
from minitf.data.sources.tables import PAIR_TABLES, TEXT_TABLES
from minitf.data.sources.text import PIECE_CHARS, TEXT_SUFFIXES
from minitf.system.files import sha256
from minitf.tokenizer import END_OF_TEXT, Tokenizer, TokenizerConfig

ROWS_VERSION = 2  # raise it when the same source and settings give other rows than before
IDS_VERSION = 1  # raise it when the same rows and tokenizer give other files than before


def fingerprint(config: DataConfig) -> str:
    """The identity of the text or pairs behind `config`, as a hex digest: equal digests, equal rows.

    It is cheap: embedded books are identified by their package's version, local files by their content, hub datasets
    by their settings (a dataset that changes on the hub is noticed only when `hub_revision` changes).
    """
    identity: dict[str, Any] = {
        "format": ROWS_VERSION,
        "piece": PIECE_CHARS,
        "source": config.source,
        "val_fraction": config.val_fraction,
        "max_documents": config.max_documents,
    }
    if config.kind == "pairs":
        identity |= {"pairs": [config.prompt_column, config.completion_column, config.bad_rows, config.num_pairs]}
    if config.language != "en":
        identity["language"] = config.language
    for book in BOOKS:
        if book in config.source.split("_"):
            identity[book] = importlib.metadata.version(f"pythonbible-{book}")
    if config.source == "hub":
        names = ("path", "name", "split", "val_split", "revision")
        identity |= {name: getattr(config, f"hub_{name}") for name in names}
        identity |= {"column": config.text_column, "rows_are_documents": config.rows_are_documents}
        if config.shuffle_buffer:
            identity |= {"shuffled": [config.shuffle_buffer, config.shuffle_seed, config.streaming]}
    if config.source != "hub" or config.files:
        files = find_files(config.files, PAIR_TABLES if config.kind == "pairs" else TEXT_SUFFIXES)
        identity["files"] = [(path.name, sha256(path)) for path in files]
        if config.kind == "text" and any(kind_of(path) in TEXT_TABLES for path in files):
            identity["column"] = config.text_column
    elif config.hub_path and Path(config.hub_path).is_dir():
        folder = sorted(path for path in Path(config.hub_path).rglob("*") if path.is_file())
        identity["files"] = [(path.name, sha256(path)) for path in folder]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def cache_key(data: DataConfig, config: TokenizerConfig, tokenizer: Tokenizer | None) -> str:
    """The name of the cache entry of `data`, tokenized by `tokenizer`, or by one trained on it as `config` says."""
    identity: dict[str, Any] = {"format": IDS_VERSION, "text": fingerprint(data)}
    if tokenizer is not None:
        identity["tokenizer"] = tokenizer.to_json()
        if tokenizer.end_token != END_OF_TEXT:  # tokenizer.json does not say which it is
            identity["end"] = tokenizer.end_token
    else:
        identity["tokenizer"] = [config.kind]
        if config.kind == "bpe":
            identity["tokenizer"] += [config.vocab_size, config.train_megabytes]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
