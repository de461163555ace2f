"""A batch computed in parts gives the same gradients, and memory decides how many sequences are computed at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, losses, train_here
from torch import Tensor

from minitf.data.batches import Batch
from minitf.loss import IGNORED
from minitf.training.actions import LogAttention
from minitf.training.parallel import Parallel


def batch_of(num_rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(9, (2, num_rows, 6), generator=generator)
    targets[1::2, :4] = IGNORED
    return Batch(inputs, targets, torch.ones_like(inputs), torch.rand(num_rows, 6, generator=generator))


@pytest.mark.parametrize(
    ("num_rows", "most", "sizes"), [(8, 3, [3, 3, 2]), (8, 8, [8]), (7, 4, [4, 3]), (2, 1, [1, 1])]
)
def test_micro_batches_cover_the_batch_in_similar_sizes(num_rows: int, most: int, sizes: list[int]) -> None:
    batch = batch_of(num_rows)
    pieces, shares = zip(*batch.micro_batches(most), strict=True)
    assert [len(piece.inputs_BT) for piece in pieces] == sizes
    for parts, whole in zip(zip(*pieces, strict=True), batch, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert sum(shares) == pytest.approx(1)


def test_share_of_a_micro_batch_is_that_of_its_weighted_targets() -> None:
    batch = batch_of(4)
    assert batch.weights_BT is not None
    counts = batch.weights_BT * (batch.targets_BT != IGNORED)
    shares = [share for _, share in batch.micro_batches(1)]
    assert shares == pytest.approx((counts.sum(1) / counts.sum()).tolist())
    assert shares[0] > 1.5 * shares[1]
    uncounted = Batch(batch.inputs_BT, torch.full_like(batch.targets_BT, IGNORED))
    assert [share for _, share in uncounted.micro_batches(2)] == [0, 0]


@pytest.mark.parametrize("data", [pytest.param([], marks=pytest.mark.slow), ["data=copy", "data.num_pairs=300"]])
def test_training_in_micro_batches_gives_the_same_losses(workdir: Path, tiny: list[str], data: list[str]) -> None:
    tiny = [*(setting for setting in tiny if not (data and "data" in setting)), *data]
    for name, most in (("whole", 0), ("parts", 3)):
        assert train_here(*tiny, f"run_dir={name}", "trainer.batch_size=8", f"trainer.micro_batch_size={most}") == 0
    for parts, whole in zip(losses("parts"), losses("whole"), strict=True):
        assert parts[:2] == whole[:2]
        assert parts[2] == pytest.approx(whole[2], abs=2e-4)
    assert losses("parts") != losses("whole")  # summed in another order


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the loss run out of memory for more than `most` sequences."""

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
        pytest.param(MemoryError(), marks=pytest.mark.slow),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        pytest.param(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), marks=pytest.mark.slow),
    ],
)
def test_batch_that_does_not_fit_into_memory_is_split(
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
    assert json.loads(Path("parts/decisions.json").read_text(encoding="utf-8"))["micro_batch_size"] == 2
    environment = json.loads(Path("parts/environment.json").read_text(encoding="utf-8"))
    assert environment["setup"]["micro_batch"] == "2 sequences at a time"
    assert [row[2] for row in losses("parts")] == pytest.approx([row[2] for row in losses("whole")], abs=2e-4)


@pytest.mark.slow
def test_resumed_run_keeps_its_micro_batch_size(
    workdir: Path, tiny: list[str], small_memory: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = Parallel.loss
    small_memory(2)
    assert train_here(*tiny, "trainer.batch_size=8", "run_dir=run") == 0
    monkeypatch.setattr(Parallel, "loss", enough)
    assert train_here("resume=run", "trainer.max_steps=50") == 0
    assert json.loads(Path("run/decisions.json").read_text(encoding="utf-8"))["micro_batch_size"] == 2


@pytest.mark.parametrize(
    ("free_mb", "settings", "at_once"),
    [
        (10, [], 6),  # MEMORY_SHARE is 0.7, and the optimiser takes 0.5 MB
        pytest.param(0.1, [], 1, marks=pytest.mark.slow),
        pytest.param(10_000, [], 16, marks=pytest.mark.slow),
        (10, ["trainer.micro_batch_size=16"], 16),
        (None, [], 16),
    ],
)
def test_micro_batch_size_follows_from_the_memory_of_a_few_sequences(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, free_mb: float, settings: list[str], at_once: int
) -> None:
    grown: list[int] = []

    def growth_of(work: Callable[[], bool]) -> int:
        assert work()
        grown.append(2_500_000)  # two sequences of 1 MB, and 0.5 MB for 42,656 weights
        return grown[-1]

    monkeypatch.setattr(
        "minitf.training.tuned_step.free_memory", lambda: None if free_mb is None else int(free_mb * 1e6)
    )
    monkeypatch.setattr("minitf.training.tuned_step.growth_of", growth_of)
    assert train_here(*tiny, "trainer.batch_size=16", *settings, "run_dir=run") == 0
    assert json.loads(Path("run/decisions.json").read_text(encoding="utf-8"))["micro_batch_size"] == at_once
    assert len(grown) == (at_once < 16)


def test_too_little_memory_for_one_sequence_is_one_line(
    workdir: Path, tiny: list[str], small_memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    small_memory(0)
    assert train_here(*tiny, "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, "out of memory on cpu", "one sequence of 32 tokens", "context_length")


def test_running_out_of_memory_later_is_one_line(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(LogAttention, "__call__", fail)
    assert train_here(*tiny, "trainer.attention_every=10", "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_other_errors_are_not_taken_for_lack_of_memory(
    workdir: Path, tiny: list[str], small_memory: Callable[..., None]
) -> None:
    small_memory(2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_here(*tiny, "run_dir=run")
