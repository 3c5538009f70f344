"""What one script writes and another reads: atomic writes, locks, the manifest, whether a run continues another."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from configs.settings import SECTIONS, command, fail, main_process

PREPARE, LORA, FULL, EVALUATE = SECTIONS  # the scripts, in running order
# what flock answers on a file system without locks (some network mounts)
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


TRAINED_ROWS = "trained_rows.json"  # ids and questions of the rows that a model has seen, beside its log

# --- atomic writes


def write_text(path: str | Path, text: str) -> None:
    """Replace a file so that a reader sees the old content or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        # half a character, which no file holds, as JSON has it in a string: \ud83d
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
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
    """Write JSON atomically; NaN and infinity, which are not JSON, are refused here rather than by a reader."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder; what is put there takes the place of the same names in `folder`, all of it or nothing.

    The new content waits in `folder`/.new, which vanishes on any failure. Names that begin with a dot are scratch and
    are not taken over. The caller holds the lock of `folder`. Of several processes only the first one exchanges; the
    others are given the same path.
    """
    folder = Path(folder)
    new = folder / ".new"
    if not main_process():
        yield new
        return
    shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed
    new.mkdir(parents=True)
    try:
        yield new
        _exchange(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(new: Path, folder: Path) -> None:
    """Move everything in `new` to `folder`, in place of what has the same names there.

    What is replaced waits in `folder`/.old until all is done; while .old exists, the exchange is unfinished, and
    `_roll_back` undoes it: at once when a move fails, or when the folder is next locked if this process was killed.
    """
    _roll_back(folder)
    old, names = folder / ".old", sorted(path.name for path in new.iterdir() if not path.name.startswith("."))
    old.mkdir()
    write_json(old / ".names", {name: (folder / name).exists() for name in names})
    try:
        for name in names:
            if (folder / name).exists():
                (folder / name).rename(old / name)
        for name in names:
            (new / name).rename(folder / name)
        old.rename(folder / ".done")  # from this moment on, the new content counts
    except BaseException:
        _roll_back(folder)
        raise
    shutil.rmtree(folder / ".done", ignore_errors=True)


def _roll_back(folder: Path) -> None:
    """Undo an exchange that was cut off: the folder is as it was before. Nothing happens where none was."""
    old, names = folder / ".old", {}
    with contextlib.suppress(OSError, ValueError):  # without the list, nothing was moved yet
        names = json.loads((old / ".names").read_text("utf-8"))
    for name, existed in names.items():  # what goes wrong here must be seen, and .old be kept
        path = folder / name
        if (old / name).exists() or not existed:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if (old / name).exists():
            (old / name).rename(path)
    for leftover in (old, folder / ".done"):
        shutil.rmtree(leftover, ignore_errors=True)


def move_aside(folder: str | Path, place: Path) -> str:
    """Move all that lies in `folder` to `place`, on the same file system; where it is now.

    The caller holds the lock of `folder`. A move that is cut off is finished when the folder is next locked.
    """
    folder = Path(folder)
    try:
        place.mkdir(parents=True)
        write_text(folder / ".aside", str(place))
    except OSError as error:
        fail(f"{place} cannot be made ({error.strerror}); nothing was moved")
    _finish_aside(folder)
    return os.path.relpath(place)


def _finish_aside(folder: Path) -> None:
    marker = folder / ".aside"
    if not marker.exists():
        return
    place = Path(marker.read_text("utf-8"))
    place.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("[!.]*")):
        if path.name != "history":
            path.rename(place / path.name)
    marker.unlink()


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Let one run at a time write into a folder, and undo what a killed run left half exchanged there.

    The lock dies with its process, so a killed run leaves none behind. Raises: SystemExit(2) where another run holds
    it, or where nothing can be written.
    """
    folder = Path(folder)
    if not main_process():  # the other processes of one run write nothing
        yield
        return
    held = FileLock(folder / ".lock", blocking=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        fail(f"{folder}: another run is writing there{holder(folder)}; wait for it, or stop it first")
    except OSError as error:
        if error.errno not in NO_LOCKS:  # without locks, two runs at once are the user's own care
            fail(f"{folder}: cannot write there ({error.strerror}); choose another folder or mend its permissions")
    try:
        with contextlib.suppress(OSError):  # a full disk: who waits is not told who writes
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            (folder / ".writer").write_text(json.dumps({"pid": os.getpid(), "since": since}), "utf-8")
        _roll_back(folder)
        _finish_aside(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / ".writer").unlink(missing_ok=True)
        held.release()


def holder(folder: str | Path) -> str:
    """Who holds the lock of a folder, as " (process 123, since ...)"; "" where it is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        writer = json.loads((Path(folder) / ".writer").read_text("utf-8"))
        return f" (process {writer['pid']}, since {writer['since']})"
    return ""


