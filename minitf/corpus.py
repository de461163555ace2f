"""Where text comes from: embedded books, local files, the Hugging Face hub -> rows of text, train and held-out.

Every source becomes two `datasets` objects whose rows are pieces of documents of bounded size, so that text of any
length is read in bounded memory: a 2 GB file, also one without a single newline.
"""

import codecs
import glob
import hashlib
import importlib.metadata
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from minitf import formats
from minitf.books import BOOKS, book_chapters
from minitf.errors import MinitfError, RequestError
from minitf.exercises import EXERCISES, MOST_PAIRS

FORMAT_VERSION = 2  # raise it when the same source and settings give other rows than before
PIECE_CHARS = 1 << 17  # the longest text of a row
READ_BYTES = 1 << 20
TEXT_SUFFIXES = (*formats.PLAIN, *formats.TABLES)
PAIR_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass
class DataConfig:
    """What to train on, and which part of it is held out."""

    kind: str = "text"  # text: predict the next token everywhere; pairs: turn one text into another
    source: str = "kjv"  # text: kjv, web (embedded), files, hub; pairs: kjv_to_web, an exercise, files, hub
    files: list[str] = field(
        default_factory=list
    )  # for source=files: files, globs, folders; text or tables by extension
    hub_path: str | None = None  # dataset on the Hugging Face hub, or a folder, or json, csv, parquet with data.files
    hub_name: str | None = None  # configuration of that dataset, e.g. wikitext-2-raw-v1
    hub_split: str = "train"  # split to train on
    hub_val_split: str | None = None  # split held out; null: every k-th document of hub_split, by val_fraction
    hub_revision: str | None = None  # commit or tag of the dataset; null: the newest
    text_column: str = "text"  # column holding the text
    prompt_column: str | None = None  # pairs: column of the text to start from; null: found by the usual names
    completion_column: str | None = None  # pairs: column of the text to come to; null: found by the usual names
    prompt_loss_share: float = 0.0  # pairs: what a token of the prompt counts in the loss; one of the completion is 1
    long_pairs: str = "drop"  # pairs longer than the context: drop | truncate (the end of the completion goes)
    bad_rows: str = "error"  # rows that are no pair: error (stop and say which) | skip (and count them)
    num_pairs: int = 50_000  # pairs made for an exercise (copy, reverse, sort, addition)
    rows_are_documents: bool = True  # false: rows are consecutive lines of one text, nothing marks their ends
    val_fraction: float = 0.1  # share held out, of documents, or of a single file's characters: its end
    streaming: bool = False  # read the hub while preparing instead of downloading everything first
    max_documents: int | None = None  # use the first so many documents only; null: all
    probes: list[str] = field(default_factory=list)  # sentences whose attention is logged, beside the general ones
    cache_dir: str | None = None  # where prepared data is kept; null: $MINITF_CACHE, else ~/.cache/minitf

    def __post_init__(self) -> None:
        sources = {"text": [*BOOKS], "pairs": ["kjv_to_web", *EXERCISES]}
        if self.kind not in sources:
            raise RequestError(f"data.kind={self.kind} is not known; use text or pairs")
        known = [*sources[self.kind], "files", "hub"]
        if self.source not in known:
            raise RequestError(
                f"data.source={self.source} is not known for data.kind={self.kind}; one of {', '.join(known)}"
            )
        for name, allowed in (("long_pairs", ("drop", "truncate")), ("bad_rows", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise RequestError(f"data.{name}={getattr(self, name)} must be {' or '.join(allowed)}")
        if not 0 <= self.prompt_loss_share <= 1:
            raise RequestError(f"data.prompt_loss_share={self.prompt_loss_share} must be between 0 and 1")
        if not 2 <= self.num_pairs <= MOST_PAIRS:
            raise RequestError(f"data.num_pairs={self.num_pairs} must be between 2 and {MOST_PAIRS:,}")
        if self.source == "files" and not self.files:
            raise RequestError("data.files is empty; name files, globs or folders, e.g. data.files=[book.txt]")
        if self.source == "hub" and not self.hub_path:
            raise RequestError("data.hub_path is empty; name a dataset, e.g. data.hub_path=roneneldan/TinyStories")
        if not 0 < self.val_fraction <= 0.5:
            raise RequestError(f"data.val_fraction={self.val_fraction} must be above 0 and at most 0.5")
        if self.max_documents is not None and self.max_documents < 1:
            raise RequestError(f"data.max_documents={self.max_documents} must be at least 1, or null for all")


class Row(TypedDict):
    """A piece of a document; `end` says that the document ends with it."""

    text: str
    end: bool


@dataclass(frozen=True)
class Corpus:
    """Two `datasets` objects (`Dataset` or `IterableDataset`) of rows, to be read with `read_rows`."""

    train: Iterable[Row]
    val: Iterable[Row]
    description: str  # one line for people
    separated: bool  # several documents, whose ends are to be marked


def open_corpus(config: DataConfig) -> Corpus:
    """Open the text that `config` describes. Raises RequestError or MinitfError, one line each."""
    if config.source in BOOKS:
        return _open_book(config)
    return _open_files(config) if config.source == "files" else _open_hub(config)


def read_rows(config: DataConfig, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of one split; what a hub dataset raises while it is being read becomes one line."""
    try:
        yield from rows
    except MinitfError:
        raise
    except Exception as error:
        if config.source != "hub":
            raise
        raise hub_error(config, error) from error


def fingerprint(config: DataConfig) -> str:
    """The identity of the text behind `config`, as a hex digest: equal digests, equal rows.

    Cheap: embedded books are named by their package's version, local files by their content, hub datasets by their
    settings (a dataset that changes on the hub is noticed only when `hub_revision` changes).
    """
    identity: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "piece": PIECE_CHARS,
        "source": config.source,
        "val_fraction": config.val_fraction,
        "max_documents": config.max_documents,
    }
    if config.kind == "pairs":
        identity |= {"pairs": [config.prompt_column, config.completion_column, config.bad_rows, config.num_pairs]}
    for book in BOOKS:
        if book in config.source.split("_"):
            identity[book] = importlib.metadata.version(f"pythonbible-{book}")
    if config.source == "hub":
        names = ("path", "name", "split", "val_split", "revision")
        identity |= {name: getattr(config, f"hub_{name}") for name in names}
        identity |= {"column": config.text_column, "rows_are_documents": config.rows_are_documents}
    if config.source != "hub" or config.files:
        suffixes = PAIR_SUFFIXES if config.kind == "pairs" else TEXT_SUFFIXES
        files = find_files(config.files, suffixes)
        identity["files"] = [(path.name, _sha256(path)) for path in files]
        if config.kind == "text" and any(formats.kind_of(path) in formats.TABLES for path in files):
            identity["column"] = config.text_column
    elif config.hub_path and Path(config.hub_path).is_dir():
        folder = sorted(path for path in Path(config.hub_path).rglob("*") if path.is_file())
        identity["files"] = [(path.name, _sha256(path)) for path in folder]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_held_out(index: int, val_fraction: float) -> bool:
    """Whether document `index` is held out: evenly spread, for 0.1 every tenth (9, 19, 29, ...)."""
    return math.floor((index + 1) * val_fraction + 1e-9) > math.floor(index * val_fraction + 1e-9)


def _split_documents(num_documents: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the train and the held-out documents, at least one in each."""
    val = [index for index in range(num_documents) if is_held_out(index, val_fraction)] or [num_documents - 1]
    held_out = set(val)
    return [index for index in range(num_documents) if index not in held_out], val


def every(val_fraction: float) -> str:
    """ "every tenth", or "20% of them": how documents are held out, in words."""
    return "every tenth" if val_fraction == 0.1 else f"{val_fraction:.3g} of them"


# Embedded books


def _open_book(config: DataConfig) -> Corpus:
    import datasets

    chapters = book_chapters(config.source)[: config.max_documents]
    if len(chapters) < 2:
        raise RequestError(
            f"data.max_documents={config.max_documents} must be at least 2: one to train on, one held out"
        )
    splits = _split_documents(len(chapters), config.val_fraction)
    train, val = (
        datasets.Dataset.from_dict({"text": [chapters[i] for i in indices], "end": [True] * len(indices)})
        for indices in splits
    )
    description = f"{BOOKS[config.source]}, {len(chapters):,} chapters, {every(config.val_fraction)} held out"
    return Corpus(train, val, description, separated=True)


# Local files


def _open_files(config: DataConfig) -> Corpus:
    paths = [path for path in find_files(config.files) if path.stat().st_size > 0]
    if any(formats.kind_of(path) in formats.TABLES for path in paths):
        return _open_tables(config, paths)
    paths = paths[: config.max_documents]
    if not paths:
        raise RequestError(f"data.files={config.files}: the files are empty; name files with text")
    if len(paths) > 1:
        splits = _split_documents(len(paths), config.val_fraction)
        train, val = (_stream(_documents, paths=tuple(str(paths[i]) for i in split)) for split in splits)
        description = f"{len(paths):,} files, {every(config.val_fraction)} held out"
        return Corpus(train, val, description, separated=True)
    path = paths[0]
    num_chars = sum(len(text) for text in read_text(path))
    num_train = int(num_chars * (1 - config.val_fraction))
    if num_train == 0:
        raise RequestError(f"{path}: {num_chars} characters are too few to train on")
    train, val = (_stream(_span, path=str(path), start=a, end=b) for a, b in ((0, num_train), (num_train, num_chars)))
    description = f"{path.name}, {num_chars:,} characters, the last {config.val_fraction:.0%} held out"
    return Corpus(train, val, description, separated=False)


def _open_tables(config: DataConfig, paths: list[Path]) -> Corpus:
    """Tables, whose rows are documents, and perhaps other files, each of which is one."""
    names = tuple(str(path) for path in paths)
    count = sum(1 for _ in _read_documents(names, config.text_column, config.max_documents))
    if count < 2:
        raise RequestError(f"data.files={config.files}: {count} documents are too few: one to train on, one held out")
    share = max(config.val_fraction, 1 / count)
    train, val = (
        _stream(
            _documents_of_tables, names=names, column=config.text_column, most=config.max_documents, share=share,
            held_out=held_out,
        )
        for held_out in (False, True)
    )  # fmt: skip
    description = f"{count:,} documents of {len(paths):,} files, {every(config.val_fraction)} held out"
    return Corpus(train, val, description, separated=True)


def _read_documents(names: tuple[str, ...], column: str, most: int | None) -> Iterator[Iterable[str]]:
    """The chunks of each document, at most so many."""
    found = (
        document
        for path in map(Path, names)
        for document in (
            ([text] for text in formats.documents(path, column))
            if formats.kind_of(path) in formats.TABLES
            else [read_text(path)]
        )
    )
    return itertools.islice(found, most)


def _documents_of_tables(
    names: tuple[str, ...], column: str, most: int | None, share: float, held_out: bool
) -> Iterator[Row]:
    for index, chunks in enumerate(_read_documents(names, column, most)):
        if is_held_out(index, share) == held_out:
            yield from _rows(chunks)


def find_files(entries: list[str], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Path]:
    """The files that files, globs and folders (their files with `suffixes`) name, in that order, each once."""
    found: dict[Path, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if formats.kind_of(p) in suffixes and p.is_file())
            if not inside:
                raise RequestError(
                    f"data.files: no {' or '.join(suffixes)} file in {entry}; name the files, e.g. '{entry}/*.log'"
                )
        elif path.exists():
            inside = [path]
        else:
            inside = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not inside:
                raise RequestError(f"data.files: {entry} does not exist; check the path (relative to {Path.cwd()})")
        found |= dict.fromkeys(inside)
    return list(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stream(rows: Callable[..., Iterator[Row]], **arguments: Any) -> Iterable[Row]:
    import datasets

    dataset: Iterable[Row] = datasets.IterableDataset.from_generator(rows, gen_kwargs=arguments)
    return dataset


def _documents(paths: tuple[str, ...]) -> Iterator[Row]:
    for path in paths:
        yield from _rows(read_text(Path(path)))


def _span(path: str, start: int, end: int) -> Iterator[Row]:
    """Rows of the characters `start` to `end` of one file."""

    def chunks() -> Iterator[str]:
        position = 0
        for text in read_text(Path(path)):
            if position + len(text) > start:
                yield text[max(0, start - position) : end - position]
            position += len(text)
            if position >= end:
                return

    return _rows(chunks())


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in chunks of at most a million characters, newlines as they are, without a BOM."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with formats.open_bytes(path) as file:
        while True:
            try:
                data = file.read(READ_BYTES)
            except (EOFError, OSError) as error:
                if path.suffix.lower() not in formats.COMPRESSED:
                    raise
                raise RequestError(f"{path}: damaged: {error}") from None
            if (nul := data.find(b"\0")) >= 0:
                raise RequestError(f"{path}: not a text file (NUL at byte {offset + nul}); data.files takes UTF-8 text")
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = offset + len(data) - len(error.object) + error.start  # it also holds bytes of the read before
                raise RequestError(f"{path}: invalid UTF-8 at byte {at}; convert the file to UTF-8 first") from None
            offset += len(data)
            if text:
                yield text
            if not data:
                return


def _rows(chunks: Iterable[str]) -> Iterator[Row]:
    """One document as rows."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE_CHARS:
            cut = _cut(rest)
            yield {"text": rest[:cut], "end": False}
            rest = rest[cut:]
    yield {"text": rest, "end": True}


def _cut(text: str) -> int:
    """Where to cut off a first piece of at most PIECE_CHARS from a longer text.

    GPT-2's pre-tokenizer always splits after a newline or before a space that stands alone between two other
    characters, so cutting there gives the ids of the uncut text; only text without either is cut elsewhere.
    """
    for whitespace, width in (("\n", 1), (" ", 0)):
        at = PIECE_CHARS
        while (at := text.rfind(whitespace, PIECE_CHARS // 2, at)) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + width
    spaces = re.search(r"\s\S*$", text[PIECE_CHARS // 2 : PIECE_CHARS])
    return PIECE_CHARS // 2 + spaces.start() + 1 if spaces else PIECE_CHARS


# The Hugging Face hub


def _open_hub(config: DataConfig) -> Corpus:
    rows, num_rows = _load_texts(config, config.hub_split)
    if config.hub_val_split is not None:
        train, (val, _) = rows, _load_texts(config, config.hub_val_split)
        held_out = f"split {config.hub_val_split}"
    else:
        if num_rows == 1:
            raise RequestError(f"{config.hub_path} has one document; name a split to hold out with data.hub_val_split")
        share = max(config.val_fraction, 1 / num_rows) if num_rows else config.val_fraction
        train = rows.filter(lambda _, index: not is_held_out(index, share), with_indices=True)
        val = rows.filter(lambda _, index: is_held_out(index, share), with_indices=True)
        held_out = every(config.val_fraction)
    count = f", {num_rows:,} rows" if num_rows else ""
    return Corpus(
        _hub_rows(config, train),
        _hub_rows(config, val),
        f"{config.hub_path}{f' ({config.hub_name})' if config.hub_name else ''}{count}, {held_out} held out",
        separated=config.rows_are_documents and num_rows != 1,
    )


def load_hub(config: DataConfig, split: str) -> tuple[Any, int | None]:
    """An `IterableDataset` of at most `max_documents` rows, and their number, None when streaming."""
    import datasets
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its lines about each retry; what matters is said in ours
    options: dict[str, Any] = {"revision": config.hub_revision, "streaming": config.streaming}
    if config.files:
        options["data_files"] = [str(path) for path in find_files(config.files)]
    if config.hub_path == "text":
        options["sample_by"] = "document"  # its default drops the newlines
    try:
        rows = datasets.load_dataset(config.hub_path, config.hub_name, split=split, **options)
    except Exception as error:
        raise hub_error(config, error) from error
    if config.max_documents is not None:
        rows = rows.take(config.max_documents)
    # Mapping and filtering an IterableDataset is lazy; of a Dataset it would write another copy of the text to disk.
    return (rows, None) if config.streaming else (rows.to_iterable_dataset(), len(rows))


def _load_texts(config: DataConfig, split: str) -> tuple[Any, int | None]:
    """`load_hub`, the text column only."""
    rows, num_rows = load_hub(config, split)
    try:
        columns = rows.column_names or list(next(iter(rows)))
    except Exception as error:
        raise hub_error(config, error) from error
    if config.text_column not in columns:
        known = ", ".join(columns)
        raise RequestError(
            f"{config.hub_path} has no column {config.text_column!r}; set data.text_column, one of: {known}"
        )
    return rows.select_columns([config.text_column]), num_rows


def _hub_rows(config: DataConfig, documents: Any) -> Iterable[Row]:
    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [text for text in batch[config.text_column] if text is not None]
        for value in texts:
            if not isinstance(value, str):
                kind = type(value).__name__
                raise RequestError(f"{config.hub_path}: column {config.text_column} holds {kind}; set data.text_column")
        rows = [row for text in texts if text for row in _rows([text])]
        ends = [row["end"] and config.rows_are_documents for row in rows]
        return {"text": [row["text"] for row in rows], "end": ends}

    rows: Iterable[Row] = documents.map(cut, batched=True, batch_size=64, remove_columns=[config.text_column])
    return rows


def hub_error(config: DataConfig, error: Exception) -> MinitfError:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    # By name: the hub's client has changed its HTTP library, and importing either to name its errors is slow.
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if names & {"ConnectionError", "TimeoutError", "TransportError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return MinitfError(
            f"cannot reach the Hugging Face hub for {config.hub_path}; data=kjv and data=web work offline"
        )
    told: BaseException = error
    while told.__cause__ is not None and str(told.__cause__).strip():  # "An error occurred ...": the cause tells which
        told = told.__cause__
    reason = str(told).strip().splitlines()[0].rstrip(".") if str(told).strip() else type(error).__name__
    return RequestError(
        f"cannot load {config.hub_path}: {reason}; check data.hub_path, data.hub_name and data.hub_split"
    )
