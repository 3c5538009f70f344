"""Names: what is a place on this machine and what is on the Hub, whether the Hub answers, and what its errors mean.

Light: imported before torch, because the libraries read HF_HUB_OFFLINE once, when they load.
"""

import contextlib
import difflib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.settings import ROOT, fail, first_on_machine, say
from configs.text import quoted

# A model can bring Python code of its own, which the libraries would run, after a question on the terminal where this
# is not said. It is never run here.
TRUST_REMOTE_CODE = False

WAYS_OUT = (
    "use a local folder or file, `--preset demo` (needs no network), a mirror (set HF_ENDPOINT), "
    "or HF_HUB_OFFLINE=1 with what an earlier run has cached"
)


def local_path(name: str) -> Path | None:
    """The file or folder that a name means: below the current folder, else beside the scripts; None for a Hub name."""
    # too long for a path, the home of a user whom this machine does not know (~nobody), a folder that is locked
    with contextlib.suppress(OSError, RuntimeError):
        for path in (Path(name).expanduser(), ROOT / name):
            if path.exists():
                return path
    return None


def model_path(name: str) -> str:
    """What from_pretrained is given: an absolute path for a local folder, which stays right elsewhere; a Hub name."""
    path = local_path(name)
    return str(path.resolve()) if path else name


def text_name(name: str | None) -> str | None:
    """The file or the Hub data set of a general text, without the #configuration behind a Hub name."""
    return name if name is None or local_path(name) else name.partition("#")[0]


def is_hub_name(name: str) -> bool:
    """True for `owner/name` or `name` that is not a path on this machine."""
    return local_path(name) is None and not looks_like_path(name)


def looks_like_path(name: str) -> bool:
    """True for a name that can only be meant as a place on this machine, whether or not it exists."""
    begins = name.startswith((".", "/", "~", "outputs/", "data/", "configs/"))
    ends = name.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))
    return begins or ends or "\\" in name or name.count("/") > 1


def endpoint() -> str:
    """The address of the Hub, or of the mirror that takes its place."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def is_offline() -> bool:
    """True where the Hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def name_problems(flag: str, name: str) -> list[str]:
    """What is wrong with a name that can be neither a place on this machine nor one on the Hub: [] or one sentence."""
    # the rule of huggingface_hub.validate_repo_id, which takes a second to import
    possible = re.fullmatch(r"(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", name, re.ASCII)
    if not is_hub_name(name) or possible and not re.search(r"--|\.\.|\.git$", name):
        return []
    return [
        f"{flag} is {quoted(name)}, which is neither a file or folder on this machine nor a name on the Hub "
        "(owner/name, of at most 96 letters, digits, - _ and . each); correct it"
    ]


