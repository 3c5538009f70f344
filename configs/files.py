"""The hand-over between the scripts: atomic writes, the manifest, locks, what a row is in tokens, Hub errors.

Nothing here trains or scores. Everything that one script writes and another one reads goes through this module, so
that both ends agree: on where a file lies, on when it is complete, and on which token ids a conversation becomes.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from configs.settings import fail

ROOT = Path(__file__).resolve().parent.parent
STEP_1 = "python 1_prepare_dataset.py"


def main_process() -> bool:
    """True in the only process, or in the first of several."""
    return os.environ.get("RANK", "0") == "0"


def say(*words: object) -> None:
    """Print one line, once per run however many processes there are."""
    if main_process():
        print(*words, flush=True)


# --- atomic writes


def write_text(path: str | Path, text: str) -> None:
    """Replace a file so that a reader sees the old content or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give the result the mode that open() would have given it
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically. NaN and infinity are not JSON, so they are refused here rather than by a
    reader."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: str | Path):
    """Yield an empty folder beside `path`; on success it takes the place of `path`, on any failure it vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    temporary.chmod(0o755)
    try:
        yield temporary
        put_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_folder(new: Path, path: Path) -> None:
    """Move a finished folder to its place. The old one is put back when the move fails."""
    old = path.with_name(f".{path.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def put_all(staged: Path, folder: Path) -> None:
    """Move everything in `staged` to `folder`, in place of what has the same names there: all or nothing.

    What is replaced waits in `folder`/.old until all is done; while .old exists, the exchange is unfinished, and
    `roll_back` undoes it: at once when a move fails, at the next run or reading when this process was killed.
    """
    roll_back(folder)
    old, names = folder / ".old", sorted(path.name for path in staged.iterdir())
    old.mkdir()
    write_json(old / ".names", {name: (folder / name).exists() for name in names})
    try:
        for name in names:
            if (folder / name).exists():
                (folder / name).rename(old / name)
        for name in names:
            (staged / name).rename(folder / name)
        old.rename(folder / ".done")  # from this moment on, the new content counts
    except BaseException:
        roll_back(folder)
        raise
    shutil.rmtree(folder / ".done", ignore_errors=True)


def roll_back(folder: Path) -> None:
    """Undo an exchange of `put_all` that was cut off: the folder is as it was before. Nothing where none
    was."""
    old, names = folder / ".old", {}
    with contextlib.suppress(OSError, ValueError):  # without the list, nothing was moved yet
        names = json.loads((old / ".names").read_text("utf-8"))
    for name, was_there in names.items():  # what goes wrong here must be seen, and .old be kept
        path = folder / name
        if (old / name).exists() or not was_there:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if (old / name).exists():
            (old / name).rename(path)
    for left in (old, folder / ".done"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def lock(folder: str | Path):
    """Let one run at a time write into a folder. The lock dies with its process, so a killed run leaves none
    behind."""
    folder = Path(folder)
    if not main_process():  # the other processes of one run write nothing
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115 (held open for the whole run)
    except OSError as error:
        fail(f"{folder}: cannot write there ({error.strerror}); choose another folder or mend its permissions")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; two runs at once are then the user's own care
            pass
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                pass  # a file system without locks (some network mounts): as on Windows
            else:
                fail(f"{folder}: another run is writing there; wait for it, or stop it first")
        yield


# --- the manifest and the data


def read_json(path: str | Path, mend: str, needs: tuple[str, ...] = ()) -> dict:
    """Read one of our JSON files, or end with the command that makes it. needs: keys that it must have.

    Raises: SystemExit(2) when it is missing, unreadable, not JSON or without one of its keys.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if lacking := [key for key in needs if key not in value]:
            fail(f"{path} is not complete ({lacking[0]} is missing); write it anew with: {mend}")
        return value
    except FileNotFoundError:
        fail(f"{path} is missing; it is written by: {mend}")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fail(f"{path} cannot be read ({error}); write it anew with: {mend}")


