"""A run in the terminal: a progress bar, or lines where stderr is no terminal.

In a terminal and in a notebook lines are broken between words. In a file each stays whole, for grep and for editors.
"""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

LABEL_WIDTH = 10
LINES_PER_RUN = 20  # of training numbers, without a progress bar
MAX_SOURCE_CHARS = 120  # of a pair's source, and of its answer
WIDE = 100  # columns in which the progress bar has room for the speed


def line(label: str, text: str) -> str:
    """One line of a report; an empty label continues the one before."""
    return f"{label:<{LABEL_WIDTH}} {text}"


def fitted(text: str, width: int) -> str:
    """A line of a report, broken between words at `width` columns; all its parts begin after the label."""
    indent = " " * (LABEL_WIDTH + 1)
    parts = textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts)


class TrainingConsole:
    """Prints to stderr how far a run is."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.breaks_lines = self.console.is_terminal or self.console.is_jupyter
        self.progress: Progress | None = None
        self.bits_per_byte = math.nan  # of the last evaluation
        self.chrf = math.nan
        self.last_line_step = -1

    def say(self, line: str, whole: bool = False) -> None:
        """Print a line; `whole`: never broken, as a command must not be."""
        self.console.print(escape(line if whole or not self.breaks_lines else fitted(line, self.console.width)))

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
        loss, speed = f"loss {row['loss']:.3f}", f"{row['tokens_per_s'] / 1000:.1f}k tokens/s"
        if self.progress is not None:
            task = self.progress.task_ids[0]
            total = max(train_s + left_s, 1e-9)
            numbers = f"{loss}  {self._held_out()}{speed + '  ' if self.console.width >= WIDE else ''}{left}"
            self.progress.update(task, description=at, completed=train_s, total=total, numbers=numbers)
        elif step - self.last_line_step >= num_steps / LINES_PER_RUN or step == num_steps:
            self.last_line_step = step
            self.say(f"{at}  {loss}  {self._held_out()}{speed}  {left}")

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
        text = f"[dim]{heading}[/dim]{escape(given)}{between}[green]{escape(written)}[/green]"
        self.console.print(text, soft_wrap=not self.breaks_lines)

    def _held_out(self) -> str:
        if math.isnan(self.bits_per_byte):
            return ""
        chrf = "" if math.isnan(self.chrf) else f", chrF {self.chrf:.1f}"
        return f"held-out {self.bits_per_byte:.3f} bits/byte{chrf}  "
