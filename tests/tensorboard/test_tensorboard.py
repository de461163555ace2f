"""The Attention tab's server: what TensorBoard keeps of a run, the routes, and access control."""

import argparse
import base64
import itertools
import json
import math
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard_server import RUN, get, looks
from werkzeug.test import Client, TestResponse

import minitf
from minitf import edits
from minitf.interpretability.attention_maps import attention_maps
from minitf.interpretability.heads import heads_off
from minitf.interpretability.interventions import Reader
from minitf.interpretability.patching import TextPair, patch
from minitf.interpretability.residual import contributions, lens
from minitf.tensorboard.folders import RunFolders
from minitf.tensorboard.gate import HEADER, MAX_BODY_BYTES
from minitf.tensorboard.live import Live
from minitf.tensorboard.loader import Loader
from minitf.tensorboard.plugin import AttentionPlugin, _other_series, _series_of_heads
from minitf.tensorboard.summary import hyperparameter_summaries, sentence_tag

TEXT = "The cat sat on the mat."


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard itself, with both of its loaders


@pytest.mark.slow
def test_both_loaders_keep_every_step_once_even_after_a_resume(server: str) -> None:
    assert get(f"{server}/runs")["live"]
    assert [step for step, _ in looks(server, "hundred")] == list(range(100))
    assert [step for step, _ in looks(server, "resumed")] == list(range(12))
    tag = get(f"{server}/run", run="resumed")["sentences"][0]["tag"]
    wrote = [get(f"{server}/map", run="resumed", tag=tag, step=step)["wrote"] for step in (5, 6, 8, 11)]
    assert wrote == [0, 5, 5, 5]
    run = get(f"{server}/run", run="hundred")
    assert run["curves"]["train"][:2] == [[0, 9.0], [1, pytest.approx(8.99)]]


@pytest.mark.slow
def test_a_served_map_holds_the_weights_of_the_model(server: str, trained_run: Path) -> None:
    run = get(f"{server}/run", run=RUN)
    sentence = next(one for one in run["sentences"] if one["text"] == TEXT)
    step = sentence["looks"][-1][0]
    assert step == 40
    assert 40 in run["checkpoints"]
    served = get(f"{server}/map", run=RUN, tag=sentence["tag"], step=step)
    lm = minitf.load(trained_run / "checkpoints/latest", device="cpu")
    weights_LHTS = attention_maps(lm.model, lm.tokenizer, TEXT).weights_LHTS
    query, key = torch.tril_indices(*weights_LHTS.shape[2:])
    stored = torch.frombuffer(bytearray(base64.b64decode(served["weights"])), dtype=torch.uint8).float() / 255
    torch.testing.assert_close(stored, weights_LHTS[:, :, query, key].flatten(), rtol=0, atol=1 / 255)
    assert served["vectors"]["encoding"] == "int8"
    gone = get(f"{server}/map", run="gone", tag=sentence["tag"], step=step)
    assert gone == {**served, "vectors": None}
    scores = run["scores"]
    assert scores["steps"][-1] == 40
    assert len(scores["values"]["induction"]) == 2
    assert len(scores["values"]["induction"][1]) == 4