def content_hash(messages: list[dict]) -> str:
    """The id of a row, 16 hexadecimal digits: a hash of its prompt and completion, the same on every
    machine."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"{message['role']}:{len(message['content'])}:{message['content']}\n".encode())
    return digest.hexdigest()[:16]


def split_hash(ids: Iterable[str], parts: Iterable[str] = ()) -> str:
    """sha256 of a split: over the ids of its rows in order, each with its part where there is one."""
    lines = map(" ".join, itertools.zip_longest(ids, parts, fillvalue=""))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_manifest(data_dir: str | Path) -> dict:
    """The manifest of complete data, with `sha256` of its own file added as `manifest_sha256`.

    The manifest is written last, so a folder without it was never finished.
    Raises: SystemExit(2) when the data are missing or incomplete.
    """
    path = Path(data_dir) / "manifest.json"
    if (
        main_process() and (Path(data_dir) / ".old").is_dir()
    ):  # a run of step 1 was killed while it exchanged the files
        with lock(data_dir):
            roll_back(Path(data_dir))
    there = sorted(p.name for p in Path(data_dir).glob("[!.]*")) if Path(data_dir).is_dir() else []
    if not path.exists():
        found = f"{data_dir} holds only {', '.join(there)}" if there else f"{data_dir} is empty"
        fail(f"there are no complete data: {path} is missing ({found}); make them with: {STEP_1}")
    manifest = read_json(path, STEP_1, ("source", "settings", "rows", "sha256"))
    for name in ("train", "eval"):
        if not (Path(data_dir) / name).is_dir():
            fail(f"{data_dir}/{name} is missing although {path} is there; make the data anew with: {STEP_1}")
    manifest["manifest_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return manifest


def load_split(data_dir: str | Path, name: str):
    """`data/train` or `data/eval` as a datasets.Dataset with columns id, prompt, completion (and part)."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(Path(data_dir) / name))
    except Exception as error:  # arrow raises many kinds for a damaged file
        reason = str(error).splitlines()[0]
        fail(f"{data_dir}/{name} cannot be read ({reason}); make the data anew with: {STEP_1}")


def local_path(name: str) -> Path | None:
    """The file or folder that a name means: below the current folder, else beside the scripts; None for a Hub name."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            return path
    return None


def model_path(name: str) -> str:
    """What from_pretrained is given: an absolute path for a local folder (it stays right elsewhere), else the Hub
    name."""
    path = local_path(name)
    return str(path.resolve()) if path else name


# --- the Hub


WAYS_OUT = (
    "use a local folder or file, `--preset demo` (needs no network), a mirror (set HF_ENDPOINT), or HF_HUB_OFFLINE=1 "
    "with what an earlier run has cached"
)


def is_hub_name(name: str) -> bool:
    """True for `owner/name` or `name` that is not a path on this machine."""
    return local_path(name) is None and not looks_like_path(name)


def looks_like_path(name: str) -> bool:
    """True for a name that can only be meant as a place on this machine, whether or not something is " "there."""
    begins = name.startswith((".", "/", "~", "outputs/", "data/", "configs/"))
    ends = name.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))
    return begins or ends or "\\" in name or name.count("/") > 1


def cached(name: str) -> bool:
    """True when an earlier run has left this model or data set in the Hub's cache on this machine."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    folder = name.replace("/", "--")
    return any((hub / f"{kind}--{folder}" / "snapshots").is_dir() for kind in ("models", "datasets"))


def go_online(*names: str | None) -> None:
    """Decide within seconds whether the Hub can be asked for `names`; the libraries would retry for minutes.

    Sets HF_HUB_OFFLINE=1 when nothing is to be fetched, or when nobody answers but the cache holds everything. Call it
    before transformers or datasets are imported: they read it once.
    Raises: SystemExit(2) when a name is neither cached nor to be had.
    """
    wanted = [name for name in names if name and is_hub_name(name)]
    reason = ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        reason = "HF_HUB_OFFLINE is set"
    elif wanted and (error := probe(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))):
        reason = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')} cannot be reached ({error})"
    missing = [name for name in wanted if reason and not cached(name)]
    if missing:
        fail(f"{' and '.join(missing)} cannot be fetched: {reason}; {WAYS_OUT}")
    if wanted and reason:
        say(f"note: {reason}; using what an earlier run has cached")
    if reason or not wanted:
        os.environ["HF_HUB_OFFLINE"] = "1"


