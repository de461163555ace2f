"""What is scored: the run's own held-out text, wherever its files are now, or a file, read as training reads it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_line, make_text, train_here

from minitf.cli.evaluate import main
from minitf.errors import run_command


@pytest.fixture
def run(workdir: Path, tiny: list[str]) -> Path:
    """A run on text.txt, with its prepared text in cache/."""
    (workdir / "text.txt").write_text(make_text(200))
    settings = ["trainer.max_steps=1", "trainer.eval_every=1", "data.files=[text.txt]", "data.cache_dir=cache"]
    assert train_here(*tiny, *settings, "run_dir=run") == 0
    return workdir / "run"


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run_command(lambda: main([*arguments, "--json"])) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_text_that_changed_is_not_scored_as_the_runs_own(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluated(capsys, "--run", str(run))
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text + "Other words at its end. " * 200)
    assert evaluated(capsys, "--run", str(run)) == before  # from the prepared text
    shutil.rmtree("cache")
    assert run_command(lambda: main(["--run", str(run)])) == 2
    assert_one_line(capsys.readouterr().err, "the text that this run was trained on", "names another one")
    Path("text.txt").rename("moved.txt")
    assert run_command(lambda: main(["--run", str(run)])) == 2
    assert_one_line(capsys.readouterr().err, "text.txt does not exist", "data.files=[FILE]")
    Path("text.txt").write_text(text)
    Path("elsewhere").mkdir()
    Path("elsewhere/text.txt").write_text(make_text(200, seed=1))
    monkeypatch.chdir("elsewhere")
    assert evaluated(capsys, "--run", str(run)) == before


def test_a_table_is_scored_by_its_texts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [make_text(5, seed) for seed in range(4)]
    for name, lines in {
        "a.jsonl": [json.dumps({"text": text}) for text in texts],
        "a.json": [json.dumps([{"text": text} for text in texts])],
    }.items():
        Path(name).write_text("\n".join(lines))
        found = evaluated(capsys, "--run", str(run), "--file", name)
        assert found["num_tokens"] == sum(len(text) + 1 for text in texts) - 1  # an end after each
    Path("a.csv").write_text("text\nHello, world\n")
    assert run_command(lambda: main(["--run", str(run), "--file", "a.csv"])) == 2
    assert_one_line(capsys.readouterr().err, "a.csv: line 2: 2 columns, the header has 1")


def test_a_table_of_pairs_is_answered(copying_run: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.csv").write_text("question,answer\nab,ab\ncd,cd\nabcd,dcba\n")
    found = evaluated(capsys, "--run", str(copying_run), "--file", "pairs.csv")
    assert (found["num_pairs"], found["exact_match"]) == (3, pytest.approx(2 / 3))


@pytest.mark.parametrize("flag", ["--max-pairs", "--beam", "--max-tokens"])
def test_a_flag_without_effect_is_refused(
    trained_run: Path, copying_run: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    run = copying_run if flag == "--max-tokens" else trained_run
    assert run_command(lambda: main(["--run", str(run), flag, "3"])) == 2
    assert_one_line(capsys.readouterr().err, f"{flag} has no effect on")
