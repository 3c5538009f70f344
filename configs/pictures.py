"""Pictures for reports: PNG files beside the Markdown, and SVG in the page, with the fonts and colours of the page."""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from configs.settings import say
from configs.text import visible

# The colours of pictures and pages, on a light ground and on a dark one. A PNG has the light ones; in the page they
# are variables of its style sheet, so that a picture follows the reader's choice.
TONES = {
    "ink": ("#222222", "#e8e8e8"),
    "faint": ("#d0d0d0", "#4a4d55"),
    "grey": ("#6b6b6b", "#a9a9a9"),
    "blue": ("#33669a", "#7fb2e5"),
    "red": ("#b5485b", "#f0909f"),
    "cyan": ("#1f7f99", "#6fd0ea"),
    "green": ("#1d7a33", "#6ccf86"),
    "purple": ("#8a2f67", "#dd8fc4"),
    "brown": ("#7d6608", "#d8c25a"),
}
COLOR = {name: light for name, (light, _) in TONES.items()}
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
# files of fonts with Chinese, as the systems and their packages name them
CHINESE = "notosans(mono)?cjk|notosanssc|sourcehan|wqy|wenquan|pingfang|heiti|simhei|msyh|simsun|fallback|unicode"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a "$" in a name is no formula
    "axes.unicode_minus": False,  # as in the tables
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": COLOR["faint"],
    "grid.linewidth": 0.6,
    "axes.edgecolor": COLOR["grey"],
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), COLOR["ink"]),
}
NO_NOTES = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Picture:
    """A picture of a report. svg: an element for the page; alt: what it shows, in words; caption: what it is."""

    svg: str
    alt: str
    caption: str


class Gallery:
    """The pictures of one report, by name; each is written as folder/NAME.png, too.

    words: the report's, filled into the labels; english: what the PNG files say where this machine has no font for
    `words`. The page needs none: its reader's browser brings the font.
    """

    def __init__(self, folder: Path, words: dict[str, str], english: dict[str, str]):
        self.folder, self.words, self.pictures = folder, words, {}
        self.words_of_files, self.font = words, None
        if words != english:
            self.font = chinese_font()
            if self.font is None:
                self.words_of_files = english
                say(
                    "note: no font with Chinese was found, so the labels of the PNG files are English (those in the "
                    "page are not); install one, e.g. with: apt-get install fonts-noto-cjk"
                )
        folder.mkdir(parents=True)

    def add(self, name: str, paint: Callable, inches: tuple, alt: str, caption: str, rows: int = 1) -> None:
        """Draw a picture. paint(axes, words) fills the axes (one, or `rows` of them); inches: (width, height)."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        family = ["DejaVu Sans", *([self.font] if self.font else [])]
        with matplotlib.rc_context(STYLE | {"font.family": family, "svg.hashsalt": name}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # only measured; the browser draws it
            for words in [self.words] if self.words_of_files is self.words else [self.words, self.words_of_files]:
                figure, axes = pyplot.subplots(rows, 1, figsize=inches, layout="constrained")
                paint(axes, words)
                if words is self.words:
                    self.pictures[name] = Picture(as_svg(figure, name, alt), alt, caption)
                if words is self.words_of_files:
                    figure.savefig(self.folder / f"{name}.png", dpi=160)
                pyplot.close(figure)


def as_svg(figure, name: str, alt: str) -> str:
    """A figure of matplotlib as an <svg> element for a page: no size, font, colour or style sheet of its own.

    name: stands before each id, so that several pictures can share a page.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata=NO_NOTES)
    root = ElementTree.fromstring(visible(written.getvalue()))  # XML takes no control character
    variables = {light: f"var(--{tone})" for tone, light in COLOR.items()}
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style", f"{SVG}clipPath"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib.pop("clip-path", None)
        if link := element.attrib.pop(LINK, None):
            element.set("href", f"#{name}-{link[1:]}")
        if place := element.attrib.pop("id", None):
            if element.tag != "g":  # nothing refers to a group
                element.set("id", f"{name}-{place}")
        if style := element.get("style"):
            style = re.sub("#[0-9a-f]{6}", lambda match: variables.get(match[0], match[0]), style)
            element.set("style", re.sub(r"font-family: [^;]+; ?", "", style))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": visible(alt), "stroke-linejoin": "round"}
    return ElementTree.tostring(root, "unicode")


@cache
def chinese_font() -> str | None:
    """The name of a font of this machine that has Chinese, made known to matplotlib; None where there is none."""
    from matplotlib import font_manager, ft2font

    # not the list that matplotlib keeps: it may be older than the font
    paths = [
        path for path in font_manager.findSystemFonts() if re.search(CHINESE, Path(path).name.replace(" ", ""), re.I)
    ]
    for path in sorted(paths, key=lambda path: ("regular" not in path.lower(), path)):
        try:
            font = ft2font.FT2Font(path)
            if ord("损") in font.get_charmap():
                font_manager.fontManager.addfont(path)
                return font.family_name
        except (OSError, RuntimeError):  # no font, or a damaged one
            continue
    return None