@pytest.mark.slow
def test_damaged_data_and_missing_checkpoints_do_not_affect_other_runs(server: str) -> None:
    assert len(looks(server, "damaged")) < 100
    assert get(f"{server}/run", run="gone")["checkpoints"] == []
    assert len(looks(server, "gone")) == len(looks(server, RUN))
    for path, arguments, status in (
        ("run", {"run": "none"}, 404),
        ("run", {}, 400),
        ("map", {"run": RUN, "tag": "none", "step": 0}, 404),
        ("map", {"run": RUN, "tag": sentence_tag(TEXT), "step": 7}, 404),
        ("map", {"run": RUN, "tag": sentence_tag(TEXT), "step": "-1"}, 400),
        ("live", {}, 405),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(f"{server}/{path}", **arguments)
        assert (caught.value.code, "error" in json.load(caught.value)) == (status, True)
    assert len(get(f"{server}/runs")["runs"]) == 5


# ---------------------------------------------------------------------------------------------------------------------
# The routes, in this process


class Data:
    """The part of TensorBoard's data provider that the routes need: the list of runs."""

    def __init__(self, runs: list[str]) -> None:
        self.runs = runs

    def list_runs(self, context: object, experiment_id: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(run_name=run, start_time=0) for run in self.runs]


def plugin_over(logdir: Path | None, runs: list[str], **flags: object) -> AttentionPlugin:
    context = SimpleNamespace(
        data_provider=Data(runs), logdir=logdir and str(logdir), flags=SimpleNamespace(logdir_spec="", **flags)
    )
    return AttentionPlugin(context)


@pytest.fixture
def runs_root(tmp_path: Path, trained_run: Path) -> Path:
    without_snapshots = shutil.ignore_patterns("snapshots")
    shutil.copytree(trained_run, tmp_path / "runs" / RUN, symlinks=True, ignore=without_snapshots)
    return tmp_path / "runs"


@pytest.fixture
def plugin(runs_root: Path) -> AttentionPlugin:
    return plugin_over(runs_root, [RUN, "..", "../secret", "linked", "/etc"])


GOOD = {"Host": "localhost:6006", "Origin": "http://localhost:6006", HEADER: "1"}


def ask(plugin: AttentionPlugin, body: Any = None, content: bytes | None = None, **headers: str | None) -> TestResponse:
    """POST to the live route as the tab does, with some headers changed or left out (None)."""
    sent = {**GOOD, "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[misc]
    body = {"run": RUN, "step": 40, "text": TEXT} | (body or {}) if not isinstance(body, list) else body
    return Client(plugin.get_plugin_apps()["/live"]).post(
        "/live",
        data=json.dumps(body).encode() if content is None else content,
        headers={name: value for name, value in sent.items() if value is not None},
    )


def test_live_maps_are_exact(plugin: AttentionPlugin, trained_run: Path) -> None:
    reply = ask(plugin)
    assert reply.status_code == 200
    lm = minitf.load(trained_run / "checkpoints/step_00000040", device="cpu")
    check_exact(reply.json, lm)
    lm.model.eval()
    off = ask(plugin, {"heads_off": [[0, 1], [1, 3]]}).json
    with heads_off(lm.model, [(0, 1), (1, 3)]):
        check_exact(off, lm)
    before = dict(off["before"]["next_tokens"][-1])
    assert before == dict(reply.json["next_tokens"][-1])
    assert dict(off["next_tokens"][-1]) != before
    check_exact(ask(plugin).json, lm)  # the model kept in memory is unablated again


def check_exact(reply: Any, lm: minitf.LanguageModel) -> None:
    maps = attention_maps(lm.model, lm.tokenizer, TEXT, top_k=10)
    query, key = torch.tril_indices(*maps.weights_LHTS.shape[2:])
    weights = torch.frombuffer(bytearray(base64.b64decode(reply["weights"])), dtype=torch.float32)
    torch.testing.assert_close(weights, maps.weights_LHTS[:, :, query, key].flatten(), rtol=0, atol=1e-5)
    assert maps.vectors is not None
    for name, tensor in zip("qkv", vars(maps.vectors).values(), strict=False):
        values = torch.frombuffer(bytearray(base64.b64decode(reply["vectors"][name]["values"])), dtype=torch.float32)
        torch.testing.assert_close(values, tensor.flatten(), rtol=0, atol=1e-5)
    for served, expected in zip(reply["next_tokens"], maps.next_tokens, strict=True):
        assert [p for _, p in served] == pytest.approx([p for _, p in expected], abs=1e-5)


def test_live_maps_under_edits_are_those_of_the_python_api(plugin: AttentionPlugin, trained_run: Path) -> None:
    lm = minitf.load(trained_run / "checkpoints/step_00000040", device="cpu")
    whole = ask(plugin).json
    for sent, edit in (
        ({"kind": "block", "query": 9, "keys": [4], "heads": None}, edits.block(9, 4)),
        ({"kind": "block", "query": 9, "keys": [4], "heads": [[1, 2]]}, edits.block(9, 4, [(1, 2)])),
        ({"kind": "move", "query": 9, "keys": [4], "to": [2], "heads": None}, edits.move(9, 4, 2)),
        ({"kind": "ablate", "heads": [[0, 1]], "by": "mean"}, edits.ablate([(0, 1)], by="mean")),
        ({"kind": "ablate", "mlp": 1, "by": "zero"}, edits.ablate(mlp=1)),
    ):
        reply = ask(plugin, {"edits": [sent]}).json
        expected = lm.predict(TEXT, [edit], top_k=10)
        assert [p for _, p in reply["next_tokens"][-1]] == pytest.approx([p for _, p in expected], abs=1e-5)
        assert reply["before"] == {name: whole[name] for name in ("next_tokens", "actual")}
        assert reply["next_tokens"] != whole["next_tokens"]
    assert ask(plugin).json == whole


def test_edits_and_heads_off_add_up(plugin: AttentionPlugin, trained_run: Path) -> None:
    lm = minitf.load(trained_run / "checkpoints/step_00000040", device="cpu")
    block = {"kind": "block", "query": 9, "keys": [4], "heads": None}
    reply = ask(plugin, {"edits": [block], "heads_off": [[1, 3]]}).json
    expected = lm.predict(TEXT, [edits.block(9, 4), edits.ablate([(1, 3)])], top_k=10)
    assert [p for _, p in reply["next_tokens"][-1]] == pytest.approx([p for _, p in expected], abs=1e-5)


def test_a_text_continues_under_edits(plugin: AttentionPlugin, trained_run: Path) -> None:
    lm = minitf.load(trained_run / "checkpoints/step_00000040", device="cpu")
    chosen = {"edits": [{"kind": "ablate", "mlp": 0, "by": "zero"}], "temperature": 0, "new_tokens": 2}
    reply = ask(plugin, chosen).json
    first = lm.predict(TEXT, [edits.ablate(mlp=0)], top_k=1)[0][0]
    second = lm.predict(TEXT + first, [edits.ablate(mlp=0)], top_k=1)[0][0]
    assert reply["tokens"][-2:] == [first, second]
    assert len(ask(plugin, chosen | {"edits": []}).json["tokens"]) == len(reply["tokens"])


def test_the_lens_and_the_contributions_are_those_of_the_python_api(plugin: AttentionPlugin, trained_run: Path) -> None:
    lm = minitf.load(trained_run / "checkpoints/step_00000040", device="cpu")
    reader = Reader(lm.model, lm.tokenizer)
    assert ask(plugin, {"kind": "lens"}).json == lens(reader, TEXT).to_json()
    end = {"position": len(lm.tokenizer.encode(TEXT)) - 1}
    parts = contributions(reader, TEXT)
    assert ask(plugin, {"kind": "contributions"}).json == parts.to_json() | end
    assert ask(plugin, {"kind": "contributions", "token": parts.token, **end}).json == parts.to_json() | end
    earlier = ask(plugin, {"kind": "contributions", "position": 4}).json
    assert (earlier["token"], earlier["position"]) == (lm.tokenizer.pieces(lm.tokenizer.encode(TEXT))[5], 4)
    assert sum(earlier["parts"].values()) == pytest.approx(earlier["logit"], abs=1e-3)
    off = ask(plugin, {"kind": "contributions", "heads_off": [[0, 1]]}).json
    edited = [{"kind": "ablate", "heads": [[0, 1]], "by": "zero"}]
    assert off == ask(plugin, {"kind": "contributions", "edits": edited}).json
    assert off["parts"]["layer 0 head 1"] == 0


def test_two_sentences_are_compared_layer_by_layer(plugin: AttentionPlugin, trained_run: Path) -> None:
    lm = minitf.load(trained_run / "checkpoints/step_00000040", device="cpu")
    changed = "The hat sat on the mat."
    asked = {"kind": "patch", "changed": changed}
    first = ask(plugin, asked).json
    whole = patch(
        Reader(lm.model, lm.tokenizer), TEXT, changed, *(one.replace("⏎", "\n") for one in first["answers"])
    ).to_json()
    for layer in (0, 1):
        found = ask(plugin, {**asked, "layer": layer}).json
        of_heads = ask(plugin, {**asked, "layer": layer, "heads": True}).json
        for name in ("restores", "breaks"):
            torch.testing.assert_close(found[name], whole[name][layer], rtol=0, atol=2e-4)
            torch.testing.assert_close(of_heads[name], whole[f"head_{name}"][layer], rtol=0, atol=2e-4)
    assert ask(plugin, {**asked, "position": 4}).json["clean"] == ["T", "h", "e", " ", "c"]
    for wrong in (
        {"changed": TEXT}, {"changed": "short"}, {"position": 2}, {"layer": 2}, {"position": 99}, {"changed": ""},
    ):  # fmt: skip
        assert ask(plugin, {**asked, **wrong}).status_code == 422, wrong


def test_a_newer_request_of_the_same_page_ends_an_older_one(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugin_over(runs_root, [RUN])
    started, other = threading.Event(), threading.Event()
    differences = TextPair._differences

    def slow(self: TextPair, *arguments: Any) -> Any:
        started.set()
        assert other.wait(900)
        return differences(self, *arguments)

    monkeypatch.setattr(TextPair, "_differences", slow)
    replies: list[TestResponse] = []
    asked = {"kind": "patch", "changed": "The hat sat on the mat.", "page": "a"}
    first = threading.Thread(target=lambda: replies.append(ask(plugin, asked)))
    first.start()
    assert started.wait(900)
    superseding = plugin.live._superseding
    monkeypatch.setattr(plugin.live, "_superseding", lambda question: (superseding(question), other.set())[0])
    statuses = [ask(plugin, {"page": "a"}).status_code]
    first.join()
    assert replies[0].status_code == 409
    assert statuses[0] in (200, 503)  # 503: the older one took longer to end
    assert ask(plugin, {**asked, "page": "b"}).status_code == 200


def test_live_sources_are_answered_and_aligned(tmp_path: Path, copying_run: Path) -> None:
    shutil.copytree(copying_run, tmp_path / "runs/copying", symlinks=True)
    plugin = plugin_over(tmp_path / "runs", ["copying"])
    asked = {"run": "copying", "step": 400}
    reply = ask(plugin, {**asked, "text": "cabd"}).json
    assert reply["full"] == "cabd => cabd"
    assert reply["prompt_length"] == 6
    assert reply["alignment"]["source"] == reply["alignment"]["target"] == list("cabd")
    assert [row.index(max(row)) for row in reply["alignment"]["weights"]] == [0, 1, 2, 3]
    assert ask(plugin, {**asked, "text": "cabd => ca", "count_only": True}).json["tokens"] == 8
    given = ask(plugin, {**asked, "text": "cabd => dbac", "heads_off": [[1, 0], [1, 1], [1, 2], [1, 3]]}).json
    assert given["alignment"]["target"] == list("dbac")
    assert given["before"]["next_tokens"] != given["next_tokens"]
    edit = {"kind": "block", "query": 7, "keys": [1, 2, 3, 4], "heads": None}
    edited = ask(plugin, {**asked, "text": "cabd => cabd", "edits": [edit]}).json
    assert edited["before"]["next_tokens"] == reply["next_tokens"]
    assert edited["next_tokens"][7] != reply["next_tokens"][7]
    assert edited["alignment"]["target"] == list("cabd")
    compared = ask(plugin, {**asked, "text": "cabd", "kind": "patch", "changed": "dabd", "position": 5}).json
    assert compared["answers"] == ["c", "d"]
    assert compared["restores"][1] == pytest.approx(1, abs=1e-3)
    assert ask(plugin, {**asked, "text": "cabd", "kind": "lens"}).json["tokens"] == reply["tokens"]
    assert ask(plugin, {**asked, "text": "xyz"}).status_code == 422


def test_the_tokens_of_a_typed_sentence_are_counted(plugin: AttentionPlugin) -> None:
    assert ask(plugin, {"text": "The old man", "count_only": True}).json == {"tokens": 11, "limit": 32}
    assert ask(plugin, {"text": "a" * 300, "count_only": True}).json == {"tokens": 300, "limit": 32}


def test_other_curves_are_taken_from_the_scalars() -> None:
    scalars = {
        "reference/exact": [(0, 0.1), (5, math.nan)],
        "watch/it>cat/w": [(1, 0.5)],
        "train/loss": [(0, 9.0)],
    }
    assert _other_series(scalars) == {"reference/exact": [(0, 0.1)], "watch/it>cat/w": [(1, 0.5)]}


def test_numbers_of_each_head_become_curves() -> None:
    heads = {"steps": [0, 5], "values": {"watch/it>cat": [[[0.1, 0.9], [0.2, 0.3]]]}}
    assert _series_of_heads([heads]) == {
        "watch/it>cat/layer0_head0": [(0, 0.1), (5, 0.9)],
        "watch/it>cat/layer0_head1": [(0, 0.2), (5, 0.3)],
    }


def test_live_generation_extends_the_previous_text(plugin: AttentionPlugin) -> None:
    replies = [ask(plugin, {"text": "The", "new_tokens": n, "seed": 3}).json for n in range(5)]
    tokens = [reply["tokens"] for reply in replies]
    assert [len(one) for one in tokens] == [3, 4, 5, 6, 7]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(tokens))
    assert all(reply["prompt_length"] == 3 for reply in replies)
    greedy = ask(plugin, {"text": "The", "new_tokens": 1, "temperature": 0}).json
    assert greedy["tokens"][-1] == greedy["next_tokens"][2][0][0]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:6006", "Origin": "http://evil.example:6006"}, 403),  # DNS rebinding
        ({"Host": "localhost.evil.example", "Origin": "http://localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost@evil.example", "Origin": "http://localhost@evil.example"}, 403),
        ({"Host": "192.168.0.7:6006", "Origin": "http://192.168.0.7:6006"}, 403),
        ({"Origin": "http://evil.example"}, 403),  # another site's page
        ({"Origin": "http://localhost:8000"}, 403),  # another server on this machine
        ({"Origin": "null"}, 403),
        ({"Origin": "file://localhost:6006"}, 403),
        ({"Origin": "http://localhost:6006/path"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": None}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"X_Minitf_Attention": None}, 403),  # as a plain form would send
        ({"X_Minitf_Attention": "2"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": "127.0.0.1:6006", "Origin": "http://127.0.0.1:6006"}, 200),
        ({"Host": "[::1]:6006", "Origin": "http://[::1]:6006"}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_only_pages_of_this_tensorboard_may_run_sentences(
    plugin: AttentionPlugin, headers: dict[str, str | None], status: int
) -> None:
    assert ask(plugin, **headers).status_code == status


def test_named_hosts_are_allowed(runs_root: Path) -> None:
    plugin = plugin_over(runs_root, [RUN], minitf_live_hosts="box.example, other", host="box.example")
    assert plugin.gate.why_closed() is None
    assert ask(plugin, Host="box.example:6006", Origin="http://box.example:6006").status_code == 200
    assert ask(plugin, Host="evil.example:6006", Origin="http://evil.example:6006").status_code == 403


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"minitf_live": "off"}, "off"),
        ({"bind_all": True}, "bind_all"),
        ({"host": "0.0.0.0"}, "bind_all"),
        ({"host": "192.168.0.7"}, "bind_all"),
        ({"host": "127.0.0.1"}, None),
    ],
)
def test_live_is_closed_where_other_machines_could_reach_it(
    runs_root: Path, flags: dict[str, Any], why: str | None
) -> None:
    plugin = plugin_over(runs_root, [RUN], **flags)
    assert plugin.gate.why_closed() == why
    assert ask(plugin).status_code == (403 if why else 200)


def test_live_is_closed_without_a_local_logdir(runs_root: Path) -> None:
    for logdir in (None, "gs://bucket/runs"):
        closed = plugin_over(logdir, [RUN])  # type: ignore[arg-type]
        assert closed.gate.why_closed() == "logdir"
        assert ask(closed).status_code == 403
    closed = plugin_over(runs_root, [RUN])
    closed.gate.logdir_spec = True
    assert ask(closed).status_code == 403


@pytest.mark.parametrize(
    "content", [b" ", b"{", b"[]", b"1", b"null", b"\xff", b"[" * 60_000, b'{"run": NaN', b'{"a": ' * 9000]
)
def test_bodies_that_are_no_json_object_are_refused(plugin: AttentionPlugin, content: bytes) -> None:
    assert ask(plugin, content=content).status_code == 400


def test_large_bodies_are_refused(plugin: AttentionPlugin) -> None:
    assert ask(plugin, content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
    assert ask(plugin, content=b"").status_code in (400, 411)
    assert ask(plugin, {"text": "a" * 30_000}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"run": 1}, {"run": None}, {"text": None}, {"text": ["a"]}, {"step": "40"}, {"step": -1}, {"step": 1.5},
        {"step": True}, {"step": 10**30}, {"new_tokens": -1}, {"new_tokens": 10**9}, {"new_tokens": "1"},
        {"temperature": "hot"}, {"temperature": -1}, {"temperature": 1e999}, {"temperature": True}, {"seed": -1},
        {"seed": 2**70}, {"heads_off": 3}, {"heads_off": [1]}, {"heads_off": [[0]]}, {"heads_off": [[0, -1]]},
        {"heads_off": [[0, "1"]]}, {"heads_off": [[0, 1]] * 2000}, {"count_only": 1},
        {"path": "/etc/passwd"}, {"step": None}, {"kind": "other"}, {"kind": None}, {"kind": ["maps"]}, {"page": "a b"},
        {"page": 1}, {"page": "a" * 65}, {"position": 1}, {"kind": "lens", "position": 1}, {"layer": 0},
        {"heads": False}, {"kind": "contributions", "position": -1}, {"kind": "contributions", "position": 1.0},
        {"kind": "contributions", "token": 3}, {"kind": "contributions", "changed": "a"}, {"kind": "patch"},
        {"kind": "patch", "changed": 1}, {"kind": "patch", "changed": "a" * 30_000},
        {"kind": "patch", "changed": "a", "layer": -1}, {"kind": "patch", "changed": "a", "heads": 1},
        {"kind": "patch", "changed": "a", "heads_off": [[0, 0]]}, {"kind": "patch", "changed": "a", "token": "b"},
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(plugin: AttentionPlugin, body: dict[str, Any]) -> None:
    reply = ask(plugin, body)
    assert reply.status_code == 400
    assert reply.json
    assert reply.json["error"]


BLOCK = {"kind": "block", "query": 9, "keys": [4], "heads": None}
MOVE = {"kind": "move", "query": 9, "keys": [4], "to": [2], "heads": None}


@pytest.mark.parametrize(
    "edits",
    [
        None, 3, {}, "block", [[]], [None], ["block"], [{}], [BLOCK] * 65, [{"kind": "none"}], [{"kind": ["block"]}],
        [BLOCK | {"query": -1}], [BLOCK | {"query": "9"}], [BLOCK | {"query": True}], [BLOCK | {"query": 10**9}],
        [BLOCK | {"query": None}], [BLOCK | {"keys": []}], [BLOCK | {"keys": [10]}], [BLOCK | {"keys": [-1]}],
        [BLOCK | {"keys": 4}], [BLOCK | {"keys": [1.5]}], [BLOCK | {"keys": [[4]]}], [BLOCK | {"keys": [4] * 3000}],
        [BLOCK | {"heads": []}], [BLOCK | {"heads": [1]}], [BLOCK | {"heads": [[0, -1]]}], [BLOCK | {"heads": "all"}],
        [BLOCK | {"heads": [[0, 1]] * 2000}], [BLOCK | {"to": [1]}], [BLOCK | {"code": "import os"}],
        [{"kind": "block", "query": 9, "keys": [4]}], [MOVE | {"to": []}], [MOVE | {"to": [4]}], [MOVE | {"to": [10]}],
        [{"kind": "ablate"}], [{"kind": "ablate", "heads": [[0, 1]]}],
        [{"kind": "ablate", "heads": None, "by": "zero"}],
        [{"kind": "ablate", "heads": [[0, 1]], "by": "none"}], [{"kind": "ablate", "heads": [[0, 1]], "by": ["zero"]}],
        [{"kind": "ablate", "mlp": -1, "by": "zero"}], [{"kind": "ablate", "mlp": True, "by": "zero"}],
        [{"kind": "ablate", "mlp": 0, "heads": [[0, 1]], "by": "zero"}],
    ],
)  # fmt: skip
def test_invalid_edits_are_refused(plugin: AttentionPlugin, edits: Any) -> None:
    assert ask(plugin, {"edits": edits}).status_code == 400


@pytest.mark.parametrize(
    "edits",
    [
        [BLOCK | {"query": 30}], [BLOCK | {"heads": [[2, 0]]}], [BLOCK | {"heads": [[0, 4]]}],
        [{"kind": "ablate", "mlp": 2, "by": "zero"}], [BLOCK | {"query": 0, "keys": [0]}],
        [BLOCK | {"query": 1, "keys": [0]}, BLOCK | {"query": 1, "keys": [1], "heads": [[1, 1]]}],
    ],
)  # fmt: skip
def test_edits_that_do_not_fit_the_sentence_or_the_model_are_refused(plugin: AttentionPlugin, edits: Any) -> None:
    reply = ask(plugin, {"edits": edits})
    assert reply.status_code == 422
    assert reply.json
    assert reply.json["error"]
    assert ask(plugin, {"edits": [BLOCK] * 64}).status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"run": "none"}, "no_run"), ({"run": "../secret"}, "no_checkpoint"), ({"run": ".."}, "no_checkpoint"),
        ({"run": "/etc"}, "no_checkpoint"), ({"run": "tiny/one\0"}, "no_run"),
        ({"run": f"{RUN}/checkpoints"}, "no_run"), ({"step": 39}, "no_checkpoint"), ({"text": "a" * 300}, "too_long"),
        ({"text": "a", "new_tokens": 200}, "too_long"), ({"heads_off": [[5, 0]]}, "no_head"),
        ({"text": "\ud800"}, "surrogate"), ({"kind": "contributions", "position": 200}, "no_position"),
        ({"kind": "contributions", "token": "no such token"}, "no_token"),
        ({"kind": "patch", "changed": "a"}, "pair_lengths"), ({"kind": "patch", "changed": TEXT}, "pair_alike"),
        ({"kind": "patch", "changed": TEXT, "layer": 9}, "no_layer"),
    ],
)  # fmt: skip
def test_unknown_runs_and_oversized_texts_are_refused(
    plugin: AttentionPlugin, runs_root: Path, body: dict[str, Any], code: str
) -> None:
    shutil.copytree(runs_root / RUN, runs_root.parent / "secret", symlinks=True)
    reply = ask(plugin, body)
    assert reply.status_code == (404 if code in ("no_run", "no_checkpoint") else 422)
    assert reply.json
    assert reply.json["error"]
    assert reply.json["code"] == code
    assert ask(plugin).status_code == 200


