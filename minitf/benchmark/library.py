"""minitf's side of every comparison: the only module of the benchmark that uses the library's internals.

All functions run in a process of their own (see `process.in_child`) and return JSON values.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitf.benchmark.process import memory_mb

if TYPE_CHECKING:
    from torch import Tensor

    from minitf.model import Transformer
    from minitf.training.step import TrainingStep

# `python -m minitf.train` sets this before it imports torch; functions that do not go through it need it set.
ENVIRONMENT = {"OMP_WAIT_POLICY": "ACTIVE"}
# The values of trainer.compile that lead to these backends; to the others: false.
COMPILE = {"cpu": "native", "triton": "native", "compile": "true"}


def methods() -> dict[str, tuple[type, str]]:
    """The parts of training that can be timed: class and method."""
    from minitf.training.actions import Evaluate, LogAttention, SaveCheckpoint
    from minitf.training.trainer import Trainer

    return {
        "run": (Trainer, "run"),
        "look": (LogAttention, "__call__"),
        "sample": (Evaluate, "write_samples"),
        "save": (SaveCheckpoint, "__call__"),
    }


def train(overrides: Sequence[str], run_dir: str, timed: Sequence[str] = ()) -> dict[str, Any]:
    """`python -m minitf.train OVERRIDES`: rows of metrics.jsonl, the run's decisions, and seconds in `timed` parts.

    `timed` names some of `methods`; timing them imports torch before the command sets its environment.
    """
    seconds: dict[str, float] = defaultdict(float)
    if timed:
        for name in timed:
            owner, method = methods()[name]
            setattr(owner, method, _timed(getattr(owner, method), name, seconds))
    from minitf.train import main

    main([*overrides, f"run_dir={run_dir}"])
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    environment, decisions = (
        json.loads((Path(run_dir) / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("environment", "decisions")
    )
    return {
        "train": [row for row in rows if row["split"] == "train"],
        "val": [row for row in rows if row["split"] == "val"],
        "setup": environment["setup"],
        "compile": COMPILE.get(decisions["backend"], "false"),
        "seconds": dict(seconds),
    }


def _timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return wrapper


def held_out(run: str) -> dict[str, Any]:
    """`python -m minitf.evaluate`: the float32 loss over all of the run's held-out text."""
    import contextlib
    import io

    from minitf.cli.evaluate import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["--run", run, "--json"])
    return dict(json.loads(printed.getvalue()))


def prepare_text(file: str) -> dict[str, Any]:
    """Seconds to tokenize a text as training does."""
    from minitf.data.config import DataConfig
    from minitf.data.tokenized_text import prepare
    from minitf.tokenizer import TokenizerConfig

    start = time.perf_counter()
    text = prepare(DataConfig(source="files", files=[file]), TokenizerConfig())
    return {"seconds": time.perf_counter() - start, "num_tokens": len(text.train) + len(text.val)}


def step_parts(
    shape: Mapping[str, Any],
    vocab_size: int,
    batch_size: int,
    num_steps: int,
    optim: str = "muon",
    device: str = "auto",
    compilation: str = "auto",
    accumulation: int = 1,
) -> dict[str, Any]:
    """Median milliseconds of each part of a training step on random tokens, with lower bounds for each part.

    On a GPU each part is synchronised; `whole` is measured without that.
    """
    import numpy as np
    import torch

    from minitf.data.batches import Batches
    from minitf.model import ModelConfig, Transformer
    from minitf.optim import OptimConfig, Optimizer
    from minitf.system.hardware import choose_hardware
    from minitf.training.flops import flops_per_token as training_flops
    from minitf.training.parallel import Parallel
    from minitf.training.tuned_step import TunedStep

    hardware = choose_hardware(device, "auto")
    torch.manual_seed(0)
    model = Transformer(config := ModelConfig(**shape), vocab_size).to(hardware.device)
    model.compute_dtype = hardware.dtype
    tokens = np.random.default_rng(0).integers(vocab_size, size=200 * config.context_length * batch_size)
    batches = Batches(tokens.astype(np.uint32), config.context_length, batch_size, 0)
    optimizer = Optimizer(model, OptimConfig(kind=optim), hardware.dtype)
    step = TunedStep(Parallel(model), optimizer, batches, hardware, accumulation)
    choice = step.warm_up(compilation, lambda step_s: 1e9).reason
    hardware.synchronize()
    started = time.perf_counter()
    for index in range(num_steps):
        step.run(index, 1.0)
    hardware.synchronize()
    whole_ms = (time.perf_counter() - started) / num_steps * 1000

    return {
        "ms": _parts(step, num_steps) | {"whole": whole_ms},
        "lower_bounds": lower_bounds(model, optim, batch_size, hardware.dtype.itemsize),
        "flops_per_token": training_flops(model),
        "num_parameters": model.num_parameters(),
        "compile": choice,
        "peak_flops": hardware.peak_flops,
    }


