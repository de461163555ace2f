"""Kills and failing writes lose nothing; damaged and hostile files do no harm."""

import errno
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_one_line, assert_same_run, losses, rows, train_here
from robustness.fuzz import NAMES, Targets, Watch, with_hypothesis

from minitf.checkpoints import background_save as saving
from minitf.checkpoints.background_save import Saver
from minitf.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from minitf.checkpoints.locate import find_checkpoints, find_run
from minitf.checkpoints.train_state import TrainState
from minitf.config.schema import load_config
from minitf.errors import MinitfError, RequestError
from minitf.model import Transformer
from minitf.reporting.tensorboard import EVENT_FILES, cut_events, event_records
from minitf.system.files import write_whole
from minitf.system.safe_io import read_json, read_tensors, write_tensors
from minitf.tokenizer import Tokenizer
from minitf.training import rng as random_state

MakeModel = Callable[..., Transformer]

# Kills


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the crash test forks")
def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts/crash_test.py"
    command = [sys.executable, str(script), "--kills", "3", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n3 kills (" in done.stdout
    assert "ended like the undisturbed one" in done.stdout


def test_a_run_killed_before_its_first_checkpoint_restarts_with_its_decisions(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    dropout = [*tiny, "model.dropout=0.1", "name=n"]
    assert train_here(*dropout, "trainer.attention_every=3") == 0
    (run,) = Path("runs/n").iterdir()
    run.rename("whole")
    shutil.copytree("whole", run, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    assert train_here("resume=latest") == 0
    assert "starting it again from the first step" in capsys.readouterr().err
    assert_same_run(str(run), "whole")
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 7))


@pytest.mark.slow
def test_a_restarted_run_with_a_time_limit_keeps_its_number_of_steps(workdir: Path, tiny: list[str]) -> None:
    clock = ["trainer.max_steps=null", "trainer.max_minutes=0.02"]
    assert train_here(*tiny, *clock, "run_dir=run") == 0
    plans = json.loads(Path("run/decisions.json").read_text())["plans"]
    assert plans[-1] == [rows("run")[-1]["step"]] * 2
    expected = losses("run")
    shutil.rmtree("run/checkpoints")
    assert train_here("resume=run") == 0
    assert losses("run") == expected


def test_a_run_killed_after_its_last_step_is_finished_by_resume(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "run_dir=run", "trainer.attention_every=3") == 0
    decisions = Path("run/decisions.json")
    decisions.write_text(decisions.read_text().replace('"finished": true', '"finished": false'))
    Path("run/attention.html").unlink()
    before = losses("run")
    assert train_here("resume=run") == 0
    assert Path("run/attention.html").is_file()
    assert losses("run") == before
    assert train_here("resume=run") == 2  # finished


def test_all_random_generators_are_restored() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]

    random_state.seed(3)
    draw()  # the generators keep the second of a pair of normal numbers
    state = random_state.capture()
    expected = draw()
    random_state.restore({name: value.clone() for name, value in state.items()})
    assert draw() == expected


def test_tensorboard_events_after_a_step_are_removed(trained_run: Path, tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = trained_run.glob(EVENT_FILES)
    copy = tmp_path / path.name
    content = path.read_bytes()
    copy.write_bytes(content + content[:40])  # an incomplete record
    cut_events(tmp_path, 20)
    steps = [Event.FromString(record[12:-4]).step for record in event_records(copy.read_bytes())]
    wanted = [Event.FromString(record[12:-4]).step for record in event_records(content)]
    assert steps == [step for step in wanted if step <= 20]
    assert max(steps) == 20 < max(wanted)
    cut_events(tmp_path, -1)
    assert not list(tmp_path.glob(EVENT_FILES))


# Saving


@pytest.fixture
def make_save(make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    def save(step: int, **options: Any) -> Path:
        tensors = {"random_state": torch.arange(8, dtype=torch.uint8), "pending": torch.zeros(0, 2)}
        state = {**vars(TrainState(step=step)), "data": {}}
        model = make_model(tokenizer.vocab_size, seed=step)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.yaml").touch()
        options = {"is_best": False, "keep": 5, **options}
        return save_checkpoint(tmp_path / "run/checkpoints", model, tokenizer, tensors, state, **options)

    return save


def test_a_background_save_writes_the_state_at_the_time_of_the_call(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proceed, order = threading.Event(), []
    original = saving.save_checkpoint

    def slow(*arguments: Any, **named: Any) -> Path:
        proceed.wait()
        return original(*arguments, **named)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    model = make_model(tokenizer.vocab_size, seed=1)
    expected = {name: value.clone() for name, value in model.named_parameters()}
    saver = Saver(tmp_path, before=lambda: order.append(not list(tmp_path.glob("step_*"))))
    tensors = {"random_state": torch.get_rng_state(), "pending": torch.zeros(0, 2)}
    saver.save(model, tokenizer, tensors, {"step": 1}, is_best=False, keep=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    proceed.set()
    saver.finish()
    assert (tmp_path / "step_00000001").is_dir()
    found = read_tensors(tmp_path / "step_00000001/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert order == [True]
    copies = list(map(id, saver._copies.values()))
    saver.save(model, tokenizer, tensors, {"step": 2}, is_best=False, keep=1)
    assert list(map(id, saver._copies.values())) == copies  # the buffers are reused
    saver.finish()


@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in (errno.EROFS, errno.EIO))],
)
def test_a_failed_background_save_ends_the_run_with_one_line(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    assert train_here(*tiny, "run_dir=whole") == 0
    original, calls = saving.save_checkpoint, []

    def failing(*arguments: Any, **named: Any) -> Path:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code), "run/checkpoints")
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", failing)
        assert train_here(*tiny, "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, os.strerror(code))
    assert load_checkpoint("run").step == 3
    assert train_here("resume=run") == 0
    assert_same_run("run", "whole")


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_it_can_be_resumed(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated by a limit on the size of files, which the system enforces on every write."""
    assert train_here(*tiny, "run_dir=whole", "trainer.max_steps=20") == 0
    sizes = [path.stat().st_size for path in Path("whole/checkpoints/latest").iterdir()]
    metrics = Path("whole/metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (max(sizes) - 1000, min(metrics // 2, 4000)):
        shutil.rmtree("run", ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert train_here(*tiny, "run_dir=run", "trainer.max_steps=20") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_one_line(capsys.readouterr().err, "File too large")
        assert train_here("resume=run") == 0
        assert_same_run("run", "whole")


def test_a_short_write_is_noticed_before_the_checkpoint_appears(
    make_save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_save(1)
    from minitf.checkpoints import checkpoint

    def short(path: Path, tensors: Any) -> str:
        digest = write_tensors(path, tensors)
        os.truncate(path, path.stat().st_size - 4)
        return digest

    monkeypatch.setattr(checkpoint, "write_tensors", short)
    with pytest.raises(MinitfError, match="is damaged"):
        make_save(2, keep=1)
    assert sorted(path.name for path in first.parent.glob("[!.]*")) == ["latest", first.name]
    assert load_checkpoint(first.parent.parent).step == 1


def test_written_tensors_are_read_unchanged(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5), "é": torch.arange(7, dtype=torch.uint8), "b": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 2), "t": torch.randn(4, 6).T, "i": torch.tensor([1, -2]),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_checkpoints_are_tried_newest_first_and_links_out_of_the_run_are_ignored(
    make_save: Callable[..., Path], tmp_path: Path
) -> None:
    for step in (10, 20, 30, 40):
        directory = make_save(step, is_best=step == 10)
    run = directory.parent.parent
    assert [path.name[-2:] for path in find_checkpoints(run, "latest")] == ["40", "30", "20", "10"]
    assert [path.name[-2:] for path in find_checkpoints(run)] == ["10", "40", "30", "20"]
    make_save(25)  # resumed at step 20: 30 and 40 are of an abandoned branch
    assert [path.name[-2:] for path in find_checkpoints(run, "latest")] == ["25", "20", "10", "40", "30"]
    shutil.copytree(directory, tmp_path / "step_00000099")
    (directory.parent / "latest").unlink()
    (directory.parent / "latest").symlink_to(tmp_path / "step_00000099")
    (directory.parent / "step_00000098").symlink_to(tmp_path / "step_00000099")
    assert (tmp_path / "step_00000099") not in find_checkpoints(run, "latest")
    assert len(find_checkpoints(run, "latest")) == 5


def test_a_checkpoint_without_its_digests_is_reported_and_skipped(
    make_save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_save(1)
    newest = make_save(2)
    (newest / "trainer_state.json").unlink()
    assert load_checkpoint(newest.parent.parent).step == 1
    assert_one_line(
        capsys.readouterr().err, "step_00000002/trainer_state.json is missing", "passed over for step_00000001"
    )


def test_a_text_file_is_replaced_atomically_and_no_link_is_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("mine")
    link.symlink_to(victim)
    write_whole(link, "new")
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)
    assert len(list(tmp_path.iterdir())) == 2


# Hostile files


def hostile(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    (directory / "trainer_state.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"max_position_embeddings": 10**12}, {"vocab_size": 10**15},
        {"hidden_size": 2**40}, {"head_dim": 2**50}, {"intermediate_size": -5}, {"num_attention_heads": 10**30},
        {"rope_theta": "${oc.env:HOME}"}, {"vocab_size": float("inf")}, {"minitf": [1]}, {"rope_theta": float("nan")},
    ],
)  # fmt: skip
def test_a_config_with_huge_sizes_allocates_nothing(make_save: Callable[..., Path], changes: dict[str, Any]) -> None:
    directory = make_save(1)
    hostile(directory, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MinitfError) as error:
        load_checkpoint(directory, device="cpu")
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_false_headers_and_files_larger_than_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for header in (
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
    ):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
        with pytest.raises(MinitfError, match="is damaged"):
            read_tensors(path)
    path.write_bytes(struct.pack("<Q", 1 << 62))
    with pytest.raises(MinitfError, match="is damaged"):
        read_tensors(path)
    os.truncate(path, 1 << 43)  # a sparse file
    with pytest.raises(MinitfError, match="is refused"):
        read_tensors(path)
    os.truncate(tmp_path / "model.safetensors", 1 << 33)
    with pytest.raises(MinitfError, match="is refused"):
        read_json(path)


def test_a_huge_tokenizer_and_one_with_a_huge_id_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.loads(tokenizer.to_json())
    content["added_tokens"][0]["id"] = 4_000_000_000
    content["model"]["vocab"]["far"] = 4_000_000_000
    path.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="tokenizer"):
        Tokenizer.load(path)
    os.truncate(path, 1 << 40)
    with pytest.raises(MinitfError, match="is refused"):
        Tokenizer.load(path)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "a/../../x"])
def test_a_checkpoint_cannot_name_files_outside_itself(make_save: Callable[..., Path], name: str) -> None:
    from minitf.checkpoints.checkpoint import own_sha256

    directory = make_save(1)
    path = directory / "trainer_state.json"
    state = json.loads(path.read_text())
    state.pop("own_sha256")
    state["sha256"][name] = "0" * 64
    path.write_text(json.dumps({**state, "own_sha256": own_sha256(state)}))
    with pytest.raises(MinitfError, match="leads out of the checkpoint"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: ${oc.env:HOME}", "could not be converted to Integer"),
        ("name: !!python/object/apply:os.system [true]", "no plain value"),
        ("name: &a [x, x]\nseed: *a", "no plain value"),
        ("data:\n  _target_: os.system", "_target_"),
    ],
)
def test_a_config_file_holds_plain_values_only(workdir: Path, trained_run: Path, line: str, words: str) -> None:
    good = (trained_run / "config.yaml").read_text()
    key = line.split(":")[0]
    path = workdir / "config.yaml"
    path.write_text(re.sub(rf"^{key}:.*\n(?:[ -].*\n)*", "", good, flags=re.MULTILINE) + line + "\n")
    with pytest.raises(MinitfError) as error:
        load_config(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "attention.html", "checkpoints/step_00000098"])
def test_a_run_with_links_out_of_it_is_not_resumed(
    workdir: Path, trained_run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(trained_run, "run", symlinks=True)
    path = Path("run") / name
    if path.exists():
        path.rename("elsewhere")
    else:
        Path("elsewhere").mkdir()
    path.symlink_to(Path("elsewhere").absolute())
    before = {found: found.stat().st_mtime_ns for found in Path("elsewhere").rglob("*")}
    assert train_here("resume=run", "trainer.max_steps=50") == 1
    assert_one_line(capsys.readouterr().err, f"run/{name} is a link to")
    assert {found: found.stat().st_mtime_ns for found in Path("elsewhere").rglob("*")} == before


def test_latest_is_the_newest_run_to_resume_and_the_newest_checkpoint_to_load(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "name=a") == 0
    config = next(Path("runs/a").iterdir()) / "config.yaml"
    Path("runs/b/one").mkdir(parents=True)
    shutil.copy(config, "runs/b/one/config.yaml")
    os.utime("runs/b/one/config.yaml", (time.time() + 60,) * 2)
    assert find_run("latest") == Path("runs/b/one")
    assert load_checkpoint("latest").directory.parts[-4] == "a"  # runs/b has no checkpoint


@pytest.mark.machines
@pytest.mark.slow
def test_four_runs_started_at_once_get_four_directories(workdir: Path, tiny: list[str]) -> None:
    code = "from minitf.errors import run_command; from minitf.train import main; raise SystemExit(run_command(main))"
    processes = [subprocess.Popen([sys.executable, "-c", code, *tiny, "name=same"]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    runs = list(Path("runs/same").iterdir())
    assert len(runs) == 4
    for run in runs:
        assert losses(run) == losses(runs[0])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "checkpoint" else []) for name in NAMES]
)
def test_hostile_input_ends_in_a_result_or_one_line(tmp_path: Path, name: str) -> None:
    """The same inputs every time; scripts/fuzz.py draws new ones."""
    watch = Watch(name, getattr(Targets(tmp_path), name), tmp_path / "findings")
    with_hypothesis(watch, 30, repeatable=True)
    assert watch.num_inputs == 30
    assert not watch.found
    assert watch.num_refused or name == "tokenizer"


def test_the_fuzzer_records_what_is_neither_a_result_nor_one_line(tmp_path: Path) -> None:
    def target(data: bytes) -> None:
        if data == b"several":
            raise MinitfError("one\ntwo")
        if data == b"one":
            raise MinitfError("one")
        if data == b"bug":
            raise ValueError("bug")

    watch = Watch("data", target, tmp_path)
    for data in (b"several", b"one", b"bug", b"fine"):
        watch(data)
    assert sorted(watch.found.values()) == [b"bug", b"several"]
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"bug", b"several"]
    assert (watch.num_inputs, watch.num_refused) == (4, 2)


@pytest.mark.parametrize("link", ["best", "latest"])
def test_a_kill_while_a_link_is_replaced_does_no_harm(workdir: Path, trained_run: Path, link: str) -> None:
    shutil.copytree(trained_run, "run", symlinks=True)
    Path("run/checkpoints", f".{link}.new").symlink_to("step_00000040")
    assert train_here("resume=run", "trainer.max_steps=42") == 0
    assert not Path("run/checkpoints/.latest.new").is_symlink()
    assert Path("run/checkpoints/latest").resolve().name == "step_00000042"
