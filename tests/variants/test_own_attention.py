"""One's own attention, `model.attention_class=FILE.py:CLASS`: the run keeps the file, and no one else's code runs."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, assert_same_run, interrupt_at, train_here

import minitf
from minitf.cli.evaluate import main as evaluate
from minitf.cli.generate import main as generate
from minitf.errors import RequestError, UntrustedCode, run_command
from minitf.tensorboard.folders import RunFolders
from minitf.tensorboard.gate import RefusedError
from minitf.tensorboard.live import Live

SOURCE = '''
import pathlib
from torch import Tensor
from minitf.attention import Attention

pathlib.Path("imported").touch()


class MyAttention(Attention):
    """weigh: weights = softmax(scores / 3)"""

    def weigh(self, scores_BHTS: Tensor) -> Tensor:
        return super().weigh(scores_BHTS / 3)
'''
QUICK = ["trainer.max_steps=2", "trainer.sample_tokens=0", "trainer.attention_every=-1", "trainer.compile=false"]


@pytest.fixture
def trusts_nothing(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another user, in a process that has imported nothing yet; returns the working directory."""
    return forget(workdir, monkeypatch)


def forget(workdir: Path, monkeypatch: pytest.MonkeyPatch, name: str = "config") -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workdir / name))
    monkeypatch.setattr("minitf.variants._own._imported", {})
    monkeypatch.setattr("minitf.variants._own._adopted", {})
    return workdir


def own_run(workdir: Path, tiny: list[str], *more: str, name: str = "own") -> Path:
    (workdir / "my_attention.py").write_text(SOURCE)
    settings = [*tiny, *QUICK, "model.attention_class=my_attention.py:MyAttention", f"run_dir={name}", *more]
    assert train_here(*settings) == 0
    return workdir / name


def test_the_run_holds_the_file_and_computes_with_it(trusts_nothing: Path, tiny: list[str]) -> None:
    run = own_run(trusts_nothing, tiny)
    for copy in (run, run / "checkpoints/latest"):
        assert (copy / "my_attention.py").read_text() == SOURCE
    (trusts_nothing / "my_attention.py").unlink()
    lm = minitf.load(run)
    attention = lm.model.model.layers[0].self_attn  # type: ignore[index, union-attr]
    assert type(attention).__name__ == "MyAttention"
    scores = torch.randn(1, 1, 3, 3)
    assert torch.equal(attention.weigh(scores), (scores / 3).softmax(-1))  # type: ignore[operator]
    assert not lm.attention("The cat").to_viewer()["standard_formula"]
    assert len(str(lm.generate("The cat", max_tokens=3, seed=0))) > 0


