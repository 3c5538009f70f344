"""Scripts 2 and 3 against `trl sft` on a CPU: tokens per second, held-out loss, share of the matrix limit.

    python tests/benchmarks/training.py
    python tests/benchmarks/training.py --model my_model --rows my_rows.jsonl --pairs 5 --output training.json
    python tests/benchmarks/training.py --toy

Without --model and --rows: the base model and the rows of the demo. --toy runs everything once on a tiny model, in
two minutes, and its numbers say nothing about speed.

Equal work. Step 1 prepares the rows, and its first TRAIN_ROWS rows are trained by both programs, with the same number
of rows an optimizer step, epochs, learning rate, schedule, warm-up, weight decay, clipping, precision (bf16 where the
CPU has it) and LoRA configuration, over a base that is not quantised. The number of steps must come out equal.
Evaluation and saving are off during the training, and loading is not counted. Everything else is each program's own:
micro-batches (`trl sft`: 8 rows a pass), the order of the rows, gradient checkpointing (`trl sft`: on; here: where
memory is short), the dtype of the frozen base (`trl sft`: fp32 under autocast). A pair is one run of ours and two of
`trl sft` with one seed: as its launcher starts it on a CPU, with one thread, and with all threads (OMP_NUM_THREADS).
The ratio of a pair is ours by the better of the two. Pairs come one after another, each with the next seed, and every
other pair begins with `trl sft`.

Same tokens. `trl sft` gets the rows as conversations in its columns `prompt` and `completion`, and a copy of the model
whose tokenizer has our chat template. Before anything is measured, its own script prepares them, and every row's
input_ids and labels must equal those of token_rows. Where they do not (a template that goes on behind the end of the
answer, or an answer whose first letter merges with the prompt), `trl sft` gets input_ids and labels instead, and these
are compared as well. The result says which way was taken (`rows_as`).

What is counted. Tokens per second are tokens without padding, over the seconds of training alone: training_log.json's
tokens_per_second, and the tokens of the rows times epochs over TRL's train_runtime. Held-out loss is the sum of nll
over the sum of answer tokens of the validation rows, computed in fp32 by `held_out_nll` for every model; where the two
runs of `trl sft` differ, the lower one counts. Operations are those of the weights in matrix products:

    k x (body + head x trained / tokens) a token

`body` are the weights of all linear layers but the head, `head` those of the head, which only trained positions need;
k is 6 for full fine-tuning (2 forward, 4 backward) and 4 for LoRA, where no frozen weight needs a gradient. Products
inside attention and LoRA's own small matrices are not counted. The limit is the fastest torch.mm of this machine in
the same dtype, measured in the same run, before every pair.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")  # nothing is fetched, and a CPU computes

import torch
from datasets import Dataset, disable_progress_bars
from hub import finance_rows, tiny_phi
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from configs import chat, device, handover
from configs.training.trainer import token_rows
from configs.values import as_text, read_constants

SCRIPTS = {"lora": "2_lora_finetuning.py", "full": "3_full_finetuning.py"}
FINAL = {"lora": "final_lora_adapter", "full": "final_model"}
OPERATIONS = {"lora": 4, "full": 6}  # a weight and token
SPEED_GOALS = {"lora": 4.0, "full": 3.0}  # times the tokens per second of the better `trl sft`
LOSS_GOAL = 0.2  # percent that the held-out nll may be above that of `trl sft`
LIMIT_GOAL = 45.0  # percent of the fastest matrix product
THREADS = os.cpu_count() or 1
WAYS = {"ours": "ours", "trl_default": "trl sft, 1 thread", "trl_all_threads": f"trl sft, {THREADS} threads"}
TRL_BATCH = 8  # rows a pass: TRL's default
NEVER = 1_000_000  # steps between two evaluations or checkpoints
SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096)]  # rows, inner, columns of a matrix product

# what `trl sft` trains on: its own script, up to where it would start, writes each row as its collator gives it
PREPARED_BY_TRL = """
import json, sys, trl
from trl.scripts import sft
class Prepared(trl.SFTTrainer):
    def train(self, **kwargs):
        batches = [self.data_collator([row]) for row in self.train_dataset]
        rows = [[batch[key][0].tolist() for key in ("input_ids", "labels")] for batch in batches]
        with open(sys.argv[1], "w") as file:
            json.dump(rows, file)
        sys.exit()
