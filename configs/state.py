"""What lies in data/ and outputs/, and which run it is: finished, interrupted, or out of date. Light: no torch.

A training is known by its identity: what changes its result. Two runs with one identity are one run, so a finished one
is not repeated and an interrupted one goes on. The identity stands in training_log.json and in each checkpoint.
"""

import contextlib
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from configs import handover, hub

# Settings that do not change what a training ends with, or that stand in its identity in another form.
OUTSIDE = frozenset(
    """
    MODEL_NAME MODEL_REVISION DATA_DIR OUTPUT_DIR BATCH_SIZE GRADIENT_ACCUMULATION_STEPS USE_DEEPSPEED DEEPSPEED_CONFIG
    PLAN_ONLY DEVICE_MEMORY_GB GRADIENT_CHECKPOINTING PACKING MAX_DROP_FRACTION LOGGING_STEPS EVAL_STEPS SAVE_STEPS
    SAVE_TOTAL_LIMIT EARLY_STOPPING_PATIENCE RESUME RERUN REPORT_TO MERGE_ADAPTER REPLAY_FRACTION REPLAY_TEXT
    QUIET PUSH_TO_HUB
    """.split()
)
# Of these, "auto" may be what the other value says: the memory plan of the checkpoint decides.
AUTO = ("PRECISION", "OPTIM")
END = ("NUM_EPOCHS", "MAX_STEPS")  # a run may go on to a later end
# Where these differ in a continuation, it is said: they change when something is looked at, or how fast it goes.
SAID = """EVAL_STEPS SAVE_STEPS SAVE_TOTAL_LIMIT LOGGING_STEPS EARLY_STOPPING_PATIENCE GRADIENT_CHECKPOINTING PACKING
    BATCH_SIZE GRADIENT_ACCUMULATION_STEPS MAX_DROP_FRACTION REPORT_TO""".split()

# --- the identity of a training


def identity(method: str, settings: dict, manifest: dict, commit: str | None = None) -> dict:
    """What changes the result of a training, as {name: value}.

    method: "lora" or "full"; settings: {name: value} of its script; manifest: of its data, from `read_manifest`;
    commit: of a model on the Hub, where it is known.
    """
    deepspeed = None
    if settings.get("USE_DEEPSPEED"):
        with contextlib.suppress(OSError):
            deepspeed = hashlib.sha256(hub.local_path(settings["DEEPSPEED_CONFIG"]).read_bytes()).hexdigest()
    own = {name: value for name, value in settings.items() if name not in OUTSIDE}
    replay = None
    if settings.get("REPLAY_FRACTION"):
        replay, path = [settings["REPLAY_FRACTION"], settings["REPLAY_TEXT"]], hub.local_path(settings["REPLAY_TEXT"])
        with contextlib.suppress(OSError, AttributeError):  # a Hub data set is known by its name
            replay[1] = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = {
        "method": method,
        "model": hub.model_path(settings["MODEL_NAME"]),
        "model_version": model_version(settings["MODEL_NAME"]) or commit,
        "model_revision": settings["MODEL_REVISION"],
        "train_rows": manifest["sha256"]["train"],
        "validation_rows": validation_hash(settings["DATA_DIR"], manifest),
        "PROMPT_FORMAT": manifest["settings"].get("PROMPT_FORMAT"),
        "rows_per_step": settings["BATCH_SIZE"] * settings["GRADIENT_ACCUMULATION_STEPS"],
        "deepspeed": deepspeed,
        "replay": replay,
        **own,
    }
    return json.loads(json.dumps(parts))  # as it will be read again


def model_version(name: str) -> str | None:
    """A hash of a local model folder's configuration and of its weight files' names and sizes; None for a Hub id."""
    folder = hub.local_path(name)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        elif path.name == "config.json":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def validation_hash(data_dir: str | Path, manifest: dict) -> str:
    """sha256 of the validation rows; read from the rows where an older version of step 1 did not note it."""
    if noted := manifest["sha256"].get("validation"):
        return noted
    rows = handover.load_split(data_dir, "eval")
    ids = [id for id, part in zip(rows["id"], rows["part"], strict=True) if part == "validation"]
    return handover.split_hash(ids)


