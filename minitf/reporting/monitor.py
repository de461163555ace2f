"""What a run shows and records: progress in the terminal, metrics.jsonl, TensorBoard, environment.json."""

import json
import os
import platform
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from minitf.interpretability.alignment import AligningHeads
from minitf.reporting.event_files import cut_events
from minitf.system.files import write_whole
from minitf.system.hardware import Hardware, describe_processor
from minitf.tensorboard.summary import attention_summary, picture_summary
from minitf.viewer import viewer_page

# The contract's TensorBoard tags of the columns of metrics.jsonl.
SCALARS = {
    "train": {
        "loss": "train/loss",
        "lr": "train/learning_rate",
        "grad_norm": "train/grad_norm",
        "tokens_per_s": "perf/tokens_per_second",
        "mfu": "perf/mfu",
    },
    "val": {name: f"val/{name}" for name in ("loss", "bits_per_byte", "perplexity", "chrf", "bleu", "exact_match")},
    "alignment": {"score": "alignment/score", "chance": "alignment/chance"},
}
MAX_CURVE_POINTS = 500
MAX_SHOWN = 120  # characters of a pair's side in a line


class Monitor:
    """Everything a run says goes through here; a terminal gets a progress bar, anything else lines."""

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        """Open the run's files; after a resume what they hold beyond `start_step` is cut off."""
        from torch.utils.tensorboard import SummaryWriter

        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        last_step = start_step or -1  # a fresh run takes nothing over from one that failed in its place
        cut_events(run_dir, last_step)
        self.metrics_path = run_dir / "metrics.jsonl"
        self.metrics = open_rows(self.metrics_path, last_step)
        self.maps_path = run_dir / "attention.jsonl"
        self.maps = open_rows(self.maps_path, last_step)
        # TensorBoard is to forget what an earlier process logged from this step on, or else it shows steps twice. Its
        # Python loader takes the first such word for the beginning of the run, so a fresh run says it too.
        purge_step = start_step + 1 if start_step else 0
        self.tensorboard: SummaryWriter = SummaryWriter(str(run_dir), purge_step=purge_step, flush_secs=15)
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.bits_per_byte = self.chrf = float("nan")
        self.last_line_step = -1

    def __enter__(self) -> "Monitor":
        # TensorBoard writes in a thread. What fails there fails here too, at the next write: no traceback between.
        self.excepthook = threading.excepthook
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else self.excepthook(args)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise
        finally:
            threading.excepthook = self.excepthook

    def say(self, line: str) -> None:
        """One line for people."""
        self.console.print(escape(line))

    def start(self, step: int, num_steps: int) -> None:
        """The training loop begins: show how far it is."""
        self.num_steps = num_steps
        if not self.console.is_terminal:
            return

        columns = (
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.progress = Progress(*columns, console=self.console)
        self.task = self.progress.add_task("", total=num_steps, completed=step, numbers="")
        self.progress.start()

    def set_num_steps(self, num_steps: int) -> None:
        """The run turns out to have so many steps."""
        self.num_steps = num_steps
        if self.progress and self.task is not None:
            self.progress.update(self.task, total=num_steps)

    def train_row(self, row: dict[str, Any]) -> None:
        """Training numbers of one logging step: see metrics.jsonl in the README."""
        self._record("train", row)
        numbers = f"loss {row['loss']:.3f}  {self._held_out()}{row['tokens_per_s'] / 1000:.1f}k tokens/s"
        if self.progress and self.task is not None:
            self.progress.update(self.task, completed=row["step"], numbers=numbers)
        elif row["step"] - self.last_line_step >= self.num_steps / 20 or row["step"] == self.num_steps:
            self.last_line_step = row["step"]
            left_s = (self.num_steps - row["step"]) * row["train_s"] / row["step"]
            self.say(f"step {row['step']:,}/{self.num_steps:,}  {numbers}  {left_s:.0f} s left")

    def alignment(self, aligning: AligningHeads, step: int) -> None:
        """How well the heads that align source and target do so."""
        heads = [list(head) for head in aligning.heads]
        row = {"score": round(aligning.score, 4), "chance": round(aligning.chance, 4), "heads": heads}
        self._record("alignment", {"step": step, **row})

    def val_row(self, row: dict[str, Any]) -> None:
        """Held-out numbers of one evaluation."""
        self.bits_per_byte, self.chrf = row["bits_per_byte"], row.get("chrf", float("nan"))
        self._record("val", row)

    def sample(self, prompt: str, continuation: str, step: int) -> None:
        """A text the model wrote, given `prompt`."""
        self.tensorboard.add_text("samples", f"**{prompt}**{continuation}".replace("\n", "  \n"), step)
        text = " ".join(continuation.split())
        heading = f"step {step:,}  {self._held_out()}"
        self.console.print(f"[dim]{heading}[/dim]{escape(prompt)} [green]{escape(text)}[/green]")

    def answers(self, rows: Sequence[tuple[str, str, str]], step: int) -> None:
        """(source, answer, reference) of some pairs: a table for TensorBoard, the first of them here."""
        escaped = ([" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows)
        table = [
            "| source | answer | reference |",
            "|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in escaped),
        ]
        self.tensorboard.add_text("samples", "\n".join(table), step)
        source, answer, _ = rows[0]
        heading = f"step {step:,}  {self._held_out()}"
        source, answer = (textwrap.shorten(text, MAX_SHOWN, placeholder=" …") for text in (source, answer))
        self.console.print(f"[dim]{heading}[/dim]{escape(source)} -> [green]{escape(answer)}[/green]")

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """An image already encoded as PNG."""
        self._add(picture_summary(tag, png), step)

    def attention(self, maps: Mapping[str, Any], png: bytes, step: int) -> None:
        """The maps of one probe at one step, for the run's attention.html, the Attention tab, and as a picture."""
        self.maps.write(json.dumps(maps) + "\n")
        self.maps.flush()
        # TensorBoard's writer takes 88 ns a byte, in Python, beside the training: the vectors, four fifths of it all,
        # stay in the run's own file, where the Attention tab finds them.
        self._add(attention_summary(maps["text"], json.dumps({**maps, "vectors": None})), step)
        self.picture(f"attention/{maps['text']}", png, step)

    def write_attention_page(self, title: str) -> Path:
        """Put all maps kept so far into attention.html; returns its path."""
        self.maps.flush()
        path = self.maps_path.with_suffix(".html")
        self.metrics.flush()
        with self.maps_path.open(encoding="utf-8") as rows:
            page = viewer_page([json.loads(row) for row in rows], title, self._loss_curves())
        write_whole(path, page)
        return path

    def _loss_curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) of the training and held-out rows so far, thinned to what a page can show."""
        curves: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
        for row in map(json.loads, self.metrics_path.read_text(encoding="utf-8").splitlines()):
            if row["split"] in curves:
                curves[row["split"]].append((row["step"], round(row["loss"], 4)))
        return {split: rows[:: -(-len(rows) // MAX_CURVE_POINTS) or 1] for split, rows in curves.items()}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Many scalars as one record."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def hyperparameters(self, config: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """The run's settings with its final metrics, for TensorBoard's HParams tab."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(dict(config), dict(metrics)):  # type: ignore[no-untyped-call]
            self._add(summary, step)
        self.scalars(metrics, step)

    def stop(self) -> None:
        """Take the progress bar down."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def flush(self) -> None:
        """Have all rows and events on disk: a checkpoint that is about to be seen counts on what came before it."""
        self.tensorboard.flush()
        for file in (self.metrics, self.maps):
            os.fsync(file.fileno())  # each row was handed to the system when it was written

    def close(self) -> None:
        """Write everything out."""
        self.stop()
        self.metrics.close()
        self.maps.close()
        self.tensorboard.close()

    def _held_out(self) -> str:
        if self.bits_per_byte != self.bits_per_byte:
            return ""
        chrf = f", chrF {self.chrf:.1f}" if self.chrf == self.chrf else ""
        return f"held-out {self.bits_per_byte:.3f} bits/byte{chrf}  "

    def _record(self, split: str, row: dict[str, Any]) -> None:
        self.metrics.write(json.dumps({"step": row["step"], "split": split, **row}) + "\n")
        self.metrics.flush()
        self.scalars({tag: row[key] for key, tag in SCALARS[split].items() if key in row}, row["step"])

    def _add(self, summary: Any, step: int) -> None:
        self.tensorboard._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]


class NullMonitor:
    """A monitor for the processes beside the first: it says and records nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None

    def __enter__(self) -> "NullMonitor":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def open_rows(path: Path, last_step: int) -> TextIO:
    """A file of JSON rows, open for more, holding its rows up to `last_step`: those after it will be written again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line cut short when the run was killed
    write_whole(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def record_environment(run_dir: Path, hardware: Hardware, choices: Mapping[str, str]) -> None:
    """Write environment.json: what this run ran on and with, enough to repeat it."""
    packages = ("minitf", "torch", "numpy", "datasets", "tokenizers", "hydra-core", "tensorboard", "safetensors")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    environment = {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": describe_processor(),
        "device": torch.cuda.get_device_name() if hardware.device.type == "cuda" else hardware.device.type,
        "matmul_flops": round(hardware.peak_flops),
        "choices": dict(choices),
        "packages": versions,
        "git_commit": _git_commit(),
    }
    write_whole(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # an installed wheel, or no git
