"""Every set of kernels computes the outputs and gradients of plain PyTorch, as exactly as its dtype allows."""

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from backends.kernel_sets import Kernels
from helpers import not_applicable
from helpers import random_tensor as random
from helpers import relative_error as off
from torch import Tensor

from minitf.attention import Attention, AttentionContext, Linear, visible_keys
from minitf.backends.cpu import bindings
from minitf.backends.cpu.kernels import CpuKernels, segment_starts
from minitf.loss import IGNORED
from minitf.model import FeedForward
from minitf.rope import rotary_table, rotate


@pytest.mark.parametrize("adding", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (66, 33), (3, 256)])
def test_rms_norm(shape: tuple[int, int], adding: bool, kernels: Kernels) -> None:
    norm = torch.nn.RMSNorm(shape[1], eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * random(shape[1], seed=1))
    x, added, dtotal, dnormed = (random(*shape, seed=seed).to(kernels.dtype) for seed in range(2, 6))
    x.requires_grad_(), added.requires_grad_()
    total, normed = kernels.fused.rms_norm(norm, x, added if adding else None)
    torch.autograd.backward([total, normed], [dtotal, dnormed])

    exact = (x + added if adding else x).detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    expected = F.rms_norm(exact, shape[1:], weight, 1e-6)
    torch.autograd.backward([exact * 1, expected], [dtotal.double(), dnormed.double()])
    torch.testing.assert_close(total.double(), exact)
    assert off(normed, expected) < kernels.tolerance(0.004)
    for grad in (x.grad, added.grad) if adding else (x.grad,):
        assert off(grad, exact.grad) < kernels.tolerance(0.004)  # type: ignore[arg-type]
    assert off(norm.weight.grad, weight.grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (9, 64)])
def test_swiglu(rows: int, width: int, kernels: Kernels) -> None:
    x = (4 * random(rows, 2 * width)).to(kernels.dtype).requires_grad_()
    with torch.no_grad():
        x[0, 0] = 80.0  # where a careless sigmoid overflows
        x[-1, width - 1] = -1e30
    dy = random(rows, width, seed=1).to(kernels.dtype)
    y = kernels.fused.swiglu(x)
    y.backward(dy)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    expected.backward(dy.double())
    assert off(y, expected) < kernels.tolerance(0.004)
    assert off(x.grad, exact.grad) < kernels.tolerance(0.003)  # type: ignore[arg-type]


@pytest.mark.usefixtures("with_threads")
@pytest.mark.parametrize(
    ("N", "C", "rows"),
    [(1, 1, (1,)), (515, 40, (70,)), (70, 31, (32, 33)), (290, 96, (64, 32, 32)), (70, 96, (32,)), (270, 32, (64, 96))],
)
def test_linear_layers_of_one_input(N: int, C: int, rows: tuple[int, ...], kernels: Kernels) -> None:
    layers = [Linear(C, size) for size in rows]
    if kernels.in_c:
        layers[-1].to(kernels.dtype)  # as FSDP passes them
    x, dy = random(N, C).to(kernels.dtype).requires_grad_(), random(N, sum(rows), seed=1).to(kernels.dtype)
    exact = x.detach().double()
    weight = torch.cat([layer.weight.detach().to(kernels.dtype).double() for layer in layers])
    for num_threads in (1, 2, 9):
        torch.set_num_threads(num_threads)
        x.grad = None
        for layer in layers:
            layer.zero_grad()
        y = kernels.fused.linear(x, *layers)
        y.backward(dy)
        assert off(y, exact @ weight.T) < kernels.tolerance(0.004)
        assert off(x.grad, dy.double() @ weight) < kernels.tolerance(0.004)  # type: ignore[arg-type]
        for layer, expected in zip(layers, (dy.double().T @ exact).split(rows), strict=True):
            gradient = layer.weight.grad
            assert gradient is not None
            assert gradient.dtype == layer.weight.dtype
            rounded = layer.weight.dtype == torch.bfloat16 or not kernels.in_c
            assert off(gradient, expected) < (kernels.tolerance(0.004) if rounded else 1e-6)


