"""A sweep's report: what to do in a sentence a pair, tables; sweep_report.md and .html in two languages."""

from pathlib import Path

import numpy as np
import yaml

from configs.comparison import pictures
from configs.device import size
from configs.evaluation import glossary, page, statistics
from configs.evaluation.recommendation import forgot
from configs.evaluation.report import load_words
from configs.state import spell
from configs.text import cell, without_zero_signs

TEMPLATES = Path(__file__).with_name("templates")
STANDINGS = {"good enough": "good_enough", "worse within the margin": "within"}


def words_of(language: str) -> dict[str, str]:
    """Every sentence of a sweep's report, from templates/<language>.yaml."""
    return yaml.safe_load((TEMPLATES / f"{language}.yaml").read_text("utf-8"))


# --- sentences


def advice(results: dict, w: dict) -> list[str]:
    """What to do, in a sentence for each pair of arms."""
    names, lines = list(results["arms"]), []
    compared = {(c["a"], c["b"]): c for c in results["comparisons"]}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            whys = [
                w[f"why_{results['withheld'][arm]}"].format(arm=arm) for arm in (a, b) if arm in results["withheld"]
            ]
            if whys or (a, b) not in compared:
                lines.append(w["advice_withheld"].format(a=a, b=b, why=w["and"].join(whys) or w["none"]))
            else:
                lines.append(advice_on(compared[a, b], results, w))
    return [without_zero_signs(line) for line in lines]


def overall(results: dict, w: dict) -> str:
    """Of more than two arms: which one has the lowest loss, and which ones are surely worse; "" for two."""
    names = [name for name in results["arms"] if name not in results["withheld"]]
    if len(results["arms"]) < 3 or len(names) < 2:
        return ""
    losses = {name: np.mean([r["nll_per_token"] for r in fresh_runs(results, name)]) for name in names}
    best = min(losses, key=lambda name: losses[name])
    compared = {frozenset((c["a"], c["b"])): c for c in results["comparisons"]}
    worse, alike = [], []
    for name in sorted(set(names) - {best}, key=lambda name: losses[name]):
        (worse if statistics.shows(compared[frozenset((name, best))]) else alike).append(name)
    said = w["overall"].format(count=len(results["arms"]), best=best)
    for key, arms in (("overall_alike", alike), ("overall_worse", worse), ("overall_open", results["withheld"])):
        said += w[key].format(arms=", ".join(arms)) if arms else ""
    return said


def fresh_runs(results: dict, arm: str) -> list[dict]:
    """The scored runs of an arm with fresh seeds."""
    runs = results["runs"].values()
    return [r for r in runs if r["arm"] == arm and r["phase"] == "seeds" and "nll_per_token" in r]


def advice_on(comparison: dict, results: dict, w: dict) -> str:
    a, b, (low, high) = comparison["a"], comparison["b"], comparison["ci95"]
    margin, standing = results["margins"]["perplexity"] - 1, comparison["standing"]
    values = {"a": a, "b": b, "low": low, "high": high, "margin": margin, "cheaper": cheaper(results, a, b, w)}
    shown = comparison["p_value"] < 0.05  # after the adjustment for the number of pairs
    if standing in ("better", "worse") and shown:
        sign, (better, other) = (-1, (a, b)) if standing == "better" else (1, (b, a))
        ends = sorted((sign * low, sign * high))
        said = w["advice_better"].format(
            a=better, b=other, d=sign * comparison["difference"], low=ends[0], high=ends[1], cheaper=values["cheaper"]
        )
        return said + forgets_more(better, other, results, w)
    if standing in ("better", "worse"):
        return w["advice_unsure"].format(**values, p=comparison["p_value"])
    if standing in ("equivalent", "good enough", "worse within the margin"):
        return w[f"advice_{STANDINGS.get(standing, standing)}"].format(**values)
    return w["advice_undecided"].format(**values, needed=ways(comparison, results, w))


def forgot_lines(results: dict, language: str) -> list[str]:
    """A sentence for each arm that has forgotten much, in the words of the evaluation's report."""
    words, heavy = load_words(language), forgot([*results["comparisons"], *results["forgetting"]])
    return [words["do_forgot"].format(name=name, **much) for name, much in heavy.items()]


def cheaper(results: dict, a: str, b: str, w: dict) -> str:
    """Which of two arms takes less time, in words; "" where they take the same or nothing is known."""
    seconds = {arm: results["costs"][arm]["seconds"] for arm in (a, b)}
    if not all(seconds.values()):
        return ""
    arm, other = sorted((a, b), key=lambda name: seconds[name])
    share = seconds[arm] / seconds[other]
    return w["cheaper"].format(arm=arm, share=share) if share < 0.95 else ""