def probe(endpoint: str) -> str:
    """Ask an address for a sign of life: "" when it answers within six seconds, else the reason why not."""
    answer: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "sft-pipeline"})
            urllib.request.urlopen(request, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer
        except (OSError, ValueError) as error:
            answer.append(str(getattr(error, "reason", error)) or type(error).__name__)
            return
        answer.append("")

    # a thread, because a name server that does not answer is outside urllib's time-out
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(6)
    return answer[0] if answer else "no answer within 6 s"


@contextlib.contextmanager
def hub_errors(kind: str, name: str, flag: str, revision: str | None = None):
    """Turn what the libraries raise for a missing, gated or unreachable repository into one sentence and exit code 2.

    kind: "model" or "data set"; flag: the setting that named it; revision: the one that was asked for.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        chain, seen = [], error
        while seen is not None:
            chain.append(seen)
            seen = seen.__cause__ or seen.__context__
        types = {type(e).__name__ for e in chain}
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        page = f"{endpoint}/{'datasets/' if kind != 'model' else ''}{name}"
        text = " ".join(map(str, chain))  # datasets has one type for all three, so its text tells them apart
        if "GatedRepoError" in types or "is a gated dataset" in text:
            fail(f"{kind} {name!r} ({flag}) is gated: accept its terms at {page}, then run `hf auth login`")
        if "RevisionNotFoundError" in types or revision and f"Revision '{revision}' doesn't exist" in text:
            fail(
                f"{kind} {name!r} has no revision {revision!r} ({flag.replace('NAME', 'REVISION')}); see the branches "
                f"and tags at {page}"
            )
        if (
            "RepositoryNotFoundError" in types
            or "DatasetNotFoundError" in types
            and os.environ.get("HF_HUB_OFFLINE") != "1"
        ):
            fail(f"{kind} {name!r} ({flag}) is not on the Hub, or it is private: check the name at {page}")
        if is_hub_name(name) and os.environ.get("HF_HUB_OFFLINE") == "1":
            fail(f"{kind} {name!r} ({flag}) is not complete in the cache, and the Hub is not asked; {WAYS_OUT}")
        if types & {"ConnectionError", "ConnectError", "ReadTimeout", "ConnectTimeout", "LocalEntryNotFoundError"}:
            fail(f"{kind} {name!r} ({flag}) could not be fetched ({str(error).splitlines()[0]}); {WAYS_OUT}")
        raise


def check_model(name: str, revision: str | None = None, flag: str = "MODEL_NAME") -> list[str]:
    """What is wrong with a model name before anything is loaded: [] or one sentence (a folder that is none, a
    typo)."""
    path = local_path(name)
    if path is None:
        if name.startswith("outputs/demo_base_model"):
            return [f"{flag} {name!r} is not made yet; make it with: python configs/demo/base_model.py"]
        if looks_like_path(name):
            return [f"{flag} {name!r}: there is no such folder; give a Hub name or a folder with a config.json"]
        return []
    if not (path / "config.json").is_file():
        return [f"{flag} {name!r} is not a model folder: {path}/config.json is missing; give a folder that has one"]
    return []


# --- what a row is in tokens


def chat_template_file(prompt_format: str) -> Path:
    """configs/chat_templates/<prompt_format>.jinja, or exit code 2 with the formats that exist."""
    path = ROOT / "configs" / "chat_templates" / f"{prompt_format}.jinja"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.jinja"))
        fail(f"PROMPT_FORMAT {prompt_format!r} does not exist; choose auto, {', '.join(known)}")
    return path


def load_tokenizer(name: str, revision: str | None, prompt_format: str):
    """A tokenizer whose chat template is the model's own ("auto", where it has one) or one of ours; no token is added.

    Its template travels with it: whatever is saved with this tokenizer renders conversations as they were trained.
    Raises: SystemExit(2) when the model cannot be had.
    """
    from transformers import AutoTokenizer

    with hub_errors("model", name, "MODEL_NAME", revision):
        tokenizer = AutoTokenizer.from_pretrained(model_path(name), revision=revision)
    if tokenizer.eos_token is None:
        fail(f"model {name!r} has no end-of-text token (eos_token), so an answer could not end; use another model")
    if not tokenizer("What is an ETF?", add_special_tokens=False).input_ids:
        fail(f"model {name!r} has no tokenizer that can be used (is tokenizer.json missing?); save one with it")
    if prompt_format != "auto" or not tokenizer.chat_template:
        template = chat_template_file("chatml" if prompt_format == "auto" else prompt_format).read_text("utf-8")
        # Llama's tokenizer begins every text with its BOS, phi-2's does not: the template does what the model knows.
        begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [
            tokenizer.bos_token_id
        ]
        tokenizer.chat_template = "{{- bos_token -}}\n" + template if begins_with_bos else template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # only fills rows up; the loss is masked by position, not by token id
    return tokenizer


def is_our_template(tokenizer) -> bool:
    """True when the chat template is one of configs/chat_templates, so not one that the model came with."""
    ours = (ROOT / "configs" / "chat_templates").glob("*.jinja")
    return any((tokenizer.chat_template or "").endswith(path.read_text("utf-8")) for path in ours)


def markers(tokenizer) -> list[str]:
    """Strings that would pose as a turn or as the end of one: special tokens and the markers of the chat template."""
    found = set(tokenizer.all_special_tokens)
    found |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    template = tokenizer.chat_template or ""
    declared = re.search(r"\{#-? markers: (.*?) -?#\}", template)
    if declared:  # "### Response:" holds a space, so the list is cut before each marker's own beginning
        found |= {m.strip() for m in re.split(r"\s+(?=###|\[|<)", declared.group(1)) if m.strip()}
    else:
        found |= set(re.findall(r"<\|[^|<>]+\|>|\[/?[A-Z_]{3,}\]|<</?SYS>>|<(?:start|end)_of_turn>", template))
    return sorted(found)


def render(tokenizer, prompt: list[dict], completion: list[dict]) -> tuple[str, str]:
    """Text of the prompt up to where the answer begins, and of the answer up to and with the token that ends it.

    Raises: ValueError when the template does not continue its own generation prompt (the answer cannot be told apart).
    """
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    if not whole.startswith(before):
        raise ValueError("the chat template renders a prompt differently once its answer is there")
    after = whole[len(before) :]
    ends = [token for token in tokenizer.all_special_tokens if after.rstrip().endswith(token)]
    # the line break that many templates put behind the end token is the next turn's, not the answer's
    return before, after.rstrip() if ends else after + tokenizer.eos_token


def encode(tokenizer, prompt: list[dict], completion: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with the one token that ends it: the same in training and scoring.

    prompt, completion: lists of {role, content}. The prompt's ids are exactly those that generation will start from.
    """
    before, after = render(tokenizer, prompt, completion)
    context = tokenizer(before, add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer(before + after, add_special_tokens=False, verbose=False).input_ids
    if whole[: len(context)] == context:
        return context, whole[len(context) :]
    # a merge across the boundary: generation could never produce it, so the answer is tokenised by itself
    return context, tokenizer(after, add_special_tokens=False, verbose=False).input_ids


def answer_end(tokenizer) -> int:
    """Id of the token that ends an answer under this tokenizer's template (EOS, or a chat model's end-of-turn)."""
    one = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    return encode(tokenizer, *one)[1][-1]


# --- machine


def keep_4bit_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference when a CPU with avx512_bf16 first evaluates them.

    It does so once and for all (0.50.2): from the first evaluation on, no gradient passes through the 4-bit layers,
    and a layer whose width is no multiple of 64 fails. Training, evaluation and scoring then share one arithmetic,
    too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment() -> dict:
    """What a result depends on besides its settings: versions, processor, platform."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in "torch transformers datasets peft trl bitsandbytes accelerate deepspeed evaluate tensorboard".split():
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cpu_count": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": packages,
        "command": " ".join(sys.argv),
    }