trl.SFTTrainer = Prepared
sft.main(*sft.make_parser().parse_args_and_config(sys.argv[2:], fail_with_unknown_args=False))
"""


@dataclass(frozen=True)
class Work:
    """What is trained, in a folder that holds data/ (from step 1), model/ and rows/ (for `trl sft`)."""

    folder: Path
    model: Path  # the base model as the scripts read it
    max_length: int
    precision: str  # bf16 or fp32
    train: Dataset  # with input_ids, labels, length, trained
    validation: Dataset
    epochs: int

    @property
    def tokens(self) -> int:
        """Tokens of all epochs, without padding."""
        return self.epochs * sum(self.train["length"])

    @property
    def trained(self) -> int:
        """Those of them that have a label."""
        return self.epochs * sum(self.train["trained"])


# --- the two programs


def start(command: list, cwd: Path, **variables: str) -> tuple[str, str]:
    """What a command writes to stdout and to stderr; AssertionError with its last words where it fails.

    It runs as in a fresh shell: no number of threads is set, and no `accelerate config` of this user is read.
    """
    unset = re.compile(r"ACCELERATE_|OMP_|MKL_|TQDM_")
    env = {key: value for key, value in os.environ.items() if not unset.match(key)}
    env |= {"HF_HOME": str(cwd / "hub"), "HF_DATASETS_CACHE": str(cwd / "hub"), **variables}
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    last = f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert result.returncode == 0, f"exit code {result.returncode}: {last}"
    return result.stdout, result.stderr


def settings_of(method: str, options, work: Work) -> dict:
    """The settings that both programs share: a script's constants, and what this benchmark changes."""
    settings = {name: constant.default for name, constant in read_constants(ROOT / SCRIPTS[method]).items()}
    rows = max(n for n in range(1, settings["BATCH_SIZE"] + 1) if options.batch % n == 0)
    return settings | {
        "MAX_LENGTH": work.max_length,
        "MAX_TRAIN_SAMPLES": options.train_rows,
        "NUM_EPOCHS": options.epochs,
        "LEARNING_RATE": options.learning_rates[method],
        "BATCH_SIZE": rows,
        "GRADIENT_ACCUMULATION_STEPS": options.batch // rows,
        "PRECISION": work.precision,
        "USE_4BIT": False,
    }


def our_command(method: str, options, work: Work, output: Path, seed: int) -> list[str]:
    """The command line of script 2 or 3. One validation row, because the scripts want one."""
    settings = settings_of(method, options, work)
    names = "MAX_LENGTH MAX_TRAIN_SAMPLES NUM_EPOCHS LEARNING_RATE BATCH_SIZE GRADIENT_ACCUMULATION_STEPS PRECISION"
    flags = {name: settings[name] for name in names.split() + ["USE_4BIT"] * (method == "lora")}
    flags |= {"MODEL_NAME": str(work.model), "OUTPUT_DIR": str(output), "SEED": seed, "RESUME": False}
    flags |= {"MAX_EVAL_SAMPLES": 1, "EVAL_STEPS": NEVER, "SAVE_STEPS": NEVER, "REPORT_TO": "none"}
    words = [word for name, value in flags.items() for word in (f"--{name.lower()}", as_text(value))]
    return [sys.executable, str(ROOT / SCRIPTS[method]), *words, *shlex.split(options.our_flags)]


