"""A step is the same however it is cut up, and finds out how much memory and how many threads it can have."""

import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line, losses, train_here
from torch import Tensor

from minitf.data.batches import Batch
from minitf.loss import IGNORED
from minitf.model import ModelConfig, Transformer
from minitf.optim import OptimConfig, Optimizer
from minitf.system.hardware import Hardware
from minitf.system.memory import free_memory, growth_of
from minitf.system.threads import set_threads, usable_cores
from minitf.training.parallel import Parallel
from minitf.training.step import TrainingStep

QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


def batch_of(num_rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(9, (2, num_rows, 6), generator=generator)
    targets[1::2, :4] = IGNORED
    return Batch(inputs, targets, torch.ones_like(inputs), torch.rand(num_rows, 6, generator=generator))


# Pieces


@pytest.mark.parametrize(
    ("num_rows", "most", "sizes"), [(8, 3, [3, 3, 2]), (8, 8, [8]), (7, 4, [4, 3]), (2, 1, [1, 1])]
)
def test_pieces_of_a_batch_are_all_of_it_and_alike_in_size(num_rows: int, most: int, sizes: list[int]) -> None:
    batch = batch_of(num_rows)
    pieces, shares = zip(*batch.pieces(most), strict=True)
    assert [len(piece.inputs_BT) for piece in pieces] == sizes
    for parts, whole in zip(zip(*pieces, strict=True), batch, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert sum(shares) == pytest.approx(1)


def test_the_share_of_a_piece_is_that_of_its_weighted_targets() -> None:
    batch = batch_of(4)
    assert batch.weights_BT is not None
    counts = batch.weights_BT * (batch.targets_BT != IGNORED)
    shares = [share for _, share in batch.pieces(1)]
    assert shares == pytest.approx((counts.sum(1) / counts.sum()).tolist())
    assert shares[0] > 1.5 * shares[1]
    uncounted = Batch(batch.inputs_BT, torch.full_like(batch.targets_BT, IGNORED))
    assert [share for _, share in uncounted.pieces(2)] == [0, 0]


@pytest.mark.parametrize("data", [[], ["data=copy", "data.num_pairs=300"]])
def test_sequences_computed_a_few_at_a_time_are_a_batch(workdir: Path, tiny: list[str], data: list[str]) -> None:
    tiny = [*(setting for setting in tiny if not (data and "data" in setting)), *data]
    for name, most in (("whole", 0), ("parts", 3)):
        assert train_here(*tiny, f"run_dir={name}", "trainer.batch_size=8", f"trainer.micro_batch_size={most}") == 0
    for parts, whole in zip(losses("parts"), losses("whole"), strict=True):
        assert parts[:2] == whole[:2]
        assert parts[2] == pytest.approx(whole[2], abs=2e-4)
    assert losses("parts") != losses("whole")  # other sums: it was computed otherwise


# Memory


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make a machine of it that has memory for so many sequences."""

    def limit(most: int, error: Exception | None = None) -> None:
        original = Parallel.loss

        def loss(self: Parallel, inputs_BT: Tensor, *rest: Tensor | None) -> Tensor:
            if len(inputs_BT) > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(self, inputs_BT, *rest)

        monkeypatch.setattr(Parallel, "loss", loss)

    return limit


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_a_batch_that_does_not_fit_is_computed_in_parts(
    workdir: Path,
    tiny: list[str],
    small_memory: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    assert train_here(*tiny, "trainer.batch_size=8", "run_dir=whole") == 0
    small_memory(3, error)
    assert train_here(*tiny, "trainer.batch_size=8", "run_dir=parts") == 0
    assert "; 2 sequences at a time" in capsys.readouterr().err
    assert json.loads(Path("parts/choices.json").read_text(encoding="utf-8"))["micro_batch_size"] == 2
    environment = json.loads(Path("parts/environment.json").read_text(encoding="utf-8"))
    assert environment["choices"]["micro_batch"] == "2 sequences at a time"
    assert [row[2] for row in losses("parts")] == pytest.approx([row[2] for row in losses("whole")], abs=2e-4)


def test_a_resumed_run_computes_as_many_at_a_time_as_before(
    workdir: Path, tiny: list[str], small_memory: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = Parallel.loss
    small_memory(2)
    assert train_here(*tiny, "trainer.batch_size=8", "run_dir=run") == 0
    monkeypatch.setattr(Parallel, "loss", enough)
    assert train_here("resume=run", "trainer.max_steps=50") == 0
    assert json.loads(Path("run/choices.json").read_text(encoding="utf-8"))["micro_batch_size"] == 2


@pytest.mark.parametrize(
    ("free_mb", "settings", "at_once"),
    [
        (10, [], 6),  # seven of ten are taken, half a one by the optimiser and its like
        (0.1, [], 1),
        (10_000, [], 16),
        (10, ["trainer.micro_batch_size=16"], 16),
        (None, [], 16),
    ],
)
def test_on_a_cpu_what_a_few_sequences_take_decides(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, free_mb: float, settings: list[str], at_once: int
) -> None:
    grown: list[int] = []

    def growth_of(work: Callable[[], bool]) -> int:
        assert work()
        grown.append(2_500_000)  # of two sequences: 1 MB each, beside 0.5 MB for 42,656 weights
        return grown[-1]

    monkeypatch.setattr("minitf.training.step.free_memory", lambda: None if free_mb is None else int(free_mb * 1e6))
    monkeypatch.setattr("minitf.training.step.growth_of", growth_of)
    assert train_here(*tiny, "trainer.batch_size=16", *settings, "run_dir=run") == 0
    assert json.loads(Path("run/choices.json").read_text(encoding="utf-8"))["micro_batch_size"] == at_once
    assert len(grown) == (at_once < 16)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says")
def test_the_growth_of_this_process_is_measured() -> None:
    free = free_memory()
    assert free is not None
    assert free > 1 << 20
    if growth_of(lambda: None) is None:
        pytest.skip("a kernel without clear_refs")

    def fill() -> None:  # memory of its own, not what other tests have freed
        np.frombuffer(mmap.mmap(-1, 200_000_000), np.uint8)[:] = 1

    child = os.fork()  # alone: what the threads of other tests give back meanwhile would be missing
    if child == 0:
        found, again = growth_of(fill) or 0, growth_of(lambda: None)
        os._exit(0 if 150e6 < found < 300e6 and again is not None and again < 50e6 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_container_has_as_much_memory_as_it_was_given(tmp_path: Path) -> None:
    groups, membership, proc = tmp_path / "groups", tmp_path / "membership", tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    membership.write_text("0::/\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) is None
    assert growth_of(lambda: None, tmp_path / "not_linux") is None
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n", encoding="utf-8")
    (proc / "self/status").write_text("VmHWM:\t2000 kB\nVmRSS:\t1000 kB\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 5000 * 1024
    (groups / "memory.max").write_text("max\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 5000 * 1024
    (groups / "memory.max").write_text(f"{3000 * 1024}\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 2000 * 1024
    (groups / "memory.max").write_text("5\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 0
    assert growth_of(lambda: None, proc) == 1000 * 1024


def test_memory_for_no_sequence_is_one_line(
    workdir: Path, tiny: list[str], small_memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    small_memory(0)
    assert train_here(*tiny, "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, "out of memory on cpu", "one sequence of 32 tokens", "context_length")


def test_memory_that_runs_out_later_is_one_line(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("minitf.training.trainer.Trainer.look", fail)
    assert train_here(*tiny, "trainer.attention_every=10", "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_other_errors_are_not_taken_for_it(workdir: Path, tiny: list[str], small_memory: Callable[..., None]) -> None:
    small_memory(2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_here(*tiny, "run_dir=run")


# Threads


@pytest.fixture
def step(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> TrainingStep:
    """One that measures nothing yet, with sixteen threads to choose from."""
    found = TrainingStep.__new__(TrainingStep)
    found.hardware = Hardware(torch.device("cpu"), torch.float32, 1e9, "")
    found.threads = "16 threads"
    num_threads = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda num: num_threads.__setitem__(0, num))
    return found


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({16: 0.10, 8: 0.06, 4: 0.04, 2: 0.07}, 4),
        ({16: 0.10, 8: 0.06, 4: 0.04, 2: 0.03}, 2),  # one thread is not tried
        ({16: 0.10, 8: 0.098, 4: 0.01}, 16),  # as fast as all, as far as eight steps can tell
        ({16: 0.60, 8: 0.30}, 16),  # a long step has work for all
    ],
)
def test_fewer_threads_are_taken_while_they_are_faster(
    step: TrainingStep, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], chosen: int
) -> None:
    monkeypatch.setattr(step, "measure", lambda most: seconds[torch.get_num_threads()])
    assert step._choose_threads(seconds[16]) == seconds[chosen]
    assert torch.get_num_threads() == chosen
    assert step.threads == ("16 threads" if chosen == 16 else f"{chosen} of 16 threads, which is faster")


@pytest.mark.parametrize(
    ("limits", "threads", "most"),
    [
        (["trainer.max_steps=2"], 2, 1),
        (["trainer.max_steps=2", "trainer.max_minutes=1"], 2, 8),
        (["trainer.max_steps=2"], 4, 8),
    ],
)
def test_a_step_is_measured_where_the_number_of_steps_or_threads_hangs_on_it(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, limits: list[str], threads: int, most: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(TrainingStep, "measure", lambda step, most: (asked.append(most), 0.6)[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # where it is set, the number of threads is no question
    assert train_here(*tiny, *limits, "trainer.compile=false") == 0
    assert asked == [most]


def test_the_number_of_threads_can_be_set(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    try:
        assert train_here(*tiny, "run_dir=run", "trainer.threads=1") == 0
        assert torch.get_num_threads() == 1
        assert "chosen     cpu, 1 thread; " in capsys.readouterr().err
        assert json.loads(Path("run/choices.json").read_text(encoding="utf-8"))["num_threads"] == 1
        assert train_here(*tiny, "trainer.threads=100000") == 2
        assert_one_line(capsys.readouterr().err, "trainer.threads=100000", f"{os.cpu_count()} cores")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_threads()
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert not set_threads()
        assert set_threads(1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "350000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/../elsewhere\n", {}, 8),
        ("5:memory:/m\n4:cpu,cpuacct:/docker/x\n", {QUOTA: "400000", PERIOD: "100000"}, 4),
        ("4:cpu:/\n", {QUOTA: "-1", PERIOD: "100000"}, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("", {}, 8),
    ],
)  # fmt: skip
def test_a_container_has_as_many_cores_as_its_share_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    own = tmp_path / "own"
    own.write_text(membership, encoding="utf-8")
    assert usable_cores(tmp_path / "groups", own) == cores
    assert usable_cores(tmp_path / "groups", tmp_path / "not_linux") == 8


# A device that nobody waits for


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_asks_its_device_for_nothing(packed: bool, optim: str) -> None:
    """On `meta` tensors have no values: asking for one, which on a GPU would wait for all its work, is an error."""
    meta = torch.device("meta")

    class Source:
        tokens_per_epoch = 24

        def batch(self, index: int) -> Batch:
            whole = batch_of(4)
            return whole if packed else Batch(whole.inputs_BT, whole.targets_BT)

    shape = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, context_length=6, dropout=0.1)
    model = Transformer(shape, vocab_size=9).to(meta)
    model.compute_dtype = torch.bfloat16
    optimizer = Optimizer(model, OptimConfig(kind=optim), torch.bfloat16)
    for group in optimizer.groups():  # the fused kernel is there for real devices alone
        group["fused"] = False
    hardware = Hardware(meta, torch.bfloat16, 1e9, "")
    step = TrainingStep(Parallel(model), optimizer, Source(), hardware, grad_accumulation=2, micro_batch_size=3)
    for index in range(2):
        loss, norm = step.run(index, 1.0)
        assert (loss.device, norm.device) == (meta, meta)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
