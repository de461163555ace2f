"""What TensorBoard imports to find the Attention tab. It runs in every TensorBoard of this environment: keep it tiny.

An exception while this module is imported would end TensorBoard; one in `load` only costs the tab.
"""

import argparse
from typing import Any

from tensorboard.plugins import base_plugin

from minitf.tensorboard import PLUGIN_NAME

# All looks of any sensible run; TensorBoard's own limit for such data is 10, chosen at random.
SAMPLES_KEPT = 1000


class Loader(base_plugin.TBLoader):  # type: ignore[misc]
    """Adds the tab and its flags."""

    def define_flags(self, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("minitf's Attention tab")
        group.add_argument(
            "--minitf_live",
            choices=("auto", "off"),
            default="auto",
            help="whether sentences typed in the tab are run through a run's checkpoints: auto (when TensorBoard is "
            "reachable from this machine only) or off",
        )
        group.add_argument(
            "--minitf_live_hosts",
            default="",
            metavar="HOST[,HOST...]",
            help="names or addresses under which, beside localhost, the tab may run sentences; they must match what "
            "the browser's address line says",
        )

    def fix_flags(self, flags: argparse.Namespace) -> None:
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN_NAME, SAMPLES_KEPT)

    def load(self, context: Any) -> Any:
        from minitf.tensorboard.plugin import AttentionPlugin

        return AttentionPlugin(context)
