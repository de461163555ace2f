"""Hostile input for the loaders, the tokenizer, the configuration and the arguments of generation.

A target takes bytes or text; the only ways out are a result or a MinitfError of one line. Anything else, a hang beyond
`SLOW_S`, or memory beyond `MAX_GROWTH_BYTES`, is a finding: its input is written to a file and its way out shown.
Inputs come from hypothesis, and where atheris is installed from its coverage-guided mutations.
"""

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitf.errors import MinitfError, run_command

SLOW_S = 10.0
MAX_GROWTH_BYTES = 1 << 30
INTERESTING: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 1 << 31, 1 << 62, 10**30, -(10**30), 1e308, float("inf"), float("nan"), True, None, "", "x", [],
    {}, [1], {"a": 1}, "${oc.env:HOME}", "../../etc/passwd", "\ud800", "\0", "999999999999",
)  # fmt: skip

Target = Callable[[bytes], None]


class Targets:
    """What is tormented; each method takes the input's bytes and works in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        from minitf.model import ModelConfig, Transformer
        from minitf.tokenizer import TokenizerConfig, train_tokenizer

        self.directory = directory
        text = "The cat sat on the mat, and it was tired. 世界 \n" * 20
        self.tokenizers = [
            train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=280), [text]),
            train_tokenizer(TokenizerConfig(kind="byte"), []),
        ]
        shape = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, context_length=16, intermediate_size=8)
        self.model = Transformer(shape, self.tokenizers[1].vocab_size).eval()
        self.files = self._checkpoint()

    def _checkpoint(self) -> dict[str, bytes]:
        from minitf.checkpoint import save_checkpoint
        from minitf.train_state import TrainState

        place = self.directory / "good"
        tensors = {"random_state": self.model.rotary.flatten(), "pending": self.model.rotary[:, :0]}
        saved = save_checkpoint(
            place, self.model, self.tokenizers[1], tensors, vars(TrainState()) | {"data": {}}, is_best=True, keep=1
        )
        return {path.name: path.read_bytes() for path in saved.iterdir()}

    def checkpoint(self, data: bytes) -> None:
        """One file of a checkpoint changed, with digests that fit it, or none: as a stranger would send it."""
        from minitf.checkpoint import load_checkpoint, load_optimizer_state
        from minitf.train_state import TrainState

        chance = random.Random(data)
        place = self.directory / "checkpoint"
        place.mkdir(exist_ok=True)
        names = sorted(self.files)
        victim = names[data[0] % len(names)] if data else names[0]
        for name, content in self.files.items():
            (place / name).write_bytes(_changed(content, data[1:], chance) if name == victim else content)
        if chance.random() < 0.7 and victim != "trainer_state.json":
            (place / "trainer_state.json").unlink()
        elif victim == "trainer_state.json":
            _sign(place / "trainer_state.json")
        loaded = load_checkpoint(place, device="cpu")
        if loaded.state:
            TrainState.from_json(loaded.state)
            load_optimizer_state(place)

    def tokenizer(self, data: bytes) -> None:
        """Text that is encoded comes back as it was."""
        text = data.decode("utf-8", "surrogatepass") if data[:1] < b"\x80" else data.decode("latin-1")
        for tokenizer in self.tokenizers:
            ids = tokenizer.encode(text)
            if tokenizer.decode(ids) != text:
                raise AssertionError(f"{text!r} became {tokenizer.decode(ids)!r}")
            stream = tokenizer.decode_stream()
            streamed = "".join(stream.step(id_) or "" for id_ in ids) + stream.flush()
            if streamed != text:
                raise AssertionError(f"{text!r} streamed as {streamed!r}")
            if len(tokenizer.pieces(ids)) != len(ids):
                raise AssertionError(f"{text!r}: pieces")

    def tokenizer_file(self, data: bytes) -> None:
        """A changed tokenizer.json."""
        from minitf.tokenizer import Tokenizer

        path = self.directory / "tokenizer.json"
        path.write_bytes(_changed(self.files["tokenizer.json"], data, random.Random(data)))
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("The cat"))

    def config(self, data: bytes) -> None:
        """Arguments of a training."""
        from minitf.config import compose_config, load_config

        chance = random.Random(data)
        text = data.decode("utf-8", "replace")
        keys = [
            "model.num_layers",
            "trainer.max_steps",
            "data",
            "data.files",
            "optim.betas",
            "name",
            "seed",
            "attention.probes",
        ]
        argument = f"{chance.choice(keys)}={text}" if chance.random() < 0.7 else text
        if chance.random() < 0.5:
            compose_config([argument])
            return
        path = self.directory / "config.yaml"
        if not path.exists() or chance.random() < 0.01:
            from minitf.config import save_config

            save_config(compose_config([]), self.directory / "good.yaml")
        good = (self.directory / "good.yaml").read_bytes()
        path.write_bytes(_changed(good, data, chance))
        load_config(path)

    def generation(self, data: bytes) -> None:
        """Arguments of a generation, and a prompt."""
        from minitf.decoding.sampling import Sampling
        from minitf.generate import Options, generate_text

        chance = random.Random(data)
        # Mostly what is allowed: one bad value refuses them all, and hides what the others do together.
        allowed: list[list[Any]] = [
            [1, 2, 5, 20], [None, 0, 1, -1, 1 << 31, (1 << 63) - 1],
            [0, 0.7, 1e-6, 1e6], [0, 1, 3, 1000], [1e-6, 0.5, 1], [0, 0.05, 1], [1e-9, 1.3, 1e9],
        ]  # fmt: skip
        bad = [value for value in INTERESTING if isinstance(value, int | float)] + [0.5, 1.5]
        picked = [chance.choice(bad if chance.random() < 0.05 else values) for values in allowed]
        most = picked[0] if picked[0] < 20 else 20  # longer ones are only longer
        sampling = Sampling(*picked[2:])
        stop = (data[:3].decode("latin-1"),) if chance.random() < 0.5 else ()
        options = Options(most, picked[1], stop, sampling)
        generate_text(
            self.model, self.tokenizers[1], data.decode("utf-8", chance.choice(["replace", "surrogateescape"])), options
        )


NAMES = ("checkpoint", "tokenizer", "tokenizer_file", "config", "generation")


def _sign(path: Path) -> None:
    """Have trainer_state.json say of itself that it is whole, as a stranger can."""
    from minitf.checkpoint import own_sha256

    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state.pop("own_sha256", None)
        path.write_text(json.dumps({**state, "own_sha256": own_sha256(state)}), encoding="utf-8")
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass


def _changed(content: bytes, data: bytes, chance: random.Random) -> bytes:
    """Bytes put in, cut out, flipped; of JSON also a value replaced by another; a header that claims much."""
    way = chance.randrange(8)
    if way < 4 and content[:1] == b"{":
        return _other_value(content, data, chance)
    if way < 4 and content[8:9] == b"{":  # safetensors: a header after its length
        (length,) = struct.unpack_from("<Q", content)
        header = _other_value(content[8 : 8 + length], data, chance)
        claimed = chance.choice([len(header), len(header), len(header), len(header) + 1, 1 << 40, 0])
        return struct.pack("<Q", claimed) + header + content[8 + length :]
    at = chance.randrange(len(content) + 1)
    if way == 4:
        return content[:at]
    if way == 5:
        return content[:at] + data + content[at:]
    if way == 6:
        return data
    flipped = bytearray(content)
    for byte in data[:20]:
        flipped[chance.randrange(len(flipped))] ^= byte or 1
    return bytes(flipped)


def _other_value(content: bytes, data: bytes, chance: random.Random) -> bytes:
    document = json.loads(content)
    places: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        node = pending.pop()
        entries = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        for key, value in entries:
            places.append((node, key))
            if isinstance(value, dict | list):
                pending.append(value)
    for _ in range(chance.randint(1, 3)):
        node, key = chance.choice(places)
        text = data.decode("utf-8", "replace")
        node[key] = chance.choice([*INTERESTING, text, [text] * 3, len(data), -len(data) / 3])
    if chance.random() < 0.05:
        return content.replace(b"{", b'{"x":' + b"[" * 100_000, 1)
    return json.dumps(document).encode("utf-8", "surrogatepass")


class Watch:
    """Runs a target on an input; keeps what goes wrong."""

    def __init__(self, name: str, target: Target, findings: Path) -> None:
        self.name, self.target, self.findings = name, target, findings
        self.num_inputs = self.num_refused = 0
        self.found: dict[str, bytes] = {}
        self.slowest_s = 0.0
        self.memory = _peak_bytes()

    def __call__(self, data: bytes) -> None:
        started = time.perf_counter()
        self.num_inputs += 1
        try:
            self.target(data)
        except MinitfError as error:
            self.num_refused += 1
            if "\n" in str(error):
                self._note(f"an error of several lines: {str(error)[:200]!r}", data)
        except OSError as error:  # becomes one line in run_command
            if error.errno is None:
                self._note(repr(error)[:200], data)
        except UnicodeError as error:
            if self.name != "tokenizer":
                self._note(_where(error), data)
        except Exception as error:
            self._note(_where(error), data)
        except BaseException as error:  # a panic of a library is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self._note(_where(error), data)
        took = time.perf_counter() - started
        self.slowest_s = max(self.slowest_s, took)
        if took > SLOW_S:
            self._note(f"took {took:.0f} s", data)
        if (grown := _peak_bytes() - self.memory) > MAX_GROWTH_BYTES:
            self._note(f"memory grew by {grown >> 20} MiB", data)
            self.memory = _peak_bytes()

    def _note(self, what: str, data: bytes) -> None:
        if what not in self.found:
            self.found[what] = data
            self.findings.mkdir(parents=True, exist_ok=True)
            path = self.findings / f"{self.name}_{len(self.found)}.bin"
            path.write_bytes(data)
            print(f"{self.name}: {what} ({path})", flush=True)

    def summary(self) -> str:
        grown = max(0, _peak_bytes() - self.memory) >> 20
        return (f"{self.name}: {self.num_inputs:,} inputs, {self.num_refused:,} refused in one line, slowest "
                f"{self.slowest_s:.2f} s, memory grew by {grown} MiB, {len(self.found)} findings")  # fmt: skip


def _where(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "minitf" in frame.filename]
    frame = frames[-1] if frames else None
    place = f"{Path(frame.filename).name}:{frame.lineno}" if frame else "outside"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def with_hypothesis(watch: Watch, num_inputs: int, minutes: float) -> None:
    """So many inputs, or so many minutes, whichever comes first."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    end = time.monotonic() + minutes * 60
    anything = st.one_of(
        st.binary(max_size=300), st.text(max_size=150).map(lambda t: t.encode("utf-8", "surrogatepass"))
    )

    while watch.num_inputs < num_inputs and time.monotonic() < end:  # in rounds: hypothesis itself cannot be stopped

        @settings(max_examples=min(1000, num_inputs - watch.num_inputs), database=None, deadline=None,
                  phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(anything)
        def one(data: bytes) -> None:
            if time.monotonic() < end:
                watch(data)

        one()


def with_atheris(watch: Watch, num_inputs: int, minutes: float) -> None:
    """Mutations guided by the coverage of minitf's own code; ends the process with the summary."""
    import atheris

    end = time.monotonic() + minutes * 60

    def one(data: bytes) -> None:
        watch(data)
        if watch.num_inputs >= num_inputs or time.monotonic() > end:
            print(f"atheris, {watch.summary()}", flush=True)
            sys.stdout.flush()
            import os

            os._exit(1 if watch.found else 0)

    atheris.Setup([sys.argv[0], "-rss_limit_mb=0", "-timeout=60", "-verbosity=0"], one)
    atheris.Fuzz()


def main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/fuzz.py [TARGET ...] [--inputs N] [--minutes M] [--engine hypothesis|atheris]`."""
    parser = argparse.ArgumentParser(description="Hostile input, until something gives way or the time is over.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs for each target at most (default 100000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes for each target at most (default 10)")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where failing inputs are put")
    arguments = parser.parse_args(argv)
    targets = arguments.targets or list(NAMES)
    for name in targets:
        if name not in NAMES:
            raise MinitfError(f"no target {name}: there are {', '.join(NAMES)}")
    if arguments.engine == "atheris":
        if len(targets) != 1:
            raise MinitfError("atheris fuzzes one target a process: name one")
        import atheris  # type: ignore[import-not-found,unused-ignore]

        with atheris.instrument_imports(include=["minitf"]):
            _import_targets()
    import torch

    torch.set_num_threads(1)
    num_found = 0
    with tempfile.TemporaryDirectory() as place:
        made = Targets(Path(place))
        for name in targets:
            watch = Watch(name, getattr(made, name), arguments.findings)
            run = with_atheris if arguments.engine == "atheris" else with_hypothesis
            run(watch, arguments.inputs, arguments.minutes)
            print(watch.summary(), flush=True)
            num_found += len(watch.found)
    return 1 if num_found else 0


def _import_targets() -> None:
    import minitf.checkpoint
    import minitf.config
    import minitf.generate
    import minitf.tokenizer
    import minitf.untrusted  # noqa: F401


if __name__ == "__main__":
    sys.exit(run_command(main))
