"""Kill a short run with SIGKILL at random moments, resume it each time, and compare it with an undisturbed run.

The parent imports everything once and forks a process for each start, which then does all of `python -m minitf.train`.
Two bytes of shared memory show in which phase the kill came. The moments are random; the verdict is not: at whatever
moment the kills come, the run must end bit for bit like the undisturbed one.
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

from helpers import make_text

from minitf.errors import MinitfError, run_command

PHASES = ("start", "step", "evaluation", "attention", "save", "end")
TRAINING, SAVING = 0, 1  # the two bytes of shared memory: the phase of the training loop, and of the saving thread
CLOCK_KEYS = {"tokens_per_s", "mfu", "train_s", "warmup_s", "elapsed_s"}  # of metrics.jsonl; no two runs agree in them
CLOCK_TAGS = ("speed/", "_hparams_")
MODULES = ("datasets", "torch._dynamo", "torch.utils.tensorboard", "minitf.train", "minitf.runs.resume")
SETTINGS = [
    "data=text", "data.files=[text.txt]", "data.cache_dir=cache", "tokenizer=byte", "model.num_layers=2",
    "model.hidden_size=32", "model.num_heads=2", "model.context_length=32", "model.dropout=0.1", "trainer.batch_size=4",
    "trainer.max_steps=300", "trainer.log_every=5", "trainer.eval_every=30", "trainer.save_every=10",
    "trainer.attention_every=100", "trainer.sample_tokens=8", "trainer.device=cpu", "trainer.precision=fp32",
    "trainer.compile=false", "trainer.eval_tokens=20000",
]  # fmt: skip


class Processes:
    """Forks training processes that work in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.phase = mmap.mmap(-1, 2)
        self.longest_s = 2.0  # of an undisturbed run
        (directory / "text.txt").write_text(make_text(800), encoding="utf-8")
        for module in MODULES:  # nothing is computed before the first fork: a fork would lose the threads
            importlib.import_module(module)

    def start(self, arguments: Sequence[str]) -> int:
        """Id of a new process; it appends its output to the file `log`."""
        self.phase[TRAINING] = self.phase[SAVING] = PHASES.index("start")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = self._train(arguments)
            finally:
                os._exit(status)
        return pid

    def _train(self, arguments: Sequence[str]) -> int:
        os.chdir(self.directory)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        import torch

        from minitf.checkpoints import background_save
        from minitf.train import main as train
        from minitf.training.actions import Evaluate, LogAttention, SaveCheckpoint
        from minitf.training.trainer import Trainer

        torch.set_num_threads(1)
        for owner, name, phase in (
            (Trainer, "train_one_step", "step"), (Evaluate, "__call__", "evaluation"),
            (LogAttention, "__call__", "attention"), (SaveCheckpoint, "__call__", "save"),
            (background_save, "save_checkpoint", "save"),
        ):  # fmt: skip
            byte = SAVING if owner is background_save else TRAINING
            setattr(owner, name, self._announcing(getattr(owner, name), byte, phase))
        return run_command(lambda: train(list(arguments)))

    def _announcing(self, function: Callable[..., Any], byte: int, phase: str) -> Callable[..., Any]:
        """`function`, which sets the shared byte while it runs."""

        def call(*arguments: Any, **named: Any) -> Any:
            self.phase[byte] = PHASES.index(phase)
            try:
                return function(*arguments, **named)
            finally:
                self.phase[byte] = PHASES.index("start" if byte == SAVING else "end")

        return call

    def undisturbed(self, name: str) -> Path:
        """Directory of a run that nobody kills."""
        started = time.monotonic()
        _, status = os.waitpid(self.start([*SETTINGS, f"run_dir=runs/{name}/one"]), 0)
        self.longest_s = time.monotonic() - started
        if status:
            raise MinitfError(f"the undisturbed run failed: see {self.directory / 'log'}")
        return self.directory / f"runs/{name}/one"

    def kill(self, pid: int, rng: random.Random) -> bool:
        """Kill a process at a random moment, half the time within a chosen phase; False if it ended before."""
        if rng.random() < 0.5:
            self._wait_for(PHASES.index(rng.choice(PHASES[1:5])), pid, num_skipped=rng.randrange(3))
            delay_s = rng.uniform(0, 0.01)
        else:
            delay_s = rng.uniform(0, self.longest_s)
        time.sleep(delay_s)
        if _has_ended(pid):
            return False
        os.kill(pid, signal.SIGKILL)
        return True

    def _wait_for(self, phase: int, pid: int, num_skipped: int) -> None:
        """Wait until this phase begins, after `num_skipped` times that it is let pass, or the process ends."""
        byte = SAVING if phase == PHASES.index("save") else TRAINING
        before = None
        while not _has_ended(pid):
            now = self.phase[byte]
            if now == phase and before != phase:
                if num_skipped == 0:
                    return
                num_skipped -= 1
            before = now
            time.sleep(0.0002)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_until_done(processes: Processes, name: str, rng: random.Random, max_kills: int) -> tuple[Path, Counter[str]]:
    """One run, killed at most `max_kills` times and resumed each time; its directory, and the kills by phase."""
    run_dir = processes.directory / f"runs/{name}/one"
    kills: Counter[str] = Counter()
    while True:
        was_finished = _is_finished(run_dir)
        # There are other runs in the directory: `latest` has to mean this one.
        resume = (run_dir / "config.yaml").exists()
        pid = processes.start(["resume=latest"] if resume else [*SETTINGS, f"run_dir=runs/{name}/one"])
        if kills.total() < max_kills and processes.kill(pid, rng):
            kills[PHASES[processes.phase[SAVING] or processes.phase[TRAINING]]] += 1
            os.waitpid(pid, 0)
            continue
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0 or (code == 2 and was_finished):  # 2: a finished run is not resumed
            return run_dir, kills
        log = processes.directory / "log"
        raise MinitfError(f"run {name}: a process ended with {code} after {kills.total()} kills: see {log}")


