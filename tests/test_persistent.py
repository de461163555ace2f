"""The kernel that decodes on a GPU, run on a processor: every thread a fiber (see tests/cuda), against the model."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitf.attention import KeyValueCache
from minitf.decoding import persistent
from minitf.decoding.arrival import Arrival
from minitf.decoding.persistent import PersistentStep, Plan, plan
from minitf.decoding.sampling import Sampling
from minitf.errors import MinitfError
from minitf.generate import generate
from minitf.model import ModelConfig, Transformer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "minitf/decoding"


class Emulated:
    """What `CudaKernel` is, by a library made of the same source."""

    def __init__(self, planned: Plan, directory: Path) -> None:
        built = directory / "decode.so"
        done = subprocess.run(
            [
                *("g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{TESTS / 'cuda'}", f"-I{SOURCES}"),
                *[f"-D{name}={value}" for name, value in planned.definitions],
                *("-x", "c++", str(TESTS / "cuda/launch.cpp"), "-o", str(built)),
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[:3000]
        self.library = ctypes.CDLL(str(built))
        assert self.library.shared_bytes() <= planned.shared_bytes
        assert self.library.exchange_floats() == planned.exchange_floats
        self.num_launches = 0

    def prepare(self, blocks: int, threads: int, shared_bytes: int, arguments: ctypes.Structure) -> None:
        self.arguments = arguments

    def launch(self) -> None:
        self.num_launches += 1
        assert self.library.launch(ctypes.byref(self.arguments), self.num_launches) == 0, "threads wait for ever"


class RoundedCache(KeyValueCache):
    """Keeps what a cache in bfloat16 can, in float32."""

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        return super().append(layer, k_BHTK.bfloat16().float(), v_BHTK.bfloat16().float())


def random_model(vocab_size: int = 37, **shape: Any) -> Transformer:
    """Weights that bfloat16 holds exactly, those of norms with the matrices after them too."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "head_dim": 16, "context_length": 64}
    model = Transformer(ModelConfig(**sizes | shape), vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(2.0 ** torch.randint(-1, 2, parameter.shape))
            else:
                parameter.normal_(std=0.3).copy_(parameter.bfloat16().float())
    return model


def emulated_step(model: Transformer, cache: KeyValueCache, directory: Path, **layout: int) -> PersistentStep:
    layout = {"num_blocks": 3, "num_warps": 2, "most_shared_bytes": 12_000, "slot_bytes": 512} | layout
    planned = plan(model, **layout)
    assert isinstance(planned, Plan), planned
    step = PersistentStep.__new__(PersistentStep)
    step._prepare(model, cache, planned, Emulated(planned, directory))  # type: ignore[arg-type]
    return step


CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "plain": ({}, {}),
    "grouped queries, more parts than one": ({"num_kv_heads": 2}, {"num_blocks": 9}),
    "no norm of queries, untied": ({"qk_norm": False, "tie_embeddings": False}, {"num_warps": 4}),
    "odd sizes": (
        {"hidden_size": 40, "num_heads": 3, "head_dim": 24, "intermediate_size": 264, "num_kv_heads": 1},
        {"num_blocks": 7, "most_shared_bytes": 16_000},
    ),
    "wide": (
        {"hidden_size": 264, "num_heads": 1, "head_dim": 136, "intermediate_size": 1288, "num_layers": 1},
        {"num_blocks": 2, "most_shared_bytes": 40_000},
    ),
    "stretched": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 8}, {"num_blocks": 5}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_kernel_computes_the_model(case: str, tmp_path: Path) -> None:
    shape, layout = CASES[case]
    model = random_model(**shape)
    c, num_steps, num_read = model.config, 4, 57
    cache = KeyValueCache(*torch.full((2, c.num_layers, 1, c.num_kv_heads, 64, c.head_dim), torch.nan).bfloat16())
    expected = RoundedCache(*torch.zeros(2, c.num_layers, 1, c.num_kv_heads, 64, c.head_dim))
    ids_1T = torch.randint(37, (1, num_read))
    model(ids_1T, expected)
    cache.keys[..., :num_read, :], cache.values[..., :num_read, :] = (
        part[..., :num_read, :].bfloat16() for part in (expected.keys, expected.values)
    )
    cache.length = num_read
    step = emulated_step(model, cache, tmp_path, **layout)
    for _ in range(num_steps):
        ids_1 = torch.randint(37, (1,))
        wanted_1V = model(ids_1[None], expected)[:, -1]
        found_1V, likeliest_1, told = step._read(ids_1[None])
        scale = float(wanted_1V.std())
        torch.testing.assert_close(found_1V, wanted_1V, rtol=0, atol=2e-3 * scale)
        assert told.tolist() == [int(likeliest_1), 1] == [int(found_1V.argmax()), 1]
        cache.length += 1
    for part, wanted in ((cache.keys, expected.keys), (cache.values, expected.values)):
        found = part[..., : cache.length, :].float()
        torch.testing.assert_close(found, wanted[..., : cache.length, :], rtol=1e-2, atol=1e-3)
        assert part[..., cache.length :, :].isnan().all()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """A model of a short context that the emulated kernel serves as if on a GPU, and ids that take time to come."""
    model = random_model(context_length=12, num_layers=1)
    model.compute_dtype = torch.bfloat16

    def step(model: Transformer, cache: KeyValueCache) -> PersistentStep:
        return emulated_step(model, cache, tmp_path)

    monkeypatch.setattr(persistent, "obstacle", lambda model, batch_size: None)
    monkeypatch.setattr(persistent, "PersistentStep", step)
    monkeypatch.setattr(Arrival, "is_here", False)
    return model


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0, repetition_penalty=1.3)])
def test_texts_past_the_context_are_those_of_the_model(served: Transformer, sampling: Sampling) -> None:
    steps = generate(served, [1, 2, 3], 1, sampling, engine="persistent", most=16)
    found = [step.ids_B.tolist() for step in steps]
    served.compute_dtype = torch.float32
    expected = [step.ids_B.tolist() for step in generate(served, [1, 2, 3], 1, sampling, engine="torch", most=16)]
    assert found == expected
    assert len(expected) == 16


def test_scores_that_are_no_numbers_are_an_error(served: Transformer) -> None:
    torch.nn.init.constant_(served.model.layers[0].mlp.up_proj.weight, torch.nan)  # type: ignore[union-attr,index,arg-type]
    with pytest.raises(MinitfError, match="not finite"):
        next(generate(served, [1, 2, 3], 1, Sampling(0), engine="persistent"))
