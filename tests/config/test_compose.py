"""Composition: presets and keys combine, `auto` is what the run decides, and every mistake is one line that helps."""

import ast
import dataclasses
import os
from pathlib import Path

import pytest
from helpers import train_here

from minitf.config.compose import compose_config
from minitf.config.presets import CONF
from minitf.config.schema import AutoModel, model_sizes, resolve_shape, resolve_size, written_values
from minitf.errors import RequestError
from minitf.model import ModelConfig
from minitf.optim import OptimConfig
from minitf.tokenizer import TokenizerConfig


def test_presets_and_keys_combine_and_the_command_line_wins() -> None:
    config = compose_config(
        ["experiment=quick", "model=small", "optim=adamw", "model.num_layers=3", "optim.betas=[0.8,0.9]", "seed=5",
         "trainer.max_minutes=null", 'attention.probes=["It is, as it were, = so"]', "name=my-run.2"]
    )  # fmt: skip
    assert (config.model.num_layers, config.model.hidden_size, config.optim.kind) == (3, 384, "adamw")
    assert config.optim.betas == [0.8, 0.9]
    assert config.trainer.max_minutes == 3.0  # the default limit, where no other is set
    assert config.attention.probes == ["It is, as it were, = so"]
    assert (config.seed, config.name) == (5, "my-run.2")


def test_compile_takes_true_false_and_auto() -> None:
    for value in ("true", "false", "auto"):
        assert compose_config([f"trainer.compile={value}"]).trainer.compile == value


# auto


def test_a_model_without_a_size_is_resolved_to_one() -> None:
    config = compose_config(["model.dropout=0.1"])
    assert config.size_is_auto
    assert isinstance(config.model, AutoModel)
    for name in ("nano", "mini", "small"):
        resolved = resolve_size(config, name)
        assert not resolved.size_is_auto
        assert resolved.model == compose_config([f"model={name}", "model.dropout=0.1"]).model
        assert type(resolved.model) is ModelConfig
    assert config.size_is_auto  # resolving makes a new config


@pytest.mark.slow
def test_a_size_brings_what_its_preset_sets_besides_but_nothing_that_was_asked_for() -> None:
    """As the preset itself does, whose keys give way to those of the command line."""
    nano = compose_config(["model=nano"])
    assert nano.optim.learning_rate > OptimConfig().learning_rate
    assert resolve_size(compose_config([]), "nano").optim == nano.optim
    assert resolve_size(compose_config([]), "mini").optim == OptimConfig()
    assert resolve_size(compose_config(["optim.learning_rate=0.005"]), "nano").optim.learning_rate == 0.005
    for asked in (["optim.learning_rate=0.005", "model.tie_embeddings=false"], ["optim=adamw"], ["optim.momentum=0.9"]):
        chosen, named = resolve_size(compose_config(asked), "nano"), compose_config(["model=nano", *asked])
        assert (chosen.model, chosen.optim) == (named.model, named.optim)
        assert "asked" not in written_values(compose_config(asked))["model"]


def test_a_part_of_a_size_is_completed_from_mini() -> None:
    config = compose_config(["model.hidden_size=384", "model.num_layers=auto", "model.context_length=0"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.context_length) == (4, 384, 128)
    assert not config.size_is_auto


def test_a_run_limited_by_steps_alone_has_the_same_model_everywhere() -> None:
    assert compose_config(["trainer.max_steps=5"]).model == model_sizes(ModelConfig())["mini"]
    assert compose_config(["trainer.max_steps=5", "trainer.max_minutes=1"]).size_is_auto


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        ([], (None, 3.0)),
        (["trainer.max_minutes=null"], (None, 3.0)),
        (["trainer.max_minutes=auto"], (None, 3.0)),
        (["trainer.max_minutes=7"], (None, 7.0)),
        (["trainer.max_steps=5"], (5, None)),
        (["trainer.max_steps=5", "trainer.max_minutes=3"], (5, 3.0)),
        (["experiment=quick"], (None, 0.25)),
        (["experiment=quick", "trainer.max_steps=5"], (5, 0.25)),  # both: the first that is reached
        (["experiment=quick", "trainer.max_steps=5", "trainer.max_minutes=null"], (5, None)),
        (["experiment=gpt2"], (20000, None)),
    ],
)
def test_three_minutes_are_the_limit_where_no_other_is_set(
    arguments: list[str], limits: tuple[int | None, float | None]
) -> None:
    trainer = compose_config(arguments).trainer
    assert (trainer.max_steps, trainer.max_minutes) == limits


def test_auto_and_the_zero_of_old_commands_are_the_same() -> None:
    keys = ["trainer.threads", "trainer.eval_every", "trainer.micro_batch_size", "tokenizer.vocab_size"]
    zeros, words, usual = (compose_config(list(a)) for a in ([f"{k}=0" for k in keys], [f"{k}=auto" for k in keys], []))
    assert zeros == words == usual
    assert usual.trainer.threads == 0
    assert compose_config(["trainer.threads=2", "trainer.attention_every=-1"]).trainer.attention_every == -1


def test_init_from_leaves_the_shape_to_that_model() -> None:
    shape = ModelConfig(num_layers=5, hidden_size=64, num_heads=2, context_length=512, rope_theta=5e5)
    tokenizer = TokenizerConfig(kind="pretrained", file="tokenizer.json")
    config = compose_config(["init_from=there", "experiment=quick", "model.dropout=0.2", "model.attention=explicit"])
    assert not config.size_is_auto  # nothing to choose
    resolved = resolve_shape(config, shape, tokenizer)
    assert resolved.model == dataclasses.replace(shape, dropout=0.2, attention="explicit")
    assert resolved.tokenizer == tokenizer
    for asked, expected in ((64, 64), (1024, 512)):
        config = compose_config(["init_from=there", f"model.context_length={asked}"])
        assert resolve_shape(config, shape, tokenizer).model.context_length == expected


