"""What the viewer is measured in: a headless Chromium through Playwright, and a TensorBoard with the Attention tab."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from minitf.benchmark.process import ROOT
from minitf.errors import MinitfError, Unavailable
from minitf.tensorboard import PLUGIN_NAME

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
SYSTEMS = ("chromium", "chromium-browser", "google-chrome")
START_S = 300.0  # for TensorBoard to have read a run, on a busy machine
# The milliseconds from an event's time stamp to the second frame after what is `shown` has changed and all is `ready`:
# the first frame draws the change, the second begins when it is painted.
TIMER = """({ type, shown, ready }) => {
  const [what, isReady] = [new Function(`return ${shown}`), new Function(`return ${ready}`)];
  const before = what();
  window.measured = new Promise((resolve, reject) => addEventListener(type, ({ timeStamp }) => {
    const look = () => {
      if (performance.now() - timeStamp > 60_000) reject(new Error(`nothing came of ${type} within a minute`));
      else if (isReady() && what() !== before) requestAnimationFrame(() => resolve(performance.now() - timeStamp));
      else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  }, { capture: true, once: true }));
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium, or Playwright's own; Unavailable without either, MinitfError for what fails in it."""
    if importlib.util.find_spec("playwright") is None:
        raise Unavailable("playwright is not installed (pip install -e '.[browser]')")
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as started:
        try:
            system = next(filter(None, map(shutil.which, SYSTEMS)), None)
            browser = started.chromium.launch(args=list(FLAGS), executable_path=system)
        except Error as error:
            reason = str(error).splitlines()[0]
            raise Unavailable(f"no Chromium starts (playwright install chromium): {reason}") from None
        try:
            yield browser
        except Error as error:
            raise MinitfError(f"in the browser: {str(error).splitlines()[0]}") from error
        finally:
            browser.close()


def milliseconds(frame: Any, act: Callable[[], None], event: str, shown: str, ready: str = "true") -> float:
    """From the event that `act` causes until what it changes is painted; `shown` and `ready` are JavaScript."""
    frame.evaluate(TIMER, {"type": event, "shown": shown, "ready": ready})
    act()
    return float(frame.evaluate("() => window.measured"))


@contextmanager
def tensorboard(logdir: Path, run: str, last_step: int) -> Iterator[str]:
    """The address of a TensorBoard over `logdir` that has read the run up to its last step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", address.rpartition(":")[2]]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not _has_read(address, run, last_step):
            if process.poll() is not None or time.monotonic() > deadline:
                raise MinitfError("TensorBoard shows no Attention tab: is minitf installed (pip install -e .)?")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def _has_read(address: str, run: str, last_step: int) -> bool:
    query = urlencode({"run": run})
    try:
        with urllib.request.urlopen(f"{address}/data/plugin/{PLUGIN_NAME}/run?{query}", timeout=30) as reply:
            found = json.load(reply)
    except (urllib.error.URLError, TimeoutError):  # not listening yet, or without this run so far
        return False
    return bool(found["sentences"][-1]["looks"][-1][0] == last_step and found["curves"]["train"][-1][0] == last_step)


def tab(page: Any, address: str, state: str) -> Any:
    """The frame of the Attention tab, opened at a state of the viewer."""
    page.goto(f"{address}/#{PLUGIN_NAME}&p.{PLUGIN_NAME}.state={quote(state, safe='')}")
    page.wait_for_selector("iframe", timeout=60_000)
    frame = next(frame for frame in page.frames if frame != page.main_frame)
    frame.wait_for_selector(".thumb", timeout=60_000)
    return frame
