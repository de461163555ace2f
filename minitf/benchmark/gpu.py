"""Benchmarks on a GPU: share of the peak, nanoGPT compiled at the same shape, decoding, seconds to a loss."""

from typing import Any

from minitf.benchmark import nanogpt
from minitf.benchmark.comparison import Row, alternate
from minitf.benchmark.machine import peak, shares_of_peak
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request
from minitf.benchmark.training import train

# conf/experiment/gpt2.yaml
GPT2 = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "context_length": 1024, "intermediate_size": 2048}
VOCABULARY, BATCH_SIZE, ACCUMULATION = 50_304, 32, 8
WARM_UP = 5  # iterations of nanoGPT, which compile
TARGET_LOSS = 1.4697  # held-out nats per character of Tiny Shakespeare: nanoGPT's README, on an A100


def unavailable() -> str | None:
    """Why nothing can be measured, or None."""
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def gpu(request: Request, report: Report) -> None:
    """The benchmark of this name: `experiment=gpt2`'s step, greedy decoding at batch 1, and Tiny Shakespeare."""
    missing = unavailable()
    if missing:
        report.skip("gpu", missing)
        return
    compare(request, report, GPT2, VOCABULARY, BATCH_SIZE, ACCUMULATION, 6, "cuda")
    learn(request, report, ["trainer.device=cuda"])


def compare(
    request: Request,
    report: Report,
    shape: dict[str, int],
    vocab_size: int,
    batch_size: int,
    accumulation: int,
    num_steps: int,
    device: str,
) -> None:
    """Rows of the training step for any shape and device; a step is `accumulation` batches on both sides."""
    step: dict[str, Any] = {
        "shape": shape, "vocab_size": vocab_size, "batch_size": batch_size, "num_steps": num_steps,
        "device": device, "compilation": "auto" if device == "cuda" else "false", "accumulation": accumulation,
    }  # fmt: skip
    tokens = accumulation * batch_size * shape["context_length"]
    sides = {
        "peak": lambda round_: peak(request, device, {}),
        "minitf": lambda round_: in_child("library:step_parts", step),
    }
    missing = nanogpt.unavailable(request.nanogpt)
    if missing or not request.nanogpt:
        report.skip("nanoGPT", missing or "")
    else:
        checkout, dataset = request.nanogpt, request.work / "gpu-data"
        in_child("gpu:write_random", {"directory": str(dataset), "vocab_size": min(vocab_size, 50_257)})
        arguments = [
            f"--device={device}", f"--compile={device == 'cuda'}", "--eval_iters=1", "--eval_interval=1000000",
            "--log_interval=1", f"--max_iters={num_steps + WARM_UP}", *nanogpt.shape_arguments(shape, batch_size),
            f"--gradient_accumulation_steps={accumulation}",
        ]  # fmt: skip
        out_dir = request.work / "gpu-out"

        def other(round_: int) -> dict[str, Any]:
            # log_interval=1 synchronises at each iteration, which costs a few microseconds per step.
            ms = nanogpt.train(checkout, dataset, out_dir, arguments, config="").ms[WARM_UP:]
            return {"tokens_per_s": tokens * len(ms) / sum(ms) * 1000, "ms": ms}

        sides["nanoGPT compiled"] = other
    results = alternate(sides, request.repeats, report.progress)
    peaks, ours = results["peak"], results["minitf"]
    speeds = [tokens / result["ms"]["whole"] * 1000 for result in ours]
    flops = [speed * result["flops_per_token"] for speed, result in zip(speeds, ours, strict=True)]
    shares = shares_of_peak(flops, peaks, "bf16")
    note = f"best product {peaks[-1]['peaks']['bf16'] / 1e12:.3g} TFLOP/s; compile {ours[0]['compile']}"
    report.add(Row("training step", "share of bf16 peak", shares, note=note, raw={"ours": ours, "peaks": peaks}))
    theirs = results.get("nanoGPT compiled", [])
    peer = ("nanoGPT compiled", [result["tokens_per_s"] for result in theirs]) if theirs else ("", [])
    report.add(Row("training step", "tokens/s", speeds, *peer, raw={"theirs": theirs}))
    decoding(request, report, shape, vocab_size, device, [p["bytes_per_s"] for p in peaks])


