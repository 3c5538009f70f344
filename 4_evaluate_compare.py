"""Scores the base model, LoRA and full fine-tuning on the same test split and says which differences are real.

Reads:  data/ (its test split), outputs/lora_model/final_lora_adapter, outputs/full_model/final_model
Writes: outputs/evaluation_results.json, evaluation_examples.jsonl, evaluation_report.md and .html, plots/;
        with JUDGE also judge_verdicts.jsonl, so that no verdict is asked for twice;
        the previous results into history/, and the test scores into README.md of final_lora_adapter and final_model

    python 4_evaluate_compare.py
    python 4_evaluate_compare.py --chat

Takes about 20 s on a laptop with --preset demo. A model that was not trained is named and left out.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from configs import hub
from configs.settings import command, fail, freeze, main_process, override, say

# --- models
MODEL_NAME = "microsoft/phi-2"  # Hub name or local folder of the base model, the one that was fine-tuned
MODEL_REVISION: str | None = None  # branch, tag or commit of the model on the Hub; none: its default branch
LORA_DIR = "outputs/lora_model"  # folder written by 2_lora_finetuning.py
FULL_DIR = "outputs/full_model"  # folder written by 3_full_finetuning.py
# merged_model of 2_lora_finetuning.py is compared, too, where it is there.
# A model, an adapter, or a GGUF of llama.cpp (a model as it is deployed; pip install llama-cpp-python).
CANDIDATES: list[str] | None = None  # more to compare: name=folder or name=file.gguf, with commas between them

# --- data
DATA_DIR = "data"  # folder with the prepared data, written by 1_prepare_dataset.py
MAX_EVAL_SAMPLES: Annotated[int | None, "x >= 1"] = None  # score only this many test rows; none: all
# Prose apart from the data set's subject: it shows what a model has forgotten.
GENERAL_TEXT: str | None = None  # a text file, or a Hub data set with a text column: owner/name#configuration

# --- questions instead of a comparison; nothing is written
PROMPT: Annotated[str | None, "not empty"] = None  # a question: print every model's answer to it and write nothing
CHAT = False  # talk with all models, whose answers stand side by side; /help lists the commands

# --- scoring
PRECISION: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: fp32 on a CPU, else what the GPU does best
# Constants, not the memory that is free, decide how much is computed at once: PASS_TOKENS_CPU and below it in
# configs/evaluation/scoring.py. Where memory runs out, it is halved.
BATCH_TOKENS: Annotated[int | None, "x >= 1"] = None  # padded tokens of a pass; none: 2048 (CPU) or 8192 (GPU)

# --- answers
MAX_NEW_TOKENS: Annotated[int, "x >= 1"] = 256  # most tokens of an answer; longer ones are cut, for every model alike
TEMPERATURE: Annotated[float, "0 <= x <= 10"] = 0.0  # temperature of the answers; 0: greedy, the same in every run
GENERATION_BATCH: Annotated[int | None, "x >= 1"] = None  # prompts answered at once; none: 64, fewer of a large model
# ROUGE-L and chrF compare words and letters; an embedding compares meaning.
EMBEDDING_MODEL: str | None = None  # sentence-transformers model, e.g. BAAI/bge-small-en-v1.5; none: no such metric
# The key of an OpenAI-compatible server is read from OPENAI_API_KEY.
# Tasks of lm-evaluation-harness, e.g. arc_easy,gsm8k, or a folder with tasks of your own: pip install lm_eval
BENCHMARKS: list[str] | None = None  # further tasks to compare the models on, with commas between them; none: no task
BENCHMARK_SAMPLES: Annotated[int | None, "x >= 1"] = None  # only so many items of each task; none: all
# human: you judge in the terminal, human:page: in your browser; forty prompts take about a quarter of an hour.
JUDGE: str | None = None  # human, human:page, openai:<base_url>#<model> or reward:<model>; none: not judged

# --- statistics
RESAMPLES: Annotated[int, "2000 <= x <= 1_000_000"] = 10000  # bootstrap samples of an interval, sign flips of a test
SEED: Annotated[int, "0 <= x < 4_000_000_000"] = 42  # for the resampling, and for answers with a temperature

# --- the recommendation
MARGIN: Annotated[float, "0 < x < 1"] = 0.95  # LoRA is good enough where it keeps this share of full's gain
PRICE_PER_HOUR: Annotated[float | None, "x > 0"] = None  # what an hour of the training machine costs; none: no prices

# --- output
REPORT_DIR = "outputs"  # folder for the results, the report and its plots
REPORT_LANGUAGE: Literal["auto", "en", "zh"] = "auto"  # language of the report and the messages; auto: the terminal's

if __name__ == "__main__":
    override(globals(), check=hub.model_problems)
    reward = JUDGE.removeprefix("reward:") if JUDGE and JUDGE.startswith("reward:") else None
    # before the imports below: the libraries read its answer
    hub.go_online(MODEL_NAME, hub.text_name(GENERAL_TEXT), EMBEDDING_MODEL, reward)

import numpy as np
from transformers import PreTrainedModel

from configs import chat, device, handover, models, state
from configs.ending import say_done
from configs.evaluation import benchmarks, gguf, history, metrics, person, pictures
from configs.evaluation.asking import answer_one, answer_prompts, ask, known_format
from configs.evaluation.candidates import (
    TRAINED,
    Candidate,
    HeldOut,
    check_forms,
    cost,
    find_candidates,
    load_held_out,
    load_tokenizers,
    not_replayed,
    still_as_scored,
    unsound,
)
from configs.evaluation.fairness import fairness, rounding
from configs.evaluation.judge import RewardJudge, ServerJudge, judge_problems, judged
from configs.evaluation.recommendation import forgot, recommend, told
from configs.evaluation.report import (
    Note,
    load_words,
    model_card_scores,
    records_of,
    sentence,
    summary_table,
    verdict,
    write_card,
    write_report,
)
from configs.evaluation.scoring import RowMetric, acting_as, better_form, load_model, pieces, score
from configs.evaluation.statistics import blocks, compare, effective_number, holm, shaffer
from configs.evaluation.talking import talk
from configs.handover import PREPARE
from configs.preparation.reading import general_text
from configs.words import spoken

# --- what is compared


class Metric(NamedTuple):
    """A metric: which direction is better, in which unit, on which rows, and the function that computes it.

    On test prompts, the function takes any of answers, references, questions, stopped (and embed) as columns of one
    length and returns one number a prompt; None stands for a judge's verdicts. On test rows and general text, the
    metric is the nll that was scored, and the function only sums it up for one model.

    To add a metric over test prompts, write its function in configs/evaluation/metrics.py, give it a line in METRICS,
    and name it in configs/evaluation/templates/en.yaml and zh.yaml. It then stands in evaluation_results.json and in
    the report's table of differences. For a line in the tables of models, add one to report.md.jinja (`row`) and one
    to summary_table in configs/evaluation/report.py.
    """

    better: Literal["lower", "higher"]
    unit: str
    on: Literal["test rows", "test prompts", "general text"]
    function: Callable | None


METRICS = {
    "nll_per_token": Metric("lower", "nats per token", "test rows", metrics.likelihood),
    "answer_quality": Metric("higher", "0 to 1", "test prompts", metrics.answer_quality),
    "style_match": Metric("higher", "0 to 1", "test prompts", metrics.style_match),
    "embedding_similarity": Metric("higher", "-1 to 1", "test prompts", metrics.embedding_similarity),
    "well_formed": Metric("higher", "0 to 1", "test prompts", metrics.well_formed),
    # a judge's verdicts against the reference, or a person's against the other models; else there is none
    "helpfulness": Metric("higher", "win rate, 0 to 1", "test prompts", None),
    "forgetting": Metric("lower", "nats per token", "general text", metrics.likelihood),
}
# A pair is (a, b), and a difference is a - b. Each list is a family of its own for Holm's correction.
PAIRS = [("lora", "base"), ("full", "base"), ("full", "lora")]
# LoRA trained over 4 bits adds two: what the 4 bits cost, and what tuning gained over the same 4 bits. "base_4bit" is
# the base in those 4 bits: a control that answers nothing.
PAIRS_4BIT = [("base_4bit", "base"), ("lora", "base_4bit")]


@dataclass
class Measured:
    """What one model was found to do.

    nll: by prompt form ("chat", "plain"), nats a test row, shape (rows,). form: the one that counts. pairs: the
    (context ids, answer ids) of that form. answers: {answer, stopped} a test prompt, None for the control. general:
    {nll, tokens, sizes} of the pieces of the general text, or None. tasks: {name: what was found} of BENCHMARKS.
    verdicts: a judge's, 1 win, 0.5 tie, 0 loss a prompt, nan missing, or None.
    """

    nll: dict[str, np.ndarray]
    form: str
    pairs: list[tuple[list[int], list[int]]]
    answers: list[dict] | None
    general: dict[str, np.ndarray] | None
    tasks: dict[str, benchmarks.Task]
    verdicts: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Scored tokens a test row."""
        return np.array([len(answer_ids) for _, answer_ids in self.pairs])

    @property
    def texts(self) -> list[str]:
        return [record["answer"] for record in self.answers]

    @property
    def stopped(self) -> list[bool]:
        """Whether the model ended each answer by itself."""
        return [record["stopped"] for record in self.answers]