@pytest.mark.usefixtures("with_threads")
@pytest.mark.parametrize(("N", "D", "width", "adding"), [(1, 32, 64, True), (70, 96, 32, False), (515, 64, 160, True)])
def test_feed_forward(N: int, D: int, width: int, adding: bool, bf16_kernels: Kernels) -> None:
    mlp = FeedForward(D, width)
    z, x, dy = (random(2, N, D, seed=seed).bfloat16() for seed in range(3))
    weights = [layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (z, x, *weights)]
    expected = (F.silu(exact[0] @ exact[2].T) * (exact[0] @ exact[3].T)) @ exact[4].T + exact[1] * adding
    expected.backward(dy.double())
    z.requires_grad_(), x.requires_grad_()
    for num_threads in (1, 2, 9):
        torch.set_num_threads(num_threads)
        z.grad = x.grad = None
        mlp.zero_grad()
        y = bf16_kernels.fused.feed_forward(mlp, z, x if adding else None)
        y.backward(dy)
        assert off(y, expected) < 0.004
        assert off(z.grad, exact[0].grad) < 0.008  # type: ignore[arg-type]
        assert torch.equal(x.grad, dy) if adding else x.grad is None  # type: ignore[arg-type]
        for weight, theirs in zip(weights, exact[2:], strict=True):
            assert off(weight.grad, theirs.grad) < 0.005  # type: ignore[arg-type]


# -- attention -------------------------------------------------------------------------------------------------------

# B, T, heads, key heads, head width, qk_norm, packed: less than a tile; odd widths; one, two and three blocks of keys
SHAPES = [
    (1, 1, 2, 1, 2, False, False),
    (2, 5, 2, 2, 128, True, False),
    (1, 20, 4, 2, 16, True, True),
    (2, 67, 4, 2, 32, True, True),
    (1, 130, 3, 3, 34, True, False),
    (1, 256, 2, 2, 64, True, False),
    (1, 300, 6, 3, 48, False, True),
    (1, 530, 2, 1, 64, True, True),
]


def segments(B: int, T: int) -> Tensor:
    """The text that each token belongs to; every row is cut elsewhere."""
    generator = torch.Generator().manual_seed(T)
    return (torch.rand(B, T, generator=generator) < 4 / T).long().cumsum(1)


