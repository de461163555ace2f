"""What the tests share: a tiny text, tokenizer, model and run, and no network, no cache and no run of the user's."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # two at once on two cores: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run without a GPU

from helpers import SHAPE, make_text, randomise, train_here

from minitf.model import ModelConfig, Transformer
from minitf.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

gc.freeze()  # what the imports made stays: it need not be looked through for garbage again and again


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # for the commands started elsewhere
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 kB of simple sentences."""
    file = tmp_path_factory.mktemp("text") / "tiny.txt"
    file.write_text(make_text(600), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=300), [make_text(600)])


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """A tiny model with random weights everywhere, in evaluation mode."""

    def make(vocab_size: int = 50, seed: int = 0, **changes: object) -> Transformer:
        model = Transformer(ModelConfig(**{**SHAPE, **changes}), vocab_size)  # type: ignore[arg-type]
        randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> list[str]:
    """Arguments of a run of about a second."""
    return [
        "data=text", f"data.files=[{text_file}]", "tokenizer=byte",
        *(f"model.{key}={value}" for key, value in SHAPE.items()),
        "trainer.batch_size=4", "trainer.max_steps=6", "trainer.log_every=1", "trainer.eval_every=3",
        "trainer.eval_tokens=512", "trainer.attention_every=-1", "trainer.sample_tokens=0", "trainer.device=cpu",
        "trainer.precision=fp32", "trainer.compile=false",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A finished run at runs/tiny/one of the directory it lies in; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    run = root / "runs" / "tiny" / "one"
    changes = ["trainer.attention_every=3", "trainer.sample_tokens=8", "trainer.max_steps=40", "trainer.eval_every=20"]
    probes = 'attention.probes=["The cat sat on the mat.","Sir, go = on"]'
    assert train_here(*tiny, *changes, "trainer.eval_tokens=100000", probes, f"run_dir={run}") == 0
    return run


@pytest.fixture(scope="session")
def copying_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs that has learned to copy a few letters; not to be changed."""
    root = tmp_path_factory.mktemp("copying")
    choose = random.Random(0)
    texts = sorted({"".join(choose.choices("abcd", k=choose.randint(1, 8))) for _ in range(3000)})
    choose.shuffle(texts)
    file = root / "copies.jsonl"
    file.write_text("".join(f'{{"prompt": "{text}", "completion": "{text}"}}\n' for text in texts), encoding="utf-8")
    run = root / "runs" / "copying" / "one"
    arguments = [
        "data=pairs", f"data.files=[{file}]", "tokenizer=char",
        *(f"model.{key}={value}" for key, value in SHAPE.items()),
        "trainer.batch_size=32", "trainer.max_steps=300", "trainer.eval_every=100", "trainer.attention_every=100",
        "trainer.eval_answers=32", "trainer.device=cpu", "trainer.precision=fp32", "trainer.compile=false",
        f"run_dir={run}",
    ]  # fmt: skip
    assert train_here(*arguments) == 0
    return run
