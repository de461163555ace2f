"""A model and a run trained by the kernels: the losses and gradients of plain PyTorch, chosen where they are faster."""

import json
from pathlib import Path

import pytest
import torch
from backends.kernel_sets import Kernels
from helpers import assert_one_line, interrupt_at, losses, not_applicable, train_here
from helpers import relative_error as off
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.backends import Reference
from minitf.backends.cpu import bindings
from minitf.backends.cpu.kernels import CpuKernels
from minitf.errors import Unavailable
from minitf.loss import IGNORED
from minitf.model import ModelConfig, Transformer
from minitf.optim import OptimConfig, Optimizer

BF16 = torch.bfloat16


def model_of(**settings: object) -> Transformer:
    config = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**config, "context_length": 70, **settings}), 50)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.1)  # zero at the start, which would hide what is before
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def gradients_of(model: Transformer, packed: bool, length: int = 70) -> tuple[float, Tensor]:
    """The loss of three rows, and its gradient for all parameters."""
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(50, (3, length), generator=generator)
    targets_BT = ids_BT.roll(-1, 1)
    targets_BT[0, :5] = IGNORED
    segments_BT = (torch.rand(3, length, generator=generator) < 4 / length).long().cumsum(1) if packed else None
    weights_BT = torch.rand(3, length, generator=generator) if packed else None
    model.zero_grad()
    torch.manual_seed(1)  # for dropout
    loss = model.loss(ids_BT, targets_BT, segments_BT, weights_BT)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


SETTINGS: list[dict[str, object]] = [
    {},
    {"qk_norm": False, "intermediate_size": 40, "dropout": 0.3},
    {"hidden_size": 64, "intermediate_size": 96, "tie_embeddings": False},  # whole tiles of AMX
]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_and_gradients_are_those_of_plain_pytorch(
    settings: dict[str, object], packed: bool, kernels: Kernels
) -> None:
    if not kernels.in_c and packed == (settings is SETTINGS[1]):
        not_applicable("Triton's interpreter is slow")
    length, num_layers = (70, 2) if kernels.in_c else (6, 1)
    model = model_of(**settings, num_layers=num_layers)
    loss, exact = gradients_of(model, packed, length)
    model.compute_dtype = kernels.dtype
    plain_loss, plain = gradients_of(model, packed, length)
    kernels.fused.install(model)
    found_loss, found = gradients_of(model, packed, length)
    assert found_loss == pytest.approx(loss, rel=kernels.tolerance(0.003))
    assert plain_loss == pytest.approx(loss, rel=kernels.tolerance(0.003))
    if not settings.get("dropout") or kernels.dtype == torch.float32:  # rounding moves what is dropped
        assert off(found, exact) < kernels.tolerance(0.03)
        assert off(found, exact) < max(1e-5, 1.1 * off(plain, exact))
    model.activation_checkpointing = True
    torch.testing.assert_close(gradients_of(model, packed, length)[1], found, rtol=0, atol=0)


@pytest.mark.backends
def test_triton_kernels_in_bfloat16_differ_by_rounding_alone() -> None:
    from minitf.backends.cuda.triton_kernels import TritonKernels

    if not pytest.importorskip("triton").knobs.runtime.interpret:
        not_applicable("on a CUDA device test_cuda.py tests the compiled kernels")
    model = model_of()
    _, exact = gradients_of(model, False, 7)
    model.compute_dtype = BF16
    _, rounded = gradients_of(model, False, 7)
    TritonKernels().install(model)
    _, found = gradients_of(model, False, 7)
    assert off(found, exact) < 1.5 * off(rounded, exact) < 0.15


