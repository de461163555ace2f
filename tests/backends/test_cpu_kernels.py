"""The C kernels compute what attention.py, model.py, loss.py and optim.py compute, as exactly as their dtype allows."""

import ctypes
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_one_line, interrupt_at, losses, train_here
from helpers import random_tensor as random
from helpers import relative_error as off
from torch import Tensor

from minitf.attention import Attention, Linear, attend, causal_mask, packed_mask, rotary_table, rotate, segment_starts
from minitf.backends.cpu import bindings as calls
from minitf.backends.cpu import blocks as kernels
from minitf.backends.cpu import build as c_sources
from minitf.backends.cpu.muon import UPDATE
from minitf.loss import linear_cross_entropy
from minitf.model import FeedForward, ModelConfig, TrainingFunctions, Transformer
from minitf.optim import Muon, UpdateFunctions
from minitf.training.step import TrainingStep

BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("bf16_kernels")


@pytest.fixture(params=[BF16, torch.float32], ids=["bf16", "fp32"])
def dtype(request: pytest.FixtureRequest, bf16_kernels: None) -> torch.dtype:
    if isinstance(missing := calls.library(request.param), str):
        pytest.skip(missing)
    return request.param  # type: ignore[no-any-return]


def near(dtype: torch.dtype, tolerance: float) -> float:
    """How near is near enough: `tolerance` is that of bfloat16."""
    return tolerance if dtype == BF16 else 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 33), (200, 256)])
@pytest.mark.parametrize("adding", [True, False])
def test_the_norm_and_its_gradients(shape: tuple[int, int], adding: bool, dtype: torch.dtype) -> None:
    norm = torch.nn.RMSNorm(shape[1], eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * random(shape[1], seed=1))
    x, added = random(*shape, seed=2).to(dtype).requires_grad_(), random(*shape, seed=3).to(dtype).requires_grad_()
    gradients = random(*shape, seed=4).to(dtype), random(*shape, seed=5).to(dtype)
    total, normed = kernels.rms_norm(norm, x, added if adding else None)
    torch.autograd.backward([total, normed], gradients)

    exact = (x + added if adding else x).detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    wanted = F.rms_norm(exact, shape[1:], weight, 1e-6)
    torch.autograd.backward([exact * 1, wanted], [gradient.double() for gradient in gradients])
    torch.testing.assert_close(total.double(), exact)
    assert off(normed, wanted) < near(dtype, 0.004)
    for grad in (x.grad, added.grad) if adding else (x.grad,):
        assert grad is not None
        assert off(grad, exact.grad) < near(dtype, 0.004)
    assert off(norm.weight.grad, weight.grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (70, 64)])