class Rows(NamedTuple):
    """A metric of one model, row by row; its value is sum(values) / sum(weights).

    groups: rows with the same one are one observation to the statistics.
    """

    values: np.ndarray
    weights: np.ndarray
    groups: list

    @property
    def mean(self) -> float:
        known = ~np.isnan(self.values)  # what a judge did not answer is missing
        return float(self.values[known].sum() / self.weights[known].sum())


# --- measuring


def measure_all(settings, candidates: list[Candidate], held_out: HeldOut, general: list[str]) -> dict[str, Measured]:
    """What each candidate does, by label; candidates with the same weights share one copy in memory."""
    measured: dict[str, Measured] = {}
    dtype = device.scoring_precision(settings.PRECISION)
    for _, group in groupby(candidates, key=lambda candidate: candidate.weights):
        group = list(group)
        model = load_model(group, dtype, settings.MODEL_REVISION)
        for candidate in group:
            # The base, which no template was taught to, is scored in both forms and takes its better one. Its 4-bit
            # control takes the same one; who was trained is asked as it was trained.
            forms = ["chat"] if candidate.taught else ["chat", "plain"]
            if candidate.is_control:
                forms = [measured["base"].form]
            with acting_as(model, candidate):
                measured[candidate.label] = measure(settings, candidate, model, held_out, general, forms)
        del model
    return measured


