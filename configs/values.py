"""The settings of one script and the values they may have, read from its source without importing it.

`LEARNING_RATE: Annotated[float, "x > 0"] = 2e-4  # peak learning rate` is a Constant: its comment is the help of
the flag `--learning_rate`, its annotation (or the type of its value) says which values are allowed:

    PRECISION: Literal["auto", "bf16"] = "auto"                 these words
    PACKING: bool | Literal["auto"] = "auto"                    true, false or the word
    WARMUP_RATIO: Annotated[float, "0 <= x < 1"] = 0.03         a range
    MAX_STEPS: Annotated[int | None, "x >= 1"] = None           none, or a number in the range
    DATASET_NAME: Annotated[str, "not empty"] = "owner/name"    a text with something in it

A long list of words may be named above: `Schedule = Literal["cosine", "linear"]`, then `LR_SCHEDULER: Schedule`.
"""

import ast
import difflib
import functools
import io
import json
import math
import operator
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from configs.text import is_path, is_utf8, load_yaml, quoted

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
# Larger than any number of rows, tokens or steps, and small enough to be multiplied in 64 bits.
MOST = 10**15
COMPARE = {
    ">=": ("at least", operator.ge),
    ">": ("above", operator.gt),
    "<=": ("at most", operator.le),
    "<": ("below", operator.lt),
}


@dataclass(frozen=True)
class Constant:
    """One setting of a script, as its source has it.

    `types` are the KINDS that a value may have, `items` those of a list's items or a dict's values (() any),
    `help` the comment behind the value, `why` the comment lines above it, `group` its `# --- group`, `choices`
    the words that a text may be (() any), `range` such as "0 <= x < 1" ("" any), `line` where it stands.
    """

    name: str
    default: object
    types: tuple[str, ...]
    items: tuple[str, ...] = ()
    help: str = ""
    group: str = ""
    why: str = ""
    choices: tuple[object, ...] = ()
    range: str = ""
    line: int = 0

    @property
    def flag(self) -> str:
        """The name of the flag, e.g. `--learning_rate`."""
        return "--" + self.name.lower()

    @property
    def example(self) -> object:
        """A value of the right type: the default, where that says something; else what the help has as "e.g."."""
        if self.default is not None and self.default != {}:
            return self.default
        given = re.search(r"e\.g\. (\S*[^\s,;])", self.help)
        try:
            return coerce(given[1], self.types, self.items) if given else self.choices[0]
        except (ValueError, IndexError):
            return KINDS[self.types[0]][1]

    @property
    def shown(self) -> str:
        """What `--help` says of the values: `auto|bf16`, `int|none (at least 1)`."""
        kinds = [kind for kind in self.types if not self._chosen(kind)]
        words = [str(word) for word in self.choices]
        words += [{"bool": "true|false", "None": "none"}.get(kind, kind) for kind in kinds]
        return "|".join(words) + (f" ({in_words(self.range)})" if self.range else "")

    @property
    def is_folder(self) -> bool:
        """Whether the value is the path of a folder, by the setting's name."""
        return self.name.endswith("_DIR")

    @property
    def rule(self) -> str:
        """What a value must be, as a clause: "choose auto, true or false", "it must be at least 1, or none"."""
        others = [kind for kind in self.types if not self._chosen(kind)]
        if self.choices:
            pairs = [["true", "false"] if kind == "bool" else [KINDS[kind][0]] for kind in others]
            return "choose " + enumerate_words([str(word) for word in self.choices] + sum(pairs, []))
        if self.is_folder:
            return "it must be the path of a folder, of names of at most 255 bytes"
        if not self.range:
            return "it must be " + " or ".join(KINDS[kind][0] for kind in others)
        words = "not be empty" if self.range == "not empty" else f"be {in_words(self.range)}"
        return f"it must {words}" + (", or none" if "None" in self.types else "")

    def allows(self, value: object) -> bool:
        """Whether `value` has one of the types, and is one of the words or in the range where there are any."""
        kind = "None" if value is None else type(value).__name__
        if kind not in self.types and not (kind == "int" and "float" in self.types):
            return False
        if self._chosen(kind):
            return value in self.choices
        if kind == "str":
            path_or_text = is_path(value) if self.is_folder else self.range != "not empty" or bool(value.strip())
            return path_or_text and is_utf8(value)
        if kind in ("int", "float") and self.range:
            return abs(value) <= MOST and all(COMPARE[sign][1](value, end) for sign, end in limits(self.range))
        return kind != "float" or math.isfinite(value)

    def problem(self, value: object) -> str | None:
        """What is wrong with `value`, without what mends it: "BATCH_SIZE is 0; it must be at least 1"."""
        if self.allows(value):
            return None
        rule = self.rule
        if isinstance(value, str) and not is_utf8(value):
            rule = "it is not text in this terminal's encoding; set LC_ALL=C.UTF-8"
        elif isinstance(value, int | float) and abs(value) > MOST:
            rule = f"it must be no larger than {MOST:,}"
        return f"{self.name} is {quoted(value)}; {rule}"

    def mended(self, value: object) -> object:
        """An allowed value in place of `value`: the word that was nearly typed, the default, or what is at hand."""
        words = {str(word).lower(): word for word in self.choices}
        close = [words[name] for name in [near(value if isinstance(value, str) else "", words, 0.8)] if name]
        ends = [end for _, end in limits(self.range)]
        at_hand = [*self.choices, *ends, *(KINDS[kind][1] for kind in self.types), *(end + 1 for end in ends)]
        typed = [float(v) if "int" not in self.types and type(v) is int else v for v in at_hand]
        return next((fit for fit in [*close, self.default, *typed] if self.allows(fit)), self.default)

    def parse(self, value: object, source: str) -> object:
        """`value` (a flag's text, or what YAML read) in this constant's type; ValueError says what is wrong.

        `source` is named in that message: a flag (`--learning_rate`) or a preset's file and section.
        """
        is_flag = source.startswith("--")
        try:
            typed = coerce(value, self.types, self.items)
        except (ValueError, ArithmeticError):
            if not self.choices:
                raise ValueError(self._wrong_type(value, source, is_flag)) from None
            typed = value
        if self.allows(typed):
            return typed
        if is_flag:  # `--lora.batch_size` is mended where it was typed
            flag = source if "." in source else self.flag
            raise ValueError(f"{self.problem(typed)}: {flag} {as_text(self.mended(typed))}")
        mended = json.dumps(self.mended(typed), ensure_ascii=False)
        raise ValueError(f"{source}: {self.problem(typed)}, e.g. {self.name.lower()}: {mended}")

    def _chosen(self, kind: str) -> bool:
        return any(type(word).__name__ == kind for word in self.choices)

    def _wrong_type(self, value: object, source: str, is_flag: bool) -> str:
        wanted = " or ".join(KINDS[kind][0] for kind in self.types)
        if self.items and not isinstance(self.default, str):
            wanted += " with items of " + " or ".join(KINDS[kind][0] for kind in self.items)
        if is_flag:
            example, got = f"{self.flag} {as_text(self.example)}", quoted(value)
        else:  # YAML's types surprise (no, 1e4, 2024-01-01): name the type, and offer quotes
            example = f"{self.name.lower()}: {json.dumps(self.example, ensure_ascii=False)}"
            got = with_type(value) + ("; in quotes it would be text" if "str" in self.types else "")
        return f"{self.name} wants {wanted}, e.g. {example}; {source} has {got}"


