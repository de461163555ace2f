"""Composition by Hydra: `hydra.main` on a command line of our choosing, and the `Config` it comes to."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitf.config.overrides import check_overrides, explain
from minitf.config.presets import CONF, DERIVED_SIZE, MODEL_SIZE
from minitf.config.schema import (
    AutoModel,
    Config,
    Schema,
    checked_values,
    config_of,
    leaves,
    size_preset,
    written_values,
)
from minitf.errors import RequestError
from minitf.model import ModelConfig
from minitf.optim import OptimConfig

Task = Callable[[DictConfig], None]


def run_hydra(task: Task, overrides: Sequence[str], flags: Sequence[str] = ()) -> None:
    """`hydra.main(task)` on `flags` and `overrides`. Hydra's errors become RequestErrors of one line.

    Hydra reports an exception that leaves `task` in its own way: see `run_task`.
    """
    ConfigStore.instance().store(name="schema", node=Schema)
    try:
        with _command_line([*flags, *overrides]):
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise RequestError(explain(error)) from None


@contextmanager
def _command_line(args: Sequence[str]) -> Iterator[None]:
    """Hydra reads sys.argv; with HYDRA_FULL_ERROR it raises its errors instead of printing them and exiting."""
    argv = sys.argv
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def compose_config(overrides: Sequence[str], flags: Sequence[str] = ()) -> Config:
    """The config of `overrides` (`group=option`, `key=value`) over conf/; RequestError if they do not fit."""
    check_overrides(overrides, flags)
    return _compose(overrides, flags)


def _compose(overrides: Sequence[str], flags: Sequence[str]) -> Config:
    results: list[Config] = []
    run_task(lambda composed: results.append(to_config(composed)), overrides, flags)
    return results[0]


def run_task(task: Task, overrides: Sequence[str], flags: Sequence[str] = ()) -> None:
    """`run_hydra` whose task may raise: its error leaves as it is, past Hydra's own report."""
    failures: list[Exception] = []

    def job(composed: DictConfig) -> None:
        try:
            task(composed)
        except Exception as error:
            failures.append(error)

    run_hydra(job, overrides, flags)
    if failures:
        raise failures[0]


def to_config(composed: DictConfig) -> Config:
    """The config of a job of `hydra.main`; to be called in its task."""
    hydra_config = HydraConfig.get()
    choices = hydra_config.runtime.choices
    try:
        values = checked_values(composed)
    except OmegaConfBaseException as error:
        raise RequestError(explain(error)) from None
    if hydra_config.run.dir != "." and hydra_config.mode == RunMode.RUN:  # set in a primary config of the user's
        values["run_dir"] = values["run_dir"] or hydra_config.run.dir
    values["name"] = values["name"] or str(choices.get("experiment") or choices.get("data") or "run")
    if not re.fullmatch(r"[\w.+-]+", values["name"]) or values["name"].startswith("."):
        raise RequestError(f"name={values['name']!r} must be a plain directory name: letters, digits, _ . + -")
    asked_for_tokens = any(override.startswith("tokenizer") for override in hydra_config.overrides.task)
    if values["data"]["language"] == "zh" and not asked_for_tokens:  # its words are characters
        values["tokenizer"] |= {"kind": "char"}
    if values["init_from"]:
        return config_of(
            values | {"model": _shape_of_init_from(values["model"], hydra_config.overrides.task)}, AutoModel
        )
    model = values["model"]
    trainer = values["trainer"]
    # The same number of steps is the same run on every machine: only a run limited by time chooses its size.
    timed = trainer["max_steps"] is None or trainer["max_minutes"] is not None
    if timed and not any(model[name] for name in (*MODEL_SIZE, *DERIVED_SIZE)):
        return config_of(values | {"model": model | {"asked": _asked(values)}}, AutoModel)
    mini = size_preset("mini")
    filled = {name: model[name] or mini[name] for name in (*MODEL_SIZE, *DERIVED_SIZE)}
    return config_of(values | {"model": model | filled})


def _asked(values: dict[str, Any]) -> tuple[str, ...]:
    """The keys of model and optimiser whose values are not the defaults, or are named on the command line."""
    named = {override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}
    usual = {"model": asdict(ModelConfig()), "optim": asdict(OptimConfig())}
    return tuple(
        f"{section}.{key}"
        for section, defaults in usual.items()
        for key, default in defaults.items()
        if values[section][key] != default or f"{section}.{key}" in named
    )


def _shape_of_init_from(model: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """With `init_from` the shape is that model's; only the command line may ask for a shorter context."""
    for override in overrides:
        if re.match(r"(model|tokenizer)\b(?!\.(attention|dropout|context_length)=)", override):
            raise RequestError(f"{override}: init_from brings its own shape and tokenizer, leave it out")
    asked = any(override.startswith("model.context_length=") for override in overrides)
    context_length = model["context_length"] if asked else 0
    return model | dict.fromkeys((*MODEL_SIZE, *DERIVED_SIZE), 0) | {"context_length": context_length}


def check_sweep(overrides: Sequence[str], flags: Sequence[str] = ()) -> list[str]:
    """The keys that a sweep varies. RequestError if one of its runs would be refused, as far as one value shows it."""
    parsed = check_overrides(overrides, flags, sweep=True)
    fixed = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    own_sweeper = any(override.key_or_group == "hydra/sweeper" for override in parsed)
    for override in parsed:
        if override.is_interval_sweep() and not own_sweeper:
            key, word = override.key_or_group, override.input_line
            raise RequestError(f"{word}: a sweep takes values, as in {key}=0.1,0.2, or {key}=range(1,5)")
        if override.is_choice_sweep():
            for value in override.sweep_string_iterator():
                word = f"{override.get_key_element()}={value}"
                check_overrides([word], flags)
                _compose([*fixed, word], flags)
    return [override.key_or_group for override in parsed if override.is_sweep_override()]


def decided_overrides(overrides: Sequence[str], flags: Sequence[str] = ()) -> list[str]:
    """What follows from `overrides` without a machine, as further overrides: `--cfg` then prints what will run."""
    found: list[str] = []

    def compare(composed: DictConfig) -> None:
        given = leaves(OmegaConf.to_container(composed))  # type: ignore[arg-type]
        for key, value in leaves(written_values(to_config(composed))).items():
            simple = not isinstance(value, list | dict) and "${" not in str(given.get(key))
            if simple and value != given.get(key):
                found.append(f"{key}={'null' if value is None else repr(value)}")

    run_task(compare, overrides, flags)
    return found
