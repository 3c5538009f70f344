"""Scores the base model, LoRA and full fine-tuning on the same held-out rows and says which differences are
real.

Reads:  data/ (its test part), outputs/lora_model/final_lora_adapter, outputs/full_model/final_model
Writes: outputs/evaluation_results.json, evaluation_examples.jsonl, evaluation_report.md and .html, plots/

    python 4_evaluate_compare.py
    python 4_evaluate_compare.py --max_eval_samples 200 --max_new_tokens 128

Takes about half a minute on a laptop with --preset demo. A model that was not trained is named and left out.
"""

import gc
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from configs import files
from configs.settings import fail, override, read_constants

# --- models
MODEL_NAME = "microsoft/phi-2"  # Hub name or local folder of the base model; the one that was fine-tuned
MODEL_REVISION: str | None = None  # branch, tag or commit of the model on the Hub; none is its default branch
LORA_DIR = "outputs/lora_model"  # what 2_lora_finetuning.py wrote
FULL_DIR = "outputs/full_model"  # what 3_full_finetuning.py wrote

# --- data
DATA_DIR = "data"  # folder that 1_prepare_dataset.py filled
MAX_EVAL_SAMPLES: int | None = None  # score only so many test rows; none is all
GENERAL_TEXT: str | None = (
    None  # text file that shows what was forgotten: paragraphs apart from the data set's subject
)

# --- scoring
PRECISION = "auto"  # auto, bf16, fp16 or fp32; auto is exact on a CPU (fp32) and what the GPU has else
BATCH_TOKENS = 8192  # tokens of prompt and answer in one forward pass, padding included
MAX_NEW_TOKENS = 256  # an answer that is longer is cut, for every model alike
GENERATION_BATCH = 16  # prompts that are answered at once

# --- statistics
RESAMPLES = 10000  # bootstrap samples of an interval and sign flips of a test
SEED = 42  # of both

# --- output
REPORT_DIR = "outputs"  # folder for the results, the report and its plots

if __name__ == "__main__":
    override(globals())
    files.go_online(MODEL_NAME)  # first, because the libraries read its answer when they load

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from peft import PeftModel
from rouge_score import rouge_scorer
from sacrebleu.metrics import CHRF
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

PLAIN = (
    "Question: {question}\n\nAnswer:"  # what a base model that was never shown a chat template is asked with
)
FOLDERS = {"lora": "final_lora_adapter", "full": "final_model"}
STEPS = {"lora": "python 2_lora_finetuning.py", "full": "python 3_full_finetuning.py"}
PAIRS = [("lora", "base"), ("full", "base"), ("full", "lora")]
METRICS = ("nll_per_token", "answer_quality", "style_match", "helpfulness")


# --- what is there to compare


def find_models(c: SimpleNamespace, manifest: dict) -> tuple[dict[str, dict], list[str]]:
    """({"lora": training log, "full": ...} of the models that exist, notes on those that do not).

    Raises: SystemExit(2) when there is none, or one was trained from another base or on other data: a row
    that is tested here could have been trained on there.
    """
    logs, notes, problems = {}, [], []
    for name, folder in (("lora", Path(c.LORA_DIR)), ("full", Path(c.FULL_DIR))):
        if not (folder / FOLDERS[name]).is_dir():
            notes.append(
                f"{name} is not compared: {folder / FOLDERS[name]} is missing; make it with: {STEPS[name]}"
            )
            continue
        needs = ("model_name", "settings", "environment", "parameters", "data", "history", "summary")
        log = files.read_json(folder / "training_log.json", STEPS[name], needs)
        try:
            weights = list((folder / FOLDERS[name]).glob("*.safetensors"))
            for path in weights:
                with safe_open(path, framework="pt"):  # reads the header, which knows the file's length
                    pass
        except Exception as error:  # the library's own kind, and those of the file system
            problems.append(
                f"{folder / FOLDERS[name]} is damaged ({error}); make it anew with: {STEPS[name]}"
            )
        if not weights:
            problems.append(f"{folder / FOLDERS[name]} holds no weights; make it anew with: {STEPS[name]}")
        if log["summary"]["status"] != "done":
            problems.append(
                f"{folder} holds an unfinished run ({log['summary']['status']}); finish it with: "
                f"{STEPS[name]}"
            )
        if files.model_path(log["model_name"]) != files.model_path(c.MODEL_NAME):
            problems.append(
                f"{folder} was trained from {log['model_name']!r}, but MODEL_NAME is {c.MODEL_NAME!r}; "
                f"use --model_name {log['model_name']}, or train again with: {STEPS[name]} --model_name "
                f"{c.MODEL_NAME}"
            )
        if log["data"]["manifest_sha256"] != manifest["manifest_sha256"]:
            problems.append(
                f"{folder} was trained on other data than {c.DATA_DIR}/ holds now; train again with: "
                f"{STEPS[name]}"
            )
        logs[name] = log
    if problems:
        fail(*problems)
    if not logs:
        fail(*notes)
    return logs, notes


