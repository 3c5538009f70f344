"""TensorBoard beside the menu of run_all.py, and a report in the browser. Light: neither is imported here."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from pathlib import Path

# TensorBoard, which ends when the pipe to it is closed: also where the menu is killed.
PROGRAM = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from tensorboard.main import run_main
run_main()
"""


def open_page(path: Path) -> bool:
    """Open a report in the browser; False where there is none on this machine."""
    # without a display, python would take a browser in text for one
    window = any(os.environ.get(key) for key in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))
    return (window or sys.platform in ("darwin", "win32")) and webbrowser.open(path.absolute().as_uri())


class Board:
    """A TensorBoard that runs beside the menu, and ends with it."""

    installed = importlib.util.find_spec("tensorboard") is not None

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.output = None

    def address(self) -> str:
        """Where it answers; "" while it does not."""
        if self.process is None or self.process.poll() is not None:
            return ""
        found = re.search(r"http://\S+", Path(self.output.name).read_text("utf-8", errors="replace"))
        return found[0] if found else ""

    def start(self, folder: str, patience: float = 90) -> tuple[str, str]:
        """(its address, why there is none), one of them ""."""
        if address := self.address():
            return address, ""
        self.stop()
        self.output = tempfile.NamedTemporaryFile("w", suffix=".log")
        words = ["--logdir", folder, "--port", str(free_port())]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + patience
        while time.monotonic() < end and self.process.poll() is None:
            if address := self.address():
                return address, ""
            time.sleep(0.1)
        said = Path(self.output.name).read_text("utf-8", errors="replace").strip().splitlines()
        self.stop()
        return "", said[-1] if said else f"{patience:.0f} s"

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.output.close()
            self.process = None


def free_port() -> int:
    """TensorBoard's usual port, or the next one that is free."""
    for port in range(6006, 6106):
        with socket.socket() as tried:
            try:
                tried.bind(("localhost", port))
            except OSError:
                continue
            return port
    return 0
