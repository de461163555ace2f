"""The speed of a training step: its parts against lower bounds, tokens/s against nanoGPT and the HF Trainer."""

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitf.benchmark import hugging_face, nanogpt
from minitf.benchmark.comparison import Row, alternate
from minitf.benchmark.library import ENVIRONMENT
from minitf.benchmark.machine import best_peak, faster_precision, peak, shares_of_peak
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request, number
from minitf.benchmark.text import write_text

MINI = {"num_layers": 4, "hidden_size": 192, "num_heads": 6, "context_length": 128}  # conf/model/mini.yaml
SIX_256 = {"num_layers": 6, "hidden_size": 256, "num_heads": 4, "context_length": 256, "intermediate_size": 704}
TOY = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "context_length": 32, "intermediate_size": 64}
BATCH_SIZE = 16
# Switches off what a speed run does not need; everything else is the default.
QUIET = (
    "attention.heads=false", "trainer.attention_every=-1", "trainer.sample_tokens=0", "trainer.eval_tokens=4096",
    "trainer.eval_every=1000000", "trainer.save_every=1000000",
)  # fmt: skip


def step(request: Request, report: Report) -> None:
    """The benchmark of this name: milliseconds of each part against its lower bounds."""
    shapes = {"toy": (TOY, 65)} if request.quick else {"mini, vocabulary 4096": (MINI, 4096), "6 x 256": (SIX_256, 65)}
    for name, (shape, vocab_size) in shapes.items():
        arguments = {
            "shape": shape, "vocab_size": vocab_size, "batch_size": BATCH_SIZE, "device": "cpu",
            "num_steps": 3 if request.quick else 30, "compilation": "false" if request.quick else "auto",
        }  # fmt: skip

        def parts(round_: int, arguments: dict[str, Any] = arguments) -> dict[str, Any]:
            return in_child("library:step_parts", arguments, ENVIRONMENT)

        sides = {"peak": lambda round_: peak(request), f"{name}, parts": parts}
        peaks, results = alternate(sides, request.repeats, report.progress).values()
        report_step(report, name, peaks, results)


