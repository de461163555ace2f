"""Which text or pairs to train on, and which part of them is held out: the settings of `data.`."""

from dataclasses import dataclass, field

from minitf.data.sources.books import BOOKS
from minitf.data.sources.synthetic import EXERCISES, MAX_PAIRS
from minitf.errors import RequestError


@dataclass
class DataConfig:
    """Which text or pairs to train on, and which part of them is held out. RequestError names a wrong setting."""

    kind: str = "text"  # text: predict the next token everywhere; pairs: turn one text into another
    source: str = "kjv"  # text: kjv, web (embedded), files, hub; pairs: kjv_to_web, an exercise, files, hub
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
    bad_rows: str = "error"  # rows that hold no pair: error (stop at the first) | skip (and count them)
    num_pairs: int = 50_000  # pairs to generate for an exercise (copy, reverse, sort, addition)
    rows_are_documents: bool = True  # false: rows are consecutive lines of one text, nothing marks their ends
    val_fraction: float = 0.1  # share held out: of the documents, or the end of a single file
    streaming: bool = False  # read the hub while preparing instead of downloading everything first
    shuffle_buffer: int = 0  # hub: shuffle the files, and documents in blocks of this many; 0: original order
    shuffle_seed: int = 0  # hub: seed of the shuffled order
    max_documents: int | None = None  # use only the first N documents; null: all
    probes: list[str] = field(default_factory=list)  # sentences whose attention is logged, in addition to general ones
    cache_dir: str | None = None  # directory of prepared data; null: $MINITF_CACHE, else ~/.cache/minitf

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
        if not 2 <= self.num_pairs <= MAX_PAIRS:
            raise RequestError(f"data.num_pairs={self.num_pairs} must be between 2 and {MAX_PAIRS:,}")
        if self.source == "files" and not self.files:
            raise RequestError("data.files is empty; name files, globs or folders, e.g. data.files=[book.txt]")
        if self.source == "hub" and not self.hub_path:
            raise RequestError("data.hub_path is empty; name a dataset, e.g. data.hub_path=roneneldan/TinyStories")
        if not 0 < self.val_fraction <= 0.5:
            raise RequestError(f"data.val_fraction={self.val_fraction} must be above 0 and at most 0.5")
        if self.shuffle_buffer < 0:
            raise RequestError(
                f"data.shuffle_buffer={self.shuffle_buffer} must be 0, or the number of documents shuffled at once"
            )
        if self.shuffle_seed < 0:
            raise RequestError(f"data.shuffle_seed={self.shuffle_seed} must be at least 0")
        if self.max_documents is not None and self.max_documents < 1:
            raise RequestError(f"data.max_documents={self.max_documents} must be at least 1, or null for all")
