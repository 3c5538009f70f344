"""Scores of a sweep's runs: nll of the test rows and of the general text, once each, kept beside the run."""

import gc
import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from configs import chat, device, models, state
from configs.evaluation.candidates import Candidate, HeldOut, load_tokenizers
from configs.evaluation.scoring import better_form, load_model, pieces, score
from configs.settings import command, fail

SCORES = "scores.npz"


def test_hash(held_out: HeldOut, general: list[str]) -> str:
    """What scores belong to: the test rows and the general text."""
    digest = hashlib.sha256("\n".join(row["id"] for row in held_out.rows).encode())
    for text in general:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def read(folder: Path, belongs: str) -> dict[str, np.ndarray] | None:
    """Scores that were kept, or None where there are none of these rows."""
    try:
        with np.load(folder / SCORES, allow_pickle=False) as kept:
            scores = {name: kept[name] for name in kept.files}
        return scores if str(scores.pop("belongs")) == belongs else None
    except (OSError, ValueError, KeyError):
        return None


def score_all(
    given: SimpleNamespace, runs: list[dict], held_out: HeldOut, general: list[str], prompt_format: str
) -> dict:
    """{"base" or a run's folder: {nll, tokens, general_nll, general_tokens}}; what was scored before is read again.

    given: sweep, model_name, model_revision, precision. runs: records of sweep.json that are done, with `method`.
    """
    belongs, root, found = test_hash(held_out, general), Path(given.sweep), {}
    settings = SimpleNamespace(MODEL_NAME=given.model_name, MODEL_REVISION=given.model_revision)
    candidates = [Candidate("base", "base", given.model_name)]
    for run in runs:
        log, final = state.training_log(run["folder"]), Path(run["folder"]) / state.final_folder(run["method"])
        if run["method"] == "lora":
            four_bit = log["settings"]["USE_4BIT"]
            candidates.append(Candidate(run["folder"], "lora", given.model_name, str(final), four_bit, log=log))
        else:
            candidates.append(Candidate(run["folder"], "full", str(final), log=log))
    folders = {c.label: root / "base" if c.label == "base" else Path(c.label) for c in candidates}
    for candidate in candidates:
        if (scores := read(folders[candidate.label], belongs)) is not None:
            found[candidate.label] = scores
    missing = [c for c in candidates if c.label not in found]
    if gone := [c for c in missing if c.label != "base" and not Path(c.own_folder).is_dir()]:
        fail(
            f"{gone[0].label} and {len(gone) - 1} more runs were scored on another test split or general text, and "
            "their weights were removed then; give the same --general_text, or sweep again: "
            f"{command('run_all.py', '--rerun')}"
        )
    dtype, loaded, model = device.scoring_precision(given.precision), None, None
    # those that share the base's weights stand together: the base itself, then LoRA over it, then LoRA over 4 bits
    for candidate in load_tokenizers(sorted(missing, key=lambda c: (c.folder, c.four_bit)), settings, prompt_format):
        if loaded != candidate.weights:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            bare = Candidate(candidate.label, "base", candidate.folder, four_bit=candidate.four_bit)
            model, loaded = load_model([bare], dtype, given.model_revision), candidate.weights
        acting = model
        if candidate.adapter:
            acting = models.load_adapter(model, candidate.adapter, candidate.remedy).eval()
        scores = score_one(candidate, acting, held_out, general)
        if candidate.adapter:
            model = acting.unload()
        folder = folders[candidate.label]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{SCORES}").open("wb") as file:
            np.savez(file, belongs=np.array(belongs), **scores)
        (folder / f".{SCORES}").replace(folder / SCORES)
        found[candidate.label] = scores
    return found


def score_one(candidate: Candidate, model, held_out: HeldOut, general: list[str]) -> dict[str, np.ndarray]:
    """nll and tokens of each test row and of each piece of the general text.

    A base, which no template was taught to, takes the better one of the chat template and a plain prompt.
    """
    tokenizer, name = candidate.tokenizer, Path(candidate.label).name
    encoded = [chat.encode(tokenizer, row["prompt"], row["completion"]) for row in held_out.rows]
    # the answer's text alone: the token that ends it is the template's, which the base was never shown
    pairs, form = [(context, answer[:-1]) for context, answer in encoded], "chat"
    if candidate.log is None:
        form = better_form(model, tokenizer, held_out.validation or held_out.rows, None, name)
    if form == "plain":
        plain = [chat.plain_prompt(tokenizer, row["prompt"]) for row in held_out.rows]
        pairs = [(context, answer) for context, (_, answer) in zip(plain, pairs, strict=True)]
    scores = {
        "nll": score(model, pairs, None, f"{name}, {form} prompt"),
        "tokens": np.array([len(answer) for _, answer in pairs]),
    }
    if general:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        texts, _ = pieces(tokenizer, general)
        scores["general_nll"] = score(model, [([first], ids) for ids in texts], None, f"{name}, general text")
        scores["general_tokens"] = np.array([len(ids) for ids in texts])
    return scores
