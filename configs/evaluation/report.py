"""The results for people: sentences in English and Chinese, plots, evaluation_report.md and .html, the table."""

import base64
import re
from pathlib import Path

import markdown
import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from configs import handover
from configs.evaluation.statistics import shows
from configs.settings import command, say
from configs.text import cell

Note = tuple[str, dict]  # key of a sentence in templates/<language>.yaml, and what it is filled with
TEMPLATES = Path(__file__).with_name("templates")


# --- sentences


def load_words(language: str) -> dict[str, str]:
    """Every sentence of the report, from templates/<language>.yaml."""
    return yaml.safe_load((TEMPLATES / f"{language}.yaml").read_text(encoding="utf-8"))


def sentence(note: Note, words: dict[str, str]) -> str:
    """A note as a sentence; models are named in it as their folders and flags are."""
    key, values = note
    return words[f"note_{key}"].format_map(values)


def verdict(results: dict, pairs: list[tuple[str, str]], words: dict) -> str:
    """One sentence from the statistics of these pairs; never "better" where the interval covers zero."""
    if results.get("unsound"):
        reasons = words["and"].join(sentence(note, words) for note in results["unsound"])
        return words["verdict_withheld"].format(reasons=reasons)
    parts = []
    first = "".join(of_no_use(results, pairs, words))
    for c in results["comparisons"]:
        if c["metric"] != "nll_per_token" or (c["a"], c["b"]) not in pairs:
            continue
        low, high = c["ci95"]
        values = {"a": words[c["a"]], "b": words[c["b"]], "difference": abs(c["difference"])}
        if low <= 0 <= high:
            parts.append(words["verdict_none"].format(**values, low=low, high=high))
        elif not shows(c):
            parts.append(words["verdict_unsure"].format(**values, low=low, high=high, p=c["p_value"]))
        elif high < 0:
            parts.append(words["verdict_better"].format(**values, low=-high, high=-low))
        else:
            parts.append(words["verdict_worse"].format(**values, low=low, high=high))
    return first + words["verdict"].format(pairs=words["and"].join(parts))


def of_no_use(results: dict, pairs: list[tuple[str, str]], words: dict) -> list[str]:
    """What must be said before any winner is named: which trained models give answers that nobody can use.

    Of the models of `pairs` but the base: most answers are of no use (metrics.useless), or they are not shown to be
    any nearer to their references than to those of other questions (metrics.nearer).
    """
    said = []
    for name, model in results.get("models", {}).items():
        answers = model.get("answers") or {}
        if name == "base" or not any(name in pair for pair in pairs):
            continue
        if answers.get("useless", 0) > 0.5:
            said.append(words["verdict_useless"].format(name=words[name], share=answers["useless"]))
        elif (found := answers.get("nearer")) and found["ci95"][0] <= 0:
            low, high = found["ci95"]
            values = {"name": words[name], "difference": found["difference"], "low": low, "high": high}
            said.append(words["verdict_not_nearer"].format(**values))
    return said


# --- plots

COLORS = {"base": "#777777", "lora": "#4477aa", "full": "#cc6677", "merged": "#66ccee"}
OTHERS = "#228833"  # the colour of CANDIDATES
LABELS = {"base": "base", "lora": "LoRA", "full": "full"}
# what a training took: key in `cost`, label, what it is divided by
COSTS = (
    ("train_runtime_s", "training time (s)", 1),
    ("peak_memory_bytes", "peak memory while training (GB)", 1e9),
    ("disk_bytes", "size on disk (MB)", 1e6),
)


