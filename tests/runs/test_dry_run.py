"""A dry run prints what a run would need, and leaves no trace."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import train_here

from minitf.backends.cpu import bindings as calls
from minitf.errors import Unavailable
from minitf.runs.dry_run import longest_document
from minitf.system.hardware import PRECISIONS


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {line[:10].strip(): line[11:] for line in lines if not line.startswith("warning")}


def test_dry_run_predicts_the_run(tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, "trainer.dry_run=true") == 0
    printed = report(capsys)
    assert list(workdir.iterdir()) == []
    assert train_here(*tiny, "run_dir=runs/real/one") == 0
    rows = [json.loads(line) for line in Path("runs/real/one/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "train"][-1]
    assert printed["training"] == f"{last['step']} steps, {last['tokens']} tokens"
    assert re.fullmatch(r"[\d,]+ ms for 128 tokens, on cpu in float32, by attention\.py as written", printed["step"])
    assert re.fullmatch(r"[\d,]+ tokens/s", printed["speed"])

    from minitf.checkpoints.checkpoint import load_checkpoint

    parameters = load_checkpoint("runs/real/one").model.num_parameters()
    assert printed["parameters"] == f"{parameters:,}, vocabulary 257"
    assert printed["tokens"].startswith(f"{768 / parameters:.2g} per parameter")
    saved = sum(path.stat().st_size for path in Path("runs/real/one/checkpoints/latest").glob("*.safetensors"))
    megabytes = float(re.match(r"([\d.]+) MB a checkpoint", printed["disk"])[1])  # type: ignore[index]
    assert megabytes == pytest.approx(saved / 1e6, abs=0.1)
    assert float(printed["memory"].split()[0].replace(",", "")) > 50


@pytest.mark.slow
def test_dry_run_computes_like_the_run(tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision, dtype in PRECISIONS.items():
        native = "by our C kernels"
        try:
            calls.library(dtype)
        except Unavailable:
            native = "by attention.py as written"
        for compilation, words in (("auto", native), ("true", "by attention.py as written")):
            settings = [f"trainer.precision={precision}", f"trainer.compile={compilation}", "trainer.dry_run=true"]
            assert train_here(*tiny, *settings) == 0
            assert report(capsys)["step"].endswith(f"on cpu in {str(dtype).removeprefix('torch.')}, {words}")


def test_time_limit_decides_the_number_of_steps(
    tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for word in tiny if not word.startswith("trainer.max_steps")]
    assert train_here(*settings, "trainer.max_minutes=0.05", "trainer.dry_run=true") == 0
    printed = report(capsys)
    step_s = 128 / float(printed["speed"].split()[0].replace(",", ""))
    assert int(printed["training"].split()[0].replace(",", "")) * step_s == pytest.approx(3, rel=0.1)
    assert printed["time"].startswith("0:0")


def test_lines_are_broken_between_words_in_a_terminal(
    tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here(*tiny, "trainer.dry_run=true") == 0
    whole = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 80  # in a file each line stays whole
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert train_here(*tiny, "trainer.dry_run=true") == 0
    broken = capsys.readouterr().out
    assert max(map(len, broken.splitlines())) <= 80
    warning = next(line for line in whole.splitlines() if line.startswith("warning"))
    assert warning.split() == broken[broken.index("warning") :].split("nothing was")[0].split()


def test_likely_mistakes_are_warned_of(tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        (workdir / f"{name}.txt").write_text(f"{name.upper()} few words. " * 30, encoding="utf-8")
    settings = [word for word in tiny if not word.startswith(("data.files", "model.context"))]
    files = "data.files=[a.txt,b.txt,c.txt]"
    assert train_here(*settings, files, "model.context_length=512", "trainer.dry_run=true") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3
    assert "one step takes 2,048" in warnings[0]
    assert "parameters for 782 tokens" in warnings[1]
    assert "the longest document has 390 tokens, the context is 512" in warnings[2]


@pytest.mark.slow
def test_model_too_large_for_its_time_is_warned_of(
    tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for word in tiny if not word.startswith("trainer.max_steps")]
    larger = [*settings, "model.num_layers=3", "model.hidden_size=128"]
    for minutes, asked in (("1e-6", "a smaller model (model=nano) learns more in it"), ("1000", "")):
        assert train_here(*larger, f"trainer.max_minutes={minutes}", "trainer.dry_run=true") == 0
        found = [line for line in capsys.readouterr().out.splitlines() if "in this time for" in line]
        assert len(found) == bool(asked)
        assert all(line.startswith("warning") and asked in line for line in found)
    assert train_here(*larger, "trainer.max_minutes=1e-6") == 0
    said = capsys.readouterr().err
    assert "note       128 tokens in this time for" in said
    assert re.search(r"\ntraining .*: about 1 steps of 128 tokens, .*, as speed allows\n", said)
    assert train_here(*settings, "trainer.max_minutes=1e-6") == 0  # no preset is smaller than this model
    assert train_here(*tiny) == 0  # a number of steps was asked for
    said = capsys.readouterr().err
    assert "in this time for" not in said
    assert "loss: tensorboard --logdir" in said  # without attention, which is off here


def test_resumed_run_has_a_dry_run(tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, "run_dir=runs/real/one") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    capsys.readouterr()
    assert train_here("resume=runs/real/one", "trainer.max_steps=10", "trainer.dry_run=true") == 0
    assert report(capsys)["training"].startswith("4 steps")
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


def test_longest_document_lies_between_two_ends() -> None:
    def longest(*ids: int) -> int | None:
        return longest_document(np.array(ids, dtype=np.uint16), 9)

    assert longest(1, 2, 3) is None
    assert longest(1, 2, 3, 9, 1, 9) == 3
    assert longest(1, 9, 1, 2, 3, 4) == 4
    assert longest(9) == 0
