"""What there is to compare: the models on this machine with their logs, and the rows that they are tested on."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from transformers.utils import CHAT_TEMPLATE_FILE

from configs import chat, handover, hub, models, state
from configs.evaluation import gguf
from configs.evaluation.report import Note, load_words, sentence
from configs.handover import FULL, LORA, PREPARE
from configs.preparation.questions import question_groups
from configs.settings import command, fail
from configs.text import quoted

# method -> the script that trains it, and the folder that it leaves in its OUTPUT_DIR
TRAINED = {"lora": (LORA, "final_lora_adapter"), "full": (FULL, "final_model")}


@dataclass(frozen=True)
class Candidate:
    """A model that is measured.

    label: its name in the results, unique. method: "base", "lora", "full", "merged" (LoRA's merged_model) or "other"
    (one of CANDIDATES). folder: a folder or Hub name with its weights, or a GGUF; LoRA's are the base's. adapter: the
    folder of LoRA itself. four_bit: whether the weights are held in 4 bits. tokenizer: with the chat template that the
    model was trained with. log: training_log.json, None for a base.
    """

    label: str
    method: str
    folder: str
    adapter: str | None = None
    four_bit: bool = False
    tokenizer: object = None
    log: dict | None = None

    @property
    def weights(self) -> tuple[str, bool]:
        """Candidates with the same weights are served by one copy in memory."""
        # a second adapter would lie over LoRA's
        return f"{self.folder} {self.adapter}" if self.method == "other" else self.folder, self.four_bit

    @property
    def is_control(self) -> bool:
        """True for the base in LoRA's 4 bits: scored only to tell what the 4 bits cost; it answers nothing."""
        return self.method == "base" and self.four_bit

    @property
    def taught(self) -> bool:
        """Whether it is known to have learned its chat template: it was trained here, or it brings one."""
        if gguf.is_gguf(self.folder):
            return gguf.tokenizer_of(self.folder).template is not None
        return self.log is not None or (
            self.method == "other" and (Path(self.own_folder) / CHAT_TEMPLATE_FILE).exists()
        )

    @property
    def own_folder(self) -> str:
        """What its training wrote, or the base: the folder that its tokenizer comes from."""
        return self.adapter or self.folder

    @property
    def remedy(self) -> str:
        """What a user can do where it is damaged."""
        if self.method in ("base", "other"):
            return "get it anew, or name another one"
        if self.method == "merged":
            return f"make it anew with: {command(LORA, '--merge_adapter', 'true', '--rerun')}"
        return f"make it anew with: {command(TRAINED[self.method][0], '--rerun')}"


def find_candidates(settings) -> tuple[list[Candidate], list[Note]]:
    """(the models that exist, in the order in which they are measured; notes on those that do not).

    Candidates that share weights stand next to one another. LoRA is measured as it is served: over 4 bits where it was
    trained over them, and then the base in the same 4 bits stands beside it ("base_4bit").
    Raises: SystemExit(2) when nothing was trained, or a model is damaged, is being trained, or has another base.
    """
    candidates, notes, problems = [Candidate("base", "base", settings.MODEL_NAME)], [], []
    later: list[Candidate] = []
    for method, output in (("lora", settings.LORA_DIR), ("full", settings.FULL_DIR)):
        script, name = TRAINED[method]
        output, final = Path(output), Path(output) / name
        handover.settle(output)
        if not final.is_dir():
            notes.append(("missing", {"name": method, "path": str(final), "command": command(script)}))
            continue
        log = handover.read_json(output / "training_log.json", command(script))
        if problem := problem_of(log, method, output, final, settings):
            problems.append(problem)
        elif method == "full":
            candidates.append(Candidate("full", "full", str(final), log=log))
        else:
            four_bit = log["settings"]["USE_4BIT"]
            if four_bit:
                candidates.append(Candidate("base_4bit", "base", settings.MODEL_NAME, four_bit=True))
            candidates.append(Candidate("lora", "lora", settings.MODEL_NAME, str(final), four_bit, log=log))
            if (merged := output / "merged_model").is_dir():
                later.append(Candidate("merged", "merged", str(merged), log=log))
    candidates += later
    for given in settings.CANDIDATES or []:
        name, _, folder = given.partition("=")
        path = hub.local_path(folder.strip()) if folder.strip() else None
        there = path is not None and (path.is_dir() or gguf.is_gguf(path))
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name.strip()) or not there:
            problems.append(
                f"CANDIDATES: {quoted(given)} is not name=folder or name=file.gguf with one that is there, such as "
                "mine=outputs/mine/final_model; a name has letters, digits, -, _ and . only"
            )
        elif name.strip() in {*load_words("en"), *(c.label for c in candidates)}:
            problems.append(f"CANDIDATES: the name {name.strip()!r} is taken; give the model another one")
        else:
            candidates.append(other(name.strip(), path, settings, problems))
    if problems:
        fail(*problems)
    if len(candidates) == 1:
        fail(*(sentence(note, load_words("en")) for note in notes))
    return candidates, notes


