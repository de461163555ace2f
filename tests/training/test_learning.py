"""A run learns, and the same settings give the same run, however they are computed."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, losses, rows, tensors, train_here

from minitf.backends.autotune import Selection
from minitf.training.tuned_step import TunedStep


def test_loss_falls(trained_run: Path) -> None:
    train, val = rows(trained_run, "train"), rows(trained_run, "val")
    assert train[0]["loss"] == pytest.approx(math.log(257), abs=0.3)  # uniform: a new model knows nothing
    assert train[-1]["loss"] < 3.2
    assert [row["step"] for row in val] == [20, 40]
    assert val[1]["loss"] < val[0]["loss"]
    assert val[1]["loss"] == pytest.approx(train[-1]["loss"], abs=0.3)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["optim=adamw", "model.attention=sdpa"], marks=pytest.mark.slow),
        ["trainer.precision=bf16", "model.tie_embeddings=false", "model.qk_norm=false"],
        ["tokenizer=char", "trainer.precision=auto", "trainer.compile=auto", "trainer.device=auto"],
        pytest.param(
            ["tokenizer=bpe", "tokenizer.vocab_size=270", "optim.schedule=cosine", "attention.heads=false"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_configuration_learns(workdir: Path, tiny: list[str], settings: list[str]) -> None:
    assert train_here(*tiny, *settings, "run_dir=run", "trainer.max_steps=15", "trainer.attention_every=15") == 0
    assert losses("run")[-1][2] < losses("run")[0][2] - 0.4


def test_seed_determines_the_run(workdir: Path, tiny: list[str]) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train_here(*tiny, f"run_dir={name}", f"seed={seed}", "model.dropout=0.1") == 0
    assert_same_run("a", "b")
    assert losses("a") != losses("c")


def test_accumulating_two_batches_equals_one_of_twice_the_size(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "run_dir=two", "trainer.batch_size=4", "trainer.grad_accumulation=2") == 0
    assert train_here(*tiny, "run_dir=one", "trainer.batch_size=8") == 0
    assert [row["tokens"] for row in rows("two", "train")] == [row["tokens"] for row in rows("one", "train")]
    for two, one in zip(losses("two"), losses("one"), strict=True):
        assert two[:2] == one[:2]
        assert two[2] == pytest.approx(one[2], abs=2e-4)


@pytest.mark.slow
def test_warm_up_changes_nothing(workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_here(*tiny, "run_dir=a", "model.dropout=0.1") == 0
    unmeasured = Selection("reference", 0.001, "as set")
    monkeypatch.setattr(TunedStep, "warm_up", lambda *_, **__: unmeasured)
    assert train_here(*tiny, "run_dir=b", "model.dropout=0.1") == 0
    assert_same_run("b", "a")


def test_logging_and_sampling_change_no_tensor(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "run_dir=a", "model.dropout=0.1") == 0
    often = ["trainer.attention_every=1", "trainer.sample_tokens=5", "trainer.log_every=2"]
    assert train_here(*tiny, *often, "run_dir=b", "model.dropout=0.1") == 0
    found, wanted = tensors("b"), tensors("a")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(workdir: Path, tiny: list[str]) -> None:
    from minitf.system.hardware import compiler_missing

    if missing := compiler_missing(torch.device("cpu")):
        pytest.skip(missing)
    for name, setting in (("eager", "false"), ("compiled", "true")):
        settings = [f"trainer.compile={setting}", "trainer.attention_every=3", "trainer.sample_tokens=4"]
        assert train_here(*tiny, *settings, f"run_dir={name}") == 0
    assert json.loads(Path("compiled/environment.json").read_text())["setup"]["backend"].startswith("torch.compile, ")
    for found, expected in zip(losses("compiled"), losses("eager"), strict=True):
        assert found[:2] == expected[:2]
        assert found[2] == pytest.approx(expected[2], abs=2e-3)
