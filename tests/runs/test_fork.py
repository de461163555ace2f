"""A fork continues a kept checkpoint of another run: exactly, or with one thing changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, assert_same_run, losses, rows, tensors, train_here
from safetensors.torch import load_file

import minitf
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.model import ModelConfig, Transformer
from minitf.training.actions import LogRow
from minitf.training.trainer import Trainer

KEPT = ["model.dropout=0.1", "trainer.max_steps=8", "trainer.save_every=2", "trainer.keep_checkpoints=all"]


@pytest.fixture
def parent(workdir: Path, tiny: list[str]) -> Path:
    assert train_here(*tiny, *KEPT, "trainer.attention_every=4", "run_dir=runs/tiny/parent") == 0
    return Path("runs/tiny/parent")


def test_a_fork_without_a_change_is_the_run_it_continues(parent: Path) -> None:
    assert train_here(f"fork={parent}@4", "run_dir=runs/tiny/fork") == 0
    fork = Path("runs/tiny/fork")
    assert losses(fork) == [row for row in losses(parent) if row[0] > 4]
    found, expected = tensors(fork), tensors(parent)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert json.loads((fork / "forked_from.json").read_text()) == {"run": "../parent", "step": 4}
    assert "fork: runs/tiny/parent@4" in (fork / "config.yaml").read_text()
    # Its first look is at what it begins with.
    assert [path.name for path in sorted(fork.glob("snapshots/*"))] == ["step_00000004", "step_00000008"]
    decisions = [json.loads((run / "decisions.json").read_text()) for run in (fork, parent)]
    assert decisions[0] == decisions[1]


@pytest.mark.slow
def test_a_fork_resumes_and_may_be_given_another_end(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"fork={parent}@4", "optim.learning_rate=0.001", "trainer.max_steps=10"]
    assert train_here(*settings, "run_dir=whole") == 0
    assert rows("whole", "train")[-1]["step"] == 10

    def killed(self: LogRow, trainer: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # before it has saved anything
        patch.setattr(LogRow, "__call__", killed)
        assert (
            train_here(f"fork={parent}@4", "run_dir=parts", "optim.learning_rate=0.001", "trainer.max_steps=10") == 130
        )
    assert train_here("resume=parts") == 0
    assert_same_run("parts", "whole")
    assert losses("parts") != losses(parent)


def test_a_head_that_is_off_stays_off_and_its_weights_are_zero_in_every_file(
    parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(f"fork={parent}@4", "run_dir=runs/tiny/off", "model.heads_off=[[0,2],[1,3]]") == 0
    config = json.loads(Path("runs/tiny/off/checkpoints/latest/config.json").read_text())
    assert (config["model_type"], config["minitf"]["heads_off"]) == ("qwen3", [[0, 2], [1, 3]])
    weights = load_file("runs/tiny/off/checkpoints/latest/model.safetensors")
    columns = weights["model.layers.0.self_attn.o_proj.weight"].unflatten(1, (4, 8)).abs().sum((0, 2))
    assert columns[2] == 0
    assert columns[[0, 1, 3]].min() > 0
    # What minitf computes is what a program computes that knows nothing of it.
    checkpoint = load_checkpoint("runs/tiny/off")
    plain = Transformer(ModelConfig(**{**vars(checkpoint.model.config), "heads_off": []}), checkpoint.model.vocab_size)
    plain.load_state_dict(weights)
    ids = torch.arange(32)[None]
    assert torch.equal(checkpoint.model(ids), plain.eval()(ids))
    assert minitf.load("runs/tiny/off").generate("The cat", max_tokens=4)
    # Resumed, it is still off.
    assert train_here("resume=runs/tiny/off", "trainer.max_steps=10") == 0
    weights = load_file("runs/tiny/off/checkpoints/latest/model.safetensors")
    assert not weights["model.layers.0.self_attn.o_proj.weight"][:, 16:24].any()


def test_a_head_that_is_off_learns_nothing_and_changes_nothing(make_model) -> None:  # type: ignore[no-untyped-def]
    model = make_model(heads_off=[[0, 1]])
    other = make_model(heads_off=[[0, 1]])
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight[:, 8:16] += 1
    ids = torch.arange(32)[None]
    assert torch.equal(model(ids), other(ids))
    model.loss(ids, ids).backward()
    assert not model.model.layers[0].self_attn.o_proj.weight.grad[:, 8:16].any()
    assert not model.model.layers[0].self_attn.q_proj.weight.grad[8:16].any()


def test_no_fast_path_takes_a_head_for_on(make_model) -> None:  # type: ignore[no-untyped-def]
    from minitf.backends.cpu.decoding import CpuEngine
    from minitf.backends.cpu.kernels import CpuKernels
    from minitf.backends.sdpa import Sdpa

    model = make_model(heads_off=[[0, 1]])
    for backend in (CpuKernels(), Sdpa(), CpuEngine):
        assert "HeadsOff" in str(backend.unsupported(model))


def test_a_fork_may_learn_another_text(parent: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("Another text. " * 2000)
    assert train_here(f"fork={parent}@4", "run_dir=other", f"data.files=['{text}']") == 0
    assert [row[0] for row in losses("other")] == [row[0] for row in losses(parent) if row[0] > 4]
    assert losses("other") != [row for row in losses(parent) if row[0] > 4]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fork=runs/tiny/parent@5"], ["no step 5", "2, 3, 4, 6, 8", "keep_checkpoints=all"]),
        (["fork=runs/tiny/parent"], ["step is missing", "2, 3, 4, 6, 8"]),
        (["fork=nowhere@4"], ["nowhere is not a run"]),
        (["fork=runs/tiny/parent@8"], ["ends at step 8", "trainer.max_steps=N"]),
        (["fork=runs/tiny/parent@4", "trainer.max_steps=3"], ["ends at step 4"]),
        (["fork=runs/tiny/parent@4", "model.num_layers=3"], ["model.num_layers=3", "model.heads_off"]),
        (["fork=runs/tiny/parent@4", "model.heads_off=[[7,0]]"], ["model.heads_off", "[7, 0]", "2 layers of 4 heads"]),
        (["fork=runs/tiny/parent@4", "-m"], ["does not go with"]),
    ],
)
def test_what_cannot_be_forked_is_refused_in_one_line(
    words: list[str], expected: list[str], workdir: Path, shared_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shared_parent, "runs/tiny/parent", symlinks=True)
    assert train_here(*words, "run_dir=new") == 2
    assert_one_line(capsys.readouterr().err, *expected)
    assert not Path("new").exists()


@pytest.fixture(scope="module")
def shared_parent(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    run = tmp_path_factory.mktemp("parent") / "parent"
    assert train_here(*tiny, *KEPT, f"run_dir='{run}'") == 0
    return run
