"""Training with several processes on the CPU equals training with one: losses, checkpoints, failures, restarts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers import not_applicable, train_here
from safetensors.torch import load_file
from torch import Tensor

from minitf.backends.cpu import bindings as calls
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.distributed.process_group import SINGLE, ProcessGroup, process_group
from minitf.errors import RequestError, Unavailable
from minitf.optim import orthogonalise
from minitf.system.hardware import PRECISIONS
from minitf.training.parallel import choose_strategy

# Sums in another order: float32 rounds them differently in the seventh digit, and training enlarges that (3e-5 seen).
TOLERANCE = 1e-4


def torchrun(
    num: int, *arguments: str, options: tuple[str, ...] = (), program: str = ""
) -> subprocess.CompletedProcess[str]:
    """Train with `num` processes; `program` is Python code that each of them runs first, to cause failures."""
    return subprocess.run(
        command(num, *arguments, options=options, program=program), capture_output=True, text=True, timeout=900
    )


def command(num: int, *arguments: str, options: tuple[str, ...] = (), program: str = "") -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}", *options]
    if not program:
        return [*start, "-m", "minitf.train", *arguments]
    Path("program.py").write_text(
        "import os, sys, signal\nfrom minitf.errors import MinitfError, run_command\n"
        "from minitf.train import main\nfrom minitf.training.trainer import Trainer\n"
        f"{program}\nraise SystemExit(run_command(main))\n",
        encoding="utf-8",
    )
    return [*start, "program.py", *arguments]


# Rank {rank} runs {do} before the step after {at}.
FAULT = """
step = Trainer.train_one_step
def broken(self):
    if self.state.step == {at} and self.group.rank == {rank} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {do}
    step(self)
Trainer.train_one_step = broken
"""


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_losses(run: str, expected: str) -> None:
    assert [(row["step"], row["split"]) for row in rows(run)] == [(row["step"], row["split"]) for row in rows(expected)]
    for found, wanted in zip(rows(run), rows(expected), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=TOLERANCE)
        assert found["tokens"] == wanted["tokens"]
        if "grad_norm" in wanted:
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        else:
            assert found["num_tokens"] == wanted["num_tokens"]


def our_lines(stderr: str) -> list[str]:
    """minitf's own error messages, without those of torchrun."""
    return [line for line in stderr.splitlines() if line.startswith("minitf: ")]


@pytest.fixture
def small(tiny: list[str]) -> list[str]:
    return [*tiny, "trainer.batch_size=8"]


# The same training


@pytest.mark.machines
@pytest.mark.parametrize(("strategy", "num"), [("auto", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)])
def test_several_processes_train_like_one(workdir: Path, small: list[str], strategy: str, num: int) -> None:
    """Losses, gradient norms and held-out losses with gradient accumulation, and the resulting checkpoint."""
    small += ["trainer.grad_accumulation=2", "trainer.attention_every=3", "trainer.sample_tokens=4"]
    assert train_here(*small, "run_dir=one") == 0
    done = torchrun(num, *small, "run_dir=several", f"trainer.strategy={strategy}", "trainer.micro_batch_size=3")
    assert done.returncode == 0, done.stderr
    assert f"{min(3, 8 // num)} sequences at a time" in done.stderr
    assert_same_losses("several", "one")
    expected = load_file("one/checkpoints/latest/model.safetensors")
    found = load_file("several/checkpoints/latest/model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-4), name
    assert load_checkpoint("several").model.config == load_checkpoint("one").model.config
    # Rank 0 alone prints and writes, the same as a single process.
    assert done.stderr.count("text       ") == done.stderr.count("held-out   ") == 1
    kind = "ddp" if strategy == "auto" else strategy
    share = 8 // num
    assert f"{num} processes by {kind}, {share} of the batch's 8 sequences each, 1 CPU thread" in done.stderr
    assert "Warning" not in done.stderr.replace("OMP_NUM_THREADS", "")
    left = {path.name.split(".")[0] for path in Path("several").iterdir()}
    assert left == {path.name.split(".")[0] for path in Path("one").iterdir()}
    assert not list(Path("several/checkpoints").glob(".*"))


@pytest.mark.machines
def test_several_processes_measure_references_like_one(workdir: Path) -> None:
    settings = ["experiment=pronouns", "trainer.max_steps=2", "trainer.precision=fp32", "trainer.compile=false"]
    settings.append("attention.watch=['The cat followed the queen. It purred. | It>cat']")
    assert train_here(*settings, "run_dir=one") == 0
    done = torchrun(2, *settings, "run_dir=several", "trainer.strategy=fsdp")
    assert done.returncode == 0, done.stderr
    found, expected = (
        [row for row in rows(run) if row["split"] in ("reference", "watch")] for run in ("several", "one")
    )
    assert [row["split"] for row in expected] == ["reference", "watch"] * 3  # at steps 0, 1 and 2
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, abs=0.01) if isinstance(value, float) else value), key


