"""A report's two forms from one template: Markdown to read as text, and a page that holds everything itself."""

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import markdown
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from markupsafe import Markup

from configs import handover
from configs.pictures import TONES, Picture
from configs.text import cell, without_zero_signs

TEMPLATES = Path(__file__).with_name("templates")
# the words of a cell that holds numbers, with their units; such cells are set to the right
NUMBERS = re.compile(r"[-+<\[(]*[\d.,]*\d(?:e[-+]\d+)?[\]),]*|[-/<%]|s|min|h|days|秒|分钟|小时|天|MB|GB")
LONGEST = 16  # characters of words that stand in place of a number


def templates_in(*folders: Path) -> Environment:
    """The templates of a report, and those of this folder; only the .html.jinja ones escape what fills them."""
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(folder) for folder in (*folders, TEMPLATES)]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
    )
    environment.filters |= {"cell": cell, "p": p_text, "rounded": without_zero_signs}
    environment.filters["format"] = lambda form, *values: without_zero_signs(form % values)
    return environment


def p_text(p: float) -> str:
    """A p-value for people; no more digits than resampling can tell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def figure(name: str, picture: Picture) -> Markup:
    """A picture with its caption, as HTML."""
    html = '<figure class="{}">{}<figcaption>{}</figcaption></figure>'
    return Markup(html).format(name, Markup(picture.svg), picture.caption)


def write_both(
    render: Callable[..., str],
    path: Path,
    pictures: dict[str, Picture],
    page: Callable[[str], str],
    slots: dict[str, str] | None = None,
) -> None:
    """Write path.md and path.html, both from one Markdown template.

    render(is_page=, picture=): the Markdown, in which picture(name) stands for one of `pictures`. page(body): the
    whole page. slots: {name: HTML} of further parts, which the Markdown of the page names as `![](slot:NAME)`.
    """

    def in_markdown(name: str) -> str:
        return f"![{cell(pictures[name].alt)}](plots/{name}.png)\n\n*{pictures[name].caption}*"

    handover.write_text(path.with_suffix(".md"), render(is_page=False, picture=in_markdown))
    text = render(is_page=True, picture=lambda name: f"![](slot:{name})")
    layout = Layout({name: figure(name, picture) for name, picture in pictures.items()} | (slots or {}))
    handover.write_text(path.with_suffix(".html"), page(markdown.markdown(text, extensions=["tables", layout])))


def whole(templates: Environment, title: str, body: str, language: str, script: str = "") -> str:
    """The page around a body, with its style sheet. script: ours; its hash in the page's policy lets it alone run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template("page.html.jinja").render(
        title=title,
        body=Markup(body),
        language=language,
        tones=TONES,
        script=Markup(script),
        script_hash=f"'sha256-{digest}'" if script else "'none'",
    )


class Layout(Extension):
    """Tables that scroll by themselves, with headers that say whose they are, and the parts that are not Markdown.

    slots: {name: HTML} for the paragraphs that hold nothing but an image of the address slot:NAME. Texts cannot name
    one: `cell` lets no image through.
    """

    def __init__(self, slots: dict[str, str]):
        super().__init__()
        self.slots = slots

    def extendMarkdown(self, md):  # noqa: N802 - the library's name
        md.treeprocessors.register(Arrange(md, self.slots), "arrange", 5)  # after the inline patterns


class Arrange(Treeprocessor):
    """What Layout does to the tree of a document."""

    def __init__(self, md, slots: dict[str, str]):
        super().__init__(md)
        self.slots = slots

    def run(self, root: ElementTree.Element) -> None:
        title = ""
        for place, block in enumerate(list(root)):
            image = block.find("img")
            if block.tag in ("h1", "h2", "h3"):
                title = "".join(block.itertext())
            elif block.tag == "table":
                frame = ElementTree.Element("div", {"class": "scroll", "role": "region", "tabindex": "0"})
                frame.set("aria-label", title)
                root[place] = frame
                frame.append(block)
                frame.tail, block.tail = block.tail, None
                arrange_table(block)
            elif image is not None and image.get("src", "").startswith("slot:"):
                block.clear()
                block.text = self.md.htmlStash.store(self.slots[image.get("src").removeprefix("slot:")])


def arrange_table(table: ElementTree.Element) -> None:
    """Say which cells are headers of a column or of a row, and set the columns of numbers to the right."""
    heads, rows = list(table.iter("th")), [list(row) for row in table.iterfind("tbody/tr")]
    for head in heads:
        head.set("scope", "col")
    for first, *_ in rows:
        first.tag = "th"
        first.set("scope", "row")
    for place, head in enumerate(heads[1:], start=1):
        cells = [row[place] for row in rows if row[place].text]
        numbers = [td for td in cells if td.text and all(map(NUMBERS.fullmatch, td.text.split()))]
        if 2 * len(numbers) >= len(cells) and any(td.text != "-" for td in numbers):
            for td in (head, *cells):  # "none" stands where its number would
                if len(td.text or "") <= LONGEST or td in numbers:
                    td.set("class", "number")
    if heads and not heads[0].text:
        heads[0].tag = "td"  # an empty header would be the name of nothing
        heads[0].attrib.pop("scope")