def fairness(
    logs: dict[str, dict], test_rows: int, settings: SimpleNamespace, cut: dict[str, int]
) -> list[str]:
    """What keeps the comparison from being fair, one sentence each. cut: answers per model that reached the
    cap."""
    found = []
    if test_rows < 100:
        found.append(f"the test part has only {test_rows} rows: only large differences can show")
    for name, number in cut.items():
        if number:
            found.append(f"{number} answers of {name} were cut at MAX_NEW_TOKENS={settings.MAX_NEW_TOKENS}")
    for name, log in logs.items():
        steps, epochs, asked = log["summary"]["steps"], log["summary"]["epochs"], log["settings"]
        # MAX_STEPS shortens the schedule, and its warm-up with it
        planned = asked["MAX_STEPS"] or max(round(steps / max(epochs, 1e-9) * asked["NUM_EPOCHS"]), 1)
        if steps <= math.ceil(planned * asked["WARMUP_RATIO"]):
            found.append(f"{name} never left its warm-up ({log['summary']['steps']} steps)")
    if len(logs) == 2:
        a, b = (logs[name]["settings"] for name in ("lora", "full"))
        for key in ("SEED", "NUM_EPOCHS", "MAX_STEPS", "MAX_LENGTH", "MAX_TRAIN_SAMPLES"):
            if a[key] != b[key]:
                found.append(f"the methods differ in {key}: {a[key]} (lora), {b[key]} (full)")
        rows = [
            s["BATCH_SIZE"] * s["GRADIENT_ACCUMULATION_STEPS"] * logs[n]["environment"]["processes"]
            for n, s in (("lora", a), ("full", b))
        ]
        if rows[0] != rows[1]:
            found.append(f"the methods differ in rows per step: {rows[0]} (lora), {rows[1]} (full)")
        if a["LEARNING_RATE"] == b["LEARNING_RATE"]:
            found.append(
                f"both methods had the learning rate {a['LEARNING_RATE']}: LoRA's best is about ten "
                f"times that of full "
                "fine-tuning, so one of them was held back"
            )
        if logs["lora"]["data"]["train_rows"] != logs["full"]["data"]["train_rows"]:
            found.append("the methods were trained on different numbers of rows")
    return found


# --- models


