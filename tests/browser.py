"""JupyterLab as a person sees it: a server of its own, and Chromium, driven over its DevTools.

`python tests/browser.py` fails where no Chromium starts.
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import websocket
from conftest import PROJECT
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",  # containers have little shared memory
    "--no-proxy-server", "--hide-scrollbars",
)  # fmt: skip
SIZE = (1440, 900)  # px, a laptop's screen
SECONDS = 120  # patience with one condition
RUN_SECONDS = 900  # patience with a whole run; on a quiet machine it takes a minute
START_SECONDS = 60  # patience with a browser that is asked whether it starts
TOKEN = secrets.token_hex()
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},  # tests save when they want to
}


class BrowserError(AssertionError):
    """The page did not do what it was asked to."""


@cache
def find_chromium() -> str | None:
    """Return the first Chromium that starts; a name alone may be a stub that asks for a snap."""
    for program in filter(None, map(shutil.which, NAMES)):
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
            suppress(subprocess.SubprocessError, OSError),
        ):
            subprocess.run(
                [program, *FLAGS, f"--user-data-dir={home}/profile", "--dump-dom", "about:blank"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
                env=os.environ | {"HOME": home}, timeout=START_SECONDS,
            )  # fmt: skip
            return program
    return None


def wait_for(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> object:
    """Return the first true answer of a condition that is asked again and again."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > end:
            raise BrowserError(f"{what}: not within {seconds} s")
        time.sleep(0.2)
    return answer


@contextmanager
def _process(command: list[str], log: Path, **options: object) -> Iterator[subprocess.Popen]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _started(process: subprocess.Popen, find: Callable[[], object], log: Path) -> object:
    def answer() -> object:
        if process.poll() is not None:
            raise BrowserError(
                f"{process.args[0]} ended with {process.returncode}:\n{log.read_text()}"
            )
        return find()

    return wait_for(answer, f"start of {process.args[0]}")


@contextmanager
def jupyter_server(folder: Path) -> Iterator[str]:
    """Serve a folder, on a port that the system chooses, without the user's own settings."""
    home = folder / ".jupyter"
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    places = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython",
        "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }  # fmt: skip
    env = os.environ | {name: str(home / place) for name, place in places.items()}
    env |= {"PYTHONPATH": str(PROJECT), "MPLCONFIGDIR": str(home / "matplotlib")}
    env.pop("MPLBACKEND", None)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        "--port=0", f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={TOKEN}",
        "--expose-app-in-browser", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    log = folder / "jupyter.log"
    with _process(command, log, cwd=folder, env=env) as process:
        runtime = home / "runtime"
        file = _started(process, lambda: next(runtime.glob("jpserver-*.json"), None), log)
        wait_for(lambda: file.read_text().endswith("}"), "all of the server's address")
        yield json.loads(file.read_text())["url"]


