"""The transformer: the shape it says it has, the loss it should have, and the same with and without its shortcuts."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from minitf.attention import AttentionRecord
from minitf.backends.sdpa import EXPLICIT_MAX_LENGTH, Sdpa
from minitf.errors import RequestError
from minitf.model import ModelConfig, Transformer
from minitf.training.flops import flops_per_token

MakeModel = Callable[..., Transformer]


@pytest.fixture(params=["reference", "sdpa"])
def attention_model(request: pytest.FixtureRequest, make_model: MakeModel) -> MakeModel:
    """Tiny models as written, and with PyTorch's fused attention."""

    def make(**changes: object) -> Transformer:
        model = make_model(**changes)
        if request.param == "sdpa":
            Sdpa().install(model)
        return model

    return make


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"num_heads": 5, "hidden_size": 192}, ["model.hidden_size=192", "model.num_heads=5", "model.head_dim"]),
        ({"num_heads": 6, "num_kv_heads": 4}, ["model.num_heads=6", "model.num_kv_heads=4"]),
        ({"num_heads": 4, "num_kv_heads": 8}, ["model.num_heads=4", "model.num_kv_heads=8"]),
        ({"num_heads": 0}, ["model.num_heads=0"]),
        ({"num_layers": 0}, ["model.num_layers=0"]),
        ({"hidden_size": -4}, ["model.hidden_size=-4"]),
        ({"context_length": 0}, ["model.context_length=0"]),
        ({"head_dim": 7}, ["model.head_dim=7", "even"]),
        ({"hidden_size": 36, "num_heads": 4}, ["model.head_dim=9", "even"]),
        ({"num_kv_heads": -1}, ["model.num_kv_heads=-1"]),
        ({"intermediate_size": -1}, ["model.intermediate_size=-1"]),
        ({"dropout": 1.0}, ["model.dropout=1.0"]),
        ({"dropout": -0.1}, ["model.dropout=-0.1"]),
        ({"dropout": math.nan}, ["model.dropout=nan"]),
        ({"attention": "flash"}, ["model.attention=flash", "explicit"]),
        ({"rope_theta": 0.0}, ["model.rope_theta=0.0"]),
    ],
)
def test_an_impossible_shape_is_refused_by_name(settings: dict[str, object], keys: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        ModelConfig(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    for key in keys:
        assert key in str(error.value)


def test_zeros_in_the_config_are_derived() -> None:
    config = ModelConfig(hidden_size=192, num_heads=6)
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size) == (6, 32, 512)
    assert ModelConfig(hidden_size=100, num_heads=3, head_dim=10).head_dim == 10


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 1, 1, 5, 6], [3, 16, 1]])
def test_cached_decoding_is_uncached_decoding(attention_model: MakeModel, pieces: list[int]) -> None:
    model = attention_model()
    ids_BT = torch.randint(50, (3, 20))
    expected_BTV = model(ids_BT)
    cache = model.new_cache(3, 32)
    parts = [model(part, cache) for part in ids_BT.split(pieces, dim=1)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTV, rtol=1e-4, atol=1e-4)


def test_captured_weights_over_a_cache_are_the_rows_of_the_whole(make_model: MakeModel) -> None:
    model = make_model()
    ids_BT = torch.randint(50, (1, 12))
    whole: list[AttentionRecord] = []
    model(ids_BT, record=whole)
    cache = model.new_cache(1, 32)
    model(ids_BT[:, :11], cache)
    last: list[AttentionRecord] = []
    model(ids_BT[:, 11:], cache, last)
    for all_rows, row in zip(whole, last, strict=True):
        torch.testing.assert_close(row.weights_BHTS, all_rows.weights_BHTS[:, :, 11:], rtol=1e-4, atol=1e-5)


def test_more_positions_than_the_context_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="33 positions exceed the context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_future_tokens_change_no_logit_before_them(attention_model: MakeModel) -> None:
    model = attention_model()
    ids_BT = torch.randint(50, (2, 16))
    changed_BT = ids_BT.clone()
    changed_BT[:, 9:] = (changed_BT[:, 9:] + 1) % 50
    before, after = model(ids_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-5, atol=1e-5)
    assert (before[:, 9] - after[:, 9]).abs().max() > 0.1


def test_parameters_and_flops_are_those_counted_by_hand(make_model: MakeModel) -> None:
    D, H, G, K, F_, V, L, T = 32, 4, 2, 10, 48, 50, 3, 32
    shape = {"num_layers": L, "head_dim": K, "intermediate_size": F_}
    matrices = L * (D * H * K + 2 * D * G * K + H * K * D + 3 * D * F_)
    norms = L * (2 * D + 2 * K) + D
    tied, untied = make_model(**shape), make_model(**shape, tie_embeddings=False)
    assert tied.num_parameters() == matrices + norms + V * D
    assert untied.num_parameters() == matrices + norms + 2 * V * D
    assert make_model(**shape, qk_norm=False).num_parameters() == tied.num_parameters() - L * 2 * K

    # Forward: 2 a weight, and 2 K for each of match and gather with the (T + 1) / 2 keys a query sees; backward: twice.
    forward = 2 * (matrices + V * D) + L * H * 2 * 2 * K * (T + 1) / 2
    assert flops_per_token(tied) == flops_per_token(untied) == 3 * forward


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_loss_is_the_mean_negative_log_likelihood_of_targets_that_count(
    make_model: MakeModel, tie_embeddings: bool
) -> None:
    model = make_model(tie_embeddings=tie_embeddings)
    ids_BT, targets_BT = torch.randint(50, (2, 3, 10))
    targets_BT[0, 4:] = -100
    targets_BT[2, 0] = -100
    logits_BTV = model(ids_BT).tolist()
    losses = []
    for b in range(3):
        for t in range(10):
            if (target := int(targets_BT[b, t])) >= 0:
                row = logits_BTV[b][t]
                losses.append(math.log(sum(math.exp(x) for x in row)) - row[target])
    assert len(losses) == 23
    assert model.loss(ids_BT, targets_BT).item() == pytest.approx(sum(losses) / 23, rel=1e-5)
    targets_BT[0, 7] = 3  # what did not count counts now
    assert model.loss(ids_BT, targets_BT).item() != pytest.approx(sum(losses) / 23, rel=1e-5)