def load_model(c: SimpleNamespace, name: str, log: dict | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model as it would be served: LoRA over 4 bits where it was trained over 4 bits."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = str(Path(c.FULL_DIR) / FOLDERS["full"]) if name == "full" else files.model_path(c.MODEL_NAME)
    four_bit = name == "lora" and log["settings"]["USE_4BIT"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with files.hub_errors("model", c.MODEL_NAME, "MODEL_NAME", c.MODEL_REVISION):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=c.MODEL_REVISION if name != "full" else None,
            dtype=dtype,
            quantization_config=nf4 if four_bit else None,
            device_map={"": device},
        )
    files.keep_4bit_layout(model)
    if name == "lora":
        model = PeftModel.from_pretrained(model, str(Path(c.LORA_DIR) / FOLDERS["lora"]))
    return model.eval()


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Positions of the rows in batches of similar length, longest first, of at most `budget` padded
    tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def score(
    model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], budget: int, label: str
) -> np.ndarray:
    """nll of each continuation given its context, in nats, float64, shape (rows,).

    rows: (context_ids, continuation_ids); a context holds at least one token. Only the logits that predict a
    continuation are computed.
    """
    nll = np.zeros(len(rows))
    bar = tqdm(total=len(rows), desc=f"scoring {label}", unit=" rows")
    for batch in batches([len(a) + len(b) for a, b in rows], budget):
        chosen = [rows[i] for i in batch]
        width = max(len(a) + len(b) for a, b in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, (context, continuation) in enumerate(chosen):
            ids[line, : len(context) + len(continuation)] = torch.tensor(context + continuation)
            mask[line, : len(context) + len(continuation)] = 1
        first = min(len(context) for context, _ in chosen) - 1
        keep = torch.arange(first, width - 1, device=model.device)
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        for line, (context, continuation) in enumerate(chosen):  # row by row: float32 copies stay small
            begin = len(context) - 1 - first
            of_row = logits[line, begin : begin + len(continuation)].float()
            target = ids[line, len(context) : len(context) + len(continuation)]
            nll[batch[line]] = torch.nn.functional.cross_entropy(of_row, target, reduction="sum").item()
        bar.update(len(chosen))
    bar.close()
    return nll


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer,
    prompts: list[list[int]],
    ends: list[int],
    limit: int,
    size: int,
    label: str,
) -> list[dict]:
    """Greedy answers as {answer, stopped}: stopped is whether the model ended it by itself within `limit`
    tokens."""
    result: list[dict] = [{} for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    bar = tqdm(total=len(prompts), desc=f"answering {label}", unit=" prompts")
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(batch):  # padded on the left: the answer follows the prompt
            ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[line, width - len(prompts[i]) :] = 1
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )[:, width:].tolist()
        for i, tokens in zip(batch, output, strict=True):
            stop = next((n for n, token in enumerate(tokens) if token in ends), None)
            text = tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
            result[i] = {"answer": text, "stopped": stop is not None}
        bar.update(len(batch))
    bar.close()
    return result


# --- what an answer is worth


class AnswerQuality(evaluate.Metric):
    """Mean of ROUGE-L F1 (Lin 2004, rouge_score) and chrF (Popovic 2015, sacrebleu), both in [0, 1], per
    answer."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        rouge, chrf = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words()), CHRF()
        parts = [
            (rouge.score(r, p)["rougeL"].fmeasure, chrf.sentence_score(p, [r]).score / 100)
            for p, r in zip(predictions, references, strict=True)
        ]
        return {
            "rouge_l": [a for a, _ in parts],
            "chrf": [b for _, b in parts],
            "rows": [(a + b) / 2 for a, b in parts],
        }


class Words:
    """Tokenizer for rouge_score: words of letters and digits, and single characters of Chinese, Japanese and
    Korean."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(
            r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+",
            text.lower(),
        )


FUNCTION_WORDS = (
    "the a an of to in and or is are be it that this for on with as by at from not you your can will if "
    "but they their "
    "which more than when"
).split()


