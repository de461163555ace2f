"""What a run leaves in its directory and prints, and what can be done with it."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import make_text, rows, train_here

import minitf
from minitf.checkpoints.locate import find_checkpoint
from minitf.cli import evaluate
from minitf.generate import Options
from minitf.inference.sampling import Sampling
from minitf.optim import OptimConfig, schedule_factor

TRAIN_KEYS = {"step", "split", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "train_s", "warmup_s", "elapsed_s"}
VAL_KEYS = {"step", "split", "loss", "bits_per_byte", "perplexity"}


def test_metrics_rows_have_the_documented_columns(trained_run: Path) -> None:
    train, val = rows(trained_run, "train"), rows(trained_run, "val")
    assert len(train) + len(val) == len(rows(trained_run))
    for row in train:
        assert row.keys() >= TRAIN_KEYS
    for row in val:
        assert row.keys() >= VAL_KEYS
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        # One byte a token, of which the first is not predicted.
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=1e-3)
    assert [row["step"] for row in train] == list(range(1, 41))
    assert [row["tokens"] for row in train] == [step * 4 * 32 for step in range(1, 41)]
    for name in ("train_s", "elapsed_s"):
        assert [row[name] for row in train] == sorted(row[name] for row in train)
    assert all(row["elapsed_s"] >= row["train_s"] > 0 for row in train)
    assert all(row["warmup_s"] == train[0]["warmup_s"] > 0 for row in train)


def test_lr_column_follows_the_schedule(workdir: Path, tiny: list[str]) -> None:
    settings = ["optim.learning_rate=0.01", "optim.warmup_fraction=0.3", "optim.decay_fraction=0.5"]
    assert train_here(*tiny, *settings, "run_dir=run", "trainer.max_steps=10") == 0
    config = OptimConfig(warmup_fraction=0.3, decay_fraction=0.5)
    expected = [0.01 * schedule_factor(config, step, 10) for step in range(1, 11)]
    assert [row["lr"] for row in rows("run", "train")] == pytest.approx(expected)
    assert max(expected) == 0.01


def test_run_directory_holds_the_documented_files(trained_run: Path) -> None:
    names = {path.name for path in trained_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "attention.html", "checkpoints", "environment.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    environment = json.loads((trained_run / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"command", "python", "platform", "processor", "device", "git_commit"} <= environment.keys()
    page = (trained_run / "attention.html").read_text(encoding="utf-8")
    assert "Sir, go = on" in page
    for link in ("latest", "best"):
        assert (trained_run / "checkpoints" / link / "model.safetensors").is_file()


def test_tensorboard_gets_every_documented_tag(trained_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events_of(folder: str) -> EventAccumulator:
        sizes = {"scalars": 0, "images": 0, "tensors": 0}
        return EventAccumulator(str(trained_run / folder), size_guidance=sizes).Reload()

    for folder, split, tags in (
        ("train", "train", ["loss", "optimizer/learning_rate", "optimizer/gradient_norm", "speed/mfu"]),
        ("held_out", "val", ["loss", "quality/bits_per_byte", "quality/perplexity"]),
    ):
        scalars = events_of(folder)
        assert set(tags) <= set(scalars.Tags()["scalars"])
        assert [event.value for event in scalars.Scalars("loss")] == pytest.approx(
            [row["loss"] for row in rows(trained_run, split)], rel=1e-6
        )
    events = events_of("")
    tags = events.Tags()
    assert tags["scalars"] == []  # one card for the loss, none for each head
    logged = [0, *range(3, 40, 3), 40]
    assert [event.step for event in events.Tensors("minitf_attention/scores")] == logged
    for probe in ("The cat sat on the mat.", "Sir, go = on"):
        assert f"pictures/attention/{probe}" in tags["images"]
        images = events.Images(f"pictures/attention/{probe}")
        assert [image.step for image in images] == logged
        assert images[0].encoded_image_string.startswith(b"\x89PNG")
    samples = next(tag for tag in tags["tensors"] if tag.split("/")[0] == "samples")
    assert [event.step for event in events.Tensors(samples)] == [20, 40]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_printed_commands_can_be_typed(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "q.txt").write_text('It\'s "so", cost $HOME `5`\n' * 80)
    assert train_here(*tiny, "data.files=[q.txt]", "name=quotes") == 0
    said = capsys.readouterr().err
    (line,) = (line for line in said.splitlines() if "minitf.generate" in line)
    words = shlex.split(line.removeprefix("generate"))
    assert words[:3] == ["python", "-m", "minitf.generate"]  # there is no scripts/ here
    assert len(words) == 4
    assert words[3] in (workdir / "q.txt").read_text()
    (resume,) = re.findall(r"python -m minitf.train (resume=\S+ \S+)", said)
    assert train_here(*resume.split()) == 0
    (run,) = (workdir / "runs/quotes").iterdir()
    assert rows(run)[-1]["step"] == 12


@pytest.mark.parametrize(
    ("run_dir", "resume"), [("elsewhere/one", "resume=elsewhere/one"), ("runs/one", "resume=latest")]
)
def test_the_resume_command_names_the_run(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], run_dir: str, resume: str
) -> None:
    assert train_here(*tiny, "trainer.max_steps=2", f"run_dir={run_dir}") == 0
    assert f"python -m minitf.train {resume} trainer.max_steps=4" in capsys.readouterr().err


def test_load_generates_and_returns_attention(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained_run.parent.parent.parent)
    lm = minitf.load()
    assert lm.directory == find_checkpoint(trained_run)
    assert lm.step == 40
    text = lm.generate("The cat", max_tokens=12, seed=1)
    assert text == lm.generate("The cat", max_tokens=12, seed=1)
    assert text == "".join(lm.stream("The cat", Options(12, 1, sampling=Sampling(min_p=0.05))))
    assert len(lm.generate("The cat", max_tokens=12, num_samples=3)) == 3
    maps = lm.attention("The cat sat")
    assert maps.weights_LHTS.shape == (2, 4, 11, 11)
    assert "".join(maps.tokens) == "The cat sat"
    assert "<iframe" in maps._repr_html_()


def test_evaluate_command_reproduces_the_logged_metrics(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 40):
        checkpoint = trained_run / f"checkpoints/step_{step:08d}"
        assert evaluate.main(["--run", str(checkpoint), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        (row,) = (row for row in rows(trained_run, "val") if row["step"] == step)
        assert found["step"] == step
        assert found["num_tokens"] == row["num_tokens"]
        for name in ("loss", "bits_per_byte", "perplexity"):
            assert found[name] == pytest.approx(row[name], rel=1e-5)


def test_evaluate_command_reads_another_file(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {}
    for name, text in (("like.txt", make_text(50, seed=9)), ("unlike.txt", "zq#7" * 500)):
        (tmp_path / name).write_text(text)
        arguments = ["--run", str(trained_run), "--json", "--file", str(tmp_path / name)]
        assert evaluate.main(arguments) == 0
        results[name] = json.loads(capsys.readouterr().out)
        assert results[name]["num_tokens"] == len(text) - 1
    assert results["like.txt"]["loss"] < results["unlike.txt"]["loss"] - 1
