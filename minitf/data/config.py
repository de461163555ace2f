"""Which text or pairs to train on, and which part of them is held out: the settings of `data.`."""

import os
from dataclasses import dataclass, field, replace

from minitf.data.sources.books import BOOKS
from minitf.data.sources.files import absolute_entry
from minitf.data.sources.references import EXAMPLES, LANGUAGES, REFERENCES, Example
from minitf.data.sources.synthetic import EXERCISES, MAX_PAIRS
from minitf.errors import RequestError
from minitf.system.files import expand_user


@dataclass
class DataConfig:
    """Which text or pairs to train on, and which part of them is held out. RequestError names a wrong setting."""

    kind: str = "text"  # text: predict the next token everywhere; pairs: turn one text into another
    source: str = "kjv"  # text: kjv, web (embedded), pronouns, files, hub; pairs: kjv_to_web, an exercise, files, hub
    language: str = "en"  # of the exercises pronouns and winograd: en, or zh (every word is a character)
    files: list[str] = field(default_factory=list)  # for source=files: files, globs, folders; text or tables
    hub_path: str | None = None  # dataset on the Hugging Face hub, or a folder, or json, csv, parquet with data.files
    hub_name: str | None = None  # configuration of that dataset, e.g. wikitext-2-raw-v1
    hub_split: str = "train"  # split to train on
    hub_val_split: str | None = None  # split held out; null: every k-th document of hub_split, by val_fraction
    hub_revision: str | None = None  # commit or tag of the dataset; null: the newest
    text_column: str = "text"  # column with the text
    prompt_column: str | None = None  # pairs: column with the source text; null: found by the usual names
    completion_column: str | None = None  # pairs: column with the target text; null: found by the usual names
    prompt_loss_share: float = 0.0  # pairs: weight of a prompt token in the loss; a completion token weighs 1
    long_pairs: str = "drop"  # pairs longer than the context: drop | truncate (cuts the end of the completion)
    bad_rows: str = "error"  # rows that cannot be used: error (stop at the first) | skip (and count them)
    num_pairs: int = 50_000  # pairs to generate for an exercise (copy, reverse, sort, addition, winograd)
    rows_are_documents: bool = True  # false: rows are consecutive lines of one text, nothing marks their ends
    document_mask: bool = False  # text: attention stays inside a document; false: it sees those before it too
    val_fraction: float = 0.1  # share held out: of the documents, or the end of a single file
    streaming: bool = False  # read the hub while preparing instead of downloading everything first
    shuffle_buffer: int = 0  # hub: shuffle the files, and documents in blocks of this many; 0: original order
    shuffle_seed: int = 0  # hub: seed of the shuffled order
    max_documents: int | None = None  # use only the first N documents; null: all
    probes: list[str] = field(default_factory=list)  # sentences whose attention is logged, in addition to general ones
    watch: list[str] = field(default_factory=list)  # relations to watch, "TEXT | it>cat", unless attention.watch is set
    cache_dir: str | None = None  # directory of prepared data; null: $MINITF_CACHE, else ~/.cache/minitf

    def __post_init__(self) -> None:
        sources = {"text": [*BOOKS, "pronouns"], "pairs": ["kjv_to_web", *EXERCISES, "winograd"]}
        self._check("kind", self.kind in sources, "is not known; use text or pairs")
        known = [*sources[self.kind], "files", "hub"]
        self._check(
            "source", self.source in known, f"is not known for data.kind={self.kind}; one of {', '.join(known)}"
        )
        self._check("long_pairs", self.long_pairs in ("drop", "truncate"), "must be drop or truncate")
        self._check("bad_rows", self.bad_rows in ("error", "skip"), "must be error or skip")
        self._check("prompt_loss_share", 0 <= self.prompt_loss_share <= 1, "must be between 0 and 1")
        self._check("num_pairs", 2 <= self.num_pairs <= MAX_PAIRS, f"must be between 2 and {MAX_PAIRS:,}")
        if self.source == "files" and not self.files:
            raise RequestError("data.files is empty; name files, globs or folders, e.g. data.files=[book.txt]")
        if self.source == "hub" and not self.hub_path:
            raise RequestError("data.hub_path is empty; name a dataset, e.g. data.hub_path=roneneldan/TinyStories")
        self._check("val_fraction", 0 < self.val_fraction <= 0.5, "must be above 0 and at most 0.5")
        self._check(
            "document_mask", self.kind == "text" or not self.document_mask, "is for text: pairs are always apart"
        )
        self._check("language", self.language in LANGUAGES, f"is not known; one of {', '.join(LANGUAGES)}")
        if self.reference:
            tenths = 10 * self.val_fraction
            whole = tenths >= 2 and abs(tenths - round(tenths)) < 1e-9
            self._check("val_fraction", whole, f"must be 0.2, 0.3, 0.4 or 0.5 for data.source={self.source}")
        else:
            self._check("language", self.language == "en", f"is for {' and '.join(REFERENCES)} only")
        self._check(
            "shuffle_buffer", self.shuffle_buffer >= 0, "must be 0, or the number of documents shuffled at once"
        )
        self._check("shuffle_seed", self.shuffle_seed >= 0, "must be at least 0")
        too_few = self.max_documents is not None and self.max_documents < 1
        self._check("max_documents", not too_few, "must be at least 1, or null for all")

    @property
    def reference(self) -> str | None:
        """The exercise in reference that this is, if it is one."""
        return self.source if self.source in REFERENCES else None

    def located(self) -> "DataConfig":
        """The same data, with paths that are found from any directory."""
        hub_path, cache_dir = self.hub_path, self.cache_dir
        if hub_path and not self.files and os.path.isdir(hub_path):
            hub_path = os.path.abspath(hub_path)
        if cache_dir:
            cache_dir = os.path.abspath(expand_user(cache_dir))
        files = [absolute_entry(entry) for entry in self.files]
        return replace(self, files=files, hub_path=hub_path, cache_dir=cache_dir)

    @property
    def example(self) -> Example | None:
        """The sentence to look at in an exercise in reference."""
        return EXAMPLES[self.source, self.language] if self.reference else None

    @property
    def relations(self) -> list[str]:
        """The relations to watch, if `attention.watch` does not name others."""
        return self.watch or (self.example.relations if self.example else [])

    def _check(self, key: str, valid: bool, rule: str) -> None:
        if not valid:
            raise RequestError(f"data.{key}={getattr(self, key)} {rule}")