def test_links_out_of_the_logdir_are_not_followed(plugin: AttentionPlugin, runs_root: Path) -> None:
    outside = runs_root.parent / "outside"
    shutil.copytree(runs_root / RUN, outside, symlinks=True)
    (runs_root / "linked").symlink_to(outside)
    assert ask(plugin, {"run": "linked"}).status_code == 404
    checkpoints = runs_root / RUN / "checkpoints"
    (checkpoints / "step_00000041").symlink_to(outside / "checkpoints/step_00000040")
    shutil.copytree(checkpoints / "step_00000040", checkpoints / "step_00000042")
    (checkpoints / "step_00000042/model.safetensors").unlink()
    (checkpoints / "step_00000042/model.safetensors").symlink_to(
        outside / "checkpoints/step_00000040/model.safetensors"
    )
    (checkpoints / "step_00000043").mkdir()
    (checkpoints / "step_00000043/pytorch_model.bin").write_bytes(b"no pickle")
    assert RunFolders(str(runs_root)).steps(RUN) == [20, 40]
    assert [ask(plugin, {"step": step}).status_code for step in (41, 42, 43, 40)] == [404, 404, 404, 200]


def test_a_damaged_or_removed_checkpoint_is_reported(plugin: AttentionPlugin, runs_root: Path) -> None:
    file = runs_root / RUN / "checkpoints/step_00000040/model.safetensors"
    file.write_bytes(b"damaged" + file.read_bytes()[7:])
    reply = ask(plugin)
    assert reply.status_code == 422
    assert "damaged" in reply.json["error"]  # type: ignore[index]
    shutil.rmtree(runs_root / RUN / "checkpoints")
    assert ask(plugin).status_code == 404