def cached(name: str) -> bool:
    """True when an earlier run has left this model or data set in the Hub's cache on this machine."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    folder = name.replace("/", "--")
    return any((hub / f"{kind}--{folder}" / "snapshots").is_dir() for kind in ("models", "datasets"))


def go_online(*names: str | None, push: str | None = None) -> None:
    """Decide within seconds whether the Hub can be asked for `names`; the libraries would retry for minutes.

    Sets HF_HUB_OFFLINE=1 when nothing is to be fetched, or when nobody answers but the cache holds everything. Call it
    before transformers or datasets are imported: they read it once. push: where the result is to be uploaded.
    Raises: SystemExit(2) when a name is neither cached nor to be had, or a time-out is no number.
    """
    wanted = [name for name in names if name and is_hub_name(name)]
    for variable in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):  # the library would end with a traceback
        if not (seconds := os.environ.get(variable) or "1").isdecimal() or not int(seconds):
            fail(f"{variable} is {seconds!r}; give whole seconds, e.g. export {variable}=30")
    reason = ""
    if is_offline():
        reason = "HF_HUB_OFFLINE is set"
    elif (wanted or push) and (error := probe(endpoint())):
        reason = f"{endpoint()} cannot be reached ({error})"
    missing = [name for name in wanted if reason and not cached(name)]
    if missing:
        fail(f"{' and '.join(missing)} cannot be fetched: {reason}; {WAYS_OUT}")
    if push and reason:
        fail(f"nothing can be uploaded to {push} (PUSH_TO_HUB): {reason}; train without it: --push_to_hub none")
    if wanted and reason:
        say(f"note: {reason}; using what an earlier run has cached")
    if reason or not (wanted or push):
        os.environ["HF_HUB_OFFLINE"] = "1"


def within(seconds: float, function: Callable[[], object]) -> object:
    """What a function returns, None where that takes longer than `seconds`.

    In a thread: a name server that does not answer, and a server that drips, are outside of urllib's time-out.
    """
    answer: list[object] = []
    thread = threading.Thread(target=lambda: answer.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def probe(endpoint: str) -> str:
    """Ask an address for a sign of life: "" when it answers within six seconds, else the reason why not."""

    def ask() -> str:
        import http.client  # the menu opens before they are needed
        import urllib.request

        try:
            request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "sft-pipeline"})
            urllib.request.urlopen(request, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer
        except (OSError, ValueError, http.client.HTTPException) as error:
            return str(getattr(error, "reason", error)).strip() or type(error).__name__
        return ""

    answer = within(6, ask)
    return "no answer within 6 s" if answer is None else answer


# --- what the libraries raise, as a sentence


class Unfit(Exception):
    """Why a model cannot be used, found by us inside of a call that `hub_errors` and `models.loading` guard."""


@contextlib.contextmanager
def hub_errors(kind: str, name: str, flag: str, revision: str | None = None) -> Iterator[Callable[[], None]]:
    """Turn what the libraries raise for a repository that cannot be had into one sentence and exit code 2.

    Missing, gated, unreachable, too slow, or with files that came damaged or not at all. kind: "model" or "data set";
    flag: the setting that named it; revision: the one that was asked for. Gives a function that looks for damaged
    files at once: call it before an error is explained in another way.
    """
    what, since = f"{kind} {name!r} ({flag})", time.time()
    if not is_hub_name(name) or is_offline():
        try:
            yield lambda: None
        except (OSError, ValueError, RuntimeError) as error:
            explain(error, kind, name, flag, revision)
            raise
        return

    from configs import network  # needs huggingface_hub

    def check() -> None:
        if files := network.remove_damaged(name, "model" if kind == "model" else "dataset", since):
            if datasets := sys.modules.get("datasets"):  # what it has made of them
                shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___"), ignore_errors=True)
            fail(
                f"{what} came damaged: {', '.join(files)} has other bytes than {endpoint()} says; it was removed from "
                "the cache, so run the same command again, or use another mirror (HF_ENDPOINT) if it persists"
            )

    try:
        with network.waiting(what, WAYS_OUT, cached(name)) as wait:
            yield check
    except network.GaveUp as reason:
        fail(f"{what} could not be fetched: {reason}; {WAYS_OUT}")
    except Exception as error:
        check()
        explain(error, kind, name, flag, revision)
        raise
    if first_on_machine():  # the files are the same to the others
        check()
    if lost := wait.lost(name, "model" if kind == "model" else "dataset"):
        files = ", ".join(f"{file} ({why})" for file, why in lost.items())
        fail(f"{what} could not be fetched: without {files} it would be another one; run again, or {WAYS_OUT}")


def explain(error: Exception, kind: str, name: str, flag: str, revision: str | None) -> None:
    """Exit code 2 and one sentence for what the libraries raise; returns where it is no error of the Hub."""
    if isinstance(error, Unfit):
        return  # what it came from stands in its chain, and explains less
    what, chain = f"{kind} {name!r} ({flag})", [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    types = {
        base.__name__ for e in chain for base in type(e).__mro__ if type(e).__name__ != "RemoteEntryNotFoundError"
    }
    page = f"{endpoint()}/{'datasets/' if kind != 'model' else ''}{name}"
    text = " ".join(map(str, chain))  # datasets has one type for all three, so its text tells them apart
    status = {getattr(getattr(e, "response", None), "status_code", None) for e in chain}
    if "GatedRepoError" in types or "is a gated dataset" in text:
        fail(f"{what} is gated: accept its terms at {page}, then run `hf auth login`")
    if "RevisionNotFoundError" in types or revision and f"Revision '{revision}' doesn't exist" in text:
        setting = flag.replace("NAME", "REVISION")
        fail(f"{kind} {name!r} has no revision {revision!r} ({setting}); see the branches and tags at {page}")
    if "RepositoryNotFoundError" in types or "DatasetNotFoundError" in types and not is_offline():
        near = near_name(kind, name)
        near = f"; did you mean {near!r}?" if near else f": check the name at {page}, or run `hf auth login`"
        fail(f"{what} is not on the Hub, or it is private{near}")
    # what is wrong inside a cached model's files is no OSError
    if is_hub_name(name) and is_offline() and (kind != "model" or isinstance(error, OSError)):
        fail(f"{what} is not complete in the cache, and the Hub is not asked; {WAYS_OUT}")
    if 401 in status:
        fail(
            f"{what} could not be fetched: {endpoint()} does not accept the token (HTTP 401); run `hf auth login` for "
            "a new one, and unset HF_TOKEN if it is set"
        )
    if 403 in status:
        fail(
            f"{what} could not be fetched: the token, or its lack, does not allow it (HTTP 403); see {page}, then run "
            "`hf auth login` with a token that may read it"
        )
    if "JSONDecodeError" in types and is_hub_name(name):
        fail(f"{what} cannot be read: what came is no JSON ({error}); see {page}, and whether {endpoint()} is a Hub")
    if missing := re.search("does not appear to have (a file named|files named) .+?(?=[.] Checkout|$)", text):
        fail(f"{what} cannot be used: it {missing[0]}; see {page}")
    if types & {"ConnectionError", "HTTPError", "LocalEntryNotFoundError"} or "Consistency check failed" in text:
        last = next((e for e in reversed(chain) if str(e).strip()), error)
        reason = f"{type(last).__name__}: {str(last).strip().splitlines()[0]}"
        fail(f"{what} could not be fetched ({reason}); run again, or {WAYS_OUT}")


def near_name(kind: str, name: str) -> str | None:
    """A name like this one, among those in our files and the Hub's; None where there is none.

    The Hub is asked without a token, once for those with the same last part and once for the owner's repositories.
    """
    files = [*(ROOT / "configs" / "presets").glob("*.yaml"), *ROOT.glob("[1-4]_*.py"), *ROOT.glob("README.md")]
    words = " ".join(path.read_text("utf-8", errors="replace") for path in files)
    known = {word for word in re.findall(r"[\w-][\w.-]*/[\w.-]*\w", words) if not looks_like_path(word)}
    owner, _, last = name.lower().rpartition("/")

    def ask() -> list[str]:
        import urllib.parse
        import urllib.request

        names = []
        for query in ({"search": last}, {"author": owner}) if owner else ({"search": last},):
            with contextlib.suppress(Exception):  # a suggestion is worth no error
                query = urllib.parse.urlencode(query | {"limit": 100})
                address = f"{endpoint()}/api/{'models' if kind == 'model' else 'datasets'}?{query}"
                with urllib.request.urlopen(address, timeout=3) as answer:
                    names += [entry["id"] for entry in json.loads(answer.read(10**6))]
        return names

    known.update(within(6, ask) or ())
    near = {other.lower(): other for other in sorted(known) if other != name}
    close = difflib.get_close_matches(f"{owner}/{last}", near, 1, 0.75)
    close += [other for other in near if other.endswith(f"/{last}")]
    return near[close[0]] if close else None


# --- a model's name


def check_model(name: str, revision: str | None = None, flag: str = "MODEL_NAME") -> list[str]:
    """What is wrong with a model's name before anything is loaded: [], or one sentence."""
    path = local_path(name)
    if path is None:
        if name.startswith("outputs/demo_base_model"):
            chinese = " zh" * name.endswith("_zh")
            return [f"{flag} {name!r} is not made yet; make it with: python configs/demo/base_model.py{chinese}"]
        if looks_like_path(name):
            return [f"{flag} {quoted(name)}: there is no such folder; give a Hub name or a folder with a config.json"]
        return name_problems(flag, name)
    if not (path / "config.json").is_file():
        return [f"{flag} {name!r} is not a model folder: {path}/config.json is missing; give a folder that has one"]
    return []


