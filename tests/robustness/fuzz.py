"""Hostile input for the loaders, the tokenizer, the configuration and the arguments of generation.

A target takes bytes and ends with a result or a MinitfError of one line. Anything else is a finding: another exception,
memory that grows beyond `MAX_GROWTH_BYTES`, or, where a limit is set, more processor time than that. The input of a
finding is written to a file. Inputs come from hypothesis, or from the coverage-guided mutations of atheris.
"""

import argparse
import importlib
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from robustness.targets import IMPORTED, NAMES, Targets

from minitf.errors import MinitfError, run_command

MAX_GROWTH_BYTES = 1 << 30
Target = Callable[[bytes], None]


class Watch:
    """Runs a target on inputs and records findings. `max_s` is the processor time allowed for one input."""

    def __init__(self, name: str, target: Target, findings: Path, max_s: float | None = None) -> None:
        self.name, self.target, self.findings, self.max_s = name, target, findings, max_s
        self.num_inputs = self.num_refused = 0
        self.found: dict[str, bytes] = {}
        self.slowest_s = 0.0
        self.peak_bytes = _peak_bytes()

    def __call__(self, data: bytes) -> None:
        self.num_inputs += 1
        started = time.process_time()
        problem = self._problem_with(data)
        took_s = time.process_time() - started
        self.slowest_s = max(self.slowest_s, took_s)
        if problem is not None:
            self._record(problem, data)
        if self.max_s is not None and took_s > self.max_s:
            self._record(f"took {took_s:.0f} s", data)
        if (grown := _peak_bytes() - self.peak_bytes) > MAX_GROWTH_BYTES:
            self._record(f"memory grew by {grown >> 20} MiB", data)
            self.peak_bytes = _peak_bytes()

    def _problem_with(self, data: bytes) -> str | None:
        try:
            self.target(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except MinitfError as error:
            self.num_refused += 1
            return f"an error of several lines: {str(error)[:200]!r}" if "\n" in str(error) else None
        except OSError as error:  # run_command prints it as one line
            return None if error.errno is not None else repr(error)[:200]
        except UnicodeError as error:  # text with lone surrogates cannot be encoded
            return None if self.name == "tokenizer" else _location(error)
        except BaseException as error:  # a panic in a Rust library is no Exception
            return _location(error)
        return None

    def _record(self, problem: str, data: bytes) -> None:
        if problem in self.found:
            return
        self.found[problem] = data
        self.findings.mkdir(parents=True, exist_ok=True)
        path = self.findings / f"{self.name}_{len(self.found)}.bin"
        path.write_bytes(data)
        print(f"{self.name}: {problem} ({path})", flush=True)

    def summary(self) -> str:
        grown = max(0, _peak_bytes() - self.peak_bytes) >> 20
        counts = f"{self.num_inputs:,} inputs, {self.num_refused:,} refused in one line"
        costs = f"slowest {self.slowest_s:.2f} s, memory grew by {grown} MiB"
        return f"{self.name}: {counts}, {costs}, {len(self.found)} findings"


def _location(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "minitf" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "a library"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def with_hypothesis(watch: Watch, num_inputs: int, minutes: float = float("inf"), repeatable: bool = False) -> None:
    """Run `num_inputs` inputs, fewer if the minutes are over. `repeatable`: the same inputs every time."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    end = time.monotonic() + minutes * 60
    text = st.text(max_size=150).map(lambda text: text.encode("utf-8", "surrogatepass"))

    while watch.num_inputs < num_inputs and time.monotonic() < end:  # rounds: hypothesis itself cannot be stopped

        @settings(
            max_examples=min(1000, num_inputs - watch.num_inputs),
            database=None,
            deadline=None,
            derandomize=repeatable,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(st.binary(max_size=300), text))
        def one(data: bytes) -> None:
            if time.monotonic() < end:
                watch(data)

        one()


def with_atheris(watch: Watch, num_inputs: int, minutes: float) -> None:
    """Mutations guided by the coverage of minitf's code. Ends the process: libFuzzer does not return."""
    import atheris

    end = time.monotonic() + minutes * 60

    def one(data: bytes) -> None:
        watch(data)
        if watch.num_inputs >= num_inputs or time.monotonic() > end:
            print(f"atheris, {watch.summary()}", flush=True)
            os._exit(1 if watch.found else 0)

    atheris.Setup([sys.argv[0], "-rss_limit_mb=0", "-timeout=60", "-verbosity=0"], one)
    atheris.Fuzz()


def instrument() -> None:
    """Import the modules under test so that atheris sees which of their branches an input takes."""
    import atheris

    with atheris.instrument_imports(include=["minitf"]):
        for module in IMPORTED:
            importlib.import_module(module)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run hostile input until a limit is reached, and keep what fails.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="most inputs for each target (default 100000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="most minutes for each target (default 10)")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="processor time for one input (default 10)")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where failing inputs are written")
    arguments = parser.parse_args(argv)
    arguments.targets = arguments.targets or list(NAMES)
    if unknown := set(arguments.targets) - set(NAMES):
        raise MinitfError(f"no target {min(unknown)}: there are {', '.join(NAMES)}")
    if arguments.engine == "atheris" and len(arguments.targets) != 1:
        raise MinitfError("atheris fuzzes one target per process: name one")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/fuzz.py [TARGET ...] [--inputs N] [--minutes M] [--engine hypothesis|atheris]`."""
    arguments = parse(argv)
    if arguments.engine == "atheris":
        instrument()
    import torch

    torch.set_num_threads(1)
    num_found = 0
    with tempfile.TemporaryDirectory() as directory:
        targets = Targets(Path(directory))
        for name in arguments.targets:
            watch = Watch(name, getattr(targets, name), arguments.findings, arguments.max_seconds)
            run = with_atheris if arguments.engine == "atheris" else with_hypothesis
            run(watch, arguments.inputs, arguments.minutes)
            print(watch.summary(), flush=True)
            num_found += len(watch.found)
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