def attend_plainly(attention: Attention, qkv_BTC: Tensor, rotary_2TK: Tensor, segments_BT: Tensor | None) -> Tensor:
    """norm, rotate, match, weigh, gather of attention.py, in the dtype of qkv."""
    (B, T), K, dtype = qkv_BTC.shape[:2], attention.head_dim, qkv_BTC.dtype
    sizes = [layer.out_features for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    q, k, v = (x.view(B, T, -1, K) for x in qkv_BTC.split(sizes, -1))
    q, k, v = (x.transpose(1, 2) for x in (attention.q_norm(q), attention.k_norm(k), v))
    context = AttentionContext(rotary_2TK, dtype, segments_BT)
    mixed_BHTK = attention.attend(rotate(q, rotary_2TK), rotate(k, rotary_2TK), v, context, 0)
    return mixed_BHTK.transpose(1, 2).reshape(B, T, -1)


@pytest.mark.parametrize(("B", "T", "H", "G", "K", "normalised", "packed"), SHAPES)
def test_attention(
    B: int, T: int, H: int, G: int, K: int, normalised: bool, packed: bool, kernels: Kernels
) -> None:  # fmt: skip
    if not kernels.in_c and T > 20:
        not_applicable("Triton's interpreter is slow")
    attention = Attention(8, H, G, K, normalised)
    if normalised:
        with torch.no_grad():
            attention.q_norm.weight.copy_(1 + 0.3 * random(K, seed=1))  # type: ignore[operator]
            attention.k_norm.weight.copy_(1 + 0.3 * random(K, seed=2))  # type: ignore[operator]
    rotary_2TK = rotary_table(K, T, 100.0)
    segments_BT = segments(B, T) if packed else None
    content, dmixed = 2 * random(B, T, (H + 2 * G) * K), random(B, T, H * K, seed=3)
    content, dmixed = content.to(kernels.dtype), dmixed.to(kernels.dtype)

    def outcome(dtype: torch.dtype, function: Callable[..., Tensor]) -> list[Tensor]:
        attention.zero_grad()
        qkv_BTC = content.to(dtype, copy=True).requires_grad_()
        mixed_BTC = function(attention, qkv_BTC, rotary_2TK, segments_BT)
        mixed_BTC.backward(dmixed.to(dtype))
        norms = [p.grad.clone() for n, p in attention.named_parameters() if "norm" in n and p.grad is not None]
        assert qkv_BTC.grad is not None
        assert len(norms) == 2 * normalised
        return [mixed_BTC.detach(), qkv_BTC.grad, *norms]

    exact = outcome(torch.float64, attend_plainly)
    plain = outcome(kernels.dtype, attend_plainly)
    for mine, theirs, expected in zip(outcome(kernels.dtype, kernels.attend), plain, exact, strict=True):
        assert off(mine, expected) < kernels.tolerance(0.01)
        assert off(mine, expected) <= off(theirs, expected) + 1e-3  # sums in float32, fewer roundings on the way


def test_attention_is_exact_with_large_scores(kernels: Kernels) -> None:
    T = 300 if kernels.in_c else 20
    attention, rotary_2TK = Attention(8, 1, 1, 32, False), rotary_table(32, T, 1e4)
    qkv = (60 * random(1, T, 96)).to(kernels.dtype)  # scores of about 20,000: all weight on one key
    mixed = kernels.attend(attention, qkv, rotary_2TK)
    q, k, v = qkv.double().split(32, -1)
    q, k = (rotate(x, rotary_2TK).to(kernels.dtype).double() for x in (q, k))  # rounded where the kernels round
    future = ~visible_keys(T, T, q.device)
    scores = (q @ k.mT / 32**0.5).masked_fill(future, -torch.inf)
    assert off(mixed, torch.softmax(scores, -1) @ v) < kernels.tolerance(0.01)


@pytest.mark.parametrize("packed", [True, False])
def test_attention_is_causal_and_respects_segments(packed: bool, kernels: Kernels) -> None:
    T, cut = (150, 90) if kernels.in_c else (12, 8)
    attention, rotary_2TK = Attention(8, 4, 2, 32, True), rotary_table(32, T, 1e4)
    segments_BT = segments(1, T) if packed else torch.zeros(1, T, dtype=torch.long)
    start = int(segment_starts(segments_BT)[0, cut])
    assert start > 0 or not packed
    qkv = random(1, T, 8 * 32).to(kernels.dtype)
    before = kernels.attend(attention, qkv, rotary_2TK, segments_BT)
    changed = qkv.clone()
    changed[:, cut + 1 :] = 1e4
    changed[:, :start] = 7.0
    after = kernels.attend(attention, changed, rotary_2TK, segments_BT)
    torch.testing.assert_close(after[:, start : cut + 1], before[:, start : cut + 1], rtol=0, atol=0)


@pytest.mark.parametrize("key", [3, 290])
def test_nan_in_a_key_reaches_all_later_queries(key: int, kernels: Kernels) -> None:
    T = 300 if kernels.in_c else key + 8
    if T > 300 or (not kernels.in_c and key > 3):
        not_applicable("Triton's interpreter is slow")
    qkv = random(1, T, 96).to(kernels.dtype)
    qkv[0, key, 40] = float("nan")
    mixed = kernels.attend(Attention(8, 1, 1, 32, True), qkv, rotary_table(32, T, 1e4))
    assert mixed[0, key:].isnan().any(dim=-1).all()
    if kernels.in_c:
        assert not mixed[0, : key // 8 * 8].isnan().any()


def test_segment_starts_equal_the_mask() -> None:
    segments_BT, positions = segments(3, 40), torch.arange(40)
    starts_BT = segment_starts(segments_BT)
    assert starts_BT.dtype == torch.int32
    by_start = (positions >= starts_BT[:, :, None]) & (positions <= positions[:, None])
    assert torch.equal(visible_keys(40, 40, segments_BT.device, segments_BT), by_start)


def test_segment_starts_are_those_of_the_pass_they_are_for() -> None:
    kernels, rotary_2TK = CpuKernels(), rotary_table(8, 40, 1e4)
    for segments_BT in (segments(3, 40), segments(3, 40).flip(0)):
        context = AttentionContext(rotary_2TK, torch.float32, segments_BT)
        starts_BT = kernels.visible(context)
        assert starts_BT is not None
        assert torch.equal(starts_BT, segment_starts(segments_BT))
        assert kernels.visible(context) is starts_BT
    assert kernels.visible(AttentionContext(rotary_2TK, torch.float32)) is None


# -- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [3, 65, 1000])
def test_the_loss_and_its_gradient(V: int, kernels: Kernels) -> None:
    logits_NV = (3 * random(20, V)).to(kernels.dtype)
    scales_N = torch.rand(20, generator=torch.Generator().manual_seed(3))
    targets_N = torch.randint(V, (20,), generator=torch.Generator().manual_seed(2))
    targets_N[5:9], scales_N[12] = IGNORED, 0.0
    loss, gradient_NV = kernels.chunk_loss(logits_NV, targets_N, scales_N)
    exact = logits_NV.double().requires_grad_()
    expected = (F.cross_entropy(exact, targets_N, reduction="none", ignore_index=IGNORED) * scales_N).sum()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert gradient_NV.dtype == kernels.dtype
    assert off(gradient_NV, exact.grad) < kernels.tolerance(0.004)  # type: ignore[arg-type]
    assert not gradient_NV[[*range(5, 9), 12]].any()


@pytest.mark.parametrize(("N", "R", "C"), [(1, 3, 2), (50, 65, 16), (270, 33, 40)])
def test_products_are_added_to_a_gradient(N: int, R: int, C: int, kernels: Kernels) -> None:
    dy, x, to = random(N, R).to(kernels.dtype), random(N, C, seed=1).to(kernels.dtype), random(R, C, seed=2)
    expected = to.double() + dy.double().T @ x.double()
    kernels.fused.add_product(dy, x, to)
    assert off(to, expected) < (1e-6 if kernels.in_c else kernels.tolerance(0.004))


def test_a_target_outside_the_vocabulary_gives_nan(kernels: Kernels) -> None:
    logits, scales = random(2, 5).to(kernels.dtype), torch.ones(2)
    for target in (-1, 5, 1_000_000):
        loss, gradient = kernels.chunk_loss(logits, torch.tensor([2, target]), scales)
        assert loss.isnan()
        assert not gradient[1].any() or not kernels.in_c


def test_nan_shows_in_the_loss_and_in_its_gradient(kernels: Kernels) -> None:
    logits_NV = random(3, 70).to(kernels.dtype)
    logits_NV[1, 5] = float("nan")
    loss, gradient_NV = kernels.chunk_loss(logits_NV, torch.tensor([1, 2, 3]), torch.ones(3))
    assert loss.isnan()
    assert gradient_NV.isnan().any(1).tolist() == [False, True, False]


def test_tokens_that_are_ruled_out_cost_nothing(kernels: Kernels) -> None:
    logits_NV = torch.full((1, 9000), float("-inf"), dtype=kernels.dtype)
    logits_NV[0, [3, 8000]] = 0.0
    loss, gradient_NV = kernels.chunk_loss(logits_NV, torch.tensor([3]), torch.ones(1))
    assert float(loss) == pytest.approx(0.6931472)
    assert gradient_NV[0, [2, 3, 8000]].tolist() == pytest.approx([0.0, -0.5, 0.5])


# -- all of them -----------------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused(kernels: Kernels) -> None:
    x = random(4, 8).to(kernels.dtype).requires_grad_()
    (gradient,) = torch.autograd.grad((kernels.fused.swiglu(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("with_threads")
def test_results_are_the_same_bits_with_any_number_of_threads(kernels: Kernels) -> None:
    if not kernels.in_c:
        not_applicable("Triton has no threads on a processor")
    attention, norm = Attention(8, 4, 4, 32, True), torch.nn.RMSNorm(8, eps=1e-6)
    outcomes = []
    for num_threads in (1, 2, 3, 1):
        torch.set_num_threads(num_threads)
        attention.zero_grad()
        norm.zero_grad()
        qkv = random(3, 80, 3 * 128).to(kernels.dtype).requires_grad_()
        x = random(500, 8).to(kernels.dtype).requires_grad_()
        mixed = kernels.attend(attention, qkv, rotary_table(32, 80, 1e4))
        mixed.backward(random(3, 80, 128, seed=1).to(kernels.dtype))
        kernels.fused.rms_norm(norm, x, None)[1].backward(random(500, 8, seed=2).to(kernels.dtype))  # type: ignore[no-untyped-call]
        weights = [attention.q_norm.weight.grad.clone(), norm.weight.grad.clone()]  # type: ignore[union-attr, operator]
        outcomes.append([mixed.detach(), qkv.grad, *weights])
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))  # type: ignore[arg-type]


def test_the_types_of_arguments_are_those_of_the_sources() -> None:
    source = (
        "static void a(int b) {\n}\n/* c */\nvoid muon_move(int64_t N, float *const *weights,\n    float rate) {\n}\n"
    )
    assert bindings.argument_types(source) == {"muon_move": [ctypes.c_int64, ctypes.c_void_p, ctypes.c_float]}


def test_a_wrong_number_of_arguments_is_refused(kernels: Kernels) -> None:
    if not kernels.in_c:
        not_applicable("Triton's functions are Python's")
    with pytest.raises(TypeError):
        bindings.call("swiglu_forward", kernels.dtype, 1, 1)
