"""The encoding of a text file, found out where it is not UTF-8: never a wrong letter without a word."""

import codecs
import math
import re
from collections.abc import Iterator
from pathlib import Path

import charset_normalizer

from configs.settings import fail, say
from configs.text import visible

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # in front of UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What people call the encodings that are looked for.
NAMES = {
    "gb18030": "GB18030 (GBK)",
    "cp950": "Big5 (cp950)",
    "cp932": "Shift-JIS",
    "euc_jp": "EUC-JP",
    "cp949": "EUC-KR (cp949)",
    "cp1252": "latin-1 (cp1252)",
    "mac_roman": "Mac Roman",
    "cp1250": "cp1250 (Central European)",
    "iso8859_2": "latin-2",
    "cp1254": "cp1254 (Turkish)",
    "cp1257": "cp1257 (Baltic)",
    "cp1251": "cp1251 (Cyrillic)",
    "koi8_r": "KOI8-R",
    "cp1253": "cp1253 (Greek)",
    "cp1255": "cp1255 (Hebrew)",
    "cp1256": "cp1256 (Arabic)",
    "cp874": "cp874 (Thai)",
}


def cells(codec: str, first: int, last: int) -> set[str]:
    """The characters of a two-byte encoding whose first byte is from `first` to `last`."""
    pairs = (bytes([one, two]) for one in range(first, last + 1) for two in range(0x40, 0xFF))
    return {letter for pair in pairs if len(letter := pair.decode(codec, "ignore")) == 1}


# charset-normalizer took a tenth of short Chinese texts for Korean and found nothing in a quarter of the long ones
# (measured on this project's Chinese README). A standard puts its common characters first, so the text is what makes
# most of its characters common: (characters, their share of a text) of each.
KANA = {chr(n) for n in (*range(0x3041, 0x30FF), *range(0xFF66, 0xFF9F))}
FREQUENT = {
    "gb18030": [(cells("gb2312", 0xB0, 0xD7), 0.85), (cells("gb2312", 0xA1, 0xA3), 0.12)],
    "cp950": [(cells("big5", 0xA4, 0xC6), 0.85), (cells("big5", 0xA1, 0xA3), 0.12)],
    "cp932": [(KANA, 0.5), (cells("euc_jp", 0xB0, 0xCF), 0.37), (cells("euc_jp", 0xA1, 0xA3), 0.1)],
    "cp949": [(cells("euc_kr", 0xB0, 0xC8), 0.9), (cells("euc_kr", 0xA1, 0xA3), 0.07)],
}
FREQUENT["euc_jp"] = FREQUENT["cp932"]
# charset-normalizer tells other scripts apart well, but not the Latin code pages: French came out as Hungarian ("dépôt
# ŕ la banque"). There one language must explain the letters; these are the letters of each.
CENTRAL = "ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž áéíóöőúüű čćđšž ăâîşţ"
WESTERN = "àâæçèéêëîïôœùûüÿ äöüß áéíñóúü¿¡ªº àáâãçéêíóôõúü àèéìíîòóùú åäöé æøåéó áéèëïóöü àçèéíïòóúü áæéíðóöúýþ"
LETTERS = {
    "cp1252": WESTERN,
    "mac_roman": WESTERN,
    "cp1250": CENTRAL,
    "iso8859_2": CENTRAL,
    "cp1254": "çğıöşüâîû",
    "cp1257": "ąčęėįšųūž āčēģīķļņšūž äõöüšž",
}
SCRIPTS = {"cp1251": "Ѐӿ", "koi8_r": "Ѐӿ", "cp1253": "ͰϿ", "cp1255": "\u0590\u05ff", "cp1256": "\u0600\u06ff"}
SCRIPTS["cp874"] = "\u0e00\u0e7f"  # the first and the last character of each
COMMON = "\u00a0’‘“”„‚«»–—…•·€£¥§©®™°×÷¼½¾"  # in any language
SAMPLE = 1 << 16  # bytes of lines with other letters than ASCII's that are looked at


