"""Curves: cost against model and corpus size, bf16 against fp32, and the cost of logging attention."""

import itertools
from collections.abc import Callable
from typing import Any

from minitf.benchmark import plots
from minitf.benchmark.comparison import Row, alternate
from minitf.benchmark.library import ENVIRONMENT
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request, number
from minitf.benchmark.text import write_text
from minitf.benchmark.training import QUIET, fastest, train

BASE = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "context_length": 256}
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "width": ("hidden_size", (64, 128, 256, 384, 512)),
    "depth": ("num_layers", (2, 4, 8, 12)),
    "context": ("context_length", (64, 128, 256, 512, 1024, 2048, 4096)),
}
TOY = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "context_length": 32}
BATCH_TOKENS = 4096  # for every context length
SMOOTHING = 20  # steps averaged before loss curves are compared


def curves(request: Request, report: Report) -> None:
    """The benchmark of this name: tokens/s and peak memory against width, depth and context."""
    text = write_text(request.work / "curves.txt", 100_000 if request.quick else 4_000_000)
    base, batch_tokens = (TOY, 256) if request.quick else (BASE, BATCH_TOKENS)
    quick = {"width": (32, 64), "depth": (1, 2), "context": (32, 64)}
    sides: dict[str, Callable[[int], dict[str, Any]]] = {}
    coordinates: dict[str, tuple[str, int]] = {}
    for axis, (key, values) in AXES.items():
        for value in quick[axis] if request.quick else values:
            shape = {**base, key: value}
            sizes = [f"model.{name}={size}" for name, size in shape.items()]
            batch = speed(request, max(1, batch_tokens // shape["context_length"]))
            overrides = ["data=text", f"data.files=[{text}]", "tokenizer=char", *sizes, *batch]
            sides[f"{axis} {value}"] = training(request, overrides, f"curves-{axis}-{value}")
            coordinates[f"{axis} {value}"] = axis, value
    points: dict[str, list[tuple[int, float, float]]] = {axis: [] for axis in AXES}
    for name, results in alternate(sides, request.repeats, report.progress).items():
        (axis, value), row = coordinates[name], speed_row(name, results)
        report.add(row)
        points[axis].append((value, row.median, row.raw["mb"]))
    panels = {"speed": ("tokens/s", 1, 1.0), "memory": ("peak memory, bytes", 2, 1e6)}
    for plot, (label, column, unit) in panels.items():
        lines = [(axis, label, {"minitf": [(p[0], p[column] * unit) for p in points[axis]]}) for axis in AXES]
        draw(request, report, f"{plot}.svg", lines)


def speed(request: Request, batch_size: int) -> list[str]:
    """Overrides of a run of a few seconds that computes like a longer one."""
    limit = ["trainer.max_steps=3"] if request.quick else ["trainer.max_minutes=0.1"]
    return [
        *QUIET,
        f"trainer.compile={fastest(request)}",
        "trainer.log_every=1",
        f"trainer.batch_size={batch_size}",
        *limit,
    ]


def tokens_per_s(rows: list[dict[str, Any]]) -> float:
    """The speed over all rows after the first tenth."""
    first = rows[len(rows) // 10]
    return float((rows[-1]["tokens"] - first["tokens"]) / (rows[-1]["train_s"] - first["train_s"]))


def training(request: Request, overrides: list[str], name: str, **options: Any) -> Callable[[int], dict[str, Any]]:
    """A side of a comparison: one training run per round."""
    return lambda round_: train(request, overrides, f"{name}-{round_}", **options)


def speed_row(name: str, results: list[dict[str, Any]]) -> Row:
    """Training tokens/s, round by round, and the peak memory of all rounds."""
    mb = max(result["peak_mb"] for result in results)
    speeds = [tokens_per_s(result["train"]) for result in results]
    return Row(name, "tokens/s", speeds, note=f"{number(mb)} MB at most", raw={"mb": mb})


def corpus(request: Request, report: Report) -> None:
    """The benchmark of this name: preparation and training against the size of the text."""
    seconds, memory = [], []
    sides: dict[str, Callable[[int], dict[str, Any]]] = {}
    for megabytes in request.corpus_mb:
        name, cache = f"{megabytes:,} MB", {"MINITF_CACHE": str(request.work / f"corpus-{megabytes}")}
        report.progress(f"writing {name} of text")
        text = write_text(request.work / f"corpus-{megabytes}.txt", megabytes * 1_000_000)
        report.progress(f"tokenizing {name}")
        prepared = in_child("library:prepare_text", {"file": str(text)}, cache)
        seconds.append((megabytes, prepared["seconds"]))
        memory.append((megabytes, prepared["peak_mb"] * 1e6))
        note = f"{number(megabytes / prepared['seconds'])} MB/s, {number(prepared['peak_mb'])} MB of memory at most"
        report.add(
            Row(f"{name}, tokenizing", "s", [prepared["seconds"]], more_is_better=False, note=note, raw=prepared)
        )
        size = ["model=nano", "model.context_length=32"] if request.quick else ["model=mini"]
        overrides = ["data=text", f"data.files=[{text}]", *size, *speed(request, 16)]
        sides[f"{name}, training"] = training(request, overrides, f"corpus-{megabytes}", environment=cache)
    rows = [speed_row(name, results) for name, results in alternate(sides, request.repeats, report.progress).items()]
    for row in rows:
        report.add(row)
    measured = list(zip(request.corpus_mb, rows, strict=True))
    speeds = [(megabytes, row.median) for megabytes, row in measured]
    memories = {"tokenizing": memory, "training": [(megabytes, row.raw["mb"] * 1e6) for megabytes, row in measured]}
    panels = [
        ("corpus, MB", "tokenizing, s", {"minitf": seconds}),
        ("corpus, MB", "training, tokens/s", {"minitf": speeds}),
        ("corpus, MB", "peak memory, bytes", memories),
    ]
    draw(request, report, "corpus.svg", panels)


def precision(request: Request, report: Report) -> None:
    """The benchmark of this name: one seed in bf16 and fp32, and in bf16 twice."""
    steps = 12 if request.quick else 300
    size = ["model=nano", "tokenizer=byte", "model.context_length=32"] if request.quick else ["model=mini"]
    base = [*QUIET, f"trainer.max_steps={steps}", "trainer.log_every=1", *size]

    def losses(kind: str, name: str) -> list[float]:
        report.progress(name)
        result = train(request, [*base, f"trainer.precision={kind}"], f"precision-{name.replace(' ', '-')}")
        return [float(row["loss"]) for row in result["train"]]

    bf16, again, fp32 = losses("bf16", "bf16"), losses("bf16", "bf16 again"), losses("fp32", "fp32")
    window = min(SMOOTHING, steps // 2)
    smooth = {name: smoothed(curve, window) for name, curve in (("bf16", bf16), ("fp32", fp32))}
    apart = [abs(a - b) for a, b in zip(smooth["bf16"], smooth["fp32"], strict=True)]
    raw = {"bf16": bf16, "fp32": fp32, "bf16_again": again}
    note = f"largest over {steps} steps, of means of {window}; {apart[-1]:.4f} at the end of {smooth['fp32'][-1]:.4f}"
    report.add(Row("bf16 against fp32", "nats", [max(apart)], more_is_better=False, note=note, raw=raw))
    different = sum(a != b for a, b in zip(bf16, again, strict=True))
    report.add(Row("same seed twice", "losses that differ", [float(different)], note=f"of {steps}"))
    lines = {name: list(enumerate(curve, start=window)) for name, curve in smooth.items()}
    draw(request, report, "precision.svg", [("step", "training loss, nats", lines)], x_scale="linear", markers=False)


def smoothed(curve: list[float], window: int) -> list[float]:
    """Moving averages over `window` values."""
    sums = [0.0, *itertools.accumulate(curve)]
    return [(sums[i] - sums[i - window]) / window for i in range(window, len(sums))]


def logging(request: Request, report: Report) -> None:
    """The benchmark of this name: the loop's wall time with maps, head scores and samples, and without.

    Two results: the seconds spent in logging as a share of the steps' time, which hardly depends on other load, and the
    ratio of whole loops of the same number of steps, which includes the effect on the steps themselves.
    """
    minutes = 0.02 if request.quick else 3.0
    size = ["model=nano", "trainer.eval_tokens=2000"] if request.quick else ["model=mini"]
    off = ["attention.heads=false", "trainer.attention_every=-1", "trainer.sample_tokens=0"]
    timed = {"timed": ["run", "look", "sample"], "environment": ENVIRONMENT}
    report.progress("finding the number of steps")
    first = train(request, [*size, *off, f"trainer.max_minutes={minutes}"], "logging-steps")
    steps = [*size, f"trainer.max_steps={first['train'][-1]['step']}", f"trainer.compile={first['compile']}"]
    sides = {
        "on": lambda round_: train(request, steps, f"logging-on-{round_}", **timed),
        "off": lambda round_: train(request, [*steps, *off], f"logging-off-{round_}", **timed),
    }
    on, without = alternate(sides, request.repeats, report.progress).values()
    spent = [result["seconds"].get("look", 0.0) + result["seconds"].get("sample", 0.0) for result in on]
    shares = [100 * s / result["train"][-1]["train_s"] for s, result in zip(spent, on, strict=True)]
    raw = {"on": [r["seconds"] for r in on], "off": [r["seconds"] for r in without]}
    report.add(Row("maps, head scores and samples", "% of the steps' time", shares, more_is_better=False, raw=raw))
    walls = [[result["seconds"]["run"] for result in results] for results in (on, without)]
    trained = [[result["train"][-1]["train_s"] for result in results] for results in (on, without)]
    report.add(Row("the whole loop", "s", walls[0], "off", walls[1], more_is_better=False))
    report.add(Row("its training steps", "s", trained[0], "off", trained[1], more_is_better=False))


def draw(request: Request, report: Report, name: str, panels: list[Any], **options: Any) -> None:
    """Draw a plot in the output directory, or report why not."""
    missing = plots.unavailable()
    if missing:
        report.skip(name, missing)
        return
    plots.draw(request.out / name, panels, **options)
    report.plots.append(name)
