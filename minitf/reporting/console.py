"""A run in the terminal: a progress bar, or lines where stderr is no terminal."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

LINES_PER_RUN = 20  # of training numbers, without a progress bar
MAX_SOURCE_CHARS = 120  # of a pair's source, and of its answer


class TrainingConsole:
    """Prints to stderr how far a run is."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.bits_per_byte = math.nan  # of the last evaluation
        self.chrf = math.nan
        self.last_line_step = -1

    def say(self, line: str) -> None:
        self.console.print(escape(line))

    def start(self, step: int, num_steps: int) -> None:
        """Show the progress bar, in a terminal."""
        if not self.console.is_terminal:
            return
        columns = TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[numbers]}")
        self.progress = Progress(*columns, console=self.console, transient=True)  # the summary has the last numbers
        self.progress.add_task(f"step {step:,}/{num_steps:,}", total=None, numbers="")
        self.progress.start()

    def stop(self) -> None:
        """Remove the progress bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def train_row(self, row: Mapping[str, Any], num_steps: int, left_s: float) -> None:
        """Move the bar, or print a line, about LINES_PER_RUN times in a run of `num_steps`.

        The bar shows the share of the time: the number of steps of a run with a time limit changes with its speed.
        """
        step, train_s = row["step"], row["train_s"]
        at = f"step {step:,}/{num_steps:,}"
        left = f"{left_s:.0f} s left" if left_s < 100 else f"{left_s / 60:.0f} min left"
        numbers = f"loss {row['loss']:.3f}  {self._held_out()}{row['tokens_per_s'] / 1000:.1f}k tokens/s"
        if self.progress is not None:
            task = self.progress.task_ids[0]
            total = max(train_s + left_s, 1e-9)
            self.progress.update(task, description=at, completed=train_s, total=total, numbers=f"{numbers}  {left}")
        elif step - self.last_line_step >= num_steps / LINES_PER_RUN or step == num_steps:
            self.last_line_step = step
            self.say(f"{at}  {numbers}  {left}")

    def val_row(self, row: Mapping[str, Any]) -> None:
        """Remember the held-out numbers for the next lines."""
        self.bits_per_byte = row["bits_per_byte"]
        self.chrf = row.get("chrf", math.nan)

    def sample(self, prompt: str, text: str, step: int) -> None:
        """A prompt and its continuation."""
        self._text(step, prompt, " ", " ".join(text.split()))

    def answer(self, source: str, answer: str, step: int) -> None:
        """A source and the model's answer."""
        source, answer = (textwrap.shorten(text, MAX_SOURCE_CHARS, placeholder=" …") for text in (source, answer))
        self._text(step, source, " -> ", answer)

    def _text(self, step: int, given: str, between: str, written: str) -> None:
        heading = f"step {step:,}  {self._held_out()}"
        self.console.print(f"[dim]{heading}[/dim]{escape(given)}{between}[green]{escape(written)}[/green]")

    def _held_out(self) -> str:
        if math.isnan(self.bits_per_byte):
            return ""
        chrf = "" if math.isnan(self.chrf) else f", chrF {self.chrf:.1f}"
        return f"held-out {self.bits_per_byte:.3f} bits/byte{chrf}  "
