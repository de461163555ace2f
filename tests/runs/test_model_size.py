"""model=auto takes the largest size that machine and time suffice for."""

import json
import re
from pathlib import Path

import pytest
from helpers import train_here

from minitf.config.compose import compose_config
from minitf.config.presets import options
from minitf.config.schema import load_config, model_sizes
from minitf.model import ModelConfig
from minitf.runs.model_size import Budget, choose_size
from minitf.training.trainer_config import TrainerConfig

SIZES = model_sizes(ModelConfig())
LAPTOP, SERVER = 180e9, 850e9  # floating point operations a second


def chosen(flops: float, **settings: float) -> str:
    name, why = choose_size(SIZES, Budget(TrainerConfig(**settings), flops, vocab_size=4096))  # type: ignore[arg-type]
    assert why.startswith(f"{name}, for about ")
    return name


def test_sizes_are_the_presets_smallest_first() -> None:
    assert list(SIZES) == ["nano", "mini", "small"]
    for name, size in SIZES.items():
        assert size == compose_config([f"model={name}"]).model
    assert SIZES["small"].intermediate_size == 1024  # not that of the shape it replaces


def test_machine_and_time_decide_the_size() -> None:
    assert chosen(LAPTOP) == "nano"
    assert chosen(SERVER) == "mini"
    assert chosen(LAPTOP, max_minutes=15) == "mini"
    assert chosen(LAPTOP, max_minutes=600) == "small"
    assert chosen(1e9, max_minutes=0.01) == "nano"  # there is no smaller one


def test_smaller_limit_decides_the_size() -> None:
    assert chosen(SERVER, max_steps=100, max_minutes=600) == "nano"
    assert chosen(SERVER, max_steps=10**6, max_minutes=600) == "small"
    assert chosen(SERVER, max_steps=10**6, max_minutes=0.1) == "nano"


def test_size_does_not_depend_on_the_machine_if_only_steps_are_set() -> None:
    config = compose_config(["trainer.max_steps=100"])
    assert not config.size_is_auto
    assert config.model == SIZES["mini"]


@pytest.mark.slow
def test_requested_size_is_kept() -> None:
    assert compose_config([]).size_is_auto
    assert compose_config(["model.dropout=0.1", "trainer.max_steps=5", "trainer.max_minutes=1"]).size_is_auto
    for asked in ("model=mini", "model=small"):
        assert not compose_config([asked]).size_is_auto
    for asked in ("num_layers=3", "num_kv_heads=2", "context_length=128"):
        assert not compose_config([f"model.{asked}"]).size_is_auto
    for experiment in options("experiment"):
        assert not compose_config([f"experiment={experiment}"]).size_is_auto, experiment


def test_partly_requested_size_is_completed_from_mini() -> None:
    model = compose_config(["model.hidden_size=384"]).model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.context_length) == (4, 384, 6, 128)
    assert model.intermediate_size == 1024


@pytest.mark.slow
def test_run_prints_its_size_and_keeps_it(tiny: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*(word for word in tiny if not word.startswith("model.")), "trainer.max_minutes=3"]
    assert train_here(*settings, "model.dropout=0.1", "trainer.dry_run=true") == 0
    assert re.search(r"^size       nano, for about \S+M tokens in this time: mini has", capsys.readouterr().out, re.M)
    assert train_here(*settings, "model.dropout=0.1", "run_dir=run") == 0
    line = re.search(r"^size       (nano, for .*)$", capsys.readouterr().err, re.M)
    assert line
    assert json.loads(Path("run/environment.json").read_text())["setup"]["size"] == line[1]
    saved = load_config(Path("run/config.yaml")).model
    assert (saved.num_layers, saved.hidden_size, saved.dropout) == (2, 128, 0.1)
    assert train_here("resume=run", "trainer.max_steps=100000", "trainer.dry_run=true") == 0  # enough for `mini`
    said = capsys.readouterr().out
    assert "size " not in said
    assert load_config(Path("run/config.yaml")).model == saved
    settings = [word for word in settings if not word.startswith("tokenizer")]
    assert train_here(*settings, "init_from=run", "trainer.dry_run=true") == 0  # that model's size
    assert "size " not in capsys.readouterr().out