def measure(
    settings, candidate: Candidate, model: PreTrainedModel, held_out: HeldOut, general: list[str], forms: list[str]
) -> Measured:
    """Everything that one model is asked: nll per row and prompt form, answers, nll of the general text."""
    label, tokenizer, budget = candidate.label, candidate.tokenizer, settings.BATCH_TOKENS
    encoded = [chat.encode(tokenizer, row["prompt"], row["completion"]) for row in held_out.rows]
    # the answer's text alone: the token that ends it is the template's, which the base model was never shown
    pairs = {"chat": [(context, answer_ids[:-1]) for context, answer_ids in encoded]}
    plain = [chat.plain_prompt(tokenizer, row["prompt"]) for row in held_out.rows]
    pairs["plain"] = [(context, answer_ids) for context, (_, answer_ids) in zip(plain, pairs["chat"], strict=True)]
    mend = candidate.remedy if candidate.method == "other" else command(PREPARE, "--max_length", "512")
    chat.check_lengths(model, [context + ids[:-1] for context, ids in pairs["chat"]], f"{label}: the test split", mend)
    nll = {form: score(model, pairs[form], budget, f"{label}, {form} prompt") for form in forms}
    for values in nll.values():
        if not np.isfinite(values).all():
            row = held_out.rows[int(np.flatnonzero(~np.isfinite(values))[0])]["id"]
            remedy = candidate.remedy if candidate.log else "take another model, or --precision fp32"
            fail(f"{label} gives no number for row {row} (nan or infinite); {remedy}")
    form = forms[0]
    if len(forms) > 1:
        form = better_form(model, tokenizer, held_out.validation or held_out.rows, budget, label)

    answers = None
    if not candidate.is_control:
        prompt_ids = [ask(candidate, p["prompt"], form) for p in held_out.prompts]
        chat.check_lengths(model, prompt_ids, f"{label}: {settings.DATA_DIR}/test_prompts.json", mend)
        answers = answer_prompts(settings, candidate, model, prompt_ids, settings.GENERATION_BATCH)
    scored_text = None
    if general:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        texts, sizes = pieces(tokenizer, general)
        scored_text = {
            "nll": score(model, [([first], ids) for ids in texts], budget, f"{label}, general text"),
            "tokens": np.array([len(ids) for ids in texts]),
            "sizes": np.array(sizes),
        }
    tasks = {}
    if settings.BENCHMARKS and not candidate.is_control:
        tasks = benchmarks.run(model, tokenizer, settings.BENCHMARKS, settings.BENCHMARK_SAMPLES, label)
    return Measured(nll, form, pairs[form], answers, scored_text, tasks)


