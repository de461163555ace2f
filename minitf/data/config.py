"""What to train on, and which part of it is held out: the settings of `data.`, of text and of pairs."""

from dataclasses import dataclass, field

from minitf.data.sources.books import BOOKS
from minitf.data.sources.synthetic import EXERCISES, MOST_PAIRS
from minitf.errors import RequestError


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
    shuffle_buffer: int = 0  # hub: documents put in drawn order, so many at a time, and its files; 0: as they come
    shuffle_seed: int = 0  # hub: of the drawn order
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
        if self.shuffle_buffer < 0:
            raise RequestError(f"data.shuffle_buffer={self.shuffle_buffer} must be 0 or the documents drawn from")
        if self.shuffle_seed < 0:
            raise RequestError(f"data.shuffle_seed={self.shuffle_seed} must be at least 0")
        if self.max_documents is not None and self.max_documents < 1:
            raise RequestError(f"data.max_documents={self.max_documents} must be at least 1, or null for all")