@pytest.mark.machines
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compilation_and_activation_checkpointing_give_the_same_losses(
    workdir: Path, small: list[str], strategy: str
) -> None:
    small = [*small, "trainer.activation_checkpointing=true", "trainer.max_steps=3"]
    assert train_here(*small, "run_dir=one") == 0
    done = torchrun(2, *small, "run_dir=two", f"trainer.strategy={strategy}", "trainer.compile=true")
    assert done.returncode == 0, done.stderr
    assert "backend    torch.compile, a step takes" in done.stderr
    assert_same_losses("two", "one")


@pytest.mark.backends
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("ddp", "bf16"), ("fsdp", "bf16"), pytest.param("ddp", "fp32", marks=pytest.mark.machines)],
)
def test_c_kernels_train_in_several_processes(workdir: Path, small: list[str], strategy: str, precision: str) -> None:
    try:
        calls.library(PRECISIONS[precision])
    except Unavailable as reason:
        not_applicable(str(reason))
    small = [*small, f"trainer.precision={precision}", "trainer.compile=native", "trainer.max_steps=3"]
    assert train_here(*small, "run_dir=one") == 0
    done = torchrun(2, *small, "run_dir=two", f"trainer.strategy={strategy}")
    assert done.returncode == 0, done.stderr
    assert "C kernels" in done.stderr
    # FSDP rounds the gradients to bf16, like the weights it gathers.
    near = {"fp32": TOLERANCE, "bf16": 0.005 if strategy == "ddp" else 0.02}[precision]
    assert [row["loss"] for row in rows("two")] == pytest.approx([row["loss"] for row in rows("one")], abs=near)


def test_one_process_is_single_for_any_strategy() -> None:
    for name in ("auto", "single", "ddp", "fsdp"):
        assert choose_strategy(name, SINGLE) == "single"
    assert choose_strategy("auto", ProcessGroup(0, 2)) == "ddp"
    with pytest.raises(RequestError, match=r"trainer\.strategy=single"):
        choose_strategy("single", ProcessGroup(0, 2))


# Resuming


@pytest.mark.machines
@pytest.mark.slow
def test_shards_resume_with_any_number_of_processes(workdir: Path, small: list[str]) -> None:
    """Half a run by two processes with fsdp, resumed by one, by four, and by two with ddp."""
    assert train_here(*small, "run_dir=whole", "trainer.max_steps=12") == 0
    halves = ["trainer.max_steps=12", "run_dir=half", "trainer.strategy=fsdp"]
    stop = FAULT.format(at=5, rank=1, do="self.interrupted = True")
    done = torchrun(2, *small, *halves, program=stop)
    assert done.returncode == 0, done.stderr
    checkpoint = Path("half/checkpoints/latest")
    assert len(list((checkpoint / "shards").iterdir())) == 2
    for file in checkpoint.rglob("*"):  # nothing but JSON, safetensors and the card
        assert file.is_dir() or file.suffix in (".json", ".safetensors", ".md"), file
        assert file.is_dir() or file.read_bytes()[:2] != b"\x80\x02"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] == 6
    for name, num, strategy in (("by_one", 1, "fsdp"), ("by_four", 4, "fsdp"), ("by_ddp", 2, "ddp")):
        subprocess.run(["cp", "-r", "half", name], check=True)
        arguments = [f"resume={name}", f"trainer.strategy={strategy}"]
        if num == 1:
            assert train_here(*arguments) == 0
        else:
            done = torchrun(num, *arguments)
            assert done.returncode == 0, done.stderr
            changed = f"resumed    with processes {num} instead of 2"
            assert (changed in done.stderr) == (num != 2)
        assert_same_losses(name, "whole")
        assert (Path(name) / "checkpoints/latest/shards").exists() == (num == 4)


@pytest.mark.machines
@pytest.mark.slow
def test_runs_resume_between_one_process_ddp_and_fsdp(workdir: Path, small: list[str]) -> None:
    assert train_here(*small, "run_dir=whole", "trainer.max_steps=9", "optim.schedule=constant") == 0
    assert train_here(*small, "run_dir=parts", "trainer.max_steps=3", "optim.schedule=constant") == 0
    for strategy, steps in (("ddp", 6), ("fsdp", 9)):
        done = torchrun(2, "resume=parts", f"trainer.max_steps={steps}", f"trainer.strategy={strategy}")
        assert done.returncode == 0, done.stderr
    train = [[row["loss"] for row in rows(run) if row["split"] == "train"] for run in ("parts", "whole")]
    assert train[0] == pytest.approx(train[1], abs=TOLERANCE)


