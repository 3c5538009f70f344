"""A person judges in the terminal: two answers at a time, one key a verdict."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.evaluation.keys import can_draw, read_key, single_keys
from configs.text import visible

KEYS = {"1": "first", "2": "second", "t": "tie", "0": "tie", "s": "skip"}
WIDE = 76  # columns of the terminal from which two answers stand side by side


def judge_in_terminal(session, words: dict) -> None:
    """Show what is to be judged and read keys until all is judged, q was pressed twice, or the input ends.

    session: person.Session. What was typed before a pair is shown does not count for it.
    """
    while session.current is not None:
        with single_keys():
            show(session, words)
            key = read_key().lower()
        if key in KEYS:
            session.give(session.number, KEYS[key])
        elif key == "b":
            session.back()
        elif key == "\x04" or (key == "q" and is_sure(words)):
            return


def is_sure(words: dict) -> bool:
    """Whether a second key says q, too: it lies beside the 1."""
    with single_keys():
        print(words["sure"], flush=True)
        return read_key().lower() in ("q", "\x04")


def show(session, words: dict) -> None:
    """The question and both answers as text, on a cleared screen; one below the other on a narrow terminal."""
    console, showing = Console(highlight=False, no_color=not can_draw()), session.current
    if can_draw():
        console.clear()
    count = words["count"].format(n=session.number + 1, of=len(session.showings))
    console.print(Text(f"{count} · {words['task']}", "dim"), "")
    console.print(Text(visible(showing.question), "bold"), "")
    answers = [Text(visible(text) or words["empty"]) for text in (showing.first, showing.second)]
    if console.width >= WIDE:
        grid = Table(expand=True)
        for name in "12":
            grid.add_column(name, ratio=1)
        grid.add_row(*answers)
        console.print(grid)
    else:
        for name, text in zip("12", answers, strict=True):
            console.rule(name, align="left")
            console.print(text)
        console.rule()
    console.print(Text(words["keys"]))
