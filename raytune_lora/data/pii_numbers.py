"""Numbers that are somebody's: of payment cards, accounts, residents, social security and phones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import date

from raytune_lora.data.pii_context import Match, context, is_identifier

# --------------------------------------------------------------------------------------------- cards, residents, phones

# A run of the characters that numbers are written with, and the shapes that are looked for inside such a run only.
_RUN = re.compile(r"[+(0-9][0-9+().\-/ ]{6,}")
_SEPARATOR = r"\)?[ \-./]?\(?"
_SHAPES = re.compile(
    rf"""
    [^0-9+(]+ | [0-9]{{20,}}
    | (?P<long>                                                                     # cards, resident numbers
        (?: [0-9]{{13,19}}
        | [0-9]{{4}}(?P<a>[ -])[0-9]{{4}}(?P=a)[0-9]{{4}}(?P=a)[0-9]{{1,4}}(?:(?P=a)[0-9]{{1,3}})?
        | [0-9]{{4}}(?P<b>[ -])[0-9]{{6}}(?P=b)[0-9]{{4,5}}
        | [0-9]{{6}}-[0-9]{{7}} )(?![0-9]) )
    | (?P<ssn> [0-9]{{3}}(?P<c>[ -])[0-9]{{2}}(?P=c)[0-9]{{4}}(?![0-9]) )
    | (?P<phone>
        (?: (?:\(?(?:\+|00)1\)?[ \-.]?|1[ \-.])?                                    # North America
            (?: \([2-9][0-9]{{2}}\)[ \-]?[0-9]{{3}}[ \-.]?
              | [2-9][0-9]{{2}}(?:[ \-.][0-9]{{3}}[ \-.]|[2-9][0-9]{{2}}) )[0-9]{{4}}
        | \(?0(?:2|[3-6][0-9]|70|80|1[016-9]|50[0-9]?)(?:\)[ ]?|[ \-.])[0-9]{{3,4}}[ \-.][0-9]{{4}}         # Korea
        | 010[0-9]{{8}}
        | \(?\+82\)?[ \-.]?(?:\(0\))?(?:2|[3-6][0-9]|70|80|1[016-9])[ \-.]?[0-9]{{3,4}}[ \-.]?[0-9]{{4}}
        | \(0[1-9][0-9]{{0,4}}\)[ ]?[0-9]{{3,8}}(?:[ \-][0-9]{{3,5}})?              # Europe, Japan
        | 0[1-9][0-9]{{1,4}}(?:[ \-]|[ ]?/[ ]?)(?:[0-9]{{5,8}}|[0-9]{{3,4}}[ \-][0-9]{{3,5}})(?:-[0-9]{{1,4}})?
        | 0[1-9](?P<d>[ .\-])[0-9]{{2}}(?:(?P=d)[0-9]{{2}}){{3}}                    # France
        | 0[1-9][0-9]{{1,3}}(?:[ ][0-9]{{2}}){{3,4}}
        | 1[3-9][0-9](?P<e>[ -])[0-9]{{4}}(?P=e)[0-9]{{4}} )(?![0-9]) )             # China
    | (?P<world> (?:\(?\+|00)[1-9](?:{_SEPARATOR}[0-9]){{6,14}}(?![0-9]) )
    | (?P<bare> [0-9]{{9,12}}(?![0-9]) )
    | [0-9]+
    """,
    re.X,
)
_FEWEST = 9  # digits of any of them
_PUNCTUATION = str.maketrans("", "", " -+()./")


def numbers(text: str) -> Iterator[Match]:
    """Cards, resident numbers, social security numbers and phone numbers: the shapes exclude each other."""
    for run in _RUN.finditer(text):
        if len(run.group().translate(_PUNCTUATION)) < _FEWEST:
            continue
        for shape in _SHAPES.finditer(text, run.start(), run.end()):
            name = shape.lastgroup
            if name is None or not _begins(text, shape.start()):
                continue
            match = _CHECKS[name](text, *shape.span())
            if match:
                yield match


def _begins(text: str, start: int) -> bool:
    """Whether a number can start here: not inside a word, a longer number, a path or a price."""
    before, last = text[max(0, start - 2) : max(0, start - 1)], text[max(0, start - 1) : start]
    if not last:
        return True
    if last in "_#$^€£₩￦¥":
        return False
    if last.isascii() and last.isalnum():
        return before == "\\" and last in "nrt"  # a line's end, written as JSON does
    if last == ".":
        return not before.isdigit()
    return not (last in "-/*)+" and before.isascii() and before.isalnum())


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    even = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[::-2])) + even) % 10 == 0


def _is_ean(digits: str) -> bool:
    """Whether 13 digits have the check digit of an EAN-13, as an ISBN-13 has too."""
    return (sum(map(int, digits[::2])) + 3 * sum(map(int, digits[1::2]))) % 10 == 0


_ISSUERS = re.compile(  # the digits that an issuer's numbers start with, and how many there are
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})"  # Visa
    r"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"  # Mastercard
    r"|3[47][0-9]{13}"  # American Express
    r"|3(?:0[0-5]|095|[689][0-9])[0-9]{11}(?:[0-9]{2,5})?"  # Diners Club
    r"|(?:6011|64[4-9][0-9]|6[025][0-9]{2}|8[12][0-9]{2}|508[0-9])[0-9]{12,15}"  # Discover, UnionPay, RuPay
    r"|35[0-9]{14,17}|(?:2131|1800)[0-9]{11}"  # JCB
    r"|(?:5018|5020|5038|5[678][0-9]{2}|6304|6390|67[0-9]{2}|0604)[0-9]{9,15}"  # Maestro
    r"|220[0-4][0-9]{12}"  # Mir
)
_AFTER_CARD = re.compile(r"[A-Za-z0-9_]|[-.][0-9]")
_GROUP_BEFORE, _GROUP_AFTER = re.compile(r"[A-Za-z0-9]{4}[ -]$"), re.compile(r"[ -][0-9]{4}(?![0-9])")


def _long(text: str, start: int, end: int) -> Match | None:
    return _resident_number(text, start, end) or _credit_card(text, start, end)


def _credit_card(text: str, start: int, end: int) -> Match | None:
    stops, groups = [end], re.split("[ -]", text[start:end])
    if len(groups) == 2:
        return None  # a resident number's shape
    if len(groups) == 5:  # the last may be something else, such as the month of expiry
        stops.append(end - len(groups[-1]) - 1)
    for stop in stops:
        digits = text[start:stop].translate(_PUNCTUATION)
        if not (_ISSUERS.fullmatch(digits) and _luhn(digits)):
            continue
        if _AFTER_CARD.match(text, stop) or (len(groups) > 1 and _is_part(text, start, stop)):
            continue
        if len(digits) == 13 and _is_ean(digits) and context(text, start) != "credit_card":
            continue  # one in ten bar codes that start with a 4 passes for a Visa number of 13 digits
        return None if is_identifier(text, start) else Match("credit_card", start, stop)
    return None


def _is_part(text: str, start: int, end: int) -> bool:
    """Whether groups of digits are part of more such groups, such as an IBAN's."""
    before = _GROUP_BEFORE.search(text, max(0, start - 5), start)
    inside = before is not None and any(c.isdigit() for c in before.group())
    return inside or _GROUP_AFTER.match(text, end) is not None


def _resident_number(text: str, start: int, end: int) -> Match | None:
    """Korean: YYMMDD-GABCDEF. G says sex and century; F is a checksum, but not of numbers issued since October 2020."""
    digits, dashed = text[start:end].replace("-", ""), text[start + 6] == "-"
    if len(digits) != 13 or end - start != 13 + dashed or digits[6] in "90" or _AFTER_CARD.match(text, end):
        return None
    try:
        date((1900 if digits[6] in "1256" else 2000) + int(digits[:2]), int(digits[2:4]), int(digits[4:6]))
    except ValueError:
        return None
    total = sum(int(digit) * (2 + place % 8) for place, digit in enumerate(digits[:12]))
    valid = {(11 - total % 11) % 10}
    if digits[6] in "5678":  # foreigners' numbers
        valid.add((13 - total % 11) % 10)
    checked, named = int(digits[12]) in valid, context(text, start, 20) == "resident_number"
    unlike = dashed or not (_is_ean(digits) or is_identifier(text, start))  # any other number
    sure = (checked and unlike) or (named and (checked or dashed))
    return Match("resident_number", start, end) if sure else None


_AFTER_PHONE = re.compile(r"[A-Za-z0-9_%]|[.\-][0-9]|[ ]?[=^\u00d7\u00f7]|[ ]?\*[ ]?[0-9]|[ ]\+[ ][0-9]")
_ARITHMETIC = re.compile(r"[0-9)][ ]?[+*\u00d7\u00f7][ ]?$")
_EXTENSION = re.compile(r"[ ]?(?:x|ext\.?|Ext\.?)[ ]?[0-9]{1,6}(?![0-9A-Za-z])")
_CALLING_CODES = re.compile(  # of ITU-T E.164
    r"1|7|2(?:[07]|[1-69][0-9])|3(?:[0-469]|[578][0-9])|4(?:[013-9]|2[0-9])|5(?:[1-8]|[09][0-9])|6(?:[0-6]|[7-9][0-9])"
    r"|8(?:[1246]|[0578][0-9])|9(?:[0-58]|[679][0-9])"
)


def _ssn(text: str, start: int, end: int) -> Match | None:
    """Area, group and serial number as the Social Security Administration assigns them."""
    digits = text[start:end].translate(_PUNCTUATION)
    if digits[:3] in ("000", "666") or digits[0] == "9" or digits[3:5] == "00" or digits[5:] == "0000":
        return None
    if _in_calculation(text, start, end) or is_identifier(text, start):
        return None
    return Match("ssn", start, end) if text[start + 3] == "-" or context(text, start) == "ssn" else None


def _bare(text: str, start: int, end: int) -> Match | None:
    """Digits without separators are what the words before them say."""
    named = context(text, start)
    if named == "ssn" and end - start == 9:
        return _ssn(text, start, end)
    if named != "phone" or is_identifier(text, start) or _AFTER_PHONE.match(text, end):
        return None
    return Match("phone", start, end)


def _phone(text: str, start: int, end: int) -> Match | None:
    """A number written as a country's phone numbers are."""
    shown = text[start:end]
    if shown.isdigit() and not shown.startswith("010"):
        return _bare(text, start, end)
    if len(shown.translate(_PUNCTUATION)) < 9 or is_identifier(text, start):
        return None
    if " " in shown and shown[0] not in "+(" and text[max(0, start - 2) : start - 1].isdigit():
        return None  # in a row of numbers
    return _dialled(text, start, end)


def _world(text: str, start: int, end: int) -> Match | None:
    """A number with a calling code."""
    shown = text[start:end]
    national = shown.translate(_PUNCTUATION)
    if shown.startswith("00"):
        national = national[2:]
        if shown.isdigit() and context(text, start) != "phone":
            return None
    code = _CALLING_CODES.match(national)
    if not code or code.group() == "1" or not 9 <= len(national.replace("0", "", 1)) <= 15:
        return None
    if re.fullmatch(r"\+[0-9]+\.[0-9]+", shown) or is_identifier(text, start):
        return None
    return _dialled(text, start, end)


def _dialled(text: str, start: int, end: int) -> Match | None:
    """With its extension, unless it stands in a calculation."""
    extension = _EXTENSION.match(text, end)
    if extension:
        end = extension.end()
    if _in_calculation(text, start, end):
        return None
    return Match("phone", start + (text[start] == "(" and ")" not in text[start:end]), end)


def _in_calculation(text: str, start: int, end: int) -> bool:
    return bool(_AFTER_PHONE.match(text, end) or _ARITHMETIC.search(text, max(0, start - 4), start))


_CHECKS: dict[str, Callable[[str, int, int], Match | None]] = {
    "long": _long,
    "ssn": _ssn,
    "phone": _phone,
    "world": _world,
    "bare": _bare,
}

# ---------------------------------------------------------------------------------------------------------------- IBANs

_COUNTRIES = (  # and lengths, of the SWIFT IBAN registry
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
    "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
    "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
    "YE30 "
)
_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _COUNTRIES.split()}
_IBAN = re.compile(r"[0-9]{2}(?<=(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2})(?:[ -]?[A-Za-z0-9]){11,29}")


def ibans(text: str) -> Iterator[Match]:
    """ISO 13616: a country's length, and 1 as the remainder of the rearranged number divided by 97."""
    for shape in _IBAN.finditer(text):
        start = shape.start() - 2
        length = _LENGTHS.get(text[start : start + 2].upper())
        places = [i for i in range(start, shape.end()) if text[i] not in " -"]
        if length is None or len(places) < length:
            continue
        end = places[length - 1] + 1
        number = text[start:end].replace(" ", "").replace("-", "").upper()
        if text[end : end + 1].isalnum() and text[end].isascii():
            continue
        if int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1 and 2 <= int(number[2:4]) <= 98:
            yield Match("iban", start, end)
