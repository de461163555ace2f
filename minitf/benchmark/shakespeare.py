"""Time to a loss: nanoGPT's loss on Tiny Shakespeare, and the held-out metrics after a few minutes."""

import shutil
from pathlib import Path
from typing import Any

from minitf.benchmark import nanogpt
from minitf.benchmark.comparison import Row, alternate
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request
from minitf.benchmark.training import train
from minitf.config.presets import options

TARGET_LOSS = 1.8857  # held-out nats per character of nanoGPT's README recipe for a CPU
# Numbers of steps to try, each about a fifth larger than the one before.
LADDER = (100, 120, 150, 180, 220, 260, 310, 370, 440, 530, 640, 770, 920, 1100, 1300, 1600, 2000)


def shakespeare(request: Request, report: Report) -> None:
    """The benchmark of this name: seconds to nanoGPT's loss, by its README's recipe and by minitf's experiment."""
    if request.text is None:
        report.skip("shakespeare", "give the text with --text FILE")
        return
    text = request.text
    num_steps = request.steps or (3 if request.quick else find_steps(request, report, text))
    sides = {"minitf": lambda round_: minitf_race(request, text, num_steps, round_)}
    missing = nanogpt.unavailable(request.nanogpt)
    if missing or not request.nanogpt:
        report.skip("nanoGPT", missing or "")
    else:
        checkout, dataset = request.nanogpt, nanogpt.write_dataset(text, request.work / "nanogpt-data")
        sides["nanoGPT"] = lambda round_: nanogpt_race(request, checkout, dataset)
    ours, *theirs = alternate(sides, request.repeats, report.progress).values()
    losses = [result["loss"] for result in ours]
    tokens = ours[0]["tokens"]
    values = {
        "training to the loss": ("train_s", "s of steps", f"{num_steps} steps, {tokens:,} tokens"),
        "whole process": ("wall_s", "s", "cold: no cached text or compiled code"),
        "held-out loss": ("loss", "nats", f"target {TARGET_LOSS}: {sum(x <= TARGET_LOSS for x in losses)} of "
                          f"{len(losses)} seeds reach it"),
    }  # fmt: skip
    for what, (key, unit, note) in values.items():
        peer = ("nanoGPT", [result[key] for result in theirs[0]]) if theirs else ("", [])
        raw = {"minitf": ours, "nanogpt": theirs[0] if theirs else []}
        row = Row(what, unit, [result[key] for result in ours], *peer, more_is_better=False, note=note, raw=raw)
        report.add(row)


def minitf_race(request: Request, text: Path, num_steps: int, seed: int) -> dict[str, Any]:
    """One cold run of the experiment: seconds in steps and in total, and the float32 loss over all held-out text."""
    name = f"shakespeare-{num_steps}-{seed}"
    cold = request.work / "cold"
    for earlier in (cold, request.work / "runs" / name):  # including those of the search for the number of steps
        shutil.rmtree(earlier, ignore_errors=True)
    caches = {"MINITF_CACHE": str(cold / "text"), "TORCHINDUCTOR_CACHE_DIR": str(cold / "code")}
    overrides = [
        "experiment=shakespeare_char", "data=text", f"data.files=[{text}]", "trainer.max_minutes=null",
        "trainer.device=cpu", f"trainer.max_steps={num_steps}", f"seed={seed}",
    ]  # fmt: skip
    if request.quick:
        overrides += ["model.num_layers=1", "model.hidden_size=32", "model.intermediate_size=64"]
    result = train(request, overrides, name, environment=caches)
    evaluation = in_child("library:held_out", {"run": str(request.work / "runs" / name)}, caches)
    last = result["train"][-1]
    return {
        "train_s": last["train_s"], "wall_s": result["wall_s"], "loss": evaluation["loss"], "tokens": last["tokens"],
        "warmup_s": last["warmup_s"], "in_training_loss": result["val"][-1]["loss"], "setup": result["setup"],
    }  # fmt: skip


def find_steps(request: Request, report: Report, text: Path) -> int:
    """The fewest steps in LADDER that reach the target with the first seed, by bisection."""
    low, high = 0, len(LADDER) - 1
    while low < high:
        middle = (low + high) // 2
        loss = minitf_race(request, text, LADDER[middle], 0)["loss"]
        report.progress(f"{LADDER[middle]} steps reach {loss:.4f}")
        if loss <= TARGET_LOSS:
            high = middle
        else:
            low = middle + 1
    return LADDER[high]


def nanogpt_race(request: Request, checkout: Path, dataset: Path) -> dict[str, Any]:
    """One run of the README's recipe."""
    out_dir = request.work / "nanogpt-out"
    shutil.rmtree(out_dir, ignore_errors=True)
    recipe, interval = list(nanogpt.RECIPE), nanogpt.EVAL_INTERVAL
    if request.quick:
        interval = 4
        recipe += ["--max_iters=8", f"--eval_interval={interval}", "--n_layer=1", "--n_embd=32"]
    run = nanogpt.train(checkout, dataset, out_dir, recipe)
    names = {"checkout": str(checkout), "dataset": str(dataset), "out_dir": str(out_dir)}
    evaluation = in_child("nanogpt:held_out", names)
    return {
        "train_s": run.step_s(interval), "wall_s": run.wall_s, "loss": evaluation["loss"],
        "iteration": evaluation["iteration"], "num_tokens": evaluation["num_tokens"],
    }  # fmt: skip


def quality(request: Request, report: Report) -> None:
    """The benchmark of this name: held-out metrics of the shipped experiments, over seeds."""
    experiments: dict[str, tuple[list[str], str]] = {"kjv, 3 minutes": ([], "bits_per_byte")}
    shipped = options("experiment")
    if "kjv_best" in shipped:
        experiments["kjv_best, 15 minutes"] = (["experiment=kjv_best"], "bits_per_byte")
    else:
        report.skip("kjv_best", "this version has no such experiment")
    if "shakespeare_best" not in shipped:
        report.skip("shakespeare_best", "this version has no such experiment")
    elif request.text is None:
        report.skip("shakespeare_best", "give the text with --text FILE")
    else:
        text = ["data=text", f"data.files=[{request.text}]"]
        experiments["shakespeare_best"] = (["experiment=shakespeare_best", *text], "loss")
    for name, (overrides, metric) in experiments.items():
        report.progress(f"{name}, {request.seeds} seeds")
        quick = ["trainer.max_minutes=0.01", "model=nano", "trainer.eval_tokens=1000"] if request.quick else []
        runs = [
            train(request, [*overrides, *quick, f"seed={seed}"], f"quality-{name.split(',')[0]}-{seed}")
            for seed in range(request.seeds)
        ]
        finals = [run["val"][-1] for run in runs]
        raw = {"finals": finals, "setup": runs[0]["setup"]}
        seconds = [run["train"][-1]["train_s"] for run in runs]
        unit = "bits/byte" if metric == "bits_per_byte" else "nats"
        report.add(Row(name, unit, [row[metric] for row in finals], more_is_better=False, note="held-out", raw=raw))
        report.add(Row(name, "s of steps", seconds, more_is_better=False))