# Failing


@pytest.mark.machines
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_restart_after_a_killed_process_loses_nothing(workdir: Path, small: list[str], strategy: str) -> None:
    """Killed with -9 two steps after a checkpoint: torchrun restarts all processes, which resume from it."""
    small = [*small, "trainer.save_every=2", "trainer.max_steps=8", f"trainer.strategy={strategy}", "name=job"]
    assert torchrun(2, *small, "run_dir=undisturbed").returncode == 0
    kill = FAULT.format(at=5, rank=1, do="os.kill(os.getpid(), signal.SIGKILL)")
    done = torchrun(2, *small, program=kill, options=("--max-restarts=1",))
    assert done.returncode == 0, done.stderr
    (run,) = Path("runs/job").iterdir()
    assert_same_losses(str(run), "undisturbed")
    assert [line for line in our_lines(done.stderr) if "lost another one" in line] == our_lines(done.stderr)


@pytest.mark.machines
@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_line(workdir: Path, small: list[str]) -> None:
    kill = FAULT.format(at=3, rank=0, do="os.kill(os.getpid(), signal.SIGKILL)")
    done = torchrun(4, *small, "run_dir=run", program=kill)
    assert done.returncode == 1
    (line,) = our_lines(done.stderr)
    assert re.search(r"process [123] of 4 lost another one", line)
    assert train_here("resume=run") == 0
    assert [row["step"] for row in rows("run") if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.machines
@pytest.mark.slow
def test_an_error_in_one_process_is_reported_once(workdir: Path, small: list[str]) -> None:
    fail = FAULT.format(at=2, rank=1, do="raise MinitfError('the disk of this machine is on fire')")
    done = torchrun(2, *small, "run_dir=run", program=fail)
    assert done.returncode == 1
    assert our_lines(done.stderr) == ["minitf: the disk of this machine is on fire (process 1 of 2)"]
    assert "minitf/training/trainer.py" not in done.stderr  # torchrun's own traceback cannot be suppressed


@pytest.mark.machines
@pytest.mark.slow
def test_an_invalid_request_is_refused_once(workdir: Path, small: list[str]) -> None:
    done = torchrun(2, *small, "run_dir=run", "trainer.batch_size=7")
    assert done.returncode == 1
    (line,) = our_lines(done.stderr)
    assert "trainer.batch_size=7" in line
    assert "multiple of their number, 2" in line
    assert not Path("run").exists()


@pytest.mark.machines
@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(workdir: Path, small: list[str]) -> None:
    """torchrun forwards SIGTERM to all processes; a signal to a single one is the harder case."""
    one = FAULT.format(at=3, rank=1, do="os.kill(os.getpid(), signal.SIGTERM)")
    done = torchrun(2, *small, "run_dir=run", program=one)
    assert done.returncode == 0, done.stderr
    assert "stopped after step 4" in done.stderr
    assert json.loads(Path("run/checkpoints/latest/trainer_state.json").read_text())["step"] == 4
    assert torchrun(2, "resume=run").returncode == 0
    assert train_here(*small, "run_dir=one") == 0
    assert_same_losses("run", "one")


@pytest.mark.machines
@pytest.mark.slow
def test_a_timed_run_takes_the_same_steps_in_all_processes(workdir: Path, small: list[str]) -> None:
    """The number of steps is planned anew during the run; processes that disagreed on it would deadlock."""
    small = [word for word in small if not word.startswith("trainer.max_steps")]
    done = torchrun(2, *small, "run_dir=run", "trainer.max_minutes=0.1", "trainer.eval_every=0", "trainer.log_every=5")
    assert done.returncode == 0, done.stderr
    state = json.loads(Path("run/checkpoints/latest/trainer_state.json").read_text())
    assert state["step"] == state["num_steps"]
    plans = json.loads(Path("run/decisions.json").read_text())["plans"]
    assert len(plans) > 1
    assert plans[-1] == [state["step"], state["step"]]


@pytest.mark.machines
@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint(workdir: Path, small: list[str]) -> None:
    small = [*small, "trainer.max_steps=100000", "trainer.eval_every=100000", "run_dir=run"]
    with subprocess.Popen(command(2, *small), stderr=subprocess.DEVNULL) as process:
        while not (Path("run/metrics.jsonl").exists() and len(rows("run")) > 3):
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    steps = [row["step"] for row in rows("run") if row["split"] == "train"]
    assert load_checkpoint("run", prefer="latest").step == steps[-1] > 3


def test_processes_of_a_group_exit_without_finalizing_the_interpreter(workdir: Path, small: list[str]) -> None:
    """gloo's threads outlive the group and may abort the process during finalization."""
    program = """
import atexit
rank = os.environ["RANK"]
atexit.register(print, f"at exit of {rank}")
class Kept:
    def __del__(self, write=os.write):
        write(1, b"finalized")
kept = Kept()
"""
    done = torchrun(2, *small, "trainer.max_steps=1", "run_dir=run", program=program)
    assert done.returncode == 0, done.stderr
    assert all(f"at exit of {rank}\n" in done.stdout for rank in (0, 1))
    assert "finalized" not in done.stdout
    alone = [sys.executable, "program.py", *small, "trainer.max_steps=1", "run_dir=alone"]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=900, env=os.environ | {"RANK": "0"})
    assert done.returncode == 0, done.stderr
    assert "finalized" in done.stdout


