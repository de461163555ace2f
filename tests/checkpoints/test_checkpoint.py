"""Checkpoints: round trip, failures, damage, and the names of runs."""

import errno
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minitf.checkpoints import checkpoint as checkpoint_module
from minitf.checkpoints.checkpoint import load_checkpoint, load_optimizer_state, save_checkpoint
from minitf.checkpoints.locate import find_checkpoint, find_run, newest_run
from minitf.checkpoints.train_state import TrainState
from minitf.errors import DeviceError, MinitfError, RequestError
from minitf.generate import Options, generate_text
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

FILES = {
    "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "trainer_state.json", "trainer_state.safetensors",
}  # fmt: skip
MakeModel = Callable[..., Transformer]
Save = Callable[..., Path]


@pytest.fixture
def save(make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path) -> Save:
    """Save a model whose random weights are seeded by its step, under runs/NAME/DATE/checkpoints."""

    def save(step: int, is_best: bool = False, keep: int = 10, run: str = "runs/a/1") -> Path:
        (tmp_path / run).mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "config.yaml").touch()
        model = make_model(tokenizer.vocab_size, seed=step)
        tensors = {"0.0.momentum": torch.full((3,), step), "random_state": torch.arange(8, dtype=torch.uint8)}
        state = {"step": step, "loss": 0.1 + step, "name": 'naïve "世"'}
        return save_checkpoint(
            tmp_path / run / "checkpoints", model, tokenizer, tensors, state, is_best=is_best, keep=keep
        )

    return save


def weights_are_those_of(directory: Path, step: int, make_model: MakeModel) -> bool:
    loaded = load_checkpoint(directory)
    expected = make_model(loaded.tokenizer.vocab_size, seed=step).state_dict()
    return loaded.step == step and all(torch.equal(v, expected[k]) for k, v in loaded.model.state_dict().items())


# Round trip


@pytest.mark.parametrize(
    "shape",
    [{}, {"tie_embeddings": False}, {"qk_norm": False}, {"dropout": 0.25, "rope_theta": 123.5, "head_dim": 10}],
)
def test_checkpoints_round_trip(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, shape: dict[str, Any]
) -> None:
    model = make_model(tokenizer.vocab_size, **shape)
    tensors = {"0.1.momentum": torch.randn(2, 3), "1.0.step": torch.tensor(7.0)}
    tensors |= {"random_state": torch.get_rng_state(), "pending": torch.randn(4, 2)}
    state = {"step": 1234, "train_s": 0.1 + 0.2, "last_val": {"loss": 1.0 / 3}, "data": {"files": ["a"]}}
    directory = save_checkpoint(tmp_path, model, tokenizer, tensors, state, is_best=True, keep=2)
    assert directory.name == "step_00001234"
    assert {path.name for path in directory.iterdir()} == FILES

    loaded = load_checkpoint(directory)
    assert loaded.model.config == model.config
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert not loaded.model.training
    assert loaded.step == 1234
    assert {key: loaded.state[key] for key in state} == state
    assert loaded.tokenizer.to_json() == tokenizer.to_json()

    restored = load_optimizer_state(directory)
    assert restored.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(restored[name], value), name


def test_train_state_round_trips_or_names_the_missing_field() -> None:
    state = TrainState(step=3, num_steps=9, tokens=5, best_loss=1.5, last_val={"loss": 1.0})
    assert TrainState.from_json({**vars(state), "data": {}}) == state
    with pytest.raises(MinitfError, match="num_steps"):
        TrainState.from_json({"step": 3})
    assert math.isinf(TrainState().best_loss)


def test_checkpoints_contain_no_pickle(save: Save) -> None:
    for file in save(1).iterdir():
        assert file.suffix in (".json", ".safetensors")


# Failures


