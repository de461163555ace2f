"""Items of a corpus -> ids appended to files, in parallel, with progress; an interrupted preparation is resumed."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitf.data.cache import Log, Partial, naming_write_errors
from minitf.data.config import DataConfig
from minitf.data.fingerprint import cache_key, check_reading, fingerprint
from minitf.data.progress import Progress, amount_done
from minitf.data.resumable import ResumableIterator
from minitf.data.sources.corpus import Corpus, Item
from minitf.data.tokenizer_training import train_tokenizer
from minitf.errors import MinitfError, RequestError
from minitf.system.files import cache_root
from minitf.tokenizer import Tokenizer, TokenizerConfig

GROUP_BYTES = 1 << 21  # text encoded at once, in parallel by items; bounds the memory
GROUP_ITEMS = 4096
SAVE_EVERY_S = 5.0

Arrays = dict[str, npt.NDArray[Any]]  # by the name of the file they are appended to
Counts = dict[str, int]
Encode = Callable[[list[Item], Tokenizer], tuple[Arrays, Counts]]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Preparation:
    """Which data are tokenized, and by which tokenizer: the one given, else one trained on them as `config` says."""

    data: DataConfig
    config: TokenizerConfig
    tokenizer: Tokenizer | None
    log: Log
    recorded: str = ""  # the fingerprint that a run has kept of its text, which is then used if it is in the cache

    @property
    def directory(self) -> Path:
        """The cache entry."""
        root = cache_root(self.data.cache_dir)
        text = self.recorded or fingerprint(self.data)
        trained = root / cache_key(text, self.config, None)
        if self.tokenizer is None:
            return trained
        with contextlib.suppress(MinitfError, OSError):
            if Tokenizer.load(trained).to_json() == self.tokenizer.to_json():  # it was trained on these very data
                return trained
        return root / cache_key(text, self.config, self.tokenizer)

    def open(self, source: Callable[[DataConfig], Corpus]) -> Corpus:
        """The corpus that `source` reads; RequestError if it is another than the recorded one."""
        if self.recorded:
            check_reading(self.data, self.recorded)
        return source(self.data)

    def make_tokenizer(self, corpus: Corpus) -> Tokenizer:
        train, val = ((item.text for item in items) for items in (corpus.train, corpus.val))
        pairs = self.data.kind == "pairs"
        streamed = self.data.streaming and not pairs
        return self.tokenizer or train_tokenizer(self.config, train, val, for_pairs=pairs, streamed=streamed)


def tokenize(job: Preparation, corpus: Corpus, encode: Encode, partial: Partial) -> tuple[Tokenizer, Counts]:
    """Save a tokenizer and append the ids of all items to the files of `partial`, from where these are.

    `encode` returns the arrays of some items and what they add to the counts. Returns the tokenizer and all counts.
    """
    with Progress(job.log, "training the tokenizer") as progress, _saving_on_failure(partial):
        if partial.state:
            tokenizer = Tokenizer.load(partial.directory)
            job.log(f"resuming {corpus.summary}: {_amount_saved(partial)} were prepared before")
        else:
            job.log(f"preparing {corpus.summary}")
            tokenizer = job.make_tokenizer(corpus)
            with naming_write_errors(partial.directory.parent):
                tokenizer.save(partial.directory)
        return tokenizer, _append_ids(corpus, tokenizer, encode, partial, progress)


def _append_ids(corpus: Corpus, tokenizer: Tokenizer, encode: Encode, partial: Partial, progress: Progress) -> Counts:
    items = ResumableIterator(corpus.read, partial.state.get("position"))
    counts = Counter({"bytes": 0, "documents": 0, **partial.state.get("counts", {})})
    totals = partial.state.get("totals") or {"bytes": corpus.num_bytes, "documents": corpus.num_documents}
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
    return counts


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
def _saving_on_failure(partial: Partial) -> Iterator[None]:
    """Save what the block appended, whatever stops it; an interruption, or an error of the machine, says how much."""
    try:
        yield
    except BaseException as error:
        partial.save()
        if not partial.state or isinstance(error, RequestError):
            raise
        kept = f"{_amount_saved(partial)} are prepared: the same command resumes from there"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {kept}") from None
        if isinstance(error, MinitfError):
            raise MinitfError(f"{error}; {kept}") from error
        raise


def ids_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
