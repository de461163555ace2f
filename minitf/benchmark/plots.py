"""Plots as small SVG files that are readable on light and dark pages."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

MISSING = "matplotlib is not installed (pip install -e '.[benchmark]')"
# Colours of medium lightness: enough contrast on white and on black, distinguishable with colour blindness.
COLOURS = ("#1f83c4", "#d9731a", "#2f9e63", "#b4589c")
GREY = "#808890"


def unavailable() -> str | None:
    """Why no plot can be drawn, or None."""
    return None if importlib.util.find_spec("matplotlib") else MISSING


def draw(
    path: Path,
    panels: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]],
    title: str = "",
    x_scale: str = "log",
    y_scale: str = "linear",
    markers: bool = True,
) -> None:
    """Write panels side by side, each (x label, y label, name of a line -> its points), to `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which has global state
    from matplotlib.ticker import EngFormatter, NullFormatter

    text = {"svg.fonttype": "none", "svg.hashsalt": "minitf", "font.size": 9, "font.family": "sans-serif"}
    colours = {f"{part}.color": GREY for part in ("text", "xtick", "ytick")} | {
        "axes.labelcolor": GREY, "axes.edgecolor": GREY, "legend.labelcolor": GREY,
    }  # fmt: skip
    with rc_context({**text, **colours}):
        figure = Figure(figsize=(3.4 * len(panels), 2.6), layout="constrained")
        for position, (x_label, y_label, lines) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), position)
            for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
                marker = "o" if markers else ""
                axes.plot(
                    *zip(*points, strict=True), color=colour, linewidth=1.4, label=name, marker=marker, markersize=3.5
                )
            axes.set_xscale(x_scale)
            axes.set_yscale(y_scale)
            if x_scale == "log":
                axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.xaxis.set_major_formatter("{x:g}")
                axes.tick_params("x", which="minor", length=0)
            if y_scale == "linear" and markers:
                axes.set_ylim(0, 1.08 * max(y for points in lines.values() for _, y in points))  # from zero
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.grid(color=GREY, alpha=0.25, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            if len(lines) > 1:
                axes.legend(frameon=False)
        if title:
            figure.suptitle(title)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
