"""Settings of the scripts: constants at the top of a script <- `--preset` <- command-line flags.

A script's constants are its settings: `LEARNING_RATE = 2e-4  # peak learning rate` is also the flag
`--learning_rate` (or `--learning-rate`); its comment is the flag's help, its annotation (or the type of its
value) the flag's type. The script calls `override(globals())` below them, before its heavy imports.

A preset is a YAML file with an optional `description:` and the sections `prepare:`, `lora:`, `full:`,
`evaluate:` (one script each) and `all:` (every script that has the constant; its own section beats it).

Mistakes are collected, shown at once on stderr as `error: ...` lines, and end the script with exit code 2.
"""

import ast
import difflib
import io
import json
import math
import os
import re
import shlex
import sys
import textwrap
import tokenize
from copy import deepcopy
from dataclasses import dataclass, make_dataclass
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).absolute().parent.parent
# script -> its section of a preset, and the prefix of its own flags in run_all.py; in running order
SECTIONS = {
    "1_prepare_dataset.py": "prepare",
    "2_lora_finetuning.py": "lora",
    "3_full_finetuning.py": "full",
    "4_evaluate_compare.py": "evaluate",
}
# A folder that two scripts call by different names: (script, its flag) -> the flag of the other.
SAME_FOLDER = {
    ("2_lora_finetuning.py", "output_dir"): ("4_evaluate_compare.py", "lora_dir"),
    ("3_full_finetuning.py", "output_dir"): ("4_evaluate_compare.py", "full_dir"),
    ("4_evaluate_compare.py", "lora_dir"): ("2_lora_finetuning.py", "output_dir"),
    ("4_evaluate_compare.py", "full_dir"): ("3_full_finetuning.py", "output_dir"),
}
# The types of settings, in the order in which a text is tried (anything is a str, so that comes last), each
# with its name for people and an example where the default is None.
KINDS = {
    "bool": ("true or false (bool)", True),
    "int": ("a whole number (int)", 100),
    "float": ("a finite number (float)", 0.1),
    "dict": ("a mapping (dict)", {"name": "value"}),
    "list": ("a list", ["a", "b"]),
    "str": ("text (str)", "text"),
    "None": ("none", None),
}


@dataclass(frozen=True)
class Constant:
    """One setting of a script, as its source has it.

    `types` are the KINDS that a value may have, `items` those of a list's items or a dict's values (() any),
    `help` the comment behind the value, `why` the comment lines above it, `group` its `# --- group`.
    """

    name: str
    default: object
    types: tuple[str, ...]
    items: tuple[str, ...] = ()
    help: str = ""
    group: str = ""
    why: str = ""

    @property
    def flag(self) -> str:
        """The name of the flag, e.g. `--learning_rate`."""
        return "--" + self.name.lower()

    @property
    def example(self) -> object:
        """A value of the right type: the default, where that is not None."""
        return KINDS[self.types[0]][1] if self.default is None else self.default

    def parse(self, value: object, source: str) -> object:
        """`value` (a flag's text, or what YAML read) in this constant's type; ValueError says what is wrong.

        `source` is named in that message: a flag (`--learning_rate`) or a preset's file and section.
        """
        try:
            return _coerce(value, self.types, self.items)
        except (ValueError, ArithmeticError):
            wanted = " or ".join(KINDS[kind][0] for kind in self.types)
            if self.items and not isinstance(self.default, str):
                wanted += " with items of " + " or ".join(KINDS[kind][0] for kind in self.items)
            if source.startswith("--"):
                example, got = f"{self.flag} {_text(self.example)}", repr(value)
            else:  # YAML's types surprise (no, 1e4, 2024-01-01): name the type, and offer quotes
                example = f"{self.name.lower()}: {json.dumps(self.example, ensure_ascii=False)}"
                got = _typed(value) + ("; in quotes it would be text" if "str" in self.types else "")
            raise ValueError(f"{self.name} wants {wanted}, e.g. {example}; {source} has {got}") from None


@dataclass(frozen=True)
class Run:
    """What `override` was last told, for `command`: `flags` is {name as the flag has it: text}."""

    script: Path
    preset: str | None
    flags: dict[str, str]


_run: Run | None = None  # of this process


def main_process() -> bool:
    """True in the only process, or in the first of several."""
    return os.environ.get("RANK", "") in ("", "0")