class Page:
    """A page of Chromium: what it shows, and what a person does with mouse and keys."""

    def __init__(self, address: str, pictures: Path) -> None:
        """Connect to a page's DevTools; screenshots go to a folder."""
        # an Origin would be refused
        self.socket = websocket.create_connection(address, timeout=SECONDS, suppress_origin=True)
        self.pictures, self.last = pictures, 0

    def call(self, method: str, **params: object) -> dict:
        """Send a command of the DevTools protocol and return its answer."""
        self.last += 1
        self.socket.send(json.dumps({"id": self.last, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.last:
            pass  # events
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def js(self, expression: str) -> object:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)  # fmt: skip
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = SECONDS) -> object:
        """Return the first true value of an expression."""
        return wait_for(lambda: self.js(expression), expression, seconds)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Send `Pressed`, `Moved` or `Released` of the left button at a place of the screen."""
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left",
                  buttons=int(kind != "Released"), clickCount=1)  # fmt: skip

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 5) -> None:
        """Drag from one place of the screen to another; a click, where they are one."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=start[0], y=start[1])
        self.mouse("Pressed", *start)
        for place in np.linspace(start, end, steps) if start != end else ():
            self.mouse("Moved", *place.tolist())
        self.mouse("Released", *end)

    def wheel(self, place: tuple[float, float], steps: int = 1) -> None:
        """Turn the wheel over a place of the screen, towards more detail."""
        for _ in range(steps):
            self.call("Input.dispatchMouseEvent", type="mouseWheel", x=place[0], y=place[1],
                      deltaX=0, deltaY=-100)  # fmt: skip

    def key(self, key: str) -> None:
        """Press a key, such as "n" or "Escape", where the focus is."""
        text = {"windowsVirtualKeyCode": 27} if key == "Escape" else {}
        if len(key) == 1:  # JupyterLab goes by the number of the key
            text = {"text": key, "windowsVirtualKeyCode": ord(key.upper())}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, name: str) -> Path:
        """Keep what the page shows as NAME.png."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        path = self.pictures / f"{name}.png"
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return path


@contextmanager
def chromium(folder: Path, pictures: Path) -> Iterator[Page]:
    """Open an empty page in a Chromium that knows nothing of the user."""
    profile, log = folder / "profile", folder / "chromium.log"
    command = [
        find_chromium(), *FLAGS, f"--window-size={SIZE[0]},{SIZE[1]}",
        f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank",
    ]  # fmt: skip
    with _process(command, log, env=os.environ | {"HOME": str(folder)}) as process:
        port_file = profile / "DevToolsActivePort"
        _started(process, lambda: port_file.exists() and port_file.read_text().count("\n"), log)
        port = port_file.read_text().splitlines()[0]

        def pages() -> list[str]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                targets = json.load(answer)
            return [t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page"]

        page = Page(_started(process, pages, log)[0], pictures)
        # the window's own size is less its frame
        page.call("Emulation.setDeviceMetricsOverride", width=SIZE[0], height=SIZE[1],
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if it were in front
        try:
            yield page
        finally:
            page.socket.close()


PANEL = "[...jupyterapp.shell.widgets('main')].find(w => w.context?.path.endsWith('.ipynb'))"
CELLS = f"{PANEL}.content.widgets"


class Lab:
    """A notebook that is open in JupyterLab."""

    def __init__(self, page: Page, server: str, path: Path) -> None:
        """Open a notebook that lies in the server's folder, and wait for its kernel."""
        self.page, self.path = page, path
        page.call("Page.navigate", url=f"{server}lab/tree/{path.name}?token={TOKEN}")
        page.wait(f"window.jupyterapp && {PANEL}?.context.isReady && {CELLS}.length > 1")
        page.js(f"jupyterapp.shell.activateById({PANEL}.id)")  # commands act on what is active
        page.wait(f"{PANEL}.sessionContext.session?.kernel?.status === 'idle'")

    def run_all(self) -> None:
        """Run all cells by JupyterLab's own command, wait for the last one, and save."""
        self.page.js(
            "window.ran = null; jupyterapp.commands.execute('notebook:run-all-cells')"
            ".then(() => { window.ran = 'done' }, error => { window.ran = `failed: ${error}` }); 0"
        )
        if self.page.wait("window.ran", RUN_SECONDS) != "done":
            raise BrowserError(self.page.js("window.ran"))
        self.page.wait(f"{PANEL}.sessionContext.session.kernel.status === 'idle'")
        self.page.js(f"{PANEL}.context.save()")

    def saved(self) -> nbformat.NotebookNode:
        """Return the notebook as it was saved last."""
        return nbformat.read(self.path, as_version=4)

    def index(self, text: str) -> int:
        """Return the number of the one cell whose source contains a text."""
        (index,) = [i for i, cell in enumerate(self.saved().cells) if text in cell.source]
        return index

    def find(self, index: int, selector: str) -> str:
        """Return the JavaScript of the first element of a cell that a selector finds."""
        return f"{CELLS}[{index}].node.querySelector({selector!r})"

    def show(self, index: int, selector: str = ".jp-Cell-outputWrapper") -> None:
        """Scroll to what a selector finds in a cell, which JupyterLab draws only then."""
        self.page.js(f"{PANEL}.content.scrollToItem({index}, 'start')")
        self.page.wait(f"{self.find(index, selector)} !== null")
        self.page.js(f"{self.find(index, selector)}.scrollIntoView({{block: 'start'}})")

    def place(
        self, index: int, selector: str, x: float = 0.5, y: float = 0.5
    ) -> tuple[float, float]:
        """Return where on the screen a point of an element of a cell is, in shares of its sides."""
        seen = [None]

        def at_rest() -> bool:  # scrolling takes a while
            box = f"{self.find(index, selector)}?.getBoundingClientRect()"
            seen.append(self.page.js(f"(b => b?.width && [b.x, b.y, b.width, b.height])({box})"))
            return seen[-1] and seen[-1] == seen[-2]

        wait_for(at_rest, f"{selector} at rest")
        left, top, width, height = seen[-1]
        return left + x * width, top + y * height

    def click(self, index: int, selector: str) -> None:
        """Click on an element of a cell as soon as it can be: toolbars appear under the mouse."""
        found = self.find(index, selector)
        self.page.js(f"{found}.scrollIntoView({{block: 'center'}})")

        def reached() -> bool:
            x, y = self.place(index, selector)
            self.page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            return self.page.js(f"{found}.contains(document.elementFromPoint({x}, {y}))")

        wait_for(reached, f"{selector} under the mouse")
        place = self.place(index, selector)
        self.page.drag(place, place)

    def pixels(self, index: int) -> np.ndarray:
        """Return the first figure in a cell, uint8 (height, width, 4); without one, (0, 0, 4)."""
        url = self.page.js(f"{self.find(index, CANVAS)}?.toDataURL()")
        if url in (None, "data:,"):  # without a size, before it is drawn
            return np.empty((0, 0, 4), np.uint8)
        data = base64.b64decode(url.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))

    def settled(self, index: int) -> np.ndarray:
        """Return the first figure in a cell as soon as it is drawn and changes no more."""
        seen = [self.pixels(index)]

        def still() -> bool:
            seen.append(self.pixels(index))
            return np.array_equal(seen[-1], seen[-2]) and (not seen[-1].size or seen[-1].any())

        wait_for(still, f"a figure at rest in cell {index}")
        return seen[-1]


CANVAS = ".jupyter-matplotlib-canvas-div canvas"  # the lower of two; the upper takes the mouse


if __name__ == "__main__":
    sys.exit(None if find_chromium() else "no Chromium starts")
