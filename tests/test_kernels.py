"""The C kernels compute what attention.py, model.py, loss.py and optim.py compute, as exactly as bfloat16 allows."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import train_here
from test_train import assert_one_line, interrupt_at, losses
from torch import Tensor

from minitf import kernels
from minitf.attention import Attention, Linear, attend, causal_mask, packed_mask, rotary_table, rotate, segment_starts
from minitf.kernels import calls
from minitf.loss import linear_cross_entropy
from minitf.model import ModelConfig, TrainingFunctions, Transformer
from minitf.optim import Muon, MuonFunctions, average_gradients, move_weights, orthogonalise
from minitf.training_step import TrainingStep

BF16 = torch.bfloat16
needed = pytest.mark.skipif(isinstance(calls.library(), str), reason=f"no kernels here: {calls.library()}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@needed
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 33), (200, 256)])
@pytest.mark.parametrize("adding", [True, False])
def test_the_norm_and_its_gradients(shape: tuple[int, int], adding: bool) -> None:
    norm = torch.nn.RMSNorm(shape[1], eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * random(shape[1], seed=1))
    x, added = random(*shape, seed=2).to(BF16).requires_grad_(), random(*shape, seed=3).to(BF16).requires_grad_()
    gradients = random(*shape, seed=4).to(BF16), random(*shape, seed=5).to(BF16)
    total, normed = kernels.rms_norm(norm, x, added if adding else None)
    torch.autograd.backward([total, normed], gradients)

    exact = (x + added if adding else x).detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    wanted = F.rms_norm(exact, shape[1:], weight, 1e-6)
    torch.autograd.backward([exact * 1, wanted], [gradient.double() for gradient in gradients])
    torch.testing.assert_close(total.double(), exact)
    assert off(normed, wanted) < 0.004
    for grad in (x.grad, added.grad) if adding else (x.grad,):
        assert grad is not None
        assert off(grad, exact.grad) < 0.004
    assert off(norm.weight.grad, weight.grad) < 1e-5  # type: ignore[arg-type]


@needed
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (70, 64)])
def test_swiglu_and_its_gradient(rows: int, width: int) -> None:
    x = (4 * random(rows, 2 * width)).to(BF16).requires_grad_()
    with torch.no_grad():
        x[0, 0] = 80.0  # where a careless sigmoid overflows
        x[-1, width - 1] = -1e30
    dy = random(rows, width, seed=1).to(BF16)
    y = kernels.swiglu(x)
    y.backward(dy)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    wanted.backward(dy.double())
    assert off(y, wanted) < 0.004
    assert off(x.grad, exact.grad) < 0.003  # type: ignore[arg-type]


@needed
@pytest.mark.parametrize("num_threads", [1, 2, 9])
@pytest.mark.parametrize(
    ("N", "C", "rows"), [(1, 1, (1,)), (7, 3, (5,)), (515, 40, (70,)), (300, 31, (32, 33)), (1024, 96, (64, 32, 32))]
)
def test_layers_of_one_input_and_their_gradients(N: int, C: int, rows: tuple[int, ...], num_threads: int) -> None:
    layers = [Linear(C, size) for size in rows]
    layers[-1].to(BF16)  # as FSDP hands them over
    x, dy = random(N, C).to(BF16).requires_grad_(), random(N, sum(rows), seed=1).to(BF16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        y = kernels.linear(x, *layers)
        y.backward(dy)
    finally:
        torch.set_num_threads(before)
    exact, weight = x.detach().double(), torch.cat([layer.weight.detach().to(BF16).double() for layer in layers])
    assert off(y, exact @ weight.T) < 0.004
    assert off(x.grad, dy.double() @ weight) < 0.004  # type: ignore[arg-type]
    for layer, wanted in zip(layers, (dy.double().T @ exact).split(rows), strict=True):
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == layer.weight.dtype
        assert off(layer.weight.grad, wanted) < (0.004 if layer.weight.dtype == BF16 else 1e-6)


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


@needed
@pytest.mark.parametrize(("B", "T", "H", "G", "K", "normalised", "packed"), SHAPES)
def test_attention_and_its_gradients(B: int, T: int, H: int, G: int, K: int, normalised: bool, packed: bool) -> None:
    attention = Attention(8, H, G, K, normalised)
    if normalised:
        with torch.no_grad():
            attention.q_norm.weight.copy_(1 + 0.3 * random(K, seed=1))  # type: ignore[operator]
            attention.k_norm.weight.copy_(1 + 0.3 * random(K, seed=2))  # type: ignore[operator]
    rotary_2TK = rotary_table(K, T, 100.0)
    segments_BT = segments(B, T) if packed else None
    starts_BT = None if segments_BT is None else segment_starts(segments_BT)
    content, dmixed = (2 * random(B, T, (H + 2 * G) * K)).to(BF16), random(B, T, H * K, seed=3).to(BF16)

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
    found = outcome(BF16, lambda qkv: kernels.attend(attention, qkv, rotary_2TK, starts_BT))
    plain = outcome(BF16, lambda qkv: attend_plainly(attention, qkv, rotary_2TK, segments_BT))
    for mine, theirs, wanted in zip(found, plain, exact, strict=True):
        assert off(mine, wanted) < 0.01
        assert off(mine, wanted) <= off(theirs, wanted) + 1e-3  # sums in float32, fewer roundings on the way


@needed
def test_attention_withstands_scores_of_any_size() -> None:
    attention = Attention(8, 1, 1, 32, False)
    qkv = (60 * random(1, 600, 96)).to(BF16)  # scores of some 20,000: all weight on one key
    mixed = kernels.attend(attention, qkv, rotary_table(32, 600, 1e4), None)
    q, k, v = qkv.double().split(32, -1)
    q, k = (rotate(x, rotary_table(32, 600, 1e4)).to(BF16).double() for x in (q, k))  # rounded where the kernel rounds
    scores = q @ k.mT / 32**0.5 + causal_mask(600, 600, q.device, torch.float64)
    assert off(mixed, torch.softmax(scores, -1) @ v) < 0.01


@needed
@pytest.mark.parametrize("packed", [True, False])
def test_what_comes_later_or_belongs_to_another_text_changes_nothing(packed: bool) -> None:
    attention, T = Attention(8, 4, 2, 32, True), 150
    segments_BT = segments(1, T) if packed else torch.zeros(1, T, dtype=torch.long)
    starts_BT, cut = segment_starts(segments_BT), 90
    qkv = random(1, T, 8 * 32).to(BF16)
    before = kernels.attend(attention, qkv, rotary_table(32, T, 1e4), starts_BT)
    changed = qkv.clone()
    changed[:, cut + 1 :] = 1e4
    changed[:, : int(starts_BT[0, cut])] = 7.0
    after = kernels.attend(attention, changed, rotary_table(32, T, 1e4), starts_BT)
    own = slice(int(starts_BT[0, cut]), cut + 1)
    torch.testing.assert_close(after[:, own], before[:, own], rtol=0, atol=0)


@needed
@pytest.mark.parametrize("V", [3, 65, 1000])
def test_the_loss_and_its_gradients(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitf.loss.CHUNK_LOGITS", {"cpu": 40 * V})  # three chunks, whose gradients are added up
    x = random(2, 50, 16).to(BF16).requires_grad_()
    vocabulary = random(V, 16, seed=1).requires_grad_()
    targets = torch.randint(V, (2, 50), generator=torch.Generator().manual_seed(2))
    targets[0, 10:20] = -100
    weights = torch.rand(2, 50, generator=torch.Generator().manual_seed(3))
    inputs = (x, vocabulary)
    found = linear_cross_entropy(x, vocabulary, targets, kernels.chunk_loss, weights, kernels.add_product)
    gradients = torch.autograd.grad(found, inputs)
    exact = [t.detach().to(BF16).double().requires_grad_() for t in inputs]
    wanted = linear_cross_entropy(*exact, targets, weights_BT=weights)  # type: ignore[arg-type, misc]
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=0.003)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, exact), strict=True):
        assert off(mine, theirs) < 0.01


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


@needed
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": False}, {"tie_embeddings": False, "intermediate_size": 40}])
def test_a_model_learns_the_same_by_them(settings: dict[str, object], packed: bool) -> None:
    model = model_of(**settings)
    loss, exact = gradients_of(model, packed)
    model.compute_dtype = BF16
    plain_loss, plain = gradients_of(model, packed)
    model.functions = kernels.FUNCTIONS
    native_loss, native = gradients_of(model, packed)
    assert native_loss == pytest.approx(loss, rel=0.003)
    assert plain_loss == pytest.approx(loss, rel=0.003)
    assert off(native, exact) < 0.03
    assert off(native, exact) < 1.1 * off(plain, exact)
    model.activation_checkpointing = True
    assert torch.equal(gradients_of(model, packed)[1], native)


@needed
@pytest.mark.parametrize("place", ["embedding", "k_norm", "one key", "late key"])
def test_what_is_no_number_shows(place: str) -> None:
    if "key" in place:
        attention, qkv = Attention(8, 1, 1, 32, True), random(1, 400, 96).to(BF16)
        where = 3 if place == "one key" else 390
        qkv[0, where, 40] = float("nan")
        mixed = kernels.attend(attention, qkv, rotary_table(32, 400, 1e4), None)
        assert mixed[0, where:].isnan().any(dim=-1).all()
        assert not mixed[0, : where // 8 * 8].isnan().any()
        return
    model = model_of()
    model.compute_dtype, model.functions = BF16, kernels.FUNCTIONS
    with torch.no_grad():
        if place == "embedding":
            model.model.embed_tokens.weight[49] = float("nan")  # type: ignore[index, union-attr]
        else:
            model.model.layers[0].self_attn.k_norm.weight[0] = float("nan")  # type: ignore[index, union-attr]
    ids_BT = torch.randint(49, (3, 70), generator=torch.Generator().manual_seed(5))  # without word 49
    assert model.loss(ids_BT, ids_BT.roll(-1, 1)).isnan()


@needed
def test_a_target_that_is_no_word_is_no_number() -> None:
    logits, scales = random(2, 5).to(BF16), torch.ones(2)
    for target in (-1, 5, 1_000_000):
        loss, gradient = kernels.chunk_loss(logits, torch.tensor([2, target]), scales)
        assert loss.isnan()
        assert not gradient[1].any()


@needed
def test_a_model_in_another_precision_computes_without_them() -> None:
    model = model_of()
    ids_BT = torch.randint(50, (3, 70), generator=torch.Generator().manual_seed(5))
    expected = model.loss(ids_BT, ids_BT)
    model.functions = kernels.FUNCTIONS  # as after training, while the model writes samples in float32
    assert torch.equal(model.loss(ids_BT, ids_BT), expected)
    assert torch.equal(model(ids_BT), model_of()(ids_BT))


@needed
def test_second_derivatives_are_refused() -> None:
    x = random(4, 8).to(BF16).requires_grad_()
    (gradient,) = torch.autograd.grad((kernels.swiglu(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


@needed
def test_evaluation_and_a_look_inside_agree_with_training() -> None:
    model = model_of(dropout=0.5)
    model.compute_dtype, model.functions = BF16, kernels.FUNCTIONS
    ids_BT = torch.randint(50, (3, 70), generator=torch.Generator().manual_seed(5))
    model.eval()
    with torch.no_grad():
        trained = model.hidden(ids_BT)
        weights: list[Tensor] = []
        looked_at = model.hidden(ids_BT, weights=weights)
    assert off(trained, looked_at) < 0.02
    assert len(weights) == 2
    model.train()
    assert off(model.hidden(ids_BT).detach(), looked_at) > 0.1  # dropout


@needed
def test_neither_threads_nor_repetition_change_a_bit() -> None:
    attention, norm = Attention(8, 4, 4, 32, True), torch.nn.RMSNorm(8, eps=1e-6)
    before, outcomes = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            attention.zero_grad()
            norm.zero_grad()
            qkv = random(3, 200, 3 * 128).to(BF16).requires_grad_()
            x = random(500, 8).to(BF16).requires_grad_()
            mixed = kernels.attend(attention, qkv, rotary_table(32, 200, 1e4), None)
            mixed.backward(random(3, 200, 128, seed=1).to(BF16))
            kernels.rms_norm(norm, x)[1].backward(random(500, 8, seed=2).to(BF16))  # type: ignore[no-untyped-call]
            updates = kernels.muon_orthogonalise(random(3, 70, 40), BF16)
            weights = [attention.q_norm.weight.grad.clone(), norm.weight.grad.clone()]  # type: ignore[union-attr, operator]
            outcomes.append([mixed.detach(), qkv.grad, *weights, updates])
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))  # type: ignore[arg-type]


# -- Muon ------------------------------------------------------------------------------------------------------------


@needed
@pytest.mark.parametrize("shape", [(1, 1), (40, 17), (96, 64), (33, 4096)])
def test_gradients_are_averaged_and_weights_move(shape: tuple[int, int]) -> None:
    gradients = [random(*shape, seed=1), random(*shape[::-1], seed=2).mT]  # the second lies elsewise
    averages = [random(2, *shape, seed=3) for _ in range(2)]
    ahead = kernels.muon_average(list(gradients), averages[0], 0.9, BF16)
    torch.testing.assert_close(
        ahead.float(), average_gradients(gradients, averages[1], 0.9, BF16), rtol=0.005, atol=0.005
    )
    torch.testing.assert_close(*averages)
    weights = [[random(*shape, seed=seed) for seed in (4, 5)] for _ in range(2)]
    kernels.muon_move(weights[0], ahead, 0.99, 0.3)
    move_weights(weights[1], ahead, 0.99, 0.3)
    torch.testing.assert_close(weights[0], weights[1])


def spectrum(kind: str, N: int, R: int, C: int) -> Tensor:
    """Matrices of random singular vectors; "flat" are of random numbers."""
    if kind == "flat":
        return random(N, R, C)
    K = min(R, C)
    U, V = torch.linalg.qr(random(N, R, K, seed=1))[0], torch.linalg.qr(random(N, C, K, seed=2))[0]
    falling = {
        "steep": torch.logspace(0, -4, K),
        "low rank": (torch.arange(K) < max(1, K // 8)).float(),
        "ruled": torch.where(
            torch.arange(K) == 0, 1, 0.2 * torch.logspace(0, -2, K)
        ),  # by one direction: early gradients
    }[kind]
    return 1e-3 * (U * falling) @ V.mT


@needed
@pytest.mark.parametrize("kind", ["flat", "steep", "low rank", "ruled"])
@pytest.mark.parametrize(
    "shape", [(32, 32), (96, 32), (256, 704), (704, 256), (100, 70), (7, 200), (1, 40), (5, 1), (128, 32)]
)
def test_matrices_are_orthogonalised_as_well_as_by_full_products(shape: tuple[int, int], kind: str) -> None:
    matrices = spectrum(kind, max(8, torch.get_num_threads()), *shape).to(BF16)
    exact = orthogonalise(matrices, torch.float64)
    native, plain = kernels.muon_orthogonalise(matrices, BF16), orthogonalise(matrices, BF16)
    if kind != "low rank":  # of few directions each weighs much, and any value from 0.79 to 1.21 is as good
        assert off(native, exact) < (0.03 if kind == "flat" else 0.07) + off(plain, exact)
    # Rounding gives directions without a gradient a little of one; it must not grow. The polynomials end below 1.21.
    assert torch.linalg.matrix_norm(native.double(), 2).max() < 1.27
    # How near it comes to U V^T, which is the point of it.
    U, _, Vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    if kind == "flat":
        near = [torch.cosine_similarity(x.double().flatten(1), (U @ Vh).flatten(1)).min() for x in (native, exact)]
        assert near[0] > near[1] - 0.003


@needed
def test_no_matrix_leaks_into_another_and_nothing_stays_nothing() -> None:
    count = max(3, torch.get_num_threads())
    matrices = random(count, 48, 80).to(BF16)
    before = kernels.muon_orthogonalise(matrices, BF16)
    matrices[0], matrices[1] = 0, float("nan")
    after = kernels.muon_orthogonalise(matrices, BF16)
    assert torch.equal(after[2:], before[2:])
    assert not after[0].any()
    assert after[1].isnan().all()


@needed
def test_with_more_threads_than_matrices_pytorch_shares_one_out() -> None:
    before, matrices = torch.get_num_threads(), random(2, 24, 40)
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.muon_orthogonalise(matrices, BF16), orthogonalise(matrices, BF16))
    finally:
        torch.set_num_threads(before)


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    calls.library.cache_clear()
    monkeypatch.setattr("minitf.kernels.calls._processor_flags", lambda: {"sse2"})
    yield
    calls.library.cache_clear()


@needed
def test_a_run_goes_on_with_them(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [*tiny, "trainer.precision=bf16", "trainer.max_steps=6", "trainer.log_every=1", "trainer.save_every=3"]
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

    calls.library.cache_clear()
    monkeypatch.setattr("minitf.kernels.calls._processor_flags", lambda: set())
    try:  # elsewhere it goes on without, and says so
        assert not train_here("resume=moved", "trainer.compile=auto")
    finally:
        calls.library.cache_clear()
    assert "compile false instead of native" in capsys.readouterr().err


@needed
@pytest.mark.parametrize(("native_s", "taken"), [(0.5, True), (1.1, True), (2.0, False)])
def test_a_run_takes_them_unless_they_are_slower(
    native_s: float, taken: bool, workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    used, finish = [], Muon._finish
    monkeypatch.setattr(Muon, "_finish", lambda muon, *rest: (used.append(muon.functions), finish(muon, *rest)))
    monkeypatch.setattr(TrainingStep, "measure", lambda step, most: native_s if step.model.functions.dtype else 1.0)
    assert not train_here(*tiny, "trainer.precision=bf16", "trainer.compile=auto", "trainer.max_steps=2")
    assert ("compile    by our C kernels: a step takes" in capsys.readouterr().err) == taken
    assert used[-1] == (kernels.MUON if taken else MuonFunctions())


def test_where_there_are_none_asking_for_them_is_an_error(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], without_kernels: None
) -> None:
    settings = ["trainer.precision=bf16", "trainer.compile=native", "run_dir=run"]
    assert train_here(*tiny, *settings) == 2
    assert_one_line(capsys.readouterr().err, "trainer.compile=native: the processor has no AVX-512 BF16")
    assert not list(workdir.iterdir())  # found out before a directory is made


@needed
def test_what_they_cannot_serve_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert "set trainer.precision=bf16" in str(kernels.obstacle(model))
    model.compute_dtype = BF16
    assert kernels.obstacle(model) is None
    assert "model.attention=sdpa" in str(kernels.obstacle(model_with(attention="sdpa")))
    assert isinstance(model.functions, TrainingFunctions)
    calls.library.cache_clear()
    monkeypatch.setattr("minitf.c_library.shutil.which", lambda name: None)
    try:
        assert kernels.obstacle(model) == "no gcc found"
    finally:
        calls.library.cache_clear()


def model_with(**settings: object) -> Transformer:
    model = model_of(**settings)
    model.compute_dtype = BF16
    return model
