"""Hostile input for the loaders, the tokenizer, the configuration and the arguments of generation.

A target takes bytes or text; the only ways out are a result or a MinitfError of one line. Anything else, a hang beyond
`SLOW_S`, or memory beyond `MAX_GROWTH_BYTES`, is a finding: its input is written to a file and its way out shown.
Inputs come from hypothesis, and where atheris is installed from its coverage-guided mutations.
"""

import argparse
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from robustness.targets import NAMES, Targets

from minitf.errors import MinitfError, run_command

SLOW_S = 10.0
MAX_GROWTH_BYTES = 1 << 30
Target = Callable[[bytes], None]


class Watch:
    """Runs a target on an input; keeps what goes wrong."""

    def __init__(self, name: str, target: Target, findings: Path) -> None:
        self.name, self.target, self.findings = name, target, findings
        self.num_inputs = self.num_refused = 0
        self.found: dict[str, bytes] = {}
        self.slowest_s = 0.0
        self.memory = _peak_bytes()

    def __call__(self, data: bytes) -> None:
        started = time.perf_counter()
        self.num_inputs += 1
        try:
            self.target(data)
        except MinitfError as error:
            self.num_refused += 1
            if "\n" in str(error):
                self._note(f"an error of several lines: {str(error)[:200]!r}", data)
        except OSError as error:  # becomes one line in run_command
            if error.errno is None:
                self._note(repr(error)[:200], data)
        except UnicodeError as error:
            if self.name != "tokenizer":
                self._note(_where(error), data)
        except Exception as error:
            self._note(_where(error), data)
        except BaseException as error:  # a panic of a library is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self._note(_where(error), data)
        took = time.perf_counter() - started
        self.slowest_s = max(self.slowest_s, took)
        if took > SLOW_S:
            self._note(f"took {took:.0f} s", data)
        if (grown := _peak_bytes() - self.memory) > MAX_GROWTH_BYTES:
            self._note(f"memory grew by {grown >> 20} MiB", data)
            self.memory = _peak_bytes()

    def _note(self, what: str, data: bytes) -> None:
        if what not in self.found:
            self.found[what] = data
            self.findings.mkdir(parents=True, exist_ok=True)
            path = self.findings / f"{self.name}_{len(self.found)}.bin"
            path.write_bytes(data)
            print(f"{self.name}: {what} ({path})", flush=True)

    def summary(self) -> str:
        grown = max(0, _peak_bytes() - self.memory) >> 20
        return (f"{self.name}: {self.num_inputs:,} inputs, {self.num_refused:,} refused in one line, slowest "
                f"{self.slowest_s:.2f} s, memory grew by {grown} MiB, {len(self.found)} findings")  # fmt: skip


def _where(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "minitf" in frame.filename]
    frame = frames[-1] if frames else None
    place = f"{Path(frame.filename).name}:{frame.lineno}" if frame else "outside"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def with_hypothesis(watch: Watch, num_inputs: int, minutes: float) -> None:
    """So many inputs, or so many minutes, whichever comes first."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    end = time.monotonic() + minutes * 60
    anything = st.one_of(
        st.binary(max_size=300), st.text(max_size=150).map(lambda t: t.encode("utf-8", "surrogatepass"))
    )

    while watch.num_inputs < num_inputs and time.monotonic() < end:  # in rounds: hypothesis itself cannot be stopped

        @settings(max_examples=min(1000, num_inputs - watch.num_inputs), database=None, deadline=None,
                  phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(anything)
        def one(data: bytes) -> None:
            if time.monotonic() < end:
                watch(data)

        one()


def with_atheris(watch: Watch, num_inputs: int, minutes: float) -> None:
    """Mutations guided by the coverage of minitf's own code; ends the process with the summary."""
    import atheris

    end = time.monotonic() + minutes * 60

    def one(data: bytes) -> None:
        watch(data)
        if watch.num_inputs >= num_inputs or time.monotonic() > end:
            print(f"atheris, {watch.summary()}", flush=True)
            sys.stdout.flush()
            import os

            os._exit(1 if watch.found else 0)

    atheris.Setup([sys.argv[0], "-rss_limit_mb=0", "-timeout=60", "-verbosity=0"], one)
    atheris.Fuzz()


def main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/fuzz.py [TARGET ...] [--inputs N] [--minutes M] [--engine hypothesis|atheris]`."""
    parser = argparse.ArgumentParser(description="Hostile input, until something gives way or the time is over.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs for each target at most (default 100000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes for each target at most (default 10)")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where failing inputs are put")
    arguments = parser.parse_args(argv)
    targets = arguments.targets or list(NAMES)
    for name in targets:
        if name not in NAMES:
            raise MinitfError(f"no target {name}: there are {', '.join(NAMES)}")
    if arguments.engine == "atheris":
        if len(targets) != 1:
            raise MinitfError("atheris fuzzes one target a process: name one")
        import atheris  # type: ignore[import-not-found,unused-ignore]

        with atheris.instrument_imports(include=["minitf"]):
            _import_targets()
    import torch

    torch.set_num_threads(1)
    num_found = 0
    with tempfile.TemporaryDirectory() as place:
        made = Targets(Path(place))
        for name in targets:
            watch = Watch(name, getattr(made, name), arguments.findings)
            run = with_atheris if arguments.engine == "atheris" else with_hypothesis
            run(watch, arguments.inputs, arguments.minutes)
            print(watch.summary(), flush=True)
            num_found += len(watch.found)
    return 1 if num_found else 0


def _import_targets() -> None:
    pass


if __name__ == "__main__":
    sys.exit(run_command(main))