@pytest.mark.parametrize("place", ["embedding", "k_norm"])
def test_nan_in_a_weight_shows_in_the_loss(place: str, kernels: Kernels) -> None:
    if place == "k_norm" and not kernels.in_c:
        not_applicable("PyTorch's attention on a processor takes a query without any finite score for a masked one")
    model = model_of()
    kernels.fused.install(model)
    with torch.no_grad():
        if place == "embedding":
            model.model.embed_tokens.weight[49] = float("nan")  # type: ignore[index, union-attr]
        else:
            model.model.layers[0].self_attn.k_norm.weight[0] = float("nan")  # type: ignore[index, union-attr]
    ids_BT = torch.randint(49, (2, 7), generator=torch.Generator().manual_seed(5))  # without token 49
    assert model.loss(ids_BT, ids_BT.roll(-1, 1)).isnan()


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Those that this processor computes in by the C kernels."""
    dtype = {"fp32": torch.float32, "bf16": BF16}[request.param]
    try:
        bindings.library(dtype)
    except Unavailable as reason:
        not_applicable(str(reason))
    return dtype


def precision_of(dtype: torch.dtype) -> str:
    return f"trainer.precision={bindings.PRECISIONS[dtype]}"


def test_a_model_in_another_precision_computes_without_them() -> None:
    model = model_of()
    ids_BT = torch.randint(50, (3, 70), generator=torch.Generator().manual_seed(5))
    expected = model.loss(ids_BT, ids_BT)
    with model.computing_in(BF16):
        CpuKernels().install(model)  # as after training, while the model writes samples in float32
    assert torch.equal(model.loss(ids_BT, ids_BT), expected)
    assert torch.equal(model(ids_BT), model_of()(ids_BT))


def test_evaluation_and_captured_weights_agree_with_training(dtype: torch.dtype) -> None:
    model = model_of(dropout=0.5)
    model.compute_dtype = dtype
    CpuKernels().install(model)
    ids_BT = torch.randint(50, (3, 70), generator=torch.Generator().manual_seed(5))
    model.eval()
    with torch.no_grad():
        trained = model.hidden(ids_BT)
        record: list[AttentionRecord] = []
        captured = model.hidden(ids_BT, record=record)
    assert off(trained, captured) < (0.02 if dtype == BF16 else 1e-5)
    assert len(record) == 2
    model.train()
    assert off(model.hidden(ids_BT).detach(), captured) > 0.1  # dropout


# -- the choice ------------------------------------------------------------------------------------------------------


def test_a_run_resumes_with_them(
    workdir: Path,
    tiny: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    short = [
        *tiny,
        precision_of(dtype),
        "trainer.max_steps=6",
        "trainer.eval_every=6",
        "trainer.eval_tokens=64",
        "trainer.log_every=1",
        "trainer.save_every=3",
    ]
    assert not train_here(*short, "trainer.compile=native", "run_dir=native")
    assert "backend    our C kernels, a step takes" in capsys.readouterr().err
    assert not train_here(*short, "trainer.compile=native", "run_dir=again")
    assert not train_here(*short, "trainer.compile=false", "run_dir=plain")
    assert losses("again") == losses("native")
    assert [row[2] for row in losses("plain")] == pytest.approx([row[2] for row in losses("native")], rel=0.01)
    decisions = json.loads(Path("native/decisions.json").read_text(encoding="utf-8"))
    assert decisions["backend"] == "cpu"

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        train_here(*short, "trainer.compile=native", "run_dir=resumed")
        train_here(*short, "trainer.compile=native", "run_dir=moved")
    assert not train_here("resume=resumed", "trainer.compile=auto")
    assert losses("resumed") == losses("native")

    def missing(dtype: torch.dtype) -> None:
        raise Unavailable("no gcc found")

    monkeypatch.setattr("minitf.backends.cpu.kernels.library", missing)
    assert not train_here("resume=moved", "trainer.compile=auto")  # on another machine it resumes without, and says so
    assert "backend reference instead of cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "where", "words"),
    [
        ("bf16", "minitf.system.cpuinfo.flags", "the processor has no AVX-512 BF16"),
        ("fp32", "minitf.backends.cpu.compiler.shutil.which", "no gcc found"),
    ],
)
def test_requiring_them_where_they_are_unavailable_is_an_error(
    workdir: Path,
    tiny: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    where: str,
    words: str,
) -> None:
    monkeypatch.setattr(where, lambda *name: None if name else set())
    settings = [f"trainer.precision={precision}", "trainer.compile=native", "run_dir=run"]
    bindings.library.cache_clear()
    try:
        assert train_here(*tiny, *settings) == 2
    finally:
        bindings.library.cache_clear()
    assert_one_line(capsys.readouterr().err, f"trainer.compile=native: {words}")
    assert not list(workdir.iterdir())  # found out before a directory is made


def test_models_they_cannot_train_have_a_reason(dtype: torch.dtype) -> None:
    model, kernels = model_of(), CpuKernels()
    model.compute_dtype = dtype
    assert kernels.unsupported(model) is None
    model.compute_dtype = torch.float64
    assert "do not compute in float64" in str(kernels.unsupported(model))
    assert "model.attention=sdpa" in str(kernels.unsupported(model_of(attention="sdpa")))
    assert "trainer.device=cpu" in str(kernels.unsupported(model_of().to("meta")))


def test_an_optimiser_computes_by_them_in_bfloat16_alone(dtype: torch.dtype) -> None:
    model = model_of()
    model.compute_dtype = dtype
    optimizer = Optimizer(model, OptimConfig(), dtype)
    CpuKernels().install(model, optimizer)
    names = [type(part).__name__ for part in (optimizer, *optimizer.optimizers)]
    assert names == (["CpuOptimizer", "CpuMuon", "AdamW"] if dtype == BF16 else ["Optimizer", "Muon", "AdamW"])
    Reference().install(model, optimizer)
    assert type(optimizer) is Optimizer
