"""A run from its context to its end, new or resumed: what it writes and prints around the training itself."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitf.checkpoints.run_directory import annotate_os_errors
from minitf.config.schema import changed_settings, save_config
from minitf.interpretability.own_patterns import OwnPatterns
from minitf.interpretability.page_model import page_model
from minitf.reporting.environment import record_environment
from minitf.reporting.reporter import Reporter, RunReporter
from minitf.reporting.tensorboard import TAGS
from minitf.runs.comparison import results_of
from minitf.runs.summary import conclusion, describe_setup, introduction, next_commands
from minitf.training.actions import default_actions
from minitf.training.context import RunContext
from minitf.training.trainer import Trainer
from minitf.variants import keep_copy


def execute(context: RunContext, compared: Mapping[str, Any] | None = None) -> None:
    """Train in the context's directory, which this process holds, and leave there all that a run leaves."""
    context = replace(context, decisions=replace(context.decisions, finished=False))
    with annotate_os_errors(context.run_dir):
        if context.group.is_main:  # decisions first: a run killed in between still ends where it was to end
            context.decisions.save(context.run_dir)
            save_config(context.config, context.run_dir / "config.yaml")
            keep_copy(context.config.model.attention_class, context.run_dir)
            if context.config.attention.patterns:
                OwnPatterns.load(context.config.attention.patterns).keep_copy(context.run_dir)
        with open_reporter(context) as reporter:
            trainer = Trainer(context, default_actions(context), reporter)
            begin(trainer)
            trainer.run()
            finish(trainer, compared)


def open_reporter(context: RunContext) -> Reporter:
    """Rank 0 reports, the other ranks do not."""
    return RunReporter(context.run_dir, context.initial_state().step) if context.group.is_main else Reporter()


def begin(trainer: Trainer) -> None:
    """Warm up, then save and print what was decided."""
    context, reporter = trainer.context, trainer.reporter
    selection = trainer.warm_up()
    setup = describe_setup(trainer, selection)
    if context.group.is_main:
        trainer.decisions.save(context.run_dir)
        record_environment(context.run_dir, context.hardware, setup)
    context.group.set_for_restart("run_dir", str(context.run_dir.absolute()))
    for line in introduction(trainer, setup):
        reporter.say(line)


def finish(trainer: Trainer, compared: Mapping[str, Any] | None) -> None:
    """Write what a run leaves after its last step, and print how it ended."""
    context, reporter, state = trainer.context, trainer.reporter, trainer.state
    if trainer.config.attention_every >= 0:
        write_attention_page(trainer)
    if state.last_val:
        metrics = [name for name in TAGS["val"] if name in state.last_val]
        results = results_of(context.run_dir) if compared and context.group.is_main else {}
        reporter.hyperparameters(compared or changed_settings(context.config), metrics, results, state.step)
    if context.group.is_main:
        replace(trainer.decisions, finished=not trainer.stopping).save(context.run_dir)
    for line in conclusion(trainer):
        reporter.say(line)
    for line in next_commands(trainer):
        reporter.say(line, whole=True)


def write_attention_page(trainer: Trainer) -> None:
    """Write attention.html with all maps and, if it is small, the model. All processes call."""
    context, task = trainer.context, trainer.context.task
    model = context.parallel.full_model()
    if context.group.is_main:
        probes, pairs = task.probes(context.config.attention.probes), task.data.kind == "pairs"
        content = page_model(model, task.tokenizer, trainer.state.step, probes, pairs)
        trainer.reporter.write_attention_page(f"Attention in {os.path.relpath(context.run_dir)}", content)
