"""`minitf` alone says what there is; `minitf COMMAND` runs a command."""

import re
import sys

import pytest

from minitf.__main__ import OVERVIEW, main, run
from minitf.config.presets import COMMANDS


def test_the_overview_has_ten_lines_that_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out == f"{OVERVIEW}\n" * 2
    lines = OVERVIEW.splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80


def test_the_overview_names_every_command() -> None:
    assert set(re.findall(r"minitf\.(\w+)", OVERVIEW)) == set(COMMANDS)


def test_a_command_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["minitf"])
    assert main(["train", "--version"]) == 0
    assert capsys.readouterr().out.startswith("minitf ")


def test_a_mistyped_command_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["minitf", "trian"])
    assert run() == 2
    assert capsys.readouterr().err == "minitf: trian: no such command; did you mean train?\n"