def trl_flags(method: str, options, work: Work, output: Path, seed: int) -> list[str]:
    """The flags of `trl sft` that ask for the same training."""
    settings = settings_of(method, options, work)
    rows = TRL_BATCH if options.batch % TRL_BATCH == 0 else options.batch
    flags = {
        "model_name_or_path": work.folder / "model",
        "dataset_name": work.folder / "rows",
        "output_dir": output,
        "max_length": settings["MAX_LENGTH"],
        "num_train_epochs": settings["NUM_EPOCHS"],
        "learning_rate": settings["LEARNING_RATE"],
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": options.batch // rows,
        "lr_scheduler_type": settings["LR_SCHEDULER"],
        "warmup_steps": settings["WARMUP_RATIO"],
        "weight_decay": settings["WEIGHT_DECAY"],
        "max_grad_norm": settings["MAX_GRAD_NORM"],
        "bf16": settings["PRECISION"] == "bf16",
        "seed": seed,
        "use_cpu": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if method == "lora":
        targets = settings["LORA_TARGET_MODULES"]
        words += ["--use_peft", "--lora_target_modules", *([targets] if isinstance(targets, str) else targets)]
        for name in ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
            words += [f"--{name}", str(settings[name.upper()])]
    return words + shlex.split(options.trl_flags)


def run_once(way: str, method: str, pair: int, options, work: Work) -> dict:
    """One training: its command, steps, tokens, seconds, tokens per second, and the held-out nll of its model."""
    output, seed, began = work.folder / "run", options.seed + pair, time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    notes = {}
    if way == "ours":
        command, folder = our_command(method, options, work, output, seed), output / FINAL[method]
        start(command, work.folder)
        log = json.loads((output / "training_log.json").read_text("utf-8"))
        summary, notes = log["summary"], {"plan": log["plan"]}
        steps, tokens, seconds = (summary[key] for key in ("steps", "tokens", "train_runtime_s"))
        speed, best = summary["tokens_per_second"], summary["best_checkpoint"]
        assert summary["status"] == "done" and tokens == work.tokens, summary
        assert best is None or best.endswith(f"-{steps}"), f"the model of {best} was saved, not that of the last step"
    else:
        flags, folder = trl_flags(method, options, work, output, seed), output
        command = [str(Path(sys.executable).with_name("trl")), "sft", *flags]
        threads = {"OMP_NUM_THREADS": str(THREADS)} if way == "trl_all_threads" else {}
        stdout, stderr = start(command, work.folder, **threads)
        # floats are printed with four digits
        final = ast.literal_eval(re.findall(r"^\{'train_runtime'.*\}$", stdout, re.MULTILINE)[-1])
        tokens, seconds = work.tokens, float(final["train_runtime"])
        # the count is in the last record of the loss, which is this one only where the run ends between two records
        counted = float(re.findall(r"'num_tokens': '?([\d.e+]+)", stdout)[-1])
        assert abs(counted / tokens - 1) < 1e-3, (counted, tokens)
        # the training's progress bar is the one without a description
        done, planned = map(int, re.findall(r"^ *\d+%\|[^|]*\| (\d+)/(\d+) \[", stderr, re.MULTILINE)[-1])
        assert done == planned, f"step {done} of {planned}"
        steps, speed = done, tokens / seconds
    wall = time.monotonic() - began
    nll = held_out_nll(folder, work)
    shutil.rmtree(output)
    print(f"pair {pair + 1}, {method}, {WAYS[way]}: {speed:,.0f} tokens/s, {steps} steps, {nll:.4f}", flush=True)
    numbers = {"steps": steps, "tokens": tokens, "seconds": seconds, "tokens_per_second": speed, "nll": nll}
    return {
        "pair": pair + 1,
        "way": way,
        "seed": seed,
        **numbers,
        "wall_s": wall,
        "command": shlex.join(command),
        **notes,
    }


def held_out_nll(folder: Path, work: Work) -> float:
    """Sum of nll over sum of answer tokens of the validation rows, in nats, in fp32; folder: a model or an adapter."""
    adapter = (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(work.model if adapter else folder, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, folder) if adapter else model).eval()
    nll, tokens = 0.0, 0
    for row in work.validation:
        labels = torch.tensor(row["labels"][1:])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return nll / tokens


# --- what both are given


def prepare(options, folder: Path) -> Work:
    """Make the model where none is given, the data with step 1, and the model's copy for `trl sft`."""
    model, rows = options.model, options.rows
    if options.toy:
        model, rows = tiny_phi(folder / "tiny"), folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in finance_rows(80)), "utf-8")
    elif not model:
        start([sys.executable, ROOT / "configs/demo/base_model.py"], folder)
        model = folder / "outputs/demo_base_model"
    length = min(1024, chat.positions(AutoConfig.from_pretrained(model)))
    flags = ["--dataset_name", rows, "--model_name", model, "--max_length", length, "--eval_fraction", 0.2]
    start([sys.executable, ROOT / "1_prepare_dataset.py", *flags], folder)
    tokenizer = chat.load_tokenizer(str(model), None, "auto")
    train, validation = (
        token_rows(str(folder / "data"), part, limit, tokenizer, length, 0.0)
        for part, limit in (("train", options.train_rows), ("validation", None))
    )
    assert len(train) == options.train_rows, f"there are {len(train)} rows to train on: --train_rows {len(train)}"
    (folder / "model").mkdir()
    for path in model.iterdir():
        if path.is_file():  # without its mode: the original may be read-only
            shutil.copyfile(path, folder / "model" / path.name)
    tokenizer.save_pretrained(folder / "model")  # with the chat template
    dtype, _ = device.precision("auto")
    precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return Work(folder, model, length, precision, train, validation, options.epochs)