def test_an_uncaught_exception_after_the_group_sets_the_exit_status(workdir: Path) -> None:
    Path("late.py").write_text(
        "from minitf.distributed.process_group import process_group\n"
        "with process_group() as group:\n    assert group.size == 2\n"
        "raise ValueError('late')\n",
        encoding="utf-8",
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*start, "late.py"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stderr
    assert "ValueError: late" in done.stderr


# Collective operations


def _in_group(rank: int, size: int, port: int, check: Callable[[ProcessGroup], None]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    with process_group() as group:
        check(group)


def together(size: int, check: Callable[[ProcessGroup], None]) -> None:
    """Run `check` in `size` processes."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_in_group, (size, port, check), size)  # type: ignore[no-untyped-call]


def _check_scattered_work(group: ProcessGroup) -> None:
    generator = torch.Generator().manual_seed(0)
    worked_on = 0

    def work(matrices_NRC: Tensor) -> Tensor:
        nonlocal worked_on
        worked_on += len(matrices_NRC)
        return orthogonalise(matrices_NRC, torch.float32)

    for shape in ((7, 10, 4), (2, 5, 8), (3, 3, 3), (1, 2, 6)):  # also fewer matrices or rows than processes
        matrices_NRC = torch.randn(shape, generator=generator)
        expected_NRC, worked_on = orthogonalise(matrices_NRC, torch.float32), 0
        found_NRC = group.scatter_work(work, matrices_NRC, torch.float32)()
        torch.testing.assert_close(found_NRC, expected_NRC, atol=1e-6, rtol=1e-5)
        assert group.sum([worked_on]) == [len(matrices_NRC)]  # each matrix once
        worked_on = 0
        height = -(-shape[1] // group.size)
        mine = slice(group.rank * height, (group.rank + 1) * height)
        rows_NrC = group.scatter_row_work(work, matrices_NRC[:, mine], shape[1], torch.float32)()
        torch.testing.assert_close(rows_NrC, expected_NRC[:, mine], atol=1e-6, rtol=1e-5)
        assert group.sum([worked_on]) == [len(matrices_NRC)]


@pytest.mark.slow
def test_scattered_orthogonalisation_equals_that_of_one_process() -> None:
    together(3, _check_scattered_work)


def _check_collectives(group: ProcessGroup) -> None:
    assert group.broadcast({"a": [group.rank, "é"]}) == {"a": [0, "é"]}
    assert group.any(group.rank == 1)
    assert not group.any(False)
    assert group.sum([1.0, group.rank]) == [2.0, 1.0]
    assert group.mean(torch.tensor([float(group.rank)])).tolist() == [0.5]
    assert group.gather(torch.tensor([group.rank])).tolist() == [[0], [1]]
    assert group.rows_of(6) == slice(3 * group.rank, 3 * group.rank + 3)


def test_collective_operations() -> None:
    together(2, _check_collectives)
    assert SINGLE.broadcast("x") == "x"
    assert SINGLE.any(True)
    assert SINGLE.sum([1.5]) == [1.5]
    assert SINGLE.rows_of(6) == slice(0, 6)


@pytest.mark.slow
def test_one_process_does_not_import_fsdp() -> None:
    code = "import minitf.train, minitf.training.trainer, sys; assert 'torch.distributed.fsdp' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=900).returncode == 0
    with process_group() as group:
        assert group is SINGLE
