"""A whole run: it learns, records what it promises, resumes as if nothing had happened, and fails in one line."""

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, assert_same_run, interrupt_at, losses, make_text, rows, tensors, train_here

import minitf
from minitf import evaluate
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.checkpoints.locate import find_checkpoint
from minitf.errors import run_command
from minitf.generate import Options
from minitf.inference.sampling import Sampling
from minitf.optim import OptimConfig, schedule_factor
from minitf.training.step import TrainingStep
from minitf.training.trainer import Trainer

TRAIN_KEYS = {"step", "split", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "train_s", "warmup_s", "elapsed_s"}
VAL_KEYS = {"step", "split", "loss", "bits_per_byte", "perplexity"}


# Learning


def test_the_loss_falls(trained_run: Path) -> None:
    train, val = rows(trained_run, "train"), rows(trained_run, "val")
    assert train[0]["loss"] == pytest.approx(math.log(257), abs=0.3)  # a fresh model knows nothing
    assert train[-1]["loss"] < 3.2
    assert [row["step"] for row in val] == [20, 40]
    assert val[1]["loss"] < val[0]["loss"]
    assert val[1]["loss"] == pytest.approx(train[-1]["loss"], abs=0.3)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(workdir: Path, tiny: list[str]) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train_here(*tiny, f"run_dir={name}", f"seed={seed}", "model.dropout=0.1") == 0
    assert_same_run("a", "b")
    assert losses("a") != losses("c")


def test_two_batches_accumulated_are_one_of_twice_the_size(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "run_dir=two", "trainer.batch_size=4", "trainer.grad_accumulation=2") == 0
    assert train_here(*tiny, "run_dir=one", "trainer.batch_size=8") == 0
    assert [row["tokens"] for row in rows("two", "train")] == [row["tokens"] for row in rows("one", "train")]
    for two, one in zip(losses("two"), losses("one"), strict=True):
        assert two[:2] == one[:2]
        assert two[2] == pytest.approx(one[2], abs=2e-4)


def test_warming_up_moves_nothing(workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_here(*tiny, "run_dir=a", "model.dropout=0.1") == 0
    monkeypatch.setattr(TrainingStep, "warm_up", lambda *_, **__: (0.001, "false", "off"))
    assert train_here(*tiny, "run_dir=b", "model.dropout=0.1") == 0
    assert_same_run("b", "a")


def test_what_is_looked_at_changes_nothing(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "run_dir=a", "model.dropout=0.1") == 0
    often = ["trainer.attention_every=1", "trainer.sample_tokens=5", "trainer.log_every=2"]
    assert train_here(*tiny, *often, "run_dir=b", "model.dropout=0.1") == 0
    found, wanted = tensors("b"), tensors("a")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "settings",
    [
        ["optim=adamw", "model.attention=sdpa"],
        ["trainer.precision=bf16", "model.tie_embeddings=false", "model.qk_norm=false"],
        ["tokenizer=char", "trainer.precision=auto", "trainer.compile=auto", "trainer.device=auto"],
        ["tokenizer=bpe", "tokenizer.vocab_size=270", "optim.schedule=cosine", "attention.heads=false"],
    ],
)
def test_every_way_to_train_learns(workdir: Path, tiny: list[str], settings: list[str]) -> None:
    assert train_here(*tiny, *settings, "run_dir=run", "trainer.max_steps=15", "trainer.attention_every=15") == 0
    assert losses("run")[-1][2] < losses("run")[0][2] - 0.4


# What a run leaves


def test_rows_have_the_columns_promised(trained_run: Path) -> None:
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


def test_the_learning_rate_column_is_the_schedule(workdir: Path, tiny: list[str]) -> None:
    settings = ["optim.learning_rate=0.01", "optim.warmup_fraction=0.3", "optim.decay_fraction=0.5"]
    assert train_here(*tiny, *settings, "run_dir=run", "trainer.max_steps=10") == 0
    config = OptimConfig(warmup_fraction=0.3, decay_fraction=0.5)
    expected = [0.01 * schedule_factor(config, step, 10) for step in range(1, 11)]
    assert [row["lr"] for row in rows("run", "train")] == pytest.approx(expected)
    assert max(expected) == 0.01


