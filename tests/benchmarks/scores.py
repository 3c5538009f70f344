"""Step 4's scoring against lm-evaluation-harness, and its answers against a loop over single prompts.

    python tests/benchmarks/scores.py
    python tests/benchmarks/scores.py --model_name my_model --rows outputs/evaluation_examples.jsonl

Without --model_name: a Phi model of 6 layers and 256 units with phi-2's vocabulary of 51,200 and random weights, and
the rows of configs/demo in ChatML. Everything runs in one process, in turns, on the same weights and token ids; tokens
per second count each row's tokens once, padding not at all. The harness runs at its default batch size (1), at others,
and at "auto". The nll of every row must agree to 1e-4 (relative).
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CPU computes; gpu.py uses the functions below on a GPU

import torch
from hub import tiny_phi
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, GenerationConfig, PhiConfig

from configs import chat
from configs.evaluation import scoring


def random_phi() -> torch.nn.Module:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=51200,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config)


def demo_rows(tokenizer, number: int) -> list[tuple[list[int], list[int]]]:
    lines = (ROOT / "configs/demo/finance_qa.jsonl").read_text("utf-8").splitlines()
    found = []
    for row in map(json.loads, lines[:: max(len(lines) // number, 1)][:number]):
        question = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
        turns = [{"role": "user", "content": question}], [{"role": "assistant", "content": row["output"]}]
        found.append(chat.encode(tokenizer, *turns))
    return found


def timed(work) -> tuple[float, object]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def scoring_speeds(model, tokenizer, rows: list, repeats: int, sizes: tuple, tolerance: float) -> dict[str, dict]:
    """Tokens per second of this project and of the harness at its batch sizes, in turns, on the same rows.

    Returns name -> {tokens_per_second: one number a repeat, nll_differs: relative, of the worst row}. Raises:
    AssertionError where a row's nll differs by more than `tolerance`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokens = sum(len(x) + len(y) for x, y in rows)
    ways = {"this project": lambda part: scoring.score(model, part, None, "rows")}
    for size in sizes:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=2048)
        ways[f"lm-evaluation-harness, batch size {size}"] = lambda part, h=harness: [
            -nll for nll, _ in h._loglikelihood_tokens([(None, x, y) for x, y in part], disable_tqdm=True)
        ]
    speeds, nlls = {name: [] for name in ways}, {}
    for name, way in ways.items():
        if not name.endswith("auto"):
            way(rows[:4])  # what is loaded at the first use is not measured
    for repeat in range(repeats):
        for name, way in ways.items():
            if repeat and name.endswith("auto"):
                continue  # minutes on a CPU: once is enough
            seconds, nlls[name] = timed(lambda way=way: way(rows))
            speeds[name].append(tokens / seconds)
    results = {}
    for name in ways:
        worst = max(abs(x - y) / abs(y) for x, y in zip(nlls["this project"], nlls[name], strict=True))
        assert worst < tolerance, (name, worst)
        results[name] = {"tokens_per_second": speeds[name], "nll_differs": worst}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", help="folder of a model; without it: random weights")
    parser.add_argument("--rows", help="evaluation_examples.jsonl of a run; without it: the demo's rows")
    parser.add_argument("--number", type=int, default=150, help="rows that are scored")
    parser.add_argument("--prompts", type=int, default=48, help="prompts that are answered")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as work:
        folder = a.model_name or tiny_phi(Path(work) / "tiny")
        tokenizer = chat.load_tokenizer(str(folder), None, "auto")
    model = AutoModelForCausalLM.from_pretrained(a.model_name) if a.model_name else random_phi()
    model = model.float().eval()
    model.generation_config = GenerationConfig()
    if a.rows:
        records = map(json.loads, Path(a.rows).read_text("utf-8").splitlines())
        rows = [(r["context_ids"], r["continuation_ids"]) for r in records if "nll" in r][: a.number]
    else:
        rows = demo_rows(tokenizer, a.number)
    tokens = sum(len(x) + len(y) for x, y in rows)
    answers = sum(len(y) for _, y in rows)
    print(f"{len(rows)} rows, {tokens} tokens, {answers} of answers; vocabulary {model.config.vocab_size};")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32")

    # --- scoring
    ways = scoring_speeds(model, tokenizer, rows, a.repeats, (1, 4, 16, "auto"), 1e-4)
    own = statistics.median(ways["this project"]["tokens_per_second"])
    for name, way in ways.items():
        middle = statistics.median(way["tokens_per_second"])
        some = ", ".join(f"{v:.0f}" for v in way["tokens_per_second"])
        print(
            f"{name:44} {middle:8.0f} tokens/s ({some}); this / that: {own / middle:.2f}; "
            f"nll differs by {way['nll_differs']:.1e} at most"
        )

    # --- answers
    prompts, ends = [x for x, _ in rows[: a.prompts]], [tokenizer.eos_token_id]

    @torch.inference_mode()
    def one_by_one() -> list[list[int]]:
        how = {"max_new_tokens": a.new_tokens, "do_sample": False, "eos_token_id": ends}
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=ends[0], **how)
            found.append(output[0, len(prompt) :].tolist())
        return found

    loop, batch = [], []
    for _ in range(a.repeats):
        seconds, alone = timed(one_by_one)
        loop.append(seconds)
        seconds, together = timed(
            lambda: scoring.answer(model, tokenizer, prompts, ends, a.new_tokens, None, "prompts")
        )
        batch.append(seconds)
    texts = [tokenizer.decode([t for t in x if t not in ends], skip_special_tokens=True).strip() for x in alone]
    same = sum(x == y["answer"] for x, y in zip(texts, together, strict=True))
    one, all_ = statistics.median(loop), statistics.median(batch)
    print(
        f"{len(prompts)} answers of up to {a.new_tokens} tokens: one by one {one:.1f} s, together {all_:.1f} s: "
        f"{one / all_:.2f} x; {same} of {len(prompts)} are the same text"
    )


if __name__ == "__main__":
    main()
