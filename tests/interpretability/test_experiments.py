"""Experiments by the command `attention`."""

import json
from pathlib import Path

import pytest
from helpers import data_of

from minitf.api import load
from minitf.edits import block, move
from minitf.errors import run_command
from minitf.interpretability.page import main

TEXT = "The cat sat on the mat"


def run(capsys: pytest.CaptureFixture[str], trained_run: Path, *arguments: str) -> tuple[int, str, str]:
    status = run_command(lambda: main([TEXT, "--run", str(trained_run), *arguments]))
    out, err = capsys.readouterr()
    return status, out, err


def test_block_prints_the_prediction_before_and_after(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, trained_run, "--block", "mat>cat", "--json")
    content, lm = json.loads(out), load(trained_run)
    assert status == 0
    assert content["text"] == TEXT
    for name, chosen in (("before", []), ("after", [block("mat", "cat")])):
        expected = [{"token": token, "probability": round(p, 6)} for token, p in lm.predict(TEXT, chosen)]
        assert content[name] == expected
    assert content["before"] != content["after"]


def test_heads_limit_an_edit(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, trained_run, "--move", "mat>cat>sat", "--heads", "L0H1,L1H0", "--json")
    after = load(trained_run).predict(TEXT, [move("mat", "cat", "sat", [(0, 1), (1, 0)])])
    assert json.loads(out)["after"] == [{"token": token, "probability": round(p, 6)} for token, p in after]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--ablate", "L0H1", "--ablate", "MLP1", "--mean"], "after"),
        (["--lens"], "lens"),
        (["--contributions"], "contributions"),
        (["--patch", "The cat sat on the cat", "--answers", "a", "b"], "patching"),
    ],
)
def test_each_experiment_prints_text_or_json(
    trained_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], key: str
) -> None:
    status, out, _ = run(capsys, trained_run, *arguments, "--json")
    assert key in json.loads(out)
    status, out, _ = run(capsys, trained_run, *arguments)
    assert status == 0
    assert len(out.splitlines()) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "mat<cat"], "must be 2 words with > between them, such as 'it>cat'"),
        (["--move", "mat>cat"], "must be 3 words"),
        (["--block", "cat>mat"], "comes later"),
        (["--block", "mat>dog"], "it has no 'dog'"),
        (["--ablate", "head 3"], "write L0H2 for head 2 of layer 0"),
        (["--heads", "L0H0"], "add one of them"),
        (["--mean"], "add --ablate"),
        (["--answers", "cat", "mat"], "add --patch"),
        (["--block", "mat>cat", "--lens"], "choose one"),
        (["--block", "mat>cat", "--out", "page.html"], "--out is for the page"),
        (["--contributions", "antidisestablishmentarianism"], "is not one token"),
    ],
)
def test_a_wrong_experiment_is_refused_in_one_line(
    trained_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, trained_run, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("minitf:")]) == 1


def test_a_page_stores_the_experiments(trained_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--lens", "--contributions", "--patch", "The cat sat on the cat", "--answers", "a", "b"]
    status, printed, _ = run(capsys, trained_run, *asked, "--out", str(tmp_path / "page.html"))
    assert status == 0
    _, out, _ = run(capsys, trained_run, *asked, "--json")
    content = json.loads(out)
    (shown,) = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["maps"]
    assert shown["lens"] == content["lens"]
    assert shown["contributions"] == content["contributions"]
    assert shown["patch"] == content["patching"]
    assert "likeliest next token" in printed
    assert "share that a place restores" in printed