def plots(results: dict, histories: dict[str, list[dict]], folder: Path) -> list[str]:
    """Draw the pictures of the report into `folder`; their file names. histories: {model: its log's history}.

    Their words are English in every language, because few machines have a font with Chinese for them; the report's
    captions are not.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True)
    models, names = results["models"], []
    against_base = {(c["a"], c["metric"]): c for c in results["comparisons"] if c["b"] == "base"}

    def save(figure, name: str) -> None:
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        names.append(name)

    compared = [c for c in results["comparisons"] if c["metric"] == "nll_per_token" and c["a"] != "base_4bit"]
    figure, axis = pyplot.subplots(figsize=(6, 0.8 + 0.4 * len(compared)))
    draw_differences(axis, compared)
    save(figure, "differences.png")
    if any(metric == "forgetting" for _, metric in against_base):
        figure, axis = pyplot.subplots(figsize=(6, 3.6))
        draw_forgetting(axis, against_base, [name for name in models if (name, "forgetting") in against_base])
        save(figure, "forgetting.png")
    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    for name, history in histories.items():
        handover.draw_losses(axis, history, f"{LABELS[name]}, ", COLORS[name])
    axis.legend()
    save(figure, "loss_curves.png")
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    draw_cost(axes, models)
    save(figure, "cost.png")
    return names


def draw_differences(axis, comparisons: list[dict]) -> None:
    """Each pair's difference in nats per token with its 95 % interval, which is that of the pairs of rows.

    No picture shows the interval of a single model: those of two models overlap also where the difference is certain.
    """
    axis.axvline(0, color="#777777", lw=1)
    for place, c in enumerate(reversed(comparisons)):
        reach = np.abs(np.array(c["ci95"]) - c["difference"])[:, None]
        axis.errorbar(
            c["difference"], place, xerr=reach, fmt="o", capsize=4, color="#222222" if shows(c) else "#999999"
        )
    names = [" - ".join(LABELS.get(c[side], c[side]) for side in "ab") for c in reversed(comparisons)]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("difference in nats per token (below 0: the first one is better)")


def draw_forgetting(axis, against_base: dict, names: list[str]) -> None:
    """What each trained model gained on the test split against what it lost on the general text."""

    def bar(comparison: dict, sign: int) -> tuple[float, np.ndarray]:
        reach = np.abs(np.array(comparison["ci95"]) - comparison["difference"])
        return sign * comparison["difference"], reach[::sign, None]

    axis.plot(0, 0, "o", color=COLORS["base"])
    axis.annotate(LABELS["base"], (0, 0), (6, 6), textcoords="offset points")
    for name in names:
        learned, dx = bar(against_base[name, "nll_per_token"], -1)
        forgot, dy = bar(against_base[name, "forgetting"], 1)
        axis.errorbar(learned, forgot, dy, dx, fmt="o", color=COLORS.get(name, OTHERS), capsize=4)
        axis.annotate(LABELS.get(name, name), (learned, forgot), (6, 6), textcoords="offset points")
    axis.axhline(0, color="#cccccc", zorder=0)
    axis.axvline(0, color="#cccccc", zorder=0)
    axis.set_xlabel("learned: nats per token gained on the test split")
    axis.set_ylabel("forgotten: nats per token\nlost on the general text")
    axis.margins(0.15)


def draw_cost(axes, models: dict) -> None:
    """nats per token of each trained model over what its training took: three axes."""
    for axis, (key, what, unit) in zip(axes, COSTS, strict=True):
        axis.axhline(models["base"]["nll_per_token"], ls="--", color=COLORS["base"], label=LABELS["base"])
        known = {name: m for name, m in models.items() if m["cost"] and m["cost"][key] is not None}
        for name, m in known.items():
            place = (m["cost"][key] / unit, m["nll_per_token"])
            color, label = COLORS.get(name, OTHERS), LABELS.get(name, name)
            axis.plot(*place, "o", color=color, label=label)
        axis.set_xlim(0, 1.15 * max((m["cost"][key] for m in known.values()), default=1) / unit or 1)
        axis.set_xlabel(what)
    axes[0].set_ylabel("nats per token of the answers\n(lower is better)")
    axes[0].legend()


# --- pages


def p_text(p: float) -> str:
    """A p-value for people; no more digits than resampling can tell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_report(results: dict, examples: list[dict], images: list[str], folder: Path, language: str) -> None:
    """evaluation_report.md from the templates, and evaluation_report.html from it, with the pictures inside.

    results: those of evaluation_results.json, with `verdict` and `warnings` in this language. examples: {prompt,
    reference, and the answer of each model}. images: names in folder/plots.
    """
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    words = load_words(language)
    words |= {name: name for name in [*results["models"], *results["metrics"]] if name not in words}
    templates.filters["cell"] = cell
    templates.filters["p"] = p_text
    templates.filters["say"] = lambda note: sentence(note, words)
    templates.globals.update(w=words, shows=shows, language=language, sweep=command("run_all.py", "--sweep"))
    text = templates.get_template("report.md.jinja").render(results, examples=examples, images=images)
    handover.write_text(folder / "evaluation_report.md", text)
    html = markdown.markdown(text, extensions=["tables"])
    for image in images:
        data = base64.b64encode((folder / "plots" / image).read_bytes()).decode()
        html = html.replace(f'src="plots/{image}"', f'src="data:image/png;base64,{data}"')
    page = templates.get_template("page.html.jinja").render(body=html)
    handover.write_text(folder / "evaluation_report.html", page)


