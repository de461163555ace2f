"""What a run prints while it trains, in a terminal of 80 columns."""

import io
import re

import pytest
from rich.console import Console

from minitf.reporting.console import TrainingConsole, line

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROW = {"step": 9, "train_s": 60.0, "loss": 1.5, "tokens_per_s": 12_700.0}


def in_a_terminal() -> tuple[TrainingConsole, io.StringIO]:
    console, said = TrainingConsole(), io.StringIO()
    console.console = Console(file=said, force_terminal=True, width=80, highlight=False, soft_wrap=True)
    console.breaks_lines = True
    return console, said


def test_no_word_is_cut_at_the_edge() -> None:
    console, said = in_a_terminal()
    text = "0.95M parameters, 2 layers of 128, 4 heads, context 128, vocabulary 4,096 " * 2
    written = "the generations of the sons of Noah, Shem, Ham, and Japheth: " * 3
    console.say(line("model", text))
    console.val_row({"bits_per_byte": 1.813})
    console.sample("Now these are", written, 9)
    lines = CONTROL.sub("", said.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    whole = f"model {text} step 9 held-out 1.813 bits/byte Now these are {written}"
    assert " ".join(lines).split() == whole.split()


def test_the_bar_fits_and_does_not_stay_above_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    console, said = in_a_terminal()
    console.val_row({"bits_per_byte": 1.813})
    console.start(0, 44)
    console.train_row(ROW, 44, 61.0)
    console.stop()
    parts = re.split(r"[\r\n]", CONTROL.sub("", said.getvalue()))
    bars = [part for part in parts if part.startswith("step 9/44")]
    assert bars
    assert all(len(bar.rstrip()) <= 80 and bar.rstrip().endswith("61 s left") for bar in bars)  # not cut
    assert "\x1b[2K" in said.getvalue().rpartition("61 s left")[2]  # the line is erased