def find_encoding(path: Path) -> str:
    """The encoding of a text file, as Python calls it; said where neither UTF-8 nor a byte order mark says it.

    Raises: SystemExit(2) where a line of a UTF-8 file is damaged, or where the encoding cannot be told.
    """
    with open(path, "rb") as file:
        head = file.read(SAMPLE)
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    wide = None if marked else wide_encoding(head)
    encoding = marked or wide or "utf-8"
    fault = first_fault(path, encoding)
    if fault and encoding == "utf-8" and not mostly_utf8(sample := foreign_lines(path)):
        encoding = guess(sample)
        fault = first_fault(path, encoding) if encoding else None
        if encoding is None:
            fail(
                f"{path} is not UTF-8, and what else it is cannot be told: save it as UTF-8 (in a spreadsheet: 'CSV "
                f"UTF-8'; elsewhere: iconv -f ENCODING -t UTF-8 {path.name} > utf8{path.suffix})"
            )
    if fault:
        name, (line, reason) = NAMES.get(encoding, encoding.removesuffix("-sig").upper()), fault
        fail(f"{path}, line {line}: not {name}, as the rest of the file is ({reason}): mend this line")
    if encoding in NAMES:
        lines = sample.decode(encoding, "replace").splitlines()
        example = next((line for line in lines if not line.isascii()), "")
        say(f"note: {path} is not UTF-8; read as {NAMES[encoding]}, e.g. {visible(example)[:60]}")
        say("  if that is not how it should read, save the file as UTF-8")
    elif encoding not in ("utf-8", "utf-8-sig"):
        say(f"note: {path} is read as {encoding.upper()}")
    return encoding


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 without a byte order mark: every second byte of its ASCII characters is 0, those of line ends too."""
    ends = {name: head.decode(name, "ignore").count("\n") for name in ("utf-16-le", "utf-16-be")}
    best = max(ends, key=ends.get)
    return best if ends[best] > head.count(b"\n") / 10 else None  # U+0A00 to U+0AFF hold such a byte, too


def blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def first_fault(path: Path, encoding: str) -> tuple[int, str] | None:
    """(line, reason) of the first bytes of a file that are not of this encoding; None where all are."""
    decoder, lines = codecs.getincrementaldecoder(encoding)(), 1
    try:
        for block in blocks(path):
            lines += decoder.decode(block).count("\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return lines + error.object[: error.start].decode(encoding, "ignore").count("\n"), error.reason
    return None


def foreign_lines(path: Path) -> bytes:
    """The first lines of a file, SAMPLE bytes at most, that hold more than ASCII: they tell its encoding."""
    sample = b""
    with open(path, "rb") as file:
        while len(sample) < SAMPLE and (line := file.readline(SAMPLE)):
            if not line.isascii():
                # of a very long line, whole letters: bytes this small are no second half of any
                end = len(line) if line.endswith(b"\n") else max(map(line.rfind, (b",", b" ", b'"', b"\n")))
                sample += line[:end] if end > 0 else line
    return sample


def mostly_utf8(sample: bytes) -> bool:
    """Whether bytes are UTF-8 with some damage: of Chinese in GB18030, a fifth looks like UTF-8, by chance."""
    text = sample.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    return sum(letter > "\x7f" for letter in text) - bad >= bad


def guess(sample: bytes) -> str | None:
    """The encoding of lines that are not UTF-8; None where nothing fits."""
    if found := east_asian(sample):
        return found
    others = [name for name in NAMES if name not in FREQUENT]
    best = charset_normalizer.from_bytes(sample, cp_isolation=others).best()
    if best is None or best.encoding in LETTERS:
        return latin(sample)
    letters = foreign(sample, best.encoding)
    first, last = SCRIPTS[best.encoding]
    return best.encoding if sum(first <= letter <= last for letter in letters) > len(letters) / 2 else None


def foreign(sample: bytes, encoding: str) -> str:
    """All that is not ASCII in these bytes."""
    return re.sub(r"[\0-\x7f]+", "", sample.decode(encoding, "replace"))


def east_asian(sample: bytes) -> str | None:
    """The Chinese, Japanese or Korean encoding in which the bytes are the likeliest text; None where in none."""
    likelihood = {}
    for encoding in FREQUENT:
        text = foreign(sample, encoding)
        counts = [sum(letter in letters for letter in text) for letters, _ in FREQUENT[encoding]]
        rare = len(text) - sum(counts)
        # "It’s" in cp1252 is "It痴" in Shift-JIS: what has no kana is not Japanese
        damaged = text.count("\ufffd")  # a little of which is no other encoding: the line is named
        if (
            damaged > 0.02 * len(text)
            or rare > 0.2 * len(text)
            or (FREQUENT[encoding][0][0] is KANA and counts[0] < 0.1 * len(text))
        ):
            continue
        shares = [(share, len(letters)) for letters, share in FREQUENT[encoding]] + [(0.03, 20_000)]
        each = (n * math.log(share / size) for n, (share, size) in zip([*counts, rare], shares, strict=True))
        likelihood[encoding] = sum(each)
    return max(likelihood, key=likelihood.get, default=None)


def latin(sample: bytes) -> str | None:
    """The Latin code page in which one language explains most letters; None where they make no language."""
    explained = {}
    for encoding in LETTERS:
        text = foreign(sample, encoding)
        languages = LETTERS[encoding].split()
        counts = [sum(letter in language + COMMON for letter in text.lower()) for language in languages]
        # several languages in one file, which is no reason to take it for a rarer code page
        together = 0.9 * sum(letter in LETTERS[encoding] + COMMON for letter in text.lower())
        explained[encoding] = max(*counts, together if encoding == "cp1252" else 0) / len(text)
    best = max(explained, key=explained.get, default=None)  # of equals the first one
    return best if best and explained[best] > 0.85 else None
