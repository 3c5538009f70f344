"""The final folder of a training: weights, tokenizer with its chat template, model card; and a merged model."""

import json
import shutil
from pathlib import Path

import jinja2
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from configs import chat, handover, hub, models
from configs.settings import say
from configs.text import cell, visible
from configs.training import ollama
from configs.training.runlog import RunLog
from configs.training.trainer import ExactTrainer


def save_final(trainer: ExactTrainer, name: str, dtype: torch.dtype | None, log: RunLog) -> None:
    """Write OUTPUT_DIR/`name`: the model, its tokenizer with the chat template, and a model card; all or nothing.

    Nothing in it is pickled. dtype: of the saved weights (full model: the source's), or None to save them as they are
    (an adapter). Collective: call it in every process.
    """
    model, tokenizer, output = trainer.model, trainer.processing_class, Path(trainer.args.output_dir)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = hub.model_path(log.head["model_name"])
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, chat.answer_end(tokenizer)})
    model.config.get_text_config().use_cache = True  # gradient checkpointing has switched it off, and answers need it
    if trainer.is_fsdp_enabled:  # the checkpoints were shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with handover.replacing(output) as new:
        trainer.save_model(str(new / name))  # gathers the shards of DeepSpeed; writes in the main process only
        if trainer.is_world_process_zero():
            (new / name / "training_args.bin").unlink(missing_ok=True)
            if dtype is not None:
                cast_folder(new / name, dtype)
            handover.write_text(new / name / "README.md", model_card(trainer, log, name))
            if dtype is not None:  # an adapter is no model
                ollama.write(new / name, tokenizer, type(trainer.accelerator.unwrap_model(model)).__name__)
    if trainer.is_world_process_zero():
        shutil.rmtree(output / "merged_model", ignore_errors=True)  # of the adapter before this one


def nll_per_token(model, rows: Dataset) -> float:
    """Sum of nll over sum of trained tokens, in nats, of rows with input_ids and labels; one row a pass."""
    total, tokens, device = 0.0, 0, next(model.parameters()).device
    model.eval()
    for row in rows:
        ids, labels = (torch.tensor([row[key]], device=device) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        kept = labels[0, 1:] != -100
        total += torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum").item()
        tokens += int(kept.sum())
    return total / tokens


def merge_adapter(trainer: ExactTrainer, settings, rows: Dataset, log: RunLog) -> None:
    """Write merged_model beside the adapter: the 16-bit base with the adapter added, for servers without PEFT.

    Never the 4-bit base: its rounded weights plus the adapter would be rounded again. The nll before and after stands
    in training_log.json: over 4 bits the adapter has also learned to mend the rounding, so the two differ a little.
    """
    if not trainer.is_world_process_zero():
        return
    rows = rows.select(range(min(32, len(rows))))
    before = nll_per_token(trainer.model, rows)
    output = Path(settings.OUTPUT_DIR)
    base = models.load(AutoModelForCausalLM, settings.MODEL_NAME, settings.MODEL_REVISION, dtype="auto")
    adapter = output / "final_lora_adapter"
    merged = models.load_adapter(base, str(adapter), "train again").merge_and_unload()
    merged.generation_config = trainer.model.generation_config
    with handover.replacing(output) as new:
        merged.save_pretrained(new / "merged_model")
        trainer.processing_class.save_pretrained(new / "merged_model")
        handover.write_text(new / "merged_model" / "README.md", model_card(trainer, log, "merged_model"))
        ollama.write(new / "merged_model", trainer.processing_class, type(merged).__name__)
    room = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * merged.get_memory_footprint()
    after = nll_per_token(merged.to(trainer.args.device) if room else merged.float().cpu(), rows)
    log.head["merge"] = {"rows": len(rows), "nll_before": before, "nll_after": after}
    say(f"merged: {output}/merged_model; nll on {len(rows)} rows {before:.4f} before and {after:.4f} after")


def model_card(trainer: ExactTrainer, log: RunLog, folder: str, on_hub: str = "", licence: str = "") -> str:
    """A model card: where the model comes from, what it was trained on and how, what came out, how to load it.

    folder: its name, which tells what it holds (final_lora_adapter, merged_model or final_model); on_hub: the name
    under which it is uploaded; licence: the base model's, as the Hub names it.
    """
    name, settings, rows = log.head["model_name"], log.head["settings"], log.head["data"]
    source, loss, lora = log.manifest["source"], trainer.state.best_metric, log.head["method"] == "lora"
    shown = ["LEARNING_RATE", "NUM_EPOCHS", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "MAX_LENGTH", "SEED"]
    shown += ["LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGET_MODULES", "USE_4BIT"] if lora else []
    kinds = {"final_lora_adapter": "LoRA adapter", "merged_model": "merged LoRA", "final_model": "fully fine-tuned"}
    template = Path(__file__).with_name("model_card.md.jinja").read_text("utf-8")
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    card = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return card.render(
        # a folder on this machine is not a Hub id, which is all that the card's metadata may name
        base_on_hub=hub.local_path(name) is None,
        base=code(name if hub.local_path(name) is None else Path(name).name),
        kind=kinds[folder],
        adapter=folder == "final_lora_adapter",
        four_bit=lora and settings["USE_4BIT"],
        dtype=dtype,
        folder=folder,
        on_hub=on_hub,
        licence=licence,
        data_on_hub=hub.is_hub_name(source),
        source=code(source if hub.local_path(source) is None else Path(source).name),
        loss="not measured" if loss is None else f"{loss:.4f} nats per token",
        settings={key: cell(settings[key]) for key in shown},
        **rows,
    )


def code(name: object) -> str:
    """A name for the card, on one line, between backticks and in a comment of its program: it ends neither."""
    return " ".join(visible(name).split()).replace("`", "'").replace("<", "(").replace(">", ")")


def cast_folder(folder: Path, dtype: torch.dtype) -> None:
    """Rewrite the float tensors of a saved model in another dtype, file by file, and say so in its config.json."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, path, metadata=metadata)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text("utf-8"))
        content["metadata"]["total_size"] = total
        handover.write_json(index, content)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    handover.write_json(folder / "config.json", config)