def judge_answers(settings, held_out: HeldOut, measured: dict[str, Measured]) -> dict | None:
    """What the judge says, None without one; sets `verdicts` of each model."""
    if not settings.JUDGE:
        return None
    kind, _, rest = settings.JUDGE.partition(":")
    path = Path(settings.REPORT_DIR) / "judge_verdicts.jsonl"
    texts = {label: m.texts for label, m in measured.items() if m.answers is not None}
    if kind == "human":
        opinion, verdicts = person.judged(settings, held_out, texts, PAIRS, path)
    else:
        judge = RewardJudge(rest) if kind == "reward" else ServerJudge(*rest.split("#", 1), path)
        opinion = judged(settings, judge, held_out, texts, PAIRS)
        verdicts = {label: rates["outcomes"] for label, rates in opinion["against_reference"].items()}
    for label, outcomes in verdicts.items():
        measured[label].verdicts = outcomes
    for rates in (opinion["shuffled"], *opinion["against_reference"].values(), *opinion["between_models"]):
        rates.pop("outcomes")
    return opinion


# --- comparing


def rows_of(name: str, measured: Measured, held_out: HeldOut) -> Rows | None:
    """A metric of one model, row by row; None where it was not measured."""
    if task := measured.tasks.get(name):
        return Rows(task.values, np.ones(len(task.values)), task.items)
    if name not in METRICS:
        return None
    metric = METRICS[name]
    if metric.on == "test rows":
        return Rows(measured.nll[measured.form], measured.tokens, held_out.groups)
    if metric.on == "general text":
        text = measured.general
        return Rows(text["nll"], text["tokens"], blocks(len(text["nll"]))) if text else None
    if metric.function is None:
        values = measured.verdicts
        return None if values is None else Rows(np.array(values, float), np.ones(len(values)), held_out.prompt_groups)
    columns = inspect.signature(metric.function).parameters
    if measured.answers is None or ("embed" in columns and held_out.embed is None):
        return None
    known = {"answers": measured.texts, "references": held_out.references, "questions": held_out.questions}
    known |= {"stopped": measured.stopped, "embed": held_out.embed}
    values = RowMetric(metric.function).compute(**{column: known[column] for column in columns})["rows"]
    return Rows(np.array(values, float), np.ones(len(values)), held_out.prompt_groups)


