"""Personal data behind placeholders: e-mail addresses, telephone numbers, identity and card numbers, IP addresses.

Contract: `Masker(kinds)(text)` replaces what it is sure of and counts it by kind. Numbers that carry a check digit
(Chinese resident identity, payment cards) are replaced only where it holds; telephone numbers only in the forms people
write them in, not any run of digits. Applied to its own result it changes nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable

from data_tools.cleaning.repair import ROUNDS
from minillm.utils.errors import UserError

# Latin letters or digits beside a number make it another thing; Chinese characters beside it do not
_BEFORE = r"(?<![A-Za-z0-9_@./+\-])"
_AFTER = r"(?![A-Za-z0-9_@]|[\-./][0-9])"

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+\-])[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,62})\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9\-])"
)
_RESIDENT = re.compile(r"(?<![A-Za-z0-9])[1-9][0-9]{16}[0-9Xx](?![A-Za-z0-9])")
_SSN = re.compile(rf"{_BEFORE}(?!000|666|9)[0-9]{{3}}-(?!00)[0-9][0-9]-(?!0000)[0-9]{{4}}{_AFTER}")
_CARD = re.compile(r"(?<![A-Za-z0-9_.\-])[3-6][0-9]{3}(?:[ \-]?[0-9]){9,15}(?![A-Za-z0-9_]|[\-.][0-9])")
_IPV4 = re.compile(r"(?<![A-Za-z0-9_.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![A-Za-z0-9_]|\.[0-9])")
_VERSION_BEFORE = re.compile(r"(?:version|release|firmware|版本|\bver|\bv)\W{0,3}$", re.IGNORECASE)
_PHONE = re.compile(
    rf"{_BEFORE}(?:"
    r"\+[0-9]{1,3}[ .\-]?(?:\([0-9]{1,4}\)[ .\-]?)?[0-9]{1,5}(?:[ .\-]?[0-9]{2,5}){1,4}"  # international
    r"|\([0-9]{3}\)[ ]?[0-9]{3}[ .\-][0-9]{4}|(?:1[.\- ])?[0-9]{3}([.\-])[0-9]{3}\1[0-9]{4}"  # North American
    r"|(?:86[ \-]?)?1[3-9][0-9](?:[0-9]{8}|[ \-][0-9]{4}[ \-][0-9]{4})"  # Chinese mobile
    r"|[(（]0[0-9]{2,3}[)）][ \-]?[0-9]{7,8}|0(?:10|2[0-9]|[3-9][0-9]{2})[ \-][0-9]{7,8}"  # Chinese landlines
    r"|400-[0-9]{3}-[0-9]{4}|400-[0-9]{4}-[0-9]{3}"
    rf"){_AFTER}"
)
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def resident_number_holds(number: str) -> bool:
    """GB 11643-1999: a birth date from 1850 on, and the ISO 7064 mod 11-2 check character."""
    year, month, day = int(number[6:10]), int(number[10:12]), int(number[12:14])
    if not (1850 <= year <= 2100 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, number))
    return "10X98765432"[total % 11] == number[17].upper()


def luhn_holds(number: str) -> bool:
    """ISO/IEC 7812-1 annex B: every second digit from the right doubled, the sum a multiple of 10."""
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return (sum(digits[::2]) + doubled) % 10 == 0


def _card_holds(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match.group())
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn_holds(digits)


def _phone_holds(match: re.Match[str]) -> bool:
    return 7 <= sum(map(str.isdigit, match.group())) <= 15  # ITU-T E.164: at most 15


def _address_holds(match: re.Match[str]) -> bool:
    if _VERSION_BEFORE.search(match.string, max(0, match.start() - 12), match.start()):
        return False
    try:
        return ipaddress.IPv4Address(match.group()).is_global  # 192.168.0.1 and 127.0.0.1 are nobody's
    except ValueError:
        return False


# in the order they are tried: an identity number holds a telephone number's digits
KINDS: dict[str, tuple[re.Pattern[str], str, Callable[[re.Match[str]], bool] | None]] = {
    "email": (_EMAIL, "<EMAIL>", None),
    "resident_id": (_RESIDENT, "<ID>", lambda match: resident_number_holds(match.group())),
    "card": (_CARD, "<CARD>", _card_holds),
    "ssn": (_SSN, "<ID>", None),
    "ip": (_IPV4, "<IP>", _address_holds),
    "phone": (_PHONE, "<PHONE>", _phone_holds),
}
GROUPS = {"id": ("resident_id", "card", "ssn", "ip"), "all": tuple(KINDS), "none": ()}
# every kind but e-mail has seven digits with little between them, or is an IPv4 address
_DIGITS = re.compile(r"[0-9](?:[ .\-()（）]{0,2}[0-9]){6}|[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")


def parse_kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Kinds in KINDS' order; `id` is resident_id, card, ssn and ip, `all` everything, `none` nothing.

    Raises:
        UserError: a name that is not known.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in KINDS and name not in GROUPS:
            raise UserError(f"--mask {name}: known are {', '.join([*KINDS, *GROUPS])}")
        wanted.update(GROUPS.get(name, (name,)))
    return tuple(kind for kind in KINDS if kind in wanted)


class Masker:
    """Replaces personal data of some kinds."""

    def __init__(self, kinds: Iterable[str]):
        self._kinds = [(kind, *KINDS[kind]) for kind in kinds]
        self._numbers = any(kind != "email" for kind, *_ in self._kinds)

    def __call__(self, text: str) -> tuple[str, Counter[str]]:
        """(text with placeholders, how many of each kind)."""
        counts: Counter[str] = Counter()
        if not self._kinds:
            return text, counts
        for _ in range(ROUNDS):  # a placeholder can free what stood beside it
            before = counts.total()
            numbers = self._numbers and _DIGITS.search(text) is not None
            for kind, pattern, placeholder, holds in self._kinds:
                if "@" in text if kind == "email" else numbers:
                    text, count = _replace(text, pattern, placeholder, holds)
                    counts[kind] += count
            if counts.total() == before:
                break
        return text, +counts


def _replace(
    text: str, pattern: re.Pattern[str], placeholder: str, holds: Callable[[re.Match[str]], bool] | None
) -> tuple[str, int]:
    count = 0

    def answer(match: re.Match[str]) -> str:
        nonlocal count
        if holds is not None and not holds(match):
            return match.group()
        count += 1
        return placeholder

    return pattern.sub(answer, text), count
