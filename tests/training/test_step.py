"""A training step: its kernels, its threads, and no waiting for the device."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, train_here

from minitf.data.batches import Batch
from minitf.distributed.process_group import ProcessGroup
from minitf.loss import IGNORED
from minitf.model import Block, ModelConfig, Transformer
from minitf.optim import OptimConfig, Optimizer
from minitf.system.hardware import Hardware
from minitf.training.parallel import Parallel
from minitf.training.step import TrainingStep
from minitf.training.tuned_step import TunedStep


def batch_of(num_rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(9, (2, num_rows, 6), generator=generator)
    targets[1::2, :4] = IGNORED
    return Batch(inputs, targets, torch.ones_like(inputs), torch.rand(num_rows, 6, generator=generator))


@pytest.fixture
def step(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> TunedStep:
    """A step without a model, on a machine with sixteen threads."""
    found = TunedStep.__new__(TunedStep)
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
        ({16: 0.10, 8: 0.098, 4: 0.01}, 16),  # within the error of a measurement
        ({16: 0.60, 8: 0.30}, 16),  # a long step keeps all threads busy
    ],
)
def test_threads_are_halved_while_that_is_faster(
    step: TunedStep, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], chosen: int
) -> None:
    monkeypatch.setattr(step, "measure", lambda most: seconds[torch.get_num_threads()])
    assert step._choose_threads(seconds[16]) == seconds[chosen]
    assert torch.get_num_threads() == chosen
    times = f"{seconds[16] / seconds[chosen]:.2g} times as fast"
    assert step.threads == ("16 threads" if chosen == 16 else f"{chosen} of 16 threads, {times}")


@pytest.mark.parametrize("busy", [(0,), (1,), (0, 1)])
def test_choice_of_threads_survives_a_burst_of_other_work(
    step: TunedStep, monkeypatch: pytest.MonkeyPatch, busy: tuple[int, ...]
) -> None:
    seconds, count = {16: 0.10, 8: 0.06, 4: 0.07}, itertools.count()
    monkeypatch.setattr(
        step, "measure", lambda most: seconds[torch.get_num_threads()] * (4 if next(count) in busy else 1)
    )
    assert step._choose_threads(seconds[16]) == seconds[8]
    assert torch.get_num_threads() == 8
    assert step.doubtful_threads == (8, 4)  # 0.07 instead of 0.06: too close to be sure


@pytest.mark.parametrize(
    ("limits", "threads", "most"),
    [
        (["trainer.max_steps=2"], 2, 1),
        (["trainer.max_steps=2", "trainer.max_minutes=1"], 2, 4),
        (["trainer.max_steps=2"], 4, 4),
    ],
)
def test_step_is_measured_if_steps_or_threads_depend_on_it(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, limits: list[str], threads: int, most: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(TrainingStep, "measure", lambda step, most: (asked.append(most), 0.6)[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # if it is set, the number of threads is not chosen
    assert train_here(*tiny, *limits, "trainer.compile=false") == 0
    assert asked[-1] == most


def test_number_of_threads_can_be_set(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    try:
        assert train_here(*tiny, "run_dir=run", "trainer.threads=1") == 0
        assert torch.get_num_threads() == 1
        assert "device     cpu, 1 thread; " in capsys.readouterr().err
        assert json.loads(Path("run/decisions.json").read_text(encoding="utf-8"))["num_threads"] == 1
        assert train_here(*tiny, "trainer.threads=100000") == 2
        assert_one_line(capsys.readouterr().err, "trainer.threads=100000", f"{os.cpu_count()} cores")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize("packed", [False, True])
def test_step_never_synchronises_the_device(packed: bool, optim: str) -> None:
    """On the meta device tensors have no values: reading one, which on a GPU would synchronise, is an error."""
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
    for group in optimizer.groups():  # the fused kernel exists for real devices alone
        group["fused"] = False
    hardware = Hardware(meta, torch.bfloat16, 1e9, "")
    step = TrainingStep(Parallel(model), optimizer, Source(), hardware, grad_accumulation=2, micro_batch_size=3)
    for index in range(2):
        loss, norm = step.run(index, 1.0)
        assert (loss.device, norm.device) == (meta, meta)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def test_a_backend_that_another_process_lacks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the processes would take different numbers of timed steps, and wait for each other forever."""

    class Source:
        def batch(self, index: int) -> Batch:
            return Batch(*batch_of(4)[:2])

    model = Transformer(ModelConfig(num_layers=1, hidden_size=32, num_heads=2, context_length=6), 9)
    hardware = Hardware(torch.device("cpu"), torch.float32, 1e9, "")
    step = TunedStep(Parallel(model), Optimizer(model, OptimConfig(), torch.float32), Source(), hardware)  # type: ignore[arg-type]
    monkeypatch.setattr(ProcessGroup, "any", lambda group, flag: True)
    selection = step.choose_backend("native")
    assert selection.backend == "reference"
    assert "not by our C kernels: " in selection.reason
    assert type(model.model.layers[0]) is Block  # type: ignore[index, union-attr]
