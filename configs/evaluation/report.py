"""The results for people: sentences in English and Chinese, evaluation_report.md and .html, the table."""

import re
from pathlib import Path

import yaml
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from configs import handover
from configs.evaluation import answers, glossary, history, page
from configs.evaluation.page import TEMPLATES
from configs.evaluation.pictures import memory_label
from configs.evaluation.recommendation import joined, no_use, told
from configs.evaluation.statistics import shows
from configs.pictures import Picture
from configs.settings import command, say
from configs.text import cell, without_zero_signs

Note = tuple[str, dict]  # key of a sentence in templates/<language>.yaml, and what it is filled with
ANSWERS = 10  # questions in the Markdown; the page has all of them


# --- sentences


def load_words(language: str) -> dict[str, str]:
    """Every sentence of the report, from templates/<language>.yaml."""
    return yaml.safe_load((TEMPLATES / f"{language}.yaml").read_text(encoding="utf-8"))


def sentence(note: Note, words: dict[str, str]) -> str:
    """A note as a sentence; models are named in it as their folders and flags are."""
    key, values = note
    called = {kind: words.get(value, value) if kind == "name" else value for kind, value in values.items()}
    return without_zero_signs(joined(words[f"note_{key}"].format_map(called)))


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
    return without_zero_signs(first + joined(words["verdict"].format(pairs=words["and"].join(parts))))


def of_no_use(results: dict, pairs: list[tuple[str, str]], words: dict) -> list[str]:
    """What must be said before any winner is named: which trained models give answers that nobody can use.

    Of the models of `pairs` but the base; what makes answers useless is said in recommendation.no_use.
    """
    said = []
    for name, model in results.get("models", {}).items():
        answers = model.get("answers") or {}
        if name == "base" or not any(name in pair for pair in pairs):
            continue
        why = no_use(model)
        if why == "useless":
            said.append(joined(words["verdict_useless"].format(name=words[name], share=answers["useless"])))
        elif why == "not_nearer":
            found = answers["nearer"]
            low, high = found["ci95"]
            values = {"name": words[name], "difference": found["difference"], "low": low, "high": high}
            said.append(joined(words["verdict_not_nearer"].format(**values)))
    return said


# --- pages


def write_report(
    results: dict,
    examples: list[dict],
    pictures: dict[str, Picture],
    folder: Path,
    language: str,
    before: dict | None = None,
) -> None:
    """evaluation_report.md, and evaluation_report.html with the pictures and all answers inside.

    results: those of evaluation_results.json, with `verdict` and `warnings` in this language. examples: {prompt,
    reference, and the answer of each model}; the Markdown has the first ones. pictures: of pictures.draw. before: the
    previous results (history.read), for a column of their own; it is left out where it is about something else.
    """
    words = load_words(language)
    titles = {name: words.get(name, name) for name in results["models"]}
    words |= {name: cell(name) for name in [*results["models"], *results["metrics"]] if name not in words}
    templates = page.templates_in(TEMPLATES)
    templates.filters["say"] = lambda note: sentence(note, words)
    templates.globals.update(w=words, shows=shows, language=language, sweep=command("run_all.py", "--sweep"))
    advice = told(results["recommendation"], words, cell) if "recommendation" in results else []
    terms, apart = glossary.load(language), (words["answers"], words["settings"], words["glossary"])
    values = {"examples": examples, "pictures": pictures, "shown": ANSWERS, "memory": memory_label(results["models"])}
    values |= {"before": history.comparable(before, results), "column": history.column}
    values |= {"advice": advice, "glossary": terms}
    figures = Markup("").join(page.figure(name, picture) for name, picture in pictures.items())
    slots = {
        "pictures": Markup('<div class="pictures">{}</div>').format(figures),
        "answers": answers.section(templates, examples, titles, words),
    }
    script = (TEMPLATES / "filter.js").read_text("utf-8")
    page.write_both(
        lambda **given: templates.get_template("report.md.jinja").render(results, **values, **given),
        folder / "evaluation_report",
        pictures,
        lambda body: page.whole(templates, words["title"], glossary.mark(body, terms, apart), language, script),
        slots,
    )


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
    by_person = results["judge"] and results["judge"]["judge"].startswith("human")
    lines = [("perplexity", "perplexity", ".2f"), ("bits_per_byte", "bits_per_byte", ".3f")]
    lines += [(key, key, ".3f") for key in ("answer_quality", "style_match", "well_formed")]
    if "embedding_similarity" in models["base"]:
        lines += [("embedding_similarity", "embedding_similarity", ".3f")]
    for label, key, form in lines:
        grid.add_row(words[label], *(f"{m[key]:{form}}" for m in models.values()))
    if all(m["helpfulness"] is not None for m in models.values()):
        label = words["helpfulness_human" if by_person else "helpfulness_judge"]
        grid.add_row(label, *(f"{m['helpfulness']:.3f}" for m in models.values()))
    grid.add_row(words["stopped"], *(f"{m['answers']['stopped']:.0%}" for m in models.values()))
    return as_text(grid, 100)
