"""The command `scripts/benchmark.py`: measure, print a table, write JSON and plots."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from minitf.benchmark.curves import corpus, curves, logging, precision
from minitf.benchmark.distributed import distributed
from minitf.benchmark.generation import generation
from minitf.benchmark.gpu import gpu
from minitf.benchmark.machine import environment, machine
from minitf.benchmark.memory import memory
from minitf.benchmark.report import Report, Request, write_json
from minitf.benchmark.saving import saving
from minitf.benchmark.shakespeare import quality, shakespeare
from minitf.benchmark.training import step, throughput
from minitf.benchmark.viewer import viewer
from minitf.errors import MinitfError, RequestError, run_command


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: what it measures, and its minutes on two cores, fixed and per repeat."""

    run: Callable[[Request, Report], None]
    measures: str
    fixed_minutes: float
    repeat_minutes: float
    usual: bool = False  # runs if no name is given

    def minutes(self, request: Request) -> float:
        return self.fixed_minutes + self.repeat_minutes * request.repeats


BENCHMARKS = {
    "machine": Benchmark(machine, "matrix product peak in fp32 and bf16, memory bandwidth, threads", 0, 0.1, True),
    "step": Benchmark(step, "milliseconds of each part of a training step against its lower bounds", 0, 0.9, True),
    "throughput": Benchmark(throughput, "training tokens/s against nanoGPT and the HF Trainer, 6 x 256", 0, 1.5, True),
    "shakespeare": Benchmark(shakespeare, "seconds to nanoGPT's loss, against its CPU recipe (--text)", 2, 2, True),
    "generation": Benchmark(generation, "greedy tokens/s against transformers generate and llama.cpp", 1, 0.6, True),
    "memory": Benchmark(memory, "peak memory: loss without all logits, activation checkpointing", 0, 1, True),
    "precision": Benchmark(precision, "bf16 against fp32 curves of one seed; the same seed twice", 5, 0),
    "logging": Benchmark(logging, "the training loop with and without maps, head scores and samples", 4, 7),
    "saving": Benchmark(saving, "how long training waits for checkpoints: default run and 124M weights", 0, 8),
    "quality": Benchmark(quality, "held-out metrics of the default run and the _best experiments, over --seeds", 70, 0),
    "curves": Benchmark(curves, "tokens/s and memory against width, depth and context", 0, 5),
    "corpus": Benchmark(corpus, "tokenizing and training against the size of the text (--corpus-mb)", 2, 1),
    "distributed": Benchmark(distributed, "bytes and milliseconds of communication between two processes", 0, 0.5),
    "viewer": Benchmark(viewer, "in Chromium: page and tab, events until painted, positions, first page", 2, 1),
    "gpu": Benchmark(gpu, "on CUDA: GPT-2's step against nanoGPT compiled, decoding against bandwidth", 1, 3),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Measure minitf on this machine, side by side with other programs as far as they are installed or "
        "given; the others are skipped with a line. Each comparison alternates between both sides and reports the "
        "median of the ratios with its spread.",
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="what to measure (see --list); default: those with a *")
    p.add_argument("--list", action="store_true", help="list the benchmarks and how long they take")
    p.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT to compare with")
    p.add_argument("--text", type=Path, metavar="FILE", help="the text of shakespeare (and of throughput)")
    p.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of both sides (default: 3)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of quality (default: 3)")
    p.add_argument("--steps", type=int, metavar="N", help="minitf's steps in shakespeare (default: the fewest needed)")
    p.add_argument("--corpus-mb", default="1,10,100", metavar="MB,...", help="sizes of corpus (default: 1,10,100)")
    p.add_argument("--out", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="for the JSON and plots")
    p.add_argument("--work", type=Path, metavar="DIR", help="for texts and runs (default: temporary)")
    p.add_argument("--quick", action="store_true", help="toy sizes: a test run whose numbers mean nothing")
    return p


def request_of(args: argparse.Namespace, work: Path) -> Request:
    """The validated request; RequestError if it is invalid."""
    if args.repeats < 1 or args.seeds < 1:
        raise RequestError(f"--repeats {args.repeats} and --seeds {args.seeds} must be at least 1")
    if args.steps is not None and args.steps < 1:
        raise RequestError(f"--steps {args.steps} must be at least 1")
    if args.text is not None and not args.text.is_file():
        raise RequestError(f"--text {args.text}: no such file")
    if args.nanogpt is not None and not args.nanogpt.is_dir():
        raise RequestError(f"--nanogpt {args.nanogpt}: no such directory")
    try:
        sizes = tuple(int(size) for size in args.corpus_mb.split(","))
    except ValueError:
        raise RequestError(f"--corpus-mb {args.corpus_mb} must be whole numbers, like 1,10,100") from None
    if min(sizes) < 1:
        raise RequestError(f"--corpus-mb {args.corpus_mb} must be at least 1")
    nanogpt, text = (path.resolve() if path else None for path in (args.nanogpt, args.text))
    numbers = {name: getattr(args, name) for name in ("repeats", "seeds", "quick", "steps")}
    return Request(work.resolve(), args.out.resolve(), nanogpt, text, corpus_mb=sizes, **numbers)


def listing(request: Request) -> str:
    """The benchmarks and how long they take."""
    lines = [f"{'':14}{'minutes':>7}  (with --repeats {request.repeats}; * runs when no name is given)"]
    for name, benchmark in BENCHMARKS.items():
        star = "*" if benchmark.usual else " "
        lines.append(f"{star} {name:<12}{benchmark.minutes(request):>7.1f}  {benchmark.measures}")
    return "\n".join(lines)


def measure(names: Sequence[str], request: Request, path: Path) -> list[str]:
    """Run benchmarks one after the other, writing `path` after each; returns the names of those that failed."""
    about, reports, failed = environment(), [], []
    for name in names:
        report, start = Report(name), time.perf_counter()
        reports.append(report)
        print(f"{name}: {BENCHMARKS[name].measures}")
        try:
            BENCHMARKS[name].run(request, report)
        except MinitfError as error:
            failed.append(name)
            report.skipped.append(f"failed: {error}")
        finally:
            report.seconds = time.perf_counter() - start
            write_json(path, {**about, "arguments": sys.argv[1:]}, reports)
        print(f"{report.table()}\n", flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """The command `benchmark`: 0 if everything was measured or skipped, 1 if something failed."""
    args = parser().parse_args(argv)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        raise RequestError(f"{unknown[0]}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    with tempfile.TemporaryDirectory(prefix="minitf-benchmark-") as temporary:
        request = request_of(args, args.work or Path(temporary))
        if args.list:
            print(listing(request))
            return 0
        # SIGTERM cleans up like Ctrl-C: it ends the children and removes temporary files.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        request.work.mkdir(parents=True, exist_ok=True)
        names = args.names or [name for name, benchmark in BENCHMARKS.items() if benchmark.usual]
        minutes = sum(BENCHMARKS[name].minutes(request) for name in names)
        print(f"{', '.join(names)}: about {minutes:.0f} minutes on two cores; keep the machine quiet", file=sys.stderr)
        path = request.out / f"{datetime.now():%Y-%m-%d_%H-%M-%S}.json"
        failed = measure(names, request, path)
        print(f"all samples: {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
