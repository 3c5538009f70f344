"""What to do, in plain words, drawn from the statistics and the cost: which model, for what, and at which price."""

import math
import re
from collections.abc import Callable

import numpy as np

from configs.device import size
from configs.evaluation.statistics import share_kept, shows
from configs.settings import command
from configs.state import spell

Note = tuple[str, dict]  # key of a sentence in templates/<language>.yaml, and what it is filled with
METHODS = ("lora", "full")
# What a training takes: the key in `cost`, and that of its name. The first one that differs says which one is cheaper.
THINGS = {"train_runtime_s": "thing_time", "peak_memory_bytes": "thing_memory", "disk_bytes": "thing_disk"}
LESS = 0.95  # a cost counts as lower below this share of the other's
ENOUGH = 100  # different test questions, for a comparison of which nothing is known yet
# Forgetting is heavy where the loss on the general text surely rises by more than this, in nats per token: its
# perplexity rises by a tenth and more.
HEAVY = 0.1


# --- what is known


def no_use(model: dict) -> str:
    """Why nobody can use a model's answers: "useless", "not_nearer", or "" where nothing speaks against them.

    Most answers are of no use (metrics.useless), or they are not shown to be any nearer to their references than to
    those of other questions (metrics.nearer). model: one of `models` in evaluation_results.json.
    """
    answers = model.get("answers") or {}
    if answers.get("useless", 0) > 0.5:
        return "useless"
    return "not_nearer" if answers.get("nearer") and answers["nearer"]["ci95"][0] <= 0 else ""


def forgot(comparisons: list[dict]) -> dict[str, dict]:
    """{model: {rise, low, high, gain}} of those that have forgotten much, in nats per token.

    Forgetting is heavy where the loss on the general text has surely risen (the 95 % interval `low` to `high` lies
    above zero) and by more than the loss on the test rows has fallen (`gain`), or surely by more than HEAVY.
    """
    against_base = {(c["a"], c["metric"]): c for c in comparisons if c["b"] == "base"}
    found = {}
    for (name, metric), lost in against_base.items():
        learned = against_base.get((name, "nll_per_token"))
        if metric != "forgetting" or learned is None or name == "base_4bit":
            continue
        (low, high), rise, gain = lost["ci95"], lost["difference"], -learned["difference"]
        if low > HEAVY or (low > 0 and rise > gain):
            found[name] = {"rise": rise, "low": low, "high": high, "gain": gain}
    return found


def shares(by_model: dict[str, dict], margin: float) -> dict[tuple[str, str], dict]:
    """{(a, b): how much of b's gain over the base a keeps} of LoRA and full fine-tuning (statistics.share_kept).

    by_model: {label: {metric: rows with values, weights and groups}}. margin: the share that is good enough.
    """
    rows = {name: by_model[name]["nll_per_token"] for name in ("base", *METHODS) if name in by_model}
    found = {}
    for a, b in (METHODS, METHODS[::-1]):
        if a in rows and b in rows:
            base, weights, groups = rows["base"].values, rows["base"].weights, rows["base"].groups
            kept = share_kept(base, rows[a].values, rows[b].values, np.asarray(weights, float), groups, margin)
            keys = ("kept", "ci95", "keeps", "full_gains")
            found[a, b] = {key: kept[key] for key in keys} | {"margin": margin}
    return found


def cheaper(models: dict, a: str, b: str) -> str | None:
    """Which of two models took less to train: time, or where that is about the same, memory, or disk; else None."""
    for key in THINGS:
        if things := [name for name, other in ((a, b), (b, a)) if lower(models, name, other, key)]:
            return things[0]
    return None


def lower(models: dict, a: str, b: str, key: str) -> bool:
    """Whether model a has clearly less of this cost than model b; False where either is not known."""
    costs = [(models[name].get("cost") or {}).get(key) for name in (a, b)]
    return None not in costs and costs[0] < LESS * costs[1]


def needed(comparison: dict, target: float, rows: int) -> Note | None:
    """How many test rows would detect `target` nats per token in four of five cases; None where these should.

    The smallest difference that is detected shrinks with the root of the number of different questions.
    """
    smallest = comparison["smallest_detectable"]
    if not smallest or not target or smallest <= target:
        return None
    times = (smallest / target) ** 2
    groups = math.ceil(times * comparison["groups"])
    return ("do_rows", {"rows": math.ceil(times * rows), "now": rows, "groups": groups, "target": target})


