"""The last line of a step: what came out, how long it took, where to look, and the next command."""

import time

import psutil

from configs.settings import say
from configs.state import spell


def say_done(what: str, look_at: str, then: str, words: str | None = None) -> None:
    """Say how a step ended, with QUIET too.

    what: its headline; look_at: files; then: a command. words: the line in another language, with the fields {what},
    {took}, {look_at} and {then}.
    """
    took = spell(time.time() - psutil.Process().create_time())
    line = words or "done: {what}; {took}; look at {look_at}; next: {then}"
    say(line.format(what=what, took=took, look_at=look_at, then=then), always=True)
