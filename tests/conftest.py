"""Shared fixtures (a tiny text, tokenizer, model and run), the environment of the tests, and the rules for skips."""

import os

# Read by the imports below: no network, and one thread, since two workers share two cores.
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import fcntl
import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when imported: its kernels then run without a GPU

from helpers import EXERCISE, SHAPE, NotApplicable, make_text, randomise, train_here
from hydra._internal.hydra import Hydra

from minitf.data.tokenizer_training import train_tokenizer
from minitf.model import ModelConfig, Transformer
from minitf.tokenizer import Tokenizer, TokenizerConfig

gc.freeze()  # objects of the imports stay for good; the garbage collector need not scan them again

pytest_plugins = ("tensorboard_server",)

COMPLETE = bool(os.environ.get("MINITF_CI"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With MINITF_CI=1 a skip fails the run, as a tool is missing: unless it is `hardware` or `not_applicable`."""
    report: Any = yield
    if COMPLETE and report.skipped and not item.get_closest_marker("hardware"):
        assert call.excinfo is not None
        if not call.excinfo.errisinstance(NotApplicable):
            report.outcome, report.longrepr = "failed", f"MINITF_CI=1 allows no skip: {report.longrepr[-1]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """The same for a module that skips itself as a whole."""
    report: Any = yield
    if COMPLETE and report.skipped:
        report.outcome, report.longrepr = "failed", f"MINITF_CI=1 allows no skip: {report.longrepr[-1]}"
    return report


def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all workers of this test run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(root: Path, make: Callable[[], None]) -> Path:
    """`root` as `make` fills it: in the first worker that asks for it; the others wait and read it too."""
    with root.with_name(f"{root.name}.made").open("a+") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        if marker.seek(0, os.SEEK_END) == 0:  # it may have grown while this worker waited for the lock
            root.mkdir()
            make()
            marker.write("yes")
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests and the processes they start have a home and a cache of their own, one language and no terminal."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "LANGUAGE", "HF_TOKEN", "HF_ENDPOINT"):
            patch.delenv(name, raising=False)
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # each process would compile the package anew
        for name, value in {"LC_ALL": "C.UTF-8", "TZ": "UTC", "TERM": "dumb"}.items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        cache = of_all_workers(tmp_path_factory) / "cache"
        cache.mkdir(exist_ok=True)
        patch.setenv("MINITF_CACHE", str(cache))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # for commands started in other directories
        yield


@pytest.fixture(scope="session", autouse=True)
def _composed_once() -> Iterator[None]:
    """Hydra composes a config twice, first only to read hydra.mode: that alone is half of a short run's time.

    Only where something on the command line may set it the first composition is left; commands that tests start in
    processes of their own have both.
    """
    read_mode = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        may_be_set = config_name != "config" or any("hydra" in override for override in overrides)
        return read_mode(self, config_name, overrides) if may_be_set else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", get_mode)
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
    """Makes a tiny model in evaluation mode. All its weights are random, none is zero or one."""

    def make(vocab_size: int = 50, seed: int = 0, **changes: object) -> Transformer:
        model = Transformer(ModelConfig(**{**SHAPE, **changes}), vocab_size)  # type: ignore[arg-type]
        randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> list[str]:
    """Arguments of a run of about a second."""
    return [
        "data=text", f"data.files=['{text_file}']", "tokenizer=byte",
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
    """A finished run, runs/tiny/one in a directory of its own. Tests only read it."""
    root = of_all_workers(tmp_path_factory) / "trained"
    run = root / "runs" / "tiny" / "one"
    changes = ["trainer.attention_every=3", "trainer.sample_tokens=8", "trainer.max_steps=40", "trainer.eval_every=20"]
    probes = 'attention.probes=["The cat sat on the mat.","Sir, go = on"]'

    def make() -> None:
        assert train_here(*tiny, *changes, "trainer.eval_tokens=100000", probes, f"run_dir='{run}'") == 0

    made_once(root, make)
    return run


@pytest.fixture(scope="session")
def pronouns_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 100 steps, which has learnt who is meant. Tests only read it."""
    root = of_all_workers(tmp_path_factory) / "pronouns"
    run = root / "runs/pronouns/one"

    def make() -> None:
        assert train_here(*EXERCISE, "trainer.max_steps=100", "trainer.attention_every=50", f"run_dir='{run}'") == 0

    made_once(root, make)
    return run


@pytest.fixture(scope="session")
def copying_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs that has learned to copy a few letters. Tests only read it.

    Learning rates are about half the defaults, with which two seeds of five misalign a sixth of the letters or more.
    With these, none of 14 seeds misaligns any, so another processor's rounding should not matter either.
    """
    root = of_all_workers(tmp_path_factory) / "copying"
    file, run = root / "copies.jsonl", root / "runs" / "copying" / "one"
    choose = random.Random(0)
    texts = sorted({"".join(choose.choices("abcd", k=choose.randint(1, 8))) for _ in range(3000)})
    choose.shuffle(texts)
    arguments = [
        "data=pairs", f"data.files=['{file}']", "tokenizer=char",
        *(f"model.{key}={value}" for key, value in SHAPE.items()),
        "trainer.batch_size=32", "trainer.max_steps=400", "trainer.eval_every=100", "trainer.attention_every=100",
        "optim.learning_rate=0.003", "optim.matrix_learning_rate=0.015",
        "trainer.eval_answers=32", "trainer.device=cpu", "trainer.precision=fp32", "trainer.compile=false",
        f"run_dir='{run}'",
    ]  # fmt: skip

    def make() -> None:
        pairs = (f'{{"prompt": "{text}", "completion": "{text}"}}\n' for text in texts)
        file.write_text("".join(pairs), encoding="utf-8")
        assert train_here(*arguments) == 0

    made_once(root, make)
    return run