def style_match(text: str, reference: str) -> float:
    """How alike two answers are in form, in [0, 1]: the mean of four ratios that do not look at the content.

    Number of words; words per sentence; share of lines that are list items or markdown; profile of function
    words (cosine), as used in authorship attribution (Mosteller and Wallace 1964).
    """

    def features(s: str) -> tuple[float, float, float, np.ndarray]:
        words = Words().tokenize(s)
        sentences = [x for x in re.split(r"[.!?]+(?:\s|$)|[\u3002\uff01\uff1f]+", s) if x.strip()]
        lines = [line for line in s.splitlines() if line.strip()]
        marked = sum(bool(re.match(r"\s*([-*#>|]|\d+[.)]\s)|.*\*\*", line)) for line in lines)
        counts = Counter(words)
        profile = np.array([counts[w] for w in FUNCTION_WORDS], float)
        return len(words), len(words) / max(len(sentences), 1), marked / max(len(lines), 1), profile

    def ratio(a: float, b: float) -> float:
        return 1.0 if a == b else min(a, b) / max(a, b)

    a, b = features(text), features(reference)
    norms = np.linalg.norm(a[3]) * np.linalg.norm(b[3])
    cosine = float(a[3] @ b[3] / norms) if norms else float(np.array_equal(a[3], b[3]))
    return (ratio(a[0], b[0]) + ratio(a[1], b[1]) + 1 - abs(a[2] - b[2]) + cosine) / 4


def repetitive(text: str) -> bool:
    """True when fewer than half of the word 4-grams are different ones."""
    words = Words().tokenize(text)
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(grams) >= 8 and len(set(grams)) < len(grams) / 2


def helpfulness_proxy(question: str, text: str, stopped: bool) -> float:
    """A stand-in for a judge, in [0, 1]: the share of five things that a helpful answer does. It does not
    judge truth.

    It ends by itself, is not empty, does not repeat itself, is in the question's script (Latin, Chinese,
    ...), and takes up the question's content words (the share of them that it takes up, at most half of them
    being asked for).
    """

    def script(s: str) -> str:
        cjk = len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", s))
        return "cjk" if cjk * 2 > len(re.findall(r"[^\W\d_]", s)) else "other"

    said = set(Words().tokenize(text))
    asked = {
        w for w in Words().tokenize(question) if w not in FUNCTION_WORDS and (len(w) > 3 or not w.isascii())
    }
    taken_up = min(2 * len(asked & said) / len(asked), 1.0) if asked else 1.0
    if not text.strip():
        return 0.2 * stopped
    return (stopped + 1 + (not repetitive(text)) + (script(text) == script(question)) + taken_up) / 5


# --- statistics


def compare(
    a: np.ndarray, b: np.ndarray, weight: np.ndarray, groups: list, resamples: int, seed: int
) -> dict:
    """Difference a - b of two models on the same rows, with a 95 % interval and a two-sided p-value.

    a, b: numerators per row (nll in nats, or a score), shape (rows,); weight: their common denominators
    (tokens, or 1); the difference is sum(a - b) / sum(weight). groups: rows with the same question are drawn
    together. The interval is the percentile bootstrap over groups (Efron and Tibshirani 1993), the p-value a
    sign-flip permutation test over groups (Fisher 1935). Identical models give a difference of exactly 0 and
    p = 1.
    """
    index = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    place = np.array([index[group] for group in groups])
    difference = np.bincount(place, a - b, len(index))
    weights = np.bincount(place, weight, len(index)).astype(float)
    observed = difference.sum() / weights.sum()
    random = np.random.default_rng(seed)
    samples, as_large = [], 0
    for start in range(0, resamples, 1000):  # in portions, so that memory does not grow with the test part
        n = min(1000, resamples - start)
        drawn = random.multinomial(len(index), np.full(len(index), 1 / len(index)), n)
        samples.append((drawn @ difference) / (drawn @ weights))
        signs = random.integers(0, 2, (n, len(index))) * 2 - 1
        as_large += (np.abs(signs @ difference) >= abs(difference.sum()) * (1 - 1e-12)).sum()
    # The bootstrap's spread is too small by sqrt((n - 1) / n) and has no Student's tails: wider
    # percentiles make up for both (Hesterberg 2015); t by its expansion in 1 / (n - 1).
    z, free = 1.959964, max(len(index) - 1, 1)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    tail = 50 * math.erfc(t * math.sqrt((free + 1) / free / 2))
    low, high = np.percentile(np.concatenate(samples), [tail, 100 - tail])
    return {
        "difference": float(observed),
        "ci95": [float(low), float(high)],
        "p_value": float((as_large + 1) / (resamples + 1)),
        "n": len(groups),
    }


