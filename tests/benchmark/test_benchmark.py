"""The benchmark: its arithmetic, its skips, its files, and small runs from end to end."""

import json
import math
import pickle
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_text

from minitf.benchmark import (
    browser,
    curves,
    generation,
    hugging_face,
    library,
    llama_cpp,
    memory,
    nanogpt,
    plots,
    saving,
    shakespeare,
)
from minitf.benchmark.__main__ import BENCHMARKS, main
from minitf.benchmark.comparison import Row, alternate
from minitf.benchmark.gpu import compare, gpu, learn
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request, number
from minitf.benchmark.text import write_text
from minitf.benchmark.training import TOY
from minitf.benchmark.viewer import viewer
from minitf.errors import MinitfError, RequestError, run_command
from minitf.model import Transformer
from minitf.training.flops import flops_per_token

SPEEDS = Row("speed", "tokens/s", [30.0, 10.0, 60.0], "peer", [10.0, 10.0, 10.0])
# Prints what nanoGPT prints: seven iterations, with an evaluation at 0 and 4.
TRAIN_PY = """
import sys
assert any(a.startswith("--dataset=/") for a in sys.argv) and any(a.startswith("--out_dir=/") for a in sys.argv)
for i in range(7):
    if i % 4 == 0:
        print(f"step {i}: train loss 4.2, val loss 4.2")
    print(f"iter {i}: loss 4.2000, time {900 if i % 4 == 0 else 10 + i}.00ms, mfu -100.00%")
"""


# A stand-in for model.py that finds every next character equally likely.
MODEL_PY = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, idx, targets=None):
        logits = self.scores.expand(*idx.shape, -1)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


