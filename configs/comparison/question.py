"""A question of the sweep: its arms, from a YAML file, and the learning rates at which each of them is tried."""

import math
from dataclasses import dataclass
from pathlib import Path

from configs import handover, hub
from configs.flags import near
from configs.settings import ROOT, SECTIONS, fail
from configs.text import quoted, read_yaml
from configs.values import read_constants

FOLDER = Path(__file__).parent
SCRIPTS = {section: script for script, section in SECTIONS.items()}
RATES, MORE = 5, 2  # learning rates an arm; how many more each way where the best one is at the edge
# The centre of full fine-tuning's grid: 5e-5 at phi-2's width, and in inverse proportion to the width, as Adam's rates
# go (Yang et al. 2022, "Tensor Programs V"); LoRA's is ten times that ("LoRA Without Regret", Thinking Machines 2025).
CENTRE, WIDTH, LORA_TIMES = 5e-5, 2560, 10


@dataclass(frozen=True)
class Arm:
    """One side of the comparison. settings: {CONSTANT: value} of its step; rows: share of the training rows."""

    name: str
    method: str
    settings: dict
    rows: float = 1.0


def read_question(name: str, root: Path = ROOT) -> tuple[dict, list[Arm]]:
    """({"name", "description", "description_zh"}, arms) of a question, by its name or by a path.

    Raises: SystemExit(2) where it is wrong, with all that is.
    """
    known = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    path = hub.local_path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None or not path.is_file():
        listed = "".join(f"\n  {stem}: {read_yaml(file)[0]['description']}" for stem, file in known.items())
        hint = f"; did you mean {guess}?" if (guess := near(name, known)) else ""
        fail(f"unknown question {quoted(name)}{hint}; give a path to a .yaml file, or one of{listed}")
    data, wrong = read_yaml(path)
    if not isinstance(data, dict) or not isinstance(data.get("arms"), dict) or len(data["arms"]) < 2:
        fail(
            *[f"{path}, {line}" for line in wrong],
            f"{path} wants `arms:` with at least two arms, each with a `method:`",
        )
    problems, arms = [f"{path}, {line}" for line in wrong], []
    for title, body in data["arms"].items():
        where = f"{path}, arm {title}"
        if not isinstance(body, dict) or body.get("method") not in ("lora", "full"):
            problems.append(f"{where} wants `method: lora` or `method: full`")
            continue
        if not str(title).replace("_", "").replace("-", "").isalnum() or len(str(title)) > 50:
            problems.append(f"{where}: a name holds letters, digits, - and _ only, 50 at most: it becomes a folder")
        constants, settings = read_constants(root / SCRIPTS[body["method"]]), {}
        rows = body.get("rows", 1.0)
        if not isinstance(rows, int | float) or not 0 < rows <= 1:
            problems.append(f"{where}: rows is a share of the training rows, above 0 and up to 1; it is {rows!r}")
            rows = 1.0
        for key, value in body.items():
            upper = str(key).upper()
            if key in ("method", "rows"):
                continue
            if upper in ("LEARNING_RATE", "SEED", "OUTPUT_DIR", "MAX_TRAIN_SAMPLES", "RERUN", "RESUME"):
                problems.append(f"{where}: {key} is what the sweep sets; leave it out")
            elif upper not in constants:
                guess = near(str(key), [name.lower() for name in constants])
                problems.append(f"{where}: unknown setting {key}{f'; did you mean {guess}?' if guess else ''}")
            else:
                try:
                    settings[upper] = constants[upper].parse(value, where)
                except ValueError as error:
                    problems.append(error)
        arms.append(Arm(str(title), body["method"], settings, float(rows)))
    if problems:
        fail(*problems)
    words = {"description": str(data.get("description") or path.stem), "name": path.stem}
    return words | {"description_zh": str(data.get("description_zh") or words["description"])}, arms


def grid(method: str, width: int, count: int = RATES) -> list[float]:
    """`count` learning rates, half decades apart, around the one nearest to a method's centre; width: of the model."""
    middle = round(2 * math.log10(centre(method, width)))
    return [half_decade(middle + k - count // 2) for k in range(count)]


def centre(method: str, width: int) -> float:
    """The learning rate that "lora" or "full" mostly wants with Adam on a model of this width."""
    return CENTRE * WIDTH / width * (LORA_TIMES if method == "lora" else 1)


def half_decade(k: int) -> float:
    """10^(k/2) to two digits: 1e-4, 3.2e-4, 1e-3."""
    return float(f"{10 ** (k / 2):.1e}")


def neighbour(rate: float, step: int) -> float:
    """The rate `step` half decades further."""
    return half_decade(round(2 * math.log10(rate)) + step)


def model_width(name: str) -> int:
    """The hidden size of a model, from its configuration."""
    place, config = hub.local_path(name), {}
    if place is not None:
        config = handover.read_json(place / "config.json", "a folder with a model")
    else:
        hub.go_online(name)
        from configs import models  # heavy, and the libraries read what go_online has found

        config = models.configuration(name, None).get_text_config().to_dict()
    config = config.get("text_config") or config
    for key in ("hidden_size", "n_embd", "d_model"):
        if isinstance(config.get(key), int) and config[key] > 0:
            return config[key]
    fail(f"the configuration of {name!r} names no hidden_size, from which the learning rates of the sweep follow")
