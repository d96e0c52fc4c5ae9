"""Secrets out of the text that trains: each is replaced by its kind in brackets, such as [email].

Precise before complete: what carries a checksum is checked, what has none must have an unmistakable form, so that code,
versions, dates and addresses of machines stay. Not recognised: bare digits (a telephone number without separators looks
like a time stamp), names, street addresses, passwords that nothing announces. Digests of 32 hexadecimal digits or more
look like keys and go, commit hashes in full length among them. Redacting twice changes nothing more.
"""

import re
from collections.abc import Callable
from itertools import pairwise

_Replacement = str | Callable[[re.Match[str]], str]

# Lengths of account numbers by country, from the IBAN registry (SWIFT, ISO 13616).
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
        22: "BG BH DE GB GE IE ME RS", 23: "AE GI IL TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "PT ST",
        26: "IS TR", 27: "FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL SV", 29: "BR EG PS QA UA",
        30: "JO KW MU", 31: "MT",
    }.items()
    for country in countries.split()
}  # fmt: skip

_CARD_LENGTHS = {"3": (14, 15, 16), "4": (13, 16, 19), "5": (16,), "2": (16,), "6": (16, 17, 18, 19)}
_ROUNDS = 16  # bounds the time that a hostile text can take


def redact(text: str) -> str:
    """`text` with every recognised secret replaced by its kind."""
    for _ in range(_ROUNDS):  # what stood beside a secret may be recognised only when that is gone
        before, text = text, _once(text)
        if text == before:
            break
    return text


def _once(text: str) -> str:
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def _iban(match: re.Match[str]) -> str:
    found = match.group()
    length = _IBAN_LENGTHS.get(found[:2].upper(), 0)
    stop = _after(found, length)
    number = found[:stop].replace(" ", "").upper()
    if not length or len(number) != length or found[stop : stop + 1].isalnum():
        return found
    digits = "".join(str(int(letter, 36)) for letter in number[4:] + number[:4])
    return f"[iban]{found[stop:]}" if int(digits) % 97 == 1 else found


def _after(text: str, count: int) -> int:
    """Where `count` characters that are not spaces end in `text`."""
    for i, letter in enumerate(text):
        count -= letter != " "
        if count == 0:
            return i + 1
    return len(text)


def _card(match: re.Match[str]) -> str:
    digits = re.sub(r"\D", "", match.group())
    return "[card]" if len(digits) in _CARD_LENGTHS.get(digits[0], ()) and _luhn(digits) else match.group()


def _luhn(digits: str) -> bool:
    doubled = [int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits))]
    return sum(value // 10 + value % 10 for value in doubled) % 10 == 0


def _phone(match: re.Match[str]) -> str:
    return "[phone]" if 9 <= sum(letter.isdigit() for letter in match.group()) <= 15 else match.group()


def _dense(match: re.Match[str]) -> str:
    """A run of letters and digits is a secret if its kind of letter changes as often as in random text.

    A capital before a small letter is no change, as words begin so. Of neighbours drawn evenly from a-z, A-Z, 0-9 about
    41 % change; in names, paths and words under 20 %. One piece without a separator has to be long, which paths,
    identifiers with hyphens and UUIDs do not have.
    """
    found = match.group()
    kinds = [_kind(letter) for letter in found if letter.isalnum()]
    changes = sum(left != right and left + right != "Aa" for left, right in pairwise(kinds))
    unbroken = max(len(piece) for piece in re.split(r"[+/=_-]", found))
    return "[secret]" if "0" in kinds and unbroken >= 17 and changes / len(kinds) >= 0.26 else found


def _kind(letter: str) -> str:
    return "0" if letter.isdigit() else "A" if letter.isupper() else "a"


# No piece of a longer number, version, date or address.
_ALONE = r"(?<![\w.+:/-])(?<!\b\d\d[ -])(?<!\b\d{3}[ -])(?<!\b\d{4}[ -])"
_ENDED = r"(?![\w.:/-]?\d)"

# In this order: what is found first cannot be taken for something else. All patterns take linear time.
_RULES: tuple[tuple[re.Pattern[str], _Replacement], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END [A-Z0-9 ]{0,60}-----|\Z)",
            "[private-key]",
        ),
        (r"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*){0,3}", "[token]"),  # JSON web token, RFC 7519
        (r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z0-9]{16}\b", "[key]"),  # AWS
        (r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{18,})", "[key]"),
        (r"\b(?:sk|pk|rk)-(?=[\w-]{0,64}\d)[\w-]{20,}", "[key]"),  # OpenAI and its like; persona's own
        (r"\b(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{16,}", "[key]"),  # Stripe
        (r"\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}|(?<=hooks\.slack\.com/services/)[\w/]{20,}", "[key]"),
        (r"\bAIza[\w-]{35}", "[key]"),  # Google
        (r"\b(?:hf|npm)_[A-Za-z0-9]{30,}|\bpypi-[\w-]{40,}", "[key]"),
        (r"(?i)(?<=\bbearer )\s{0,4}(?=[\w.~+/=-]{0,64}\d)[\w.~+/=-]{16,}", "[token]"),
        (r"(?<=://)([^\s/@:]{0,64}):[^\s/@]{1,128}@", r"\1:[password]@"),
        (
            r"(?i)\b(password|passwd|passphrase|pwd|secret|api[_-]?key)(\s{0,3}(?:[:=]|\bis\b)\s{0,3})"
            r"(?![\"']?\[)(?=[^\s,;()]{0,64}\d)[^\s,;()]{6,}",
            r"\1\2[password]",
        ),
        (r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])", "[email]"),
        (r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]){11,32}", _iban),
        (rf"{_ALONE}[2-6]\d(?:[ -]?\d){{11,17}}{_ENDED}", _card),
        (r"(?<![A-Za-z_+])\+\d(?:[ .()/-]{0,2}\d){7,14}(?!\d)", _phone),
        (rf"{_ALONE}\(?[2-9]\d{{2}}(?:\) ?|[ .-])\d{{3}}[ .-]\d{{4}}{_ENDED}", _phone),  # North America
        (rf"{_ALONE}0[1-9](?:[ .]\d\d){{4}}{_ENDED}(?! \d\d\b)", _phone),  # France
        (
            rf"{_ALONE}\(?0[1-9]\d{{1,3}}(?:\) ?|[ /-]{{1,3}})(?:\d{{5,10}}|\d{{3,4}}(?:[ -]\d{{2,4}}){{1,2}}){_ENDED}",
            _phone,
        ),
        (rf"{_ALONE}00[1-9]\d{{0,2}}[ /-]\d{{2,4}}[ /-]?\d{{3,}}(?:[ -]\d{{2,}}){{0,3}}{_ENDED}", _phone),
        (r"\b(?=[a-fA-F]{0,64}\d)[0-9a-fA-F]{32,}\b", "[secret]"),
        (r"(?<![\w+/])[A-Za-z0-9+/_-]{32,}={0,2}", _dense),
    )
)  # fmt: skip
