"""The pictures of a sweep's report: rates, learning and forgetting, the budget of a search."""

from pathlib import Path

import numpy as np

from configs.evaluation import statistics
from configs.pictures import COLOR, Gallery, Picture

PALETTE = [COLOR[tone] for tone in ("blue", "red", "green", "purple", "brown", "cyan")]
STYLES = {"selection": "o-", "seeds": "x"}  # of the two phases
SIZE = (4.4, 3.4)  # inches


def draw(results: dict, folder: Path, words: dict[str, str], english: dict[str, str]) -> dict[str, Picture]:
    """The pictures of the report by name, and as PNG files in `folder`, which is made.

    results: what results.analyse found. words, english: those of the report's language, and of "en" for a machine
    without a font for it.
    """
    gallery, base = Gallery(folder, words, english), results["base"]
    gallery.add(
        "rates", lambda axis, w: draw_rates(axis, results, w), SIZE, losses_in_words(results), words["plot_rates"]
    )
    if base["general"] is not None:
        told = [
            f"{name}: {words['axis_gain']} {np.mean(gains):.3f}, {words['axis_forgot']} {np.mean(lost):+.3f}"
            for name in results["arms"]
            if (points := learned(results, name, "seeds") or learned(results, name, "selection"))
            for gains, lost in [zip(*points, strict=True)]
        ]
        gallery.add(
            "learning",
            lambda axis, w: draw_learning(axis, results, w),
            SIZE,
            "; ".join(told).replace("\n", " "),
            words["plot_learning"],
        )
    ends = [(name, searches(results, name)) for name in results["arms"]]
    told = [f"{name}: {best[0]:.3f} -> {best[-1]:.3f} ({seconds[-1]:.0f} s)" for name, (seconds, best) in ends if best]
    gallery.add("budget", lambda axis, w: draw_budget(axis, results, w), SIZE, "; ".join(told), words["plot_budget"])
    return gallery.pictures


def colors(results: dict) -> dict[str, str]:
    """The colour of each arm."""
    return dict(zip(results["arms"], PALETTE * 3, strict=False))


def scored(results: dict, arm: str, phase: str) -> list[dict]:
    """The runs of an arm that were scored, by their rate. phase: "selection" or "seeds"."""
    runs = [r for r in results["runs"].values() if "nll_per_token" in r and (r["arm"], r["phase"]) == (arm, phase)]
    return sorted(runs, key=lambda run: run["rate"])


def losses_in_words(results: dict) -> str:
    """The lowest and the highest loss of each arm, for those who do not see the picture."""
    told = [f"base: {results['base']['nll_per_token']:.3f}"]
    for name in results["arms"]:
        runs = scored(results, name, "selection")
        if runs:
            best, worst = (pick(runs, key=lambda run: run["nll_per_token"]) for pick in (min, max))
            ends = (f"{run['nll_per_token']:.3f} ({run['rate']:.1e})" for run in (best, worst))
            told.append(f"{name}: {' - '.join(ends)}")
    return "; ".join(told)


def learned(results: dict, arm: str, phase: str) -> list[tuple[float, float]]:
    """(what a run gained on the test split, what it lost on the general text) of an arm's runs, in nats per token."""
    base = results["base"]
    return [
        (base["nll_per_token"] - run["nll_per_token"], run["general"] - base["general"])
        for run in scored(results, arm, phase)
    ]


def searches(results: dict, arm: str) -> tuple[list[float], list[float]]:
    """(seconds, best validation loss to expect) of a search of 1, 2, ... runs of an arm's grid."""
    own = [r for r in results["runs"].values() if r["arm"] == arm and r["phase"] == "selection"]
    losses = [r["eval_loss"] for r in own if r["state"] == "done"]
    seconds = np.mean([r["seconds"] for r in own if r.get("seconds")] or [0])
    budgets = range(1, len(losses) + 1)
    return [n * seconds for n in budgets], [statistics.expected_best(losses, n) for n in budgets]


# --- each picture: the axis is one of matplotlib, w are the words of its labels


def legend(axis) -> None:
    """What the colours mean, below the picture."""
    axis.figure.legend(loc="outside lower center", ncols=2)


def draw_rates(axis, results: dict, w: dict) -> None:
    """Test loss of every run over its learning rate; the chosen rate of each arm has a line."""
    axis.axhline(results["base"]["nll_per_token"], ls="--", color=COLOR["grey"], label="base")
    for name, color in colors(results).items():
        for phase, style in STYLES.items():
            own = scored(results, name, phase)
            label = {"label": name} if phase == "selection" else {}
            axis.plot([r["rate"] for r in own], [r["nll_per_token"] for r in own], style, color=color, **label)
        if rate := results["selection"][name]["rate"]:
            axis.axvline(rate, color=color, lw=0.6)
    axis.plot([], [], "x", color=COLOR["ink"], label=w["label_fresh"])
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.0e}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel(w["axis_rate"])
    axis.set_ylabel(w["axis_loss"])
    legend(axis)


def draw_learning(axis, results: dict, w: dict) -> None:
    """What each run has learned against what it lost on the general text."""
    axis.plot(0, 0, "o", color=COLOR["grey"], label="base")
    for name, color in colors(results).items():
        for phase, style in STYLES.items():
            if points := learned(results, name, phase):
                label = {"label": name} if phase == "selection" else {}
                axis.plot(*zip(*points, strict=True), style, color=color, **label)
    axis.plot([], [], "x", color=COLOR["ink"], label=w["label_fresh"])
    axis.set_xlabel(w["axis_gain"])
    axis.set_ylabel(w["axis_forgot"])
    legend(axis)


def draw_budget(axis, results: dict, w: dict) -> None:
    """The best validation loss to expect over the training time of a search."""
    for name, color in colors(results).items():
        axis.plot(*searches(results, name), "o-", color=color, label=name)
    axis.set_xlabel(w["axis_seconds"])
    axis.set_ylabel(w["axis_best"])
    legend(axis)