def report_step(report: Report, name: str, peaks: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    """Rows of one shape: each part with its lower bounds and its share of the peak."""
    precision = best_peak(peaks)
    flops_per_s = max(result["peaks"][precision] for result in peaks)
    bytes_per_s = max(result["bytes_per_s"] for result in peaks)
    bounds = results[0]["lower_bounds"]
    bounds["whole"] = {key: sum(bound[key] for bound in bounds.values()) for key in ("flops", "bytes")}
    for part in results[0]["ms"]:
        samples = [result["ms"][part] for result in results]
        note = ""
        if part in bounds:
            flops, moved = bounds[part]["flops"], bounds[part]["bytes"]
            ms = sorted(samples)[len(samples) // 2]
            compute_ms, memory_ms = flops / flops_per_s * 1000, moved / bytes_per_s * 1000
            note = (
                f"at least {number(compute_ms)} ms for {number(flops / 1e9)} GFLOP, {number(memory_ms)} ms for "
                f"{number(moved / 1e6)} MB; {min(1.0, compute_ms / ms):.0%} of {precision} peak"
            )
        report.add(Row(f"{name}: {part}", "ms", samples, more_is_better=False, note=note, raw=bounds.get(part, {})))
    report.progress(f"{name}: compile {results[0]['compile']}")


def throughput(request: Request, report: Report) -> None:
    """The benchmark of this name: tokens/s of training steps, every side with a user's settings."""
    shape = TOY if request.quick else SIX_256
    batch_size = 4 if request.quick else BATCH_SIZE
    text = request.text or write_text(request.work / "text.txt", 40_000 if request.quick else 1_200_000)
    tokens = batch_size * shape["context_length"]
    sides: dict[str, Callable[[int], dict[str, Any]]] = {
        "minitf": lambda round_: minitf_speed(request, shape, batch_size, text, "muon", round_),
        "minitf adamw": lambda round_: minitf_speed(request, shape, batch_size, text, "adamw", round_),
    }
    missing = nanogpt.unavailable(request.nanogpt)
    if missing or not request.nanogpt:
        report.skip("nanoGPT", missing or "")
    else:
        checkout, dataset = request.nanogpt, nanogpt.write_dataset(text, request.work / "nanogpt-data")
        sides["nanoGPT"] = lambda round_: nanogpt_speed(request, checkout, dataset, shape, batch_size)
    precision = faster_precision()
    missing = hugging_face.unavailable("transformers", "accelerate")
    if missing:
        report.skip("Hugging Face Trainer", missing)
    else:
        sides[f"HF Trainer {precision}"] = lambda round_: hugging_face_speed(request, shape, batch_size, precision)
    sides["peak"] = lambda round_: peak(request)
    results = alternate(sides, request.repeats, report.progress)
    peaks = results.pop("peak")
    cost = in_child("library:flops_per_token", {"shape": shape, "vocab_size": 65})
    for name in ("minitf", "minitf adamw"):
        speeds = [result["tokens_per_s"] for result in results[name]]
        shares = shares_of_peak([speed * cost["flops_per_token"] for speed in speeds], peaks, precision)
        raw = {"runs": results[name], "peaks": peaks, **cost, "tokens_per_step": tokens}
        report.add(Row(name, f"share of {precision} peak", shares, note=results[name][-1]["note"], raw=raw))
        for other in [name for name in results if not name.startswith("minitf")]:
            theirs = [result["tokens_per_s"] for result in results[other]]
            report.add(Row(name, "tokens/s", speeds, other, theirs, raw={"runs": results[other]}))
        if len(results) == 2:
            report.add(Row(name, "tokens/s", speeds))


def minitf_speed(
    request: Request, shape: dict[str, int], batch_size: int, text: Path, optim: str, round_: int
) -> dict[str, Any]:
    """Tokens/s of the median step of `python -m minitf.train` after the first ones, with a long run's choices."""
    overrides = [
        "data=text", f"data.files=[{text}]", "tokenizer=char", f"optim={optim}", "trainer.device=cpu",
        *(f"model.{key}={value}" for key, value in shape.items()), f"trainer.batch_size={batch_size}", *QUIET,
        f"trainer.compile={fastest(request)}", "trainer.log_every=1",
        f"trainer.max_steps={6 if request.quick else 60}",
    ]  # fmt: skip
    result = train(request, overrides, f"throughput-{optim}-{round_}")
    rows = result["train"][1 if request.quick else 9 :]
    step_s = statistics.median(after["train_s"] - before["train_s"] for before, after in itertools.pairwise(rows))
    speed = batch_size * shape["context_length"] / step_s
    setup = result["setup"]
    note = f"{setup['precision'].split(',')[0]}; {setup['backend']}"
    return {"tokens_per_s": speed, "note": note, "wall_s": result["wall_s"], "setup": setup}


def train(request: Request, overrides: list[str], name: str, **options: Any) -> dict[str, Any]:
    """`library.train` in a child, with its run and caches in the benchmark's directory."""
    environment = {"MINITF_CACHE": str(request.work / "cache"), **options.pop("environment", {})}
    arguments = {"overrides": overrides, "run_dir": str(request.work / "runs" / name), **options}
    return in_child("library:train", arguments, environment)


def fastest(request: Request) -> str:
    """The value of trainer.compile that a run of minutes would choose."""
    return "false" if request.quick else str(in_child("library:fastest", {})["compile"])


def nanogpt_speed(
    request: Request, checkout: Path, dataset: Path, shape: dict[str, int], batch_size: int
) -> dict[str, Any]:
    """Tokens/s of nanoGPT's median iteration after its first five."""
    arguments = [
        "--device=cpu", "--compile=False", "--eval_iters=1", "--eval_interval=1000000", "--log_interval=1",
        f"--max_iters={6 if request.quick else 20}", *nanogpt.shape_arguments(shape, batch_size),
    ]  # fmt: skip
    run = nanogpt.train(checkout, dataset, request.work / "nanogpt-out", arguments)
    ms = run.ms[2 if request.quick else 5 :]
    speed = batch_size * shape["context_length"] / statistics.median(ms) * 1000
    return {"tokens_per_s": speed, "ms": ms, "wall_s": run.wall_s}


def hugging_face_speed(request: Request, shape: dict[str, int], batch_size: int, precision: str) -> dict[str, Any]:
    """Tokens/s of the Hugging Face Trainer's median step after its first five."""
    arguments = {
        "shape": shape, "vocab_size": 65, "batch_size": batch_size, "num_steps": 6 if request.quick else 20,
        "work": str(request.work / "hugging-face"), "precision": precision,
    }  # fmt: skip
    result = in_child("hugging_face:train", arguments)
    seconds = result["seconds"][2 if request.quick else 5 :]
    speed = batch_size * shape["context_length"] / statistics.median(seconds)
    return {"tokens_per_s": speed, "seconds": seconds, "wall_s": result["wall_s"]}
