"""A headless Chromium that tests drive through its DevTools protocol over a pipe; no library is needed for that."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable chrome".split()
WORDS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def browser() -> str:
    """A Chromium of this machine, or the test is skipped."""
    for name in BROWSERS:
        if place := shutil.which(name):
            return place
    for home in (
        Path.home() / ".cache/ms-playwright",
        Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "/ms-playwright")),
    ):
        for pattern in ("chromium-*/chrome-linux*/chrome", "chromium_headless_shell-*/*/headless_shell"):
            if places := sorted(home.glob(pattern)):
                return str(places[-1])
    return pytest.skip("no Chromium on this machine; install one, e.g. apt-get install chromium")


class Tab:
    """One page of a running Chromium. events: what it reported so far, with `method` and `params`."""

    def __init__(self, commands: int, answers: int):
        self.commands, self.answers = commands, os.fdopen(answers, "rb")
        self.number, self.rest, self.session, self.events = 0, b"", None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def message(self) -> dict:
        """The next message of the browser; each ends with a NUL byte."""
        while b"\0" not in self.rest:
            if not (more := self.answers.read1(2**16)):
                raise EOFError("Chromium has ended")
            self.rest += more
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def send(self, method: str, **params: object) -> dict:
        """Ask the browser to do something, and return its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, address: str, width: int | None = None, dark: bool = False) -> None:
        """Load a page, and wait until its scripts have run. width: the window's, where it is to change."""
        if width:
            self.look(width, dark=dark)
        self.events.clear()
        self.send("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def look(self, width: int, height: int = 900, dark: bool = False, medium: str = "") -> None:
        """Choose the window's size in CSS pixels, the colour scheme, and "print" or the screen."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=medium, features=[scheme])

    def run(self, script: str) -> object:
        """The value of a JavaScript expression in the page; a page's policy does not hold for it."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> object:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(expression):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{expression}: {self.run('document.body.innerText')!r}")

    def press(self, key: str) -> None:
        """One key, as from a keyboard."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" and len(key) == 1 else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        box = self.run(f"JSON.stringify(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        box = json.loads(box)
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **at)

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save what the page looks like as a PNG file, for people."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def printed(self) -> bytes:
        """The page as a PDF file, on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        return base64.b64decode(self.send("Page.printToPDF", printBackground=False, **size)["data"])


@contextlib.contextmanager
def tab() -> Iterator[Tab]:
    """A Tab of a Chromium of its own, which ends with the block."""
    place = browser()
    (theirs, commands), (answers, ours) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [*WORDS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        # it reads from 3 and writes to 4; sh knows no numbers of two digits here
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{ours}', place, *words]
        child = subprocess.Popen(shell, pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(ours)
        try:
            yield Tab(commands, answers)
        finally:
            os.close(commands)  # the browser ends where nobody commands it
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
