"""Training on one CUDA GPU: speed against `trl sft`, share of the card's peak, memory against the plan; and scoring.

    python tests/benchmarks/gpu.py
    python tests/benchmarks/gpu.py --only lora full --steps 50 --work /scratch/benchmark --output results.json
    python tests/benchmarks/gpu.py --toy

Nothing is downloaded. The model has phi-2's shape and vocabulary size, random weights in bf16, and a tokenizer of its
own (--layers: fewer layers, for a small disk). The rows are random words; their lengths imitate finance-alpaca's: the
tokens of prompt and of answer are drawn, each for itself, from the quantiles in PROMPT and ANSWER. --toy runs all of
it in miniature on the CPU, to check the benchmark; its numbers mean nothing.

Speed: steps 2 and 3 at their default constants and `trl sft` at its own (8 rows a pass, gradient checkpointing) train
the same token ids for one epoch, 16 rows a step, in the same precision and with the same adapter, in turns, each run a
process of its own. Tokens are those of the rows, without padding. The time is that of the training loop, without
evaluation and saving: summary.tokens_per_second of training_log.json, and train_runtime of the Trainer.

Share of the peak (model flops utilisation, MFU): floating-point operations that the rows need, over time and the
card's peak. Needed are 6 B T + 6 H A for full fine-tuning (2 forward, 4 backward) and 4 B T + 4 H A for LoRA (2
forward, 2 backward through the frozen weights), with B weights in the layers' matrices, T tokens, H weights in the
head, and A trained tokens, the only ones that the head must see. Not counted: embeddings, products of queries and
keys, LoRA's own matrices, and what gradient checkpointing computes again.

Memory: 5 steps of QLoRA planned for a card of 8 GB, and in full for one of 24 GB (--device_memory_gb 7.5 and 24).
A plan counts the largest pass that it allows, which rows of mixed lengths seldom fill, so the peak may lie below it.
(tests/test_gpu.py holds the two together, with rows of one length.)

Scoring: step 4's `score` against lm-evaluation-harness, as in scores.py, where lm_eval is installed.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# one GPU: with several, a plain `python 2_lora_finetuning.py` is refused
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

# Percentile: tokens, of prompts (with the ChatML around them) and answers, which correlate little (-0.18). Measured on
# 999 rows in Alpaca's form with a tokenizer of 8,320 tokens; most rows of finance-alpaca come from Alpaca.
PROMPT = {0: 37, 10: 42, 25: 45, 50: 50, 75: 59, 90: 71, 95: 83, 99: 129, 100: 218}
# The longest answer there has 837 tokens; here 970, so that rows come near MAX_LENGTH, which memory must hold.
ANSWER = {0: 2, 10: 13, 25: 31, 50: 127, 75: 310, 90: 432, 95: 491, 99: 631, 100: 970}
MAX_LENGTH = 1024
ROWS = 16  # of an optimizer step, by the default constants of both scripts

# Dense TFLOP/s of matrix products in 16 bits with sums in fp32, by NVIDIA's data sheets (T4: fp16).
PEAKS = {"H100 80GB HBM3": 989, "H200": 989, "A100": 312, "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "T4": 65}

# method: (script, its flags, flags of trl sft, operations a weight and token)
PEFT = "--use_peft --lora_target_modules all-linear --lora_r 16 --lora_alpha 32 --lora_dropout 0.05".split()
FOUR_BITS = "--load_in_4bit --use_bnb_nested_quant --bnb_4bit_quant_type nf4".split()
METHODS = {
    "qlora": ("2_lora_finetuning.py", [], [*PEFT, *FOUR_BITS], 4),
    "lora": ("2_lora_finetuning.py", ["--use_4bit", "false"], PEFT, 4),
    "full": ("3_full_finetuning.py", [], [], 6),
}
MEMORY = {"qlora": (7.5, 8), "full": (24, 24)}  # method: (GB that are planned for, GB of the card)
PARTS = [*METHODS, "memory", "scoring"]


class Failed(Exception):
    """A run ended with an error; the text says with which."""


def apart(function, *arguments):
    """What a function returns in a process of its own, which gives all GPU memory back when it ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(command: list, cwd: Path) -> str:
    """The output of a command. Raises: Failed, with the line that says most."""
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines() or [f"exit code {result.returncode}"]
        # the launcher of trl ends with an error of its own, which says nothing
        named = [line for line in lines if re.match(r"(error:|(?!subprocess)\S*(Error|Exception):)", line)]
        raise Failed((named or lines)[-1][:500])
    return result.stdout + result.stderr


