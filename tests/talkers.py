"""Three tiny models that say something, in the folders where step 4 looks for them: made here, without a training."""

import json
from pathlib import Path

SETTINGS = {
    "SEED": 42,
    "NUM_EPOCHS": 1,
    "MAX_STEPS": None,
    "MAX_LENGTH": 512,
    "MAX_TRAIN_SAMPLES": None,
    "WARMUP_RATIO": 0.1,
    "LEARNING_RATE": 1e-3,
    "BATCH_SIZE": 2,
    "GRADIENT_ACCUMULATION_STEPS": 2,
}


def write_log(folder: Path, manifest_sha256: str) -> None:
    """A training_log.json that holds all that the comparison asks for."""
    summary = {"status": "done", "steps": 4, "epochs": 1.0, "train_runtime_s": 1.0, "tokens": 1000}
    summary |= {"tokens_per_second": 1000.0, "peak_memory_bytes": 10**8}
    log = {"model_name": "model", "history": [], "settings": SETTINGS | {"USE_4BIT": False}, "summary": summary}
    log |= {"parameters": {"trainable": 100}, "environment": {"processes": 1}}
    log |= {"data": {"manifest_sha256": manifest_sha256, "train_rows": 100}}
    (folder / "training_log.json").write_text(json.dumps(log), "utf-8")


def make_talkers(work: Path, manifest_sha256: str = "0") -> Path:
    """Write a base (work/model), LoRA and full models whose greedy answers differ; the base's folder.

    A tiny model with random weights says one token without a text for ever: that is its head's bias, which is taken
    away, and a token that ends an answer is made unlikely.
    """
    import torch
    from hub import tiny_phi
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from configs import chat

    def load(folder: Path):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.bias.zero_()
            model.lm_head.bias[len(AutoTokenizer.from_pretrained(folder)) - 1 :] = -1e4
        return model

    base = tiny_phi(work / "model")
    load(base).save_pretrained(base)
    taught = chat.load_tokenizer(str(base), None, "auto")

    final = work / "outputs/full_model/final_model"
    other = tiny_phi(work / "other", seed=7)
    load(other).save_pretrained(final)
    taught.save_pretrained(final)
    write_log(final.parent, manifest_sha256)

    final = work / "outputs/lora_model/final_lora_adapter"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(load(base), config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(final)
    taught.save_pretrained(final)
    write_log(final.parent, manifest_sha256)
    return base