def differences(before: dict, now: dict) -> dict[str, tuple]:
    """{name: (value before, value now)} of what differs between two identities, by meaning."""
    differing = {}
    for name in (name for name in now if name in before):  # a setting that one version does not have is no difference
        old, new = before[name], now[name]
        unknown = (name in AUTO and "auto" in (old, new)) or (name == "model_version" and None in (old, new))
        if old != new and not unknown:
            differing[name] = old, new
    if "model" in differing and before.get("model_version") and before["model_version"] == now.get("model_version"):
        del differing["model"]  # the same files at another place; a name on the Hub has no version before it is read
    return differing


def later_end(differing: dict[str, tuple]) -> bool:
    """Whether nothing differs but the end of the run, and it comes later now."""
    if not differing or not set(differing) <= set(END):
        return False
    ends = [(old, new) for old, new in differing.values() if None not in (old, new)]
    return len(ends) == len(differing) and all(new > old for old, new in ends)


def spelled(name: str, before: object, now: object, language: str = "en") -> str:
    """One difference, for people. language: "en" or "zh"."""
    title = {"model": "MODEL_NAME", "model_revision": "MODEL_REVISION"}.get(name, name)
    if name == "rows_per_step":
        title = "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS"
    if language == "zh":
        words = {
            "model_version": "模型的文件变了",
            "train_rows": "训练行变了",
            "validation_rows": "验证行变了",
            "deepspeed": "DeepSpeed 的配置变了",
            "replay": "混入的通用文本或其比例（REPLAY_FRACTION）变了",
        }
        return words.get(name) or f"{title} 原为 {before!r}，现为 {now!r}"
    words = {
        "model_version": "the files of the model are others",
        "train_rows": "the training rows are others",
        "validation_rows": "the validation rows are others",
        "deepspeed": "the DeepSpeed configuration is another one",
        "replay": "the general text among the rows, or its share (REPLAY_FRACTION), is another one",
    }
    return words.get(name) or f"{title} was {before!r} and is {now!r}"


def spell(seconds: float, language: str = "en") -> str:
    """A time for people: "40 s", "12 min", "3.4 h" or "12 days". language: "en" or "zh"."""
    second, minute, hour, day = ("s", "min", "h", "days") if language == "en" else ("秒", "分钟", "小时", "天")
    if seconds < 90:
        return f"{seconds:.0f} {second}"
    if seconds < 5400:
        return f"{seconds / 60:.0f} {minute}"
    return f"{seconds / 3600:.1f} {hour}" if seconds < 72 * 3600 else f"{seconds / 86400:,.0f} {day}"


# --- what lies in an output folder


def training_log(output_dir: str | Path) -> dict:
    """training_log.json as it lies there; {} where it is missing, or not one of ours."""
    with contextlib.suppress(OSError, ValueError):
        log = json.loads((Path(output_dir) / "training_log.json").read_text("utf-8"))
        if isinstance(log, dict) and all(isinstance(log.get(key), dict) for key in ("settings", "summary", "data")):
            return log
    return {}


def final_folder(method: str) -> str:
    """Name of the folder that a finished training leaves in its OUTPUT_DIR."""
    return {"lora": "final_lora_adapter", "full": "final_model"}[method]


def has_weights(folder: Path) -> bool:
    """Whether a final folder holds weights."""
    return any(folder.glob("*.safetensors"))


def finished(output_dir: str | Path, method: str, log: dict) -> bool:
    """Whether the training that this log tells of is done and its model still there."""
    done = log.get("summary", {}).get("status") == "done"
    return done and has_weights(Path(output_dir) / final_folder(method))


def history_folder(output_dir: str | Path) -> Path:
    """Where a run is moved that makes room for another: history/NAME-TIME beside its folder."""
    folder = Path(output_dir).absolute()
    inside = folder.stat().st_dev != folder.parent.stat().st_dev  # a file system of its own
    base = (folder if inside else folder.parent) / "history" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


# --- the state of each step, for run_all.py


@dataclass(frozen=True)
class Step:
    """What is known of a step. kind: "done", "out of date", "interrupted", "running" or "not yet"; why: in words.

    zh: the same words in Chinese; when: its end, in seconds since 1970; seconds: how long it took the last time.
    """

    kind: str
    why: str = ""
    zh: str = field(default="", compare=False)
    when: float | None = field(default=None, compare=False)
    seconds: float | None = field(default=None, compare=False)


