"""The routes of the Attention tab: its files, the runs and sentences, their maps and curves.

A route answers with JSON and a status whatever a run's files hold: 400 for an invalid request, 404 for missing data,
503 while busy. This module does not import torch.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from typing import Any

import numpy as np
from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response, wrappers

from minitf.tensorboard import PLUGIN_NAME
from minitf.tensorboard.folders import RunFolders
from minitf.tensorboard.gate import CODES, LiveGate, RefusedError
from minitf.tensorboard.summary import SCORES_TAG
from minitf.viewer import FOLDER, MODULES

TYPES = {"js": "application/javascript", "css": "text/css"}
CURVES = {"train": ("train", "train/loss"), "val": ("held_out", "val/loss")}  # folder of the tag "loss"; older tag
SCORE_TAG = re.compile(r"heads/(\w+)/layer(\d+)_head(\d+)")
IMPORTANCE_TAG = re.compile(r"importance/layer(\d+)_head(\d+)")
HEADS_RUN = "heads"  # within a run: the output of scripts/evaluate.py --heads
# What the view Over training shows besides the scores of the heads.
SERIES_TAG = re.compile(r"(reference|reference_weight|watch|alignment)/.+")
NEW_TAGS = {"quality/alignment": "alignment/score"}
SUB_RUNS = ("train", "held_out")
CHANCE_RUN = "chance"  # within a run: what guessing comes to, under the tag of the score
MAX_POINTS = 1000
Scalars = Mapping[str, list[tuple[int, float]]]  # tag -> points (step, value)


class AttentionPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """The tab as TensorBoard sees it."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.data: provider.DataProvider = context.data_provider
        self.folders = RunFolders(context.logdir)
        self.gate = LiveGate(context.flags, context.logdir)
        self.live: Any = None
        self.starting = threading.Lock()

    def is_active(self) -> bool:
        """False: TensorBoard itself shows the tab once it finds data with the plugin's name."""
        return False

    def frontend_metadata(self) -> Any:
        return base_plugin.FrontendMetadata(es_module_path="/static/tab.js", tab_name="Attention")

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "/static/*": self.application(self.static, "GET"),
            "/runs": self.application(self.runs, "GET"),
            "/run": self.application(self.run, "GET"),
            "/map": self.application(self.map, "GET"),
            "/live": self.application(self.run_live, "POST"),
        }

    def application(self, route: Callable[[Request], Response], method: str) -> Callable[..., Any]:
        """A WSGI application around a route; refusals and TensorBoard's errors become JSON replies."""

        @wrappers.Request.application
        def answer(request: Request) -> Response:
            try:
                if request.method != method and not (method == "GET" and request.method == "HEAD"):
                    raise RefusedError(405, f"only {method} is allowed")
                return route(request)
            except RefusedError as refusal:
                return _refusal(request, str(refusal), refusal.status, refusal.code, refusal.values)
            except errors.PublicError as error:
                return _refusal(
                    request, str(error), int(error.http_code), CODES.get(int(error.http_code), "unusable"), {}
                )

        return answer

    # -- routes --------------------------------------------------------------------------------------------------------

    def static(self, request: Request) -> Response:
        """The viewer's modules and style sheet and the tab's own module, and no other files."""
        name = request.path.rpartition("/static/")[2]
        folder = resources.files("minitf.tensorboard") / "static" if name == "tab.js" else FOLDER
        if name not in (*MODULES, "viewer.css", "tab.js"):
            raise RefusedError(404, f"there is no file {name[:100]!r}")
        content = (folder / name).read_text(encoding="utf-8")
        return _respond(request, content, TYPES[name.rpartition(".")[2]])

    def runs(self, request: Request) -> Response:
        """The runs with maps, oldest first, the tags of their sentences, and whether typed sentences are run."""
        context, experiment = _context(request)
        found = self.data.list_blob_sequences(context, experiment_id=experiment, plugin_name=PLUGIN_NAME)
        started = {run.run_name: run.start_time or 0 for run in self.data.list_runs(context, experiment_id=experiment)}
        names = sorted(found, key=lambda run: (started.get(run, 0), run))
        why = self.gate.why_closed()
        tags = {run: sorted(series) for run, series in found.items()}
        content = {"runs": names, "tags": tags, "logdir": self.folders.logdir, "live": why is None, "why": why}
        return _json(request, content)

    def run(self, request: Request) -> Response:
        """One run: its sentences with their logged steps, loss curves, head scores, checkpoints."""
        context, experiment = _context(request)
        name = _argument(request, "run")
        sentences = self._sentences(context, experiment, name)
        if not sentences:
            raise RefusedError(404, "this run has no attention maps", "no_maps")
        scalars = self._scalars(context, experiment, name)
        curves = {
            split: _without_nan(scalars[folder].get("loss") or scalars[""].get(older, []))
            for split, (folder, older) in CURVES.items()
        }
        heads = self._head_values(context, experiment, name)
        scores = heads.pop(SCORES_TAG, None) or _score_series(scalars[""])  # older runs have scalars
        series = _other_series(scalars[""]) | _other_series(scalars["held_out"]) | _series_of_heads(heads.values())
        fork = self.folders.forked_from(name)
        content = {
            "sentences": sentences,
            "forked_from": fork if fork and self._sentences(context, experiment, fork["run"]) else None,
            "curves": curves,
            "scores": scores,
            "series": series | _other_series(scalars[CHANCE_RUN], "/chance"),
            "found": self.folders.heads_found(name),
            "importance": _importance(scalars[HEADS_RUN]),
            "checkpoints": self.folders.steps(name),
        }
        return _json(request, content)

    def map(self, request: Request) -> Response:
        """The maps of one sentence at one step, with queries, keys and values if the run directory still has them."""
        context, experiment = _context(request)
        name, tag, step = (_argument(request, key) for key in ("run", "tag", "step"))
        if not re.fullmatch(r"\d{1,15}", step):
            raise RefusedError(400, "step must be a number")
        data = self._blobs(context, experiment, name, tag).get(name, {}).get(tag, [])
        keys = [datum.values[0].blob_key for datum in data if datum.step == int(step) and datum.values]
        if not keys:
            raise RefusedError(404, f"there are no maps of step {step}", "no_step", step=int(step))
        if whole := self.folders.maps(name, tag, int(step)):
            return _respond(request, whole, expires=3600)
        blob = self.data.read_blob(context, blob_key=keys[-1])
        if blob[:2] != b"\x1f\x8b":
            raise RefusedError(404, f"the data of step {step} is damaged", "damaged")
        return _respond(request, blob, content_encoding="gzip", expires=3600)

    def run_live(self, request: Request) -> Response:
        """A typed sentence, run through a checkpoint."""
        self.gate.check(request)
        body = self.gate.body(request)
        context, experiment = _context(request)
        known = {run.run_name for run in self.data.list_runs(context, experiment_id=experiment)}
        with self.starting:
            if self.live is None:
                from minitf.tensorboard.live import Live

                self.live = Live(self.folders)
        return _respond(request, self.live.answer(body, known))

    # -- data ----------------------------------------------------------------------------------------------------------

    def _blobs(self, context: Any, experiment: str, run: str, tag: str | None = None) -> Any:
        wanted = provider.RunTagFilter(runs=[run], tags=None if tag is None else [tag])
        return self.data.read_blob_sequences(
            context, experiment_id=experiment, plugin_name=PLUGIN_NAME, downsample=MAX_POINTS, run_tag_filter=wanted
        )

    def _sentences(self, context: Any, experiment: str, run: str) -> list[dict[str, Any]]:
        series = self.data.list_blob_sequences(
            context,
            experiment_id=experiment,
            plugin_name=PLUGIN_NAME,
            run_tag_filter=provider.RunTagFilter(runs=[run]),
        ).get(run, {})
        data = self._blobs(context, experiment, run).get(run, {})
        by_time = sorted((tag for tag in series if data.get(tag)), key=lambda tag: data[tag][0].wall_time)
        return [
            {
                "tag": tag,
                "text": series[tag].display_name,
                # The last version of a step that was written more than once.
                "looks": [[step, time] for step, time in {datum.step: datum.wall_time for datum in data[tag]}.items()],
            }
            for tag in by_time
        ]

    def _scalars(self, context: Any, experiment: str, run: str) -> dict[str, Scalars]:
        """The scalars of a run by the folder they are in, "" for the run itself."""
        inside = "" if run == "." else f"{run}/"
        names = {"": run} | {folder: inside + folder for folder in (*SUB_RUNS, HEADS_RUN, CHANCE_RUN)}
        found = self.data.read_scalars(
            context,
            experiment_id=experiment,
            plugin_name="scalars",
            downsample=MAX_POINTS,
            run_tag_filter=provider.RunTagFilter(runs=list(names.values())),
        )
        return {
            folder: {tag: [(datum.step, datum.value) for datum in data] for tag, data in found.get(name, {}).items()}
            for folder, name in names.items()
        }

    def _head_values(self, context: Any, experiment: str, run: str) -> dict[str, dict[str, Any]]:
        """The numbers logged for each head: {tag: {"steps": [...], "values": {name: [layer][head][index of step]}}}."""
        request = {
            "experiment_id": experiment,
            "plugin_name": PLUGIN_NAME,
            "run_tag_filter": provider.RunTagFilter(runs=[run]),
        }
        series = self.data.list_tensors(context, **request).get(run, {})
        data = self.data.read_tensors(context, downsample=MAX_POINTS, **request).get(run, {}) if series else {}
        found: dict[str, dict[str, Any]] = {}
        for tag, points in data.items():
            by_step = {datum.step: datum.numpy for datum in points}  # the last version of a step
            names = json.loads(series[tag].plugin_content)["names"]
            values_NLHS = np.round(np.stack(list(by_step.values()), -1).astype(float), 4)
            values = {name: values_LHS.tolist() for name, values_LHS in zip(names, values_NLHS, strict=True)}
            found[tag] = {"steps": list(by_step), "values": values}
        return found


