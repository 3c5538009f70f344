"""What the READMEs promise is there: commands, flags, presets, files, a measurement behind every number."""

import contextlib
import re
import shlex

import pytest
from conftest import ROOT, SCRIPTS

from configs.settings import list_presets, override, override_all, preset_path, read_constants

READMES = ["README.md", "README.zh-CN.md"]
DEMO = "pip install -r requirements.txt && python run_all.py --demo"
TESTS = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"
CONSTANTS = {name: read_constants(ROOT / name) for name in SCRIPTS}
SETTINGS = {name for constants in CONSTANTS.values() for name in constants} | set(read_constants(ROOT / "run_all.py"))
RUN_ALL = {"--steps", "--yes", "--demo", "--language", "--preset", "--help", "--json"}
LAUNCHERS = {"--machine_rank"}  # flags of accelerate and torchrun
# Upper-case words in backticks that are not settings of ours.
ENVIRONMENT = {
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "OPENAI_API_KEY",
    "LICENSE",
    "CI",
}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(readme: str) -> list[str]:
    """The content of each fenced block, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(readme), re.MULTILINE | re.DOTALL)
    assert all(language in ("bash", "python", "text", "json", "yaml") for language, _ in found)
    return [content for _, content in found]


def spans(readme: str) -> list[str]:
    """Everything between single backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text(readme), flags=re.MULTILINE | re.DOTALL))


def commands(readme: str) -> list[list[str]]:
    """The words of every command in fenced blocks and in backticks, without `&&`, settings of the environment
    and comments."""
    lines = [line for block in blocks(readme) for line in block.splitlines()] + spans(readme)
    found = []
    for line in lines:
        for part in line.split("&&"):
            with contextlib.suppress(ValueError):  # a span with an apostrophe is no command
                words = shlex.split(part, comments=True)
                while words[1:] and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                # `accelerate launch` and `python` alone are names of tools, not commands
                alone = {"python": 1, "bash": 1, "accelerate": 2, "torchrun": 1, "sbatch": 1, "pip": 2}
                if words and len(words) > alone.get(words[0], 99):
                    found.append(words)
    return found


def test_the_parts_of_this_test_find_something():
    for readme in READMES:
        assert len(blocks(readme)) >= 5 and len(spans(readme)) >= 30
        assert {words[1] for words in commands(readme) if words[0] == "python"} >= {"run_all.py", *SCRIPTS}


# --- the two commands, the two languages


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize("command", [DEMO, TESTS])
def test_the_two_commands_stand_alone_in_a_block(readme, command):
    assert f"{command}\n" in blocks(readme)


def test_each_readme_links_to_the_other_in_its_first_line():
    for readme, other in zip(READMES, reversed(READMES), strict=True):
        assert f"]({other})" in text(readme).splitlines()[0]


def test_both_readmes_have_the_same_commands_in_the_same_order():
    english, chinese = map(blocks, READMES)
    assert english == chinese
    english, chinese = (re.findall(r"^(#+) ", text(readme), re.MULTILINE) for readme in READMES)
    assert english == chinese  # one chapter for each
    # the tables' first cells are names of presets, data sets and scripts, which have no translation
    english, chinese = (re.findall(r"^\| (`[^`]+`) \|", text(readme), re.MULTILINE) for readme in READMES)
    assert english == chinese


@pytest.mark.parametrize("readme", READMES)
def test_it_opens_with_three_sentences_one_command_and_two_forks(readme):
    opening = text(readme).partition("\n# ")[2].partition("\n## ")[0].partition("\n")[2]
    assert len(re.findall(r"[.?!](?=\s|$)|[。？！]", opening)) == 3
    assert blocks(readme)[0] == f"{DEMO}\n"
    for pattern, (heading, _) in zip(("result|结果", "GPU", "laptop|笔记本"), chapters(readme), strict=False):
        assert re.search(pattern, heading), f"the chapter on {pattern} is {heading!r}"
    (_, demo), *forks = chapters(readme)[:3]
    assert re.search(r"\*\*(Verdict|结论)", demo)
    assert all(re.search(r"^python run_all\.py --", body, re.MULTILINE) for _, body in forks)