# --- words and ranges


def near(word: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The one of `known` that `word` is most like, in lower case, or None."""
    names = [str(name).lower() for name in known]
    return next(iter(difflib.get_close_matches(str(word).lower(), names, n=1, cutoff=cutoff)), None)


def enumerate_words(words: list[str]) -> str:
    """["a", "b", "c"] as "a, b or c"."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def limits(text: str) -> list[tuple[str, int | float]]:
    """The ends of a range: "0 <= x < 1" is [(">=", 0), ("<", 1)]. ValueError where the text is no range."""
    if text in ("", "not empty"):
        return []
    match = re.fullmatch(r"(?:(-?[\d._e]+) (<=?) )?x(?: (<=?|>=?) (-?[\d._e]+))?", text)
    if not match or text == "x":
        raise ValueError(f"{text!r} is no range; write it as 'x >= 1' or '0 <= x < 1'")
    low, low_sign, sign, end = match.groups()
    ends = [(low_sign.replace("<", ">"), ast.literal_eval(low))] if low else []
    return ends + ([(sign, ast.literal_eval(end))] if end else [])


def in_words(text: str) -> str:
    """A range for people: "x >= 1" is "at least 1", "0 <= x <= 1" is "from 0 to 1"."""
    ends = [(sign, f"{end:,}" if abs(end) >= 1e6 else str(end)) for sign, end in limits(text)]
    if [sign for sign, _ in ends] == [">=", "<="]:
        return f"from {ends[0][1]} to {ends[1][1]}"
    return " and ".join(f"{COMPARE[sign][0]} {end}" for sign, end in ends) or text


# --- text and YAML to values, and back


def with_type(value: object) -> str:
    """A value and the name of its type: `0.5 (float)`."""
    return f"{quoted(value)} ({type(value).__name__})"


def as_text(value: object) -> str:
    """A value as a user would type it behind a flag."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    short = None
    if isinstance(value, list) and len(value) > 1:
        short = ",".join(map(str, value))
    if isinstance(value, dict) and value:
        short = ",".join(f"{key}={of}" for key, of in value.items())
    if short and re.fullmatch(r"[\w./,=\-]+", short):
        return short
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def coerce(value: object, types: tuple, items: tuple) -> object:
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
        return [coerce(v, items, ()) if items else v for v in value]
    if kind == "dict":
        if not all(isinstance(key, str) for key in value):
            raise ValueError
        return {k: coerce(v, items, ()) if items else v for k, v in value.items()}
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
        return coerce(_flow(word), ("dict",), items)
    pairs = [pair.partition("=") for pair in word.split(",") if pair.strip()]
    if "str" in types or not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError
    return {key.strip(): coerce(v.strip(), items or ("int", "float", "str"), ()) for key, _, v in pairs}


def _list(word: str, types: tuple, items: tuple) -> list:
    if word.startswith("["):
        return coerce(_flow(word), ("list",), items)
    # where a str is allowed too, a regular expression or a sentence may be meant: split only plain names
    if "str" in types and not re.fullmatch(r"[\w./\-]+(\s*,\s*[\w./\-]+)+", word):
        raise ValueError
    return [coerce(v.strip(), items or ("int", "float", "str"), ()) for v in word.split(",") if v.strip()]


def _flow(word: str) -> object:
    """The value of a text `[...]` or `{...}`, JSON or YAML; ValueError where it is neither."""
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        value, problems = load_yaml(word)
        if problems or isinstance(value, str):
            raise ValueError from None
        return value


# --- the constants of a script


def read_constants(path: str | Path) -> dict[str, Constant]:
    """The settings of the script `path`, in its order, read from its source without importing it.

    They are the top-level UPPERCASE names whose value is a literal (text, number, bool, None, list, dict),
    above the call of `override` (or `override_all`). OSError or SyntaxError where the source cannot be read.
    """
    known = Path(path).stat()  # the menu asks for the same script many times
    return dict(_read_constants(str(path), known.st_mtime_ns, known.st_size))


@functools.lru_cache(maxsize=16)
def _read_constants(path: str, changed: int, size: int) -> dict[str, Constant]:
    with tokenize.open(path) as file:
        source = file.read()
    tree = ast.parse(source, filename=str(path))
    behind, alone = {}, {}  # line -> comment behind code, comment that has its line to itself
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments = behind if token.line[: token.start[1]].strip() else alone
            comments[token.start[0]] = token.string.lstrip("#").strip()

    constants, aliases = {}, {}
    for node in tree.body:
        calls = (ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call))
        if any(call.split(".")[-1] in ("override", "override_all") for call in calls):
            break
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if not isinstance(target, ast.Name) or not node.value:
            continue
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", target.id):
            aliases[target.id] = node.value
            continue
        annotation = _annotation(getattr(node, "annotation", None), aliases)
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            if not annotation.choices and not annotation.range:
                continue  # derived from something else, so not a setting
            problem = (
                f"{target.id} is computed; write its value out, so that it can be read without running the script"
            )
            raise SyntaxError(problem, (str(path), node.lineno, None, None)) from None
        kind = "None" if default is None else type(default).__name__
        if kind not in KINDS:
            continue
        types = annotation.types or (("int", "float", "bool", "str", "None") if kind == "None" else (kind,))
        items = annotation.items
        if kind == "list" and not items:
            items = tuple({type(v).__name__: 0 for v in default if type(v).__name__ in KINDS})
        try:
            limits(annotation.range)
        except ValueError as error:
            raise SyntaxError(f"{target.id}: {error}", (str(path), node.lineno, None, None)) from None
        groups = [text for line, text in alone.items() if line < node.lineno and text.startswith("---")]
        why, line = [], node.lineno - 1
        while line in alone and not alone[line].startswith("---"):
            why, line = [alone[line], *why], line - 1
        constants[target.id] = Constant(
            target.id,
            default,
            types,
            items,
            help=behind.get(node.end_lineno) or behind.get(node.lineno, ""),
            group=groups[-1].strip("- ") if groups else "settings",
            why=" ".join(why),
            choices=annotation.choices,
            range=annotation.range,
            line=node.lineno,
        )
    return constants


@dataclass(frozen=True)
class Annotation:
    """What an annotation allows; empty where it is none of ours."""

    types: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    choices: tuple[object, ...] = ()
    range: str = ""

    def __or__(self, other: "Annotation") -> "Annotation":
        types = tuple(dict.fromkeys(self.types + other.types))
        return Annotation(types, self.items + other.items, self.choices + other.choices, self.range or other.range)


def _annotation(node: ast.expr | None, aliases: dict[str, ast.expr]) -> Annotation:
    """What the annotation `node` allows; `aliases` are the names that were given to annotations above it."""
    if isinstance(node, ast.BinOp):
        return _annotation(node.left, aliases) | _annotation(node.right, aliases)
    if isinstance(node, ast.Subscript):
        outer, inner = ast.unparse(node.value).split(".")[-1], node.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "Literal":
            words = tuple(ast.literal_eval(part) for part in parts)
            return Annotation(tuple(dict.fromkeys(type(word).__name__ for word in words)), choices=words)
        if outer == "Annotated":
            limit = Annotation(range=str(ast.literal_eval(parts[1])))
            return _annotation(parts[0], aliases) | limit
        if outer in ("list", "dict"):
            return Annotation((outer,), _annotation(parts[-1], aliases).types)
    name = ast.unparse(node) if node else ""
    if name in aliases:
        return _annotation(aliases[name], {alias: at for alias, at in aliases.items() if alias != name})
    return Annotation((name,) if name in KINDS else ())
