"""A run's config.yaml: what is saved is loaded, old files too, and damaged or hostile ones are refused by name."""

from pathlib import Path

import pytest
import yaml

from minitf.config.compose import compose_config
from minitf.config.overrides import quoted
from minitf.config.presets import AUTO, all_keys
from minitf.config.schema import changed_settings, flat, load_config, resolve_size, save_config
from minitf.errors import MinitfError, RequestError


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=mini"],
        ["experiment=quick", "attention.probes=[a,'b: c']", "optim.betas=[0.1,0.2]", "trainer.max_minutes=null"],
        ["model=nano", "data=text", "data.files=['a, b.txt',c.txt]", "name=n", "run_dir='/x y/z'"],
        ["model=nano", "model.num_kv_heads=2", "model.rope_theta=1e6", "optim=adamw", "trainer.compile=true"],
        ["trainer.max_steps=5"],
    ],
)
def test_a_saved_config_is_loaded_as_it_was(tmp_path: Path, arguments: list[str]) -> None:
    config = compose_config(arguments)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_saved_config_says_auto_and_not_zero(tmp_path: Path) -> None:
    save_config(resolve_size(compose_config([]), "nano"), tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(saved)[:2] == ["name", "seed"]
    assert saved["trainer"]["max_minutes"] == 3.0
    for key in AUTO:
        section, name = key.split(".")
        value = saved[section][name]
        assert value if section == "model" else value in ("auto", 3.0), key


OLD = """\
name: kjv
seed: 3
run_dir: null
resume: null
init_from: null
data: {kind: text, source: kjv, files: []}
tokenizer: {kind: bpe, vocab_size: 0, file: null}
model: {num_layers: 2, hidden_size: 128, num_heads: 4, num_kv_heads: 4, head_dim: 32, intermediate_size: 384,
  context_length: 128}
optim: {kind: muon}
trainer: {max_steps: null, max_minutes: null, batch_size: 16, micro_batch_size: 0, threads: 0, log_every: 0,
  eval_every: 0, save_every: 0, attention_every: 0}
attention: {probes: null}
"""


def test_the_config_of_an_old_run_is_loaded_zeros_and_nulls_included(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD)
    config = load_config(tmp_path / "config.yaml")
    assert config.trainer == compose_config([]).trainer
    assert config.trainer.max_minutes == 3.0
    assert config.tokenizer == compose_config([]).tokenizer
    assert config.model == compose_config(["model=nano"]).model
    assert not config.size_is_auto
    (tmp_path / "config.yaml").write_text(OLD.replace("max_steps: null", "max_steps: 10"))
    assert load_config(tmp_path / "config.yaml").trainer.max_minutes is None


def test_a_saved_config_takes_overrides(tmp_path: Path) -> None:
    config = compose_config(["model=nano", "trainer.max_steps=5"])
    save_config(config, tmp_path / "config.yaml")
    changed = ["trainer.max_steps=7", "trainer.max_minutes=null", "optim.learning_rate=1e-3", "attention.probes=[a,b]"]
    loaded = load_config(tmp_path / "config.yaml", [*changed, "trainer.threads=auto", "trainer.eval_every=2"])
    assert (loaded.trainer.max_steps, loaded.trainer.max_minutes) == (7, None)
    assert (loaded.trainer.threads, loaded.trainer.eval_every) == (0, 2)
    assert loaded.optim.learning_rate == 1e-3
    assert loaded.attention.probes == ["a", "b"]
    assert loaded.model == config.model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.max_step=7"], "did you mean trainer.max_steps?"),
        (["model=small"], "keeps its presets"),
        (["trainer=debug"], "keeps its presets"),
        (["trainer.max_steps=many"], "trainer.max_steps"),
        (["trainer.batch_size=-1"], "trainer.batch_size=-1"),
        (["trainer.eval_every=soon"], "trainer.eval_every=soon must be a whole number, or auto"),
        (["hydra.run.dir=elsewhere"], "hydra"),
    ],
)
def test_a_wrong_override_of_a_saved_config_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    save_config(compose_config(["model=mini"]), tmp_path / "config.yaml")
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


@pytest.mark.parametrize("line", ["seed: ${oc.env:HOME}", "name: !!python/object:os.system x", "a: &a 1", "b: *a"])
def test_a_config_file_holds_plain_values_only(tmp_path: Path, line: str) -> None:
    (tmp_path / "config.yaml").write_text(f"{OLD}{line}\n")
    with pytest.raises(MinitfError, match=r"config\.yaml"):
        load_config(tmp_path / "config.yaml")


def test_flat_settings_are_plain_values_by_their_keys() -> None:
    values = flat(compose_config(["model=nano"]))
    assert values["model.hidden_size"] == 128
    assert values["optim.betas"] == "[0.9, 0.95]"
    assert set(values) <= set(all_keys())
    assert all(isinstance(value, bool | int | float | str) for value in values.values())


def test_runs_are_compared_by_the_settings_that_differ_from_the_defaults() -> None:
    """TensorBoard's HParams shows the first five columns: forty settings that all runs share would fill them."""
    assert changed_settings(compose_config(["model=mini"])) == {"data": "kjv"}
    config = compose_config(["seed=3", "optim.learning_rate=1e-3", "model=nano", "trainer.max_minutes=1"])
    found = changed_settings(config)
    assert {key: found[key] for key in ("data", "seed", "optim.learning_rate", "trainer.max_minutes")} == {
        "data": "kjv", "seed": 3, "optim.learning_rate": 1e-3, "trainer.max_minutes": 1.0
    }  # fmt: skip
    assert any(key.startswith("model.") for key in found)
    assert set(found) < set(flat(config)) | {"data"}
    assert changed_settings(compose_config(["trainer.max_steps=4"])) == {"data": "kjv", "trainer.max_steps": 4}


@pytest.mark.parametrize(
    "text", ["cost ${price} now", "\\${x", "${oc.env:HOME}", "a\\\\${b}", "日本 'x' \"y\"", "~[x]"]
)
def test_text_in_a_config_is_text(tmp_path: Path, text: str) -> None:
    config = compose_config([f"attention.probes=[{quoted(text)}]", "model=nano"])
    assert config.attention.probes == [text]
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").attention.probes == [text]
    changed = load_config(tmp_path / "config.yaml", [f"data.probes=[{quoted(text)},b]"])
    assert (changed.attention.probes, changed.data.probes) == ([text], [text, "b"])