def test_a_second_sentence_is_refused_while_busy(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugin_over(runs_root, [RUN])
    assert ask(plugin).status_code == 200
    monkeypatch.setattr("minitf.tensorboard.live.WAIT_S", 0.01)
    started, go_on = threading.Event(), threading.Event()
    run = Live._run

    def slow(self: Live, *arguments: Any) -> Any:
        started.set()
        assert go_on.wait(900)
        return run(self, *arguments)

    monkeypatch.setattr(Live, "_run", slow)
    statuses: list[int] = []
    first = threading.Thread(target=lambda: statuses.append(ask(plugin).status_code))
    first.start()
    assert started.wait(900)
    assert ask(plugin).status_code == 503
    go_on.set()
    first.join()
    assert statuses == [200]
    assert ask(plugin).status_code == 200


def test_a_fork_names_the_run_it_continues(runs_root: Path, tmp_path: Path) -> None:
    folders, record = RunFolders(str(runs_root)), runs_root / "tiny/fork/forked_from.json"
    record.parent.mkdir(parents=True)
    assert folders.forked_from("tiny/fork") is None
    record.write_text(json.dumps({"run": f"../../{RUN}", "step": 20}))
    assert folders.forked_from("tiny/fork") == {"run": RUN, "step": 20}
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    for content in ({"run": "../../../elsewhere", "step": 20}, {"run": str(outside), "step": 20}, {"run": 3}, [], "["):
        record.write_text(content if isinstance(content, str) else json.dumps(content))
        assert folders.forked_from("tiny/fork") is None
    record.unlink()
    record.symlink_to(outside / "secret.json")
    (outside / "secret.json").write_text(json.dumps({"run": f"../../{RUN}", "step": 20}))
    assert folders.forked_from("tiny/fork") is None


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/static/", "/static/../plugin.py", "/static/..%2fplugin.py", "/static/page.html", "/static/x"],
)
def test_no_other_files_are_served(plugin: AttentionPlugin, path: str) -> None:
    assert Client(plugin.get_plugin_apps()["/static/*"]).get(path).status_code == 404