def test_swiglu_and_its_gradient(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (4 * random(rows, 2 * width)).to(dtype).requires_grad_()
    with torch.no_grad():
        x[0, 0] = 80.0  # where a careless sigmoid overflows
        x[-1, width - 1] = -1e30
    dy = random(rows, width, seed=1).to(dtype)
    y = kernels.swiglu(x)
    y.backward(dy)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    wanted.backward(dy.double())
    assert off(y, wanted) < near(dtype, 0.004)
    assert off(x.grad, exact.grad) < near(dtype, 0.003)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_threads", [1, 2, 9])
@pytest.mark.parametrize(
    ("N", "C", "rows"),
    [
        (1, 1, (1,)),
        (7, 3, (5,)),
        (515, 40, (70,)),
        (300, 31, (32, 33)),
        (1024, 96, (64, 32, 32)),
        (70, 96, (32,)),
        (270, 32, (64, 96)),
    ],
)
def test_layers_of_one_input_and_their_gradients(
    N: int, C: int, rows: tuple[int, ...], num_threads: int, dtype: torch.dtype
) -> None:  # fmt: skip
    layers = [Linear(C, size) for size in rows]
    layers[-1].to(dtype)  # as FSDP hands them over
    x, dy = random(N, C).to(dtype).requires_grad_(), random(N, sum(rows), seed=1).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        y = kernels.linear(x, *layers)
        y.backward(dy)
    finally:
        torch.set_num_threads(before)
    exact, weight = x.detach().double(), torch.cat([layer.weight.detach().to(dtype).double() for layer in layers])
    assert off(y, exact @ weight.T) < near(dtype, 0.004)
    assert off(x.grad, dy.double() @ weight) < near(dtype, 0.004)  # type: ignore[arg-type]
    for layer, wanted in zip(layers, (dy.double().T @ exact).split(rows), strict=True):
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == layer.weight.dtype
        assert off(layer.weight.grad, wanted) < (0.004 if layer.weight.dtype == BF16 else 1e-6)


@pytest.mark.parametrize("num_threads", [1, 2, 9])
@pytest.mark.parametrize(("N", "D", "width", "adding"), [(1, 32, 64, True), (70, 96, 32, False), (515, 64, 160, True)])
def test_the_feed_forward_layer_and_its_gradients(N: int, D: int, width: int, adding: bool, num_threads: int) -> None:
    if isinstance(missing := calls.library(BF16), str):
        pytest.skip(missing)
    mlp, before = FeedForward(D, width), torch.get_num_threads()
    z, x, dy = (random(2, N, D, seed=seed).to(BF16) for seed in range(3))
    weights = [layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    exact = [t.detach().to(BF16).double().requires_grad_() for t in (z, x, *weights)]
    wanted = (F.silu(exact[0] @ exact[2].T) * (exact[0] @ exact[3].T)) @ exact[4].T + exact[1] * adding
    wanted.backward(dy.double())
    z.requires_grad_(), x.requires_grad_()
    try:
        torch.set_num_threads(num_threads)
        y = kernels.feed_forward(mlp, z, x if adding else None)
        y.backward(dy)
    finally:
        torch.set_num_threads(before)
    assert off(y, wanted) < 0.004
    assert off(z.grad, exact[0].grad) < 0.008  # type: ignore[arg-type]
    assert torch.equal(x.grad, dy) if adding else x.grad is None  # type: ignore[arg-type]
    for weight, theirs in zip(weights, exact[2:], strict=True):
        assert off(weight.grad, theirs.grad) < 0.005  # type: ignore[arg-type]


# B, T, heads, key heads, head width, normalised, packed
SHAPES = [
    (2, 256, 4, 4, 64, True, False),
    (1, 1, 2, 1, 2, False, False),
    (2, 67, 4, 2, 32, True, True),
    (1, 300, 6, 3, 48, False, True),
    (3, 130, 3, 3, 34, True, False),
    (1, 700, 2, 1, 64, True, True),
    (2, 5, 2, 2, 128, True, False),
]


def segments(B: int, T: int) -> Tensor:
    """Numbers of texts packed into rows, other cuts in each."""
    generator = torch.Generator().manual_seed(T)
    return (torch.rand(B, T, generator=generator) < 4 / T).long().cumsum(1)


def attend_plainly(attention: Attention, qkv_BTC: Tensor, rotary_2TK: Tensor, segments_BT: Tensor | None) -> Tensor:
    """From queries, keys and values to what is gathered, as attention.py has it, in the dtype of qkv."""
    (B, T), K, dtype = qkv_BTC.shape[:2], attention.head_dim, qkv_BTC.dtype
    sizes = [layer.out_features for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    q, k, v = (x.view(B, T, -1, K) for x in qkv_BTC.split(sizes, -1))
    q, k, v = (x.transpose(1, 2) for x in (attention.q_norm(q), attention.k_norm(k), v))
    mask = causal_mask(T, T, qkv_BTC.device, dtype)
    if segments_BT is not None:
        mask = packed_mask(segments_BT, segments_BT, dtype)
    mixed_BHTK = attend(*(rotate(x, rotary_2TK.to(dtype)) for x in (q, k)), v, mask)
    return mixed_BHTK.transpose(1, 2).reshape(B, T, -1)


@pytest.mark.parametrize(("B", "T", "H", "G", "K", "normalised", "packed"), SHAPES)
def test_attention_and_its_gradients(
    B: int, T: int, H: int, G: int, K: int, normalised: bool, packed: bool, dtype: torch.dtype
) -> None:
    attention = Attention(8, H, G, K, normalised)
    if normalised:
        with torch.no_grad():
            attention.q_norm.weight.copy_(1 + 0.3 * random(K, seed=1))  # type: ignore[operator]
            attention.k_norm.weight.copy_(1 + 0.3 * random(K, seed=2))  # type: ignore[operator]
    rotary_2TK = rotary_table(K, T, 100.0)
    segments_BT = segments(B, T) if packed else None
    visible = None if segments_BT is None else segment_starts(segments_BT)
    content, dmixed = (2 * random(B, T, (H + 2 * G) * K)).to(dtype), random(B, T, H * K, seed=3).to(dtype)

    def outcome(dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        attention.zero_grad()
        qkv_BTC = content.to(dtype, copy=True).requires_grad_()
        mixed_BTC = function(qkv_BTC)
        mixed_BTC.backward(dmixed.to(dtype))
        norms = [p.grad.clone() for n, p in attention.named_parameters() if "norm" in n and p.grad is not None]
        assert qkv_BTC.grad is not None
        assert len(norms) == 2 * normalised
        return [mixed_BTC.detach(), qkv_BTC.grad, *norms]

    exact = outcome(torch.float64, lambda qkv: attend_plainly(attention, qkv, rotary_2TK, segments_BT))
    found = outcome(dtype, lambda qkv: kernels.attend(attention, qkv, rotary_2TK, visible))
    plain = outcome(dtype, lambda qkv: attend_plainly(attention, qkv, rotary_2TK, segments_BT))
    for mine, theirs, wanted in zip(found, plain, exact, strict=True):
        assert off(mine, wanted) < near(dtype, 0.01)
        assert off(mine, wanted) <= off(theirs, wanted) + 1e-3  # sums in float32, fewer roundings on the way


def test_attention_withstands_scores_of_any_size(dtype: torch.dtype) -> None:
    attention = Attention(8, 1, 1, 32, False)
    qkv = (60 * random(1, 600, 96)).to(dtype)  # scores of some 20,000: all weight on one key
    mixed = kernels.attend(attention, qkv, rotary_table(32, 600, 1e4), None)
    q, k, v = qkv.double().split(32, -1)
    q, k = (rotate(x, rotary_table(32, 600, 1e4)).to(dtype).double() for x in (q, k))  # rounded where the kernel rounds
    scores = q @ k.mT / 32**0.5 + causal_mask(600, 600, q.device, torch.float64)
    assert off(mixed, torch.softmax(scores, -1) @ v) < near(dtype, 0.01)


@pytest.mark.parametrize("packed", [True, False])
def test_what_comes_later_or_belongs_to_another_text_changes_nothing(packed: bool, dtype: torch.dtype) -> None:
    attention, T = Attention(8, 4, 2, 32, True), 150
    segments_BT = segments(1, T) if packed else torch.zeros(1, T, dtype=torch.long)
    starts_BT, visible, cut = segment_starts(segments_BT), segment_starts(segments_BT), 90
    qkv = random(1, T, 8 * 32).to(dtype)
    before = kernels.attend(attention, qkv, rotary_table(32, T, 1e4), visible)
    changed = qkv.clone()
    changed[:, cut + 1 :] = 1e4
    changed[:, : int(starts_BT[0, cut])] = 7.0
    after = kernels.attend(attention, changed, rotary_table(32, T, 1e4), visible)
    own = slice(int(starts_BT[0, cut]), cut + 1)
    torch.testing.assert_close(after[:, own], before[:, own], rtol=0, atol=0)


@pytest.mark.parametrize("V", [3, 65, 1000])
def test_the_loss_and_its_gradients(V: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("minitf.loss.CHUNK_LOGITS", 40 * V)  # three chunks, whose gradients are added up
    x = random(2, 50, 16).to(dtype).requires_grad_()
    vocabulary = random(V, 16, seed=1).requires_grad_()
    targets = torch.randint(V, (2, 50), generator=torch.Generator().manual_seed(2))
    targets[0, 10:20] = -100
    weights = torch.rand(2, 50, generator=torch.Generator().manual_seed(3))
    inputs = (x, vocabulary)
    found = linear_cross_entropy(x, vocabulary, targets, kernels.chunk_loss, weights, kernels.add_product)
    gradients = torch.autograd.grad(found, inputs)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in inputs]
    wanted = linear_cross_entropy(*exact, targets, weights_BT=weights)  # type: ignore[arg-type, misc]
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=near(dtype, 0.003))
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, exact), strict=True):
        assert off(mine, theirs) < near(dtype, 0.01)


@pytest.mark.parametrize("dtype", calls.ARGUMENTS, ids=str)
def test_python_and_c_agree_on_the_arguments(dtype: torch.dtype) -> None:
    """Also where the processor cannot run them: an argument more or less is memory read at random."""
    files = c_sources.KERNELS[calls.PRECISIONS[dtype]]
    source = "".join((c_sources.PACKAGE / "kernels" / name).read_text(encoding="utf-8") for name in files)
    kinds = {"int64_t": ctypes.c_int64, "int": ctypes.c_int64, "float": ctypes.c_float}
    found = {}
    for name, parameters in re.findall(r"^void (\w+)\(([^)]*)\) {", source, re.MULTILINE):
        words = [parameter.replace("const ", "").split() for parameter in parameters.split(",")]
        found[name] = [ctypes.c_void_p if "*" in last else kinds[first] for first, *_, last in words]
    for name, types in calls.ARGUMENTS[dtype].items():
        assert [t if t in kinds.values() else ctypes.c_void_p for t in types] == found[name], name


def test_starts_say_what_the_mask_says() -> None:
    segments_BT = segments(3, 40)
    seen = packed_mask(segments_BT, segments_BT, torch.bool)
    positions = torch.arange(40)
    starts_BT = segment_starts(segments_BT)
    assert starts_BT.dtype == torch.int32
    by_start = (positions >= starts_BT[:, :, None]) & (positions <= positions[:, None])
    assert torch.equal(seen, by_start)


def model_of(**settings: object) -> Transformer:
    config = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**config, "context_length": 70, **settings}), 50)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.1)  # zero at the start, which would hide what is before
    return model