def other(name: str, folder: Path, settings, problems: list[str]) -> Candidate:
    """One of CANDIDATES: a model, an adapter of the same base, as the files in its folder say, or a GGUF."""
    if gguf.is_gguf(folder):
        if fault := gguf.fault(folder):
            problems.append(f"CANDIDATES: {folder} {fault}")
        return Candidate(name, "other", str(folder))
    is_adapter = (folder / "adapter_config.json").is_file()
    if fault := damaged(folder, "lora" if is_adapter else "full", settings):
        problems.append(f"CANDIDATES: {folder} {fault}; get it anew, or leave {name} out")
    if is_adapter:
        return Candidate(name, "other", settings.MODEL_NAME, str(folder))
    return Candidate(name, "other", str(folder))


def problem_of(log: object, method: str, output: Path, final: Path, settings) -> str:
    """Why a trained model cannot be compared, with the command that mends it; "" where it can."""
    again = command(TRAINED[method][0])
    if gaps := lacking(log, method):
        return f"{output}/training_log.json is not complete ({gaps[0]}); train again: {again}"
    if hub.model_path(log["model_name"]) != hub.model_path(settings.MODEL_NAME):
        return (
            f"{output} was trained from {log['model_name']!r}, but MODEL_NAME is {settings.MODEL_NAME!r}; use "
            f"--model_name {log['model_name']}, or train again with: "
            f"{command(TRAINED[method][0], '--model_name', settings.MODEL_NAME, '--rerun')}"
        )
    if log["summary"]["status"] == "running":
        return f"{output} is being trained, or its run was killed; wait, or finish it with: {again}"
    if fault := damaged(final, method, settings):
        return f"{final} {fault}; make it anew with: {command(TRAINED[method][0], '--rerun')}"
    return ""


def lacking(log: object, method: str) -> list[str]:
    """What a training log must have for the comparison, and has not."""
    number, settings = (int, float), ("SEED", "NUM_EPOCHS", "MAX_STEPS", "MAX_LENGTH", "MAX_TRAIN_SAMPLES")
    needs = {"model_name": str, "history": list, "parameters.trainable": int, "environment.processes": int}
    needs |= {"data.manifest_sha256": str, "data.train_rows": int, "summary.status": str, "summary.steps": int}
    needs |= {"summary.epochs": number, "settings.WARMUP_RATIO": number, "settings.LEARNING_RATE": number}
    needs |= {"settings.BATCH_SIZE": int, "settings.GRADIENT_ACCUMULATION_STEPS": int}
    needs |= {f"settings.{key}": (*number, type(None)) for key in settings}
    cost = ("train_runtime_s", "tokens", "tokens_per_second", "peak_memory_bytes")
    needs |= {f"summary.{key}": (*number, type(None)) for key in cost}
    if method == "lora":
        needs["settings.USE_4BIT"] = bool
    gaps = []
    for path, kind in needs.items():
        value = log
        for key in path.split("."):
            value = value.get(key, ...) if isinstance(value, dict) else ...
        if value is ... or not isinstance(value, kind):
            gaps.append(f"{path} is missing" if value is ... else f"{path} is {value!r}")
    return gaps