# --- what follows from it


def recommend(results: dict, by_model: dict[str, dict], margin: float, price: float | None) -> dict:
    """What evaluation_results.json says under `recommendation`.

    results: `models`, `comparisons`, `unsound`, `judge` and `data` of evaluation_results.json. by_model: as in
    `shares`. margin: the share of the other's gain that is good enough. price: of an hour of training, or None.

    choice: "lora", "full", "base", the name of a further candidate, "none" (nobody can use the answers of any), or
    "untold". reason: "unsound", "few questions", "no use", "not beaten", "better", "equivalent", "good enough" or
    "undecided". kept: how much of full's gain LoRA keeps, with its 95 % interval.
    cheaper: "lora", "full" or None. prices: {model: what its training cost} at `price`. forgot: of `forgot`. notes:
    the sentences as keys and values, for `told`; sentences: the same in English is added by who writes the file.
    """
    models, kept = results["models"], shares(by_model, margin)
    both = all(name in models for name in METHODS)
    heavy, cheap = forgot(results["comparisons"]), cheaper(models, *METHODS) if both else None
    choice, reason, notes = decide(results, kept, cheap, heavy)
    times = {name: (model.get("cost") or {}).get("train_runtime_s") for name, model in models.items()}
    prices = {name: price * time / 3600 for name, time in times.items() if price and time is not None}
    if reason not in ("unsound", "no use") and (costs := costs_of(models)):
        notes.append(("do_costs", {"costs": costs, "prices": prices, "rate": price}))
    return {
        "choice": choice,
        "reason": reason,
        "kept": kept.get(METHODS),
        "cheaper": cheap,
        "prices": prices,
        "forgot": heavy,
        "notes": notes,
    }


def costs_of(models: dict) -> dict[str, dict]:
    """What each training took, as far as it is known: {model: {key of THINGS: number}}."""
    known = {name: {key: (model.get("cost") or {}).get(key) for key in THINGS} for name, model in models.items()}
    return {
        name: cost
        for name, cost in known.items()
        if name != "merged" and any(v is not None for key, v in cost.items() if key != "disk_bytes")
    }


def decide(results: dict, kept: dict, cheap: str | None, heavy: dict) -> tuple[str, str, list[Note]]:
    """(choice, reason, sentences) of a recommendation."""
    if results["unsound"]:
        return "untold", "unsound", [("do_unsound", {"reasons": results["unsound"]})]
    compared = {(c["a"], c["b"]): c for c in results["comparisons"] if c["metric"] == "nll_per_token"}
    trained = [name for name in results["models"] if (name, "base") in compared and name != "merged"]
    useless = [name for name in ("base", *trained) if no_use(results["models"][name])]
    usable = [name for name in trained if name not in useless]
    winners = [name for name in usable if beats(compared, name, "base")]
    if not winners:
        return without_winner(results, compared, usable, useless)
    choice, reason, notes = among(results, compared, winners, kept, cheap)
    if choice in winners:
        notes += about(choice, results, compared, winners, heavy)
    if left := [name for name in useless if name != "base"]:
        notes.append(("do_useless", {"names": left}))
    if left := [name for name in usable if name not in winners]:
        notes.append(("do_not_better", {"a": "base", "names": left}))
    return choice, reason, notes


def beats(compared: dict, a: str, b: str) -> bool:
    """Whether the loss of a is shown to be lower than that of b."""
    if (a, b) in compared:
        return shows(compared[a, b]) and compared[a, b]["difference"] < 0
    return (b, a) in compared and shows(compared[b, a]) and compared[b, a]["difference"] > 0


def without_winner(
    results: dict, compared: dict, usable: list[str], useless: list[str]
) -> tuple[str, str, list[Note]]:
    """What is recommended where no usable model is shown to be better than the base."""
    others = [name for name in useless if name != "base"]
    if not usable and "base" in useless:
        return "none", "no use", [("do_none", {"names": useless})]
    if not usable:
        return "base", "no use", [("do_base_useful", {"a": "base", "names": others})]
    nearest = min(usable, key=lambda name: compared[name, "base"]["difference"])
    comparison, rows = compared[nearest, "base"], results["data"]["test_rows"]
    rest: list[Note] = [("do_useless", {"names": others})] if others else []
    # with fewer than 10 questions no difference can be relied on, and none that is missing either
    if comparison["smallest_detectable"] is None:
        return "untold", "few questions", [("do_few", {"groups": comparison["groups"], "wanted": ENOUGH}), *rest]
    more = needed(comparison, abs(comparison["difference"]), rows) if comparison["difference"] < 0 else None
    rest += [more, seeds()] if more else []
    if "base" in useless:
        return "none", "no use", [("do_none_yet", {"a": "base", "names": usable}), *rest]
    return "base", "not beaten", [("do_base", {"a": "base", "names": usable}), *rest]