# --- card, model and rows


def card(toy: bool) -> dict:
    """The device: name, memory_bytes, bf16, its measured best matrix product and its peak, in TFLOP/s."""
    import torch

    device = "cpu" if toy else "cuda"
    bf16 = not toy and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float32 if toy else torch.bfloat16 if bf16 else torch.float16
    best = 0.0
    for size in [256] if toy else [4096, 8192, 16384]:
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        for repeat in range(12):
            if not toy:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(4):
                a @ b
            if not toy:
                torch.cuda.synchronize()
            if repeat > 1:  # the first ones load kernels
                best = max(best, 4 * 2 * size**3 / (time.perf_counter() - began) / 1e12)
    name = "cpu" if toy else torch.cuda.get_device_name(0)
    # cards of the same number that are slower or faster: their peak is not in the table
    known = [peak for key, peak in PEAKS.items() if re.search(rf"\b{key}\b(?! (NVL|PCIe|Ti|SUPER|Laptop|D)\b)", name)]
    return {
        "name": name,
        "memory_bytes": None if toy else torch.cuda.get_device_properties(0).total_memory,
        "bf16": bf16,
        "matrix_product_tflops": best,
        "peak_tflops": known[0] if known else best,
        "peak_is": "data sheet" if known else "the measured matrix product",
    }


def make_model(folder: Path, layers: int, toy: bool) -> dict:
    """Save a model of random weights and its tokenizer; returns weights in the layers' matrices and in the head."""
    import torch
    from hub import tiny_phi
    from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig

    if not folder.exists():
        tiny_phi(folder, vocab=2048)
        if not toy:
            end = AutoConfig.from_pretrained(folder).eos_token_id
            config = PhiConfig(
                vocab_size=51200,
                hidden_size=2560,
                intermediate_size=10240,
                num_hidden_layers=layers,
                num_attention_heads=32,
                max_position_embeddings=2048,
                partial_rotary_factor=0.4,
                bos_token_id=end,
                eos_token_id=end,
            )
            (folder / "model.safetensors").unlink()
            torch.manual_seed(0)
            with torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return {"body": linear - head.weight.numel(), "head": head.weight.numel()}


def drawn(quantiles: dict[int, int], rng: random.Random) -> int:
    """A number whose distribution has these quantiles, straight lines between them."""
    at, points = rng.uniform(0, 100), sorted(quantiles.items())
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if at <= right:
            return round(low + (high - low) * (at - left) / (right - left))
    raise AssertionError("the quantiles end at 100")


