"""Kill a short run with SIGKILL at random moments, resume it each time, and compare what it leaves with one left alone.

The process that kills imports everything once and forks a child for each life, which then goes the whole way of
`python -m minitf.train`. A byte shared with the child tells in which part of its life the kill found it.
"""

import argparse
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitf.errors import MinitfError, run_command

PHASES = ("start", "step", "evaluation", "look", "save", "end")
TIMES = {"tokens_per_s", "mfu", "train_s", "warmup_s", "elapsed_s"}  # of the machine's clock: never twice the same
SETTINGS = [
    "data=text", "data.files=[text.txt]", "data.cache_dir=cache", "tokenizer=byte", "model.num_layers=2",
    "model.hidden_size=32", "model.num_heads=2", "model.context_length=32", "model.dropout=0.1", "trainer.batch_size=4",
    "trainer.max_steps=300", "trainer.log_every=5", "trainer.eval_every=30", "trainer.save_every=10",
    "trainer.attention_every=100", "trainer.sample_tokens=8", "trainer.device=cpu", "trainer.precision=fp32",
    "trainer.compile=false", "trainer.eval_tokens=20000",
]  # fmt: skip


class Lives:
    """Forks lives of runs in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.phase = mmap.mmap(-1, 2)  # of the training, and of the thread that saves
        words = random.Random(0)
        sentences = (f"The {words.choice(['cat', 'dog', 'owl'])} sat on the {words.choice(['mat', 'roof'])}.\n"
                     for _ in range(800))  # fmt: skip
        (directory / "text.txt").write_text("".join(sentences), encoding="utf-8")
        _import_everything()
        self.longest_s = 2.0  # of a life left alone

    def start(self, arguments: Sequence[str]) -> int:
        """The process of a new life; its output goes to the file `log`."""
        self.phase[0] = self.phase[1] = 0
        pid = os.fork()
        if pid == 0:
            try:
                status = self._live(arguments)
            finally:
                os._exit(1 if "status" not in locals() else status)
        return pid

    def _live(self, arguments: Sequence[str]) -> int:
        os.chdir(self.directory)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        import torch

        from minitf.checkpoints import background_save as saving
        from minitf.train import main as train
        from minitf.training.actions import Evaluate, LogAttention, SaveCheckpoint
        from minitf.training.trainer import Trainer

        torch.set_num_threads(1)
        for owner, name, phase in (
            (Trainer, "train_one_step", "step"), (Evaluate, "__call__", "evaluation"),
            (LogAttention, "__call__", "look"), (SaveCheckpoint, "__call__", "save"),
            (saving, "save_checkpoint", "save"),
        ):  # fmt: skip
            place = int(owner is saving)
            setattr(owner, name, self._telling(getattr(owner, name), place, PHASES.index(phase)))
        return run_command(lambda: train(list(arguments)))

    def _telling(self, function: Callable[..., Any], place: int, phase: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.phase[place] = phase
            try:
                return function(*arguments, **named)
            finally:
                self.phase[place] = 0 if place else PHASES.index("end")

        return call

    def whole(self, name: str) -> Path:
        """A run left alone."""
        started = time.monotonic()
        _, status = os.waitpid(self.start([*SETTINGS, f"run_dir=runs/{name}/one"]), 0)
        self.longest_s = time.monotonic() - started
        if status:
            raise MinitfError(f"the undisturbed run failed: see {self.directory / 'log'}")
        return self.directory / f"runs/{name}/one"


def kill_until_done(lives: Lives, name: str, chance: random.Random, most: int) -> tuple[Path, Counter[str]]:
    """One run, killed again and again, at most `most` times; and in which parts of its lives that was."""
    run_dir = lives.directory / f"runs/{name}/one"
    found: Counter[str] = Counter()
    while True:
        begun, was_finished = (run_dir / "config.yaml").exists(), _finished(run_dir)
        # Other runs lie beside it: `latest` must be this one.
        pid = lives.start(["resume=latest"] if begun else [*SETTINGS, f"run_dir=runs/{name}/one"])
        if found.total() < most and _kill(lives, pid, chance):
            found[PHASES[lives.phase[1] or lives.phase[0]]] += 1
            os.waitpid(pid, 0)
            continue
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and (os.WEXITSTATUS(status) == 0 or (was_finished and os.WEXITSTATUS(status) == 2)):
            return run_dir, found
        if found.total() < most and os.WIFSIGNALED(status):
            continue
        raise MinitfError(
            f"run {name}: a life ended with {status} after {found.total()} kills: see {lives.directory / 'log'}"
        )


def _finished(run_dir: Path) -> bool:
    """Whether the last kill came when all was written: then there is nothing to resume, and minitf says so."""
    path = run_dir / "decisions.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def _kill(lives: Lives, pid: int, chance: random.Random) -> bool:
    """Kill a life at a random moment, half the time one within a certain part of it; False if it ended before."""
    aimed = PHASES.index(chance.choice(PHASES[1:5])) if chance.random() < 0.5 else None
    delay = chance.uniform(0, 0.01) if aimed else chance.uniform(0, lives.longest_s)
    skipped = chance.randrange(3)  # of the moments in which that part begins
    place = int(aimed == PHASES.index("save"))
    deadline, before = time.monotonic() + 10, 0
    while aimed is not None and time.monotonic() < deadline:
        now = lives.phase[place]
        if now == aimed and before != aimed:
            if skipped == 0:
                break
            skipped -= 1
        before = now
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0002)
    time.sleep(delay)
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def differences(run: Path, expected: Path) -> list[str]:
    """What of two runs' traces is not the same, times apart: tensors, rows, TensorBoard's records, maps."""
    import torch
    from safetensors.torch import load_file

    found = []
    for name in ("model.safetensors", "trainer_state.safetensors"):
        for link in ("latest", "best"):
            left, right = (load_file(path / "checkpoints" / link / name) for path in (run, expected))
            if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
                found.append(f"{link}/{name}")
    for name, read in (("metrics.jsonl", _rows), ("attention.jsonl", _rows), ("TensorBoard's events", _events)):
        path = name if name.endswith("jsonl") else ""
        if read(run / path) != read(expected / path):
            found.append(name)
    if not (run / "attention.html").is_file():
        found.append("attention.html")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def _events(run: Path) -> list[tuple[int, str, str]]:
    from tensorboard.compat.proto.event_pb2 import Event

    from minitf.reporting.tensorboard import EVENT_FILES, event_records

    found = []
    for path in run.glob(EVENT_FILES):
        for record in event_records(path.read_bytes()):
            event = Event.FromString(record[12:-4])
            for value in event.summary.value:
                if not value.tag.startswith(("perf/", "_hparams_", "final/")):
                    found.append((event.step, value.tag, f"{value.simple_value}{value.image.ByteSize()}"))
    return sorted(found)


def _import_everything() -> None:
    """Once, before the first fork; nothing is computed here, so no thread is started that a fork would lose."""
    modules = (
        "datasets",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "minitf.config.schema",
        "minitf.reporting.reporter",
        "minitf.train",
        "minitf.runs.start",
        "minitf.runs.resume",
    )
    for module in (*modules, "minitf.training.trainer"):
        importlib.import_module(module)


def torture(kills: int, seed: int, directory: Path, runs_kills: int = 25) -> int:
    """`kills` kills in as many runs as that takes, each compared; returns the exit status."""
    lives = Lives(directory)
    expected = lives.whole("undisturbed")
    again = differences(lives.whole("again"), expected)
    if again:
        raise MinitfError(f"two undisturbed runs differ in {', '.join(again)}: nothing can be compared on this machine")
    chance = random.Random(seed)
    total: Counter[str] = Counter()
    failed = number = 0
    started = time.monotonic()
    while total.total() < kills:
        number += 1
        most = min(runs_kills, kills - total.total())
        run, found = kill_until_done(lives, f"killed_{number}", chance, most)
        total += found
        wrong = differences(run, expected)
        failed += bool(wrong)
        print(f"run {number}: {found.total()} kills ({_counts(found)}): "
              f"{'differs in ' + ', '.join(wrong) if wrong else 'the same'}", flush=True)  # fmt: skip
        if not wrong:
            shutil.rmtree(run)
    print(f"{total.total()} kills in {number} runs ({_counts(total)}), {time.monotonic() - started:.0f} s: "
          f"{number - failed} of {number} runs ended like the undisturbed one")  # fmt: skip
    return 1 if failed else 0


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in PHASES if found[name])


def main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/crash_test.py [--kills 200] [--seed 0]`."""
    parser = argparse.ArgumentParser(description="Kill a short run at random moments and resume it, again and again.")
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--directory", type=Path, help="where the runs are made and left (default: removed afterwards)")
    arguments = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        raise MinitfError("this needs fork, which this system does not have")
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        return torture(arguments.kills, arguments.seed, arguments.directory.resolve())
    with tempfile.TemporaryDirectory() as place:
        return torture(arguments.kills, arguments.seed, Path(place))


if __name__ == "__main__":
    sys.exit(run_command(main))