def _is_finished(run_dir: Path) -> bool:
    """Whether the last kill came after everything was written."""
    path = run_dir / "decisions.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def differences(run: Path, expected: Path) -> list[str]:
    """The files in which two runs differ, apart from times: tensors, rows, TensorBoard's records, maps."""
    import torch
    from safetensors.torch import load_file

    differing = []
    for name in ("model.safetensors", "trainer_state.safetensors"):
        for link in ("latest", "best"):
            left, right = (load_file(path / "checkpoints" / link / name) for path in (run, expected))
            if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
                differing.append(f"{link}/{name}")
    for name in ("metrics.jsonl", "attention.jsonl"):
        if _rows(run / name) != _rows(expected / name):
            differing.append(name)
    if _events(run) != _events(expected):
        differing.append("TensorBoard's events")
    if not (run / "attention.html").is_file():
        differing.append("attention.html")
    return differing


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in rows]


def _events(run: Path) -> list[tuple[int, str, str]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return sorted(  # scalars by value, maps and pictures by size: a compressed map holds the time of its compression
        (event.step, value.tag, f"{list(value.tensor.float_val)} {value.tensor.ByteSize()}")
        for path in run.rglob("events.out.tfevents.*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if not value.tag.startswith(CLOCK_TAGS)
    )


def crash_test(num_kills: int, seed: int, directory: Path, max_kills_of_a_run: int = 25) -> int:
    """`num_kills` kills in as many runs as they take, each run compared; the exit status."""
    processes = Processes(directory)
    expected = processes.undisturbed("undisturbed")
    if unequal := differences(processes.undisturbed("again"), expected):
        raise MinitfError(f"two undisturbed runs differ in {', '.join(unequal)}: nothing can be compared")
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    num_failed = num_runs = 0
    started = time.monotonic()
    while total.total() < num_kills:
        num_runs += 1
        max_kills = min(max_kills_of_a_run, num_kills - total.total())
        run, kills = kill_until_done(processes, f"killed_{num_runs}", rng, max_kills)
        total += kills
        wrong = differences(run, expected)
        num_failed += bool(wrong)
        verdict = f"differs in {', '.join(wrong)}" if wrong else "the same"
        print(f"run {num_runs}: {_counts(kills)}: {verdict}", flush=True)
        if not wrong:
            shutil.rmtree(run)
    print(f"{_counts(total)} in {num_runs} runs, {time.monotonic() - started:.0f} s: "
          f"{num_runs - num_failed} of {num_runs} runs ended like the undisturbed one")  # fmt: skip
    return 1 if num_failed else 0


def _counts(kills: Counter[str]) -> str:
    phases = ", ".join(f"{name} {kills[name]}" for name in PHASES if kills[name])
    return f"{kills.total()} kills ({phases})"


def main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/crash_test.py [--kills 200] [--seed 0] [--directory DIR]`."""
    parser = argparse.ArgumentParser(description="Kill a short run at random moments and resume it, again and again.")
    parser.add_argument("--kills", type=int, default=200, help="number of kills (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument("--directory", type=Path, help="of the runs, which then stay (default: a temporary one)")
    arguments = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        raise MinitfError("this needs fork, which this system does not have")
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        return crash_test(arguments.kills, arguments.seed, arguments.directory.resolve())
    with tempfile.TemporaryDirectory() as directory:
        return crash_test(arguments.kills, arguments.seed, Path(directory))


if __name__ == "__main__":
    sys.exit(run_command(main))
