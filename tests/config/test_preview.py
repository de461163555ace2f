"""The first lines of a run agree with the config that it composes later."""

import os
import pty
import subprocess
import sys

import pytest

from minitf.config.compose import compose_config
from minitf.config.help import help_page
from minitf.config.overrides import check_overrides
from minitf.config.presets import options
from minitf.config.preview import preview
from minitf.reporting.console import fitted, line


@pytest.mark.parametrize(
    "words",
    [[], ["trainer=debug"], ["trainer.max_steps=1200"], ["trainer.max_steps=9", "trainer.max_minutes=2"]]
    + [[f"experiment={name}"] for name in options("experiment")]
    + [["experiment=pronouns", "trainer.max_minutes=0.5", "trainer.max_steps=null"]],
)
def test_the_limit_is_that_of_the_config(words: list[str]) -> None:
    limits = compose_config(words).trainer
    steps = [f"{limits.max_steps:,} steps"] if limits.max_steps else []
    minutes = [f"{limits.max_minutes:g} min"] if limits.max_minutes else []
    _, time = preview(check_overrides(words))
    assert time.startswith(f"{' or '.join(steps + minutes)} of training")


def test_the_subject_is_the_experiment_the_files_or_the_data_set() -> None:
    assert preview([])[0] == "training on the King James Bible, 4.1 MB, embedded (no network needed)"
    files = check_overrides(["data=text", "data.files=[a.txt,b/]"])
    assert preview(files)[0] == "training on a.txt, b/"
    assert preview(check_overrides(["experiment=copy"]))[0].startswith("copy: letters in")
    assert preview(check_overrides(["data=web"]))[0].startswith("training on the World English Bible")


def test_a_run_is_announced_in_a_terminal_without_pytorch() -> None:
    code = """
import sys
from minitf.cli.train import _announce
_announce(["trainer.max_minutes=7"], [])
_announce(["resume=latest"], [])
assert "torch" not in sys.modules
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    said = os.read(ours, 10_000).decode().replace("\r\n", "\n")
    os.close(ours)
    assert done.returncode == 0, said
    assert said.startswith("minitf     training on the King James Bible")
    assert "7 min of training" in said
    assert said.endswith("minitf     resuming latest\n")
    assert max(map(len, said.splitlines())) <= 60
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (piped.returncode, piped.stderr) == (0, "")  # a mistake is one line where a program reads it


def test_the_help_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_page().splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert any(line.startswith(" " * 20) for line in lines)  # a description goes on in its own column


def test_a_line_is_broken_between_words_after_its_label() -> None:
    text = line("device", "cpu, 2 threads; bf16, a core does 822 GFLOP/s in bf16 and 110 in fp32")
    broken = fitted(text, 40).splitlines()
    assert broken[0] == "device     cpu, 2 threads; bf16, a core"
    assert all(len(part) <= 40 and part.startswith(" " * 11) for part in broken[1:])
    assert " ".join("\n".join(broken).split()) == " ".join(text.split())
    path = "runs/" + "x" * 60
    assert path in fitted(line("saved in", path), 40)  # a path stays whole
    assert fitted("", 40) == ""
