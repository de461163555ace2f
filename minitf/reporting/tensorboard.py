"""TensorBoard: a run's event files, and cutting them back to the step a run resumes from."""

import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitf.interpretability.reference import SCORES
from minitf.tensorboard.summary import attention_summary, picture_summary

CHANCE = "chance"  # a folder in the run: TensorBoard shows it as a run of its own, so as a line in the same charts
EVENT_FILES = "events.out.tfevents.*"
# The tags of the columns of metrics.jsonl, by its `split`. They are part of the contract.
TAGS = {
    "train": {
        "loss": "train/loss",
        "lr": "train/learning_rate",
        "grad_norm": "train/grad_norm",
        "tokens_per_s": "perf/tokens_per_second",
        "mfu": "perf/mfu",
    },
    "val": {name: f"val/{name}" for name in ("loss", "bits_per_byte", "perplexity", "chrf", "bleu", "exact_match")},
    "reference": {name: f"reference/{name}" for name in SCORES},
    "alignment": {"score": "alignment/score", "chance": "alignment/chance"},
}


class TensorBoardWriter:
    """Writes the event file of one run."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        """Drop the events after `start_step`, all of them if it is 0, and open a new file."""
        from torch.utils.tensorboard import SummaryWriter

        cut_events(run_dir, start_step or -1)
        cut_events(run_dir / CHANCE, start_step or -1)
        self.run_dir = run_dir
        self.chance_writer: Any = None  # opened when the first chance is logged
        # Without a purge step TensorBoard shows the steps logged by an earlier process twice. Its Python loader takes
        # the first purge for the beginning of the run, so a new run writes one too.
        purge_step = start_step + 1 if start_step else 0
        self.writer = SummaryWriter(str(run_dir), purge_step=purge_step, flush_secs=15)
        # TensorBoard writes in a thread. An OSError there is raised by the next write as well: it needs no traceback.
        self.excepthook = threading.excepthook
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else self.excepthook(args)

    def row(self, split: str, row: Mapping[str, Any]) -> None:
        """The columns of a row of metrics.jsonl that have a tag."""
        self.scalars({tag: row[column] for column, tag in TAGS[split].items() if column in row}, row["step"])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Many scalars as one record."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def chances(self, values: Mapping[str, float], step: int) -> None:
        """What guessing comes to, by the tag of the score."""
        from torch.utils.tensorboard import SummaryWriter

        if self.chance_writer is None:
            self.chance_writer = SummaryWriter(str(self.run_dir / CHANCE), flush_secs=15)
        for tag, value in values.items():
            self.chance_writer.add_scalar(tag, value, step)

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
        self._add(picture_summary(tag, png), step)

    def attention(self, maps: Mapping[str, Any], png: bytes, step: int) -> None:
        """The maps of one probe, for the Attention tab and as a picture."""
        # TensorBoard's writer takes 88 ns a byte, in Python, while training waits: the vectors, four fifths of the
        # bytes, stay in attention.jsonl, where the Attention tab finds them.
        self._add(attention_summary(maps["text"], json.dumps({**maps, "vectors": None})), step)
        self.picture(f"attention/{maps['text']}", png, step)

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """The run's settings with its final metrics, for the HParams tab."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(dict(settings), dict(metrics)):  # type: ignore[no-untyped-call]
            self._add(summary, step)
        self.scalars(metrics, step)

    def flush(self) -> None:
        """Write every event to the file."""
        self.writer.flush()
        if self.chance_writer is not None:
            self.chance_writer.flush()

    def close(self) -> None:
        """Write every event and close the file. Raises OSError."""
        try:
            self.writer.close()
            if self.chance_writer is not None:
                self.chance_writer.close()
        finally:
            threading.excepthook = self.excepthook

    def _add(self, summary: Any, step: int) -> None:
        self.writer._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]


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