def say(*words: object) -> None:
    """Print one line, once per run however many processes there are."""
    if main_process():
        print(*words, flush=True)


def fail(*problems: object) -> NoReturn:
    """Print each problem as `error: ...` on stderr and end the program with exit code 2 (user's mistake)."""
    sys.stdout.flush()
    for problem in dict.fromkeys(map(str, problems)):
        print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


# --- values


def _typed(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _coerce(value: object, types: tuple, items: tuple) -> object:
    """`value` as one of `types`, or ValueError. A str is read as a flag's text would be, also from YAML."""
    if isinstance(value, str):
        return _from_text(value, types, items)
    kind = "None" if value is None else type(value).__name__
    if kind == "int" and "int" not in types and "float" in types:
        return float(value)
    if kind == "float" and "float" not in types and "int" in types and value.is_integer():
        return int(value)
    if kind not in types or (kind == "float" and not math.isfinite(value)):
        raise ValueError
    if kind == "list":
        return [_coerce(v, items, ()) if items else v for v in value]
    if kind == "dict":
        return {k: _coerce(v, items, ()) if items else v for k, v in value.items()}
    return value


def _from_text(text: str, types: tuple, items: tuple) -> object:
    word = text.strip()
    if "None" in types and word.lower() in ("none", "null"):
        return None
    for kind, read in (("bool", _bool), ("int", _int), ("float", _float), ("dict", _dict), ("list", _list)):
        if kind in types:
            try:
                return read(word, types, items)
            except (ValueError, ArithmeticError):
                continue
    if "str" not in types:
        raise ValueError
    return text


def _bool(word: str, types: tuple, items: tuple) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if "int" not in types and "float" not in types:
        words |= {"1": True, "0": False}
    if word.lower() not in words:
        raise ValueError
    return words[word.lower()]


def _int(word: str, types: tuple, items: tuple) -> int:
    if "float" in types:
        return int(word)  # `int | float` is a count or a share: 1.0 stays a float there
    _float(word, types, items)  # keeps nan, inf and 1e999999999 out
    number = Decimal(word)  # exact, where a float of this size is not
    if int(number) != number:
        raise ValueError
    return int(number)


def _float(word: str, types: tuple, items: tuple) -> float:
    if not math.isfinite(float(word)):
        raise ValueError
    return float(word)


def _dict(word: str, types: tuple, items: tuple) -> dict:
    if word.startswith("{"):
        return _coerce(_flow(word), ("dict",), items)
    pairs = [pair.partition("=") for pair in word.split(",") if pair.strip()]
    if "str" in types or not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError
    return {key.strip(): _coerce(v.strip(), items or ("int", "float", "str"), ()) for key, _, v in pairs}


def _list(word: str, types: tuple, items: tuple) -> list:
    if word.startswith("["):
        return _coerce(_flow(word), ("list",), items)
    # where a str is allowed too, a regular expression or a sentence may be meant: split only plain names
    if "str" in types and not re.fullmatch(r"[\w./\-]+(\s*,\s*[\w./\-]+)+", word):
        raise ValueError
    return [_coerce(v.strip(), items or ("int", "float", "str"), ()) for v in word.split(",") if v.strip()]


def _flow(word: str) -> object:
    """The value of a text `[...]` or `{...}`, JSON or YAML; ValueError where it is neither."""
    try:
        return json.loads(word)
    except ValueError:
        value, problems = _load_yaml(word)
        if problems or isinstance(value, str):
            raise ValueError from None
        return value


def _load_yaml(text: str) -> tuple[object, list[str]]:
    """The value of a YAML text, and what is wrong with it (`line 3: ...`)."""
    import yaml  # only where it is needed: --help must be quick

    problems = []

    class Loader(yaml.SafeLoader):
        # PyYAML lets the last of two equal keys win, without a word
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    problems.append(f"line {key.start_mark.line + 1}: {key.value} is given twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    # YAML 1.1 wants a dot in a float and a sign in its exponent, so PyYAML takes 1e-4 for a string
    exponent = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader), problems
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, such as 2024-13-01
        mark = getattr(error, "problem_mark", None)
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        return None, [*problems, f"line {mark.line + 1}: {what}" if mark else what]


def _text(value: object) -> str:
    """A value as a user would type it behind a flag."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and len(value) > 1 and re.fullmatch(r"[\w./,\-]+", ",".join(map(str, value))):
        return ",".join(map(str, value))
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


# --- the constants of a script


def read_constants(path: str | Path) -> dict[str, Constant]:
    """The settings of the script `path`, in its order, read from its source without importing it.

    They are the top-level UPPERCASE names whose value is a literal (text, number, bool, None, list, dict),
    above the call of `override`. OSError or SyntaxError where the source cannot be read.
    """
    with tokenize.open(path) as file:
        source = file.read()
    body = ast.parse(source, filename=str(path)).body
    behind, alone = {}, {}  # line -> comment behind code, comment that has its line to itself
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments = behind if token.line[: token.start[1]].strip() else alone
            comments[token.start[0]] = token.string.lstrip("#").strip()

    found = {}
    for node in body:
        calls = (ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call))
        if any(call.split(".")[-1] == "override" for call in calls):
            break
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if not (isinstance(target, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]*", target.id) and node.value):
            continue
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            continue  # derived from something else, so not a setting
        kind = "None" if default is None else type(default).__name__
        types, items = _annotation(getattr(node, "annotation", None))
        types = types or (("int", "float", "bool", "str") if kind == "None" else (kind,))
        types += ("None",) if kind == "None" and "None" not in types else ()
        if kind == "list" and not items:
            items = tuple({type(v).__name__: 0 for v in default if type(v).__name__ in KINDS})
        groups = [text for line, text in alone.items() if line < node.lineno and text.startswith("---")]
        why, line = [], node.lineno - 1
        while line in alone and not alone[line].startswith("---"):
            why, line = [alone[line], *why], line - 1
        about = behind.get(node.end_lineno) or behind.get(node.lineno, "")
        group = groups[-1].strip("- ") if groups else "settings"
        if kind in KINDS:
            found[target.id] = Constant(target.id, default, types, items, about, group, " ".join(why))
    return found


def _annotation(node: ast.expr | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The types that an annotation allows, and those of its items; empty where it is none of ours."""
    if isinstance(node, ast.BinOp):
        (left, left_items), (right, right_items) = _annotation(node.left), _annotation(node.right)
        return left + right, left_items + right_items
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("list", "dict"):
        inner = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
        return (ast.unparse(node.value),), _annotation(inner)[0]
    name = ast.unparse(node) if node else ""
    return ((name,) if name in KINDS else ()), ()


def _all_constants(root: Path) -> dict[str, dict[str, Constant]]:
    """The settings of the scripts in `root`, by file name; a script that is not there is left out."""
    try:
        return {name: read_constants(root / name) for name in SECTIONS if (root / name).is_file()}
    except SyntaxError as error:
        fail(f"{error.filename}, line {error.lineno}: {error.msg}")


# --- presets


def list_presets(root: str | Path = ROOT) -> dict[str, str]:
    """Name -> description of each preset in `root`/configs/presets; "" where a file has none to be read."""
    found = {}
    for path in sorted(Path(root, "configs", "presets").glob("*.yaml")):
        data = _load_yaml(path.read_text(encoding="utf-8-sig", errors="replace"))[0]
        found[path.stem] = str(data.get("description") or "").strip() if isinstance(data, dict) else ""
    return found


def preset_path(name: str, root: str | Path = ROOT) -> Path:
    """The file of a preset, by its name or by a path to a .yaml file; FileNotFoundError says which exist."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name).absolute()
    path = Path(root, "configs", "presets", name.removesuffix(".yaml") + ".yaml").absolute()
    if Path(name).name == name and path.is_file():
        return path
    known = list_presets(root)
    listed = "".join(f"\n  {stem}: {' '.join(about.split())}" for stem, about in known.items())
    there = f"the presets are{listed}" if known else f"there is none in {path.parent}"
    raise FileNotFoundError(f"unknown preset {name!r}{_near(name, known)}; {there}")


def _read_preset(name: str, root: Path, scripts: dict, own: str, problems: list) -> dict[str, tuple]:
    """Check a whole preset file against all `scripts`; {constant: (value, source)} of what it sets for `own`.

    Mistakes in the sections of other scripts count too: they would only show hours later, when those start.
    """
    try:
        path = preset_path(name, root)
        data, wrong = _load_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(error if isinstance(error, FileNotFoundError) else f"preset {name}: {error}")
        return {}
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    problems += [f"{shown}, {problem}" for problem in wrong]
    sections = [*SECTIONS.values(), "all"]
    if not isinstance(data, dict | None):
        problems.append(f"{shown} wants sections ({', '.join(sections)}); it has {_typed(data)}")
        return {}
    weak, strong = {}, {}
    for section, body in (data or {}).items():
        where = f"{shown}, section {section}"
        if section == "description":
            if not isinstance(body, str | None):
                problems.append(f"{shown}: description wants text (str), it has {_typed(body)}")
        elif section not in sections:
            is_key = any(str(section).upper() in known for known in scripts.values())
            hint = ", a setting that stands outside a section" if is_key else _near(section, sections)
            problems.append(f"{shown}: unknown section {section}{hint}; there are {', '.join(sections)}")
        elif not isinstance(body, dict | None):
            problems.append(f"{where} wants settings, e.g. learning_rate: 0.0001; it has {_typed(body)}")
        else:
            there = {file: known for file, known in scripts.items() if section in ("all", SECTIONS.get(file))}
            keys = [str(key).upper() for key in body or ()]
            for key, value in zip(keys, (body or {}).values(), strict=True):
                having = [file for file, known in there.items() if key in known]
                if keys.count(key) > 1:
                    problems.append(f"{where}: {key.lower()} is given twice, in upper and in lower case")
                if there and not having:
                    names = [name for known in there.values() for name in known]
                    problems.append(f"{where}: {_unknown(key.lower(), key, names, scripts, '')}")
                for file in having:
                    try:
                        parsed = there[file][key].parse(value, where)
                    except ValueError as error:
                        problems.append(error)
                        break  # once is enough
                    if file == own:
                        found = weak if section == "all" else strong
                        found[key] = parsed, f"preset {name}, section {section}"
    return weak | strong


def _near(word: object, known: object, prefix: str = "") -> str:
    near = difflib.get_close_matches(str(word).lower(), [name.lower() for name in known], n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _unknown(shown: str, name: str, known: list, scripts: dict, prefix: str) -> str:
    """What to say of a flag or key that is not in `known`: whose it is, or the nearest one."""
    owners = " and ".join(file for file, has in scripts.items() if name.upper() in has)
    if owners and name.upper() not in known:
        return f"{shown} is a setting of {owners}"
    hint = _near(name, known, prefix) or _near(name, [key for has in scripts.values() for key in has], prefix)
    return f"unknown setting {shown}{hint or '; --help lists the settings'}"


# --- flags


def _flags(argv: list[str], steps: dict, scripts: object, problems: list) -> tuple[str | None, list[tuple]]:
    """The name of the preset, and (step, its own?, constant, value, text, flag) of each flag, once a step.

    `steps` are the constants of each step; `--lora.name` is for the step "lora" alone. `scripts()` gives all
    scripts' constants, asked for only where a flag is unknown. A word that does not begin with `--` is the
    value of the flag before it, so `-1` is a value. `--local_rank`, which launchers add, is dropped.
    """
    preset, found, words = None, [], list(argv)
    while words:
        word = words.pop(0)
        shown, equals, text = word.partition("=")
        if not re.match("--.", word):
            one_dash = re.match("-[A-Za-z]", word)
            hint = f"did you mean -{shown}?" if one_dash else "settings are --name value"
            problems.append(f"unexpected argument {word!r}; {hint}")
            continue
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else None
        prefix, dot, name = shown[2:].replace("-", "_").rpartition(".")
        key, preset_wanted = name.upper() if name.islower() else "", name == "preset" and not dot
        there = {step: known for step, known in steps.items() if not dot or step == prefix}
        having = [step for step, known in there.items() if key in known]
        negated = [step for step, known in there.items() if key[:3] == "NO_" and key[3:] in known]
        negated = [step for step in negated if "bool" in there[step][key[3:]].types and not having]
        if preset_wanted and text:
            preset = text
        elif preset_wanted:
            problems.append("--preset needs a value, e.g. --preset demo")
        elif negated and text is not None:
            problems.append(f"{shown} takes no value, but has {text!r}; write --{key[3:].lower()} false")
        elif not there and len(steps) > 1:
            problems.append(f"{shown}: there is no step {prefix}{_near(prefix, steps)}")
        elif not having and not negated and name != "local_rank":
            names = [key for known in (there or steps).values() for key in known] + ["PRESET", "HELP"]
            problems.append(_unknown(shown, name, names, scripts(), f"--{prefix}{dot}" if there else "--"))
        for step in having or negated:
            constant = there[step][key[3:] if negated else key]
            if text is None and "bool" not in constant.types:
                problems.append(f"{shown} needs a value, e.g. {constant.flag} {_text(constant.example)}")
                break  # once is enough
            word = ("false" if negated else "true") if text is None else text
            try:
                found.append((step, bool(dot), constant, constant.parse(word, shown), word, shown))
            except ValueError as error:
                problems.append(error)
                break
    return preset, found


def override(constants: dict, argv: list[str] | None = None) -> dict:
    """Apply `--preset` and then the flags to a script's constants, in place: `override(globals())`.

    `constants` needs `__file__`: names, types and help are read from that source, presets from the folder
    configs/presets beside it. `argv` is sys.argv[1:] unless given. Prints each change and where it came from,
    on the main process only, and returns {name: new value} of what changed. `--help` prints the settings and
    exits with 0, mistakes exit with 2.
    """
    global _run
    if constants.get("__name__") == "__main__":
        sys.excepthook = _end_quietly
    argv = sys.argv[1:] if argv is None else list(argv)
    script = Path(constants["__file__"]).absolute()
    known = read_constants(script)
    if "-h" in argv or "--help" in argv:
        try:
            print(_help(script, constants.get("__doc__") or "", known), flush=True)
        except BrokenPipeError:  # `--help | head`: nobody reads on, so the interpreter must not flush again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)

    problems = []

    def scripts() -> dict:
        return _all_constants(script.parent) | {script.name: known}

    preset, flags = _flags(argv, {script.name: known}, scripts, problems)
    chosen = {} if preset is None else _read_preset(preset, script.parent, scripts(), script.name, problems)
    chosen |= {constant.name: (value, shown) for _, _, constant, value, _, shown in flags}
    if problems:
        fail(*problems)
    changed = {}
    for name, (value, source) in chosen.items():
        old = constants.get(name, known[name].default)
        if value != old or type(value) is not type(old):
            constants[name] = changed[name] = value
            say(f"settings: {name} = {value!r} (was {old!r}, from {source})")
    _run = Run(script, preset, {constant.flag[2:]: word for _, _, constant, _, word, _ in flags})
    return changed


def freeze(constants: dict, **changes: object) -> object:
    """A script's settings as one frozen object: `settings = freeze(globals())`, then `settings.BATCH_SIZE`.

    constants: the globals() of a script; exactly the names that `read_constants` finds in its `__file__` become
    attributes, with the values that they have now. changes: values that take their place, such as what "auto"
    turned out to be: `freeze(globals(), PRECISION="bf16")`. A name that the script lacks is a TypeError.

    It is a frozen dataclass: assigning raises, `vars(settings)` and `dataclasses.asdict(settings)` are
    {name: value}, `dataclasses.replace(settings, SEED=1)` is a changed copy. Lists and dicts are copies, so what
    is done to the constants later does not reach it.
    """
    known = read_constants(constants["__file__"])
    if unknown := sorted(changes.keys() - known.keys()):
        script = Path(constants["__file__"]).name
        raise TypeError(f"{script} has no setting {unknown[0]}{_near(unknown[0], known)}")
    return _frozen({name: changes.get(name, constants[name]) for name in known})


def _frozen(values: dict) -> object:
    # a class that is made here cannot be found by its name, so a pickle (datasets' workers) makes it anew
    again = {"__reduce__": lambda self: (_frozen, (vars(self),))}
    return make_dataclass("Settings", list(values), frozen=True, namespace=again)(**deepcopy(values))


def command(script: str | Path, *words: str) -> str:
    """The command line that runs `script` with the settings of this run, as a user would type it.

    script: a step ("1_prepare_dataset.py"), `__file__`, or a path below the project's folder. words: what to add;
    a flag among them beats a carried one. After `2_lora_finetuning.py --preset demo --data_dir d --lora_r 8`,
    `command("1_prepare_dataset.py", "--seed", "1")` is

        python 1_prepare_dataset.py --preset demo --data_dir d --seed 1

    The same script is given all flags of this run. Another step is given those that it has too with the same
    default; learning rates and batch sizes, which differ between the methods, are not carried. OUTPUT_DIR of a
    training is LORA_DIR or FULL_DIR of the evaluation.
    """
    path = Path(os.path.abspath((_run.script.parent if _run else ROOT) / script))
    typed = {word.partition("=")[0][2:].replace("-", "_") for word in map(str, words) if word.startswith("--")}
    typed |= {name.removeprefix("no_") for name in typed}
    carried = {} if _run is None else _carried(_run, path)
    line = [min(os.path.relpath(path), str(path), key=len)]
    for name, text in carried.items():
        if name not in typed:
            line += [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]
    return "python " + shlex.join([*line, *map(str, words)])


def _carried(run: Run, path: Path) -> dict[str, str]:
    """The preset and the flags of `run` that the script `path` is to be given, too."""
    preset = {"preset": run.preset} if run.preset else {}
    if path == run.script:
        return preset | run.flags
    if not {path.name, run.script.name} <= SECTIONS.keys() or not path.is_file():
        return {}  # takes no flags of ours
    own, others, flags = read_constants(run.script), read_constants(path), {}
    for name, text in run.flags.items():
        script, renamed = SAME_FOLDER.get((run.script.name, name), (None, None))
        constant, other = own.get(name.upper()), others.get(name.upper())
        if script == path.name:
            flags[renamed] = text
        elif constant and other and (constant.default, constant.types) == (other.default, other.types):
            flags[name] = text
    return preset | flags


def _end_quietly(kind: type, error: BaseException, trace: object) -> None:
    """sys.excepthook of a script: Ctrl-C ends it with one line and exit code 130, anything else as usual."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(
        "\ninterrupted; what was complete before is as it was, and the same command starts again",
        file=sys.stderr,
    )
    sys.stdout.flush()
    os._exit(130)  # by itself, python would end with the signal, which a parent process sees as -2


