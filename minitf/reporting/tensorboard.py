"""TensorBoard: a run's event files, and cutting them back to the step a run resumes from."""

import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minitf.interpretability.heads import HeadScores
from minitf.interpretability.reference import SCORES
from minitf.tensorboard.summary import (
    SCORES_TAG,
    attention_summary,
    heads_summary,
    heads_tag,
    hyperparameter_summaries,
    picture_summary,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENT_FILES = "events.out.tfevents.*"
# Folders in the run. TensorBoard shows each as a run of its own, so that training and held-out loss, which have the
# same tag, are two lines of one chart; and what guessing comes to is a line in the chart of each score.
PICTURES = "pictures"  # the group of all images
TRAIN, HELD_OUT, CHANCE = "train", "held_out", "chance"
FOLDERS = {"train": TRAIN, "val": HELD_OUT, "alignment": HELD_OUT}  # by the `split` of metrics.jsonl
# The tags of the columns of metrics.jsonl, by its `split`. They are part of the contract. TensorBoard sorts the groups
# (what is before "/") by name and opens the first two: the loss is the first.
TAGS = {
    "train": {
        "loss": "loss",
        "lr": "optimizer/learning_rate",
        "grad_norm": "optimizer/gradient_norm",
        "tokens_per_s": "speed/tokens_per_second",
        "mfu": "speed/mfu",
    },
    "val": {
        "loss": "loss",
        **{name: f"quality/{name}" for name in ("bits_per_byte", "perplexity", "chrf", "bleu", "exact_match")},
    },
    "reference": {name: f"reference/{name}" for name in SCORES},
    "alignment": {"score": "quality/alignment", "changed": "alignment/changed", "control": "alignment/control"},
    "result": {name: f"result/{name}" for name in ("first_token", "induction_at", "learnt_at", "tokens_per_s")},
}


class TensorBoardWriter:
    """Writes the event file of one run."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        """Drop the events after `start_step`, all of them if it is 0, and open a new file."""
        for folder in ("", TRAIN, HELD_OUT, CHANCE):
            cut_events(run_dir / folder, start_step or -1)
        self.run_dir = run_dir
        # Without a purge step TensorBoard shows the steps logged by an earlier process twice. Its Python loader takes
        # the first purge for the beginning of the run, so a new run writes one too.
        self.purge_step = start_step + 1 if start_step else 0
        self.writers: dict[str, SummaryWriter] = {}  # by folder, opened when there is something to write
        self.writer = self._writer("")
        # TensorBoard writes in a thread. An OSError there is raised by the next write as well: it needs no traceback.
        self.excepthook = threading.excepthook
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else self.excepthook(args)

    def row(self, split: str, row: Mapping[str, Any]) -> None:
        """The columns of a row of metrics.jsonl that have a tag."""
        values = {tag: row[column] for column, tag in TAGS[split].items() if column in row}
        self.scalars(values, row["step"], FOLDERS.get(split, ""))

    def scalars(self, values: Mapping[str, float], step: int, folder: str = "") -> None:
        """Many scalars as one record."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(summary, step, folder)

    def chances(self, values: Mapping[str, float], step: int) -> None:
        """What guessing comes to, by the tag of the score."""
        self.scalars(values, step, CHANCE)

    def sample(self, prompt: str, text: str, step: int) -> None:
        """A prompt and its continuation, as Markdown."""
        self.writer.add_text("samples", f"**{prompt}**{text}".replace("\n", "  \n"), step)

    def answers(self, rows: Sequence[tuple[str, str, str]], step: int) -> None:
        """A table of (source, answer, reference)."""
        escaped = ([" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows)
        lines = ["| source | answer | reference |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in escaped]
        self.writer.add_text("samples", "\n".join(lines), step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """An image already encoded as PNG."""
        self._add(picture_summary(f"{PICTURES}/{tag}", png), step)

    def attention(self, maps: Mapping[str, Any], png: bytes, step: int) -> None:
        """The maps of one probe, for the Attention tab and as a picture."""
        # TensorBoard's writer takes 88 ns a byte, in Python, while training waits: the vectors, four fifths of the
        # bytes, stay in attention.jsonl, where the Attention tab finds them.
        self._add(attention_summary(maps["text"], json.dumps({**maps, "vectors": None})), step)
        self.picture(f"attention/{maps['text']}", png, step)

    def head_scores(self, scores: HeadScores, step: int) -> None:
        """The scores of all heads, for the Attention tab."""
        self._add(heads_summary(SCORES_TAG, {name: values.tolist() for name, values in scores.items()}), step)

    def head_values(self, name: str, values_LH: Tensor, step: int) -> None:
        """A number for each head, for the Attention tab."""
        self._add(heads_summary(heads_tag(name), {name: values_LH.tolist()}), step)

    def hyperparameters(
        self, settings: Mapping[str, Any], metrics: Sequence[str], results: Mapping[str, float], step: int
    ) -> None:
        """The run's settings, for the HParams tab, with columns of held-out rows and results of the whole run."""
        tags = {TAGS["reference" if name in SCORES else "result"][name]: value for name, value in results.items()}
        self.scalars({tag: value for tag, value in tags.items() if tag.startswith("result/")}, step)
        columns = {TAGS["val"][name]: HELD_OUT for name in metrics} | dict.fromkeys(tags, "")
        for summary in hyperparameter_summaries(settings, columns):
            self._add(summary, step)

    def flush(self) -> None:
        """Write every event to the files."""
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        """Write every event and close the files. Raises OSError."""
        try:
            with ExitStack() as stack:  # closes all of them, whatever fails
                for writer in self.writers.values():
                    stack.callback(writer.close)
        finally:
            threading.excepthook = self.excepthook

    def _writer(self, folder: str) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        if folder not in self.writers:
            path = str(self.run_dir / folder)
            self.writers[folder] = SummaryWriter(path, purge_step=self.purge_step, flush_secs=15)
        return self.writers[folder]

    def _add(self, summary: Any, step: int, folder: str = "") -> None:
        self._writer(folder)._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]


def cut_events(run_dir: Path, last_step: int) -> None:
    """Drop the events of steps after `last_step` and truncated records from all event files; raises OSError."""
    from tensorboard.compat.proto.event_pb2 import Event

    for path in sorted(run_dir.glob(EVENT_FILES)):
        content = path.read_bytes()
        kept = bytearray()
        num_events = 0
        for record in event_records(content):
            try:
                event = Event.FromString(record[12:-4])
            except Exception:  # the parser's own class: the rest of the file is unreadable
                break
            if event.step <= last_step:
                kept += record
                num_events += not event.file_version
        if not num_events:
            path.unlink()
        elif len(kept) < len(content):
            partial = path.with_name(f".{path.name}.partial")
            partial.unlink(missing_ok=True)
            with partial.open("xb") as file:
                file.write(kept)
            os.replace(partial, path)


def event_records(content: bytes) -> Iterator[bytes]:
    """The complete records of an event file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    start = 0
    while start + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 16 + length
        if end > len(content):
            return
        yield content[start:end]
        start = end
