"""The last line of a step: what came out, how long it took, where to look, and the next command."""

import os
import time

import psutil

from configs.settings import say
from configs.state import spell

FOLLOWED = "SFT_FOLLOWED"  # run_all.py sets this variable for a step behind which it runs another one itself


def say_done(what: str, look_at: str, then: str) -> None:
    """Say how a step ended, with QUIET too.

    what: its headline; look_at: files; then: a command, which is left out where run_all.py goes on by itself.
    """
    took = spell(time.time() - psutil.Process().create_time())
    following = "" if os.environ.get(FOLLOWED) else f"; next: {then}"
    say(f"done: {what}; {took}; look at {look_at}{following}", always=True)