def _help(script: Path, purpose: str, known: dict[str, Constant]) -> str:
    presets = ", ".join(sorted(path.stem for path in script.parent.glob("configs/presets/*.yaml")))
    lines = [purpose.strip(), "", f"usage: python {script.name} [--preset NAME] [--setting VALUE ...]", ""]
    lines += [f"  --preset NAME\n      settings from a file: {presets or 'none here'}; or a path to a .yaml file"]
    lines += ["  -h, --help\n      show this text and exit"]
    for group in dict.fromkeys(constant.group for constant in known.values()):
        lines += ["", f"{group}:"]
        for constant in (constant for constant in known.values() if constant.group == group):
            lines.append(f"  {constant.flag} {'|'.join(constant.types)}")
            text = f"{constant.help} (default: {_text(constant.default)})"
            lines.append(textwrap.indent(textwrap.fill(text, 104, break_on_hyphens=False), " " * 6))
    return "\n".join(lines).strip()


def split_flags(argv: list[str], root: str | Path) -> dict[str, list[str]]:
    """Deal out the flags that run_all.py was given to the steps: {section: argv of that section's script}.

    `--num_epochs 1` goes to every step that has it, `--lora.learning_rate 1e-4` to one, `--preset X` to all.
    The preset comes first, then the general flags, then a step's own, so that those win. Each comes out as
    one word, `--name=value`. Mistakes, wrong types among them, are shown together and exit with 2.
    """
    scripts, problems = _all_constants(Path(root).absolute()), []
    steps = {section: scripts.get(file, {}) for file, section in SECTIONS.items()}
    preset, flags = _flags(argv, steps, lambda: scripts, problems)
    if preset is not None:
        _read_preset(preset, Path(root).absolute(), scripts, "", problems)
    if problems:
        fail(*problems)
    if preset and preset.endswith((".yaml", ".yml")):
        preset = preset_path(preset, root)  # absolute: a step may run in another folder
    first = [] if preset is None else [f"--preset={preset}"]
    flags.sort(key=lambda flag: flag[1])  # stable: general ones first, else as given
    words = {step: [f"{flag[2].flag}={flag[4]}" for flag in flags if flag[0] == step] for step in steps}
    return {step: first + words[step] for step in steps}
