"""Where a run reports its progress: one call for each event, written to the console and to files."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from minitf.interpretability.alignment import AligningHeads
from minitf.interpretability.heads import HeadScores
from minitf.interpretability.interventions import Watched
from minitf.interpretability.reference import ReferenceScores
from minitf.reporting.console import TrainingConsole
from minitf.reporting.metrics import JsonRows, loss_curves, other_curves
from minitf.reporting.tensorboard import TAGS, TensorBoardWriter
from minitf.system.files import write_whole
from minitf.viewer import heads_found, viewer_page


class Reporter:
    """The events of a run. This class reports nothing: it is for the ranks other than 0."""

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        pass

    def say(self, line: str, whole: bool = False) -> None:
        """Print a line; `whole`: never broken, as a command must not be."""

    def start(self, step: int, num_steps: int) -> None:
        """The training loop begins at `step`."""

    def stop(self) -> None:
        """The training loop has ended."""

    def train_row(self, row: Mapping[str, Any], num_steps: int, left_s: float) -> None:
        """Training numbers: columns of metrics.jsonl (configuration.md); `left_s`: seconds of training left."""

    def val_row(self, row: Mapping[str, Any]) -> None:
        """Held-out numbers of one evaluation."""

    def sample(self, prompt: str, text: str, step: int) -> None:
        """A text that the model wrote after `prompt`."""

    def answers(self, rows: Sequence[tuple[str, str, str]], step: int) -> None:
        """(source, answer, reference) of some pairs."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers for TensorBoard alone."""

    def head_scores(self, scores: HeadScores, step: int) -> None:
        """The scores of all heads, for the Attention tab."""

    def ablation(self, costs_LH: Tensor, step: int) -> None:
        """What each head alone is worth, in bits per token."""

    def alignment(self, aligning: AligningHeads, step: int) -> None:
        """The heads that align source and target, and their score."""

    def reference(self, scores: ReferenceScores, step: int) -> None:
        """Scores and causal tests of an exercise in reference."""

    def watched(self, watched: Watched, step: int) -> None:
        """A relation that the run watches."""

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """An image already encoded as PNG."""

    def attention(self, maps: Mapping[str, Any], png: bytes, step: int) -> None:
        """The attention maps of one probe, and a picture of them."""

    def hyperparameters(
        self, settings: Mapping[str, Any], metrics: Sequence[str], results: Mapping[str, float], step: int
    ) -> None:
        """The run's settings, the columns of held-out rows that they are compared by, and results of the whole run."""

    def write_attention_page(self, title: str, model: Mapping[str, Any]) -> None:
        """Write attention.html: all maps so far, the loss curves, and `model`, a `page_model`."""

    def flush(self) -> None:
        """Have all rows and events on disk: a checkpoint must not be newer than they are."""


class RunReporter(Reporter):
    """Reports to the console, metrics.jsonl, attention.jsonl and TensorBoard."""

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        """Open the run's files and cut off what they hold after `start_step`. Raises OSError."""
        self.run_dir = run_dir
        self.console = TrainingConsole()
        self.metrics = JsonRows(run_dir / "metrics.jsonl", start_step)
        self.maps = JsonRows(run_dir / "attention.jsonl", start_step)
        self.tensorboard = TensorBoardWriter(run_dir, start_step)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self.stop()
        try:
            with ExitStack() as stack:  # closes all of them, whatever fails
                for output in (self.tensorboard, self.maps, self.metrics):
                    stack.callback(output.close)
        except OSError:
            if error is None:  # the first error is the one to report
                raise

    def say(self, line: str, whole: bool = False) -> None:
        self.console.say(line, whole)

    def start(self, step: int, num_steps: int) -> None:
        self.console.start(step, num_steps)

    def stop(self) -> None:
        self.console.stop()

    def train_row(self, row: Mapping[str, Any], num_steps: int, left_s: float) -> None:
        self._record("train", row)
        self.console.train_row(row, num_steps, left_s)

    def val_row(self, row: Mapping[str, Any]) -> None:
        self.console.val_row(row)
        self._record("val", row)

    def sample(self, prompt: str, text: str, step: int) -> None:
        self.tensorboard.sample(prompt, text, step)
        self.console.sample(prompt, text, step)

    def answers(self, rows: Sequence[tuple[str, str, str]], step: int) -> None:
        self.tensorboard.answers(rows, step)
        self.console.answer(rows[0][0], rows[0][1], step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.tensorboard.scalars(values, step)

    def head_scores(self, scores: HeadScores, step: int) -> None:
        self.tensorboard.head_scores(scores, step)

    def ablation(self, costs_LH: Tensor, step: int) -> None:
        costs = [[round(cost, 4) for cost in row] for row in costs_LH.tolist()]
        self.metrics.append({"step": step, "split": "ablation", "bits_per_token": costs})
        self.tensorboard.head_values("ablation", costs_LH, step)

    def alignment(self, aligning: AligningHeads, step: int) -> None:
        heads = [list(head) for head in aligning.heads]
        chance = round(aligning.chance, 4)
        causal = aligning.causal.row() if aligning.causal else {}
        row = {"score": round(aligning.score, 4), "chance": chance, "heads": heads, **causal}
        self._record("alignment", {"step": step, **row})
        self.tensorboard.chances({TAGS["alignment"]["score"]: chance}, step)

    def reference(self, scores: ReferenceScores, step: int) -> None:
        self._record("reference", {"step": step, **scores.row()})
        self.tensorboard.head_values("reference_weight", scores.weight_LH, step)
        chances = {TAGS["reference"][name]: score.chance for name, score in scores.scores.items()}
        self.tensorboard.chances(chances, step)

    def watched(self, watched: Watched, step: int) -> None:
        self.metrics.append({"step": step, "split": "watch", **watched.row()})
        self.tensorboard.scalars(watched.scalars(), step)
        self.tensorboard.head_values(f"watch/{watched.relation.name}", watched.weight_LH, step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        self.tensorboard.picture(tag, png, step)

    def attention(self, maps: Mapping[str, Any], png: bytes, step: int) -> None:
        self.maps.append(maps)
        self.tensorboard.attention(maps, png, step)

    def hyperparameters(
        self, settings: Mapping[str, Any], metrics: Sequence[str], results: Mapping[str, float], step: int
    ) -> None:
        self.tensorboard.hyperparameters(settings, metrics, results, step)

    def write_attention_page(self, title: str, model: Mapping[str, Any]) -> None:
        curves, others = loss_curves(self.metrics), other_curves(self.metrics)
        page = viewer_page(list(self.maps), title, curves, others, heads_found(self.metrics), model=model)
        write_whole(self.run_dir / "attention.html", page)

    def flush(self) -> None:
        self.tensorboard.flush()
        self.metrics.sync()
        self.maps.sync()

    def _record(self, split: str, row: Mapping[str, Any]) -> None:
        self.metrics.append({"step": row["step"], "split": split, **row})
        self.tensorboard.row(split, row)