def write_rows(path: Path, tokenizer, count: int, longest: int) -> None:
    """`count` rows of random words, each one token, of the lengths that PROMPT and ANSWER describe."""
    from configs import chat

    rng = random.Random(0)
    words = sorted(t[1:] for t in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{3,}", t))
    empty = chat.encode(tokenizer, [{"role": "user", "content": ""}], [{"role": "assistant", "content": ""}])
    around = [len(ids) for ids in empty]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            # five words or more, so that no two prompts are equal; the first word of each may be several tokens
            asked = max(min(drawn(PROMPT, rng), longest // 2) - around[0], 5)
            answered = max(min(drawn(ANSWER, rng), longest - around[0] - asked - 10) - around[1], 1)
            question, answer = (" ".join(rng.choices(words, k=k)) for k in (asked, answered))
            file.write(json.dumps({"instruction": question, "input": "", "output": answer}) + "\n")


def prepare(work: Path, model: Path, steps: int, toy: bool) -> dict:
    """Rows for so many steps: data/ by step 1, trl/train.jsonl with the same token ids, and what they hold."""
    from datasets import load_from_disk

    from configs import chat

    count, held_out = steps * ROWS, 40
    tokenizer = chat.load_tokenizer(str(model), None, "auto")
    write_rows(work / "rows.jsonl", tokenizer, count + 2 * held_out, 160 if toy else MAX_LENGTH)
    flags = ["--dataset_name", work / "rows.jsonl", "--model_name", model, "--eval_fraction"]
    run([sys.executable, ROOT / "1_prepare_dataset.py", *flags, held_out / (count + 2 * held_out)], work)
    rows = load_from_disk(str(work / "data/train"))
    if len(rows) < count:
        raise Failed(f"step 1 left {len(rows)} training rows, and {count} are needed")
    lengths, trained = [], 0
    (work / "trl").mkdir(exist_ok=True)
    with open(work / "trl/train.jsonl", "w", encoding="utf-8") as file:
        for row in rows.select(range(count)):
            context, answer = chat.encode(tokenizer, row["prompt"], row["completion"])
            labels = [-100] * len(context) + answer
            file.write(json.dumps({"input_ids": context + answer, "labels": labels}) + "\n")
            lengths.append(len(labels))
            trained += len(answer)
    cuts = statistics.quantiles(lengths, n=20)
    return {
        "rows": count,
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "lengths": {"5 %": cuts[0], "50 %": cuts[9], "95 %": cuts[18], "longest": max(lengths)},
    }


# --- training


@dataclass
class Bench:
    """What all parts measure with: folders, sizes, the card, the model's weights and what the rows hold."""

    work: Path
    model: Path
    toy: bool
    steps: int
    pairs: int
    card: dict
    weights: dict
    rows: dict

    def own(self, method: str, steps: int, *flags: object) -> dict:
        """training_log.json of step 2 or 3, of which nothing else is kept."""
        place, script = self.work / "own", METHODS[method][0]
        shutil.rmtree(place, ignore_errors=True)
        command = [sys.executable, ROOT / script, "--model_name", self.model, "--output_dir", place]
        command += [*METHODS[method][1], *flags, "--max_train_samples", self.rows["rows"], "--max_eval_samples", 8]
        command += ["--max_steps", steps, "--eval_steps", steps, "--save_steps", steps, "--report_to", "none"]
        run([*command, *(["--precision", "fp32"] if self.toy else [])], self.work)
        log = json.loads((place / "training_log.json").read_text("utf-8"))
        shutil.rmtree(place)
        return log

    def own_speed(self, method: str) -> tuple[float, dict]:
        """Tokens per second of an epoch, and its training_log.json."""
        log = self.own(method, self.steps)
        if log["summary"]["tokens"] != self.rows["tokens"]:
            raise Failed(f"{log['summary']['tokens']} tokens were trained, and the rows have {self.rows['tokens']}")
        return log["summary"]["tokens_per_second"], log

    def trl_speed(self, method: str) -> float:
        """Tokens per second of `trl sft`: its defaults, with ROWS rows a step, one epoch, and no checkpoints."""
        place = self.work / "trl-run"
        shutil.rmtree(place, ignore_errors=True)
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        program = shutil.which("trl", path=paths)
        if not program:
            raise Failed("the command trl is not installed beside this python, nor on PATH")
        command = [program, "sft", "--model_name_or_path", self.model, "--dataset_name"]
        command += [self.work / "trl", "--output_dir", place, *METHODS[method][2], "--num_train_epochs", 1]
        command += ["--gradient_accumulation_steps", ROWS // 8, "--save_strategy", "no", "--report_to", "none"]
        # the frozen base in 16 bits, as step 2 holds it; for full fine-tuning the default, fp32 masters
        half = "bfloat16" if self.card["bf16"] else "float16"
        command += ["--dtype", "float32" if self.toy or method == "full" else half]
        if self.toy:
            command += ["--use_cpu", "true", "--bf16", "false"]
        elif not self.card["bf16"]:
            command += ["--bf16", "false", "--fp16", "true"]
        output = run(command, self.work)
        shutil.rmtree(place, ignore_errors=True)
        seconds = re.findall(r"train_runtime['\"]?\s*[:=]\s*['\"]?([\d.]+)", output)
        if not seconds:
            raise Failed("trl sft printed no train_runtime")
        return self.rows["tokens"] / float(seconds[-1])

    def speed(self, method: str) -> dict:
        """Tokens per second of both programs in turns; peak memory and plan of this project's first run."""
        own, trl, log, failures = [], [], None, {}
        for _ in range(self.pairs):
            try:
                if "own" not in failures:
                    value, last = self.own_speed(method)
                    own, log = [*own, value], log or last
            except Failed as failure:
                failures["own"] = str(failure)
            try:
                if "trl_sft" not in failures:
                    trl.append(self.trl_speed(method))
            except Failed as failure:
                failures["trl_sft"] = str(failure)
        return {
            "own": self.of(method, own),
            "trl_sft": self.of(method, trl),
            "ratio": statistics.median(own) / statistics.median(trl) if own and trl else None,
            "plan": log and {key: value for key, value in log["plan"].items() if key != "parts"},
            "planned_bytes": log and log["plan"]["planned_bytes"],
            "peak_memory_bytes": log and log["summary"]["peak_memory_bytes"],
            "failures": failures,
        }

    def of(self, method: str, speeds: list[float]) -> dict | None:
        """The speeds of a program, their median, and its share of the card's peak."""
        if not speeds:
            return None
        tokens, trained, operations = self.rows["tokens"], self.rows["trained_tokens"], METHODS[method][3]
        needed = operations * (self.weights["body"] + self.weights["head"] * trained / tokens)  # of a token
        middle = statistics.median(speeds)
        mfu = middle * needed / self.card["peak_tflops"] / 1e12
        return {"tokens_per_second": speeds, "median": middle, "mfu": mfu}

    def memory(self) -> dict:
        """Peak and plan of a few steps in the memory that is promised."""
        results = {}
        for method, (planned, card_gb) in MEMORY.items():
            try:
                log = self.own(method, 2 if self.toy else 5, "--device_memory_gb", planned)
            except Failed as failure:
                results[method] = {"card_gb": card_gb, "failure": str(failure)}
                continue
            peak, optim = log["summary"]["peak_memory_bytes"], log["plan"]["optim"]
            results[method] = {"card_gb": card_gb, "planned_for_gb": planned, "peak_memory_bytes": peak}
            results[method] |= {"planned_bytes": log["plan"]["planned_bytes"], "optim": optim}
        return results


# --- scoring


def scoring(work: Path, folder: Path, toy: bool) -> dict:
    """Speeds of step 4's `score` and of lm-evaluation-harness on the same rows and the same weights."""
    try:
        import scores
    except ImportError as error:
        return {"failure": f"lm_eval is not installed ({error})"}
    import torch
    from transformers import AutoModelForCausalLM

    from configs import chat, device

    dtype = torch.float32 if toy else device.scoring_precision("auto")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=device.attention(dtype), device_map="cpu" if toy else "cuda"
    )
    rows = []
    for line in (work / "trl/train.jsonl").read_text("utf-8").splitlines()[: 16 if toy else 400]:
        row = json.loads(line)
        at = row["labels"].count(-100)
        rows.append((row["input_ids"][:at], row["input_ids"][at:]))
    tokenizer = chat.load_tokenizer(str(folder), None, "auto")
    if toy:
        sizes, tolerance = (1, 4), 1e-4
    else:  # the harness keeps the logits of a batch: 32 rows of 1,024 tokens need more than 13 GB
        roomy = torch.cuda.get_device_properties(0).total_memory > 40e9
        sizes, tolerance = ((1, 8, 32, "auto") if roomy else (1, "auto")), 1e-2
    return scores.scoring_speeds(model.eval(), tokenizer, rows, 1 if toy else 3, sizes, tolerance)


# --- what is reported


def goals(results: dict) -> list[dict]:
    """What was aimed at, what was measured (None: nothing), and whether it is enough."""
    methods, held = results["methods"], results["memory"]
    lines = []

    def goal(text: str, value: float | None, met: bool) -> None:
        lines.append({"goal": text, "measured": value, "met": None if value is None else met})

    for method, least in (("full", 0.45), ("lora", 0.40)):
        value = (methods.get(method, {}).get("own") or {}).get("mfu")
        goal(f"{method}: {least:.0%} of the card's peak or more", value, (value or 0) >= least)
    for method in METHODS:
        value = methods.get(method, {}).get("ratio")
        goal(f"{method}: 1.5 times the tokens per second of trl sft or more", value, (value or 0) >= 1.5)
    for method, (_, limit) in MEMORY.items():
        peak = held.get(method, {}).get("peak_memory_bytes")
        goal(f"{method}: less than {limit} GB", peak and peak / 1e9, (peak or 0) < limit * 1e9)
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def show_method(name: str, result: dict) -> None:
    for program, text in (("own", "this project"), ("trl_sft", "trl sft")):
        if result[program]:
            speeds = result[program]["tokens_per_second"]
            print(f"{name:6} {text:12} {spread(speeds):>30} tokens/s, MFU {result[program]['mfu']:.1%}", flush=True)
    if result["ratio"]:
        print(f"{name:6} this project / trl sft: {result['ratio']:.2f}")
    if result["plan"]:
        peak, planned = result["peak_memory_bytes"] / 1e9, result["planned_bytes"] / 1e9
        print(f"{name:6} peak memory {peak:.2f} GB, planned {planned:.2f} GB; plan: {json.dumps(result['plan'])}")
    for program, failure in result["failures"].items():
        print(f"{name:6} {program} failed: {failure}")


def show_scoring(result: dict) -> None:
    if "failure" in result:
        print(f"scoring: {result['failure']}")
        return
    own = statistics.median(result["this project"]["tokens_per_second"])
    for name, way in result.items():
        ratio = own / statistics.median(way["tokens_per_second"])
        print(f"scoring {name:44} {spread(way['tokens_per_second']):>26} tokens/s; this / that: {ratio:.2f}")


def versions() -> dict:
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {"commit": commit or None, "python": sys.version.split()[0], **{name: version(name) for name in names}}


def measure(options, work: Path) -> None:
    """Run the parts that are asked for; print each, and keep all as JSON."""
    toy = options.toy
    steps, pairs, layers = (2, 1, 2) if toy else (options.steps, options.pairs, options.layers)
    model = work / ("model-toy" if toy else f"model-{layers}-layers")
    machine, weights = apart(card, toy), apart(make_model, model, layers, toy)
    bench = Bench(work, model, toy, steps, pairs, machine, weights, prepare(work, model, steps, toy))
    results = {"toy": toy, "command": " ".join(sys.argv), "card": machine, "versions": versions(), "layers": layers}
    results |= {"steps": steps, "pairs": pairs, "weights": weights, "rows": bench.rows}
    results |= {"methods": {}, "memory": {}, "scoring": {}, "goals": []}
    if toy:
        print("toy: a tiny model on the CPU; these numbers mean nothing")
    print(f"{machine['name']}: best measured matrix product {machine['matrix_product_tflops']:.1f} TFLOP/s;")
    print(f"peak {machine['peak_tflops']:.1f} TFLOP/s ({machine['peak_is']})")
    print(f"rows: {json.dumps(bench.rows)}", flush=True)
    for part in options.only:
        if part == "memory":
            results["memory"] = bench.memory()
            for name, held in results["memory"].items():
                print(f"memory {name}: {json.dumps(held)}", flush=True)
        elif part == "scoring":
            try:
                results["scoring"] = apart(scoring, work, model, toy)
            except (AssertionError, RuntimeError) as error:  # other scores than the harness's, or no memory left
                results["scoring"] = {"failure": f"{type(error).__name__}: {error}"[:500]}
            show_scoring(results["scoring"])
        else:
            results["methods"][part] = bench.speed(part)
            show_method(part, results["methods"][part])
        results["goals"] = goals(results)
        if options.output:
            Path(options.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for line in results["goals"]:
        value = "not measured" if line["measured"] is None else f"{line['measured']:.3g}"
        met = {None: "", True: "reached", False: "missed"}[None if toy else line["met"]]
        print(f"goal {line['goal']}: {value} {met}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="everything in miniature on the CPU, to check this script")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a training")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each program, in turns")
    parser.add_argument("--layers", type=int, default=32, help="of phi-2's 32, where disk or memory are small")
    parser.add_argument("--work", type=Path, help="folder for model, rows and runs, kept; else a temporary one")
    parser.add_argument("--output", help="file for the results as JSON")
    options = parser.parse_args()
    if options.toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        import torch

        if not torch.cuda.is_available():
            print("error: no CUDA GPU is visible; check the benchmark itself on the CPU: --toy", file=sys.stderr)
            sys.exit(2)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        try:
            measure(options, work)
        except Failed as failure:
            print(f"error: {failure}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
