"""The entry point of the Attention tab, imported by every TensorBoard in this environment: keep it tiny.

An exception during the import of this module would end TensorBoard; one in `load` only loses the tab.
"""

import argparse
from typing import Any

from tensorboard.plugins import base_plugin

from minitf.tensorboard import PLUGIN_NAME

# Enough for every logged step of a run; TensorBoard's default for such data is 10 random steps.
MAX_SAMPLES = 1000


class Loader(base_plugin.TBLoader):  # type: ignore[misc]
    """Registers the tab and its flags."""

    def define_flags(self, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("minitf's Attention tab")
        group.add_argument(
            "--minitf_live",
            choices=("auto", "off"),
            default="auto",
            help="run sentences typed in the tab through a run's checkpoints: auto (if TensorBoard is reachable from "
            "this machine only) or off",
        )
        group.add_argument(
            "--minitf_live_hosts",
            default="",
            metavar="HOST[,HOST...]",
            help="host names or addresses besides localhost under which the tab may run sentences, as in the browser's "
            "address bar",
        )

    def fix_flags(self, flags: argparse.Namespace) -> None:
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN_NAME, MAX_SAMPLES)

    def load(self, context: Any) -> Any:
        from minitf.tensorboard.plugin import AttentionPlugin

        return AttentionPlugin(context)
