"""The reports as pages: no sideways scroll, readable in light, dark and on paper, and no script but ours."""

import copy
import json
import os
import re
from html.parser import HTMLParser

import markdown
import numpy as np
import pytest
from chromium import tab
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from configs import pictures
from configs.evaluation import answers, history, page
from configs.evaluation.pictures import draw
from configs.evaluation.report import load_words, verdict, write_report
from configs.text import cell, without_zero_signs

PAIRS = [("lora", "base"), ("full", "base"), ("full", "lora")]
HOSTILE = """</td></table></main><script>document.title = 'ran'</script><img src=x onerror="document.title = 'ran'">
<svg onload="document.title = 'ran'"></svg> ![](slot:answers) ![x](http://evil.example/i.png) {{ 7 * 7 }} $x$"""
PROMPTS = {
    "What is an ETF?": ("A fund that is traded.", "A dog.", "A fund that is sold.", "A fund that is traded."),
    "什么是股票？": ("股票是公司的一部分。", "不知道。", "股票是公司的一部分。", "股票是公司的债务。"),
    f"Is this harmless? {HOSTILE}": (HOSTILE, HOSTILE, f"no {HOSTILE}", ""),
    "Long? " + "word" * 100: ("x" * 700, "| a | b |\n|---|---|", "line\n" * 40, "- a\n- b\n\n    code"),
}


def compared(a: str, b: str, metric: str, difference: float, spread: float) -> dict:
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "difference": difference,
        "ci95": [difference - spread, difference + spread],
        "p_value": 0.0004 if abs(difference) > spread else 0.4,
        "raw_p": 0.0002,
        "n": 125,
        "groups": 87,
        "smallest_detectable": 0.08,
    }


def results_of(**changes: object) -> dict:
    """What step 4 found, as the report takes it: three models, forgetting, costs on a CPU."""
    losses, forgot, models = {"base": 2.8, "lora": 2.3, "full": 2.0}, {"base": 5.3, "lora": 5.29996, "full": 5.5}, {}
    for name, loss in losses.items():
        text = {"nll_per_token": forgot[name], "bits_per_byte": forgot[name] / 2.4, "tokens": 2000}
        rates = dict.fromkeys(("stopped", "repetitive", "empty", "useless"), 0.02)
        models[name] = {"perplexity": float(np.exp(loss)), "nll_per_token": loss, "bits_per_byte": loss / 2.4}
        models[name] |= {
            "answer_quality": 0.3,
            "style_match": 0.8,
            "well_formed": 0.8,
            "helpfulness": None,
            "forgetting": text,
        }
        models[name] |= {"answers": {"n": 4, **rates}, "prompt": "chat", "benchmarks": {}}
        models[name] |= {"perplexity_by_prompt": {"chat": 17.0, "plain": 18.0}, "cost": None}
    for name, seconds in (("lora", 698.0), ("full", 189.0)):
        models[name]["cost"] = {"device": "cpu", "trainable": 221184, "train_runtime_s": seconds, "tokens": 283421}
        models[name]["cost"] |= {"tokens_per_second": 400.0, "peak_memory_bytes": 1.9e9, "disk_bytes": 1_000_000}
    comparisons = [compared(a, b, "nll_per_token", losses[a] - losses[b], 0.05) for a, b in PAIRS]
    comparisons += [compared(a, b, "forgetting", forgot[a] - forgot[b], 0.1) for a, b in PAIRS]
    metrics = {"nll_per_token": ("lower", "nats per token"), "forgetting": ("lower", "nats per token")}
    return {
        "models": models,
        "comparisons": comparisons,
        "metrics": {name: {"better": better, "unit": unit} for name, (better, unit) in metrics.items()},
        "judge": None,
        "unsound": [],
        "warnings": [HOSTILE],
        "settings": {"MODEL_NAME": "a/" + "long_name_" * 12, "MODEL_REVISION": None, "TEXT": HOSTILE},
        "data": {
            "source": "rows.jsonl", "manifest_sha256": "0", "test_rows": 125, "test_groups": 87, "test_prompts": 4
        },
        "environment": {"device": "cpu", "packages": {"torch": "2", "transformers": "5"}},
    } | changes  # fmt: skip


HISTORY = [{"step": n, "loss": 7.0 - n / 10, "eval_loss": 7.2 - n / 10} for n in range(0, 40, 10)]
EXAMPLES = [
    {"prompt": prompt, **dict(zip(("reference", "base", "lora", "full"), texts, strict=True))}
    for prompt, texts in PROMPTS.items()
]


