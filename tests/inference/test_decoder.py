"""Decoding one token at a time: every engine computes what the whole model computes, and says why when it cannot."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minitf.backends.cpu import decoding as native
from minitf.backends.cuda.decoding import GraphStep
from minitf.errors import MinitfError, RequestError
from minitf.generate import generate
from minitf.inference.decoder import MOST_READ, Decoder
from minitf.inference.sampling import Sampling
from minitf.model import ModelConfig, Transformer

CONTEXT = 24


def random_model(vocab_size: int = 37, **shape: int | bool | float) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "context_length": CONTEXT} | shape
    model = Transformer(ModelConfig(**sizes), vocab_size).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():  # norms and the matrices that start at zero too
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def logits_token_by_token(model: Transformer, ids_BT: torch.Tensor, num_prompt: int, engine: str) -> torch.Tensor:
    decoder = Decoder(model, ids_BT.shape[0], CONTEXT, engine)
    if engine == "graph":
        decoder.step = GraphStep(model, decoder.cache)
    assert decoder.engine == ("torch" if engine == "graph" else engine)
    steps = [decoder.read(ids_BT[:, :num_prompt])]
    steps += [decoder.read(ids_BT[:, t : t + 1]) for t in range(num_prompt, ids_BT.shape[1])]
    assert decoder.cache.length == ids_BT.shape[1]
    return torch.stack(steps, dim=1)


SHAPES = [
    {},
    {"num_kv_heads": 2},
    {"qk_norm": False, "tie_embeddings": False},
    {
        "hidden_size": 50,
        "num_heads": 3,
        "head_dim": 6,
        "intermediate_size": 70,
        "rope_theta": 500.0,
    },  # no whole vectors
    {"num_heads": 6, "num_kv_heads": 1, "head_dim": 34, "intermediate_size": 33, "num_layers": 1},
]


@pytest.mark.parametrize(("shape", "batch_size"), list(itertools.product(SHAPES, (1, 2, 5, 9))))
@torch.no_grad()
def test_the_native_step_computes_the_model(shape: dict[str, int], batch_size: int) -> None:
    model = random_model(**shape)
    ids_BT = torch.randint(37, (batch_size, CONTEXT))
    expected = model(ids_BT)[:, 6:]
    torch.testing.assert_close(logits_token_by_token(model, ids_BT, 7, "native"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_texts_are_read_in_pieces_of_any_length(batch_size: int) -> None:
    model = random_model(num_kv_heads=2)
    ids_BT = torch.randint(37, (batch_size, CONTEXT))
    decoder = Decoder(model, batch_size, CONTEXT, "native")
    for start, end in itertools.pairwise((0, 5, 6, 13, 14, 15, CONTEXT)):
        found = decoder.read(ids_BT[:, start:end])
        torch.testing.assert_close(found, model(ids_BT[:, :end])[:, -1], rtol=1e-4, atol=1e-4)
    reference = Decoder(model, batch_size, CONTEXT, "torch")
    reference.read(ids_BT)
    torch.testing.assert_close(decoder.cache.keys, reference.cache.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.cache.values, reference.cache.values, rtol=1e-4, atol=1e-4)


def likeliest(decoder: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    return decoder.next(ids_BT, None, Sampling(0), None).wait()


def alike(vocabulary_VD: torch.Tensor) -> None:
    """Rows in groups of the same to a rounding or two, larger than the others, and one that is repeated."""
    groups = vocabulary_VD[1:-1].view(-1, 5, vocabulary_VD.shape[1])
    groups[:] = groups[:, :1] * (1 + 2e-7 * torch.randn_like(groups))
    vocabulary_VD[-1] = vocabulary_VD[0]


def uneven(vocabulary_VD: torch.Tensor) -> None:
    """One weight of each row dwarfs the others, which the copy then knows nothing of."""
    vocabulary_VD[:, 3] = 300.0


def tiny(vocabulary_VD: torch.Tensor) -> None:
    vocabulary_VD.mul_(1e-30)
    vocabulary_VD[::2] = 0


VOCABULARIES = {"as it comes": lambda vocabulary_VD: None, "alike": alike, "uneven": uneven, "tiny": tiny}


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 1), (1, 2), (1, 7), (3, 2), (5, 2)])
@torch.no_grad()
def test_the_likeliest_is_the_likeliest(
    kind: str, batch_size: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LARGE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    for width in (48, 50):
        model = random_model(202, hidden_size=width, tie_embeddings=False, num_heads=2, head_dim=8)
        VOCABULARIES[kind](model.vocabulary_VD)
        scored, chosen = (Decoder(model, batch_size, CONTEXT, "native") for _ in range(2))
        for _ in range(CONTEXT):  # each time the steps found ahead are for other ids
            ids_B1 = torch.randint(202, (batch_size, 1))
            assert likeliest(chosen, ids_B1).tolist() == scored.read(ids_B1).argmax(-1).tolist()


@pytest.mark.parametrize("scale", [1e-36, 0.0])
@torch.no_grad()
def test_the_likeliest_of_what_vanishes(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LARGE", 0)
    model = random_model()
    model.model.norm.weight.mul_(scale)  # type: ignore[union-attr,operator]
    scored, chosen = (Decoder(model, 1, CONTEXT, "native") for _ in range(2))
    for _ in range(CONTEXT):
        ids_11 = torch.randint(37, (1, 1))
        assert likeliest(chosen, ids_11).tolist() == scored.read(ids_11).argmax(-1).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["vocabulary", "norm"])
@pytest.mark.parametrize("large", [0, 1 << 30])
@torch.no_grad()
def test_no_token_is_the_likeliest_where_scores_are_not_finite(
    value: float, where: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LARGE", large)
    model = random_model(tie_embeddings=False)
    (model.vocabulary_VD if where == "vocabulary" else model.model.norm.weight)[5] = value  # type: ignore[union-attr,operator]
    decoder = Decoder(model, 1, CONTEXT, "native")
    with pytest.raises(MinitfError, match="not finite"):
        likeliest(decoder, torch.randint(37, (1, 1)))


@torch.no_grad()
def test_steps_taken_ahead_write_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(context_length=64)
    written: dict[int, list[torch.Tensor]] = {}
    for most_ahead in (1, 8):
        monkeypatch.setattr(native, "MOST_AHEAD", most_ahead)
        monkeypatch.setattr(native, "AHEAD_S", 1e3)
        calls = []
        monkeypatch.setattr(native.NativeStep, "_read", counted(native.NativeStep._read, calls))
        steps = generate(model, [1, 2, 3], 2, Sampling(0), engine="native", most=100)
        written[most_ahead] = [step.ids_B for step in steps]
        monkeypatch.undo()
        assert len(calls) == 100 if most_ahead == 1 else len(calls) < 40
    assert len(written[8]) == 100
    assert torch.equal(torch.stack(written[8]), torch.stack(written[1]))


def counted(function: Callable[..., None], calls: list[object]) -> Callable[..., None]:
    def wrapper(*arguments: object) -> None:
        calls.append(arguments)
        function(*arguments)

    return wrapper


@pytest.mark.parametrize("how", ["another text", "by the model", "another row"])
@torch.no_grad()
def test_what_was_found_ahead_is_of_one_text(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same id at the same position, after another text."""
    monkeypatch.setattr(native, "AHEAD_S", 1e3)
    monkeypatch.setattr(native, "TRIED", 1)
    model = random_model()
    if how == "by the model":
        monkeypatch.setitem(MOST_READ, "native", 1)
    for seed in range(10):
        torch.manual_seed(seed)
        decoder, anew = (Decoder(model, 2, CONTEXT, "native") for _ in range(2))
        first, other = torch.randint(37, (2, 2, 5)).unbind()
        for start, end in ((0, 2), (2, 3), (3, 4)):
            decoder.read(first[:, start:end])
        ids_B1 = likeliest(decoder, first[:, 4:])[:, None]
        assert decoder.step.ahead  # type: ignore[union-attr]
        if how == "another row":
            decoder.reorder(torch.tensor([1, 0]))
            anew.read(first.flip(0))
        else:
            decoder.forget()
            for each in (decoder, anew):
                each.read(other)
        assert likeliest(decoder, ids_B1).tolist() == anew.read(ids_B1).argmax(-1).tolist()