def give_rows(options, work: Work) -> str:
    """Write the rows for `trl sft` and see that it trains our tokens; returns how they are given."""
    conversations = handover.load_split(str(work.folder / "data"), "train").select(range(len(work.train)))
    forms = {
        "conversations": conversations.select_columns(["prompt", "completion"]),
        "tokens": work.train.select_columns(["input_ids", "labels"]),
    }
    ours = [[row["input_ids"], row["labels"]] for row in work.train]
    (work.folder / "rows").mkdir()
    for form, rows in forms.items():
        rows.to_json(work.folder / "rows/train.jsonl")
        flags = trl_flags(options.methods[0], options, work, work.folder / "run", options.seed)
        start([sys.executable, "-c", PREPARED_BY_TRL, work.folder / "prepared.json", *flags], work.folder)
        theirs = json.loads((work.folder / "prepared.json").read_text("utf-8"))
        if theirs == ours:
            return form
        unequal = len(ours) - sum(a == b for a, b in zip(ours, theirs, strict=False))
        print(f"given as {form}, trl sft would train other tokens in {unequal} of {len(ours)} rows", flush=True)
    raise AssertionError("trl sft would not train the same tokens")


# --- the limit


def fastest_product(precision: str, shapes: list) -> dict:
    """The fastest of a few matrix products: {gflops, shape, threads}."""
    dtype, measured = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision], []
    for threads in {1, THREADS}:
        torch.set_num_threads(threads)
        for rows, inner, columns in shapes:
            a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
            seconds = []
            for _ in range(6):  # the first one prepares the kernel
                began = time.perf_counter()
                torch.mm(a, b)
                seconds.append(time.perf_counter() - began)
            gflops = 2 * rows * inner * columns / min(seconds) / 1e9
            measured.append({"gflops": gflops, "shape": [rows, inner, columns], "threads": threads})
    torch.set_num_threads(1)
    return max(measured, key=lambda product: product["gflops"])


