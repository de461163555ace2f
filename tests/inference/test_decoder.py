"""Decoding: every engine computes what the model computes, and states why when it cannot."""

import itertools
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import needs_compiler, not_applicable, recorded_weights
from torch import Tensor

from minitf.attention import Attention, AttentionRecord
from minitf.backends.cpu import compiler, decode_bindings
from minitf.backends.cpu.decoding import MAX_PREFILL, CpuEngine, ThreadChoice
from minitf.backends.cuda.decoding import GraphEngine
from minitf.backends.engine import TokenFuture, TorchEngine
from minitf.errors import MinitfError, RequestError
from minitf.inference.decoder import Decoder, choose_engine
from minitf.model import ModelConfig, Transformer

CONTEXT = 24
VOCABULARY = 37
NATIVE = pytest.param(CpuEngine, marks=needs_compiler)
ENGINES = [NATIVE, GraphEngine, TorchEngine]  # without a CUDA device the graph engine runs its step uncaptured


def random_model(**shape: int | bool | float) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "context_length": CONTEXT} | shape
    model = Transformer(ModelConfig(**sizes), VOCABULARY).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():  # also norms, and the matrices that start at zero
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def logits_token_by_token(engine: TorchEngine, ids_BT: Tensor, num_prompt: int) -> Tensor:
    """Logits_BTV after the prompt and after each token that follows it."""
    steps = [engine.prefill(ids_BT[:, :num_prompt].tolist())]
    steps += [engine.decode(ids_B) for ids_B in ids_BT[:, num_prompt:].unbind(1)]
    assert engine.cache.length == ids_BT.shape[1]
    return torch.stack(steps, dim=1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


SHAPES = [
    {},
    {"num_kv_heads": 2},
    {"qk_norm": False, "tie_embeddings": False},
    # widths that are no multiples of a vector register
    {"hidden_size": 50, "num_heads": 3, "head_dim": 6, "intermediate_size": 70, "rope_theta": 500.0},
    {"num_heads": 6, "num_kv_heads": 1, "head_dim": 34, "intermediate_size": 33, "num_layers": 1},
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("shape", "batch_size"), list(itertools.product(SHAPES, (1, 2, 5, 9))))
@torch.no_grad()
def test_an_engine_computes_the_model(engine: type[TorchEngine], shape: dict[str, int], batch_size: int) -> None:
    model = random_model(**shape)
    ids_BT = torch.randint(VOCABULARY, (batch_size, CONTEXT))
    found = logits_token_by_token(engine(model, batch_size, CONTEXT), ids_BT, 7)
    assert_close(found, model(ids_BT)[:, 6:])


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_texts_of_unequal_lengths_decode_as_each_alone(engine: type[TorchEngine]) -> None:
    model = random_model()
    texts = [torch.randint(VOCABULARY, (length,)).tolist() for length in (3, 9, 1)]
    decoding = engine(model, 3, CONTEXT)
    logits_BV = decoding.prefill(texts)
    for _ in range(10):
        for row, text in enumerate(texts):
            assert_close(logits_BV[row], model(torch.tensor([text]))[0, -1])
        ids_B = torch.randint(VOCABULARY, (3,))
        texts = [[*text, id_] for text, id_ in zip(texts, ids_B.tolist(), strict=True)]
        logits_BV = decoding.decode(ids_B)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lengths", [(7,), (4, 4), (4, 9), (1, 2, 3)])
@torch.no_grad()
def test_a_prefilled_text_fills_consecutive_rows(engine: type[TorchEngine], lengths: tuple[int, ...]) -> None:
    model = random_model()
    texts = [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]
    decoding, next_B = engine(model, 6, CONTEXT), torch.randint(VOCABULARY, (6,))
    prefilled_BV, decoded_BV = decoding.prefill(texts), decoding.decode(next_B)
    for row in range(6):
        text = texts[row * len(texts) // 6]
        assert_close(prefilled_BV[row], model(torch.tensor([text]))[0, -1])
        assert_close(decoded_BV[row], model(torch.tensor([[*text, int(next_B[row])]]))[0, -1])


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_a_reordered_row_continues_another_text(engine: type[TorchEngine]) -> None:
    model = random_model()
    texts = [torch.randint(VOCABULARY, (length,)).tolist() for length in (5, 3, 8)]
    decoding = engine(model, 3, CONTEXT)
    decoding.prefill(texts)
    decoding.reorder(torch.tensor([2, 0, 0]))
    logits_BV = decoding.decode(torch.tensor([7, 8, 9]))
    for row, text in enumerate([[*texts[2], 7], [*texts[0], 8], [*texts[0], 9]]):
        assert_close(logits_BV[row], model(torch.tensor([text]))[0, -1])


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_a_second_prefill_starts_from_an_empty_cache(engine: type[TorchEngine]) -> None:
    model = random_model()
    ids_BT = torch.randint(VOCABULARY, (2, 12))
    decoding = engine(model, 2, CONTEXT)
    decoding.prefill([[3], list(range(20))])
    decoding.decode(torch.randint(VOCABULARY, (2,)))
    assert_close(logits_token_by_token(decoding, ids_BT, 11), model(ids_BT)[:, 10:])


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_captured_weights_are_those_of_the_model(engine: type[TorchEngine]) -> None:
    model, decoding = random_model(), engine(random_model(), 2, CONTEXT)
    ids_BT = torch.randint(VOCABULARY, (2, 9))
    expected = recorded_weights(model, ids_BT)
    prefilled: list[AttentionRecord] = []
    decoding.prefill(ids_BT[:, :7].tolist(), prefilled)
    decoding.decode(ids_BT[:, 7])
    decoded: list[AttentionRecord] = []
    decoding.decode(ids_BT[:, 8], decoded)
    for layer in range(2):
        assert_close(prefilled[layer].weights_BHTS, expected[layer][:, :, :7, :7])
        assert_close(decoded[layer].weights_BHTS, expected[layer][:, :, 8:])


@needs_compiler
@torch.no_grad()
def test_long_texts_are_prefilled_by_the_model_and_decoded_in_c() -> None:
    model = random_model(context_length=MAX_PREFILL + 20)
    ids_1T = torch.randint(VOCABULARY, (1, MAX_PREFILL + 10))
    found = logits_token_by_token(CpuEngine(model, 1, MAX_PREFILL + 20), ids_1T, MAX_PREFILL + 1)
    assert_close(found, model(ids_1T)[:, MAX_PREFILL:])


@needs_compiler
@torch.no_grad()
def test_extreme_scores_stay_finite() -> None:
    model = random_model(qk_norm=False)
    for block in model.model.layers:  # type: ignore[union-attr]
        block.self_attn.q_proj.weight.mul_(1e3)  # type: ignore[union-attr,operator]
        block.mlp.gate_proj.weight.mul_(1e3)  # type: ignore[union-attr,operator]
    ids_BT = torch.randint(VOCABULARY, (1, CONTEXT))
    found = logits_token_by_token(CpuEngine(model, 1, CONTEXT), ids_BT, 7)
    assert_close(found, model(ids_BT)[:, 6:], 1e-3)


@needs_compiler
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(batch_size: int) -> None:
    model, found = random_model(hidden_size=40, num_kv_heads=1, intermediate_size=72), []
    ids_BT = torch.randint(VOCABULARY, (batch_size, 9))
    for num_threads in (1, 2, 3, 7):
        engine = CpuEngine(model, batch_size, CONTEXT)
        engine.threads = ThreadChoice(num_threads)
        engine.threads.trials = [num_threads] * CONTEXT
        found.append(logits_token_by_token(engine, ids_BT, 4))
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=0)


def test_the_faster_number_of_threads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, taken = [0.0], []
    monkeypatch.setattr("minitf.backends.cpu.decoding.time.perf_counter", lambda: clock[0])

    def step(num_threads: int) -> Tensor:
        clock[0] += {4: 0.2, 1: 0.1}[num_threads]
        taken.append(num_threads)
        return torch.empty(0)

    threads = ThreadChoice(4)
    for _ in range(9):
        threads.run(step)
    assert taken == [4, 1, 4, 1, 4, 1, 1, 1, 1]


# The decoder


def test_texts_that_do_not_fit_are_refused() -> None:
    decoder = Decoder(random_model(), 3, 8)
    with pytest.raises(ValueError, match="2 texts do not divide the 3 rows"):
        decoder.prefill([[1], [2]])
    with pytest.raises(ValueError, match="longer than the 8 positions"):
        decoder.prefill([[1] * 9])
    decoder.prefill([[1] * 8])
    with pytest.raises(ValueError, match="full"):
        decoder.decode(torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tokens_drawn_from_scores_that_are_not_finite_are_refused(value: float) -> None:
    logits_BV = torch.zeros(2, 5)
    assert TokenFuture(torch.tensor([1, 2]), logits_BV).wait().tolist() == [1, 2]
    logits_BV[1, 3] = value
    with pytest.raises(MinitfError, match="not finite"):
        TokenFuture(torch.tensor([1, 2]), logits_BV).wait()


def test_a_cuda_step_is_queued_before_the_one_before_it_is_read() -> None:
    queued = []

    def steps() -> Iterator[int]:
        for step in range(3):
            queued.append(step)
            yield step

    read = [(step, len(queued)) for step in GraphEngine(random_model(), 1, 8).run_ahead(steps())]
    assert read == [(0, 2), (1, 3), (2, 3)]


# The choice of an engine


@pytest.fixture
def uncached_library() -> Iterator[None]:
    """decode.c is loaded again inside, and again afterwards."""
    decode_bindings.library.cache_clear()
    yield
    decode_bindings.library.cache_clear()


@pytest.mark.usefixtures("uncached_library")
def test_without_a_compiler_the_model_decodes_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitf.backends.cpu.compiler.shutil.which", lambda name: None)
    assert choose_engine(random_model()) is TorchEngine
    with pytest.raises(RequestError, match="--engine native: no C compiler found"):
        choose_engine(random_model(), "native")


@pytest.mark.usefixtures("uncached_library")
def test_a_failing_compiler_is_a_fallback_to_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITF_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert choose_engine(random_model()) is TorchEngine
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.backends
@pytest.mark.usefixtures("uncached_library")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
@torch.no_grad()
def test_narrower_vectors_compute_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """Of 8 and of 4 floats, on x86."""
    if platform.machine() != "x86_64":
        not_applicable("these are flags of x86 compilers")
    monkeypatch.setenv("MINITF_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, flag))
    for shape, batch_size in itertools.product(SHAPES, (1, 2, 5)):
        model = random_model(**shape)
        ids_BT = torch.randint(VOCABULARY, (batch_size, CONTEXT))
        found = logits_token_by_token(CpuEngine(model, batch_size, CONTEXT), ids_BT, 5)
        assert_close(found, model(ids_BT)[:, 4:])
    assert len(list(tmp_path.iterdir())) == 1  # compiled with the flag


@needs_compiler
@pytest.mark.usefixtures("uncached_library")
def test_a_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITF_CACHE", str(tmp_path))
    assert choose_engine(random_model()) is CpuEngine
    (built,) = tmp_path.iterdir()
    built.unlink()  # not overwritten: it is loaded
    built.write_bytes(b"damaged")
    decode_bindings.library.cache_clear()
    assert choose_engine(random_model()) is CpuEngine


def test_a_variant_of_attention_is_decoded_by_the_model() -> None:
    class Variant(Attention):
        pass

    model = random_model()
    model.model.layers[1].self_attn.__class__ = Variant  # type: ignore[index,union-attr]
    assert choose_engine(model) is TorchEngine
    with pytest.raises(RequestError, match="--engine native: it does not know Variant"):
        choose_engine(model, "native")


@needs_compiler
def test_an_engine_that_cannot_decode_states_why() -> None:
    model = random_model()
    with pytest.raises(RequestError, match="--engine quick must be one of auto, native, graph, torch"):
        choose_engine(model, "quick")
    with pytest.raises(RequestError, match="--engine graph: CUDA graphs need a CUDA device"):
        choose_engine(model, "graph")
    assert choose_engine(model) is CpuEngine
    assert choose_engine(model, "torch") is TorchEngine
    model.compute_dtype = torch.bfloat16
    assert choose_engine(model) is TorchEngine
    with pytest.raises(RequestError, match="computes in float32, and the model in bfloat16"):
        choose_engine(model, "native")
