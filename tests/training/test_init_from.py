"""A new run may start from the weights of another."""

from pathlib import Path

import pytest
from helpers import assert_one_line, rows, train_here

from minitf.checkpoints.checkpoint import load_checkpoint


def own_shape(tiny: list[str]) -> list[str]:
    """The tiny settings without those of shape and tokenizer, which `init_from` brings."""
    return [setting for setting in tiny if not setting.startswith(("model.", "tokenizer"))]


@pytest.mark.parametrize("setting", ["model.num_layers=1", "model=nano", "tokenizer=char", "tokenizer.vocab_size=300"])
def test_init_from_refuses_another_shape_or_tokenizer(
    workdir: Path, tiny: list[str], trained_run: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert train_here(*own_shape(tiny), setting, "run_dir=run", f"init_from={trained_run}") == 2
    assert_one_line(capsys.readouterr().err, setting)
    assert not Path("run").exists()


def test_init_from_takes_weights_shape_and_tokenizer(workdir: Path, tiny: list[str], trained_run: Path) -> None:
    assert train_here(*own_shape(tiny), "run_dir=run", f"init_from={trained_run}") == 0
    assert load_checkpoint("run").model.config == load_checkpoint(trained_run).model.config
    assert load_checkpoint("run").tokenizer.to_json() == load_checkpoint(trained_run).tokenizer.to_json()
    assert rows("run", "train")[0]["loss"] == pytest.approx(rows(trained_run, "val")[-1]["loss"], abs=0.3)
    assert train_here("resume=run", "trainer.max_steps=8") == 0
    still = ["optim.learning_rate=0", "optim.matrix_learning_rate=0", "trainer.eval_tokens=100000"]
    assert train_here(*own_shape(tiny), *still, "run_dir=still", f"init_from={trained_run}") == 0
    assert rows("still", "val")[-1]["loss"] == pytest.approx(rows(trained_run, "val")[-1]["loss"], rel=1e-6)