def gradients_of(model: Transformer, packed: bool) -> tuple[float, Tensor]:
    ids_BT = torch.randint(50, (3, 70), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    loss = model.loss(ids_BT, ids_BT.roll(-1, 1), segments(3, 70) if packed else None)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": False}, {"tie_embeddings": False, "intermediate_size": 40}])
def test_a_model_learns_the_same_by_them(settings: dict[str, object], packed: bool, dtype: torch.dtype) -> None:
    model = model_of(**settings)
    loss, exact = gradients_of(model, packed)
    model.compute_dtype = dtype
    plain_loss, plain = gradients_of(model, packed)
    model.functions = kernels.FUNCTIONS[dtype]
    native_loss, native = gradients_of(model, packed)
    assert native_loss == pytest.approx(loss, rel=near(dtype, 0.003))
    assert plain_loss == pytest.approx(loss, rel=near(dtype, 0.003))
    assert off(native, exact) < near(dtype, 0.03)
    assert off(native, exact) < max(1e-5, 1.1 * off(plain, exact))
    model.activation_checkpointing = True
    assert torch.equal(gradients_of(model, packed)[1], native)


@pytest.mark.parametrize("place", ["embedding", "k_norm", "one key", "late key"])
def test_what_is_no_number_shows(place: str, dtype: torch.dtype) -> None:
    if "key" in place:
        attention, qkv = Attention(8, 1, 1, 32, True), random(1, 400, 96).to(dtype)
        where = 3 if place == "one key" else 390
        qkv[0, where, 40] = float("nan")
        mixed = kernels.attend(attention, qkv, rotary_table(32, 400, 1e4), None)
        assert mixed[0, where:].isnan().any(dim=-1).all()
        assert not mixed[0, : where // 8 * 8].isnan().any()
        return
    model = model_of()
    model.compute_dtype, model.functions = dtype, kernels.FUNCTIONS[dtype]
    with torch.no_grad():
        if place == "embedding":
            model.model.embed_tokens.weight[49] = float("nan")  # type: ignore[index, union-attr]
        else:
            model.model.layers[0].self_attn.k_norm.weight[0] = float("nan")  # type: ignore[index, union-attr]
    ids_BT = torch.randint(49, (3, 70), generator=torch.Generator().manual_seed(5))  # without word 49
    assert model.loss(ids_BT, ids_BT.roll(-1, 1)).isnan()


def test_a_target_that_is_no_word_is_no_number(dtype: torch.dtype) -> None:
    logits, scales = random(2, 5).to(dtype), torch.ones(2)
    for target in (-1, 5, 1_000_000):
        loss, gradient = kernels.chunk_loss(logits, torch.tensor([2, target]), scales)
        assert loss.isnan()
        assert not gradient[1].any()


def test_a_model_in_another_precision_computes_without_them() -> None:
    model = model_of()
    ids_BT = torch.randint(50, (3, 70), generator=torch.Generator().manual_seed(5))
    expected = model.loss(ids_BT, ids_BT)
    model.functions = kernels.FUNCTIONS[BF16]  # as after training, while the model writes samples in float32
    assert torch.equal(model.loss(ids_BT, ids_BT), expected)
    assert torch.equal(model(ids_BT), model_of()(ids_BT))


def test_second_derivatives_are_refused(dtype: torch.dtype) -> None:
    x = random(4, 8).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad((kernels.swiglu(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


def test_evaluation_and_a_look_inside_agree_with_training(dtype: torch.dtype) -> None:
    model = model_of(dropout=0.5)
    model.compute_dtype, model.functions = dtype, kernels.FUNCTIONS[dtype]
    ids_BT = torch.randint(50, (3, 70), generator=torch.Generator().manual_seed(5))
    model.eval()
    with torch.no_grad():
        trained = model.hidden(ids_BT)
        weights: list[Tensor] = []
        looked_at = model.hidden(ids_BT, weights=weights)
    assert off(trained, looked_at) < near(dtype, 0.02)
    assert len(weights) == 2
    model.train()
    assert off(model.hidden(ids_BT).detach(), looked_at) > 0.1  # dropout


def test_neither_threads_nor_repetition_change_a_bit(dtype: torch.dtype) -> None:
    attention, norm = Attention(8, 4, 4, 32, True), torch.nn.RMSNorm(8, eps=1e-6)
    before, outcomes = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            attention.zero_grad()
            norm.zero_grad()
            qkv = random(3, 200, 3 * 128).to(dtype).requires_grad_()
            x = random(500, 8).to(dtype).requires_grad_()
            mixed = kernels.attend(attention, qkv, rotary_table(32, 200, 1e4), None)
            mixed.backward(random(3, 200, 128, seed=1).to(dtype))
            kernels.rms_norm(norm, x)[1].backward(random(500, 8, seed=2).to(dtype))  # type: ignore[no-untyped-call]
            weights = [attention.q_norm.weight.grad.clone(), norm.weight.grad.clone()]  # type: ignore[union-attr, operator]
            outcomes.append([mixed.detach(), qkv.grad, *weights])
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))  # type: ignore[arg-type]


# -- the choice ------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_them(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    precision = {BF16: "bf16", torch.float32: "fp32"}[dtype]
    short = [
        *tiny,
        f"trainer.precision={precision}",
        "trainer.max_steps=6",
        "trainer.eval_every=6",
        "trainer.eval_tokens=64",
        "trainer.log_every=1",
        "trainer.save_every=3",
    ]
    assert not train_here(*short, "trainer.compile=native", "run_dir=native")
    assert "native attention" in (printed := capsys.readouterr().err)
    assert "compile    by our C kernels: a step takes" in printed
    assert not train_here(*short, "trainer.compile=native", "run_dir=again")
    assert not train_here(*short, "trainer.compile=false", "run_dir=plain")
    assert losses("again") == losses("native")
    assert [row[2] for row in losses("plain")] == pytest.approx([row[2] for row in losses("native")], rel=0.01)
    choices = json.loads(Path("native/choices.json").read_text(encoding="utf-8"))
    assert choices["compile"] == "native"

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        train_here(*short, "trainer.compile=native", "run_dir=resumed")
        train_here(*short, "trainer.compile=native", "run_dir=moved")
    assert not train_here("resume=resumed", "trainer.compile=auto")
    assert losses("resumed") == losses("native")

    monkeypatch.setattr("minitf.backends.cpu.blocks.library", lambda dtype: "no gcc found")
    assert not train_here("resume=moved", "trainer.compile=auto")  # elsewhere it goes on without, and says so
    assert "compile false instead of native" in capsys.readouterr().err


@pytest.mark.parametrize(("native_s", "taken"), [(0.5, True), (1.1, True), (2.0, False)])
def test_a_run_takes_them_unless_they_are_slower(
    native_s: float, taken: bool, workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype,
) -> None:  # fmt: skip
    used, finish = [], Muon._finish
    monkeypatch.setattr(Muon, "_finish", lambda muon, *rest: (used.append(muon.functions), finish(muon, *rest)))
    monkeypatch.setattr(TrainingStep, "measure", lambda step, most: native_s if step.model.functions.dtype else 1.0)
    precision = {BF16: "bf16", torch.float32: "fp32"}[dtype]
    assert not train_here(*tiny, f"trainer.precision={precision}", "trainer.compile=auto", "trainer.max_steps=2")
    assert ("compile    by our C kernels: a step takes" in capsys.readouterr().err) == taken
    assert used[-1] == (UPDATE if taken and dtype == BF16 else UpdateFunctions())


@pytest.mark.parametrize(
    ("precision", "where", "words"),
    [
        ("bf16", "minitf.system.cpuinfo.flags", "the processor has no AVX-512 BF16"),
        ("fp32", "minitf.backends.cpu.compiler.shutil.which", "no gcc found"),
    ],
)
def test_where_there_are_none_asking_for_them_is_an_error(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    precision: str, where: str, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(where, lambda *name: None if name else set())
    settings = [f"trainer.precision={precision}", "trainer.compile=native", "run_dir=run"]
    calls.library.cache_clear()
    try:
        assert train_here(*tiny, *settings) == 2
    finally:
        calls.library.cache_clear()
    assert_one_line(capsys.readouterr().err, f"trainer.compile=native: {words}")
    assert not list(workdir.iterdir())  # found out before a directory is made


def test_what_they_cannot_serve_has_a_reason(dtype: torch.dtype) -> None:
    model = model_of()
    model.compute_dtype = dtype
    assert kernels.unsupported(model) is None
    assert isinstance(model.functions, TrainingFunctions)
    model.compute_dtype = torch.float64
    assert "do not compute in float64" in str(kernels.unsupported(model))
    assert "model.attention=sdpa" in str(kernels.unsupported(model_of(attention="sdpa")))
    assert "trainer.device=cpu" in str(kernels.unsupported(model_of().to("meta")))
