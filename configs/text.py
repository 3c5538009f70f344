"""Text from elsewhere: shown to people so that it steers nothing, and YAML read so that it does no harm.

What users, data, models and servers say may hold anything. Light: imported before torch.
"""

import errno
import re
from pathlib import Path

# What moves a terminal's cursor, or changes its colours, its title or the direction of writing, and half characters,
# which cannot be written at all: control characters other than line break and tab, marks of direction, surrogates.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What Markdown takes for more than text within a line, and gets a backslash: a backslash before punctuation; code;
# emphasis, but for "2 * 3" and snake_case; a link or an image, which begin with "["; the end of a table's cell.
MARKUP = re.compile(r"\\(?=[!-/:-@\[-`{-~]|\Z)|[`\[|]|\*(?! )|(?<! )\*|(?<![^\W_])_|_(?![^\W_])")
# What begins a block at the start of a text: a list, a rule, a heading.
BLOCK = re.compile(r"\A(?:[-+](?=[ -]|\Z)|#|\d{1,9}(?=[.)](?: |\Z)))")
# What is written as the number of its character, because not every reader takes a backslash before it: an element, an
# entity, a quotation, struck out text, the end of a formula.
ENTITY = re.compile(r"<(?=[a-zA-Z/!?])|&(?=#?\w+;)|\A[>=]|~(?!\d)|(?<=[^\s(])\$")
# the sign of a number that is all zeros
ZERO = re.compile(r"(?<![\w.)])[-+](?=0(?:\.0+)?(?![\d.]*[\w]))")
YAML_BYTES = 1_000_000  # a larger file is given by mistake, and would take minutes to read
YAML_VALUES = 10_000  # most values of a YAML text, its aliases written out
# What the operating system, torch and safetensors, and datasets say of a full disk.
DISK_FULL = re.compile(
    "No space left on device|Disk quota exceeded|PytorchStreamWriter failed|file write failed|iostream error"
    "|Not enough disk space"
)


# --- for people


def visible(text: object) -> str:
    r"""Text in which all that would steer a terminal is spelled out: ESC becomes `\x1b`; line breaks and tabs stay."""
    return STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def quoted(value: object, most: int = 200) -> str:
    """A value as Python writes it, on one line; of a long one, where it begins and how long it is."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # more than 4,300 digits; lists in lists
        return f"{type(value).__name__} of a size that cannot be shown"
    return shown if len(shown) <= most else f"{shown[: most // 2]}... ({len(shown):,} characters)"


def cell(text: object, most: int = 600) -> str:
    """Text as one harmless piece of a line of Markdown: no markup, line break, column or other writing direction.

    Only what Markdown would not take for text is escaped, so that the source can be read as well.
    most: characters that are shown; what is longer ends with "...".
    """
    short = " ".join(str(text).split())
    short = visible(short if len(short) <= most else short[:most] + " ...")
    short = MARKUP.sub(r"\\\g<0>", short)
    short = BLOCK.sub(lambda match: f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}", short)
    return ENTITY.sub(lambda match: f"&#{ord(match[0])};", short)


def without_zero_signs(text: str) -> str:
    """A text in which no number that was rounded to zero has a sign: "-0.000" and "+0.000" become "0.000"."""
    return ZERO.sub("", text)


# --- what can be written


def is_utf8(text: str) -> bool:
    """Whether a text can be written: what a terminal sends in another encoding comes as half characters."""
    return text.encode("utf-8", "replace").decode() == text


def is_path(text: str) -> bool:
    """Whether a text can name a place in a file system."""
    path = text.encode("utf-8", "replace")
    longest = max(map(len, path.split(b"/")))
    return bool(path.strip()) and b"\0" not in path and longest <= 255 and len(path) <= 4000


# --- YAML


def read_yaml(path: Path) -> tuple[object, list[str]]:
    """The value of a YAML file, and what is wrong with it, as `load_yaml` says it."""
    try:
        if path.stat().st_size > YAML_BYTES:
            return None, [f"it has more than {YAML_BYTES:,} bytes"]
        return load_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        return None, [f"it cannot be read: {error.strerror}"]
    except UnicodeDecodeError as error:
        return None, [f"it is not UTF-8: {error.reason}"]


def load_yaml(text: str) -> tuple[object, list[str]]:
    """The value of a YAML text, and what is wrong with it (`line 3: ...`). Nothing in it is run or built."""
    import yaml  # only where it is needed: --help must be quick

    problems = []

    class Loader(yaml.SafeLoader):
        values, sizes = 0, {}  # of the whole text so far; of a node, by its id

        # a few lines of aliases, each of which repeats the one before ten times, stand for billions of values
        def compose_node(self, parent, index):
            before, is_alias, mark = self.values, self.check_event(yaml.AliasEvent), self.peek_event().start_mark
            node = super().compose_node(parent, index)
            # an alias within its own anchor has no end
            self.values += self.sizes.get(id(node), YAML_VALUES + 1) if is_alias else 1
            self.sizes[id(node)] = self.values - before
            if self.values > YAML_VALUES:
                what = f"more than {YAML_VALUES:,} values, those that an alias (*) repeats included"
                raise yaml.composer.ComposerError(problem=what, problem_mark=mark)
            return node

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
    except RecursionError:
        return None, [*problems, "lists or mappings stand in one another too deep"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        return None, [*problems, f"line {mark.line + 1}: {what}" if mark else what]
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        # a tag and a value that do not fit, which PyYAML does not check: !!bool maybe, 2024-13-01
        what = " ".join(str(error).partition("; use sys.")[0].split())
        return None, [*problems, what if type(error) is ValueError else "a value does not fit its tag (!!)"]


# --- errors of the libraries


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that of a full disk; the libraries have words of their own for it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or DISK_FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
