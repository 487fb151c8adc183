"""Unicode repair: mojibake, normal form, characters nobody sees, white space.

Contract: `Repair(options)(text)` is text whose lines end in \\n, in the normal form asked for, without control and
zero-width characters, without trailing spaces, with at most one blank line in a row; applied again it changes nothing.
Text without anything suspicious costs a few searches at the speed of memory: ftfy runs on the lines that look broken.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

FORMS = ("NFC", "NFKC", "none")
ENTITIES = ("keep", "decode")
SPACES = ("collapse", "keep")
ROUNDS = 16  # of anything that is done until nothing changes: text made to be nested deeper is left as it is

# C0 and C1 controls but \t and \n; soft hyphen, zero-width space and joiners, marks of writing direction, line and
# paragraph separators, word joiner and other format characters, byte order mark, interlinear marks, non-characters; and
# the spaces that are no ASCII space (the ideographic space U+3000 indents Chinese paragraphs and stays)
_UNUSUAL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u2000-\u200f\u2028-\u202f\u205f-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_ASCII_BYTES = bytes(range(0x80))
_CONTROL_BYTES = bytes(byte for byte in (*range(0x20), 0x7F) if byte not in b"\t\n")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
_LIGATURE = re.compile("[\ufb00-\ufb06]")
_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_SPACES = [0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F]
_INVISIBLE = [
    *(c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\t\n\r" + _BREAKS),
    *(0xAD, 0x200B, 0x200E, 0x200F, 0xFEFF, 0xFFFE, 0xFFFF),
    *(c for c in range(0x202A, 0x2070) if c not in (0x202F, 0x205F)),
    *range(0xFFF9, 0xFFFC),
]
_TABLE = {
    **dict.fromkeys(map(chr, _INVISIBLE), ""),
    **dict.fromkeys(_BREAKS, "\n"),
    **dict.fromkeys(map(chr, _SPACES), " "),
}
# joiners shape Arabic, Indic and Khmer letters and join emoji; beside anything else they are refuse
_JOINER = re.compile(
    "(?<![\u0600-\u109f\u1780-\u18af\u2190-\u2bff\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]+|[\u200c\u200d]+(?=\n|$)"
)
_INNER_SPACES = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)|(?<=\S)\t(?=\S)")
_LINE_ENDS = re.compile(r"(?<![ \t\u3000])[ \t\u3000]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{3,}")


class Repair:
    """The repair of one text.

    Args:
        form: NFC, NFKC (makes full-width letters and punctuation narrow, which is wrong for Chinese text) or none.
        entities: decode turns &amp;amp; into & until there is none left.
        spaces: collapse makes runs of spaces inside a line one space; keep leaves them (code, tables).
    """

    def __init__(self, form: str = "NFC", entities: str = "keep", spaces: str = "collapse"):
        self.form, self.entities, self.spaces = form, entities, spaces

    def __call__(self, text: str) -> str:
        for _ in range(4):  # twice but for text such as entities of entities of control characters
            repaired = self._once(text)
            if repaired == text or repaired.isascii() and self.entities == "keep":
                break
            text = repaired
        return repaired

    def _once(self, text: str) -> str:
        if self.entities == "decode":
            for _ in range(ROUNDS):
                if "&" not in text or (decoded := html.unescape(text)) == text:
                    break
                text = decoded
        # what is looked for are single characters: of a text in Latin letters only the few others are searched
        plain, data = text.isascii(), text.encode()
        unusual = controls = len(data.translate(None, _CONTROL_BYTES)) < len(data)
        if not plain:
            others = non_ascii(text)
            if _mojibake_letters().search(others):
                fixed = fix_mojibake(text)
                unusual, text = fixed != text, fixed
            if _LIGATURE.search(others):
                text = text.translate(_LIGATURES)
            unusual = unusual or controls or _UNUSUAL.search(others) is not None
        if unusual:
            text = remove_invisible(text)
        if not plain and self.form != "none" and not unicodedata.is_normalized(self.form, text):
            text = unicodedata.normalize(self.form, text)
        return tidy_spaces(text, collapse=self.spaces == "collapse")


def non_ascii(text: str) -> str:
    """The characters that are not ASCII, at the speed of memory."""
    return text.encode().translate(None, _ASCII_BYTES).decode()


def remove_invisible(text: str) -> str:
    """Without control and zero-width characters; all line ends are \\n, all narrow spaces ASCII's."""
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _UNUSUAL.sub(lambda match: _TABLE.get(match.group(), match.group()), text)
    return _JOINER.sub("", text) if "\u200c" in text or "\u200d" in text else text


def tidy_spaces(text: str, collapse: bool = True) -> str:
    """No spaces at line ends, at most one blank line in a row, none at the ends; indentation stays."""
    if collapse and ("  " in text or "\t" in text):
        text = _INNER_SPACES.sub(" ", text)
    if " \n" in text or "\t\n" in text or "\u3000\n" in text:
        text = _LINE_ENDS.sub("", text)
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    if text[:1] == "\n":
        text = text.lstrip("\n")
    return text.rstrip() if text[-1:].isspace() else text


def fix_mojibake(text: str) -> str:
    """UTF-8 that was read as another encoding, line by line where ftfy's heuristic says that a line is broken."""
    from data_tools.extras import require

    ftfy = require("ftfy")
    letters, lines = _mojibake_letters(), text.split("\n")
    for number, line in enumerate(lines):
        if letters.search(line) and ftfy.badness.is_bad(line):
            lines[number] = ftfy.fix_encoding(line)
    return "\n".join(lines)


@lru_cache(maxsize=1)
def _mojibake_letters() -> re.Pattern[str]:
    """One of these is in everything that ftfy's heuristic matches; punctuation alone, such as curly quotes, is not."""
    from data_tools.extras import require

    groups = require("ftfy").badness.MOJIBAKE_CATEGORIES
    harmless = ("common", "start_punctuation", "end_punctuation")
    return re.compile("[" + "".join(letters for name, letters in groups.items() if name not in harmless) + "ØÙ×√≈]")
