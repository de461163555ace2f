"""A backend is believed only after it agrees with the reference, and what does not agree is not used."""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from helpers import SHAPE, needs_compiler, not_applicable

from minitf.backends import Backend, Reference, autotune, custom_module, substitute
from minitf.backends.agreement import Case, differences, disagreement
from minitf.backends.autotune import select
from minitf.backends.compile import Compile
from minitf.backends.cpu.kernels import CpuKernels
from minitf.backends.cpu.muon import CpuMuon
from minitf.backends.sdpa import Sdpa, SdpaAttention
from minitf.model import ModelConfig, Transformer
from minitf.optim import OptimConfig, Optimizer

BF16 = torch.bfloat16


def case_of(dtype: torch.dtype = torch.float32, packed: bool = False, **shape: Any) -> Case:
    config = ModelConfig(**{**SHAPE, **shape})
    return Case(config, OptimConfig(), 300, dtype, torch.device("cpu"), 4, packed)


def usable(backend: Backend, case: Case) -> Backend:
    model = Transformer(case.config, case.vocab_size)
    model.compute_dtype = case.dtype
    if reason := backend.unsupported(model):
        not_applicable(reason)  # test_conformance.py notices a missing compiler
    return backend


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_kv_heads": 4, "qk_norm": False},
        {"hidden_size": 48, "num_heads": 3, "num_kv_heads": 1},
        {"context_length": 200},
    ],
)
def test_the_kernels_agree(shape: dict[str, Any], dtype: torch.dtype) -> None:
    case = case_of(dtype, **shape)
    assert disagreement(usable(CpuKernels(), case), case) is None


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_fused_attention_agrees(dtype: torch.dtype) -> None:
    case = case_of(dtype, context_length=150)
    assert disagreement(Sdpa(), case) is None


def test_the_reference_is_compared_with_itself_to_the_last_bit() -> None:
    found = list(differences(Reference(), case_of()))
    assert len(found) == 2 * 6
    assert all(difference.error == 0 for difference in found)


@needs_compiler
def test_the_verdict_leaves_no_trace() -> None:
    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    list(differences(Sdpa(), case_of()))
    list(differences(CpuKernels(), case_of()))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize(
    ("function", "part"),
    [
        ("swiglu", "the output of a block"),
        ("attend", "the output of a block"),
        ("chunk_loss", "the loss"),
        ("rms_norm", "the output of a block"),
    ],
)
def test_a_broken_kernel_is_not_used(function: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of()
    usable(CpuKernels(), case)
    original = getattr(CpuKernels, function)

    def broken(*arguments: Any) -> Any:
        found = original(*arguments)
        return tuple(part * 1.001 for part in found) if isinstance(found, tuple) else found * 1.001

    monkeypatch.setattr(CpuKernels, function, broken)
    assert str(disagreement(CpuKernels(), case)).startswith(f"{part} differs by 0.")


def test_a_kernel_that_gives_no_number_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of()
    usable(CpuKernels(), case)
    monkeypatch.setattr(CpuKernels, "swiglu", lambda self, x: x[..., ::2] * torch.nan)
    assert disagreement(CpuKernels(), case) == "the output of a block is not finite"


def test_a_broken_update_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(BF16)
    usable(CpuKernels(), case)
    monkeypatch.setattr(
        CpuMuon, "move_weights", lambda self, weights, updates, decay, rate: [w.mul_(decay) for w in weights]
    )
    assert "the update of self_attn." in str(disagreement(CpuKernels(), case))


def test_an_edit_of_the_core_is_noticed_where_rounding_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(BF16)
    usable(CpuKernels(), case)
    monkeypatch.setattr("minitf.attention.weigh", lambda scores: torch.softmax(0.1 * scores, -1))
    assert "the output of a block differs by" in str(disagreement(CpuKernels(), case))
    monkeypatch.undo()
    monkeypatch.setattr("minitf.backends.source.edited", lambda roots: ["attention.weigh", "rope.rotate"])
    assert disagreement(CpuKernels(), case) == "attention.weigh is edited and 1 more"


# -- substitution ------------------------------------------------------------------------------------------------------


def test_a_backend_is_installed_and_taken_out_without_a_trace() -> None:
    model = Transformer(ModelConfig(**SHAPE), 50)
    optimizer = Optimizer(model, OptimConfig(), torch.float32)
    names, classes = list(model.state_dict()), [type(part) for part in model.modules()]
    for backend in (Sdpa(), CpuKernels()):
        backend.install(model, optimizer)
        assert list(model.state_dict()) == names
        assert [type(part) for part in model.modules()] != classes
        Reference().install(model, optimizer)
        assert [type(part) for part in model.modules()] == classes


def test_a_class_that_wraps_a_module_keeps_its_methods() -> None:
    class Wrapped(type(Transformer(ModelConfig(**SHAPE), 50).model.layers[0].self_attn)):  # type: ignore[misc, index, union-attr]
        def describe(self) -> str:
            return "wrapped"

    attention = Transformer(ModelConfig(**SHAPE), 50).model.layers[0].self_attn  # type: ignore[index, union-attr]
    attention.__class__ = Wrapped
    substitute(attention, SdpaAttention)
    assert attention.describe() == "wrapped"
    assert type(attention).attend is SdpaAttention.attend  # type: ignore[attr-defined]


def test_a_module_of_somebody_elses_is_declined_by_name() -> None:
    model = Transformer(ModelConfig(**SHAPE, attention="sdpa"), 50)  # type: ignore[arg-type]
    assert custom_module(model) is None

    class MyAttention(type(model.model.layers[1].self_attn)):  # type: ignore[misc, index, union-attr]
        pass

    model.model.layers[1].self_attn.__class__ = MyAttention  # type: ignore[index, union-attr]
    assert Sdpa().unsupported(model) == "it does not know MyAttention"


# -- the choice --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a step by each backend, for a choice without a clock."""

    def __init__(self, busy: Collection[int] = (), **seconds: float) -> None:
        """The measurements of these numbers, from 0, meet a burst of other work."""
        self.seconds, self.tried, self.busy = seconds, list[str](), busy
        self.model = Transformer(ModelConfig(**SHAPE), 50)
        self.optimizer = Optimizer(self.model, OptimConfig(), torch.float32)

    def measure(self, warm: bool) -> float:
        names = {type(part).__name__ for part in self.model.modules()}
        self.tried.append("cpu" if "FusedBlock" in names else "compile" if "CompiledBlock" in names else "reference")
        return self.seconds[self.tried[-1]] * (5 if len(self.tried) - 1 in self.busy else 1)

    def select(self, wanted: str, left_s: float = 1e9, **disagreeing: str) -> Any:
        def unsupported(backend: Backend) -> str | None:
            return backend.unsupported(self.model)

        def disagrees(backend: Backend) -> str | None:
            return disagreeing.get(backend.name)

        return select(wanted, self.model, self.optimizer, unsupported, disagrees, self.measure, lambda step_s: left_s)


@pytest.fixture
def all_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuKernels, "unsupported", lambda *_: None)
    monkeypatch.setattr(Compile, "unsupported", lambda *_: None)