def among(
    results: dict, compared: dict, winners: list[str], kept: dict, cheap: str | None
) -> tuple[str, str, list[Note]]:
    """Which of the models that are better than the base; a further candidate has to beat LoRA and full."""
    pair = [name for name in METHODS if name in winners]
    better = [name for name in winners if name not in METHODS and all(beats(compared, name, other) for other in pair)]
    if len(better) > 1:  # the one that beats the others, too
        best = [name for name in better if all(beats(compared, name, other) for other in better if other != name)]
        if not best:
            return "untold", "undecided", undecided_candidates(results, compared, better)
        better = best
    if better or len(pair) == 1:
        (choice,) = better or pair
        return choice, "better", [difference("do_better", choice, pair[-1] if better and pair else "base", compared)]
    return between(results, compared, kept, cheap)


def undecided_candidates(results: dict, compared: dict, names: list[str]) -> list[Note]:
    """Several further candidates are better than all others; more rows may tell which of the two best ones is best."""
    a, b = sorted(names, key=lambda name: compared[name, "base"]["difference"])[:2]
    known = compared.get((a, b)) or compared.get((b, a))
    more = needed(known, abs(known["difference"]), results["data"]["test_rows"]) if known else None
    return [("do_candidates", {"names": names}), *([more] if more else [])]


def between(results: dict, compared: dict, kept: dict, cheap: str | None) -> tuple[str, str, list[Note]]:
    """Which of LoRA and full, both of which are better than the base.

    Where each keeps the margin of the other's gain and neither is shown to be better, they are equivalent, and the
    cheaper one is recommended. So it is where it keeps the margin, though the other one may be better. Else it is the
    one that is shown to be better.
    """
    enough = [pair for pair in (METHODS, METHODS[::-1]) if kept.get(pair, {}).get("keeps")]
    better = next((pair for pair in (METHODS, METHODS[::-1]) if beats(compared, *pair)), None)
    thrifty = next((pair for pair in enough if pair[0] == cheap), None)
    if len(enough) == 2 and not better:
        key, (a, b) = ("do_equivalent", thrifty) if thrifty else ("do_either", METHODS)
        return a, "equivalent", [(key, values_of(a, b, kept)), *keeps("lora", "full", kept)]
    if thrifty and thrifty != better:
        return cheap, "good enough", [("do_enough", values_of(*thrifty, kept)), *keeps(*thrifty, kept)]
    if better:
        a, b = better
        things = [thing for key, thing in THINGS.items() if lower(results["models"], b, a, key)]
        instead: list[Note] = [("do_instead", {"b": b, "things": things})] if things else []
        return a, "better", [difference("do_better", a, b, compared), *keeps(b, a, kept), *instead]
    notes = [difference("do_untold", "full", "lora", compared), *keeps("lora", "full", kept)]
    if cheap:
        notes.append(("do_meanwhile", {"a": cheap}))
    found = compared["full", "lora"]
    # a difference as large as this one, or the largest that would be within the margin
    margin = (1 - kept["lora", "full"]["margin"]) * max(-compared[name, "base"]["difference"] for name in METHODS)
    more = needed(found, max(abs(found["difference"]), margin), results["data"]["test_rows"])
    return "untold", "undecided", [*notes, *([more] if more else []), seeds()]


def values_of(a: str, b: str, kept: dict) -> dict:
    return {"a": a, "b": b, "margin": kept[a, b]["margin"]}


def keeps(a: str, b: str, kept: dict) -> list[Note]:
    """How much of b's gain over the base a keeps, where that is known."""
    share = kept.get((a, b))
    if not share or not share["full_gains"] or None in share["ci95"]:
        return []
    low, high = share["ci95"]
    return [("do_kept", {"a": a, "b": b, "kept": share["kept"], "low": low, "high": high})]


