"""What a preset and a command line say, checked against the constants of the scripts; see configs/settings.py.

Problems are collected in a list of sentences; nothing here prints or ends the program.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.text import quoted, read_yaml
from configs.values import Constant, as_text, near, with_type

ROOT = Path(__file__).absolute().parent.parent
# script -> its section of a preset, and the prefix of its own flags in run_all.py; in running order
SECTIONS = {
    "1_prepare_dataset.py": "prepare",
    "2_lora_finetuning.py": "lora",
    "3_full_finetuning.py": "full",
    "4_evaluate_compare.py": "evaluate",
}
# Setting -> what people call it elsewhere. Of several settings with one such name, the first that a script has is
# meant.
ALIASES = {
    "learning_rate": "lr rate peak_lr max_lr",
    "batch_size": "batch bs batchsize micro_batch_size train_batch_size per_device_train_batch_size",
    "gradient_accumulation_steps": "accumulation grad_accum gradient_accumulation accumulation_steps accum",
    "num_epochs": "epochs epoch num_train_epochs n_epochs",
    "steps": "step",
    "max_steps": "steps step num_steps total_steps",
    "model_name": "model base base_model model_id model_path model_name_or_path",
    "dataset_name": "dataset data dataset_id dataset_path train_file data_path",
    "dataset_config": "subset dataset_subset",
    "dataset_split": "split",
    "column_map": "columns mapping",
    "prompt_format": "template chat_template format",
    "prompt": "question ask",
    "max_length": "seq_len seq_length max_seq_length max_seq_len sequence_length cutoff_len block_size context_length",
    "eval_fraction": "test_size eval_size val_size test_fraction",
    "max_train_samples": "max_samples num_samples samples train_samples limit",
    "max_eval_samples": "max_samples samples eval_samples limit",
    "lora_r": "rank r lora_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules targets modules",
    "use_4bit": "quantize quantization quantise load_in_4bit qlora bits four_bit bnb_4bit 4bit",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "merge_adapter": "merge merge_and_unload",
    "use_deepspeed": "deepspeed zero",
    "warmup_ratio": "warmup warmup_steps",
    "lr_scheduler": "scheduler schedule lr_scheduler_type",
    "optim": "optimizer",
    "max_grad_norm": "clip grad_clip gradient_clipping",
    "weight_decay": "decay wd",
    "precision": "dtype torch_dtype bf16 fp16 mixed_precision",
    "early_stopping_patience": "patience early_stopping",
    "gradient_checkpointing": "checkpointing grad_checkpointing",
    "device_memory_gb": "memory gpu_memory vram",
    "resume": "resume_from_checkpoint continue",
    "report_to": "report tracker logger",
    "report_dir": "report output output_dir output_folder out",
    "output_dir": "output output_folder out save_dir",
    "data_dir": "data dataset data_folder output output_folder out",
    "report_language": "language lang",
    "language": "lang",
    "max_new_tokens": "max_tokens new_tokens",
    "temperature": "temp",
    "resamples": "bootstrap bootstrap_samples",
    "near_duplicate_threshold": "threshold dedup_threshold",
    "preset": "config",
}


@dataclass(frozen=True)
class Flag:
    """A flag as it was typed: `--lora.learning_rate 1e-4` has the step "lora", the value 1e-4 and is `own`.

    `typed` is the word behind it, or None where there was none; `text` is that, or what no word means.
    """

    step: str | None
    own: bool
    constant: Constant
    value: object
    text: str
    typed: str | None
    shown: str


# --- presets


def list_presets(root: str | Path = ROOT) -> dict[str, str]:
    """Name -> description of each preset in `root`/configs/presets; "" where a file has none to be read."""
    presets = {}
    for path in sorted(Path(root, "configs", "presets").glob("*.yaml")):
        data, _ = read_yaml(path)
        presets[path.stem] = str(data.get("description") or "").strip() if isinstance(data, dict) else ""
    return presets


def preset_path(name: str, root: str | Path = ROOT) -> Path:
    """The file of a preset, by its name or by a path to a .yaml file; FileNotFoundError says which exist."""
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or a NUL in it
        if name.endswith((".yaml", ".yml")) and Path(name).is_file():
            return Path(name).absolute()
        path = Path(root, "configs", "presets", name.removesuffix(".yaml") + ".yaml").absolute()
        if Path(name).name == name and path.is_file():
            return path
    known = list_presets(root)
    listed = "".join(f"\n  {stem}: {' '.join(about.split())}" for stem, about in known.items())
    offer = f"the presets are{listed}" if known else f"there is none in {Path(root, 'configs', 'presets').absolute()}"
    raise FileNotFoundError(f"unknown preset {quoted(name)}{_hint(near(name, known))}; {offer}")


def read_preset(name: str, root: Path, scripts: dict, problems: list) -> dict[str, dict[str, tuple]]:
    """Check a whole preset file against all `scripts`: {script: {constant: (value, source)}} of what it sets.

    Mistakes in the sections of other scripts count too: they would only show hours later, when those start.
    """
    try:
        path = preset_path(name, root)
    except FileNotFoundError as error:
        problems.append(error)
        return {}
    data, wrong = read_yaml(path)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    problems += [f"{shown}, {problem}" for problem in wrong]
    sections = [*SECTIONS.values(), "all"]
    if not isinstance(data, dict | None):
        problems.append(f"{shown} wants sections ({', '.join(sections)}); it has {with_type(data)}")
        return {}
    weak, strong = {script: {} for script in scripts}, {script: {} for script in scripts}
    for section, body in (data or {}).items():
        where = f"{shown}, section {section}"
        if section in ("description", "description_zh"):
            if not isinstance(body, str | None):
                problems.append(f"{shown}: {section} wants text (str), it has {with_type(body)}")
        elif section not in sections:
            is_key = any(str(section).upper() in known for known in scripts.values())
            hint = ", a setting that stands outside a section" if is_key else _hint(near(section, sections))
            problems.append(f"{shown}: unknown section {section}{hint}; there are {', '.join(sections)}")
        elif not isinstance(body, dict | None):
            problems.append(f"{where} wants settings, e.g. learning_rate: 0.0001; it has {with_type(body)}")
        else:
            sets, source = weak if section == "all" else strong, f"preset {name}, section {section}"
            concerned = {file: known for file, known in scripts.items() if section in ("all", SECTIONS.get(file))}
            for file, key, value in _read_section(body or {}, where, concerned, scripts, problems):
                sets[file][key] = value, source
    return {script: weak[script] | strong[script] for script in scripts}


def _read_section(body: dict, where: str, concerned: dict, scripts: dict, problems: list) -> list[tuple]:
    """(script, constant, value) of each setting in a section, for each script that it concerns."""
    settings, keys = [], [str(key).upper() for key in body]
    for key, value in zip(keys, body.values(), strict=True):
        having = [file for file, known in concerned.items() if key in known]
        if keys.count(key) > 1:
            problems.append(f"{where}: {key.lower()} is given twice, in upper and in lower case")
        if concerned and not having:
            names = [name for known in concerned.values() for name in known]
            problems.append(f"{where}: {_unknown(key.lower(), key, names, scripts, '')}")
        for file in having:
            try:
                settings.append((file, key, concerned[file][key].parse(value, where)))
            except ValueError as error:
                problems.append(error)
                break  # once is enough
    return settings


def _hint(name: str | None, prefix: str = "") -> str:
    return f"; did you mean {prefix}{name}?" if name else ""


def _unknown(shown: str, name: str, known: list, scripts: dict, prefix: str) -> str:
    """What to say of a flag or key that is not in `known`: whose it is, or what was probably meant."""

    def owners(key: str) -> str:
        return " and ".join(file for file, has in scripts.items() if key.upper() in has)

    aliases = [key for key, others in ALIASES.items() if name.lower() in others.split()]
    meant = next((key for key in aliases if key.upper() in known), None)
    if not meant and owners(name) and name.upper() not in known:
        return f"{shown} is a setting of {owners(name)}"
    if meant := meant or near(name, known):
        return f"unknown setting {shown}{_hint(meant, prefix)}"
    # not a setting of this script, but perhaps of another
    everything = [key for has in scripts.values() for key in has]
    meant = next((key for key in aliases if owners(key)), None) or near(name, everything)
    if not meant:
        return f"unknown setting {shown}; --help lists the settings"
    return f"unknown setting {shown}; {'--' if prefix else ''}{meant} is a setting of {owners(meant)}"


# --- flags


def read_flags(
    argv: list[str], steps: dict, scripts: Callable[[], dict], problems: list
) -> tuple[str | None, list[Flag]]:
    """The name of the preset, and each flag, once for each step that it is for.

    `steps` are the constants of each step; `--lora.name` is for the step "lora" alone. `scripts()` gives all
    scripts' constants, asked for only where a flag is unknown. A word that does not begin with `--` is the
    value of the flag before it, so `-1` is a value. `--local_rank`, which launchers add, is dropped.
    """
    preset, flags, words = None, [], list(argv)
    named = [step for step in steps if step]
    while words:
        word = words.pop(0)
        shown, equals, typed = word.partition("=")
        if not re.match("--.", word):
            one_dash = re.match("-[A-Za-z]", word)
            hint = f"did you mean -{shown}?" if one_dash else "settings are --name value"
            problems.append(f"unexpected argument {word!r}; {hint}")
            continue
        if not equals:
            typed = words.pop(0) if words and not words[0].startswith("--") else None
        prefix, dot, name = shown[2:].replace("-", "_").rpartition(".")
        if name == "preset" and not dot:
            preset = typed or preset
            if not typed:
                problems.append("--preset needs a value, e.g. --preset demo")
            continue
        key = name.upper() if name.islower() else ""
        concerned = {step: known for step, known in steps.items() if not dot or step == prefix}
        having = [step for step, known in concerned.items() if key in known]
        negated = [step for step, known in concerned.items() if key[:3] == "NO_" and key[3:] in known]
        negated = [step for step in negated if "bool" in concerned[step][key[3:]].types and not having]
        if negated and typed is not None:
            problems.append(f"{shown} takes no value, but has {typed!r}; write --{key[3:].lower()} false")
        elif not concerned and len(steps) > 1:
            problems.append(f"{shown}: there is no step {prefix}{_hint(near(prefix, named))}")
        elif not having and not negated and name != "local_rank":
            names = [key for known in (concerned or steps).values() for key in known] + ["PRESET", "HELP"]
            problems.append(_unknown(shown, name, names, scripts(), f"--{prefix}{dot}" if concerned else "--"))
        for step in having or negated:
            constant = concerned[step][key[3:] if negated else key]
            general = concerned[None][key].choices if None in having else ()
            if step and typed in general and constant.choices and typed not in constant.choices:
                continue  # `--language auto` is run_all.py's own, which tells the steps what that turned out to be
            if typed is None and "bool" not in constant.types:
                problems.append(f"{shown} needs a value, e.g. {constant.flag} {as_text(constant.example)}")
                break  # once is enough
            text = ("false" if negated else "true") if typed is None else typed
            try:
                value = constant.parse(text, shown)
            except ValueError as error:
                problems.append(error)
                break
            flags.append(Flag(step, bool(dot), constant, value, text, "false" if negated else typed, shown))
    return preset, flags