def _parts(step: "TrainingStep", num_steps: int) -> dict[str, float]:
    """Median milliseconds of the parts of `num_steps` steps, each part synchronised."""
    synchronize = step.hardware.synchronize
    seconds: dict[str, float] = defaultdict(float)
    owners: dict[str, object] = {"batch": step.batches, "hidden": step.model, "loss": step.model}
    for name, owner in owners.items():
        setattr(owner, name, _timed(_synchronised(getattr(owner, name), synchronize), name, seconds))
    vars(step.optimizer)["step"] = _timed(_synchronised(step.optimizer.step, synchronize), "optimizer", seconds)
    parts: dict[str, list[float]] = defaultdict(list)
    for index in range(num_steps):
        seconds.clear()
        start = time.perf_counter()
        step.run(index, 1.0)
        synchronize()
        total = time.perf_counter() - start
        values = {"batch": seconds["batch"], "forward": seconds["hidden"], "loss": seconds["loss"] - seconds["hidden"]}
        values["backward"] = total - seconds["batch"] - seconds["loss"] - seconds["optimizer"]
        values["optimizer"] = seconds["optimizer"]
        for name, value in values.items():
            parts[name].append(value * 1000)
    return {name: statistics.median(values) for name, values in parts.items()}


def _synchronised(function: Callable[..., Any], synchronize: Callable[[], None]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        synchronize()
        return result

    return wrapper


def lower_bounds(model: "Transformer", optim: str, batch_size: int, itemsize: int) -> dict[str, dict[str, float]]:
    """Lower bounds of the operations and bytes of each part of a step, counting matrix products and weights only.

    Operations: two per multiply-add of each matrix product, with the unmasked half of the attention scores. Bytes: each
    product reads its operands and writes its result once in the dtype of the activations; attention moves q, k, v and
    its output; the optimiser reads weights, gradients and averages and writes weights and averages, in float32.
    """
    c = model.config
    tokens = batch_size * c.context_length
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]  # type: ignore[union-attr]
    products = 2.0 * tokens * sum(p.numel() for p in matrices)
    attention = 2.0 * tokens * c.num_layers * c.num_heads * c.head_dim * (c.context_length + 1)
    moved = float(itemsize * sum(tokens * sum(p.shape) + p.numel() for p in matrices))
    heads = tokens * c.num_layers * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) * itemsize
    rows, columns = model.vocabulary_VD.shape
    vocabulary = itemsize * float(tokens * columns + rows * columns)  # logits can stay in the cache
    optimizer_flops, optimizer_bytes = _optimizer_bound(model, matrices, optim)
    return {
        "forward": {"flops": products + attention, "bytes": moved + heads},
        "loss": {"flops": 6.0 * tokens * rows * columns, "bytes": 3 * vocabulary},
        "backward": {"flops": 2 * (products + attention), "bytes": 2 * (moved + heads)},
        "optimizer": {"flops": optimizer_flops, "bytes": optimizer_bytes},
    }


def _optimizer_bound(model: "Transformer", matrices: "Sequence[Tensor]", optim: str) -> tuple[float, float]:
    """AdamW moves seven numbers per weight (reads four, writes three), Muon five; Muon iterates three products."""
    from minitf.optim import POLAR_EXPRESS

    num_parameters, in_matrices = model.num_parameters(), sum(p.numel() for p in matrices)
    if optim != "muon":
        return 0.0, 4.0 * 7 * num_parameters
    sides = [(float(min(p.shape)), float(max(p.shape))) for p in matrices]
    flops = sum(len(POLAR_EXPRESS) * (4 * short**2 * long + 2 * short**3) for short, long in sides)
    return flops, 4.0 * (5 * in_matrices + 7 * (num_parameters - in_matrices))