@pytest.mark.usefixtures("all_supported")
@pytest.mark.parametrize(("cpu_s", "chosen"), [(0.5, "cpu"), (1.1, "cpu"), (1.3, "compile")])
def test_kernels_are_used_unless_clearly_slower(cpu_s: float, chosen: str) -> None:
    clock = Clock(reference=1.0, cpu=cpu_s, compile=0.9)
    selection = clock.select("auto")
    assert (selection.backend, selection.step_s) == (chosen, clock.seconds[chosen])
    assert f"a step takes {clock.seconds[chosen] * 1000:.0f} ms instead of 1000 ms" in selection.reason
    assert f"{1 / clock.seconds[chosen]:.2g} times as fast" in selection.reason
    tried = list(dict.fromkeys(clock.tried))
    assert tried == ["reference", "cpu", "compile"][: 3 if chosen == "compile" else 2]


@pytest.mark.usefixtures("all_supported")
@pytest.mark.parametrize("busy", [[0], [1], [0, 1], [1, 2]])
@pytest.mark.parametrize(("cpu_s", "chosen"), [(0.6, "cpu"), (1.9, "reference")])
def test_choice_of_a_backend_survives_a_burst_of_other_work(busy: list[int], cpu_s: float, chosen: str) -> None:
    clock = Clock(busy, reference=0.1, cpu=0.1 * cpu_s, compile=9.0)
    selection = clock.select("auto", left_s=10)
    assert (selection.backend, selection.step_s) == (chosen, clock.seconds[chosen])
    assert selection.doubtful == ()


@pytest.mark.usefixtures("all_supported")
@pytest.mark.parametrize("cpu_s", [1.1, 1.3])
def test_choice_by_a_thin_margin_is_marked_as_doubtful(cpu_s: float) -> None:
    clock = Clock(reference=0.1, cpu=0.1 * cpu_s)
    assert clock.select("auto", left_s=10).doubtful == ("reference", "cpu")
    assert clock.tried.count("cpu") == 5
    assert clock.select("native").doubtful == ()  # asked for


@pytest.mark.usefixtures("all_supported")
def test_what_disagrees_is_not_even_timed_and_said() -> None:
    clock = Clock(reference=1.0, compile=0.9)
    selection = clock.select("auto", left_s=10, cpu="attention.weigh is edited")
    assert selection.backend == "reference"
    assert clock.tried == ["reference"]
    assert selection.reason == (
        "attention.py as written, 1000 ms a step; not by our C kernels: attention.weigh is edited; "
        "torch.compile does not pay in 10 s of training"
    )
    assert clock.select("auto", cpu="attention.weigh is edited").backend == "compile"
    assert clock.select("native", cpu="the loss differs by 3.0%").backend == "reference"


@pytest.mark.usefixtures("all_supported")
def test_a_backend_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("no kernel image\nfor this device")

    monkeypatch.setattr(CpuKernels, "install", failing)
    selection = Clock(reference=1.0).select("native")
    assert selection.backend == "reference"
    assert "not by our C kernels, which failed: ValueError: no kernel image" in selection.reason
    monkeypatch.setattr(CpuKernels, "install", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        Clock(reference=1.0).select("native")


@pytest.mark.usefixtures("all_supported")
def test_nothing_is_tried_where_nothing_is_wanted() -> None:
    clock = Clock(reference=1.0)
    selection = clock.select("false")
    assert (selection.backend, clock.tried) == ("reference", ["reference"])
    assert clock.select("reference").backend == "reference"


def test_cuda_without_triton_has_the_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch for Windows computes on CUDA, but has no Triton."""
    model = Transformer(ModelConfig(**SHAPE), 300)
    monkeypatch.setattr(Transformer, "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(autotune, "find_spec", lambda name: None)
    assert set(autotune.backends(model)) == {"reference", "sdpa", "compile", "cpu"}