def decoding(
    request: Request, report: Report, shape: dict[str, int], vocab_size: int, device: str, bandwidths: list[float]
) -> None:
    """Tokens/s at batch 1 of a model of this shape, and its share of the memory bandwidth."""
    arguments = {"shape": shape, "vocab_size": vocab_size, "device": device, "num_tokens": 8 if request.quick else 192}
    result = in_child("gpu:decode_random", {**arguments, "repeats": len(bandwidths)})
    speeds = [1 / seconds for seconds in result["token_s"]]
    shares = [speed * result["weight_bytes"] / bandwidth for speed, bandwidth in zip(speeds, bandwidths, strict=True)]
    first = f"after the first, which takes {min(result['first_s']) * 1000:.1f} ms; engine {result['engine']}"
    report.add(Row("decoding, batch 1", "tokens/s", speeds, note=first, raw=result))
    report.add(Row("decoding, batch 1", "share of bandwidth", shares, note="weights read once per token"))


def learn(request: Request, report: Report, device: list[str]) -> None:
    """Training seconds and final held-out loss of `experiment=shakespeare_best`, with one seed per round."""
    if request.text is None:
        report.skip("shakespeare_best", "give the text with --text FILE")
        return
    overrides = ["experiment=shakespeare_best", "data=text", f"data.files=[{request.text}]", *device]
    quick = ["trainer.max_steps=3", "model.num_layers=1", "trainer.eval_tokens=1000"] if request.quick else []
    runs = [
        train(request, [*overrides, *quick, f"seed={seed}"], f"gpu-shakespeare-{seed}")
        for seed in range(request.repeats)
    ]
    losses = [run["val"][-1]["loss"] for run in runs]
    reached = f"target {TARGET_LOSS}: {sum(loss <= TARGET_LOSS for loss in losses)} of {len(losses)} seeds reach it"
    raw = {"setup": runs[0]["setup"], "steps": [run["train"][-1]["step"] for run in runs]}
    report.add(Row("Tiny Shakespeare", "nats", losses, more_is_better=False, note=reached, raw=raw))
    seconds = [run["train"][-1]["train_s"] for run in runs]
    report.add(Row("Tiny Shakespeare", "s of steps", seconds, more_is_better=False))


def write_random(directory: str, vocab_size: int) -> dict[str, Any]:
    """Write random tokens in nanoGPT's format, without a vocabulary: it then uses GPT-2's."""
    from pathlib import Path

    import numpy as np

    Path(directory).mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(vocab_size, size=1_000_000).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        ids.tofile(Path(directory) / name)
    return {}


def decode_random(shape: dict[str, int], vocab_size: int, device: str, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Greedy decoding of an untrained model: seconds of the first token, and per later token."""
    import time
    from itertools import islice

    import torch

    from minitf.generate import GenerationRequest, generate
    from minitf.inference.decoder import choose_engine
    from minitf.inference.sampling import Sampling
    from minitf.model import ModelConfig, Transformer
    from minitf.system.hardware import choose_hardware

    model = Transformer(ModelConfig(**shape), vocab_size).to(device).eval()  # type: ignore[arg-type]
    model.compute_dtype = choose_hardware(device, "auto").dtype if device == "cuda" else torch.float32
    first_s, token_s = [], []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        steps = generate(model, GenerationRequest([1] * 8, Sampling(temperature=0)))
        next(steps).ids_B.tolist()
        began = time.perf_counter()
        [step.ids_B.tolist() for step in islice(steps, num_tokens)]
        first_s.append(began - start)
        token_s.append((time.perf_counter() - began) / num_tokens)
    weight_bytes = model.num_parameters() * torch.empty((), dtype=model.compute_dtype).itemsize
    engine = choose_engine(model).name
    return {"first_s": first_s[1:], "token_s": token_s[1:], "weight_bytes": weight_bytes, "engine": engine}