@pytest.mark.parametrize("override", ["model=nano", "model.num_layers=3", "tokenizer=byte", "tokenizer.vocab_size=300"])
def test_init_from_refuses_another_shape_or_tokenizer(override: str) -> None:
    with pytest.raises(RequestError, match=f"{override}: init_from brings its own"):
        compose_config(["init_from=there", override])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.num_layer=3"], ["model.num_layer: no such key", "did you mean model.num_layers?"]),
        (["learning_rate=3"], ["learning_rate: no such key", "did you mean optim.learning_rate?"]),
        (["trainer.learning_rate=3"], ["did you mean optim.learning_rate?"]),
        (["max_steps=3"], ["did you mean trainer.max_steps?"]),
        (["optim.lr=3"], ["optim.lr: no such key", "did you mean optim.learning_rate?"]),
        (["sede=3"], ["did you mean seed?"]),
        (["modle=nano"], ["modle: no such key", "did you mean model?"]),
        (["+model.depth=3"], ["model.depth: no such key"]),
        (["model=nanno"], ["model=nanno: no such option", "did you mean nano?"]),
        (["data=shakespeare"], ["no such option", "tiny_shakespeare"]),
        (["model=qqqqq"], ["model=qqqqq: no such option", "nano", "small"]),
        (["model.num_layers=many"], ["model.num_layers", "many"]),
        (["model.num_layers=2.5"], ["model.num_layers", "2.5"]),
        (["optim.learning_rate=fast"], ["optim.learning_rate", "fast"]),
        (["model.qk_norm=perhaps"], ["model.qk_norm", "perhaps"]),
        (["optim.betas=0.9"], ["optim.betas is a list"]),
        (["data.files=book.txt"], ["data.files is a list: write 'data.files=[ONE,TWO]'"]),
        (["model=null"], ["model=null: no such option", "nano"]),
        (["trainer=3"], ["trainer=3: no such option", "debug"]),
        (["trainer=debgu"], ["trainer=debgu: no such option", "did you mean debug?"]),
        (["~model"], ["model must be given"]),
        (["~data=[kjv,web]"], ["~data=[kjv,web]: no such option"]),
        (["data=[1,2]"], ["data=[1,2]: no such option"]),
        (["hydra/job_logging=1.5"], ["hydra/job_logging=1.5: no such option"]),
        (["trainer.threads=many"], ["trainer.threads=many must be a whole number, or auto"]),
        (["trainer.max_minutes=long"], ["trainer.max_minutes=long must be a number, or auto"]),
        (["model.dropout=2"], ["model.dropout=2"]),
        (["model.num_heads=7"], ["model.num_heads=7"]),
        (["trainer.batch_size=0"], ["trainer.batch_size=0"]),
        (["trainer.max_minutes=-1"], ["trainer.max_minutes=-1"]),
        (["trainer.compile=maybe"], ["trainer.compile=maybe"]),
        (["optim.schedule=wavy"], ["optim.schedule=wavy", "cosine"]),
        (["tokenizer.vocab_size=10"], ["tokenizer.vocab_size=10"]),
        (["data.val_fraction=2"], ["data.val_fraction"]),
        (["name=../up"], ["name='../up'"]),
        (["name=a b"], ["name='a b'"]),
        (["model.num_layers"], ["model.num_layers"]),
        (["nonsense"], ["nonsense"]),
        (["data.files=[unclosed"], ["unclosed"]),
        (["trainer.max_minutes", "=", "3"], ["'trainer.max_minutes' is no setting", "without spaces around ="]),
        (["data=notes/book.txt"], ["no such option", "data=text 'data.files=[notes/book.txt]'"]),
        (["--model=small"], ["--model=small: no such flag", "no dashes, as in model=small;"]),
        (["optim.learning_rate=1e-3,3e-3"], ["optim.learning_rate=1e-3,3e-3", "-m"]),
        (["hydra.job.name=x"], ["hydra.job.name has no effect", "hydra.run.dir"]),
        (["hydra.sweep.dir=x"], ["hydra.sweep.dir has no effect on a single run"]),
        (["hydra/launcher=joblib"], ["hydra/launcher has no effect on a single run"]),
        (["hydra.verbose=true"], ["hydra.verbose has no effect"]),
        (["trainer.device=abacus", "data=kjv"], ["device", "abacus"]),
        (["trainer.precision=fp4"], ["trainer.precision=fp4"]),
        (["seed=99999999999999999999999"], ["seed"]),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_valid_name(
    workdir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert train_here(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("minitf: ")
    for word in words:
        assert word in err
    assert not list(workdir.iterdir())  # nothing was started


def test_only_config_and_the_commands_know_hydra() -> None:
    users = set()
    package = CONF.parent / "minitf"
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & {"omegaconf", "hydra"}:
                users.add(path.relative_to(package).as_posix())
    assert {name for name in users if not name.startswith("config/")} == {"runs/sweep.py", "cli/train.py"}


def test_a_conf_in_the_current_directory_is_not_read(workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf/config.yaml").write_text("name: other\n")
    assert compose_config([]).name == "kjv"
    assert os.listdir(workdir) == ["conf"]