def test_a_fresh_model_knows_nothing(make_model: MakeModel) -> None:
    """All blocks start as the identity, all tokens about equally likely."""
    model = Transformer(ModelConfig(num_layers=2, hidden_size=32, num_heads=4, context_length=16), 50)
    ids_BT, targets_BT = torch.randint(50, (2, 4, 16))
    assert float(model.loss(ids_BT, targets_BT).detach()) == pytest.approx(math.log(50), abs=0.2)
    embedded = F.embedding(ids_BT, model.model.embed_tokens.weight)
    torch.testing.assert_close(model.hidden(ids_BT), model.model.norm(embedded))


def test_activation_checkpointing_computes_the_same_from_less(make_model: MakeModel) -> None:
    ids_BT, targets_BT = torch.randint(50, (2, 2, 16))
    gradients, kept = [], []
    for activation_checkpointing in (False, True):
        model = make_model(dropout=0.3)
        model.train()
        model.activation_checkpointing = activation_checkpointing
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.loss(ids_BT, targets_BT)
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_gradients_of_the_explicit_path_and_the_fused_kernel_agree(make_model: MakeModel, num_kv_heads: int) -> None:
    ids_BT, targets_BT = torch.randint(50, (2, 2, 16))
    gradients = {}
    for attention in ("explicit", "sdpa"):
        model = make_model(attention=attention, num_kv_heads=num_kv_heads, tie_embeddings=False)
        if attention == "sdpa":
            Sdpa().install(model)
        model.loss(ids_BT, targets_BT).backward()
        gradients[attention] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients["explicit"].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients["sdpa"][name], rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_are_differences_of_the_loss(make_model: MakeModel) -> None:
    model = make_model().double()
    model.compute_dtype = torch.float64
    ids_BT, targets_BT = torch.randint(50, (2, 2, 8))
    model.loss(ids_BT, targets_BT).backward()
    for parameter in model.parameters():
        direction = torch.randn_like(parameter)
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = model.loss(ids_BT, targets_BT).item()
            parameter -= 2e-6 * direction
            below = model.loss(ids_BT, targets_BT).item()
            parameter += 1e-6 * direction
        assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_tied_embeddings_are_one_matrix_and_untied_ones_two(make_model: MakeModel) -> None:
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.vocabulary_VD is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert untied.vocabulary_VD is dict(untied.named_parameters())["lm_head.weight"]
    ids_BT = torch.randint(50, (1, 5))
    for model in (tied, untied):
        torch.testing.assert_close(model(ids_BT), model.hidden(ids_BT) @ model.vocabulary_VD.T)


def test_dropout_works_in_training_only(make_model: MakeModel) -> None:
    plain, dropping = make_model(), make_model(dropout=0.5)
    ids_BT = torch.randint(50, (2, 8))
    assert torch.equal(dropping(ids_BT), plain(ids_BT))
    dropping.train()
    assert not torch.equal(dropping(ids_BT), dropping(ids_BT))
    torch.manual_seed(1)
    first = dropping(ids_BT)
    torch.manual_seed(1)
    assert torch.equal(first, dropping(ids_BT))
    assert torch.equal(make_model(dropout=0.0).train()(ids_BT), plain(ids_BT))


@pytest.mark.parametrize("silent", ["o_proj", "down_proj"])
def test_dropout_acts_on_attention_and_on_the_feed_forward(make_model: MakeModel, silent: str) -> None:
    model = make_model(num_layers=1, dropout=0.5).train()
    with torch.no_grad():
        dict(model.named_parameters())[
            f"model.layers.0.{'self_attn' if silent == 'o_proj' else 'mlp'}.{silent}.weight"
        ].zero_()
    ids_BT = torch.randint(50, (2, 8))
    assert not torch.equal(model(ids_BT), model(ids_BT))


def test_bfloat16_activations_give_about_the_same_logits_in_float32(make_model: MakeModel) -> None:
    model = make_model()
    ids_BT = torch.randint(50, (2, 16))
    expected = model(ids_BT)
    model.compute_dtype = torch.bfloat16
    logits = model(ids_BT)
    assert logits.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert 0 < ((logits - expected).norm() / expected.norm()).item() < 0.05


def test_fused_attention_suits_long_contexts_or_those_who_ask(make_model: MakeModel) -> None:
    assert "faster up to" in str(Sdpa().unsupported(make_model(context_length=EXPLICIT_MAX_LENGTH)))
    assert Sdpa().unsupported(make_model(context_length=EXPLICIT_MAX_LENGTH + 1)) is None
    assert Sdpa().unsupported(make_model(attention="sdpa")) is None
    explicit = make_model(context_length=EXPLICIT_MAX_LENGTH + 1, attention="explicit")
    assert "model.attention=explicit" in str(Sdpa().unsupported(explicit))
