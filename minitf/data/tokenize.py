"""Items of a corpus -> ids appended to files, in parallel: it shows its progress and resumes where it was stopped."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitf.data.cache import Log, Partial, naming_write_errors
from minitf.data.config import DataConfig
from minitf.data.fingerprint import cache_key
from minitf.data.progress import Progress, amount_done
from minitf.data.resumable import ResumableIterator
from minitf.data.sources.corpus import Corpus, Item
from minitf.errors import MinitfError, RequestError
from minitf.system.files import cache_root
from minitf.tokenizer import Tokenizer, TokenizerConfig

GROUP_BYTES = 1 << 21  # text encoded at once, in parallel by items; bounds the memory
GROUP_ITEMS = 4096
SAVE_EVERY_S = 5.0

Arrays = dict[str, npt.NDArray[Any]]  # by the name of the file they are appended to
Encode = Callable[[list[Item], Tokenizer], tuple[Arrays, dict[str, int]]]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def entry_directory(data: DataConfig, config: TokenizerConfig, tokenizer: Tokenizer | None) -> Path:
    """The cache entry of `data` tokenized by `tokenizer`, or, if that is None, by the one `config` describes."""
    root = cache_root(data.cache_dir)
    trained = root / cache_key(data, config, None)
    if tokenizer is None:
        return trained
    with contextlib.suppress(MinitfError, OSError):
        if Tokenizer.load(trained).to_json() == tokenizer.to_json():  # it was trained on this very text
            return trained
    return root / cache_key(data, config, tokenizer)


def tokenize(
    corpus: Corpus, make_tokenizer: Callable[[], Tokenizer], encode: Encode, partial: Partial, log: Log
) -> tuple[Tokenizer, dict[str, int]]:
    """Fill the files of `partial`, and its tokenizer's, from where they are.

    `encode` returns the arrays of some items and what they add to the counts. Returns the tokenizer, which is made only
    if nothing was saved before, and the counts of all items.
    """
    with Progress(log, "training the tokenizer") as progress, _saying_what_is_saved(partial):
        if partial.state:
            tokenizer = Tokenizer.load(partial.directory)
            log(f"resuming {corpus.description}: {_amount_saved(partial)} were prepared before")
        else:
            log(f"preparing {corpus.description}")
            tokenizer = make_tokenizer()
            with naming_write_errors(partial.directory.parent):
                tokenizer.save(partial.directory)
        try:
            counts = _append_ids(corpus, tokenizer, encode, partial, progress)
        except BaseException:
            partial.save()
            raise
    return tokenizer, counts


def _append_ids(
    corpus: Corpus, tokenizer: Tokenizer, encode: Encode, partial: Partial, progress: Progress
) -> dict[str, int]:
    counts = Counter({"bytes": 0, "documents": 0, **partial.state.get("counts", {})})
    totals = partial.state.get("totals") or {"bytes": corpus.num_bytes, "documents": corpus.num_documents}
    items = ResumableIterator(corpus.read, partial.state.get("position"))
    progress.start(counts, totals)
    saved = time.monotonic()
    for group in _groups(items):
        arrays, added = encode(group, tokenizer)
        counts.update(added)
        counts.update(bytes=sum(item.num_bytes for item in group), documents=sum(item.end for item in group))
        contents = {name: array.data for name, array in arrays.items()}
        partial.append(contents, {"position": items.state, "counts": dict(counts), "totals": totals})
        progress.update(counts)
        if time.monotonic() - saved > SAVE_EVERY_S:
            partial.save()
            saved = time.monotonic()
    return dict(counts)


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Consecutive items, as many as are encoded at once."""
    group: list[Item] = []
    num_bytes = 0
    for item in items:
        group.append(item)
        num_bytes += item.num_bytes
        if num_bytes >= GROUP_BYTES or len(group) >= GROUP_ITEMS:
            yield group
            group = []
            num_bytes = 0
    if group:
        yield group


def _amount_saved(partial: Partial) -> str:
    return amount_done(partial.state["counts"], partial.state["totals"])


@contextlib.contextmanager
def _saying_what_is_saved(partial: Partial) -> Iterator[None]:
    """An interruption, or a failure that is not the user's mistake, says that the work can be resumed."""

    def saved() -> str:
        if not partial.state:
            return ""
        return f"; {_amount_saved(partial)} are prepared: the same command resumes from there"

    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{saved()}") from None
    except RequestError:
        raise
    except MinitfError as error:
        raise MinitfError(f"{error}{saved()}") from error


def ids_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
