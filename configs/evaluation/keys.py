"""Single keys from the terminal, and a terminal that does not show them; without effect where there is no terminal."""

import contextlib
import os
import sys
from collections.abc import Iterator

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None


def has_keys() -> bool:
    """Whether single keys can be read: stdin and stdout are a terminal, and the system is no Windows."""
    return termios is not None and sys.stdin.isatty() and sys.stdout.isatty()


def can_draw() -> bool:
    """Whether stdout is a terminal on which text can be drawn anew."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """Keys that are pressed meanwhile are not shown: a ^C amid a picture would leave pieces of it on the screen."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextlib.contextmanager
def single_keys() -> Iterator[None]:
    """Keys come without Enter and are not shown; what was typed before is forgotten."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin, termios.TCSAFLUSH)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def read_key() -> str:
    """The next key, within single_keys(); "" for one that is no character (an arrow), "\\x04" at the end of input."""
    read = os.read(sys.stdin.fileno(), 64)
    text = read.decode("utf-8", "ignore")
    return "\x04" if not read else "" if text.startswith("\x1b") else text[:1]
