"""Every file of minitf/variants: what attention must do whatever its formula. A new variant needs no line here."""

import functools
import inspect
from typing import Any

import pytest
import torch
from helpers import SHAPE, randomise, relative_error
from torch import Tensor

from minitf.attention import Attention, AttentionContext, AttentionRecord
from minitf.backends import compile, custom_module
from minitf.backends.autotune import backends
from minitf.backends.compile import Compile
from minitf.backends.cpu.decoding import CpuEngine
from minitf.backends.cuda.decoding import GraphEngine
from minitf.backends.engine import TorchEngine
from minitf.edits import combined, forbid
from minitf.errors import RequestError
from minitf.interpretability.heads import head_scores
from minitf.model import ModelConfig, Transformer
from minitf.rope import rotary_table
from minitf.variants import METHODS, attention_class, changed, formula, names

VARIANTS = [name for name in names() if name != "softmax"]
T = 48  # more than a window, less than a block of queries
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str, **changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, "context_length": 160, "variant": variant, **changes}), 50)
    randomise(model)
    return model.eval()


def ids_of(num_rows: int = 2, num_positions: int = T, seed: int = 0) -> Tensor:
    return torch.randint(50, (num_rows, num_positions), generator=torch.Generator().manual_seed(seed))


def record_of(model: Transformer, ids_BT: Tensor, **named: Any) -> list[AttentionRecord]:
    record: list[AttentionRecord] = []
    model(ids_BT, record=record, **named)
    return record


# -- the file ----------------------------------------------------------------------------------------------------------


@every_variant
def test_a_file_is_short_and_gives_paper_step_and_formula(variant: str) -> None:
    cls = attention_class(variant)
    source = inspect.getsource(inspect.getmodule(cls))  # type: ignore[arg-type]
    assert len(source.splitlines()) <= 60
    assert "20" in inspect.getmodule(cls).__doc__  # type: ignore[operator]
    assert set(formula(cls).partition(":")[0].split(", ")) <= {"match", "weigh", "gather"}
    assert len(formula(cls)) < 120
    assert changed(cls)
    assert set(changed(cls)) <= set(METHODS)


def test_the_standard_attention_changes_nothing() -> None:
    assert attention_class("softmax") is Attention
    assert changed(Attention) == []
    assert formula(Attention) == ""


@every_variant
def test_it_adds_parameters_and_renames_none(variant: str) -> None:
    standard = {name: value.shape for name, value in make("softmax").named_parameters()}
    found = {name: value.shape for name, value in make(variant).named_parameters()}
    assert standard.items() <= found.items()
    assert all(".self_attn." in name for name in found.keys() - standard.keys())


def test_an_unknown_variant_is_named_with_those_that_exist() -> None:
    with pytest.raises(RequestError, match=r"model\.variant=sinks must be one of softmax, alibi, "):
        ModelConfig(variant="sinks")


# -- what it computes --------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("length", [T, 150])  # one block of queries, and two
def test_attention_is_causal(variant: str, length: int) -> None:
    model, ids_BT = make(variant), ids_of(1, length)
    changed_BT = ids_BT.clone()
    changed_BT[:, length - 10 :] = (changed_BT[:, length - 10 :] + 1) % 50
    with torch.no_grad():
        before, after = model(ids_BT), model(changed_BT)
    assert torch.equal(before[:, : length - 10], after[:, : length - 10])
    assert not torch.allclose(before[:, length - 10 :], after[:, length - 10 :])


@every_variant
def test_packed_texts_do_not_see_each_other(variant: str) -> None:
    model, ids_BT = make(variant), ids_of(1)
    segments_BT = (torch.arange(T) >= 20).int()[None]
    with torch.no_grad():
        together = model(ids_BT, segments_BT=segments_BT)
        apart = torch.cat([model(ids_BT[:, :20]), model(ids_BT[:, 20:])], dim=1)
    assert relative_error(together, apart) < 1e-5
    for layer in record_of(model, ids_BT, segments_BT=segments_BT):
        assert not layer.weights_BHTS[:, :, 20:, :20].any()


