"""What makes a comparison unfair or too weak: notes that warn, and stand in the report.

What withholds the verdict is unsound() in candidates.py, and what withholds a judge's is judged() in judge.py.
"""

import math

import torch

from configs.evaluation.report import Note
from configs.handover import EVALUATE
from configs.settings import command


def fairness(
    logs: dict[str, dict], test_rows: int, settings, cut: dict[str, int], questions: int, prompts: int
) -> list[Note]:
    """What makes the comparison unfair or too weak, as notes for the report.

    logs: of the trained models, by method. cut: answers per trained model that did not end by themselves. questions:
    effective number of different ones among the test rows; prompts: number of test prompts.
    """
    notes: list[Note] = []
    # a sign-flip test of n groups cannot go below 2 / 2**n, which Holm multiplies by up to 3
    if questions < 8:
        notes.append(("too_few_rows", {"rows": test_rows, "groups": questions}))
    elif questions < 100:
        notes.append(("few_rows", {"rows": test_rows, "groups": questions}))
    if prompts < 30:
        notes.append(("few_prompts", {"prompts": prompts}))
    for name, number in cut.items():
        if number:
            notes.append(("cut", {"number": number, "name": name, "cap": settings.MAX_NEW_TOKENS}))
    for name, log in logs.items():
        steps, epochs, own = log["summary"]["steps"], log["summary"]["epochs"], log["settings"]
        # MAX_STEPS shortens the schedule, and its warm-up with it
        planned = own["MAX_STEPS"] or max(round(steps / max(epochs, 1e-9) * own["NUM_EPOCHS"]), 1)
        if steps <= math.ceil(planned * own["WARMUP_RATIO"]):
            notes.append(("warm_up", {"name": name, "steps": steps}))
        records = [r for r in log["history"] if isinstance(r, dict)]
        losses = [r["eval_loss"] for r in records if isinstance(r.get("eval_loss"), float)]
        if len(losses) > 2 and losses[-1] < 0.99 * losses[-2]:
            notes.append(("still_falling", {"name": name, "fell": 1 - losses[-1] / losses[-2]}))
    if len(logs) < 2:
        return notes
    lora, full = logs["lora"], logs["full"]
    for key in ("SEED", "NUM_EPOCHS", "MAX_STEPS", "MAX_LENGTH", "MAX_TRAIN_SAMPLES"):
        if lora["settings"][key] != full["settings"][key]:
            notes.append(("differ", {"what": key, "lora": lora["settings"][key], "full": full["settings"][key]}))
    batches = {
        name: log["settings"]["BATCH_SIZE"] * log["settings"]["GRADIENT_ACCUMULATION_STEPS"]
        for name, log in logs.items()
    }
    if batches["lora"] != batches["full"]:
        notes.append(("rows_per_step", batches))
    ratio = lora["settings"]["LEARNING_RATE"] / full["settings"]["LEARNING_RATE"]
    if not 3 <= ratio <= 30:
        notes.append(("rate_ratio", {"ratio": ratio, "command": command("run_all.py", "--sweep")}))
    rows = [log.get("identity", {}).get("train_rows", log["data"]["manifest_sha256"]) for log in (lora, full)]
    if rows[0] != rows[1]:
        notes.append(("different_data", {}))
    if lora["data"]["train_rows"] != full["data"]["train_rows"]:
        notes.append(("train_rows", {name: log["data"]["train_rows"] for name, log in logs.items()}))
    return notes


# By how much the rounding of 16 bits may change a model's nll, in nats per token: a smaller difference says nothing.
# bf16 changed that of the demo's models and of small-phi by 0.0001 on average and 0.0004 at most, fp16 by 0.00003 at
# most (against fp32 on a CPU). Larger models have larger logits. bf16 rounds those above 16 to steps of 1/8 and those
# above 32 to steps of 1/4; small-phi's logits, shifted to there, gave an nll too high by 0.0006 and 0.0026.
ROUNDING = {torch.bfloat16: 0.002, torch.float16: 0.00025}


def rounding(dtype: torch.dtype, comparisons: list[dict]) -> list[Note]:
    """A note on the differences of nll that are no larger than the error of scoring in `dtype`; fp32 has none."""
    error = ROUNDING.get(dtype, 0)
    small = [c for c in comparisons if c["metric"] == "nll_per_token" and error and abs(c["difference"]) <= error]
    if not small:
        return []
    pairs = ", ".join(f"{c['a']} - {c['b']} = {c['difference']:+.5f}" for c in small)
    name, again = str(dtype).removeprefix("torch."), command(EVALUATE, "--precision", "fp32")
    return [("rounding", {"dtype": name, "error": error, "pairs": pairs, "command": again})]