def is_locked(folder: str | Path) -> bool:
    """Whether a process holds the lock of a folder at this moment."""
    if not (Path(folder) / ".lock").exists():
        return False
    held = FileLock(Path(folder) / ".lock", blocking=False, fallback_to_soft=False)
    try:
        held.acquire()
    except (Timeout, OSError):
        return True
    held.release()
    return False


def settle(folder: str | Path) -> None:
    """Before reading: undo an exchange that a killed run left unfinished. Nothing happens where none was.

    Of several processes the first one does it, and the others do not wait for it.
    """
    if main_process() and (Path(folder) / ".old").is_dir():
        with lock(folder):
            pass


# --- the manifest and the data


def read_json(path: str | Path, mend: str, needs: tuple[str, ...] = ()) -> dict:
    """Read one of our JSON files, or end with the command that makes it. needs: keys that it must have.

    Raises: SystemExit(2) when it is missing, unreadable, not JSON or without one of its keys.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if lacking := [key for key in needs if not isinstance(value, dict) or key not in value]:
            fail(f"{path} is not complete ({lacking[0]} is missing); write it anew with: {mend}")
        return value
    except FileNotFoundError:
        fail(f"{path} is missing; it is written by: {mend}")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fail(f"{path} cannot be read ({error}); write it anew with: {mend}")


def content_hash(messages: list[dict]) -> str:
    """The id of a row: 16 hexadecimal digits, a hash of its prompt and completion, the same on every machine."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"{message['role']}:{len(message['content'])}:{message['content']}\n".encode())
    return digest.hexdigest()[:16]


def text_hash(text: str) -> str:
    """What stands for a paragraph of general text in trained_rows.json; 16 hexadecimal digits."""
    return content_hash([{"role": "text", "content": text}])


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, read in portions."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while portion := file.read(2**20):
            digest.update(portion)
    return digest.hexdigest()


def split_hash(ids: Iterable[str], parts: Iterable[str] = ()) -> str:
    """sha256 of a split: over the ids of its rows in order, each with its part where there is one."""
    lines = map(" ".join, itertools.zip_longest(ids, parts, fillvalue=""))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_manifest(data_dir: str | Path) -> dict:
    """The manifest of complete data, with `sha256` of its own file added as `manifest_sha256`.

    The manifest is written last, so a folder without it was never finished.
    Raises: SystemExit(2) when the data are missing or incomplete.
    """
    settle(data_dir)
    path, prepare = Path(data_dir) / "manifest.json", command(PREPARE)
    names = sorted(p.name for p in Path(data_dir).glob("[!.]*")) if Path(data_dir).is_dir() else []
    if not path.exists():
        holds = f"{data_dir} holds only {', '.join(names)}" if names else f"{data_dir} is empty"
        fail(f"there are no complete data: {path} is missing ({holds}); make them with: {prepare}")
    manifest = read_json(path, prepare, ("source", "settings", "rows", "sha256"))
    for name in ("train", "eval"):
        if not (Path(data_dir) / name).is_dir():
            fail(f"{data_dir}/{name} is missing although {path} is there; make the data anew with: {prepare}")
    manifest["manifest_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return manifest


def load_split(data_dir: str | Path, name: str):
    """`data/train` or `data/eval` as a datasets.Dataset with columns id, prompt, completion (and part)."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(Path(data_dir) / name))
    except Exception as error:  # arrow raises many kinds for a damaged file
        reason = str(error).splitlines()[0]
        fail(f"{data_dir}/{name} cannot be read ({reason}); make the data anew with: {command(PREPARE)}")


# --- the log of a training


def draw_losses(
    axis, history: list[dict], labels: tuple[str, str] = ("training", "validation"), color: str | None = None
) -> None:
    """Training loss (a line) and validation loss (dots) of a log's `history` over the optimizer steps.

    axis: of matplotlib; labels: what the two curves are called in the legend.
    """
    for key, label, style in zip(("loss", "eval_loss"), labels, ("-", "o--"), strict=True):
        records = [r for r in history if isinstance(r, dict) and isinstance(r.get(key), float) and "step" in r]
        if records:
            steps, losses = [r["step"] for r in records], [r[key] for r in records]
            axis.plot(steps, losses, style, color=color, markersize=3, label=label)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("loss (nats per token)")
