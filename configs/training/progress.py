"""What a training shows while it runs: one line, redrawn on a terminal; elsewhere, one line a logging step."""

import contextlib
import functools
import math
import os
import sys
import time
from collections import deque

import datasets
from rich.cells import cell_len
from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from transformers import trainer as transformers_trainer
from transformers.integrations import SwanLabCallback, TensorBoardCallback

from configs import settings
from configs.device import GB
from configs.settings import is_quiet, say
from configs.training.doubts import many_hours
from configs.translation import phrase

# What TensorBoard shows as curves; the other numbers of a record stand in training_log.json.
CURVES = {"loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb"}
datasets.disable_progress_bars()  # "Filter" and the like: over before anybody has read them

# --- the line


def line(
    step: int,
    steps: int,
    epoch: float | None = None,
    loss: float | None = None,
    eval_loss: float | None = None,
    rate: float | None = None,
    speed: float | None = None,
    memory: float | None = None,
    ending: str = "",
    width: int | None = None,
) -> str:
    """`step 30/60 · epoch 0.5 · loss 2.80 · eval 3.03 · lr 2.8e-3 · 2.8k tok/s · 1.2 GB · 0:12 left`.

    What is None is left out. rate: learning rate; speed: tokens a second; memory: bytes; width: columns, where what
    matters least goes first until it fits.
    """
    parts = {
        "step": f"step {step}/{steps}",
        "epoch": None if epoch is None else f"epoch {round(epoch, 2):g}",
        "loss": None if loss is None else f"loss {number(loss)}",
        "eval": None if eval_loss is None else f"eval {number(eval_loss)}",
        "rate": None if rate is None else f"lr {power(rate)}",
        "speed": None if speed is None else f"{thousands(speed)} tok/s",
        "memory": None if memory is None else size(memory),
        "ending": ending,
    }
    spelled = {name: phrase(part) for name, part in parts.items() if part}
    for least in ("memory", "speed", "rate", "epoch", "eval", "loss"):
        if width is not None and cell_len(" · ".join(spelled.values())) > width:
            spelled.pop(least, None)
    return " · ".join(spelled.values())


def number(value: float) -> str:
    """A loss: 2.80, 0.0312, nan."""
    if not math.isfinite(value) or abs(value) >= 1 or value == 0:
        return f"{value:.2f}"
    return f"{value:#.3g}"


def power(value: float) -> str:
    """A learning rate: 2.8e-3, and 0 at the end of a schedule."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def thousands(value: float) -> str:
    """850, 2.8k, 28k, 1.2M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.1f}{name}" if value < 9.95 * unit else f"{value / unit:.0f}{name}"
    return f"{value:.0f}"


def size(count: float) -> str:
    """1.2 GB, or 45 MB where gigabytes would say 0.0."""
    return f"{count / GB:.1f} GB" if count >= 0.95 * GB else f"{count / 1e6:.0f} MB"


def clock(seconds: float) -> str:
    """0:12, 12:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def is_redrawn() -> bool:
    """Whether stdout is a terminal on which a line can be drawn again."""
    return bool(sys.stdout and sys.stdout.isatty()) and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """Width of the terminal at this moment: a window changes its size, and COLUMNS may be of another one."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class Line(tqdm):
    """A line at the bottom that is drawn again and again. `say` writes above it."""

    monitor_interval = 0  # no thread that would draw it, too

    def __init__(self):
        super().__init__(bar_format="{desc}", file=sys.stdout, dynamic_ncols=True)
        settings.beside_line = functools.partial(type(self).external_write_mode, file=sys.stdout)

    def close(self) -> None:
        super().close()
        settings.beside_line = contextlib.nullcontext


# --- the callbacks