def forgets_more(a: str, b: str, results: dict, w: dict) -> str:
    """A sentence where arm a has surely forgotten more than arm b: what is better here may be worse elsewhere."""
    lost = {c["a"]: c for c in results["forgetting"]}
    if a not in lost or b not in lost or lost[a]["ci95"][0] <= max(lost[b]["ci95"][1], 0):
        return ""
    return w["but_forgets"].format(a=a, b=b, own=lost[a]["difference"], other=lost[b]["difference"])


def ways(comparison: dict, results: dict, w: dict) -> str:
    """How many rows or seeds would decide a comparison, in words."""
    needed, parts = comparison["needed"], []
    if "groups" in needed:
        parts.append(w["needed_groups"].format(groups=needed["groups"], now=comparison["groups"]))
    if "runs" in needed:
        parts.append(w["needed_runs"].format(runs=needed["runs"], now=max(comparison["runs"])))
    return w["needed"].format(ways=w["needed_or"].join(parts)) if parts else w["needed_nothing"]


def share_lines(results: dict, w: dict) -> list[str]:
    """How much of full's gain each arm of LoRA keeps."""
    lines = []
    for s in results["shares"]:
        if not s["full_gains"] or s["kept"] is None:
            lines.append(w["share_unknown"].format(**s))
            continue
        low, high = (w["none"] if end is None else f"{end:.1%}" for end in s["ci95"])
        keeps = w["keeps_yes" if s["keeps"] else "keeps_no"].format(share=s["share"])
        lines.append(
            w["share"].format(lora=s["lora"], full=s["full"], kept=s["kept"], low=low, high=high, keeps=keeps)
        )
    return lines


def arm_rows(results: dict, w: dict) -> list[dict]:
    """The lines of the table of arms."""
    rows = []
    for name, arm in results["arms"].items():
        losses = [r["nll_per_token"] for r in fresh_runs(results, name)]
        rate = results["selection"][name]["rate"]
        settings = {**arm["settings"], **({"rows": arm["rows"]} if arm["rows"] < 1 else {})}
        rows.append(
            {
                "name": name,
                "method": arm["method"],
                "settings": cell(", ".join(f"{key.lower()} {value}" for key, value in settings.items())) or w["none"],
                "rate": f"{rate:.1e}" if rate else w["none"],
                "loss": f"{np.mean(losses):.4f}" if losses else w["none"],
                "spread": f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else w["none"],
            }
        )
    return rows


def ratios(results: dict, w: dict) -> list[str]:
    """How far the best rates of LoRA and full fine-tuning lie apart."""
    arms, chosen = results["arms"], {name: s["rate"] for name, s in results["selection"].items()}
    return [
        w["ratio"].format(a=a, b=b, ratio=chosen[a] / chosen[b])
        for a in arms
        for b in arms
        if arms[a]["method"] == "lora" and arms[b]["method"] == "full" and chosen[a] and chosen[b]
    ]


def summary(results: dict, language: str) -> str:
    """What is printed at the end."""
    w = words_of(language)
    lines = [overall(results, w), *advice(results, w), *forgot_lines(results, language)]
    lines += [*share_lines(results, w), *ratios(results, w)]
    return "\n".join(line for line in lines if line)


# --- pages


def write(results: dict, folder: Path, language: str) -> None:
    """sweep_report.md, sweep_report.html and plots/ in `folder`."""
    w = words_of(language)
    images = pictures.draw(results, folder / "plots", w, words_of("en"))
    question = results["question"]
    title = w["title"].format(description=question["description_zh" if language == "zh" else "description"])
    templates = page.templates_in(TEMPLATES)
    templates.filters |= {
        "standing": lambda standing: w[f"standing_{STANDINGS.get(standing, standing)}"],
        "time": lambda seconds: w["none"] if seconds is None else spell(seconds, language),
        "memory": lambda n: w["none"] if not n else size(n),
    }
    tried = sorted(
        {sum(r["arm"] == a and r["phase"] == "selection" for r in results["runs"].values()) for a in results["arms"]}
    )
    seeds = sorted(
        {sum(r["arm"] == a and r["phase"] == "seeds" for r in results["runs"].values()) for a in results["arms"]}
    )
    terms, words = glossary.load(language), load_words(language)
    values = {
        "w": w,
        "title": title,
        "overall": overall(results, w),
        "advice": advice(results, w),
        "forgot": forgot_lines(results, language),
        "glossary": terms,
        "glossary_title": words["glossary"],
        "arm_rows": arm_rows(results, w),
        "ratios": ratios(results, w),
        "share_lines": share_lines(results, w),
        "tried": "-".join(map(str, (tried[0], tried[-1])) if tried[0] != tried[-1] else [str(tried[0])]),
        "seeds": max(seeds),
    }
    page.write_both(
        lambda **given: templates.get_template("sweep_report.md.jinja").render(results, **values, **given),
        folder / "sweep_report",
        images,
        lambda body: page.whole(templates, title, glossary.mark(body, terms, (words["glossary"],)), language),
    )