def records_of(label: str, measured, held_out) -> list[dict]:
    """The lines of evaluation_examples.jsonl for one model: every scored row, then every answer.

    measured: script 4's Measured; held_out: candidates.HeldOut.
    """
    records = []
    nll = measured.nll[measured.form]
    for row, (context, answer_ids), value, size in zip(
        held_out.rows, measured.pairs, nll, held_out.sizes, strict=True
    ):
        ids = {"context_ids": context, "continuation_ids": answer_ids}
        scores = {"nll": float(value), "tokens": len(answer_ids), "bytes": size}
        records.append({"id": row["id"], "model": label, **ids, **scores})
    for p, record in zip(held_out.prompts, measured.answers or [], strict=measured.answers is not None):
        records.append({"id": p["id"], "model": label, "prompt": p["prompt"], **record, "reference": p["reference"]})
    return records


# --- the terminal


def as_text(table: Table, width: int | None = None) -> str:
    """A table as text, in the terminal's width."""
    width = width or max(Console().width, 40)
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as found:
        console.print(table)
    return "\n".join(line.rstrip() for line in found.get().splitlines())


def model_card_scores(results: dict, name: str) -> str:
    """What the card of the model `name` says of its test scores, in Markdown. results: with `verdict` in English."""
    base, own, data = results["models"]["base"], results["models"][name], results["data"]
    lines = [f"On {data['test_rows']} rows and {data['test_prompts']} prompts of the test split:", ""]
    lines += ["| | base | this model |", "|---|---|---|"]
    for key, label, form in (
        ("perplexity", "perplexity of the reference answers (lower is better)", ".2f"),
        ("bits_per_byte", "bits per byte (lower is better)", ".3f"),
        ("answer_quality", "answer quality (ROUGE-L and chrF, 0 to 1)", ".3f"),
        ("style_match", "style match (0 to 1)", ".3f"),
    ):
        lines.append(f"| {label} | {base[key]:{form}} | {own[key]:{form}} |")
    return "\n".join([*lines, "", cell(results["verdict"], 5000) if results.get("unsound") else results["verdict"]])


def write_card(folder: Path, scores: str) -> None:
    """Put the test scores into the model card of a final folder, in place of what stood between its marks.

    A card that is gone, has no marks or cannot be written stays without them: the report has them all the same.
    """
    path, marks = folder / "README.md", r"(<!-- test scores -->\n).*(\n<!-- end of test scores -->)"
    try:
        before = path.read_text("utf-8")
        after = re.sub(marks, lambda m: f"{m[1]}{scores}{m[2]}", before, flags=re.S)
        if after != before:
            handover.write_text(path, after)
    except (OSError, UnicodeDecodeError) as error:
        say(f"note: {path} is left without the test scores ({error})")


def summary_table(results: dict, words: dict) -> str:
    """The models side by side, as printed at the end."""
    models = results["models"]
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("")
    for name in models:
        grid.add_column(words.get(name, name), justify="right", no_wrap=True)
    is_judged = results["judge"] and not results["judge"]["withheld"]
    by = "human" if is_judged and results["judge"]["judge"].startswith("human") else "judge"
    helpful = words[f"helpfulness_{by}"] if is_judged else words["helpfulness_proxy"]
    lines = [("perplexity", "perplexity", ".2f"), ("bits_per_byte", "bits_per_byte", ".3f")]
    lines += [("answer_quality", "answer_quality", ".3f"), ("style_match", "style_match", ".3f")]
    if "embedding_similarity" in models["base"]:
        lines += [("embedding_similarity", "embedding_similarity", ".3f")]
    for label, key, form in lines:
        grid.add_row(words[label], *(f"{m[key]:{form}}" for m in models.values()))
    grid.add_row(helpful, *(f"{m['helpfulness']:.3f}" for m in models.values()))
    grid.add_row(words["stopped"], *(f"{m['answers']['stopped']:.0%}" for m in models.values()))
    return as_text(grid, 100)