def _score_series(scalars: Scalars) -> dict[str, Any]:
    """{"steps": [...], "values": {score: [layer][head][index of step]}} from the scalars `heads/SCORE/layerL_headH`."""
    found = {match.groups(): points for tag, points in scalars.items() if (match := SCORE_TAG.fullmatch(tag))}
    steps = sorted({step for points in found.values() for step, _ in points})
    values: dict[str, list[list[list[float | None]]]] = {}
    for (score, layer, head), points in sorted(
        found.items(), key=lambda one: (one[0][0], int(one[0][1]), int(one[0][2]))
    ):
        layers = values.setdefault(score, [])
        if int(layer) > len(layers) or int(layer) > 1000:
            continue  # not our series, in which layers are contiguous
        if int(layer) == len(layers):
            layers.append([])
        if int(head) == len(layers[int(layer)]):
            by_step = dict(points)
            layers[int(layer)].append([round(by_step[step], 4) if step in by_step else None for step in steps])
    return {"steps": steps, "values": values}


def _other_series(scalars: Scalars, end: str = "") -> dict[str, list[tuple[int, float]]]:
    """Scalars that are curves of their own in the view Over training, by tag and `end`."""
    named = {NEW_TAGS.get(tag, tag): points for tag, points in sorted(scalars.items())}
    return {tag + end: _without_nan(points) for tag, points in named.items() if SERIES_TAG.fullmatch(tag)}