@pytest.fixture
def request_here(tmp_path: Path) -> Request:
    return Request(tmp_path, tmp_path / "out", repeats=1, seeds=1, quick=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A stand-in for a checkout of nanoGPT."""
    directory = tmp_path / "nanogpt"
    directory.mkdir()
    for name in ("model.py", "configurator.py"):
        (directory / name).touch()
    (directory / "train.py").write_text(TRAIN_PY, encoding="utf-8")
    return directory


def command(*arguments: str) -> int:
    return run_command(lambda: main(arguments))


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    assert SPEEDS.ratios == [3.0, 1.0, 6.0]
    assert (SPEEDS.ratio, SPEEDS.spread, SPEEDS.median, SPEEDS.peer_median) == (3.0, (1.0, 6.0), 30.0, 10.0)
    # A round that is slow for both sides has the same ratio.
    assert Row("speed", "tokens/s", [20.0, 2.0], "peer", [10.0, 1.0]).spread == (2.0, 2.0)


def test_a_ratio_above_one_is_better_for_times_too() -> None:
    times = Row("time", "s", [1.0, 2.0, 4.0], "peer", [4.0, 4.0, 4.0], more_is_better=False)
    assert (times.ratio, times.spread) == (2.0, (1.0, 4.0))


def test_a_row_without_a_peer_shows_the_spread_of_its_samples() -> None:
    alone = Row("speed", "GFLOP/s", [3.0, 1.0, 2.0])
    assert (alone.ratio, alone.median, alone.spread) == (None, 2.0, (1.0, 3.0))


def test_samples_without_a_counterpart_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        Row("speed", "tokens/s", [1.0, 2.0], "peer", [1.0])
    with pytest.raises(ValueError, match="nothing"):
        Row("speed", "tokens/s", [])


def test_both_sides_alternate_in_changing_order() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[int], int]:
        return lambda round_: order.append(name) or round_  # type: ignore[func-returns-value]

    assert alternate({"a": side("a"), "b": side("b")}, 3) == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert "".join(order) == "abbaab"
    with pytest.raises(RequestError, match="--repeats 0"):
        alternate({"a": side("a")}, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345, "12,345"),
    ],
)
def test_numbers_are_printed_with_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_table_names_the_peer_and_what_was_skipped() -> None:
    report = Report("throughput")
    report.add(SPEEDS)
    report.skip("nanoGPT", "point to it")
    head, row, skipped = report.table().splitlines()
    assert head.split() == ["minitf", "peer", "ratio", "spread"]
    assert row.split() == ["speed,", "tokens/s", "30.0", "10.0", "peer", "3.00", "x", "1.00", "to", "6.00"]
    assert skipped.strip() == "nanoGPT skipped: point to it"


def test_an_absent_peer_is_explained_in_one_line(tmp_path: Path, checkout: Path) -> None:
    assert "--nanogpt DIR" in (nanogpt.unavailable(None) or "")
    assert "train.py" in (nanogpt.unavailable(tmp_path / "work") or "")
    assert nanogpt.unavailable(checkout) is None
    assert "no_such_package is not installed (pip install" in (
        hugging_face.unavailable("json", "no_such_package") or ""
    )
    assert hugging_face.unavailable("json") is None


def test_a_benchmark_without_its_requirements_is_skipped_with_a_reason(
    request_here: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = Report("gpu")
    gpu(request_here, report)
    shakespeare.shakespeare(request_here, report)
    monkeypatch.setattr(memory, "all_keys", dict)
    monkeypatch.setattr(memory, "losses", lambda request, report: None)
    memory.memory(request_here, report)
    monkeypatch.setattr(plots, "unavailable", lambda: plots.MISSING)
    curves.draw(request_here, report, "speed.svg", [])
    assert not report.rows
    assert not report.plots
    reasons = ("no CUDA device", "--text FILE", "trainer.activation_checkpointing", "matplotlib is not installed")
    assert len(report.skipped) == len(reasons)
    for line, reason in zip(report.skipped, reasons, strict=True):
        assert "skipped: " in line
        assert reason in line


def test_the_list_names_every_benchmark_and_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--list", "--repeats", "2") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    listed = {line[2:].split()[0]: float(line[2:].split()[1]) for line in lines}
    assert list(listed) == list(BENCHMARKS)
    assert all(minutes > 0 for minutes in listed.values())
    assert {line[2:].split()[0] for line in lines if line.startswith("*")} == {
        name for name, benchmark in BENCHMARKS.items() if benchmark.usual
    }


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--list", "--nanogpt DIR", "--text FILE", "--repeats N", "--seeds N", "--corpus-mb", "--out DIR"):
        assert option in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "no such benchmark; there are machine, step"),
        (["machine", "--text", "nowhere.txt"], "no such file"),
        (["machine", "--nanogpt", "nowhere"], "no such directory"),
        (["machine", "--repeats", "0"], "at least 1"),
        (["corpus", "--corpus-mb", "1,x"], "whole numbers"),
        (["corpus", "--corpus-mb", "0"], "at least 1"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: list[str], words: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not list(workdir.iterdir())


def test_data_for_nanogpt_are_in_its_format(tmp_path: Path) -> None:
    text = make_text(50)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    directory = nanogpt.write_dataset(tmp_path / "text.txt", tmp_path / "data")
    meta = pickle.loads((directory / "meta.pkl").read_bytes())
    parts = [np.fromfile(directory / name, dtype=np.uint16) for name in ("train.bin", "val.bin")]
    assert "".join(meta["itos"][int(i)] for part in parts for i in part) == text
    assert len(parts[0]) == int(0.9 * len(text))
    assert meta["vocab_size"] == len(set(text)) == len(meta["stoi"])


@pytest.mark.slow
def test_nanogpt_is_evaluated_on_all_of_its_held_out_text(checkout: Path, tmp_path: Path) -> None:
    (checkout / "model.py").write_text(MODEL_PY, encoding="utf-8")
    (tmp_path / "text.txt").write_text("abcdefgh" * 100, encoding="utf-8")
    nanogpt.write_dataset(tmp_path / "text.txt", tmp_path / "data")
    weights = {"scores": torch.zeros(8)}
    model_args = {"block_size": 7, "vocab_size": 8}
    torch.save({"model_args": model_args, "model": weights, "iter_num": 5}, tmp_path / "ckpt.pt")
    names = {"checkout": str(checkout), "dataset": str(tmp_path / "data"), "out_dir": str(tmp_path)}
    found = in_child("nanogpt:held_out", names)
    assert found["loss"] == pytest.approx(math.log(8))
    assert (found["num_tokens"], found["iteration"]) == (79, 5)


def test_nanogpts_timings_are_read_from_its_output(checkout: Path, tmp_path: Path) -> None:
    run = nanogpt.train(checkout, tmp_path / "data", tmp_path / "out", ["--device=cpu"], config="")
    assert run.ms == [900, 11, 12, 13, 900, 15, 16]
    assert run.wall_s > 0
    # The two iterations with an evaluation count as the median of all, 15 ms.
    assert run.step_s(eval_interval=4) == pytest.approx((15 + 11 + 12 + 13 + 15 + 15 + 16) / 1000)


@pytest.mark.slow
def test_the_error_of_a_child_process_is_reported(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(MinitfError, match=r"nowhere.*does not exist"):
        in_child("library:encode", {"checkpoint": str(tmp_path / "nowhere"), "text": "a", "num_tokens": 1})
    (checkout / "train.py").write_text("raise SystemExit('no luck')", encoding="utf-8")
    with pytest.raises(MinitfError, match="no luck"):
        nanogpt.train(checkout, tmp_path, tmp_path, [])


def test_the_lower_bounds_are_the_operations_of_the_model(make_model: Callable[..., Transformer]) -> None:
    model = make_model(num_kv_heads=4)
    parts = library.lower_bounds(model, "adamw", batch_size=3, itemsize=2)
    flops = sum(parts[part]["flops"] for part in ("forward", "loss", "backward"))
    assert flops == pytest.approx(flops_per_token(model) * 3 * model.config.context_length)
    assert parts["optimizer"] == {"flops": 0.0, "bytes": 28.0 * model.num_parameters()}
    muon = library.lower_bounds(model, "muon", 3, 2)["optimizer"]
    assert muon["flops"] > 0
    assert muon["bytes"] < parts["optimizer"]["bytes"]


@pytest.mark.slow
def test_generated_text_has_the_requested_size(tmp_path: Path) -> None:
    sizes = (1_000, 1_300_000)
    texts = [write_text(tmp_path / "text.txt", size).read_text(encoding="ascii") for size in sizes]
    assert tuple(len(text) for text in texts) == sizes
    assert texts[1].startswith(texts[0])  # the same each time
    assert len(set(texts[1])) <= 65
    words = texts[1].split()
    assert 1_000 < len(set(words)) < len(words) / 5


@pytest.mark.parametrize(("benchmark", "module"), [(curves.logging, curves), (saving.saving, saving)])
def test_timed_parts_of_training_exist(
    request_here: Request, monkeypatch: pytest.MonkeyPatch, benchmark: Callable[..., None], module: ModuleType
) -> None:
    asked: set[str] = set()

    def train(request: Request, overrides: list[str], name: str, **options: Any) -> dict[str, Any]:
        asked.update(options.get("timed", ()))
        rows = [{"step": 1, "train_s": 2.0}]
        return {"train": rows, "compile": "false", "seconds": {"run": 4.0, "look": 0.3, "sample": 0.1, "save": 0.2}}

    monkeypatch.setattr(module, "train", train)
    report = Report("one")
    benchmark(request_here, report)
    assert asked > {"run"}
    assert all(callable(getattr(*library.methods()[name])) for name in asked)
    assert report.rows[0].samples == [pytest.approx(20.0 if module is curves else 5.0)]


@pytest.mark.slow
def test_corpus_end_to_end(tmp_path: Path) -> None:
    """Prepares a text and trains on it."""
    assert command("corpus", "--quick", "--repeats", "1", "--corpus-mb", "1", "--out", str(tmp_path)) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]["corpus"]["rows"]
    assert [(row["what"], row["unit"], len(row["samples"])) for row in rows] == [
        ("1 MB, tokenizing", "s", 1),
        ("1 MB, training", "tokens/s", 1),
    ]
    assert all(row["median"] > 0 for row in rows)


def test_smoothing_averages_neighbours() -> None:
    assert curves.smoothed([1.0, 2.0, 3.0, 6.0], 2) == [1.5, 2.5, 4.5]


def test_the_smallest_number_of_steps_to_a_loss_is_found(
    request_here: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def race(request: Request, text: Path, num_steps: int, seed: int) -> dict[str, Any]:
        tried.append(num_steps)
        return {"loss": shakespeare.TARGET_LOSS + (0.01 if num_steps < 440 else -0.01)}

    monkeypatch.setattr(shakespeare, "minitf_race", race)
    assert shakespeare.find_steps(request_here, Report("shakespeare"), Path("text")) == 440
    assert len(tried) <= 5


@pytest.mark.parametrize("same", [True, False])
def test_speeds_are_compared_only_for_the_same_text(
    same: bool, request_here: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(function: str, arguments: dict[str, Any], environment: Any = None) -> dict[str, Any]:
        ours = function.startswith("library")
        ids = [[1, 2]] if ours or same else [[1, 3]]
        return {"seconds": [0.5 if ours else 2.0], "ids": ids, "weight_bytes": 4}

    monkeypatch.setattr(generation, "in_child", child)
    report = Report("generation")
    if same:
        generation.decode(request_here, report, "checkpoint", [1], 1, peer=True)
        assert report.rows[0].ratio == 4.0
        assert "ids" not in json.dumps(report.to_json())
    else:
        with pytest.raises(MinitfError, match="different greedy text"):
            generation.decode(request_here, report, "checkpoint", [1], 1, peer=True)


def test_a_checkpoint_converted_for_llama_cpp_holds_the_same_weights(trained_run: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    from minitf.checkpoints.gguf import gguf_name

    checkpoint = trained_run / "checkpoints/latest"
    llama_cpp.convert(str(checkpoint), str(tmp_path / "model.gguf"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    converted = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = {gguf_name(name): value for name, value in load_file(checkpoint / "model.safetensors").items()}
    assert set(converted) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(converted[name].reshape(value.shape), value)


@pytest.mark.slow
def test_the_memory_of_a_loss_is_measured_in_a_process_of_its_own() -> None:
    """64 MB of logits: the naive loss holds several copies, ours none, whatever the parent process holds."""
    ballast = torch.ones(100_000_000)  # a child must not inherit the peak of its parent
    shape = {"vocab_size": 16_000, "width": 16, "num_tokens": 1_024}
    naive, chunked = (in_child("library:loss_memory", {"kind": kind, **shape}) for kind in ("naive", "chunked"))
    assert naive["loss"] == pytest.approx(chunked["loss"], rel=1e-3)
    assert naive["mb"] > chunked["mb"] + 60
    assert chunked["peak_mb"] < ballast.nbytes / 1e6 + 350


def test_the_viewer_is_not_measured_without_a_browser(request_here: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("viewer")
    monkeypatch.setattr(browser.importlib.util, "find_spec", lambda name: None)
    viewer(request_here, report)
    assert report.skipped == ["the viewer skipped: playwright is not installed (pip install -e '.[browser]')"]


@pytest.mark.browser
def test_an_event_is_timed_until_what_it_changes_is_painted() -> None:
    changes = "document.body.textContent += '1', setTimeout(() => { document.body.title = 'all'; }, 300)"
    with browser.chromium() as chromium:
        page = chromium.new_page()
        page.set_content(f'<body onclick="{changes}">0')
        arguments = (page, lambda: page.click("body"), "click", "document.body.textContent")
        assert browser.milliseconds(*arguments, ready="document.body.title") >= 300
        assert page.inner_text("body") == "01"
    with pytest.raises(MinitfError, match="no such thing"), browser.chromium() as chromium:
        browser.milliseconds(chromium.new_page(), lambda: None, "click", "(() => { throw 'no such thing'; })()")


@pytest.mark.browser
def test_the_viewer_end_to_end(request_here: Request, monkeypatch: pytest.MonkeyPatch, plugin_path: str) -> None:
    monkeypatch.setenv("PYTHONPATH", plugin_path)
    report = Report("viewer")
    viewer(request_here, report)
    assert not report.skipped
    medians = {row.what: row.median for row in report.rows}
    sizes = {what: value for what, value in medians.items() if what.endswith(": the view")}
    assert len(sizes) == 8
    assert all(height >= 320 for height in sizes.values())
    cards = [value for what, value in medians.items() if what.startswith("TensorBoard")]
    assert len(cards) == 2
    assert all(10 <= count <= 20 for count in cards)
    times = [row for row in report.rows if row.unit == "ms"]
    assert len(times) == 14
    assert all(len(row.samples) in (1, 2) for row in times)


@pytest.mark.slow
def test_plots_are_small_and_legible_on_any_background(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "speed.svg"
    points = [(64, 10_000.0), (128, 20_000.0), (256, 15_000.0)]
    plots.draw(path, [("width", "tokens/s", {"bf16": points, "fp32": points[:2]}), ("depth", "MB", {"one": points})])
    source = path.read_text(encoding="utf-8")
    ET.fromstring(source)
    assert len(source) < 60_000
    for word in ("width", "tokens/s", "bf16", "128", "depth"):
        assert f">{word}</text>" in source
    assert "#ffffff" not in source  # no background of its own
    assert "#000000" not in source  # no black text
    first = source
    plots.draw(path, [("width", "tokens/s", {"bf16": points, "fp32": points[:2]}), ("depth", "MB", {"one": points})])
    assert path.read_text(encoding="utf-8") == first


def test_a_failing_benchmark_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(request: Request, report: Report) -> None:
        report.add(SPEEDS)
        raise MinitfError("it broke")

    monkeypatch.setitem(BENCHMARKS, "step", BENCHMARKS["step"].__class__(fails, "breaking", 0, 1))
    assert command("step", "gpu", "--out", str(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "failed: it broke" in printed
    assert "gpu: on CUDA" in printed
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text(encoding="utf-8"))["benchmarks"]["step"]["rows"][0]["ratio"] == 3.0


@pytest.mark.slow
def test_throughput_end_to_end(tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny training runs in processes of their own, and the stand-in for nanoGPT."""
    out = tmp_path / "out"
    assert command("throughput", "--quick", "--repeats", "1", "--nanogpt", str(checkout), "--out", str(out)) == 0
    captured = capsys.readouterr()
    assert "about" in captured.err
    assert "round 1 of 1: minitf" in captured.err
    assert "nanoGPT" in captured.out
    (path,) = out.glob("*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert {"date", "arguments", "environment", "benchmarks"} <= set(content)
    assert {"processor", "cores", "packages", "git_commit"} <= set(content["environment"])
    assert content["environment"]["packages"]["torch"] == torch.__version__
    (name, result), *others = content["benchmarks"].items()
    assert (name, others) == ("throughput", [])
    assert result["seconds"] > 0
    rows = result["rows"]
    for row in rows:
        assert {"what", "unit", "samples", "median", "peer", "peer_samples", "ratio", "ratios", "spread"} <= set(row)
        assert len(row["samples"]) == 1
        assert row["median"] > 0
    compared = {(row["what"], row["peer"]): row for row in rows if row["unit"] == "tokens/s"}
    assert {("minitf", "nanoGPT"), ("minitf adamw", "nanoGPT")} <= set(compared)
    # The iterations of the stand-in after its second: 12, 13, 900, 15 and 16 ms of 4 x 32 tokens.
    assert compared["minitf", "nanoGPT"]["peer_median"] == pytest.approx(4 * 32 / 0.015)
    shares = [row for row in rows if row["unit"].startswith("share")]
    assert len(shares) == 2
    assert all(row["median"] > 0 for row in shares)
    assert shares[0]["raw"]["peaks"][0]["threads"] >= 1


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(request_here: Request, checkout: Path) -> None:
    report = Report("gpu")
    request_here.nanogpt = checkout
    compare(request_here, report, TOY, vocab_size=65, batch_size=2, accumulation=3, num_steps=2, device="cpu")
    units = [row.unit for row in report.rows]
    assert units == ["share of bf16 peak", "tokens/s", "tokens/s", "share of bandwidth"]
    assert all(row.median > 0 for row in report.rows)
    # The iterations of the stand-in after its fifth: 15 and 16 ms of 3 x 2 x 32 tokens.
    assert report.rows[1].peer_median == pytest.approx(2 * 3 * 2 * 32 / 0.031)
    assert (request_here.work / "gpu-data/train.bin").stat().st_size == 2_000_000


@pytest.mark.slow
def test_the_gpu_benchmark_learns_once_per_round(request_here: Request) -> None:
    report = Report("gpu")
    learn(request_here, report, ["trainer.device=cpu"])
    assert report.skipped == ["shakespeare_best skipped: give the text with --text FILE"]
    request_here.text, request_here.repeats = request_here.work / "text.txt", 2
    request_here.text.write_text(make_text(20_000), encoding="utf-8")
    learn(request_here, report, ["trainer.device=cpu"])
    assert [(row.unit, len(row.samples)) for row in report.rows] == [("nats", 2), ("s of steps", 2)]
    assert report.rows[0].raw["steps"] == [3, 3]
