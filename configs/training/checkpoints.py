"""Checkpoints that can be trusted: which run each belongs to, and whether its files are as they were written."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs import handover

MANIFEST = "manifest.json"


class DiskFull(Exception):
    """A checkpoint, which the message names, could not be saved."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was written: `run` holds its identity, settings, plan, steps and what was best."""

    path: Path
    step: int
    run: dict


def seal(folder: str | Path, run: dict) -> None:
    """Write a checkpoint's manifest, the last of its files: the size and sha256 of each of them, and `run`.

    run: {"identity", "settings", "plan", "step", "steps", "best"}; best: name of the best checkpoint so far, or None.
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): describe(path) for path in contents(folder)}
    handover.write_json(folder / MANIFEST, {**run, "files": files})


def contents(folder: Path) -> list[Path]:
    """The files of a checkpoint, without its manifest."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def describe(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": handover.file_hash(path)}


def fault(checkpoint: Checkpoint) -> str:
    """What is wrong with the files of a checkpoint, in a few words; "" where they are as they were written."""
    for name, noted in checkpoint.run["files"].items():
        path = checkpoint.path / name
        try:
            if path.stat().st_size != noted["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {noted['size']:,}"
            if describe(path) != noted:
                return f"{name} was changed after it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def found(output_dir: str | Path) -> list[Checkpoint]:
    """The checkpoints with a manifest that can be read, newest first; their files are not looked at yet."""
    checkpoints = []
    for path in Path(output_dir).glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            run = json.loads((path / MANIFEST).read_text("utf-8"))
            shapes = {"identity": dict, "settings": dict, "plan": dict, "files": dict, "step": int}
            if all(isinstance(run[key], kind) for key, kind in shapes.items()):
                checkpoints.append(Checkpoint(path, run["step"], run))
    return sorted(checkpoints, key=lambda c: -c.step)


def whole(checkpoints: list[Checkpoint]) -> Iterator[tuple[Checkpoint, str, str]]:
    """Each checkpoint, newest first, with what is wrong with it and with the best one that it refers to."""
    faults = {checkpoint.path.name: None for checkpoint in checkpoints}
    by_name = {checkpoint.path.name: checkpoint for checkpoint in checkpoints}

    def look(name: str) -> str:
        if name not in by_name:
            return "is missing"
        if faults[name] is None:  # reading gigabytes takes a while, so each is read once
            faults[name] = fault(by_name[name])
        return faults[name]

    for checkpoint in checkpoints:
        best, wrong = checkpoint.run.get("best"), look(checkpoint.path.name)
        yield checkpoint, wrong, look(best) if best and not wrong else ""


def remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
