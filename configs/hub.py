"""Names: what is a place on this machine and what is on the Hub, whether the Hub answers, and what its errors mean.

Light: imported before torch, because the libraries read HF_HUB_OFFLINE once, when they load.
"""

import contextlib
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from configs.settings import ROOT, fail, say

WAYS_OUT = (
    "use a local folder or file, `--preset demo` (needs no network), a mirror (set HF_ENDPOINT), "
    "or HF_HUB_OFFLINE=1 with what an earlier run has cached"
)


def local_path(name: str) -> Path | None:
    """The file or folder that a name means: below the current folder, else beside the scripts; None for a Hub name."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            return path
    return None


def model_path(name: str) -> str:
    """What from_pretrained is given: an absolute path for a local folder, which stays right elsewhere; a Hub name."""
    path = local_path(name)
    return str(path.resolve()) if path else name


def is_hub_name(name: str) -> bool:
    """True for `owner/name` or `name` that is not a path on this machine."""
    return local_path(name) is None and not looks_like_path(name)


def looks_like_path(name: str) -> bool:
    """True for a name that can only be meant as a place on this machine, whether or not it exists."""
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
    """What is wrong with a model's name before anything is loaded: [], or one sentence."""
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


def model_problems(settings: dict) -> list[str]:
    """What is wrong with MODEL_NAME among {name: value}; `override` asks it together with its own checks."""
    return check_model(settings["MODEL_NAME"], settings["MODEL_REVISION"])
