"""The configuration: every preset composes, every mistake is one line that helps, every setting is explained."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import train_here

from minitf.config.help import CONF, GROUPS, SECTIONS, all_keys, help_page, options, settings
from minitf.config.schema import Config, changed_settings, compose_config, flat, load_config, save_config
from minitf.errors import MinitfError, RequestError
from minitf.optim import OptimConfig

REQUIRED = {
    "data=text": ["data.files=[book.txt]"],
    "data=pairs": ["data.files=[pairs.jsonl]"],
    "data=hub": ["data.hub_path=owner/name"],
    "tokenizer=pretrained": ["tokenizer.file=tokenizer.json"],
}
PRESETS = [f"{group}={option}" for group in GROUPS for option in options(group)]


# Presets


def test_there_is_a_preset_in_every_group_and_no_file_beside_them() -> None:
    found = {path.relative_to(CONF).parts[0] for path in CONF.rglob("*.yaml")}
    assert found == {*GROUPS, "config.yaml"}
    assert {"data=kjv", "data=web", "model=nano", "model=mini", "model=gpt2", "optim=adamw"} < set(PRESETS)
    assert all(path.suffix == ".yaml" for path in CONF.rglob("*") if path.is_file())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes(preset: str) -> None:
    config = compose_config([preset, *REQUIRED.get(preset, [])])
    assert isinstance(config, Config)
    group, _, option = preset.partition("=")
    if group in ("data", "experiment"):
        assert config.name == option


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_begins_with_what_it_is(preset: str) -> None:
    group, _, option = preset.partition("=")
    assert len(options(group)[option]) > 10


@pytest.mark.parametrize("preset", sorted(REQUIRED))
def test_what_a_preset_needs_is_asked_for_by_name(preset: str) -> None:
    key = REQUIRED[preset][0].partition("=")[0]
    with pytest.raises(RequestError, match=rf"{key} (is empty|must be given)") as error:
        compose_config([preset])
    assert "\n" not in str(error.value)


def test_the_default_is_the_embedded_text_without_network() -> None:
    config = compose_config([])
    assert (config.name, config.data.source, config.tokenizer.kind, config.optim.kind) == ("kjv", "kjv", "bpe", "muon")


def test_gpt2_is_the_124m_shape() -> None:
    config = compose_config(["experiment=gpt2"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (12, 768, 12)
    assert config.model.context_length == 1024
    assert config.tokenizer.vocab_size == 50304


def test_presets_and_keys_combine_and_the_last_word_is_the_command_lines() -> None:
    config = compose_config(
        ["experiment=quick", "model=small", "optim=adamw", "model.num_layers=3", "optim.betas=[0.8,0.9]", "seed=5",
         "trainer.max_minutes=null", 'attention.probes=["It is, as it were, = so"]', "name=my-run.2"]
    )  # fmt: skip
    assert (config.model.num_layers, config.model.hidden_size, config.optim.kind) == (3, 384, "adamw")
    assert config.optim.betas == [0.8, 0.9]
    assert config.trainer.max_minutes is None
    assert config.attention.probes == ["It is, as it were, = so"]
    assert (config.seed, config.name) == (5, "my-run.2")


def test_trainer_compile_takes_true_false_and_auto() -> None:
    for value in ("true", "false", "auto"):
        assert compose_config([f"trainer.compile={value}"]).trainer.compile == value


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
        (["model=null"], ["model"]),
        (["trainer=3"], ["trainer"]),
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
        (["optim.learning_rate=1e-3,3e-3"], ["optim.learning_rate"]),
        (["trainer.device=abacus", "data=kjv"], ["device", "abacus"]),
        (["trainer.precision=fp4"], ["trainer.precision=fp4"]),
        (["seed=99999999999999999999999"], ["seed"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_the_nearest_right_thing(
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


# Help


def test_help_answers_at_once_and_without_torch(workdir: Path) -> None:
    code = (
        "import sys; from minitf.train import main; status = main(['--help']); "
        "heavy = {'torch', 'omegaconf', 'hydra', 'numpy', 'datasets', 'tokenizers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for key in all_keys():
        if key not in SECTIONS:
            assert f" {key}=" in done.stdout, key
    for preset in PRESETS:
        assert f"    {preset.partition('=')[2]}" in done.stdout
    assert done.stdout.strip() == help_page().strip()
    assert not list(workdir.iterdir())


def test_help_shows_the_real_defaults() -> None:
    page = help_page()
    rate = f"optim.learning_rate={OptimConfig().learning_rate}"
    for setting in (rate, "model.qk_norm=true", "trainer.max_steps=null", "optim.betas=[0.9, 0.95]"):
        assert f" {setting} " in page, setting


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_comment(section: str) -> None:
    found = list(settings(section))
    assert found
    for setting in found:
        assert len(setting.comment) > 8, f"{setting.key} has no comment"


def test_all_keys_are_the_keys_of_the_schema() -> None:
    schema = []
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            schema += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)]
        schema.append(field.name)
    assert sorted(all_keys()) == sorted(schema)


def test_only_config_knows_omegaconf_and_hydra() -> None:
    users = set()
    for path in (CONF.parent / "minitf").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "omegaconf" for name in names):
                users.add(path.name)
    assert users == {"config.py"}


# config.yaml


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["experiment=quick", "attention.probes=[a,'b: c']", "optim.betas=[0.1,0.2]", "trainer.max_minutes=null"],
        ["data=text", "data.files=['a, b.txt',c.txt]", "name=n", "run_dir='/x y/z'", "trainer.compile=true"],
        ["model=nano", "model.num_kv_heads=2", "model.rope_theta=1e6", "optim=adamw", "optim.learning_rate=1e-5"],
    ],
)
def test_a_saved_config_is_loaded_as_it_was(tmp_path: Path, arguments: list[str]) -> None:
    config = compose_config(arguments)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_saved_config_takes_overrides(tmp_path: Path) -> None:
    config = compose_config(["model=nano", "trainer.max_steps=5"])
    save_config(config, tmp_path / "config.yaml")
    changed = ["trainer.max_steps=7", "trainer.max_minutes=null", "optim.learning_rate=1e-3", "attention.probes=[a,b]"]
    loaded = load_config(tmp_path / "config.yaml", changed)
    assert (loaded.trainer.max_steps, loaded.trainer.max_minutes) == (7, None)
    assert loaded.optim.learning_rate == 1e-3
    assert loaded.attention.probes == ["a", "b"]
    assert loaded.model == config.model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.max_step=7"], "did you mean trainer.max_steps?"),
        (["model=small"], "keeps its presets"),
        (["trainer.max_steps=many"], "trainer.max_steps"),
        (["trainer.batch_size=-1"], "trainer.batch_size=-1"),
    ],
)
def test_a_wrong_override_of_a_saved_config_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    save_config(compose_config([]), tmp_path / "config.yaml")
    with pytest.raises(RequestError, match=words) as error:
        load_config(tmp_path / "config.yaml", arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "model: [\n", "model:\n  depth: 3\n", "\0\xff", "model: 3\n"])
def test_a_damaged_config_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(MinitfError, match=r"config\.yaml") as error:
        load_config(path)
    assert "\n" not in str(error.value)
    with pytest.raises(MinitfError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_flat_settings_are_plain_values_by_their_keys() -> None:
    values = flat(compose_config(["model=nano"]))
    assert values["model.hidden_size"] == 128
    assert values["optim.betas"] == "[0.9, 0.95]"
    assert set(values) <= set(all_keys())
    assert all(isinstance(value, bool | int | float | str) for value in values.values())


def test_composing_reads_conf_and_not_the_current_directory(workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf/config.yaml").write_text("name: other\n")
    assert compose_config([]).name == "kjv"
    assert os.listdir(workdir) == ["conf"]


def test_runs_are_compared_by_what_is_not_as_usual() -> None:
    """TensorBoard's HParams shows the first five columns: forty settings that all runs share would fill them."""
    assert changed_settings(compose_config([])) == {"data": "kjv"}
    config = compose_config(["seed=3", "optim.learning_rate=1e-3", "model=nano", "trainer.max_minutes=1"])
    found = changed_settings(config)
    assert {key: found[key] for key in ("data", "seed", "optim.learning_rate", "trainer.max_minutes")} == {
        "data": "kjv", "seed": 3, "optim.learning_rate": 1e-3, "trainer.max_minutes": 1.0
    }  # fmt: skip
    assert any(key.startswith("model.") for key in found)
    assert set(found) < set(flat(config)) | {"data"}