def fastest() -> dict[str, Any]:
    """The value of trainer.compile that a long run would choose on this machine."""
    from minitf.backends.cpu.bindings import library
    from minitf.errors import Unavailable
    from minitf.system.hardware import choose_hardware

    try:
        library(choose_hardware("cpu", "auto").dtype)
    except Unavailable:
        return {"compile": "true"}
    return {"compile": "native"}


def flops_per_token(shape: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Operations per training token of a model of this shape."""
    from minitf.model import ModelConfig, Transformer
    from minitf.training.flops import flops_per_token as training_flops

    model = Transformer(ModelConfig(**shape), vocab_size)
    return {"flops_per_token": training_flops(model), "num_parameters": model.num_parameters()}


def encode(checkpoint: str, text: str, num_tokens: int) -> dict[str, Any]:
    """The first token ids of a text."""
    import minitf

    return {"ids": minitf.load(checkpoint, "cpu").tokenizer.encode(text)[:num_tokens]}


def sentences(checkpoint: str, text: str, lengths: Sequence[int], first_words: Sequence[str]) -> dict[str, Any]:
    """Beginnings of a text with these numbers of tokens; the last of them also with each other first word that fits."""
    import minitf

    encode = minitf.load(checkpoint, "cpu").tokenizer.encode
    ends = [next(end for end in range(1, len(text) + 1) if len(encode(text[:end])) == length) for length in lengths]
    rest = text[: ends[-1]].partition(" ")[2]
    variants = [f"{word} {rest}" for word in first_words]
    changed = [one for one in variants if len(encode(one)) == lengths[-1] and one != text[: ends[-1]]]
    return {"texts": [text[:end] for end in ends], "changed": changed}


def decode(checkpoint: str, prompt: list[int], batch_size: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Greedy continuation of a prompt, `repeats` times after a warm-up: seconds of each, and the ids."""
    from itertools import islice

    import minitf
    from minitf.generate import GenerationRequest, generate
    from minitf.inference.sampling import Sampling

    lm = minitf.load(checkpoint)

    def once() -> list[list[int]]:
        steps = generate(lm.model, GenerationRequest(prompt, Sampling(temperature=0), batch_size))
        return [step.ids_B.tolist() for step in islice(steps, num_tokens)]

    started = time.perf_counter()
    once()
    first_s = time.perf_counter() - started
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        ids_TB = once()
        seconds.append(time.perf_counter() - start)
    num_bytes = sum(p.numel() for p in lm.model.parameters()) * 4
    rows = [list(row) for row in zip(*ids_TB, strict=True)]
    return {"seconds": seconds, "first_s": first_s, "ids": rows, "weight_bytes": num_bytes}


def loss_memory(kind: str, vocab_size: int, width: int, num_tokens: int) -> dict[str, Any]:
    """Additional peak memory and seconds of a loss with its gradients: `chunked` or `naive`."""
    import torch
    import torch.nn.functional as F

    from minitf.loss import linear_cross_entropy

    torch.manual_seed(0)
    x_BTD = torch.randn(1, num_tokens, width).to(torch.bfloat16).requires_grad_()
    vocabulary_VD = (torch.randn(vocab_size, width) * 0.02).requires_grad_()
    targets_BT = torch.randint(vocab_size, (1, num_tokens))
    torch.mm(x_BTD.detach()[0, :64], vocabulary_VD.detach()[:64].to(x_BTD.dtype).T)  # initialises the library
    before_mb = memory_mb("VmRSS")
    start = time.perf_counter()
    if kind == "chunked":
        loss = linear_cross_entropy(x_BTD, vocabulary_VD, targets_BT)
    else:
        logits_BTV = F.linear(x_BTD, vocabulary_VD.to(x_BTD.dtype))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
    loss.backward()
    seconds = time.perf_counter() - start
    return {"mb": memory_mb("VmHWM") - before_mb, "seconds": seconds, "loss": float(loss)}
