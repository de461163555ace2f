"""The identity of prepared data: equal digests, equal ids."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from minitf.data.config import DataConfig
from minitf.data.sources.books import BOOKS
from minitf.data.sources.files import find_files, kind_of
from minitf.data.sources.tables import TABLES
from minitf.data.sources.text import PIECE_CHARS, TEXT_SUFFIXES
from minitf.errors import RequestError
from minitf.system.files import sha256
from minitf.tokenizer import END_OF_TEXT, Tokenizer, TokenizerConfig

ROWS_VERSION = 2  # raise it when the same source and settings give other rows than before
IDS_VERSION = 1  # raise it when the same rows and tokenizer give other files than before


def fingerprint(config: DataConfig, by_name: bool = False) -> str:
    """The identity of the text or pairs behind `config`, as a hex digest: equal digests, equal rows.

    It is cheap: embedded books are identified by their package's version, local files by their content, hub datasets
    by their settings (a dataset that changes on the hub is noticed only when `hub_revision` changes). `by_name` gives
    the digest of earlier versions, in which a file that was renamed was another text.
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
    identity |= _files(config, by_name)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _files(config: DataConfig, by_name: bool) -> dict[str, Any]:
    """The part of the identity that depends on local files."""
    if config.source != "hub" or config.files:
        paths = _named_files(config)
    elif config.hub_path and Path(config.hub_path).is_dir():
        paths = find_files([config.hub_path]).paths
    else:
        return {}
    tables = [kind_of(path) if kind_of(path) in TABLES else "" for path in paths]
    names = [path.name for path in paths] if by_name else tables
    identity: dict[str, Any] = {"files": [(name, sha256(path)) for name, path in zip(names, paths, strict=True)]}
    if config.kind == "text" and config.source != "hub" and any(tables):
        identity |= {"column": config.text_column} if by_name else {"column": [config.text_column, config.bad_rows]}
    if config.source == "hub" and not config.files and not by_name:
        identity["path"] = ""  # the folder may move
    return identity


def _named_files(config: DataConfig) -> list[Path]:
    return find_files(config.files, TABLES if config.kind == "pairs" else TEXT_SUFFIXES).paths


def is_same_text(config: DataConfig, recorded: str) -> bool:
    """`is_text_of`; also true if the text is gone, as the prepared text may still be in the cache."""
    try:
        return is_text_of(config, recorded)
    except RequestError:
        return True


def is_text_of(config: DataConfig, recorded: str) -> bool:
    """Whether `recorded`, the fingerprint that a run has kept, is that of `config`."""
    return recorded in (fingerprint(config), fingerprint(config, by_name=True))


def check_reading(config: DataConfig, recorded: str) -> None:
    """RequestError unless reading `config` gives the text whose fingerprint is `recorded`."""
    try:
        if recorded == fingerprint(config):
            return
        same_files = recorded == fingerprint(config, by_name=True)
    except RequestError as error:  # not where it was
        raise RequestError(f"{error}; if it has moved, resume the run with data.files=[FILE]") from None
    if not same_files:
        raise RequestError(
            "the text that this run was trained on is not in the cache any more, and its config names another one: if "
            "it has moved, resume the run with data.files=[FILE]"
        )
    if config.source == "files" and any(kind_of(path) in TABLES for path in _named_files(config)):
        raise RequestError(
            "the rows that this run was trained on are no longer in the cache, and tables are read more strictly now"
        )


def cache_key(text: str, config: TokenizerConfig, tokenizer: Tokenizer | None) -> str:
    """The name of the cache entry of the text with fingerprint `text`, tokenized by `tokenizer` or as `config` says."""
    identity: dict[str, Any] = {"format": IDS_VERSION, "text": text}
    if tokenizer is not None:
        identity["tokenizer"] = tokenizer.to_json()
        if tokenizer.end_token != END_OF_TEXT:  # tokenizer.json does not say which it is
            identity["end"] = tokenizer.end_token
        if not tokenizer.is_exact:
            identity["bytes"] = "kept"  # earlier versions counted what the tokenizer loses, too
    else:
        identity["tokenizer"] = [config.kind]
        if config.kind == "bpe":
            identity["tokenizer"] += [config.vocab_size, config.train_megabytes]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