def test_the_run_directory_holds_what_is_promised(trained_run: Path) -> None:
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


def test_tensorboard_gets_every_tag_promised(trained_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {
        "train/loss", "train/learning_rate", "train/grad_norm", "val/loss", "val/bits_per_byte",
        "perf/tokens_per_second", "perf/mfu",
    }  # fmt: skip
    assert scalars <= set(tags["scalars"])
    for layer in range(2):
        for head in range(4):
            for name in ("entropy", "previous_token", "first_token", "induction"):
                assert f"heads/{name}/layer{layer}_head{head}" in tags["scalars"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [row["loss"] for row in rows(trained_run, "train")], rel=1e-6
    )
    looks = [0, *range(3, 40, 3), 40]
    assert [event.step for event in events.Scalars("heads/entropy/layer0_head0")] == looks
    for probe in ("The cat sat on the mat.", "Sir, go = on"):
        assert f"attention/{probe}" in tags["images"]
        images = events.Images(f"attention/{probe}")
        assert [image.step for image in images] == looks
        assert images[0].encoded_image_string.startswith(b"\x89PNG")
    samples = next(tag for tag in tags["tensors"] if tag.split("/")[0] == "samples")
    assert [event.step for event in events.Tensors(samples)] == [20, 40]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_the_conclusion_is_commands_that_can_be_typed(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "q.txt").write_text('It\'s "so", cost $HOME `5`\n' * 80)
    assert train_here(*tiny, "data.files=[q.txt]", "name=quotes") == 0
    said = capsys.readouterr().err
    (line,) = (line for line in said.splitlines() if "minitf.generate" in line)
    words = shlex.split(line.partition("next")[2])
    assert words[:3] == ["python", "-m", "minitf.generate"]  # there is no scripts/ here
    assert len(words) == 4
    assert words[3] in (workdir / "q.txt").read_text()
    (resume,) = re.findall(r"python -m minitf.train (resume=\S+ \S+)", said)
    assert train_here(*resume.split()) == 0
    (run,) = (workdir / "runs/quotes").iterdir()
    assert rows(run)[-1]["step"] == 12


def test_minitf_load_generates_and_looks(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_evaluate_command_repeats_the_runs_own_numbers(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (20, 40):
        checkpoint = trained_run / f"checkpoints/step_{step:08d}"
        assert run_command(lambda c=checkpoint: evaluate.main(["--run", str(c), "--json"])) == 0  # type: ignore[misc]
        found = json.loads(capsys.readouterr().out)
        (row,) = (row for row in rows(trained_run, "val") if row["step"] == step)
        assert found["step"] == step
        assert found["num_tokens"] == row["num_tokens"]
        for name in ("loss", "bits_per_byte", "perplexity"):
            assert found[name] == pytest.approx(row[name], rel=1e-5)


def test_the_evaluate_command_reads_another_file(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {}
    for name, text in (("like.txt", make_text(50, seed=9)), ("unlike.txt", "zq#7" * 500)):
        (tmp_path / name).write_text(text)
        arguments = ["--run", str(trained_run), "--json", "--file", str(tmp_path / name)]
        assert run_command(lambda a=arguments: evaluate.main(a)) == 0  # type: ignore[misc]
        results[name] = json.loads(capsys.readouterr().out)
        assert results[name]["num_tokens"] == len(text) - 1
    assert results["like.txt"]["loss"] < results["unlike.txt"]["loss"] - 1


# Resuming


@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = [*tiny, "model.dropout=0.1", "trainer.max_steps=8", "trainer.attention_every=2"]
    assert train_here(*settings, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert train_here(*settings, "run_dir=parts") == 0
    assert rows("parts", "train")[-1]["step"] == step
    assert load_checkpoint("parts", prefer="latest").step == step
    assert train_here("resume=parts") == 0
    assert_same_run("parts", "whole")
    maps = [json.loads(line) for line in Path("parts/attention.jsonl").read_text().splitlines()]
    assert [m["step"] for m in maps] == [
        json.loads(line)["step"] for line in Path("whole/attention.jsonl").read_text().splitlines()
    ]


def test_a_killed_run_goes_on_from_its_latest_checkpoint_and_no_step_is_recorded_twice(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny, "trainer.max_steps=9", "model.dropout=0.1", "optim=adamw"]
    assert train_here(*settings, "run_dir=whole") == 0

    def killed(self: Trainer) -> None:
        if self.state.step == 8:
            raise KeyboardInterrupt
        original(self)

    original = Trainer.log
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log", killed)
        assert train_here(*settings, "run_dir=parts") == 130
    with Path("parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "split": "tr')  # cut short
    assert [row[0] for row in losses("whole") if row[1] == "train"] == list(range(1, 10))
    assert train_here("resume=parts") == 0
    assert_same_run("parts", "whole")


def test_rows_over_several_steps_are_the_same_when_resumed(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is the mean of the steps since the last one, also where the run stopped between two rows."""
    settings = [*tiny, "trainer.max_steps=12", "trainer.log_every=4", "trainer.eval_every=6"]
    assert train_here(*settings, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert train_here(*settings, "run_dir=parts") == 0
    assert train_here("resume=parts") == 0
    assert [row["step"] for row in rows("parts", "train")] == [4, 8, 12]
    assert_same_run("parts", "whole")


def test_ctrl_c_saves_and_the_run_goes_on(workdir: Path, tiny: list[str]) -> None:
    """The real signal, to a real process."""
    command = [sys.executable, "-m", "minitf.train", *tiny, "run_dir=run", "trainer.max_steps=100000"]
    with subprocess.Popen(
        [*command, "trainer.eval_every=100000", "optim.schedule=constant"], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (Path("run/metrics.jsonl").exists() and len(rows("run")) > 3):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "go on with: python -m minitf.train resume=run" in err
    step = load_checkpoint("run").step
    assert step is not None
    assert rows("run")[-1]["step"] == step
    assert train_here("resume=run", f"trainer.max_steps={step + 2}") == 0
    steps = [row["step"] for row in rows("run", "train")]
    assert steps == list(range(1, step + 3))


def test_a_complete_run_is_not_resumed_but_can_go_further(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "run_dir=run", "optim.schedule=constant") == 0
    before = Path("run/metrics.jsonl").read_bytes()
    assert train_here("resume=run") == 2
    assert_one_line(capsys.readouterr().err, "complete at step 6", "trainer.max_steps")
    for number in (3, 6):
        assert train_here("resume=run", f"trainer.max_steps={number}") == 2, number
        assert_one_line(capsys.readouterr().err, "step 6", "trainer.max_steps")
    assert Path("run/metrics.jsonl").read_bytes() == before
    assert train_here("resume=run", "trainer.max_steps=9") == 0
    assert train_here(*tiny, "run_dir=whole", "optim.schedule=constant", "trainer.max_steps=9") == 0
    assert_same_run("run", "whole")


@pytest.mark.parametrize("dying", ["warm_up", "run"])
def test_an_end_farther_away_outlives_a_life_that_saves_nothing(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    """The run was told to go on to step 9 and died before its first checkpoint: it need not be told again."""
    assert train_here(*tiny, "run_dir=run") == 0

    def die(self: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, dying, die)
        assert train_here("resume=run", "trainer.max_steps=9") == 130
    assert train_here("resume=run") == 0
    assert load_checkpoint("run", prefer="latest").step == 9


def test_latest_and_an_older_checkpoint_can_be_resumed(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "name=first") == 0
    (run,) = Path("runs/first").iterdir()
    assert train_here("resume=latest", "trainer.max_steps=7") == 0
    assert rows(run)[-1]["step"] == 7
    assert train_here(f"resume={run}/checkpoints/step_00000006", "trainer.max_steps=8") == 0
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 9))
    assert load_checkpoint(run, prefer="latest").step == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.num_layers=3"], "model.num_layers=3"),
        (["data=kjv"], "data=kjv"),
        (["seed=3"], "seed=3"),
        (["optim=adamw"], "optim=adamw"),
        (["optim.kind=adamw"], "optim.kind"),
        (["trainer.max_step=3"], "did you mean trainer.max_steps?"),
    ],
)
def test_what_cannot_change_in_a_resumed_run_is_refused(
    workdir: Path,
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    interrupt_at(monkeypatch, 2)
    assert train_here(*tiny, "run_dir=run") == 0
    before = {path: path.read_bytes() for path in Path("run").glob("*.*")}
    assert train_here("resume=run", *arguments) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_checkpoint_is_reported_and_passed_over_for_the_one_before(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    constant = [*tiny, "optim.schedule=constant"]
    assert train_here(*constant, "run_dir=whole", "trainer.max_steps=9") == 0
    assert train_here(*constant, "run_dir=run") == 0
    shutil.copytree("run", "copy", symlinks=True)
    capsys.readouterr()
    for run, step in (("copy", 6), ("run", 6), ("run", 3)):
        file = Path(f"{run}/checkpoints/step_0000000{step}/trainer_state.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
    assert train_here("resume=copy", "trainer.max_steps=9") == 0
    reports = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitf: ")]
    assert len(reports) == 1
    assert "step_00000006/trainer_state.safetensors is damaged" in reports[0]
    assert "passed over for step_00000003" in reports[0]
    assert_same_run("copy", "whole")
    assert train_here("resume=run", "trainer.max_steps=9") == 1  # none is left
    assert_one_line(capsys.readouterr().err, "step_00000003/trainer_state.safetensors is damaged")


def test_a_damaged_one_named_itself_is_not_resumed(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    file = Path("run/checkpoints/latest/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert train_here("resume=run/checkpoints/latest", "trainer.max_steps=9") == 1
    assert_one_line(capsys.readouterr().err, "model.safetensors is damaged")
    assert train_here("resume=nowhere") == 2
    assert_one_line(capsys.readouterr().err, "nowhere is not a run")


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


# Ends and failures


@pytest.mark.parametrize("both", [False, True])
def test_max_minutes_ends_about_in_time(workdir: Path, tiny: list[str], both: bool) -> None:
    limits = ["trainer.max_steps=1000000" if both else "trainer.max_steps=null", "trainer.max_minutes=0.04"]
    assert train_here(*tiny, *limits, "run_dir=run", "trainer.eval_every=0", "trainer.log_every=0") == 0
    state = load_checkpoint("run", prefer="latest").state
    assert state["step"] == state["num_steps"] == rows("run")[-1]["step"] > 20
    assert 2.4 / 3 < state["train_s"] < 2.4 * 3
    assert 100 <= len(rows("run", "train")) <= 400
    assert 8 <= len(rows("run", "val")) <= 17


def test_short_runs_evaluate_less_often_but_save_as_often(workdir: Path, tiny: list[str]) -> None:
    # 32 steps of 4 x 32 tokens, of whose time evaluation may take a quarter, at a third of a step's a token.
    settings = [*tiny, "trainer.max_steps=32", "trainer.eval_every=0", "trainer.keep_checkpoints=50"]
    for times, eval_tokens in ((8, 3072 // 8), (4, 3072 // 4), (2, 1_000_000)):
        assert train_here(*settings, f"trainer.eval_tokens={eval_tokens}", f"run_dir=run{times}") == 0
        assert [row["step"] for row in rows(f"run{times}", "val")] == list(range(32 // times, 33, 32 // times))
        saved = sorted(path.name for path in Path(f"run{times}/checkpoints").glob("step_*"))
        assert saved == [f"step_{step:08d}" for step in range(4, 33, 4)]


def test_the_smaller_of_both_limits_ends_a_run(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "trainer.max_minutes=5", "run_dir=run") == 0
    assert rows("run")[-1]["step"] == 6


@pytest.mark.parametrize(("num_steps", "rate"), [(1, "1e+39"), (6, "1e+30")])
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], num_steps: int, rate: str
) -> None:
    settings = [f"optim.learning_rate={rate.replace('+', '')}", "optim.warmup_fraction=0", "optim.schedule=constant"]
    assert train_here(*tiny, *settings, f"trainer.max_steps={num_steps}", "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, "step", rate, "nothing was saved yet", "optim.learning_rate")
    assert not list(Path("run").glob("checkpoints/step_*"))
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        assert math.isfinite(json.loads(line)["loss"])


def test_the_last_good_checkpoint_is_named_and_survives_a_loss_that_is_no_number(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    capsys.readouterr()
    assert train_here("resume=run", "trainer.max_steps=20", "optim.learning_rate=1e30") == 1
    assert_one_line(capsys.readouterr().err, "run/checkpoints/step_00000006")
    assert load_checkpoint("run", prefer="latest").step == 6
    assert all(value.isfinite().all() for value in tensors("run").values())


def test_a_run_that_failed_before_it_saved_can_be_begun_again_in_its_place(workdir: Path, tiny: list[str]) -> None:
    looks = [*tiny, "trainer.attention_every=3", "trainer.max_steps=3", "trainer.eval_every=1000"]
    for name, settings in (("run", ["optim.learning_rate=1e30"]), ("run", []), ("expected", [])):
        assert train_here(*looks, *settings, f"run_dir={name}") == (1 if settings else 0)
    assert losses("run") == losses("expected")
    counts = {name: len(Path(name, "attention.jsonl").read_text().splitlines()) for name in ("run", "expected")}
    assert counts["run"] == counts["expected"] > 0


def test_a_busy_run_directory_is_left_alone(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    before = Path("run/metrics.jsonl").read_bytes()
    with Path("run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train_here("resume=run", "trainer.max_steps=9") == 1
        assert_one_line(capsys.readouterr().err, "run is in use by another process")
    assert Path("run/metrics.jsonl").read_bytes() == before
    assert train_here("resume=run", "trainer.max_steps=9") == 0


def test_an_earlier_run_is_not_overwritten(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*.*") if path.is_file()}
    assert train_here(*tiny, "run_dir=run") == 2
    assert_one_line(capsys.readouterr().err, "run_dir=run", "resume=run")
    assert {path: path.read_bytes() for path in before} == before


def test_two_runs_begun_in_the_same_second_are_two(workdir: Path, tiny: list[str]) -> None:
    for _ in range(2):
        assert train_here(*tiny, "name=n", "trainer.max_steps=1") == 0
    assert len(list(Path("runs/n").iterdir())) == 2


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_where_nothing_can_be_written_is_one_line(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], where: str
) -> None:
    Path("file").touch()
    assert train_here(*tiny, f"run_dir={where}") == 1
    assert_one_line(capsys.readouterr().err, f"cannot write in {where}", "run_dir")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run").mkdir()
    interrupted = [*tiny, "run_dir=run"]
    (Path("run") / "environment.json").mkdir()
    assert train_here(*interrupted) == 1
    assert_one_line(capsys.readouterr().err, "environment.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.files=[nowhere.txt]"], "nowhere.txt"),
        (["model.context_length=100000"], "context"),
        (["init_from=nowhere"], "nowhere does not exist"),
        (["trainer.device=cuda:77"], "device"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_no_checkpoint(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert train_here(*(own_shape(tiny) if "init_from=nowhere" in arguments else tiny), *arguments) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert not list(workdir.rglob("checkpoints"))


@pytest.mark.slow
def test_a_sweep_of_two_values_is_two_runs(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "minitf.train", "-m", *tiny, "name=sweep", "optim.learning_rate=1e-3,2e-3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in workdir.glob("runs/sweep/*/*/metrics.jsonl"))
    assert len(runs) == 2
    assert [rows(run, "train")[0]["lr"] for run in runs] == [1e-3, 2e-3]
    assert all((run / "checkpoints/latest/config.json").is_file() for run in runs)
    assert load_checkpoint("latest").directory == find_checkpoint(runs[1])
    assert not [name for name in os.listdir(workdir) if name != "runs"]  # nothing of Hydra's own lies about

    assert train_here(*command[3:], "model.num_heads=5") == 2
    assert_one_line(capsys.readouterr().err, "model.num_heads=5")
    assert train_here(*tiny, "--cfg", "job") == 0
    assert "context_length: 32" in capsys.readouterr().out


@pytest.mark.backends
def test_compiled_training_is_the_training(workdir: Path, tiny: list[str]) -> None:
    from minitf.system.hardware import compiler_missing

    if missing := compiler_missing(torch.device("cpu")):
        pytest.skip(missing)
    for name, setting in (("eager", "false"), ("compiled", "true")):
        settings = [f"trainer.compile={setting}", "trainer.attention_every=3", "trainer.sample_tokens=4"]
        assert train_here(*tiny, *settings, f"run_dir={name}") == 0
    assert json.loads(Path("compiled/environment.json").read_text())["choices"]["compile"].startswith("on")
    for found, expected in zip(losses("compiled"), losses("eager"), strict=True):
        assert found[:2] == expected[:2]
        assert found[2] == pytest.approx(expected[2], abs=2e-3)


# What a sceptical reading found


def test_a_checkpoint_between_evaluations_is_never_one_that_computes_no_numbers(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["optim.learning_rate=1e30", "optim.matrix_learning_rate=1e30", "optim.warmup_fraction=0"]
    often = ["trainer.save_every=1", "trainer.eval_every=100", "trainer.max_steps=6", "trainer.attention_every=-1"]
    assert train_here(*tiny, *rates, *often, "run_dir=run") == 1
    saved = sorted(path.name for path in Path("run/checkpoints").glob("step_*"))
    assert_one_line(capsys.readouterr().err, f"the last good checkpoint is run/checkpoints/{saved[-1]}")
    for name in saved:
        model = load_checkpoint(Path("run/checkpoints") / name).model
        assert model(torch.arange(16)[None]).isfinite().all(), name


def test_a_text_that_changed_is_not_gone_on_with(
    workdir: Path, tiny: list[str], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path("own.txt")
    own.write_text(text_file.read_text())
    assert train_here(*tiny, "data.files=[own.txt]", "run_dir=run") == 0
    own.write_text(text_file.read_text().replace("e", "i"))
    assert train_here("resume=run", "trainer.max_steps=9") == 2
    assert_one_line(capsys.readouterr().err, "the text of run has changed")


def test_a_resumed_run_does_not_prepare_its_text_again(workdir: Path, tiny: list[str]) -> None:
    cache = workdir / "cache"
    assert train_here(*tiny, f"data.cache_dir={cache}", "run_dir=run") == 0
    assert len(list(cache.iterdir())) == 1
    assert train_here("resume=run", "trainer.max_steps=9") == 0
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("setting", ["trainer.batch_size=3", "trainer.grad_accumulation=2", "optim.kind=adamw"])
def test_what_the_position_and_the_state_depend_on_stays(
    workdir: Path, trained_run: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert train_here(f"resume={trained_run}", "trainer.max_steps=99", setting) == 2
    assert_one_line(capsys.readouterr().err, setting)


@pytest.mark.parametrize("arguments", [["-m", "resume=latest"], ["-m", "run_dir=x", "seed=1,2"], ["--foo"], ["-x=1"]])
def test_what_a_sweep_cannot_do_is_one_line(
    workdir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert train_here(*arguments) == 2
    assert_one_line(capsys.readouterr().err)
    assert not list(Path().iterdir())


def test_a_run_by_the_clock_corrects_its_number_of_steps_once(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minitf.training.step import TrainingStep

    # A warm-up that thinks a step takes a tenth of a millisecond: ten times as many steps as fit into the time.
    monkeypatch.setattr(TrainingStep, "warm_up", lambda *_, **__: (1e-4, "false", "off"))
    limits = ["trainer.max_steps=null", "trainer.max_minutes=0.05", "trainer.eval_every=0", "trainer.log_every=0"]
    assert train_here(*tiny, *limits, "run_dir=run") == 0
    state = load_checkpoint("run", prefer="latest").state
    assert state["num_steps_final"]
    assert state["step"] == state["num_steps"] < 30000
    assert 3 / 2.5 < state["train_s"] < 3 * 2.5
    rates = [row["lr"] for row in rows("run", "train")]
    assert rates[-1] < 0.2 * max(rates)  # the schedule ends with the run