def describe(settings, candidate: Candidate, measured: Measured, held_out: HeldOut, by_metric: dict) -> dict:
    """One model in evaluation_results.json: its metrics, and what stands beside them. by_metric: {metric: Rows}."""
    nll, tokens = measured.nll[measured.form], measured.tokens
    alone = compare(nll, np.zeros(len(nll)), tokens, held_out.groups, settings.RESAMPLES, settings.SEED)
    described = RowMetric(METRICS["nll_per_token"].function).compute(nll=nll, tokens=tokens, sizes=held_out.sizes) | {
        "nll_ci95": alone["ci95"],
        "scored_tokens": int(tokens.sum()),
        "prompt": measured.form,
        "perplexity_by_prompt": {
            form: float(np.exp(min(nll.sum() / tokens.sum(), 700))) for form, nll in measured.nll.items()
        },
        "forgetting": None,
    }
    if measured.general:
        values = RowMetric(METRICS["forgetting"].function).compute(**measured.general)
        described["forgetting"] = {key: values[key] for key in ("nll_per_token", "bits_per_byte")}
        described["forgetting"]["tokens"] = int(measured.general["tokens"].sum())
    if measured.answers is None:
        return described
    on_prompts = [name for name, metric in METRICS.items() if metric.on == "test prompts"]
    described |= {"helpfulness": None} | {name: rows.mean for name, rows in by_metric.items() if name in on_prompts}
    described["benchmarks"] = {name: by_metric[name].mean for name in measured.tasks}
    texts, references = measured.texts, held_out.references
    described["answers"] = {
        "n": len(texts),
        "rouge_l": float(np.mean(metrics.rouge_l(texts, references))),
        "chrf": float(np.mean(metrics.chrf(texts, references))),
        "stopped": float(np.mean(measured.stopped)),
        "repetitive": float(np.mean([metrics.repetitive(text) for text in texts])),
        "empty": float(np.mean([not text for text in texts])),
        "useless": float(np.mean(metrics.useless(texts, held_out.questions, references, measured.stopped))),
        "nearer": nearness(settings, texts, held_out),
    }
    described["cost"] = cost(candidate)
    return described


def nearness(settings, texts: list[str], held_out: HeldOut) -> dict | None:
    """How much nearer the answers are to their references than to other questions', in chrF; None for few prompts."""
    if len(set(held_out.prompt_groups)) < 10:
        return None
    values = np.array(metrics.nearer(texts, held_out.references))
    ones, none = np.ones(len(values)), np.zeros(len(values))
    found = compare(values, none, ones, held_out.prompt_groups, settings.RESAMPLES, settings.SEED)
    return {key: found[key] for key in ("difference", "ci95")}


def compare_all(settings, by_model: dict[str, dict[str, Rows]]) -> list[dict]:
    """Every pair in every metric, with p-values adjusted over the pairs of a metric (`raw_p` is the unadjusted one).

    by_model: {label: {metric: Rows}}. The 4-bit pairs answer another question, and are a family of their own; so are
    those of each further candidate.
    """
    comparisons, known = [], {label for pair in PAIRS + PAIRS_4BIT for label in pair}
    families = [PAIRS, PAIRS_4BIT]
    others = [label for label in by_model if label not in known]
    families += [[(a, b) for b in ("base", "lora", "full", *others[:n])] for n, a in enumerate(others)]
    for metric in dict.fromkeys([*METRICS, *(name for found in by_model.values() for name in found)]):
        for family in families:
            pairs = [pair for pair in family if all(metric in by_model.get(label, {}) for label in pair)]
            compared = []
            for a, b in pairs:
                rows, others = by_model[a][metric], by_model[b][metric]
                known = np.flatnonzero(~np.isnan(rows.values) & ~np.isnan(others.values))
                groups = [rows.groups[i] for i in known]
                if len(set(groups)) > 1:  # a single observation has no spread
                    values = rows.values[known], others.values[known], rows.weights[known], groups
                    outcome = compare(*values, settings.RESAMPLES, settings.SEED, len(pairs))
                    compared.append({"a": a, "b": b, "metric": metric, **outcome})
            adjust = shaffer if family is PAIRS else holm  # Shaffer's holds for all pairs of three models
            for comparison, p_value in zip(compared, adjust([c["p_value"] for c in compared]), strict=True):
                comparison |= {"raw_p": comparison["p_value"], "p_value": p_value}
            comparisons += compared
    return comparisons


