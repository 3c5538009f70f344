"""The pictures of the evaluation's report: differences, learning and forgetting, losses, cost."""

from pathlib import Path

import numpy as np

from configs.device import size
from configs.evaluation.statistics import shows
from configs.handover import draw_losses
from configs.pictures import COLOR, Gallery, Picture
from configs.state import spell
from configs.text import without_zero_signs

COLORS = {"base": COLOR["grey"], "lora": COLOR["blue"], "full": COLOR["red"], "merged": COLOR["cyan"]}
OTHERS = COLOR["green"]  # the colour of CANDIDATES
COSTS = ("train_runtime_s", "peak_memory_bytes", "disk_bytes")


def draw(
    results: dict, histories: dict[str, list[dict]], folder: Path, words: dict[str, str], english: dict[str, str]
) -> dict[str, Picture]:
    """The pictures of the report by name, and as PNG files in `folder`, which is made.

    results: those of evaluation_results.json. histories: {model: `history` of its training_log.json}. words, english:
    load_words of the report's language, and of "en" for a machine without a font for it.
    """
    gallery, models = Gallery(folder, words, english), results["models"]
    compared = [c for c in results["comparisons"] if c["metric"] == "nll_per_token" and c["a"] != "base_4bit"]
    gallery.add(
        "differences",
        lambda axis, w: draw_differences(axis, compared, w),
        (4.4, 1.0 + 0.42 * len(compared)),
        "; ".join(difference(c, words) for c in compared) or words["none"],
        words["plot_differences"],
    )
    against_base = {(c["a"], c["metric"]): c for c in results["comparisons"] if c["b"] == "base"}
    if forgetful := [name for name in models if (name, "forgetting") in against_base]:
        told = [
            f"{words['axis_learned']}: {difference(against_base[name, 'nll_per_token'], words)}; "
            f"{words['axis_forgotten']}: {difference(against_base[name, 'forgetting'], words)}"
            for name in forgetful
        ]
        gallery.add(
            "forgetting",
            lambda axis, w: draw_forgetting(axis, against_base, forgetful, w),
            (4.4, 3.0),
            "; ".join(told),
            words["plot_forgetting"],
        )
    gallery.add(
        "loss_curves",
        lambda axis, w: draw_curves(axis, histories, w),
        (4.4, 3.2),
        "; ".join(filter(None, (last_losses(*item, words) for item in histories.items()))) or words["none"],
        words["plot_loss_curves"],
    )
    trained = {name: m["cost"] for name, m in models.items() if m["cost"]}
    told = [
        f"{cost_label(key, models, words)}: "
        + ", ".join(f"{name_of(name, words)} {amount(key, cost[key], words)}" for name, cost in trained.items())
        for key in COSTS
    ]
    gallery.add(
        "cost",
        lambda axes, w: draw_cost(axes, trained, models, w),
        (4.4, 0.9 + 0.75 * max(len(trained), 1)),
        "; ".join(told),
        words["plot_cost"],
        len(COSTS),
    )
    return gallery.pictures


def name_of(name: str, words: dict) -> str:
    """What a model is called; CANDIDATES by their own names."""
    return words.get(name, name)


def difference(c: dict, words: dict) -> str:
    """A comparison with its interval, for those who do not see the picture."""
    low, high = c["ci95"]
    pair = f"{name_of(c['a'], words)} - {name_of(c['b'], words)}"
    return without_zero_signs(f"{pair} {c['difference']:+.3f} ({words['interval']} [{low:+.3f}, {high:+.3f}])")


def last_losses(name: str, history: list[dict], words: dict) -> str:
    """Where the curves of one training end, in words."""
    ends = []
    for key, part in (("loss", "training"), ("eval_loss", "validation")):
        values = [r[key] for r in history if isinstance(r, dict) and isinstance(r.get(key), float)]
        if values:
            ends.append(f"{name_of(name, words)}, {words[part]}: {values[0]:.3f} -> {values[-1]:.3f}")
    return "; ".join(ends)


def memory_label(models: dict) -> str:
    """The key of the words for peak memory: without a GPU, it is that of the whole process."""
    known = [m["cost"] for m in models.values() if m["cost"]]
    return "memory_cpu" if any(cost.get("device") == "cpu" for cost in known) else "memory"


def cost_label(key: str, models: dict, words: dict) -> str:
    """What a cost is called."""
    names = {"train_runtime_s": "runtime", "peak_memory_bytes": memory_label(models), "disk_bytes": "disk"}
    return words[names[key]]