def holm(comparisons: list[dict]) -> None:
    """Replace the p-values within each metric by Holm's (1979), which allow for the number of pairs."""
    for metric in {c["metric"] for c in comparisons}:
        family = sorted((c for c in comparisons if c["metric"] == metric), key=lambda c: c["p_value"])
        running = 0.0
        for rank, comparison in enumerate(family):
            running = max(running, min(1.0, comparison["p_value"] * (len(family) - rank)))
            comparison["p_value"] = running


def verdict(results: dict) -> str:
    """One sentence from the statistics; never "better" where the interval covers zero."""
    said = []
    for c in results["comparisons"]:
        if c["metric"] != "nll_per_token":
            continue
        low, high = c["ci95"]
        if low <= 0 <= high:
            said.append(
                f"between {c['a']} and {c['b']} no difference shows (95 % interval {low:+.3f} to {high:+.3f})"
            )
        else:
            word, (low, high) = ("better", (-high, -low)) if high < 0 else ("worse", (low, high))
            said.append(
                f"{c['a']} is {word} than {c['b']} by {abs(c['difference']):.3f} "
                f"(95 % interval {low:.3f} to {high:.3f})"
            )
    return "On the test part, in nats per token of the answers: " + "; ".join(said) + "."


# --- report


def plots(results: dict, logs: dict[str, dict], folder: Path) -> list[str]:
    """Draw the pictures of the report; their file names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with files.new_folder(folder) as new:
        figure, axis = pyplot.subplots(figsize=(6, 3.2))
        names = list(results["models"])
        values = [results["models"][name]["perplexity"] for name in names]
        spread = np.array([np.exp(results["models"][name]["nll_ci95"]) for name in names]).T
        axis.errorbar(names, values, np.abs(spread - values), fmt="o", color="#4477aa", capsize=5)
        for place, value in enumerate(values):
            axis.annotate(f"{value:.2f}", (place, value), (10, 0), textcoords="offset points", va="center")
        if max(values) > 10 * min(values):
            axis.set_yscale("log")
        axis.margins(x=0.25)
        axis.set_ylabel("perplexity (lower is better)")
        figure.savefig(new / "perplexity.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)

        figure, axis = pyplot.subplots(figsize=(6, 3.2))
        for (name, log), color in zip(logs.items(), ("#4477aa", "#cc6677"), strict=False):
            for key, style in (("loss", "-"), ("eval_loss", "o--")):
                points = [(r["step"], r[key]) for r in log["history"] if isinstance(r.get(key), float)]
                label = f"{name}, {'training' if key == 'loss' else 'validation'}"
                axis.plot(
                    *zip(*points, strict=True), style, color=color, markersize=3, label=label
                ) if points else None
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel("loss (nats per token)")
        axis.legend()
        figure.savefig(new / "loss_curves.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return ["perplexity.png", "loss_curves.png"]


def cell(text: object) -> str:
    """Text of data or models as one harmless table cell: no markup, no line break, no column."""
    short = " ".join(str(text).split())
    short = short if len(short) <= 600 else short[:600] + " ..."
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$\"-])", lambda m: f"&#{ord(m[0])};", short.replace("&", "&amp;"))


def write_report(results: dict, examples: list[dict], images: list[str], folder: Path) -> None:
    """evaluation_report.md from configs/report, and evaluation_report.html from it, with the pictures
    inside."""
    import base64

    import markdown

    templates = Environment(
        loader=FileSystemLoader(files.ROOT / "configs" / "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["cell"] = cell
    text = templates.get_template("report.md.jinja").render(
        **results, verdict=verdict(results), examples=examples, images=images
    )
    files.write_text(folder / "evaluation_report.md", text)
    html = markdown.markdown(text, extensions=["tables"])
    for image in images:
        data = base64.b64encode((folder / "plots" / image).read_bytes()).decode()
        html = html.replace(f'src="plots/{image}"', f'src="data:image/png;base64,{data}"')
    page = templates.get_template("page.html.jinja").render(body=html)
    files.write_text(folder / "evaluation_report.html", page)


def table(results: dict) -> str:
    """The models side by side, as printed at the end."""
    lines = [("perplexity", "perplexity", ".2f"), ("bits per byte", "bits_per_byte", ".3f")]
    lines += [("answer quality", "answer_quality", ".3f"), ("style match", "style_match", ".3f")]
    lines += [("helpfulness (proxy, not judged)", "helpfulness", ".3f")]
    names = list(results["models"])
    text = ["".join([f"{'':34}"] + [f"{name:>10}" for name in names])]
    for label, key, form in lines:
        text.append(f"{label:34}" + "".join(f"{results['models'][name][key]:>10{form}}" for name in names))
    text.append(
        f"{'ends its answers by itself':34}"
        + "".join(f"{results['models'][n]['answers']['stopped']:>10.0%}" for n in names)
    )
    return "\n".join(text)


# --- all together


def measure(
    c: SimpleNamespace,
    name: str,
    log: dict | None,
    rows: list[dict],
    prompts: list[dict],
    manifest: dict,
    text: list,
) -> dict:
    """Everything that one model is asked: nll per row and prompt style, answers, nll of the general text."""
    folder = {"lora": Path(c.LORA_DIR), "full": Path(c.FULL_DIR)}.get(name)
    source = c.MODEL_NAME if folder is None else str(folder / FOLDERS[name])
    form = (
        manifest["settings"]["PROMPT_FORMAT"] if folder is None else "auto"
    )  # a trained model brings its template
    tokenizer = files.load_tokenizer(source, c.MODEL_REVISION if folder is None else None, form)
    model = load_model(c, name, log, precision(c.PRECISION))

    def plain(prompt: list[dict]) -> list[int]:
        question = "\n\n".join(message["content"] for message in prompt)
        return tokenizer(PLAIN.format(question=question) + "\n", verbose=False).input_ids

    chat = [files.encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    # the answer's text alone: the token that ends it is the template's, which the base model was never shown
    forms = {"chat": [(context, continuation[:-1]) for context, continuation in chat]}
    if name == "base":
        forms["plain"] = [
            (plain(row["prompt"]), cont) for row, (_, cont) in zip(rows, forms["chat"], strict=True)
        ]
    nll = {
        form: score(model, pairs, c.BATCH_TOKENS, f"{name}, {form} prompt") for form, pairs in forms.items()
    }
    best = min(nll, key=lambda form: nll[form].sum())

    asked = [
        plain(p["prompt"])
        if best == "plain"
        else files.encode(tokenizer, p["prompt"], [{"role": "assistant", "content": "a"}])[0]
        for p in prompts
    ]
    ends = sorted({tokenizer.eos_token_id, files.answer_end(tokenizer)})
    answers = answer(model, tokenizer, asked, ends, c.MAX_NEW_TOKENS, c.GENERATION_BATCH, name)
    general = None
    if text:
        start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
        pieces = [
            (start, tokenizer(t, add_special_tokens=False, verbose=False).input_ids[:512]) for t in text
        ]
        total = score(model, pieces, c.BATCH_TOKENS, f"{name}, general text").sum()
        tokens = sum(len(ids) for _, ids in pieces)
        size = sum(len(tokenizer.decode(ids).encode()) for _, ids in pieces)
        general = {
            "nll_per_token": total / tokens,
            "bits_per_byte": total / math.log(2) / size,
            "tokens": tokens,
        }
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return {"pairs": forms[best], "nll": nll, "best": best, "answers": answers, "general": general}


def precision(choice: str) -> torch.dtype:
    """The dtype to score in: exact on a CPU, what training would choose on a GPU."""
    if choice == "auto" and not torch.cuda.is_available():
        return torch.float32
    from configs import machine  # slow to import, so only where a GPU is to be asked

    return machine.precision(choice)[0]


def cost(log: dict | None, folder: Path | None) -> dict | None:
    """What a training took, from its log, and the bytes of what it made."""
    if log is None:
        return None
    keys = ("train_runtime_s", "tokens", "tokens_per_second", "peak_memory_bytes")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {
        "trainable": log["parameters"]["trainable"],
        **{k: log["summary"][k] for k in keys},
        "disk_bytes": size,
    }


def general_text(name: str | None) -> list[str]:
    """Paragraphs of the file GENERAL_TEXT; none without one."""
    if name is None:
        return []
    path = files.local_path(name)
    if path is None or not path.is_file():
        fail(f"GENERAL_TEXT {name!r}: there is no such file; give a text file, or none: --general_text none")
    try:
        found = [p.strip() for p in path.read_text(encoding="utf-8-sig").split("\n\n") if p.strip()][:200]
    except UnicodeDecodeError as error:
        fail(f"GENERAL_TEXT {name!r} is not UTF-8 text ({error.reason}); give one, or: --general_text none")
    return found or fail(f"GENERAL_TEXT {name!r} is empty; give a text file, or none: --general_text none")


def main() -> None:
    c = SimpleNamespace(**{name: globals()[name] for name in read_constants(__file__)})
    if not files.main_process():
        return  # one process scores; a launcher's others have nothing to add
    problems = files.check_model(MODEL_NAME, MODEL_REVISION)
    for name in ("MAX_NEW_TOKENS", "BATCH_TOKENS", "GENERATION_BATCH", "MAX_EVAL_SAMPLES"):
        if getattr(c, name) is not None and getattr(c, name) < 1:
            problems.append(f"{name} is {getattr(c, name)}; it must be at least 1: --{name.lower()} 16")
    if PRECISION not in ("auto", "bf16", "fp16", "fp32"):
        problems.append(f"PRECISION is {PRECISION!r}; choose auto, bf16, fp16 or fp32")
    if RESAMPLES < 2000:
        problems.append(f"RESAMPLES is {RESAMPLES}; an interval from fewer than 2000 is not worth reporting")
    if problems:
        fail(*problems)
    manifest = files.read_manifest(DATA_DIR)
    logs, notes = find_models(c, manifest)
    text = general_text(GENERAL_TEXT)
    for note in notes:
        files.say(f"note: {note}")

    with files.lock(REPORT_DIR):
        # --- measure
        rows = [row for row in files.load_split(DATA_DIR, "eval") if row["part"] == "test"][:MAX_EVAL_SAMPLES]
        prompts = files.read_json(Path(DATA_DIR) / "test_prompts.json", files.STEP_1)
        measured = {
            name: measure(c, name, logs.get(name), rows, prompts, manifest, text) for name in ("base", *logs)
        }

        # --- summarise
        sizes = np.array([len(row["completion"][0]["content"].encode()) for row in rows])
        questions = [json.dumps(row["prompt"]).lower() for row in rows]
        references, asked = [p["reference"] for p in prompts], [p["prompt"][-1]["content"] for p in prompts]
        models, per_row, examples = {}, defaultdict(dict), []
        for name, m in measured.items():
            nll, tokens = m["nll"][m["best"]], np.array([len(cont) for _, cont in m["pairs"]])
            texts = [a["answer"] for a in m["answers"]]
            quality = AnswerQuality().compute(predictions=texts, references=references)
            style = [style_match(t, r) for t, r in zip(texts, references, strict=True)]
            useful = [
                helpfulness_proxy(q, a["answer"], a["stopped"])
                for q, a in zip(asked, m["answers"], strict=True)
            ]
            per_row["nll_per_token"][name] = (nll, tokens, questions)
            keys = [json.dumps(p["prompt"]).lower() for p in prompts]
            for metric, values in zip(METRICS[1:], (quality["rows"], style, useful), strict=True):
                per_row[metric][name] = (np.array(values), np.ones(len(values)), keys)
            zero = np.zeros(len(nll))
            models[name] = {
                "perplexity": float(np.exp(nll.sum() / tokens.sum())),
                "nll_per_token": float(nll.sum() / tokens.sum()),
                "nll_ci95": compare(nll, zero, tokens, questions, RESAMPLES, SEED)["ci95"],
                "bits_per_byte": float(nll.sum() / math.log(2) / sizes.sum()),
                "scored_tokens": int(tokens.sum()),
                "answer_quality": float(np.mean(quality["rows"])),
                "style_match": float(np.mean(style)),
                "helpfulness": float(np.mean(useful)),
                "answers": {
                    "n": len(texts),
                    "rouge_l": float(np.mean(quality["rouge_l"])),
                    "chrf": float(np.mean(quality["chrf"])),
                    "stopped": float(np.mean([a["stopped"] for a in m["answers"]])),
                    "repetitive": float(np.mean([repetitive(t) for t in texts])),
                    "empty": float(np.mean([not t for t in texts])),
                },
                "prompt": m["best"],
                "perplexity_by_prompt": {
                    form: float(np.exp(v.sum() / tokens.sum())) for form, v in m["nll"].items()
                },
                "forgetting": m["general"],
                "cost": cost(
                    logs.get(name), {"lora": Path(LORA_DIR), "full": Path(FULL_DIR)}[name] / FOLDERS[name]
                )
                if name in logs
                else None,
            }
            for row, (context, cont), value, size in zip(rows, m["pairs"], nll, sizes, strict=True):
                examples.append(
                    {
                        "id": row["id"],
                        "model": name,
                        "context_ids": context,
                        "continuation_ids": cont,
                        "nll": float(value),
                        "tokens": len(cont),
                        "bytes": int(size),
                    }
                )
            for p, a in zip(prompts, m["answers"], strict=True):
                examples.append(
                    {"id": p["id"], "model": name, "prompt": p["prompt"], **a, "reference": p["reference"]}
                )

        # --- compare
        comparisons = []
        for metric in METRICS:
            for a, b in PAIRS:
                if a in models and b in models:
                    (va, weight, groups), (vb, _, _) = per_row[metric][a], per_row[metric][b]
                    found = compare(va, vb, weight, groups, RESAMPLES, SEED)
                    comparisons.append({"a": a, "b": b, "metric": metric, **found})
        holm(comparisons)
        cut = {
            name: sum(not a["stopped"] for a in m["answers"])
            for name, m in measured.items()
            if name != "base"
        }
        results = {
            "environment": files.environment(),
            "settings": vars(c),
            "data": {
                "source": manifest["source"],
                "manifest_sha256": manifest["manifest_sha256"],
                "test_rows": len(rows),
                "test_prompts": len(prompts),
            },
            "models": models,
            "comparisons": comparisons,
            "warnings": notes + fairness(logs, len(rows), c, cut),
        }

        # --- write
        folder = Path(REPORT_DIR)
        files.write_json(folder / "evaluation_results.json", results)
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        files.write_text(folder / "evaluation_examples.jsonl", "".join(lines))
        shown = [
            {"prompt": p["prompt"][-1]["content"], "reference": p["reference"]}
            | {name: m["answers"][i]["answer"] for name, m in measured.items()}
            for i, p in enumerate(prompts[:10])
        ]
        write_report(results, shown, plots(results, logs, folder / "plots"), folder)
    print(f"\n{table(results)}\n\n{verdict(results)}\n")
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    print(
        f"look at: {folder}/evaluation_report.html (or .md), {folder}/evaluation_results.json, "
        f"{folder}/plots/"
    )
    print("and, while or after training: tensorboard --logdir ./outputs/")


if __name__ == "__main__":
    main()