def difference(key: str, a: str, b: str, compared: dict) -> Note:
    """A sentence on the difference between two models: by how much a's loss lies below b's; for do_untold a - b."""
    known = compared.get((a, b))
    sign = 1 if known else -1
    known = known or compared[b, a]
    found, (low, high) = sign * known["difference"], sorted(sign * end for end in known["ci95"])
    if key == "do_better":
        found, low, high = -found, -high, -low
    return (key, {"a": a, "b": b, "difference": found, "low": low, "high": high})


def seeds() -> Note:
    return ("do_seeds", {"command": command("run_all.py", "--sweep")})


def about(choice: str, results: dict, compared: dict, winners: list[str], heavy: dict) -> list[Note]:
    """What must be known of the choice: what it has forgotten, what a judge says, which data it may have seen."""
    notes: list[Note] = []
    if choice in heavy:
        notes.append(("do_forgot", {"name": choice, **heavy[choice]}))
        if left := [name for name in winners if name not in heavy]:
            notes.append(("do_other_things", {"names": left}))
    judge = results.get("judge")
    for bout in judge["between_models"] if judge and not judge["withheld"] else ():
        if choice in (bout["a"], bout["b"]) and bout["n"]:
            (low, high), rate, other = bout["ci95"], bout["win_rate"], bout["b"]
            if choice == bout["a"]:
                rate, low, high = 1 - rate, 1 - high, 1 - low
            else:
                other = bout["a"]
            if low > 0.5:
                notes.append(("do_judge", {"a": choice, "b": other, "rate": rate, "low": low, "high": high}))
    alike = [name for name in winners if name not in (choice, *METHODS) and not beats(compared, choice, name)]
    if alike := [name for name in alike if (name, choice) in compared]:
        notes.append(("do_alike", {"a": choice, "names": alike}))
    if choice not in METHODS:
        notes.append(("do_unknown", {"a": choice}))
    return notes


# --- in words


def told(recommendation: dict, words: dict, escape: Callable[[str], str] = str) -> list[str]:
    """The sentences of a recommendation, the first of which stands for all. escape: for what others have named."""
    return [say(key, values, words, escape) for key, values in recommendation["notes"]]


def say(key: str, values: dict, words: dict, escape: Callable[[str], str]) -> str:
    """One sentence of a recommendation."""

    def name_of(name: str) -> str:
        return words.get(name) or escape(name)

    filled = dict(values)
    for field in {"a", "b", "name"} & set(values):
        filled[field] = name_of(values[field])
    if "names" in values:
        filled["names"] = listed(list(map(name_of, values["names"])), words["comma"], words["last"])
    if "things" in values:
        filled["things"] = listed([words[thing] for thing in values["things"]], words["comma"], words["or"])
    if "reasons" in values:
        reasons = (words[f"note_{reason}"].format_map(of) for reason, of in values["reasons"])
        filled["reasons"] = words["and"].join(map(escape, reasons))
    if "command" in values:
        filled["command"] = escape(values["command"])
    if "costs" in values:
        costs = values["costs"].items()
        prices, rate = values["prices"], values["rate"]
        filled["costs"] = words["and"].join(f"{name_of(n)} {spent(c, prices.get(n), rate, words)}" for n, c in costs)
    return joined(words[key].format_map(filled))


def listed(names: list[str], comma: str, last: str) -> str:
    """Names one after the other, with `last` before the last one."""
    *first, end = names
    return f"{comma.join(first)}{last}{end}" if first else end


def joined(text: str) -> str:
    """Text without spaces between Chinese characters, which names that are filled in leave behind."""
    return re.sub(r"(?<=[\u3400-\u9fff]) (?=[\u3400-\u9fff])", "", text)


def spent(cost: dict, price: float | None, rate: float | None, words: dict) -> str:
    """What one training took, as far as it is known: time, price, memory and disk."""
    parts = []
    if (seconds := cost["train_runtime_s"]) is not None:
        parts.append(spell(seconds, words["language"]))
        if price is not None:
            shown = f"{price:,.2f}" if price >= 0.01 else "< 0.01"
            parts.append(words["cost_price"].format(price=shown, rate=rate))
    for key, sentence in (("peak_memory_bytes", "cost_memory"), ("disk_bytes", "cost_disk")):
        if (count := cost[key]) is not None:
            parts.append(words[sentence].format(size=size(count) if count >= 1e6 else f"{count / 1e3:,.0f} KB"))
    return words["comma"].join(parts)