def weights_in_products(folder: Path) -> tuple[int, int]:
    """(weights of the linear layers but the head, weights of the head)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return sum(layer.weight.numel() for layer in layers), head.weight.numel()


# --- results


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(method: str, runs: list[dict], limit: float, per_token: float, options) -> dict:
    """The numbers of one method over all pairs, and whether its goals are met (None for a toy).

    limit: GFLOP/s of the fastest product; per_token: operations.
    """
    by_way = {way: [run for run in runs if run["way"] == way] for way in WAYS}
    assert len({run["steps"] for run in runs}) == 1, [(run["way"], run["steps"]) for run in runs]
    pairs = list(zip(*by_way.values(), strict=True))
    ratios = [us["tokens_per_second"] / max(run["tokens_per_second"] for run in trl) for us, *trl in pairs]
    losses = [100 * (us["nll"] / min(run["nll"] for run in trl) - 1) for us, *trl in pairs]
    gflops = [per_token * run["tokens_per_second"] / 1e9 for run in by_way["ours"]]
    percent = spread([100 * value / limit for value in gflops])
    ratio, loss = spread(ratios), spread(losses)
    goals = {
        f"tokens per second >= {SPEED_GOALS[method]:g} x": ratio["median"] >= SPEED_GOALS[method],
        f"held-out nll <= {LOSS_GOAL:+g} %": loss["median"] <= LOSS_GOAL,
        f"share of the matrix limit >= {LIMIT_GOAL:g} %": percent["median"] >= LIMIT_GOAL,
    }
    return {
        "learning_rate": options.learning_rates[method],
        "steps": {way: each[0]["steps"] for way, each in by_way.items()},
        "tokens_per_second": {way: spread([run["tokens_per_second"] for run in each]) for way, each in by_way.items()},
        "ratio": {**ratio, "pairs": ratios},
        "nll": {way: spread([run["nll"] for run in each]) for way, each in by_way.items()},
        "nll_percent": {**loss, "pairs": losses},
        "matrix": {
            "operations_per_token": per_token,
            "gflops": spread(gflops),
            "limit_gflops": limit,
            "percent": percent,
        },
        "goals": {goal: None if options.toy else met for goal, met in goals.items()},
        "runs": runs,
    }


def table(result: dict) -> str:
    """The result for people."""
    data, limit, lines = result["data"], result["matrix_product"], []
    if result["toy"]:
        lines.append("TOY: everything was run, on a tiny model; these numbers say nothing about speed or quality")
    lines.append(
        f"{data['train_rows']} rows, {data['tokens']:,} tokens, {data['trained']:,} of them trained, given to trl sft "
        f"as {data['rows_as']}; {data['validation_rows']} validation rows; held-out nll before: {data['base_nll']:.4f}"
    )
    shape = " x ".join(map(str, limit["shape"]))
    lines.append(f"limit: {limit['gflops']:.0f} GFLOP/s ({limit['dtype']}, {shape}, threads: {limit['threads']})")
    for method, numbers in result["methods"].items():
        lines += ["", f"{method:24} {'tokens/s, median (range)':>28} {'held-out nll (range)':>28} {'steps':>6}"]
        for way, name in WAYS.items():
            speed, nll = numbers["tokens_per_second"][way], numbers["nll"][way]
            speed = f"{speed['median']:,.0f} ({speed['low']:,.0f} to {speed['high']:,.0f})"
            nll = f"{nll['median']:.4f} ({nll['low']:.4f} to {nll['high']:.4f})"
            lines.append(f"  {name:22} {speed:>28} {nll:>28} {numbers['steps'][way]:6}")
        matrix, speed_goal, loss_goal, limit_goal = numbers["matrix"], *numbers["goals"].items()
        judged = {True: "met", False: "missed", None: "not judged (toy)"}
        for text, digits, unit, (goal, met) in (
            ("ours / the better trl sft", numbers["ratio"], " x", speed_goal),
            ("held-out nll, ours against trl sft", numbers["nll_percent"], " %", loss_goal),
            ("share of the matrix limit", matrix["percent"], " %", limit_goal),
        ):
            values = f"{digits['median']:.2f}{unit} ({digits['low']:.2f} to {digits['high']:.2f})"
            lines.append(f"  {text:36} {values:28} goal: {goal}: {judged[met]}")
        lines.append(
            f"  counted: {matrix['operations_per_token'] / 1e6:.1f} million operations a token: "
            f"{matrix['gflops']['median']:.1f} of {matrix['limit_gflops']:.1f} GFLOP/s"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line, checked and filled up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a base model; without it: the demo's, made here")
    parser.add_argument("--rows", type=Path, help="file of instruction rows; without it: the demo's")
    parser.add_argument("--train_rows", type=int, default=320, help="rows that are trained")
    parser.add_argument("--batch", type=int, default=16, help="rows an optimizer step")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the rows")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each program, in turns")
    parser.add_argument("--methods", default="lora,full", help="lora, full, or both")
    parser.add_argument("--learning_rates", default="", help="e.g. lora=2e-3,full=5e-4 (the defaults)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first pair; the next has the next one")
    parser.add_argument("--our_flags", default="", help="more flags for scripts 2 and 3, in one word")
    parser.add_argument("--trl_flags", default="", help="more flags for trl sft, in one word")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers; renewed after every pair")
    parser.add_argument("--toy", action="store_true", help="one pair on a tiny model: does everything run?")
    options = parser.parse_args()
    options.methods = options.methods.split(",")
    rates = dict(pair.split("=") for pair in options.learning_rates.split(",") if pair)
    if unknown := {*options.methods, *rates} - set(SCRIPTS):
        parser.error(f"{', '.join(sorted(unknown))}: methods are lora and full")
    options.learning_rates = {"lora": 2e-3, "full": 5e-4} | {method: float(rate) for method, rate in rates.items()}
    if options.toy:
        options.train_rows, options.batch, options.epochs, options.pairs = 32, 8, 1, 1
    options.rows = (options.rows or ROOT / "configs/demo/finance_qa.jsonl").resolve()
    options.model = options.model and options.model.resolve()
    return options


def main() -> None:
    options = arguments()
    disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # for scoring: on a busy machine, two threads wait for each other ten times as long
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(options, Path(folder).resolve())
        body, head = weights_in_products(work.model)
        data = {
            "train_rows": len(work.train),
            "tokens": work.tokens,
            "trained": work.trained,
            "rows_as": give_rows(options, work),
            "validation_rows": len(work.validation),
            "base_nll": held_out_nll(work.model, work),
            "weights": {"body": body, "head": head},
        }
        per_weight = body + head * work.trained / work.tokens
        products, runs = [], {method: [] for method in options.methods}
        for pair in range(options.pairs):
            products.append(fastest_product(work.precision, SHAPES[:1] if options.toy else SHAPES))
            for method in options.methods:
                for way in list(WAYS) if pair % 2 == 0 else reversed(WAYS):
                    runs[method].append(run_once(way, method, pair, options, work))
            best = max(products, key=lambda product: product["gflops"])
            result = {
                "toy": options.toy,
                "pairs": pair + 1,
                "options": vars(options),
                "environment": device.environment(),
                "data": data,
                "matrix_product": {**best, "dtype": work.precision, "before_each_pair": products},
                "methods": {
                    method: summarise(method, runs[method], best["gflops"], OPERATIONS[method] * per_weight, options)
                    for method in runs
                },
            }
            if options.output:
                options.output.write_text(json.dumps(result, indent=1, default=str) + "\n", "utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