def amount(key: str, value: float | None, words: dict) -> str:
    """A cost for people, with its unit."""
    if value is None:
        return words["none"]
    if key == "train_runtime_s":
        return spell(value, words["language"])
    return f"{value / 1e6:,.1f} MB" if key == "disk_bytes" and value < 1e8 else size(value)


# --- each picture: the axis is one of matplotlib, w are the words of its labels


def draw_differences(axis, comparisons: list[dict], w: dict) -> None:
    """Each pair's difference in nats per token with its 95 % interval, which is that of the pairs of rows.

    No picture shows the interval of a single model: those of two models overlap also where the difference is certain.
    """
    axis.axvline(0, color=COLOR["grey"], lw=1)
    for place, c in enumerate(reversed(comparisons)):
        reach = np.abs(np.array(c["ci95"]) - c["difference"])[:, None]
        color = COLOR["ink"] if shows(c) else COLOR["grey"]
        axis.errorbar(c["difference"], place, xerr=reach, fmt="o", ms=5, capsize=4, color=color)
        text = without_zero_signs(f"{c['difference']:+.3f}")
        label = axis.annotate(text, (c["difference"], place), (0, 6), textcoords="offset points", ha="center")
        label.set(color=color, fontsize=9)
    names = [f"{name_of(c['a'], w)} - {name_of(c['b'], w)}" for c in reversed(comparisons)]
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-0.5, len(names) - 0.2)
    axis.margins(x=0.12)
    axis.set_xlabel(w["axis_difference"])


def draw_forgetting(axis, against_base: dict, names: list[str], w: dict) -> None:
    """What each trained model gained on the test split against what it lost on the general text."""

    def bar(comparison: dict, sign: int) -> tuple[float, np.ndarray]:
        reach = np.abs(np.array(comparison["ci95"]) - comparison["difference"])
        return sign * comparison["difference"], reach[::sign, None]

    axis.axhline(0, color=COLOR["faint"], zorder=0)
    axis.axvline(0, color=COLOR["faint"], zorder=0)
    axis.plot(0, 0, "o", color=COLORS["base"])
    points = [("base", (0.0, 0.0), COLORS["base"])]
    for name in names:
        learned, dx = bar(against_base[name, "nll_per_token"], -1)
        forgot, dy = bar(against_base[name, "forgetting"], 1)
        color = COLORS.get(name, OTHERS)
        axis.errorbar(learned, forgot, dy, dx, fmt="o", color=color, capsize=4)
        points.append((name, (learned, forgot), color))
    axis.set_xlabel(w["axis_learned"])
    axis.set_ylabel(w["axis_forgotten"])
    axis.margins(0.18)
    label_points(axis, points, w)


def label_points(axis, points: list[tuple[str, tuple[float, float], str]], w: dict) -> None:
    """The names of models beside their points, one above another where points nearly coincide."""
    axis.autoscale_view()
    taken: list[tuple[float, float]] = []  # in typographic points
    for name, place, color in points:
        x, y = axis.transData.transform(place) * 72 / axis.figure.dpi
        up = 6.0
        while any(abs(x - a) < 60 and abs(y + up - b) < 11 for a, b in taken):
            up += 11
        taken.append((x, y + up))
        axis.annotate(name_of(name, w), place, (6, up), textcoords="offset points").set(color=color)


def draw_curves(axis, histories: dict[str, list[dict]], w: dict) -> None:
    """Training and validation loss of each training over its optimizer steps."""
    for name, history in histories.items():
        parts = (f"{name_of(name, w)}, {w[part]}" for part in ("training", "validation"))
        draw_losses(axis, history, tuple(parts), COLORS[name])
    axis.set_xlabel(w["axis_steps"])
    axis.set_ylabel(w["axis_loss"])
    axis.grid(axis="y")
    if axis.lines:
        axis.figure.legend(loc="outside lower center", ncols=2)


def draw_cost(axes, trained: dict[str, dict], models: dict, w: dict) -> None:
    """Time, memory and disk of each training as bars, an axis each; what is not known has no bar."""
    names = list(reversed(trained))
    for axis, key in zip(axes, COSTS, strict=True):
        values = [trained[name][key] for name in names]
        colors = [COLORS.get(name, OTHERS) for name in names]
        bars = axis.barh([name_of(name, w) for name in names], [value or 0 for value in values], 0.62, color=colors)
        axis.bar_label(bars, [amount(key, value, w) for value in values], padding=4, fontsize=9)
        axis.set_title(cost_label(key, models, w), loc="left", fontsize=10)
        axis.set_xlim(0, 1.3 * max((value or 0 for value in values), default=0) or 1)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", length=0)