@pytest.mark.parametrize("again", ["the next step", "the same step"])
def test_a_failed_write_at_any_point_loses_nothing(
    save: Save, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    first = save(1, is_best=True)
    checkpoints = first.parent
    step = 2 if again == "the next step" else 1
    calls = 0
    fail_at = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("write_tensors", "_write_json", "sha256", "flush"):
            patch.setattr(checkpoint_module, name, failing(getattr(checkpoint_module, name)))
        patch.setattr(Tokenizer, "save", failing(Tokenizer.save))
        if again == "the next step":  # replacing a checkpoint of the same step takes two renames
            patch.setattr(os, "replace", failing(os.replace))
        num_failures = 0
        while True:
            calls, fail_at = 0, fail_at + 1
            try:
                save(step, is_best=True)
            except OSError:
                num_failures += 1
            else:
                break
            assert not list(checkpoints.glob(".*partial"))
            for directory in checkpoints.glob("step_*"):
                assert weights_are_those_of(directory, int(directory.name[5:]), make_model)
            assert (checkpoints / "step_00000001").is_dir()
            assert (checkpoints / "latest" / "model.safetensors").is_file()
            assert (checkpoints / "best" / "model.safetensors").is_file()
            shutil.rmtree(checkpoints / "step_00000002", ignore_errors=True)
            for link in ("latest", "best"):
                (checkpoints / link).unlink()
                (checkpoints / link).symlink_to(first.name)
    assert num_failures >= 15
    assert (checkpoints / "latest").resolve().name == f"step_{step:08d}"


def test_partial_directories_of_a_killed_run_are_ignored_and_removed(save: Save) -> None:
    first = save(1)
    partial = first.parent / ".step_00000002.partial"
    shutil.copytree(first, partial)
    assert find_checkpoint(first.parent.parent, "latest") == first
    save(2)
    assert not partial.exists()


def test_a_file_named_checkpoints_is_an_os_error(save: Save, tmp_path: Path) -> None:
    (tmp_path / "runs/a/1").mkdir(parents=True)
    (tmp_path / "runs/a/1/checkpoints").touch()
    with pytest.raises(OSError):
        save(1)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest_and_latest_and_best(save: Save, keep: int) -> None:
    for step in range(1, 8):
        directory = save(step, is_best=step == 2, keep=keep)
        steps = {int(path.name[5:]) for path in directory.parent.glob("step_*") if path.is_dir()}
        assert steps == set(range(max(1, step - keep + 1), step + 1)) | ({2} if step >= 2 else set())
        assert (directory.parent / "latest").resolve() == directory
        if step >= 2:
            assert (directory.parent / "best").resolve().name == "step_00000002"
    assert load_checkpoint(directory.parent.parent).step == 2  # `best` is the default
    assert load_checkpoint(directory.parent.parent, prefer="latest").step == 7


def test_links_survive_resuming_from_an_earlier_step(save: Save) -> None:
    for step in (10, 20, 30):
        save(step, is_best=step == 10, keep=2)
    directory = save(15, keep=2)  # resumed from step 10
    assert (directory.parent / "latest").resolve() == directory
    assert load_checkpoint(directory).step == 15
    assert (directory.parent / "best").resolve().name == "step_00000010"


# Damage


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(content[: len(content) * 2 // 3])
    elif how == "one byte short":
        file.write_bytes(content[:-2])
    elif how == "zeros":
        file.write_bytes(bytes(len(content)))
    elif how == "binary":
        file.write_bytes(b"\xff\xfe\x00\x80" * 20)


def test_a_run_directly_in_runs_is_the_latest(trained_run: Path, workdir: Path) -> None:
    shutil.copytree(trained_run, "runs/one", symlinks=True)
    assert newest_run() == find_run("latest") == Path("runs/one")


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "one byte short", "zeros", "binary"])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_file_is_named(save: Save, name: str, how: str) -> None:
    directory = save(1)
    damage(directory / name, how)
    if (name, how) == ("trainer_state.json", "missing"):  # then it is like any Hugging Face model
        assert load_checkpoint(directory).step is None
        return
    with pytest.raises(MinitfError) as error:
        load_checkpoint(directory)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_single_flipped_bit_is_detected(save: Save, name: str) -> None:
    directory = save(1)
    file = directory / name
    content = file.read_bytes()
    expected = load_checkpoint(directory).state
    number = len(content) // 3 if name == "trainer_state.json" else 25
    for position in {i * (len(content) - 1) // (number - 1) for i in range(number)}:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 5
        file.write_bytes(flipped)
        error = ""
        try:
            loaded = load_checkpoint(directory)
        except MinitfError as raised:
            error = str(raised)
        if error or name != "trainer_state.json":
            assert name in error, position
        else:  # white space, or the name of the digest itself
            assert {key: loaded.state.get(key) for key in expected} == expected, position


def test_a_missing_device_is_not_reported_as_a_damaged_checkpoint(save: Save) -> None:
    run = save(1).parent.parent
    save(2)
    reported: list[str] = []
    with pytest.raises(DeviceError, match="device cuda:99"):
        load_checkpoint(run, "cuda:99", log=reported.append)
    assert reported == []


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "zeros", "binary"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_foreign_model_is_named(save: Save, name: str, how: str) -> None:
    directory = save(1)
    (directory / "trainer_state.json").unlink()
    damage(directory / name, how)
    with pytest.raises(MinitfError) as error:
        load_checkpoint(directory)
    assert name in str(error.value) or str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(save: Save, make_model: MakeModel, tokenizer: Tokenizer) -> None:
    directory = save(1)
    (directory / "trainer_state.json").unlink()
    other: dict[str, Tensor] = make_model(tokenizer.vocab_size, num_layers=3).state_dict()
    save_file(other, directory / "model.safetensors")
    with pytest.raises(MinitfError, match=r"model\.safetensors does not fit its config\.json"):
        load_checkpoint(directory)


def test_a_foreign_model_without_trainer_state_generates(save: Save) -> None:
    directory = save(1)
    expected = load_checkpoint(directory)
    for name in ("trainer_state.json", "trainer_state.safetensors", "generation_config.json", "tokenizer_config.json"):
        (directory / name).unlink()
    foreign = load_checkpoint(directory)
    assert (foreign.step, foreign.state) == (None, {})
    options = Options(max_tokens=20, seed=0)
    texts = [generate_text(one.model, one.tokenizer, "The cat", options) for one in (expected, foreign)]
    assert texts[0] == texts[1]


# RUN


def test_run_names_a_run_directory_a_checkpoint_or_latest(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    older = [save(1, is_best=True), save(2)]
    newer = save(5, run="runs/b/sweep/0_x")
    for path, seconds in ((older[0], 100), (older[1], 100), (newer, 200)):
        os.utime(path, (seconds, seconds))
    run = Path("runs/a/1")
    found = {
        "runs/a/1": older[0],  # the best one
        str(tmp_path / "runs/a/1"): older[0],
        "runs/a/1/": older[0],
        "runs/a/1/checkpoints/latest": older[1],
        "runs/a/1/checkpoints/step_00000002": older[1],
        "latest": newer,
    }
    for name, directory in found.items():
        assert find_checkpoint(name) == directory, name
        assert load_checkpoint(name).directory == directory
    assert find_checkpoint(run, prefer="latest") == older[1]
    assert newest_run() == Path("runs/b/sweep/0_x")
    assert find_run("latest") == Path("runs/b/sweep/0_x")
    for name in ("runs/a/1", "runs/a/1/checkpoints/latest", "runs/a/1/checkpoints/step_00000001"):
        assert find_run(name).resolve() == run.resolve()
    (tmp_path / "runs/a/1/checkpoints/best").unlink()
    assert find_checkpoint("runs/a/1") == older[1]


def test_names_of_no_run_are_refused_with_the_reason(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/begun").mkdir(parents=True)
    (tmp_path / "runs/begun/config.yaml").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    cases = {
        "latest": "no run with a checkpoint under",
        "nowhere": "nowhere does not exist",
        "empty": "empty is neither a run nor a checkpoint",
        "file.txt": "file.txt is neither a run nor a checkpoint",
        "runs/begun": "the run runs/begun has no checkpoint yet",
    }
    for name, words in cases.items():
        with pytest.raises(RequestError, match=words):
            find_checkpoint(name)
    for name in ("nowhere", "empty", "file.txt"):
        with pytest.raises(RequestError, match=f"{name} is not a run"):
            find_run(name)


def test_a_dangling_link_does_not_hide_other_runs(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = save(1)
    gone = save(2, run="runs/b/1")
    shutil.rmtree(gone)
    assert find_checkpoint("latest") == expected
