"""The cost of communication between training processes: bytes by the system's network counters, and milliseconds."""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitf.benchmark.comparison import Row
from minitf.benchmark.process import run_command_line
from minitf.benchmark.report import Report, Request
from minitf.benchmark.training import BATCH_SIZE, SIX_256, TOY
from minitf.errors import MinitfError

if TYPE_CHECKING:
    from minitf.distributed.process_group import ProcessGroup
    from minitf.training.step import TrainingStep

NUM_PROCESSES, VOCABULARY = 2, 4096
COUNTER = Path("/proc/net/dev")  # bytes per network interface (Linux); local processes communicate through `lo`


def distributed(request: Request, report: Report) -> None:
    """The benchmark of this name: two processes on this machine, by ddp and fsdp, against single ones."""
    if not COUNTER.exists():
        report.skip("distributed", f"no {COUNTER} to read the bytes from")
        return
    shape, num_steps = (TOY, 3) if request.quick else (SIX_256, 20)
    for strategy in ("ddp", "fsdp"):
        results = []
        for round_ in range(request.repeats):
            answer = request.work / f"distributed-{strategy}-{round_}.json"
            arguments = {"strategy": strategy, "shape": shape, "num_steps": num_steps, "answer": str(answer)}
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
            run_command_line([*start, "-m", "minitf.benchmark.distributed", json.dumps(arguments)], {}, request.work)
            results.append(json.loads(answer.read_text(encoding="utf-8")))
            report.progress(f"{strategy}, round {round_ + 1}")
        name, first = f"{strategy}, {NUM_PROCESSES} processes", results[0]
        expected = f"counted from the shapes: {first['expected_mb']:.2f} MB; {first['million_weights']:.2f}M weights"
        sent = [r["sent_mb"] for r in results]
        report.add(Row(f"{name}: sent by each, a step", "MB", sent, more_is_better=False, note=expected))
        together, alone = ([r[key] for r in results] for key in ("together_ms", "alone_ms"))
        report.add(
            Row(f"{name}: a step", "ms", together, "on its own", alone, more_is_better=False, raw={"all": results})
        )


def _step_of(group: "ProcessGroup", strategy: str, shape: dict[str, int]) -> "TrainingStep":
    import numpy as np
    import torch

    from minitf.data.batches import Batches
    from minitf.model import ModelConfig, Transformer
    from minitf.optim import OptimConfig
    from minitf.system.hardware import Hardware
    from minitf.training.parallel import Parallel
    from minitf.training.step import TrainingStep

    torch.manual_seed(0)
    config = ModelConfig(**shape)  # type: ignore[arg-type]
    hardware = Hardware(torch.device("cpu"), torch.float32, 0.0, "")
    parallel = Parallel(Transformer(config, VOCABULARY), group, strategy)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=50 * config.context_length * BATCH_SIZE)
    # A single process trains on as many rows as one of several.
    batch_size = BATCH_SIZE * group.size // NUM_PROCESSES
    batches = Batches(tokens.astype(np.uint16), config.context_length, batch_size, 0)
    optimizer = parallel.new_optimizer(OptimConfig(), hardware.dtype)
    return TrainingStep(parallel, optimizer, batches, hardware, 1)


def _median_ms(step: "TrainingStep", group: "ProcessGroup", num_steps: int) -> float:
    times = []
    for index in range(num_steps):
        group.barrier()
        start = time.perf_counter()
        step.run(index, 0.1)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def _sent_bytes() -> int:
    lines = COUNTER.read_text(encoding="utf-8").splitlines()
    return int(next(line.split(":")[1].split()[8] for line in lines if line.strip().startswith("lo:")))


def expected_bytes(strategy: str, num_matrix: int, num_other: int, size: int, width: int = 4) -> float:
    """Bytes that one of P = `size` processes sends per step, for float32 weights and matrix updates of `width` bytes.

    ddp: an all-reduce of the gradients, 2 (P-1)/P of their bytes, and an all-gather of the updates, (P-1)/P. fsdp:
    matrices gathered for forward and backward, other weights once, (P-1)/P each; gradients reduce-scattered; Muon's
    rows sent both ways, 2/P of (P-1)/P. gloo reduce-scatters by an all-reduce, 2 (P-1)/P; nccl needs half of that.
    """
    part = (size - 1) / size
    if strategy == "ddp":
        return part * (2 * 4 * (num_matrix + num_other) + width * num_matrix)
    return part * ((2 + 2) * 4 * num_matrix + (1 + 2) * 4 * num_other + 2 * width * num_matrix / size)


def measure(strategy: str, shape: dict[str, int], num_steps: int, answer: str) -> None:
    """Measure in a process started by torchrun; rank 0 writes `answer`."""
    from minitf.distributed.process_group import SINGLE, process_group
    from minitf.system.threads import set_threads

    with process_group() as group:
        if group.size != NUM_PROCESSES:
            raise MinitfError(f"{group.size} processes were started instead of {NUM_PROCESSES}")
        set_threads(group=group)
        alone, together = _step_of(SINGLE, "single", shape), _step_of(group, strategy, shape)
        for step in (alone, together):
            step.run(0, 0.0)
        alone_ms = _median_ms(alone, group, num_steps)
        group.barrier()
        before = _sent_bytes()
        together_ms = _median_ms(together, group, num_steps)
        group.barrier()
        sent = (_sent_bytes() - before) / num_steps / group.size
        matrices = sum(p.numel() for g in alone.optimizer.optimizers[0].param_groups for p in g["params"])
        others = alone.model.num_parameters() - matrices
        result: dict[str, Any] = {
            "together_ms": together_ms, "alone_ms": alone_ms, "sent_mb": sent / 1e6,
            "expected_mb": expected_bytes(strategy, matrices, others, group.size) / 1e6,
            "million_weights": (matrices + others) / 1e6,
        }  # fmt: skip
        if group.is_main:
            Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    measure(**json.loads(sys.argv[1]))