def test_a_resumed_run_computes_what_was_trained(
    trusts_nothing: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = own_run(trusts_nothing, tiny, "trainer.max_steps=4", name="whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        settings = [*tiny, *QUICK, "trainer.max_steps=4", "model.attention_class=my_attention.py:MyAttention"]
        assert train_here(*settings, "run_dir=half") == 0
    (trusts_nothing / "my_attention.py").write_text("raise RuntimeError('edited since')")
    monkeypatch.setattr("minitf.variants._own._adopted", {})
    moved = trusts_nothing / "moved"
    shutil.move(trusts_nothing / "half", moved)
    assert train_here(f"resume={moved}") == 0
    assert_same_run(str(moved), str(whole))


def test_an_edit_during_the_run_changes_nothing(trusts_nothing: Path, tiny: list[str]) -> None:
    from minitf.variants._own import adopt, own_class, trust

    file = trusts_nothing / "my_attention.py"
    file.write_text(SOURCE)
    own = f"{file}:MyAttention"
    trust(own)
    adopt(own)
    file.write_text("edited")
    assert own_class(own).code.content == SOURCE.encode()


def stranger(workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was trained elsewhere, with code in it."""
    run = own_run(workdir, tiny)
    (workdir / "imported").unlink()
    (workdir / "my_attention.py").unlink()
    forget(workdir, monkeypatch, "another machine")
    return run


def test_the_code_in_a_run_from_elsewhere_is_refused(
    trusts_nothing: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stranger(trusts_nothing, tiny, monkeypatch)
    capsys.readouterr()
    commands = [
        lambda: run_command(lambda: generate(["The cat", "--run", str(run)])),
        lambda: run_command(lambda: evaluate(["--run", str(run)])),
        lambda: train_here(f"resume={run}", "trainer.max_steps=4"),
        lambda: train_here(*tiny[:2], *QUICK, f"init_from={run}"),
    ]
    for command in commands:
        assert command() == 2
        err = capsys.readouterr().err
        assert err.count("minitf: ") == 1
        assert_one_line(err, "my_attention.py is code that was not trained with on this machine", "dry_run=true")
    shutil.rmtree(run / "checkpoints")  # resuming from the first step
    assert train_here(f"resume={run}") == 2
    assert not list(run.glob("checkpoints"))
    with pytest.raises(UntrustedCode):
        _load_copy(run)
    assert not (trusts_nothing / "imported").exists()


def _load_copy(run: Path) -> None:
    from minitf.variants import attention_class

    attention_class("softmax", f"{run}/my_attention.py:MyAttention")


def test_tensorboard_refuses_it_too(trusts_nothing: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stranger(trusts_nothing, tiny, monkeypatch)
    live = Live(RunFolders(str(trusts_nothing)))
    body = {"run": "own", "step": 2, "text": "The cat", "new_tokens": 0, "seed": 0}
    with pytest.raises(RefusedError, match="was not trained with on this machine"):
        live.answer(body, ["own"])
    assert not (trusts_nothing / "imported").exists()


def test_naming_the_file_allows_it(trusts_nothing: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = stranger(trusts_nothing, tiny, monkeypatch)
    named = f"model.attention_class={run}/my_attention.py:MyAttention"
    assert train_here(*tiny, *QUICK, "trainer.dry_run=true", named) == 0
    assert minitf.load(run).attention("The cat").weights_LHTS.isfinite().all()


def test_a_changed_copy_is_refused(trusts_nothing: Path, tiny: list[str]) -> None:
    run = own_run(trusts_nothing, tiny)
    (run / "my_attention.py").write_text(SOURCE + "# one more line")
    with pytest.raises(UntrustedCode):
        _load_copy(run)
    latest = (run / "checkpoints/latest").resolve()
    (latest / "my_attention.py").write_text(SOURCE + "# one more line")
    with pytest.raises(minitf.errors.MinitfError, match=r"my_attention\.py is damaged"):
        minitf.load(latest)


def test_a_pipe_in_its_place_is_no_file(trusts_nothing: Path) -> None:
    os.mkfifo(trusts_nothing / "my_attention.py")
    with pytest.raises(RequestError, match="is no file"):
        _load_copy(trusts_nothing)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (SOURCE, "my_attention.py:Missing", "Missing is not there"),
        (SOURCE, "my_attention.py:Tensor", "Tensor is no subclass of minitf.attention.Attention"),
        (SOURCE, "my_attention.py", "must be FILE.py:CLASS"),
        (SOURCE, "elsewhere.py:MyAttention", "cannot read elsewhere.py: No such file"),
        ("import torch\nx = 1 / 0\n", "my_attention.py:MyAttention", "line 2: ZeroDivisionError"),
        ("class MyAttention(:\n", "my_attention.py:MyAttention", "line 1: SyntaxError"),
    ],
)
def test_a_mistake_is_one_line(
    source: str, name: str, message: str, trusts_nothing: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (trusts_nothing / "my_attention.py").write_text(source)
    assert train_here(*tiny, *QUICK, f"model.attention_class={name}", "run_dir=own") == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (trusts_nothing / "own").exists()


def test_a_class_and_a_variant_exclude_each_other() -> None:
    from minitf.model import ModelConfig

    with pytest.raises(RequestError, match="exclude each other"):
        ModelConfig(variant="sink", attention_class="a.py:A")
