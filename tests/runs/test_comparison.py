"""Runs side by side: what is read from their directories, and the table of a sweep."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_line, train_here

from minitf.cli.evaluate import main as evaluate
from minitf.errors import run_command
from minitf.runs.comparison import (
    WIDTH,
    Outcome,
    head_results,
    outcomes_in,
    read_outcome,
    results_of,
    rows_of,
    settled_at,
    table,
    to_json,
    varied,
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def outcome(run: str, bits: float | None = 1.5, finished: bool = True, **settings: Any) -> Outcome:
    values = {} if bits is None else {"bits_per_byte": bits, "first_token": 0.25, "tokens_per_s": 12_345.6}
    return Outcome(run, settings, finished, values)


@pytest.mark.parametrize(
    ("values", "at"),
    [([0.1, 0.5, 0.6], 2), ([0.5, 0.1, 0.4], 3), ([0.5, 0.6, 0.1], None), ([0.9], 1), ([], None)],
)
def test_a_value_has_settled_where_it_stays(values: list[float], at: int | None) -> None:
    assert settled_at(enumerate(values, 1), 0.4) == at


def test_heads_are_read_over_training(tmp_path: Path) -> None:
    """Of three looks, each with two probes, the second and third have an induction head."""
    looks = [
        {"step": step, "scores": {"first_token": [[0.1, 0.3], [0.2, first]], "induction": [[0, 0], [best, 0.1]]}}
        for step, first, best in ((0, 0.0, 0.0), (10, 0.1, 0.7), (20, 0.6, 0.5))
        for _ in range(2)
    ]
    write_rows(tmp_path / "attention.jsonl", looks)
    assert head_results(tmp_path) == {"first_token": pytest.approx(0.3), "induction_at": 10}
    write_rows(tmp_path / "attention.jsonl", looks[:2])
    assert head_results(tmp_path) == {"first_token": pytest.approx(0.15)}
    write_rows(tmp_path / "attention.jsonl", [{"step": 0, "scores": {}}])
    assert head_results(tmp_path) == head_results(tmp_path / "nothing") == {}


def test_a_run_that_was_killed_is_read_up_to_there(trained_run: Path, workdir: Path) -> None:
    shutil.copytree(trained_run, "killed", symlinks=True)
    metrics = Path("killed/metrics.jsonl")
    metrics.write_text(metrics.read_text() + '{"step": 41, "split": "val", "bits_', encoding="utf-8")
    decisions = json.loads(Path("killed/decisions.json").read_text())
    Path("killed/decisions.json").write_text(json.dumps(decisions | {"finished": False}))
    found, whole = read_outcome(Path("killed")), read_outcome(trained_run)
    assert found.values == whole.values
    assert (found.finished, whole.finished) == (False, True)
    assert set(whole.values) >= {"bits_per_byte", "first_token", "tokens_per_s"}
    assert set(results_of(trained_run)) == set(whole.values) - {"bits_per_byte"}
    assert [row["step"] for row in rows_of(metrics)][-1] == 40


def test_settings_that_follow_from_another_are_no_columns() -> None:
    shapes = [(2, 64), (2, 64), (4, 16)]
    runs = [
        outcome(str(i), **{"seed": i, "run_dir": str(i), "model.num_heads": heads, "model.head_dim": width})
        for i, (heads, width) in enumerate(shapes)
    ]
    assert varied(runs) == ["model.num_heads"]
    assert varied(runs[:2]) == []


def test_seeds_are_pooled_and_failures_named() -> None:
    variants = ("softmax", "softmax", "off_by_one", "linear")
    bits = (1.5, 1.6, 1.4, None)
    runs = [
        outcome(str(i), bits[i], finished=bits[i] is not None, **{"model.variant": variant, "seed": i})
        for i, variant in enumerate(variants)
    ]
    lines = table(runs, ["model.variant=sink"])
    assert [line.split() for line in lines[1:3]] == [
        ["softmax", "2", "1.550", "±", "0.071", "0.250", "±", "0.000", "-", "12,346"],
        ["off_by_one", "1", "1.400", "0.250", "-", "12,346"],
    ]
    assert lines[3:] == ["failed or unfinished: 3", "failed or unfinished: model.variant=sink"]
    assert all(len(line) == WIDTH for line in lines[:3])
    assert table([], ["seed=0"]) == ["failed or unfinished: seed=0"]


def test_a_long_label_has_a_line_of_its_own() -> None:
    runs = [outcome(str(i), **{f"optim.setting_{k}": 0.125 * i for k in range(4)}) for i in range(2)]
    assert [line.split()[0] for line in table(runs)[1:]] == ["0.0", "0.125"]  # they vary together: one column
    runs = [outcome(str(i), **{f"optim.setting_{k}": i >> k & 1 for k in range(3)}) for i in range(8)]
    lines = table(runs)
    assert lines[0] == "setting_0 setting_1 setting_2"
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[2].split()[:4] == ["0", "0", "0", "1"]


def test_an_exercise_in_reference_has_its_own_columns(tmp_path: Path) -> None:
    look = {"split": "reference", "weight": 0.5, "pick": 0.9, "control": 0.99, "heads": [[0, 1]]}
    for seed, exact in enumerate((0.95, 0.97, 0.3)):
        rows = [look | {"step": step, "exact": value, "knockout": 0.5} for step, value in ((8, 0.1), (16, exact))]
        write_rows(tmp_path / f"seed_{seed}/metrics.jsonl", rows)
    found = outcomes_in(tmp_path)
    heading, line = table(found)
    assert heading.split() == ["all", "runs", "learnt", "at", "exact", "knockout", "tokens/s"]
    assert line.split() == ["all", "3", "16", "(2/3)", "0.740", "±", "0.381", "0.500", "±", "0.000", "-"]
    rows = to_json(found)
    assert [row["learnt_at"] for row in rows] == [16, 16, None]
    assert rows[0]["heads"] == [[0, 1]]


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        write_rows(tmp_path / f"{number}_a/metrics.jsonl", [{"split": "val", "step": 1, "bits_per_byte": 1.0}])
    assert [found.run for found in outcomes_in(tmp_path)] == ["0_a", "2_a", "10_a"]


def test_a_folder_without_runs_is_one_line(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(partial(evaluate, ["--seeds", "."])) == 2
    assert_one_line(capsys.readouterr().err, "no run in it has results")


@pytest.fixture
def quick(tiny: list[str]) -> list[str]:
    return [*tiny, "trainer.max_steps=2", "trainer.attention_every=1", "trainer.eval_every=2"]


def hparams_metrics(run: Path) -> set[tuple[str, str]]:
    """(folder, tag) of the columns of a run in TensorBoard's HParams."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (file,) = run.glob("events.out.tfevents.*")
    values = [value for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    (content,) = (v.metadata.plugin_data.content for v in values if v.tag == "_hparams_/experiment")
    infos = HParamsPluginData.FromString(content).experiment.metric_infos
    columns = {(info.name.group, info.name.tag) for info in infos}
    assert {tag for folder, tag in columns if not folder} <= {value.tag for value in values}
    return columns


@pytest.mark.slow
def test_a_sweep_ends_with_its_table(workdir: Path, quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One of the three does not fit: the others are compared, and the sweep fails."""
    arguments = ["model.num_heads=2,16", "model.variant=softmax,differential", "hydra.sweep.dir=here"]
    assert train_here("-m", *quick, *arguments) == 2
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in out[1:5]] == [
        ["num_heads", "variant", "runs"],
        ["2", "softmax", "1"],
        ["2", "differential", "1"],
        ["16", "softmax", "1"],
    ]
    assert "failed or unfinished: model.num_heads=16 model.variant=differential" in out
    assert "later: python -m minitf.evaluate --seeds here" in out
    assert not list(workdir.glob("runs/.*"))
    columns = hparams_metrics(workdir / "here/1_model.num_heads_2_model.variant_differential")
    assert {("held_out", "quality/bits_per_byte"), ("", "result/first_token"), ("", "result/tokens_per_s")} <= columns
    assert run_command(partial(evaluate, ["--seeds", "here"])) == 0
    assert capsys.readouterr().out.splitlines()[:4] == out[1:5]


@pytest.mark.slow
def test_a_dry_sweep_has_no_table(workdir: Path, quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here("-m", *quick, "trainer.dry_run=true", "seed=0,1") == 0
    assert "runs" not in capsys.readouterr().out