def test_viewer_files_are_served(plugin: AttentionPlugin) -> None:
    client = Client(plugin.get_plugin_apps()["/static/*"])
    for name in ("tab.js", "viewer.js", "viewer.css", "texts.js"):
        reply = client.get(f"/static/{name}")
        assert reply.status_code == 200
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert "javascript" in client.get("/static/tab.js").content_type
    assert client.post("/static/tab.js").status_code == 405


def test_the_loader_keeps_all_steps_by_default() -> None:
    loader, parser = Loader(), argparse.ArgumentParser()
    loader.define_flags(parser)
    flags = parser.parse_args([])
    assert (flags.minitf_live, flags.minitf_live_hosts) == ("auto", "")
    for given, kept in (({}, 1000), ({"minitf_attention": 7}, 7)):
        flags.samples_per_plugin = dict(given)
        loader.fix_flags(flags)
        assert flags.samples_per_plugin["minitf_attention"] == kept
    loader.fix_flags(argparse.Namespace())


def test_loading_the_tab_does_not_import_torch() -> None:
    code = """
import sys
from types import SimpleNamespace
import minitf.tensorboard.loader as loader
assert "torch" not in sys.modules and "minitf.tensorboard.plugin" not in sys.modules
plugin = loader.Loader().load(SimpleNamespace(data_provider=None, logdir="runs", flags=None))
assert plugin.get_plugin_apps() and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")


def test_whole_numbers_have_no_decimals_in_the_hparams_tab() -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = {"model.num_layers": 4, "optim.learning_rate": 0.5, "optim.kind": "muon", "model.qk_norm": True}
    _, start, _ = hyperparameter_summaries(settings, {"loss": "held_out"})
    found = HParamsPluginData.FromString(start.value[0].metadata.plugin_data.content).session_start_info.hparams
    assert found["model.num_layers"].string_value == "4"
    assert found["optim.learning_rate"].number_value == 0.5
    assert found["model.qk_norm"].string_value == "true"