@every_variant
def test_the_cache_changes_nothing(variant: str) -> None:
    model, ids_BT = make(variant), ids_of()
    with torch.no_grad():
        whole = model(ids_BT)
        cache = model.new_cache(2, T)
        parts = [model(ids_BT[:, :40], cache), *(model(ids_BT[:, t : t + 1], cache) for t in range(40, T))]
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5


@every_variant
def test_texts_of_different_lengths_are_decoded_as_alone(variant: str) -> None:
    model = make(variant)
    long, short = ids_of(1)[0].tolist()[:40], ids_of(1, seed=1)[0].tolist()[:9]
    together = TorchEngine(model, 2, T)
    logits = [together.prefill([long, short]), together.decode(torch.tensor([3, 4]))]
    for row, (text, following) in enumerate([(long, 3), (short, 4)]):
        with torch.no_grad():
            alone = model(torch.tensor([[*text, following]]))[0, -2:]
        assert relative_error(torch.stack([both[row] for both in logits]), alone) < 1e-5


@every_variant
def test_looking_changes_nothing_and_shows_the_weights_that_were_used(variant: str) -> None:
    model, ids_BT = make(variant), ids_of()
    record: list[AttentionRecord] = []
    with torch.no_grad():
        plain, seen = model(ids_BT), model(ids_BT, record=record)
    assert relative_error(seen, plain) < 1e-5
    assert len(record) == SHAPE["num_layers"]
    for layer in record:
        weights_BHTS, group = layer.weights_BHTS, SHAPE["num_heads"] // SHAPE["num_kv_heads"]
        assert weights_BHTS.shape == (2, SHAPE["num_heads"], T, T)
        assert weights_BHTS.isfinite().all()
        assert not weights_BHTS.triu(1).any()
        if "gather" not in formula(attention_class(variant)).partition(":")[0]:
            assert relative_error(weights_BHTS @ layer.v_BHSK.repeat_interleave(group, 1), layer.mixed_BHTK) < 1e-5


@every_variant
def test_the_recorded_result_is_what_reaches_the_output_projection(variant: str) -> None:
    model = make(variant)
    attention: Any = model.model.layers[0].self_attn  # type: ignore[index, union-attr]
    record: list[AttentionRecord] = []
    x_BTD = torch.randn(1, T, SHAPE["hidden_size"])
    with torch.no_grad():
        output = attention(x_BTD, AttentionContext(model.rotary[:, :T], torch.float32, record=record))
        expected = attention.o_proj(record[0].mixed_BHTK.transpose(1, 2).flatten(2))
    assert relative_error(output, expected) < 1e-6


@every_variant
def test_a_forbidden_look_is_not_taken(variant: str) -> None:
    model, ids_BT = make(variant), ids_of(1)
    looks = torch.zeros(1, T, T, dtype=torch.bool)
    looks[0, 30, 25] = True
    edits = combined([forbid(looks, [(0, 1)])])
    free, held = record_of(model, ids_BT)[0].weights_BHTS, record_of(model, ids_BT, edits=edits)[0].weights_BHTS
    assert free[0, 1, 30, 25] != 0
    assert held[0, 1, 30, 25] == 0
    others = torch.ones(SHAPE["num_heads"], T, dtype=torch.bool)
    others[1, 30] = False
    assert torch.equal(free[0][others], held[0][others])


@every_variant
def test_every_parameter_learns(variant: str) -> None:
    """With several processes a parameter without a gradient would stop the run."""
    model, ids_BT = make(variant), ids_of()
    model.loss(ids_BT, ids_BT.roll(-1, 1)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@every_variant
def test_recomputing_a_block_in_the_backward_pass_changes_nothing(variant: str) -> None:
    model, ids_BT, found = make(variant).train(), ids_of(), []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model.loss(ids_BT, ids_BT.roll(-1, 1)).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))  # type: ignore[union-attr]
    assert torch.equal(*found)


