"""Presets, settings and the help page: every preset composes and has a description, every setting a comment."""

import dataclasses
import subprocess
import sys

import pytest

from minitf.config.compose import compose_config
from minitf.config.help import help_page
from minitf.config.presets import AUTO, COMMANDS, CONF, GROUPS, SECTIONS, all_keys, options, settings
from minitf.config.schema import Config
from minitf.errors import RequestError
from minitf.optim import OptimConfig
from minitf.training.trainer_config import TrainerConfig

REQUIRED = {
    "data=text": ["data.files=[book.txt]"],
    "data=pairs": ["data.files=[pairs.jsonl]"],
    "data=hub": ["data.hub_path=owner/name"],
    "tokenizer=pretrained": ["tokenizer.file=tokenizer.json"],
}
PRESETS = [f"{group}={option}" for group in GROUPS for option in options(group)]


def test_every_group_has_presets_and_conf_holds_nothing_else() -> None:
    found = {path.relative_to(CONF).parts[0] for path in CONF.rglob("*.yaml")}
    assert found == {*GROUPS, "config.yaml"}
    assert {"data=kjv", "data=web", "model=nano", "model=mini", "model=gpt2", "optim=adamw"} < set(PRESETS)
    assert {"trainer=default", "trainer=debug", "trainer=gpu"} < set(PRESETS)
    assert all(path.suffix == ".yaml" for path in CONF.rglob("*") if path.is_file())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_has_a_description(preset: str) -> None:
    config = compose_config([preset, *REQUIRED.get(preset, [])])
    group, _, option = preset.partition("=")
    if group in ("data", "experiment"):
        assert config.name == option
    assert len(options(group)[option].split()) > 3


@pytest.mark.parametrize("preset", sorted(REQUIRED))
def test_the_error_names_the_key_a_preset_requires(preset: str) -> None:
    key = REQUIRED[preset][0].partition("=")[0]
    with pytest.raises(RequestError, match=rf"{key} (is empty|must be given)") as error:
        compose_config([preset])
    assert "\n" not in str(error.value)


def test_the_default_is_an_embedded_text() -> None:
    config = compose_config([])
    assert (config.name, config.data.source, config.tokenizer.kind, config.optim.kind) == ("kjv", "kjv", "bpe", "muon")


def test_gpt2_has_the_shape_of_124m_parameters() -> None:
    config = compose_config(["experiment=gpt2"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (12, 768, 12)
    assert config.model.context_length == 1024
    assert config.tokenizer.vocab_size == 50304


def test_the_letter_exercises_differ_only_in_their_data() -> None:
    copy, *others = (compose_config([f"experiment={name}"]) for name in ("copy", "reverse", "sort"))
    for name, other in zip(("reverse", "sort"), others, strict=True):
        assert (other.name, other.data.source) == (name, name)
        assert dataclasses.replace(other, name=copy.name, data=copy.data) == copy
    assert (copy.tokenizer.kind, copy.model.num_layers, copy.trainer.max_minutes) == ("char", 2, 1.0)


def test_the_default_trainer_is_that_of_the_dataclass() -> None:
    assert compose_config([]).trainer == TrainerConfig()


def test_the_debug_trainer_ends_after_twenty_steps() -> None:
    config = compose_config(["trainer=debug"])
    assert (config.trainer.max_steps, config.trainer.max_minutes) == (20, None)
    assert config.trainer.attention_every <= 20
    assert not config.size_is_auto  # the same model on every machine


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from minitf.train import main; status = main(['--help']); "
        "heavy = {'torch', 'omegaconf', 'hydra', 'numpy', 'datasets', 'tokenizers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == help_page().strip()


def test_help_lists_every_key_and_preset_and_flag() -> None:
    page = help_page()
    for key in all_keys():
        if key not in SECTIONS:
            assert f" {key}=" in page, key
    for preset in PRESETS:
        assert f"    {preset.partition('=')[2]}" in page
    for flag in ("--cfg", "-p", "--resolve", "-m", "-cd", "-cn", "-cp", "--info", "--hydra-help", "--version"):
        assert f" {flag}" in page, flag


def test_help_shows_the_real_defaults() -> None:
    page = help_page()
    rate = f"optim.learning_rate={OptimConfig().learning_rate}"
    for setting in (rate, "model.qk_norm=true", "trainer.max_steps=null", "optim.betas=[0.9, 0.95]", 'name=""'):
        assert f" {setting} " in page, setting
    for key in AUTO:
        assert f" {key}=auto " in page, key


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_comment(section: str) -> None:
    found = list(settings(section))
    assert found
    for setting in found:
        assert len(setting.comment) > 8, f"{setting.key} has no comment"


def test_all_keys_are_those_of_the_schema() -> None:
    schema = []
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            schema += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)]
        schema.append(field.name)
    assert sorted(all_keys()) == sorted(schema)
    assert set(schema) >= AUTO


def test_every_console_command_has_a_module_with_a_main() -> None:
    from minitf import cli

    package = CONF.parent / "minitf"
    for command, module in COMMANDS.items():
        path = package / f"{module.replace('.', '/')}.py"
        assert "\ndef main(" in path.read_text(encoding="utf-8"), path
        assert getattr(cli, f"run_{command}").args == (command,)