def write(folder, language: str, results: dict | None = None, before: dict | None = None) -> str:
    """The report in a folder, which is made; the address of its page."""
    results, words = results or results_of(), load_words(language)
    drawn = draw(results, {"lora": HISTORY, "full": HISTORY}, folder / "plots", words, load_words("en"))
    examples = [dict.fromkeys(results["models"], "") | example for example in EXAMPLES]
    write_report(results | {"verdict": verdict(results, PAIRS, words)}, examples, drawn, folder, language, before)
    return (folder / "evaluation_report.html").as_uri()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{language or name of a sweep's: address of its page}."""
    from test_sweep import made_up, report, results

    folder, before = tmp_path_factory.mktemp("pages"), {**results_of(), "time": "2026-11-26 10:00"}
    addresses = {language: write(folder / language, language, before=before) for language in ("en", "zh")}
    found = results.analyse(*made_up(spread=0.002, gap=0.1), 2000, 0.95)
    for language in ("en", "zh"):
        report.write(found, folder / f"sweep_{language}", language)
        addresses[f"sweep_{language}"] = (folder / f"sweep_{language}" / "sweep_report.html").as_uri()
    return addresses


@pytest.fixture(scope="module")
def chromium():
    with tab() as opened:
        yield opened


PAGES = pytest.mark.parametrize("name", ["en", "zh", "sweep_en", "sweep_zh"])

# --- in a browser

# Contrast as WCAG 2.2 defines it, of every text that is seen; [ratio, text, color, ground] of those below 4.5.
CONTRAST = r"""(() => {
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const numbers = (color) => color.match(/[\d.]+/g).map(Number);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const low = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const node = walk.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || element.closest("script, style") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), text = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(numbers(text)), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) low.push([ratio, node.textContent.slice(0, 40), text]);
  }
  return [seen, low];
})()"""


@PAGES
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_its_window_and_can_be_read(written, chromium, name, width, dark):
    chromium.look(width, dark=dark)
    chromium.open(written[name])
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")
    ground = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (ground != "rgb(255, 255, 255)") == dark
    seen, low = chromium.run(CONTRAST)
    assert seen > 80 and low == []
    # what is wider than the window scrolls inside itself, and can be reached by the keyboard
    wide = chromium.run(
        "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).length"
    )
    assert wide > 0 if width == 390 else True
    assert chromium.run("[...document.querySelectorAll('table')].every((e) => e.closest('.scroll[tabindex=\"0\"]'))")
    # the smallest label of a picture, in CSS pixels
    sizes = "[...document.querySelectorAll('svg text')].map((e) => e.getBoundingClientRect().height)"
    assert min(chromium.run(sizes)) >= 9


def test_the_contrast_check_can_fail(chromium, tmp_path):
    (tmp_path / "page.html").write_text("<p style='color: #888'>grey</p><p>black</p>")
    chromium.open((tmp_path / "page.html").as_uri())
    assert [text for _, text, _ in chromium.run(CONTRAST)[1]] == ["grey"]


@PAGES
def test_a_page_asks_nobody_and_runs_nothing_but_our_script(written, chromium, name):
    chromium.look(1280)
    chromium.open(written[name])
    chromium.run("new Promise((done) => setTimeout(done, 200))")
    assert chromium.run("document.title") != "ran"
    assert chromium.run("document.scripts.length") == (0 if name.startswith("sweep") else 1)
    asked = [e["params"]["request"]["url"] for e in chromium.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [written[name]]
    wrong = [e["params"] for e in chromium.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert wrong == []
    # another script would not run, even if it got into the page
    chromium.run("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))")
    assert chromium.run("document.title") != "1"


@PAGES
def test_a_printed_page_has_all_of_its_width_and_splits_no_row(written, chromium, name):
    chromium.look(688, medium="print")  # the width of A4 without the margins, 182 mm at 96 dots an inch
    chromium.open(written[name])
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")
    assert chromium.run("[...document.querySelectorAll('.scroll')].every((e) => e.scrollWidth <= e.clientWidth + 1)")
    style = "[...document.querySelectorAll('{}')].every((e) => getComputedStyle(e).{} === 'avoid')"
    assert chromium.run(style.format("tr, figure", "breakInside"))
    assert chromium.run(style.format("h1, h2, h3", "breakAfter"))
    assert chromium.printed().startswith(b"%PDF-")


def test_the_filter_shows_what_is_asked_for(written, chromium):
    chromium.look(1280)
    chromium.open(written["en"])
    titles = "[...document.querySelectorAll('article.answer')].filter((e) => e.checkVisibility())"
    titles += ".map((e) => e.querySelector('h3').textContent)"
    assert chromium.run(titles) == [" ".join(prompt.split()) for prompt in PROMPTS]

    def choose(question: str, nearest: str) -> list[str]:
        change = "document.getElementById('filter-{}').value = {}"
        chromium.run(change.format("question", json.dumps(question)))
        chromium.run(change.format("nearest", json.dumps(nearest)))
        chromium.run("document.getElementById('filter').dispatchEvent(new Event('input'))")
        shown = chromium.run(titles)
        assert chromium.run("document.getElementById('filter-count').value") == str(len(shown))
        return shown

    assert choose("etf", "") == ["What is an ETF?"] and choose("ETF an", "") == ["What is an ETF?"]
    assert choose("股票", "") == ["什么是股票？"] and choose("no such question", "") == []
    assert choose("", "1") == ["什么是股票？"]  # lora was nearer there
    assert choose("", "2") == ["What is an ETF?"]
    assert len(choose("", "")) == len(PROMPTS)


def test_without_scripts_all_answers_are_there_and_no_filter(written, chromium):
    chromium.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(written["en"])
        assert chromium.run("[...document.querySelectorAll('article.answer')].every((e) => e.checkVisibility())")
        assert not chromium.run("document.getElementById('filter').checkVisibility()")
    finally:
        chromium.send("Emulation.setScriptExecutionDisabled", value=False)


def test_what_a_screen_reader_is_told(written, chromium):
    chromium.open(written["en"])
    for empty in (
        "document.querySelectorAll('th:not([scope])')",
        "document.querySelectorAll('main h1:empty, th:empty')",
    ):
        assert chromium.run(f"{empty}.length") == 0
    assert chromium.run("document.querySelectorAll('main').length") == 1
    labels = chromium.run("[...document.querySelectorAll('svg')].map((e) => e.getAttribute('aria-label'))")
    assert len(labels) == 4 and "full - lora -0.300 (95 % interval [-0.350, -0.250])" in labels[0]
    assert "lora, training: 7.000 -> 4.000" in labels[2] and "lora 12 min, full 3 min" in labels[3]
    columns = (
        "[...document.querySelectorAll('table.answers thead tr')].map((e) => [...e.cells].map((c) => c.offsetWidth))"
    )
    for widths in chromium.run(columns):
        assert max(widths) - min(widths) <= 1  # equal columns


# --- the pictures


def test_pictures_take_the_fonts_and_colours_of_the_page(tmp_path):
    write(tmp_path / "en", "en")
    html = (tmp_path / "en/evaluation_report.html").read_text("utf-8")
    ids, drawn = re.findall(r' id="([^"]+)"', html), re.findall("<svg.*?</svg>", html, re.S)
    assert len(ids) == len(set(ids)) and len(drawn) == 4
    for svg in drawn:
        assert "font-family" not in svg and "<style" not in svg and "width=" not in svg.partition(">")[0]
        assert set(re.findall("#[0-9a-f]{6}", svg)) == set()  # each colour is one of the page's
        tones = set(re.findall(r"var\(--(\w+)\)", svg))
        assert "ink" in tones and tones <= set(pictures.TONES)
    assert sorted(path.name for path in (tmp_path / "en/plots").iterdir()) == [
        "cost.png", "differences.png", "forgetting.png", "loss_curves.png"
    ]  # fmt: skip


def test_names_are_text_in_pictures(tmp_path):
    results, name = results_of(), "<b>$x$ & \x1b[31m"
    results["models"][name] = copy.deepcopy(results["models"]["full"])
    results["comparisons"] += [compared(name, "base", metric, -0.5, 0.1) for metric in ("nll_per_token", "forgetting")]
    write(tmp_path / "en", "en", results)
    html = (tmp_path / "en/evaluation_report.html").read_text("utf-8")
    assert "<b>" not in html and "\x1b" not in html
    assert html.count(">&lt;b&gt;$x$ &amp; \\x1b[31m") >= 3  # as a label of each picture that has it


@pytest.mark.parametrize("has_font", [True, False])
def test_labels_are_in_the_language_of_the_report(tmp_path, monkeypatch, capsys, has_font):
    font = pictures.chinese_font()
    if has_font and font is None:
        pytest.skip("no font with Chinese on this machine; install one, e.g. apt-get install fonts-noto-cjk")
    monkeypatch.setattr(pictures, "chinese_font", lambda: font if has_font else None)
    write(tmp_path / "zh", "zh")
    svgs = re.findall("<svg.*?</svg>", (tmp_path / "zh/evaluation_report.html").read_text("utf-8"), re.S)
    assert all(re.search(">[^<]*[\u4e00-\u9fff][^<]*</text>", svg) for svg in svgs)
    assert ("no font with Chinese" in capsys.readouterr().out) == (not has_font)


def test_a_language_without_a_font_has_english_files(tmp_path, monkeypatch):
    drawn, english = [], load_words("en")
    monkeypatch.setattr(pictures, "chinese_font", lambda: None)
    gallery = pictures.Gallery(tmp_path / "plots", load_words("zh"), english)
    gallery.add("one", lambda axis, words: drawn.append((axis, words)), (3, 2), "alt", "caption")
    assert [words["language"] for _, words in drawn] == ["zh", "en"] and (tmp_path / "plots/one.png").exists()


def test_memory_without_a_gpu_is_called_that_of_the_process(tmp_path):
    write(tmp_path / "cpu", "en")
    results = results_of()
    for name in ("lora", "full"):
        results["models"][name]["cost"]["device"] = "NVIDIA H100"
    write(tmp_path / "gpu", "en", results)
    texts = [(tmp_path / kind / "evaluation_report.md").read_text("utf-8") for kind in ("cpu", "gpu")]
    assert [text.count("peak memory of the process (RSS)") for text in texts] == [2, 0]  # table and picture
    assert [text.count("peak GPU memory") for text in texts] == [0, 2]


# --- the answers


def test_the_words_that_differ_are_marked():
    assert answers.marked("a fund that is old", "a fund that is <new>") == ("a fund that is <mark>&lt;new&gt;</mark>")
    assert answers.marked("costs $1,500 now", "costs $2,500 now") == "costs $<mark>2,500</mark> now"
    assert answers.marked("股票是公司的债务", "股票是公司的资产") == "股票是公司的<mark>资产</mark>"
    assert answers.marked("same", "same") == "same" and answers.marked("", "") == ""
    assert answers.marked("nothing in common", "wholly other words") == "wholly other words"


@given(st.text("ab <&'\"的。\n", max_size=30), st.text("ab <&'\"的。\n", max_size=30))
@settings(max_examples=200, deadline=None, database=None)
def test_marks_change_no_answer(before, text):
    html = answers.marked(before, text)
    assert re.sub("</?mark>", "", html) == str(answers.escape(text))
    assert "<mark>" not in answers.marked(text, text)


def test_comparing_endless_answers_takes_no_time():
    long = "the same again " * 3000
    assert answers.marked(long, long + "x") == long + "x"


def test_every_answer_is_in_the_page_and_the_first_ones_in_the_markdown(tmp_path):
    many = [
        {"prompt": f"question {n}?", "reference": "r", "base": "b", "lora": "l", "full": f"f {n}"} for n in range(25)
    ]
    words = load_words("en")
    write_report(results_of(verdict="v"), many, {}, tmp_path, "en")
    text, html = ((tmp_path / f"evaluation_report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    assert html.count('<article class="answer"') == 25 and text.count("\n### question") == 10
    assert words["answers_rest"].format(shown=10, all=25) in text and "first 10" not in html


# --- the previous evaluation


def test_the_last_ten_results_are_kept(tmp_path):
    path = tmp_path / "evaluation_results.json"
    history.keep(tmp_path)
    assert history.read(tmp_path) is None and not (tmp_path / "history").exists()
    for n in range(12):
        path.write_text(json.dumps({"n": n}))
        os.utime(path, (1_700_000_000 + n, 1_700_000_000 + n))
        assert history.read(tmp_path)["n"] == n
        history.keep(tmp_path)
        history.keep(tmp_path)  # twice is once
    kept = sorted((tmp_path / "history").iterdir())
    assert [json.loads(path.read_text())["n"] for path in kept] == list(range(2, 12))
    assert all(re.fullmatch(r"evaluation_results_\d{8}-\d{6}\.json", path.name) for path in kept)
    for broken in ("[1]", "{", "\x00"):
        path.write_text(broken)
        history.keep(tmp_path)
        assert history.read(tmp_path) is None and len(list((tmp_path / "history").iterdir())) == 10


def test_the_table_has_a_column_for_results_about_the_same_things(tmp_path):
    def rows(before: dict | None, name: str) -> list[list[str]]:
        write_report(results_of(verdict="v"), EXAMPLES, {}, tmp_path / name, "en", before)
        text = (tmp_path / name / "evaluation_report.md").read_text("utf-8").split("##")[0]
        return [[part.strip() for part in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]

    before = json.loads(json.dumps(results_of())) | {"time": "2026-11-26 10:00"}
    before["models"]["lora"]["perplexity"] = 12.3456
    table = rows(before, "same")
    assert table[0] == ["", "base", "lora", "full", "before (2026-11-26 10:00)"]
    assert {len(row) for row in table} == {5}
    assert table[2][-1] == "16.44 / 12.35 / 7.39"
    others = {"data": {"manifest_sha256": "1"}, "settings": {"MODEL_NAME": "other"}}
    for n, (part, changed) in enumerate(others.items()):
        assert rows(before | {part: before[part] | changed}, f"other {n}")[0] == ["", "base", "lora", "full"]
    fewer = before | {"models": {name: before["models"][name] for name in ("base", "lora")}}
    for n, odd in enumerate((None, fewer, {"time": ""}, before | {"models": None})):
        assert rows(odd, f"odd {n}")[0] == ["", "base", "lora", "full"]
    before["models"]["lora"] = {"perplexity": "many", "nll_per_token": None, "forgetting": 3}
    assert rows(before, "damaged")[2][-1] == "16.44 / - / 7.39"


# --- texts and numbers

MARKS = st.text("a1 \\`*_{}[]()<>#+-.!|~$&;:/=^\"'\n", max_size=40)


READERS = (
    lambda source: markdown.markdown(source, extensions=["tables"]),
    MarkdownIt("commonmark").enable(["table", "strikethrough"]).render,
)


class Read(HTMLParser):
    """tags: the elements of a page in order; text: without white space."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, _):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += "".join(data.split())


@given(MARKS)
@settings(max_examples=400, deadline=None, database=None)
def test_a_cell_is_text_to_every_reader_of_markdown(text):
    shown, wanted = cell(text), "".join(text.split())
    places = {f"{shown}\n": ["p"], f"- {shown}\n": ["ul", "li"], f"# {shown} x\n": ["h1"]}
    places[f"**{shown}**\n"] = ["p", "strong"]
    places[f"| a | b |\n|---|---|\n| {shown} | {shown} |\n"] = "table thead tr th th tbody tr td td".split()
    for read in READERS if wanted else ():
        for source, tags in places.items():
            found = Read(read(source))
            assert found.tags == tags, (source, found.tags)
            assert found.text in (wanted, f"{wanted}x", f"ab{wanted}{wanted}"), source


def test_markdown_can_be_read_as_text():
    for text in (
        "The price: $2,500 (or 5%)!",
        "a < b, 2 * 3 + 1 = 7",
        "snake_case, C:\\folder, AT&T",
        "-0.5 to +1 ~5",
    ):
        assert cell(text) == text
    assert cell("1. one") == "1\\. one" and cell("**x** | y") == "\\*\\*x\\*\\* \\| y"


def test_zero_has_no_sign():
    for shown, wanted in {
        "-0.000": "0.000", "+0.000 to +0.012": "0.000 to +0.012", "[-0.0000, -0.0001]": "[0.0000, -0.0001]",
        "-0.05": "-0.05", "3e-05": "3e-05", "a-0.0": "a-0.0", "-0 %": "0 %", "10-0": "10-0", "+0.0x": "+0.0x",
    }.items():  # fmt: skip
        assert without_zero_signs(shown) == wanted
    assert page.p_text(0.0004) == "< 0.001" and page.p_text(0.0012) == "0.001"


def test_no_number_of_a_report_is_a_signed_zero(tmp_path):
    results = results_of()
    results["comparisons"][0] |= {"difference": -0.00001, "ci95": [-0.00002, 0.00001]}
    for language in ("en", "zh"):
        write(tmp_path / language, language, results)
        for kind in ("md", "html"):
            text = (tmp_path / language / f"evaluation_report.{kind}").read_text("utf-8")
            assert not re.search(r"(?<![\w.])[-+]0\.0+(?![\d])", text) and "0.000" in text


def test_the_tones_of_the_page_are_those_of_the_pictures():
    css = (ROOT / "configs/evaluation/templates/page.css.jinja").read_text("utf-8")
    own = {"ground", "soft", "mark"}
    assert set(re.findall(r"var\(--(\w+)\)", css)) <= own | set(pictures.TONES)
