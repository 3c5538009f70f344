"""What is typed for run_all.py, on its command line and in its menu, taken apart. Light: the standard library."""

import re


def parse_steps(text: str) -> list[int] | None:
    """Step numbers from "1,2", "2-4", "all" or "", in running order; None for anything else."""
    # a Chinese input method types these instead of a comma and a hyphen
    text = re.sub("-+", "-", text.translate(str.maketrans("，、－—–", ",,---"))).strip().lower()
    if text in ("", "all", "a", "全部"):
        return [1, 2, 3, 4]
    chosen: set[int] = set()
    for part in text.replace(" ", ",").split(","):
        bounds = re.fullmatch(r"([1-4])(?:-([1-4]))?", part)
        if part and not (bounds and bounds[1] <= (bounds[2] or bounds[1])):
            return None
        if bounds:
            chosen |= set(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return sorted(chosen) or None


def normalised(words: list[str]) -> list[str]:
    """The words of a command line with each flag and its value in one: --seed 1 is --seed=1."""
    joined: list[str] = []
    for word in words:
        if joined and not word.startswith("--") and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def same_setting(word: str, step: str, name: str) -> bool:
    """Whether `--name=value` is set anew by NAME of a step; by NAME of all steps where `step` is ""."""
    prefix, _, given = word.partition("=")[0].removeprefix("--").replace("-", "_").rpartition(".")
    return given.removeprefix("no_") == name and (not step or prefix == step)


def status_asked(words: list[str]) -> tuple[str, list[str]]:
    """("text", "json" or "" where `status` is not asked for, the other words) of run_all.py's command line."""
    others = [word for word in words if word != "--json"]
    if "status" not in (others[:1] + others[-1:]):
        return "", words
    others.pop(0 if others[0] == "status" else -1)
    return ("json" if "--json" in words else "text"), others