@pytest.mark.parametrize("shape", SHAPES[:3])
@torch.no_grad()
def test_the_fixed_shape_step_computes_the_model(shape: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "_choose", lambda self, engine: ("torch", None))
    model = random_model(**shape)
    ids_BT = torch.randint(37, (3, CONTEXT))
    expected = model(ids_BT)[:, 6:]
    torch.testing.assert_close(logits_token_by_token(model, ids_BT, 7, "graph"), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_extreme_scores_stay_numbers() -> None:
    model = random_model(qk_norm=False)
    for block in model.model.layers:  # type: ignore[union-attr]
        block.self_attn.q_proj.weight.mul_(1e3)  # type: ignore[union-attr,operator]
        block.mlp.gate_proj.weight.mul_(1e3)  # type: ignore[union-attr,operator]
    ids_BT = torch.randint(37, (1, CONTEXT))
    expected = model(ids_BT)[:, 6:]
    torch.testing.assert_close(logits_token_by_token(model, ids_BT, 7, "native"), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_forgotten_text_leaves_no_trace() -> None:
    model = random_model()
    ids_BT = torch.randint(37, (2, 12))
    decoder = Decoder(model, 2, CONTEXT)
    decoder.read(torch.randint(37, (2, 20)))
    decoder.read(torch.randint(37, (2, 1)))
    decoder.forget()
    decoder.read(ids_BT[:, :11])
    torch.testing.assert_close(decoder.read(ids_BT[:, 11:]), model(ids_BT)[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_text_is_read_once_for_all_rows() -> None:
    model = random_model()
    prompt_1T, next_B1 = torch.randint(37, (1, 7)), torch.randint(37, (3, 1))
    decoder = Decoder(model, 3, CONTEXT)
    logits_BV = decoder.read(prompt_1T)
    torch.testing.assert_close(logits_BV, model(prompt_1T)[:, -1].repeat(3, 1), rtol=1e-4, atol=1e-4)
    expected = model(torch.cat([prompt_1T.repeat(3, 1), next_B1], dim=1))[:, -1]
    torch.testing.assert_close(decoder.read(next_B1), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="1 rows of ids for 3"):
        decoder.read(prompt_1T)


def test_a_full_cache_is_refused_and_not_overrun() -> None:
    decoder = Decoder(random_model(), 1, 8)
    decoder.read(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="full"):
        decoder.read(torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_threads_share_a_step_and_change_nothing(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = random_model(hidden_size=40, num_kv_heads=1, intermediate_size=72), []
    ids_BT = torch.randint(model.vocab_size, (batch_size, 9))
    for num_threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        monkeypatch.setattr(native.NativeStep, "_threads", lambda step, num_threads=num_threads: num_threads)
        found.append(logits_token_by_token(model, ids_BT, 4, "native"))
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=0)


def test_the_number_of_threads_that_was_faster_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    step = Decoder(random_model(), 1, 8, "native").step
    assert isinstance(step, native.NativeStep)
    taken = []
    for step.num_steps in range(native.TRIED):
        taken.append(step._threads())
    assert taken == [4, 1, 4, 1, 4, 1]
    step.seconds, step.num_steps = {4: 0.2, 1: 0.1}, native.TRIED
    assert step._threads() == 1
    step.num_steps += 1
    assert step._threads() == 1


def test_without_a_compiler_the_model_decodes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitf.backends.cpu.compiler.shutil.which", lambda name: None)
    native.library.cache_clear()
    try:
        assert Decoder(random_model(), 1, 8).engine == "torch"
        with pytest.raises(RequestError, match="--engine native: no C compiler found"):
            Decoder(random_model(), 1, 8, "native")
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_and_a_damaged_library_are_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITF_CACHE", str(tmp_path))
    try:
        monkeypatch.setenv("CC", "false")
        native.library.cache_clear()
        assert Decoder(random_model(), 1, 8).engine == "torch"
        assert not list(tmp_path.iterdir())
        monkeypatch.delenv("CC")
        native.library.cache_clear()
        assert Decoder(random_model(), 1, 8).engine == "native"
        (built,) = tmp_path.iterdir()
        built.unlink()  # not overwritten: it is loaded
        built.write_bytes(b"damaged")
        native.library.cache_clear()
        assert Decoder(random_model(), 1, 8).engine == "native"
    finally:
        native.library.cache_clear()


def test_engines_that_cannot_serve_say_why() -> None:
    model = random_model()
    with pytest.raises(RequestError, match="--engine quick must be one of auto, native, graph, torch"):
        Decoder(model, 1, 8, "quick")
    with pytest.raises(RequestError, match="CUDA graphs need a CUDA device"):
        Decoder(model, 1, 8, "graph")
    model.compute_dtype = torch.bfloat16
    assert Decoder(model, 1, 8).engine == "torch"
    with pytest.raises(RequestError, match="computes in float32, and the model in bfloat16"):
        Decoder(model, 1, 8, "native")
