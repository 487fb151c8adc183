"""The language of a text: scripts decide where they can, function words for plain English, py3langid for the rest.

Contract: `identify(text)` is (ISO 639-1 code, score from 0 to 1), "und" where there are fewer than MIN_LETTERS letters.
Han without kana is Chinese (py3langid takes classical Chinese for Japanese now and then), with kana Japanese. Of a long
text three pieces are looked at.
"""

from __future__ import annotations

import re
from functools import lru_cache

MIN_LETTERS = 4
SAMPLE = 600  # characters looked at: py3langid's cost is per character, its answer settles within a few hundred

# languages written without spaces between words: their rules count characters
UNSPACED = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz"})

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff]")
_HAN_OR_KANA = re.compile("[\u3041-\u30fc\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER = re.compile(r"[^\W\d_]")
_KANA_OF_JAPANESE = 0.3  # of Han and kana; headlines have less, and so has Chinese that quotes a title
_KANA_OF_CHINESE = 0.02
_ENGLISH = frozenset(
    "the and of that with this from have which you your our were their would there been they what when".split()
)
_ENGLISH_SHARE = 0.08  # of the words: plain English has 10 to 30%, other languages in Latin letters below 2%
_ENGLISH_KINDS = 4
_ENGLISH_WORDS = 25


def identify(text: str) -> tuple[str, float]:
    """(language, score); the score is the share of the script, or py3langid's probability."""
    sample = sample_of(text)
    if not sample.isascii() and _HAN_OR_KANA.search(sample) and (found := _by_han(sample)) is not None:
        return found
    if plainly_english(sample):
        return "en", 1.0
    if len(_LETTER.findall(sample)) < MIN_LETTERS:
        return "und", 0.0
    language, score = _identifier().classify(sample)
    # Wu is written as standard Chinese is, but for single words: code among Chinese sentences looks like it
    return "zh" if language == "wuu" else language, round(float(score), 4)


def sample_of(text: str, size: int = SAMPLE) -> str:
    """The text itself, or pieces of its beginning, middle and end, `size` characters in all, cut at spaces."""
    if len(text) <= size:
        return text
    piece = size // 3
    middle = (len(text) - piece) // 2
    return "\n".join((text[:piece], text[middle : middle + piece], text[-piece:]))


def plainly_english(sample: str) -> bool:
    """Whether function words that only English has leave no doubt."""
    words = sample.lower().split()
    found = [word for word in words if word in _ENGLISH]
    return (
        len(words) >= _ENGLISH_WORDS
        and len(found) >= _ENGLISH_SHARE * len(words)
        and (len(set(found)) >= _ENGLISH_KINDS)
    )


def _by_han(sample: str) -> tuple[str, float] | None:
    han = len(_HAN.findall(sample))
    kana, letters = len(_KANA.findall(sample)), len(_LETTER.findall(sample))
    # one Han character says about as much as a word of Latin letters
    share = (han + kana) * 4 / ((han + kana) * 4 + letters - han - kana)
    if share < 0.5:
        return None
    of_kana = kana / (han + kana)
    japanese = of_kana > _KANA_OF_JAPANESE or (of_kana > _KANA_OF_CHINESE and _identifier().classify(sample)[0] == "ja")
    return "ja" if japanese else "zh", round(share, 4)


@lru_cache(maxsize=1)
def _identifier():
    """py3langid's model, read once in a process (half a second)."""
    from data_tools.extras import require

    langid = require("py3langid").langid
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def known_languages() -> list[str]:
    """The codes that `identify` may answer."""
    return sorted({*_identifier().labels, "zh", "ja", "und"} - {"wuu"})