def with_embedder(settings, held_out: HeldOut) -> HeldOut:
    """The test split with EMBEDDING_MODEL's embeddings, where one is set."""
    if not settings.EMBEDDING_MODEL:
        return held_out
    model = models.load_embedder(settings.EMBEDDING_MODEL, str(device.compute_device()))
    return replace(held_out, embed=lambda texts: model.encode(texts, normalize_embeddings=True, convert_to_numpy=True))


# --- all together


def problems(settings) -> list[str]:
    """What is wrong with EMBEDDING_MODEL, PROMPT and JUDGE, before any model is loaded."""
    found = ["CHAT and PROMPT cannot both be set; leave one out"] if settings.CHAT and settings.PROMPT else []
    if settings.EMBEDDING_MODEL:
        found += hub.check_model(settings.EMBEDDING_MODEL, flag="EMBEDDING_MODEL")
    if settings.PROMPT is not None and settings.PROMPT.encode("utf-8", "replace").decode() != settings.PROMPT:
        found.append("PROMPT is not text in this terminal's encoding; set LC_ALL=C.UTF-8")
    if settings.BENCHMARKS:
        benchmarks.tasks_of(tuple(settings.BENCHMARKS))
    return found + (judge_problems(settings.JUDGE) if main_process() else [])


def write_all(
    settings, results: dict, warnings: list[Note], candidates: list[Candidate], measured: dict, held_out: HeldOut
) -> None:
    """Everything in REPORT_DIR, all of it or nothing, and the test scores in the cards of the trained models."""
    words = load_words(settings.REPORT_LANGUAGE)
    answers = {label: m.texts for label, m in measured.items() if m.answers is not None}
    examples = [
        {"prompt": held_out.questions[i], "reference": held_out.references[i]}
        | {label: texts[i] for label, texts in answers.items()}
        for i in metrics.most_different(answers, len(held_out.prompts))
    ]
    histories = {c.label: c.log["history"] for c in candidates if c.method in TRAINED}
    with handover.replacing(settings.REPORT_DIR) as new:
        handover.write_json(new / "evaluation_results.json", results)
        records = (record for label, m in measured.items() for record in records_of(label, m, held_out))
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        handover.write_text(new / "evaluation_examples.jsonl", "".join(lines))
        benchmarks.write_items(new / "evaluation_benchmarks.jsonl", {label: m.tasks for label, m in measured.items()})
        shown = results | {
            "verdict": verdict(results, PAIRS, words),
            "warnings": [sentence(note, words) for note in warnings],
        }
        drawn = pictures.draw(results, histories, new / "plots", words, load_words("en"))
        before = history.read(Path(settings.REPORT_DIR))
        write_report(shown, examples, drawn, new, settings.REPORT_LANGUAGE, before)
        history.keep(Path(settings.REPORT_DIR))
    for candidate in candidates:
        if candidate.method in TRAINED and still_as_scored(candidate):  # it may have been trained again meanwhile
            write_card(Path(candidate.own_folder), model_card_scores(results, candidate.label))


def tell(settings, results: dict, advice: list[str], warnings: list[Note], words: dict) -> None:
    """Print what the report opens with: the models side by side, what to do, the verdict in numbers, the warnings."""
    say("\n\n".join(["", summary_table(results, words), "\n".join(advice), verdict(results, PAIRS, words), ""]))
    for note in warnings:
        say(f"{words['warning']}{sentence(note, words)}")
    names = ("evaluation_report.html (.md)", "evaluation_results.json", "plots/")
    files = ", ".join(f"{Path(settings.REPORT_DIR)}/{name}" for name in names)
    say_done(
        advice[0].rstrip(".。"),
        f"{files}; {words['tensorboard']}tensorboard --logdir ./outputs/",
        command(__file__, "--prompt", words["your_question"]),
    )