@pytest.mark.parametrize("readme", READMES)
def test_every_exit_code_has_a_line(readme):
    codes = re.findall(r"^\| ([\d]+)(?: (?:or|或) (\d+))? \|", text(readme), re.MULTILINE)
    assert [code for pair in codes for code in pair if code] == ["0", "1", "2", "129", "130", "143", "141"]


def test_agents_are_told_of_the_states_and_keys_that_there_are():
    from configs import state

    page, kinds = text("AGENTS.md"), re.search(r"kind: (.+?);", state.Step.__doc__)[1]
    told = re.search(r"`state` is (.+?) \|", page)[1]
    assert set(re.findall(r'"([^"]+)"', told)) == set(re.findall(r'"([^"]+)"', kinds)) and told.count('"') == 10
    sources = {name: text(name) for name in ("4_evaluate_compare.py", "configs/comparison/results.py")}
    sources["training"] = text("configs/training/runlog.py")
    sources["1"] = text("1_prepare_dataset.py")
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ") and ".json`:" in line]
    for row, source in zip(rows, sources.values(), strict=True):
        for key in re.findall(r"`([a-z_.]+)`", row.partition(":")[2]):
            for part in key.split("."):
                evaluation = map(text, ("configs/evaluation/statistics.py", "configs/evaluation/recommendation.py"))
                assert f'"{part}"' in "".join([source, *evaluation]), key
    codes = re.search(r"^Exit codes: .*$", page, re.MULTILINE)[0]
    in_readme = re.findall(r"^\| ([\d]+)(?: or (\d+))? \|", text("README.md"), re.MULTILINE)
    assert {code for pair in in_readme for code in pair if code} == set(re.findall(r"\b\d+\b", codes))
    assert re.search(r"\[AGENTS.md\]\(AGENTS.md\)", text("README.md") + text("README.zh-CN.md"))


def test_continuous_integration_runs_the_command_as_it_stands():
    assert TESTS in text(".ci/run").splitlines()


# --- commands


def check(script: str, words: list[str]) -> None:
    """Fails where `script` would refuse `words` at its start."""
    if script == "run_all.py":
        import run_all

        own = {"__file__": str(ROOT / script), **{n: c.default for n, c in read_constants(ROOT / script).items()}}
        override_all(own, run_all.status_asked(words)[1])
        assert own["STEPS"] is None or run_all.parse_steps(own["STEPS"])
    elif script in CONSTANTS:
        defaults = {name: constant.default for name, constant in CONSTANTS[script].items()}
        override({"__file__": str(ROOT / script), **defaults}, words)
    else:
        assert not words, f"{script} {words}: which flags it has is not known here"


@pytest.mark.parametrize("readme", [*READMES, "AGENTS.md"])
def test_every_command_is_accepted(readme, capsys):
    for words in commands(readme):
        given = list(words)
        for flag, name in zip(words, words[1:], strict=False):
            assert flag != "-r" or (ROOT / name).is_file(), given
        for word in words:
            assert not word.startswith((".ci/", "configs/", "tests/")) or (ROOT / word).exists(), given
        if words[:2] == ["python", "-m"]:
            assert words[2] == "pytest", given
        elif words[0] in ("python", "accelerate", "torchrun"):
            at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            assert at is not None, given
            assert words[0] != "python" or at == 1, given
            assert (ROOT / words[at]).is_file(), given
            try:
                check(words[at], ["demo" if word == "my.yaml" else word for word in words[at + 1 :]])
            except SystemExit as stop:
                assert not stop.code, (given, capsys.readouterr().err)


@pytest.mark.parametrize("readme", [*READMES, "AGENTS.md"])
def test_every_flag_and_setting_in_backticks_exists(readme):
    for span in spans(readme):
        if span.startswith("--"):
            for word in span.split():
                name = word.partition("=")[0]
                if name.startswith("--") and name not in RUN_ALL | LAUNCHERS:
                    section, _, setting = name[2:].rpartition(".")
                    assert setting.replace("-", "_").upper() in SETTINGS, span
                    assert section in ("", "prepare", "lora", "full", "evaluate"), span
        elif found := re.match(r"([A-Z][A-Z0-9_]{3,})\b(?!\.)", span):
            assert found[1] in SETTINGS | ENVIRONMENT, span


@pytest.mark.parametrize("readme", READMES)
def test_every_preset_is_there_and_every_preset_is_named(readme):
    known = list_presets(ROOT)
    named = set(re.findall(r"--preset[ =]([\w./-]+)", text(readme)))
    for name in named - {"NAME", "my.yaml"}:
        assert preset_path(name, ROOT).is_file()
    # what looks like one, whether or not a flag stands in front of it
    alike = [
        span
        for span in spans(readme)
        if re.fullmatch(r"(gpu|demo|cpu|mac|t4|a100|h100|qwen3?|llama|tinyllama)(_\w+)?", span)
    ]
    assert set(alike) <= known.keys()
    assert known.keys() <= set(alike), "a preset that the README does not name is found by nobody"


# --- files


@pytest.mark.parametrize("readme", READMES)
def test_every_file_is_there(readme):
    own = {path.name for path in ROOT.iterdir()} | {"configs", "tests", "data", "outputs", ".ci"}
    sources = "".join(
        path.read_text("utf-8") for path in [*map(ROOT.joinpath, SCRIPTS), *ROOT.glob("configs/**/*.py")]
    )
    for word in {word for span in spans(readme) for word in span.split()}:
        word = word.removeprefix("./")
        first, slash, _ = word.partition("/")
        if slash and first in ("data", "outputs"):
            # made by the scripts, so their names stand in one of them
            assert all(part in sources for part in word.split("/") if part and "*" not in part), word
        elif slash and first in own:
            assert list(ROOT.glob(word)) if "*" in word else (ROOT / word).exists(), word
        elif re.fullmatch(r"\w[\w.-]*\.(py|md)", word) and word not in sources:
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("readme", READMES)
def test_the_layout_is_as_shown(readme):
    (tree,) = [block for block in blocks(readme) if block.startswith(SCRIPTS[0])]
    for line in tree.splitlines():
        place, *names = line.split()
        assert (ROOT / place).exists(), place
        for name in names:
            assert (ROOT / place / name).is_file(), f"{place}{name}"


@pytest.mark.parametrize("readme", READMES)
def test_every_link_inside_the_project_leads_somewhere(readme):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(readme)):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            assert (ROOT / (path or readme)).exists(), target
            assert not anchor or anchor in anchors(path or readme), target


def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    heads = re.findall(r"^#+ +(.+?) *$", text(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# --- numbers


def chapters(readme: str) -> list[tuple[str, str]]:
    """(heading, body) of each chapter, in order."""
    _, *parts = re.split(r"^## (.*)$", text(readme), flags=re.MULTILINE)
    return list(zip(parts[::2], parts[1::2], strict=True))


def results(readme: str) -> str:
    """The chapters whose numbers were measured: the demo's result, and what a laptop may expect."""
    (_, demo), _, (_, laptop), *_ = chapters(readme)
    return re.sub(r"^```.*?^```$", "", demo + laptop, flags=re.MULTILINE | re.DOTALL)


def numbers(prose: str) -> list[str]:
    """The figures of a text, without those in links, in backticks and in names such as phi-2."""
    plain = re.sub(r"\]\([^)]*\)|`[^`]*`|<[^>]*>", " ", prose)
    # no \w here: to Python, a Chinese character beside a figure is a word with it
    return re.findall(r"(?<![A-Za-z0-9_.-])-?(?:\d[\d.,]*\d|\d)(?![0-9A-Za-z_]|-[A-Za-z])", plain)


@pytest.mark.parametrize("readme", READMES)
def test_every_number_of_the_results_cites_the_log(readme):
    log = text("LOG.md")
    parts = [part for part in re.split(r"\n\s*\n", results(readme)) if part.strip() and part[:3] != "```"]
    found = 0
    for i, part in enumerate(parts):
        if numbers(part):
            found += 1
            # a table is cited by the sentence above or below it
            around = parts[max(i - 1, 0) : i + 2] if part.lstrip().startswith("|") else [part]
            assert any("LOG.md" in near for near in around), part
    assert found, "results without a number"
    for date in re.findall(r"20\d\d-\d\d-\d\d", results(readme)):
        assert date in log, f"LOG.md has no entry of {date}"


def test_both_readmes_show_the_same_results():
    english, chinese = (sorted(numbers(results(readme))) for readme in READMES)
    assert english == chinese


@pytest.mark.parametrize("readme", READMES)
def test_every_figure_of_the_results_stands_in_the_log(readme):
    log = set(numbers(text("LOG.md")))
    for line in results(readme).splitlines():
        for number in numbers(line):
            assert number in log, f"{number} is not in LOG.md: {line}"


@pytest.mark.parametrize("readme", READMES)
def test_what_was_computed_for_a_gpu_is_called_computed(readme):
    log, (_, body) = set(numbers(text("LOG.md"))), chapters(readme)[1]
    lines = [line for line in body.splitlines() if re.search(r"\d\.\d+ GB", line)]
    assert len(lines) >= 3
    for line in lines:
        assert re.search("computed|计算值", line), line
        assert {n for n in numbers(line) if "." in n} <= log, line


@pytest.mark.parametrize("readme", READMES)
def test_nothing_was_left_to_be_filled_in(readme):
    assert not re.search(r"@@|TODO|FIXME|XXX", text(readme))


# --- the log


def test_every_entry_of_the_log_begins_with_its_verdict():
    _, *parts = re.split(r"^## (.*)$", text("LOG.md"), flags=re.MULTILINE)
    titles = [re.sub(r"^20\d\d-\d\d-\d\d: ", "", heading) for heading in parts[::2]]
    dates = [heading[:10] for heading in parts[::2]]
    assert len(set(titles)) == len(titles) and dates == sorted(dates, reverse=True)
    for i, body in enumerate(parts[1::2]):
        assert body.lstrip().startswith("**Verdict: "), titles[i]
        assert re.search(r"^(- )?Question: .+\?", body, re.MULTILINE), titles[i]
        for field in ("command", "commit", "machine"):
            assert re.search(rf"^(- )?[^:\n]*{field}s?\b[^:\n]*: ", body, re.I | re.M), (titles[i], field)
        if superseded := re.search(r"^Superseded.*", body, re.MULTILINE):
            named = re.findall(r'"([^"]+)"', superseded[0])
            assert named and set(named) <= set(titles[:i]), f"{titles[i]}: no newer entry of that name"


# --- requirements


def test_every_package_is_pinned_exactly():
    asked_for = "torch transformers datasets peft trl accelerate bitsandbytes deepspeed evaluate tensorboard".split()
    for name in ("requirements.txt", "tests/requirements.txt"):
        lines = [line.partition("#")[0].strip() for line in text(name).splitlines()]
        pins = [re.fullmatch(r"([\w.-]+)==(\d[\w.+]*)( *;.+)?", line) for line in lines if line]
        assert all(pins), name
        names = [pin[1].lower() for pin in pins]
        assert len(names) == len(set(names))
        if name == "requirements.txt":
            assert set(asked_for) <= set(names)


def test_the_readme_names_no_other_version_than_the_pinned_one():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text("requirements.txt"), re.MULTILINE))
    for readme in READMES:
        for name, version in re.findall(r"([\w-]+)==([\w.]+)", text(readme)):
            assert pins[name] == version