@every_variant
def test_the_gradient_is_that_of_the_output(variant: str) -> None:
    model = make(variant, num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8).double()
    attention: Any = model.model.layers[0].self_attn  # type: ignore[index, union-attr]
    rotary_2TK = rotary_table(8, 6, 1e4).double()
    named = dict(attention.named_parameters())

    def output(x_BTD: Tensor, *values: Tensor) -> Tensor:
        context = AttentionContext(rotary_2TK, torch.float64)
        parameters = dict(zip(named, values, strict=True))
        return torch.func.functional_call(attention, parameters, (x_BTD, context))

    x_BTD = torch.randn(1, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(output, (x_BTD, *named.values()), fast_mode=True)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if hasattr(attention_class(name), "reference")])
def test_it_computes_its_own_reference(variant: str) -> None:
    model = make(variant).double()
    attention: Any = model.model.layers[0].self_attn  # type: ignore[index, union-attr]
    q, k, v = (torch.randn(1, heads, 150, 8, dtype=torch.float64) for heads in (4, 2, 2))
    context = AttentionContext(torch.zeros(2, 150, 8), torch.float64)
    mixed = attention.attend(q, k, v, context, 0)
    for head in range(4):
        expected = attention.reference(q[0, head], k[0, head // 2], v[0, head // 2])
        assert relative_error(mixed[0, head], expected) < 1e-9


# -- around it ---------------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faster_implementations_decline_it_by_name(variant: str, dtype: torch.dtype) -> None:
    model = make(variant)
    model.compute_dtype = dtype
    name = attention_class(variant).__name__
    assert custom_module(model) == name
    for backend in backends(model).values():
        if backend.name not in ("reference", "compile"):
            assert name in str(backend.unsupported(model)), backend.name
    assert name in str(GraphEngine.unsupported(model))
    in_c = (
        "it computes in float32, and the model in bfloat16" if dtype == torch.bfloat16 else f"it does not know {name}"
    )
    assert CpuEngine.unsupported(model) == in_c


@pytest.mark.backends
@every_variant
def test_compiled_it_computes_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of all are traced; C++ is generated, 20 s each, for the two that compute most."""
    if variant not in ("differential", "linear"):
        traced = functools.partial(torch.compile, dynamic=False, backend="aot_eager")
        monkeypatch.setattr(compile, "_compiled", functools.cache(traced))
    model, ids_BT, found = make(variant).train(), ids_of(), []
    segments_BT = (torch.arange(T) >= 20).int().expand(2, T)
    if reason := Compile().unsupported(model):
        pytest.skip(reason)
    for install in (lambda: None, lambda: Compile().install(model)):
        install()
        model.zero_grad()
        losses = [model.loss(ids_BT, ids_BT.roll(-1, 1), segments) for segments in (None, segments_BT)]
        sum(losses).backward()  # type: ignore[union-attr]
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))  # type: ignore[union-attr]
        found.append(torch.stack(losses))
    assert relative_error(found[3], found[1]) < 1e-5
    assert relative_error(found[2], found[0]) < 1e-4


@every_variant
def test_scores_of_heads_are_between_zero_and_one(variant: str) -> None:
    for name, values in head_scores(make(variant), ids_of()).items():
        assert values.isfinite().all(), name
        assert values.min() >= 0, name
        assert values.max() <= 1, name


@every_variant
def test_a_model_of_bfloat16_is_close_to_one_of_float32(variant: str) -> None:
    model, ids_BT = make(variant), ids_of()
    with torch.no_grad():
        exact = model(ids_BT)
        with model.computing_in(torch.bfloat16):
            rounded = model(ids_BT)
    assert relative_error(rounded, exact) < 0.1