def main() -> None:
    settings = freeze(globals())
    settings = replace(settings, REPORT_LANGUAGE=spoken(settings.REPORT_LANGUAGE))
    if wrong := problems(settings):
        fail(*wrong)
    asked = settings.CHAT or settings.PROMPT is not None
    manifest = {} if asked else handover.read_manifest(settings.DATA_DIR)
    candidates, notes = find_candidates(settings)
    words = load_words(settings.REPORT_LANGUAGE)
    for note in notes:
        say(f"{words['note']}{sentence(note, words)}")
    if asked:  # which needs no data
        candidates = load_tokenizers(candidates, settings, known_format(settings.DATA_DIR))
        return talk(settings, candidates) if settings.CHAT else answer_one(settings, candidates)
    trained = [Path(candidate.own_folder).parent for candidate in candidates if candidate.log]
    general = not_replayed(general_text(settings.GENERAL_TEXT), settings.GENERAL_TEXT, trained)
    with handover.lock(settings.REPORT_DIR):
        # --- measure
        made_from = state.made_from(vars(settings))  # before: a training may end while this runs
        held_out = load_held_out(settings, manifest)
        candidates = load_tokenizers(candidates, settings, manifest["settings"]["PROMPT_FORMAT"])
        check_forms(candidates, held_out)
        measured = measure_all(settings, candidates, held_out, general)
        if not main_process():
            return device.leave()  # one process has all results, and writes them

        # --- compare
        held_out = with_embedder(settings, held_out)
        opinion = judge_answers(settings, held_out, measured)
        by_model = {
            label: {name: rows for name in [*METRICS, *m.tasks] if (rows := rows_of(name, m, held_out)) is not None}
            for label, m in measured.items()
        }
        described = {
            c.label: describe(settings, c, measured[c.label], held_out, by_model[c.label]) for c in candidates
        }
        if "base_4bit" in described:  # the control is no fourth model: it stands with LoRA, which it explains
            described["lora"]["base_4bit"] = described.pop("base_4bit")
        reasons = unsound(candidates, manifest, held_out)
        logs = {c.label: c.log for c in candidates if c.method in TRAINED}
        notes += [("unknown_training", {"name": c.label}) for c in candidates if c.method == "other"]
        notes += gguf.served_otherwise(candidates, held_out.prompts)
        cut = {label: measured[label].stopped.count(False) for label in logs}
        tokens = measured["base"].tokens
        questions, prompts = round(effective_number(tokens, held_out.groups)), len(held_out.prompts)
        comparisons = compare_all(settings, by_model)
        warnings = notes + reasons + fairness(logs, len(held_out.rows), settings, cut, questions, prompts)
        warnings += rounding(device.scoring_precision(settings.PRECISION), comparisons)
        warnings += [("forgot", {"name": name, **much}) for name, much in forgot(comparisons).items()]
        if opinion and opinion["withheld"]:
            warnings.append(opinion["withheld"])

        # --- write
        data = {"source": manifest["source"], "manifest_sha256": manifest["manifest_sha256"], "made_from": made_from}
        results = {
            "environment": device.environment(),
            "settings": vars(settings),
            "data": data
            | {"test_rows": len(held_out.rows), "test_groups": len(set(held_out.groups)), "test_prompts": prompts},
            "models": described,
            "metrics": {name: {"better": metric.better, "unit": metric.unit} for name, metric in METRICS.items()}
            | {name: {"better": task.better, "unit": task.metric} for name, task in measured["base"].tasks.items()},
            "comparisons": comparisons,
            "judge": opinion,
            "unsound": reasons,
        }
        english = load_words("en")
        advice = recommend(results, by_model, settings.MARGIN, settings.PRICE_PER_HOUR)
        results["recommendation"] = advice | {"sentences": told(advice, english)}
        results["verdict"] = verdict(results, PAIRS, english)
        results["warnings"] = [sentence(note, english) for note in warnings]
        write_all(settings, results, warnings, candidates, measured, held_out)
    tell(settings, results, told(advice, words), warnings, words)
    device.leave()


if __name__ == "__main__":
    main()
