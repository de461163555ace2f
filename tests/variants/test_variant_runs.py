"""A run with a variant, from training to export: it is used everywhere, and what it is no model of is said."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import assert_one_line, assert_same_run, interrupt_at, losses, train_here

import minitf
from minitf.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from minitf.checkpoints.gguf import main as export
from minitf.edits import ablate, block, move, transplant
from minitf.errors import RequestError, run_command
from minitf.generate import GenerationRequest, generate
from minitf.inference.sampling import Sampling
from minitf.interpretability.attention_maps import attention_maps
from minitf.interpretability.interventions import Reader
from minitf.interpretability.patching import patch
from minitf.interpretability.residual import contributions, lens
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer
from minitf.variants import attention_class, formula, names

VARIANTS = [name for name in names() if name != "softmax"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# One that passes values past the three steps, and one that is another formula: the others are slow.
every_run = pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name in ("differential", "sink") else [pytest.mark.slow]) for name in VARIANTS],
)
SENTENCE = "The cat sat on the mat."


def saved(make_model: Callable[..., Transformer], tokenizer: Tokenizer, directory: Path, **shape: Any) -> Path:
    model = make_model(tokenizer.vocab_size, context_length=96, **shape)
    return save_checkpoint(directory, model, tokenizer, {}, {"step": 1}, is_best=True, keep=1)


@every_run
def test_a_run_trains_resumes_and_generates(
    variant: str, workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny, "trainer.max_steps=4", "trainer.attention_every=2", f"model.variant={variant}"]
    assert train_here(*settings, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert train_here(*settings, "run_dir=half") == 0
    assert train_here("resume=half") == 0
    assert_same_run("half", "whole")
    assert json.loads(Path("whole/decisions.json").read_text())["backend"] == "reference"
    assert (Path("whole") / "attention.jsonl").stat().st_size > 0

    lm = minitf.load("whole")
    ids = lm.tokenizer.encode(SENTENCE)[:8]
    request = GenerationRequest(ids, Sampling(temperature=0), max_tokens=6)
    steps = generate(lm.model, request)
    found = [int(next(steps).ids_B[0]) for _ in range(6)]
    for token in found:  # without a cache
        with torch.no_grad():
            assert int(lm.model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids = [*ids, token]
    assert len(lm.predict(SENTENCE, [block("mat", "cat")])) == 5


@every_variant
def test_a_saved_model_is_the_same_and_says_what_it_is(
    variant: str, make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    directory = saved(make_model, tokenizer, tmp_path, variant=variant)
    loaded = load_checkpoint(directory).model
    ids_BT = torch.randint(tokenizer.vocab_size, (1, 60))
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT), make_model(tokenizer.vocab_size, context_length=96, variant=variant)(ids_BT))
    config = json.loads((directory / "config.json").read_text())
    assert config["minitf"]["variant"] == variant
    if variant == "sliding_window":
        assert config["model_type"] == "qwen3"
        assert config["sliding_window"] == 32
    else:
        assert config["model_type"] == "minitf"
        assert f"no model of transformers, since its attention is the variant {variant}" in config["minitf"]["note"]


@pytest.mark.parametrize("variant", ["sink", "sliding_window"])
def test_transformers_computes_it_or_refuses_it(
    variant: str, make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="install the extra minitf[test]")
    directory = saved(make_model, tokenizer, tmp_path, variant=variant)
    if variant == "sink":
        with pytest.raises(ValueError, match="minitf"):
            transformers.AutoModelForCausalLM.from_pretrained(directory)
        return
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 96))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_BT).logits, load_checkpoint(directory).model(ids_BT), rtol=0, atol=1e-4)


def test_a_window_of_another_size_is_refused(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    directory = saved(make_model, tokenizer, tmp_path, variant="sliding_window")
    config = json.loads((directory / "config.json").read_text())
    from minitf.checkpoints.hugging_face import from_hugging_face

    with pytest.raises(ValueError, match="its sliding window is 64, here it is 32"):
        from_hugging_face(config | {"sliding_window": 64})


@every_variant
def test_gguf_is_refused_in_one_line(
    variant: str,
    make_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = saved(make_model, tokenizer, tmp_path, variant=variant)
    status = run_command(lambda: export(["--run", str(directory), "--out", str(tmp_path / "a.gguf")]))
    assert status == 2
    assert_one_line(
        capsys.readouterr().err, f"llama.cpp does not have the attention of this model, the variant {variant}"
    )
    assert not (tmp_path / "a.gguf").exists()


def test_the_card_says_that_it_is_no_model_of_transformers(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "trainer.max_steps=2", "model.variant=sink", "run_dir=one") == 0
    card = huggingface_hub.ModelCard.load(Path("one/checkpoints/latest/README.md"))
    assert card.data.library_name == "minitf"
    assert "since its attention is the variant sink" in card.text
    assert "AutoModelForCausalLM" not in card.text


def test_an_edited_variant_leaves_a_trace(
    make_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = saved(make_model, tokenizer, tmp_path, variant="sink")
    load_checkpoint(directory)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("minitf.backends.source.file_hash", lambda module: "another")
    load_checkpoint(directory)
    assert_one_line(capsys.readouterr().err, "minitf/variants/sink.py was another file then")


@every_variant
def test_maps_say_what_is_computed_instead(
    variant: str, make_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    model = make_model(tokenizer.vocab_size, context_length=96, variant=variant)
    maps = attention_maps(model, tokenizer, SENTENCE * 3)
    viewer = maps.to_viewer()
    assert viewer["formula"] == formula(attention_class(variant)) == maps.to_json()["formula"]
    sums_LHT = maps.weights_LHTS.sum(-1)
    assert viewer["rows_sum_to_one"] == bool(((sums_LHT - 1).abs() < 1e-3).all())


@pytest.mark.parametrize(
    ("variant", "sum_to_one", "standard"),
    [
        ("off_by_one", False, False),
        ("differential", False, False),
        ("value_residual", True, True),
        ("alibi", True, False),
    ],
)
def test_where_rows_do_not_sum_to_one_the_maps_say_so(
    variant: str, sum_to_one: bool, standard: bool, make_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    """Values are recorded as they are gathered, so the standard steps explain a mixture of values."""
    viewer = attention_maps(make_model(tokenizer.vocab_size, variant=variant), tokenizer, SENTENCE).to_viewer()
    assert (viewer["rows_sum_to_one"], viewer["standard_formula"]) == (sum_to_one, standard)


def test_the_standard_attention_has_no_other_formula(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    viewer = attention_maps(make_model(tokenizer.vocab_size), tokenizer, SENTENCE).to_viewer()
    assert (viewer["formula"], viewer["rows_sum_to_one"], viewer["standard_formula"]) == (None, True, True)


@every_variant
def test_every_question_to_a_model_has_an_answer(
    variant: str, make_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    """Edits change the prediction or are without a look to change; the parts of a logit and of the lens are exact."""
    reader = Reader(make_model(tokenizer.vocab_size, context_length=96, variant=variant), tokenizer)
    with torch.no_grad():
        logits_V = reader.model(reader.ids(SENTENCE))[0, -1]
    found = contributions(reader, SENTENCE)
    assert sum(found.parts.values()) == pytest.approx(float(logits_V.max()), abs=1e-3)
    assert lens(reader, SENTENCE).best[-1][-1][1] == pytest.approx(float(logits_V.softmax(-1).max()), abs=1e-5)
    usual = dict(reader.predict(SENTENCE, top_k=tokenizer.vocab_size))
    twin = transplant("mat", "The dog ran up the mat.")
    for edit in (block("mat", "cat"), move("mat", "cat", "sat"), ablate([(0, 1)]), ablate(mlp=0), twin):
        edited = dict(reader.predict(SENTENCE, [edit], top_k=tokenizer.vocab_size))
        assert edited != usual, edit
        assert sum(edited.values()) == pytest.approx(1, abs=1e-4)
    patched = patch(reader, "The cat sat", "The sat sat", "cat", "mat")
    assert all(values.isfinite().all() for values in vars(patched).values() if isinstance(values, torch.Tensor))


def test_a_variant_does_not_mix_with_init_from(workdir: Path, tiny: list[str]) -> None:
    from minitf.config.compose import compose_config

    with pytest.raises(RequestError, match="init_from brings its own shape"):
        compose_config(["init_from=runs/a", "model.variant=sink"])


def test_a_run_started_from_a_variant_keeps_it(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "trainer.max_steps=2", "model.variant=gated", "run_dir=one") == 0
    assert train_here(*tiny[:2], *tiny[-9:], "trainer.max_steps=2", "init_from=one", "run_dir=two") == 0
    assert minitf.load("two").model.config.variant == "gated"


@every_run
def test_a_dry_run_measures_it(
    variant: str, workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, f"model.variant={variant}", "trainer.dry_run=true") == 0
    assert ", by attention.py as written" in capsys.readouterr().out


@pytest.mark.machines
def test_two_processes_train_as_one(workdir: Path, tiny: list[str]) -> None:
    """Every variant, with each strategy; the processes start once, which takes longer than all training."""
    settings = [*tiny, "trainer.max_steps=2", "trainer.eval_every=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run([*command, script, *settings], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    for variant in VARIANTS:
        assert train_here(*settings, f"model.variant={variant}", f"run_dir={variant}") == 0
        for strategy in ("ddp", "fsdp"):
            pairs = zip(losses(f"{strategy}/{variant}"), losses(variant), strict=True)
            for (step, split, loss), (also, same, expected) in pairs:
                assert (step, split) == (also, same)
                assert loss == pytest.approx(expected, abs=1e-3), (strategy, variant)