def of_step(section: str, settings: dict, quick: bool = False) -> Step:
    """The state of the step "prepare", "lora", "full" or "evaluate". settings: {name: value} of its script.

    quick: take a large data file as unchanged where its time says so, instead of reading it.
    """
    try:
        if section == "prepare":
            return of_data(settings, quick)
        return of_evaluation(settings) if section == "evaluate" else of_training(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not ours, or damaged: the step says what
        return Step("not yet")


def as_asked(settings: dict, given: list[str]) -> dict:
    """The settings without the language of a report where no flag asks for one: it comes from the terminal's then."""
    asked = any(word.startswith("--report_language=") for word in given)
    return {name: value for name, value in settings.items() if asked or name != "REPORT_LANGUAGE"}


def of_data(settings: dict, quick: bool = False) -> Step:
    """The state of data/: done where it was made with these settings from the same files."""
    folder = Path(settings["DATA_DIR"])
    path, name = folder / "manifest.json", settings["DATASET_NAME"]
    if handover.is_locked(folder):
        return _running(folder)
    if not path.exists():
        return Step("not yet")
    manifest = json.loads(path.read_text("utf-8"))
    took = noted_seconds(folder)
    if changed := _changed(manifest["settings"], settings, ("DATA_DIR", "LANGUAGE")):
        return Step("out of date", *changed, seconds=took)
    if not (quick and _large_and_older(name, path)) and manifest.get("source_files") != files_hash(name):
        return Step("out of date", f"{name} is not what it was", f"{name} 的内容变了", seconds=took)
    train, test = manifest["rows"]["train"], manifest["rows"]["test"]
    words = f"{train} rows to train on, {test} to test", f"训练 {train} 行，测试 {test} 行"
    return Step("done", *words, when=path.stat().st_mtime, seconds=took)


def of_training(settings: dict) -> Step:
    """The state of outputs/*_model: done where a run with this identity is finished."""
    method, output = "lora" if "LORA_R" in settings else "full", settings["OUTPUT_DIR"]
    if handover.is_locked(output):
        return _running(output)
    log = training_log(output)
    if not log:
        return Step("not yet")
    summary = log["summary"]
    took = summary["train_runtime_s"] + summary.get("paused_s", 0.0) if summary["status"] == "done" else None
    manifest = json.loads((Path(settings["DATA_DIR"]) / "manifest.json").read_text("utf-8"))
    differing = differences(log["identity"], identity(method, settings, manifest))
    if differing:
        english, chinese = (
            [spelled(name, *values, language) for name, values in differing.items()] for language in ("en", "zh")
        )
        more = len(differing) - 3
        rest = (f"; and {more} more", f"；另有 {more} 项") if more > 0 else ("", "")
        return Step("out of date", "; ".join(english[:3]) + rest[0], "；".join(chinese[:3]) + rest[1], seconds=took)
    if not finished(output, method, log):
        return Step("interrupted", f"at step {summary['steps']}", f"停在第 {summary['steps']} 步")
    if settings.get("MERGE_ADAPTER") and not has_weights(Path(output) / "merged_model"):
        return Step("out of date", "merged_model is not there", "缺少 merged_model", seconds=took)
    if (name := settings.get("PUSH_TO_HUB")) and name not in log.get("pushed", {}):
        return Step("out of date", f"not on the Hub as {name}", f"尚未上传到 Hub 的 {name}", seconds=took)
    loss, seconds = f"eval_loss {summary['eval_loss']:.4f}", summary["train_runtime_s"]
    words = f"{loss} in {spell(seconds)}", f"{loss}，用时 {spell(seconds, 'zh')}"
    return Step("done", *words, when=(Path(output) / "training_log.json").stat().st_mtime, seconds=took)


def of_evaluation(settings: dict) -> Step:
    """The state of the results: done where these models were compared on these data with these settings."""
    path = Path(settings["REPORT_DIR"]) / "evaluation_results.json"
    if not path.exists():
        return Step("not yet")
    results, took = json.loads(path.read_text("utf-8")), noted_seconds(path.parent)
    if changed := _changed(results["settings"], settings, ("REPORT_DIR", "DATA_DIR", "LORA_DIR", "FULL_DIR")):
        return Step("out of date", *changed, seconds=took)
    if results["data"].get("made_from") != made_from(settings):
        words = "the data or a model is another one", "数据或某个模型变了"
        return Step("out of date", *words, seconds=took)
    return Step("done", *headline(results["verdict"]), when=path.stat().st_mtime, seconds=took)


def headline(verdict: str) -> tuple[str, str]:
    """The verdict of an evaluation without its intervals, as one short line, in English and in Chinese."""
    short = re.sub(r" \((?:95 % )?interval [^)]*\)| \(95 % [^)]*\)", "", " ".join(verdict.split()))
    short = re.sub(r"^On the test split, in nats per token of the answers: (.*)\.$", r"nats per token: \1", short)
    chinese = short.replace("nats per token: ", "每 token 的 nats：").replace("; ", "；")
    for pattern, words in (
        (r"(\w+) is better than (\w+) by ([\d.]+)", r"\1 优于 \2 \3"),
        (r"(\w+) is worse than (\w+) by ([\d.]+)", r"\1 劣于 \2 \3"),
        (r"no difference between (\w+) and (\w+) can be shown", r"\1 与 \2 之间看不出差异"),
        (r"(\w+) against (\w+) is not decided", r"\1 与 \2 尚无定论"),
        (r"^No verdict, because the comparison is not sound: ", "比较不成立，不下结论："),
    ):
        chinese = re.sub(pattern, words, chinese)
    return short, chinese


def of_sweep(folder: str | Path) -> Step:
    """The state of the sweep in SWEEP_DIR, whichever question it asks; "interrupted" where runs are waiting."""
    path, report = Path(folder) / "sweep.json", Path(folder) / "sweep_results.json"
    if not path.exists():
        return Step("not yet")
    if handover.is_locked(folder):
        return _running(folder)
    try:
        sweep = json.loads(path.read_text("utf-8"))
        states = [run["state"] for run in sweep["runs"].values()]
        fresh, name = any(run["phase"] == "seeds" for run in sweep["runs"].values()), sweep["plan"]["question"]["name"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Step("not yet")
    over = len(states) - states.count("waiting")
    words = f"{name}: {over} of {len(states)} runs", f"{name}：{len(states)} 次训练中的 {over} 次"
    for kind, zh in (("diverged", "发散"), ("failed", "失败")):
        if number := states.count(kind):
            words = f"{words[0]}, {number} {kind}", f"{words[1]}，{number} 次{zh}"
    if over == len(states) and fresh and report.exists():
        return Step("done", *words, when=report.stat().st_mtime)
    return Step("interrupted", *words)


# --- how long a step took, where it does not say so itself


def note_seconds(section: str, settings: dict, seconds: float) -> None:
    """Note how long step 1 or 4 took, beside what it made; a training says so in its log."""
    if key := {"prepare": "DATA_DIR", "evaluate": "REPORT_DIR"}.get(section):
        with contextlib.suppress(OSError):  # a time is worth no error
            (Path(settings[key]) / ".seconds").write_text(f"{seconds:.1f}\n", "utf-8")


def noted_seconds(folder: Path) -> float | None:
    """What note_seconds has noted; None where nothing was."""
    with contextlib.suppress(OSError, ValueError):
        return float((folder / ".seconds").read_text("utf-8"))
    return None


# --- what a step was made from


def made_from(settings: dict) -> dict[str, str | None]:
    """sha256 of what an evaluation reads: the manifest of the data and the log of each training; None: not there."""
    paths = {"data": Path(settings["DATA_DIR"]) / "manifest.json"}
    paths |= {key.lower(): Path(settings[key]) / "training_log.json" for key in ("LORA_DIR", "FULL_DIR")}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for name, path in paths.items()
    }


def files_hash(name: str) -> str | None:
    """sha256 over the names and contents of a local data file or folder; None for a data set on the Hub."""
    place = hub.local_path(name)
    if place is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file():
            digest.update(f"{path.name} {handover.file_hash(path)}\n".encode())
    return digest.hexdigest()


def _running(folder: str | Path) -> Step:
    who = handover.holder(folder).strip(" ()")
    return Step("running", who, who.replace("process ", "进程 ").replace(", since ", "，始于 "))


def _large_and_older(name: str, made: Path) -> bool:
    """Whether local data are too large to be read for a menu, and nothing of them is newer than what they made."""
    place = hub.local_path(name)
    if place is None:
        return False
    known = [path.stat() for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    then = made.stat().st_mtime
    return sum(one.st_size for one in known) > 50e6 and all(max(s.st_mtime, s.st_ctime) < then for s in known)


def _changed(before: dict, now: dict, places: tuple[str, ...]) -> tuple[str, str] | None:
    """The first setting that differs, in English and in Chinese; None where none does.

    places: settings that only say where files lie, or in which language.
    """
    for name in now:
        if name not in places and json.loads(json.dumps(now[name])) != before.get(name, now[name]):
            return tuple(spelled(name, before.get(name), now[name], language) for language in ("en", "zh"))
    return None