class Progress(TrainerCallback):
    """Shows where a training is, and says once where more than an hour is left.

    log: the RunLog; its elapsed() and paused() are the seconds of training alone, and of all else.
    """

    def __init__(self, log):
        self.log, self.shown, self.news, self.drawn_at, self.warned = log, {}, False, 0.0, False
        self.drawn: Line | None = None
        self.ends: deque[tuple[int, float]] = deque(maxlen=50)  # (step, seconds of training at its end)
        self.evaluations, self.evaluated, self.paused_before = 0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.paused_before = self.log.paused()
        if state.is_world_process_zero and not is_quiet() and is_redrawn():
            self.drawn = Line()
            self.draw(state, "starting")

    def on_step_begin(self, args, state, control, **kwargs):
        self.tell(state)

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append((state.global_step, self.log.elapsed()))
        if not self.warned and self.is_settled() and (doubt := many_hours(self.left(state) or 0)):
            say(f"warning: {doubt}")
            self.warned = True
        self.draw(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        names = {"loss": "loss", "eval_loss": "eval_loss", "rate": "learning_rate", "speed": "tokens_per_second"}
        new = {key: logs[name] for key, name in names.items() if name in logs}
        if "memory_gb" in logs:
            new["memory"] = logs["memory_gb"] * GB
        if "loss" in new or "eval_loss" in new:
            self.shown |= new
            self.news = True

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.evaluated += 1
        of = f"/{len(eval_dataloader)}" if hasattr(eval_dataloader, "__len__") else ""
        self.draw(state, f"evaluating {self.evaluated}{of}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated, self.evaluations = 0, self.evaluations + 1
        self.draw(state, at_once=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.tell(state)
        self.draw(state, at_once=True)
        self.close()

    def close(self) -> None:
        """Leave the line as it is."""
        if self.drawn is not None:
            self.drawn.close()
            self.drawn = None

    def words(self, state, ending: str | None = None, width: int | None = None) -> str:
        left = self.left(state)
        if ending is None:
            ending = "" if left is None or state.global_step >= state.max_steps else f"{clock(left)} left"
        return line(state.global_step, state.max_steps, state.epoch, **self.shown, ending=ending, width=width)

    def draw(self, state, ending: str | None = None, at_once: bool = False) -> None:
        """Draw the line again, at most ten times a second."""
        if self.drawn is not None and (at_once or time.monotonic() - self.drawn_at > 0.1):
            self.drawn.set_description_str(self.words(state, ending, columns() - 1), refresh=True)
            self.drawn_at = time.monotonic()

    def tell(self, state) -> None:
        """Without a terminal: a line of its own where there is news. It waits for the evaluation of its step."""
        if self.news and self.drawn is None and state.is_world_process_zero and not is_quiet():
            say(self.words(state))
        self.news = False

    # --- the time that is left

    def is_settled(self) -> bool:
        """Whether enough steps were made to tell the time of one; the first one warms up."""
        return len(self.ends) > 5 or (len(self.ends) > 2 and self.ends[-1][1] - self.ends[0][1] > 60)

    def left(self, state) -> float | None:
        """Seconds to go, with the evaluations and checkpoints that come; None where it cannot be told yet."""
        if len(self.ends) < 2:
            return None
        (first, began), (last, ended) = self.ends[0], self.ends[-1]
        seconds = (ended - began) / (last - first) * (state.max_steps - state.global_step)
        every = max(int(state.eval_steps or 0), 1)
        to_come = math.ceil(state.max_steps / every) - state.global_step // every
        if self.evaluations and state.global_step < state.max_steps:
            seconds += (self.log.paused() - self.paused_before) / self.evaluations * to_come
        return seconds


class Board(TensorBoardCallback):
    """TensorBoard's events without the numbers that nobody looks at as a curve."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        curves = {name: value for name, value in (logs or {}).items() if name in CURVES}
        if curves:
            super().on_log(args, state, control, logs=curves, **kwargs)


def callbacks(options, log) -> list[TrainerCallback]:
    """The run's log, its line, and early stopping where it is asked for. options: of the script; log: a RunLog."""
    patience = options.EARLY_STOPPING_PATIENCE
    return [log, log.progress] + ([EarlyStoppingCallback(patience)] if patience else [])


def ours_for(callback: TrainerCallback) -> TrainerCallback:
    """What takes the place of one of the Trainer's trackers, or the tracker itself."""
    if type(callback) is TensorBoardCallback:
        return Board()
    if type(callback) is SwanLabCallback:  # it asks for a run that is not there yet, which swanlab 0.10 refuses
        from swanlab.integration.transformers import SwanLabCallback as OfSwanLab

        return OfSwanLab()
    return callback


def replace_theirs(trainer) -> None:
    """Take away the Trainer's bars and raw records, TensorBoard's noise, and a warning that resume.py has given."""
    handler = trainer.callback_handler
    kept = [cb for cb in handler.callbacks if not isinstance(cb, PrinterCallback | ProgressCallback)]
    handler.callbacks = [ours_for(callback) for callback in kept]
    transformers_trainer.compare_trainer_and_checkpoint_args = lambda *_: None


@contextlib.contextmanager
def bars():
    """A bar of the datasets library for what may take minutes, on a terminal."""
    shown = is_redrawn() and not is_quiet()
    if shown:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()