def damaged(final: Path, method: str, settings) -> str:
    """What is wrong with a final folder, seen from its files' headers; "" where nothing is."""
    weights, keys = list(final.glob("*.safetensors")), []
    try:
        for path in weights:
            with safe_open(path, framework="pt") as file:  # reads the header, which knows the file's length
                keys += file.keys()
    except Exception as error:  # the library's own kind, and those of the file system
        return f"is damaged ({error})"
    if not weights:
        return "holds no weights"
    if method == "full":
        return ""
    if not any("lora_" in key for key in keys):
        return "holds weights, but none of LoRA's"
    try:
        base = json.loads((final / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"has no adapter_config.json that can be read ({type(error).__name__})"
    # a path is that of the machine and the folder where it was trained, and both may have moved since
    if not os.path.isabs(str(base)) and hub.model_path(base) != hub.model_path(settings.MODEL_NAME):
        return f"is an adapter for {base!r}, but MODEL_NAME is {settings.MODEL_NAME!r}"
    return ""


def load_tokenizers(candidates: list[Candidate], settings, prompt_format: str) -> list[Candidate]:
    """The candidates with their tokenizers: a trained one brings its template, a base gets that of the data."""
    tokenizers, found = {}, []
    for candidate in candidates:
        source, trained = candidate.own_folder, candidate.log is not None
        if candidate.method == "other" and not any(Path(source).glob("tokenizer*")):  # an adapter may have none
            source = settings.MODEL_NAME
        if source not in tokenizers:
            revision = settings.MODEL_REVISION if source == settings.MODEL_NAME else None
            form = "auto" if trained else prompt_format
            tokenizers[source] = chat.load_tokenizer(source, revision, form, mend=candidate.remedy)
            with models.loading(source, candidate.remedy):
                chat.answer_end(tokenizers[source])
        tokenizer = tokenizers[source]
        if gguf.is_gguf(candidate.folder):
            tokenizer = gguf.with_its_template(candidate.folder, tokenizer)
        found.append(replace(candidate, tokenizer=tokenizer))
    return found


def cost(candidate: Candidate) -> dict | None:
    """What a training took, from its log, and the bytes of what it made, its card aside; None for a base.

    Of a GGUF, the bytes alone are known.
    """
    if gguf.is_gguf(candidate.folder):
        unknown = ("device", "trainable", "train_runtime_s", "tokens", "tokens_per_second", "peak_memory_bytes")
        return dict.fromkeys(unknown) | {"disk_bytes": Path(candidate.folder).stat().st_size}
    if candidate.log is None:
        return None
    keys = ("train_runtime_s", "tokens", "tokens_per_second", "peak_memory_bytes")
    folder = Path(candidate.own_folder)
    # the card grows by the test scores, and a second evaluation should find what the first one found
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "README.md"]
    return {
        "device": candidate.log["environment"].get("device"),
        "trainable": candidate.log["parameters"]["trainable"],
        **{key: candidate.log["summary"][key] for key in keys},
        "disk_bytes": sum(path.stat().st_size for path in files),
    }


def still_as_scored(candidate: Candidate) -> bool:
    """Whether the training log is the one that was read before the model was loaded."""
    path = Path(candidate.own_folder).with_name("training_log.json")
    try:
        return json.loads(path.read_text("utf-8")) == candidate.log
    except (OSError, ValueError):
        return False


# --- the test split


@dataclass(frozen=True)
class HeldOut:
    """The test split: rows that are scored, and prompts that are answered. MAX_EVAL_SAMPLES cuts the rows only.

    rows: {id, prompt, completion, group}; prompts: {id, prompt, reference, group}; embed: texts -> unit vectors;
    validation: rows of the validation part, by which the base's prompt form is chosen.
    """

    rows: list[dict]
    prompts: list[dict]
    embed: Callable | None = None
    validation: list[dict] = field(default_factory=list)

    @cached_property
    def groups(self) -> list[str]:
        """The group of each row: rows whose questions are nearly equal, or but for figures, are one observation."""
        return question_groups(self.rows)

    @cached_property
    def prompt_groups(self) -> list[str]:
        """The group of each prompt, also of one whose row MAX_EVAL_SAMPLES has cut away."""
        return question_groups(self.prompts)

    @cached_property
    def sizes(self) -> list[int]:
        """UTF-8 bytes of each row's answer."""
        return [len(row["completion"][0]["content"].encode()) for row in self.rows]

    @cached_property
    def references(self) -> list[str]:
        return [p["reference"] for p in self.prompts]

    @cached_property
    def questions(self) -> list[str]:
        return [p["prompt"][-1]["content"] for p in self.prompts]


def load_held_out(settings, manifest: dict) -> HeldOut:
    """The test split, checked against the manifest: nobody has changed what is tested.

    Raises: SystemExit(2) with the command that makes it anew.
    """
    folder, mend = settings.DATA_DIR, f"make the data anew with: {command(PREPARE)}"
    evaluation = handover.load_split(folder, "eval")
    if missing := {"id", "prompt", "completion", "part"} - set(evaluation.column_names):
        fail(f"{folder}/eval has no column {sorted(missing)[0]!r}; {mend}")
    if handover.split_hash(evaluation["id"], evaluation["part"]) != manifest["sha256"].get("eval"):
        fail(f"{folder}/eval is not what {folder}/manifest.json describes; {mend}")
    rows = [row for row in evaluation if row["part"] == "test"]
    for row in rows:
        if handover.content_hash(row["prompt"] + row["completion"]) != row["id"]:
            fail(f"{folder}/eval: row {row['id']} was changed after step 1; {mend}")
    path, by_id = Path(folder) / "test_prompts.json", {row["id"]: row for row in rows}
    prompts = handover.read_json(path, command(PREPARE))
    known = isinstance(prompts, list) and all(isinstance(p, dict) and p.get("id") in by_id for p in prompts)
    if not prompts or not known:
        fail(f"{path} is not a list of prompts from the test split; {mend}")
    for p in prompts:
        row = by_id[p["id"]]
        if p.get("prompt") != row["prompt"] or p.get("reference") != row["completion"][0]["content"]:
            fail(f"{path}: prompt {p['id']} is not that of the test split; {mend}")
    if len({p["id"] for p in prompts}) < len(prompts):
        fail(f"{path} holds a prompt twice; {mend}")
    prompts = [p | {"group": by_id[p["id"]].get("group")} for p in prompts]
    validation = [row for row in evaluation if row["part"] == "validation"]
    held_out = HeldOut(rows[: settings.MAX_EVAL_SAMPLES], prompts, validation=validation[: settings.MAX_EVAL_SAMPLES])
    if len(set(held_out.groups)) < 2:
        fail(
            f"{len(held_out.rows)} test rows with one question only cannot show any difference; take more "
            f"(MAX_EVAL_SAMPLES), or more data: {command(PREPARE)}"
        )
    return held_out


def check_forms(candidates: list[Candidate], held_out: HeldOut) -> None:
    """Refuse a model whose chat template has no form for some test row, before anything is measured.

    Raises: SystemExit(2) with the first such row.
    """
    asked = [(row["id"], row["prompt"], row["completion"]) for row in held_out.rows]
    asked += [(p["id"], p["prompt"], [{"role": "assistant", "content": p["reference"]}]) for p in held_out.prompts]
    for candidate in {id(candidate.tokenizer): candidate for candidate in reversed(candidates)}.values():
        for row, prompt, completion in asked:
            try:
                chat.render(candidate.tokenizer, prompt, completion)
            except ValueError as error:
                mend = f"prepare the data with a format of ours: {command(PREPARE, '--prompt_format', 'chatml')}"
                mend = f"leave {candidate.label} out of CANDIDATES" if candidate.method == "other" else mend
                fail(f"{candidate.label} cannot be asked test row {row}: {error}; {mend}")


# --- what makes a verdict impossible


def unsound(candidates: list[Candidate], manifest: dict, held_out: HeldOut) -> list[Note]:
    """Why no verdict may be drawn.

    Either test rows were among those that a model was trained on, or whether they were cannot be told, or its last run
    ended early, so its log need not belong to its weights. Data that were prepared anew are no reason by themselves.
    """
    notes = []
    for candidate in candidates:
        if candidate.method not in TRAINED:
            continue
        again = {"name": candidate.label, "command": command(TRAINED[candidate.method][0])}
        summary = candidate.log["summary"]
        if candidate.log["data"]["manifest_sha256"] != manifest["manifest_sha256"]:
            leaked = leaks(candidate, held_out)
            if leaked is None:
                notes.append(("other_data", again))
            elif leaked:
                notes.append(("leaked", again | {"number": len(leaked), "row": min(leaked)}))
        if summary["status"] != "done":
            notes.append(("stopped_early", again | {"status": summary["status"], "steps": summary["steps"]}))
    return notes


def not_replayed(texts: list[str], name: str | None, folders: list[Path]) -> list[str]:
    """The paragraphs of the general text `name` by which forgetting is measured, the same for every model.

    Where a model was trained with some of the same text (REPLAY_FRACTION), which takes every second paragraph, these
    are the others. folders: OUTPUT_DIRs of the trainings; a paragraph that one of them had among its rows is left out.
    Raises: SystemExit(2) where none remains.
    """
    settings = [state.training_log(folder).get("settings", {}) for folder in folders]
    replayed = {hub.model_path(own["REPLAY_TEXT"]) for own in settings if own.get("REPLAY_FRACTION")}
    if not texts or not replayed:
        return texts
    left = texts[::2] if hub.model_path(name) in replayed else texts
    seen: set[str] = set()
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            trained = json.loads((folder / handover.TRAINED_ROWS).read_text("utf-8"))["train"]
            pairs = zip(trained["id"], trained["question"], strict=True)
            seen.update(question for id, question in pairs if id.startswith("replay-"))
    left = [text for text in left if handover.text_hash(text) not in seen]
    return left or fail(f"GENERAL_TEXT {name!r}: every paragraph of it was among the training rows; give another text")


def leaks(candidate: Candidate, held_out: HeldOut) -> set[str] | None:
    """Ids of the test rows whose question this model has seen in training; None where that cannot be told."""
    path = Path(candidate.own_folder).with_name(handover.TRAINED_ROWS)
    try:
        trained = json.loads(path.read_text("utf-8"))
        seen = {question for part in ("train", "validation") for question in trained[part]["question"]}
        if len(trained["train"]["id"]) != candidate.log["data"]["train_rows"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {row["id"] for row in held_out.rows + held_out.prompts if handover.content_hash(row["prompt"]) in seen}