def _series_of_heads(found: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Numbers logged for each head as curves, "watch/it>cat/layer0_head1"."""
    return {
        f"{name}/layer{layer}_head{head}": list(zip(one["steps"], points, strict=True))
        for one in found
        for name, rows in one["values"].items()
        for layer, row in enumerate(rows)
        for head, points in enumerate(row)
    }


def _importance(scalars: Scalars) -> dict[str, Any] | None:
    """{"step", "values": {"layer,head": bits per byte}} of the latest measurement, or None."""
    found = {match.groups(): points[-1] for tag, points in scalars.items() if (match := IMPORTANCE_TAG.fullmatch(tag))}
    if not found:
        return None
    step = max(step for step, _ in found.values())
    return {"step": step, "values": {",".join(head): value for head, (_, value) in found.items()}}


def _without_nan(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if not math.isnan(value)]


def _context(request: Request) -> tuple[Any, str]:
    return plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)


def _argument(request: Request, name: str) -> str:
    value = request.args.get(name)
    if value is None:
        raise RefusedError(400, f"{name} is missing")
    return str(value)


def _json(request: Request, content: Any, status: int = 200) -> Response:
    return _respond(request, json.dumps(content), code=status)


def _refusal(request: Request, message: str, status: int, code: str, values: Mapping[str, str | int]) -> Response:
    """Why there is no answer: as text, and as what a page says in its own language."""
    return _json(request, {"error": message, "code": code, "values": values}, status)


def _respond(request: Request, content: str | bytes, kind: str = "application/json", **options: Any) -> Response:
    response: Response = http_util.Respond(request, content, kind, **options)
    return response
