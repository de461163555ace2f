"""A dry run says what a run would take, and leaves no trace."""

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


def test_what_it_says_is_what_the_run_then_is(
    tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "trainer.dry_run=true") == 0
    said = report(capsys)
    assert list(workdir.iterdir()) == []
    assert train_here(*tiny, "run_dir=runs/real/one") == 0
    rows = [json.loads(line) for line in Path("runs/real/one/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "train"][-1]
    assert said["training"] == f"{last['step']} steps, {last['tokens']} tokens"
    assert re.fullmatch(r"[\d,]+ ms for 128 tokens, [\d,]+ tokens/s on cpu in float32, not compiled", said["step"])

    from minitf.checkpoints.checkpoint import load_checkpoint

    parameters = load_checkpoint("runs/real/one").model.num_parameters()
    assert said["parameters"] == f"{parameters:,}, vocabulary 257"
    assert said["tokens"].startswith(f"{768 / parameters:.2g} per parameter")
    saved = sum(path.stat().st_size for path in Path("runs/real/one/checkpoints/latest").glob("*.safetensors"))
    megabytes = float(re.match(r"([\d.]+) MB a checkpoint", said["disk"])[1])  # type: ignore[index]
    assert megabytes == pytest.approx(saved / 1e6, abs=0.1)
    assert float(said["memory"].split()[0].replace(",", "")) > 50


def test_it_computes_as_the_run_would(tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision, dtype in PRECISIONS.items():
        native = "by our kernels"
        try:
            calls.library(dtype)
        except Unavailable:
            native = "not compiled"
        for compilation, words in (("auto", native), ("true", "not compiled")):
            settings = [f"trainer.precision={precision}", f"trainer.compile={compilation}", "trainer.dry_run=true"]
            assert train_here(*tiny, *settings) == 0
            assert report(capsys)["step"].endswith(f"on cpu in {str(dtype).removeprefix('torch.')}, {words}")


def test_the_time_decides_the_steps_as_in_the_run(
    tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for word in tiny if not word.startswith("trainer.max_steps")]
    assert train_here(*settings, "trainer.max_minutes=0.05", "trainer.dry_run=true") == 0
    said = report(capsys)
    step_s = float(said["step"].split()[0]) / 1000
    assert int(said["training"].split()[0].replace(",", "")) * step_s == pytest.approx(3, rel=0.5)
    assert said["time"].startswith("0:0")


def test_it_warns_of_what_is_likely_not_meant(
    tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        (workdir / f"{name}.txt").write_text("A few words. " * 30, encoding="utf-8")
    settings = [word for word in tiny if not word.startswith(("data.files", "model.context"))]
    files = "data.files=[a.txt,b.txt,c.txt]"
    assert train_here(*settings, files, "model.context_length=512", "trainer.dry_run=true") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3
    assert "one step takes 2,048" in warnings[0]
    assert "parameters for 782 tokens" in warnings[1]
    assert "the longest document has 390 tokens, the context is 512" in warnings[2]


def test_a_model_too_large_for_its_time_is_named_before_it_is_trained(
    tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for word in tiny if not word.startswith("trainer.max_steps")]
    for minutes, asked in (("1e-6", "a smaller model learns more in it"), ("1000", "")):
        assert train_here(*settings, f"trainer.max_minutes={minutes}", "trainer.dry_run=true") == 0
        found = [line for line in capsys.readouterr().out.splitlines() if "in this time for" in line]
        assert len(found) == bool(asked)
        assert all(line.startswith("warning") and asked in line for line in found)
    assert train_here(*settings, "trainer.max_minutes=1e-6") == 0
    assert "note       128 tokens in this time for" in capsys.readouterr().err
    assert train_here(*tiny) == 0  # who asks for so many steps, means them
    assert "in this time for" not in capsys.readouterr().err


def test_a_resumed_run_can_be_asked_too(tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, "run_dir=runs/real/one") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    capsys.readouterr()
    assert train_here("resume=runs/real/one", "trainer.max_steps=10", "trainer.dry_run=true") == 0
    assert report(capsys)["training"].startswith("4 steps")
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


def test_the_longest_document_is_found_between_the_ends() -> None:
    def longest(*ids: int) -> int | None:
        return longest_document(np.array(ids, dtype=np.uint16), 9)

    assert longest(1, 2, 3) is None
    assert longest(1, 2, 3, 9, 1, 9) == 3
    assert longest(1, 9, 1, 2, 3, 4) == 4
    assert longest(9) == 0