def model_problems(settings: dict) -> list[str]:
    """What is wrong with names among {name: value}; `override` asks it together with its own checks."""
    wrong = check_model(settings["MODEL_NAME"], settings["MODEL_REVISION"])
    for flag in ("DATASET_NAME", "GENERAL_TEXT", "REPLAY_TEXT", "EMBEDDING_MODEL", "JUDGE"):
        name = settings.get(flag) or ""
        if flag == "JUDGE":
            name = name.removeprefix("reward:") if name.startswith("reward:") else ""
        elif flag.endswith("_TEXT"):
            name = text_name(name)
        wrong += name_problems(flag, name)
    return wrong + push_problems(settings.get("PUSH_TO_HUB"))


def push_problems(name: str | None) -> list[str]:
    """What is wrong with uploading to a name, as far as it is seen without asking the Hub: [] or one sentence."""
    if name is None:
        return []
    if len(name) > 96 or not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) or re.search(r"--|\.\.|\.git$", name):
        wanted = f"me/{name}" if "/" not in name else "me/my-model"
        return [
            f"PUSH_TO_HUB is {quoted(name)}; give the owner and a name, 96 characters at most, e.g. --push_to_hub "
            f"{wanted[:60]}"
        ]
    if is_offline():
        return [
            f"PUSH_TO_HUB is {quoted(name)}, but HF_HUB_OFFLINE is set; unset it, or train without: --push_to_hub none"
        ]
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    kept = Path(os.environ.get("HF_TOKEN_PATH", home / "token")).expanduser()
    if not os.environ.get("HF_TOKEN") and not kept.exists():
        return [
            f"PUSH_TO_HUB is {quoted(name)}, and there is no token; make one with write access and run `hf auth login`"
        ]
    return []
