"""Personal data and secrets in text: where they are, and the text without them.

A detector is a regular expression that finds a shape, and a check in Python of what a shape cannot say: a checksum, a
date, what stands around it. Every expression is bounded, so that the time is linear in the text's length, and starts
with characters that are rare in prose, which the search skips to fast.

What its shape does not tell from any other number needs a word before it: ten bare digits are a phone number after
"call", nine a social security number after "SSN". What follows "order no." or the like is not a person's.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import date
from typing import NamedTuple

KINDS = ("email", "phone", "credit_card", "iban", "resident_number", "ssn", "ip_address", "secret")
DOTS = 10  # at most, that stand for what ``hidden`` hides


class Match(NamedTuple):
    """One piece of personal data: ``text[start:end]``."""

    kind: str  # of KINDS
    start: int
    end: int


def find(text: str, kinds: Collection[str] = KINDS) -> list[Match]:
    """All that is found in a text, in order, without overlaps.

    Where two overlap, the surer one stays: a token, then a number with a checksum, then the rest. What a span is does
    not depend on ``kinds``: the digits of a card do not become a phone number where cards are not asked for.
    """
    if not _may_hold(text):
        return []
    if not text.isascii():
        text = _plain(text)
    accepted: list[Match] = []
    for detect in _DETECTORS:  # surest first
        accepted = _joined(accepted, list(detect(text)))
    return [match for match in accepted if match.kind in kinds]


def mask(text: str, matches: Iterable[Match]) -> str:
    """The text with each match (as ``find`` returns them) replaced by its kind in brackets, such as ``[EMAIL]``."""
    return _replace(text, matches, lambda match: f"[{match.kind.upper()}]")


def hidden(text: str, matches: Iterable[Match]) -> str:
    """The text for a report: of each match its first 2 characters, then up to ten dots whatever its length."""
    return _replace(text, matches, lambda m: text[m.start : m.end][:2] + "." * min(m.end - m.start - 2, DOTS))


def _replace(text: str, matches: Iterable[Match], by: Callable[[Match], str]) -> str:
    parts, done = [], 0
    for match in matches:
        parts += [text[done : match.start], by(match)]
        done = match.end
    return "".join([*parts, text[done:]])


def _joined(surer: list[Match], others: list[Match]) -> list[Match]:
    """Both in order, without those of the others that overlap a surer one or one before them."""
    if not others:
        return surer
    kept, at, done = [], 0, 0
    for match in sorted(others, key=lambda match: match.start):
        while at < len(surer) and surer[at].end <= match.start:
            at += 1
        if match.start >= done and (at == len(surer) or match.end <= surer[at].start):
            kept.append(match)
            done = match.end
    return sorted([*surer, *kept], key=lambda match: match.start)


# ---------------------------------------------------------------------------------------------------------- quick looks

# Single characters are searched for several times faster than strings are, and than any regular expression.
_SIGNS = "@_0123456789"
_WIDE_SIGNS = "\uff20\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19"  # full-width
_WIDE = dict(zip(_WIDE_SIGNS, "@0123456789", strict=True))
_WIDE |= {"\uff0d": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " ", "\u3000": " "}


def _may_hold(text: str) -> bool:
    for sign in _SIGNS:
        if sign in text:
            return True
    if "-----" in text:
        return True
    return not text.isascii() and any(sign in text for sign in _WIDE_SIGNS)


def _plain(text: str) -> str:
    """Full-width digits and typographic hyphens and spaces as the ASCII ones; every character stays in its place."""
    for wide, plain in _WIDE.items():
        if wide in text:
            text = text.replace(wide, plain)
    return text


# ------------------------------------------------------------------------------------------------ words before a number

_AROUND = 30  # characters before a number in which a word counts
_WORD = re.compile(r"[^\W\d_]+|[0-9]+")
_WORDS = {
    "phone": "phone telephone cellphone tel call cell mobile mobil fax whatsapp sms dial handy ring rufnummer telefon "
    "telefonnummer telefono teléfono telephone téléphone tél móvil movil portable 電話 携帯 电话 手机",
    "credit_card": "card visa mastercard amex credit debit karte kreditkarte carte tarjeta カード 卡号",
    "ssn": "ssn social",
    "resident_number": "rrn registration",
    "ip_address": "ip ipv4 address server host dns ping gateway",
}
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_KOREAN = re.compile(  # nouns, which particles and other nouns are joined to
    r"(?P<phone>전화|연락처|휴대|핸드폰|팩스)|(?P<credit_card>카드)|(?P<resident_number>주민(?:등록|번호))|(?P<ip_address>서버|주소)"
)
_IDENTIFIER_WORDS = (
    "order orders invoice tracking ticket case reference ref item sku part parts serial model product article batch "
    "lot isbn ean upc gtin asin doi parcel shipment booking reservation transaction receipt contract customer patent "
    "bestellnummer bestellung rechnung rechnungsnummer auftrag auftragsnummer sendung sendungsnummer artikelnummer "
    "commande facture pedido factura 注文番号 订单号"
)
_IDENTIFIERS = frozenset(_IDENTIFIER_WORDS.split())
_KOREAN_IDENTIFIER = re.compile(r"(?:주문|송장|예약|상품|제품|접수|사업자|등록|거래|관리)(?:번호|등록번호)|주문$|송장$")
_BETWEEN = frozenset({"no", "nr", "num", "number", "id", "code", "ref", "is", "was", "ist", "번호", "번호는"})


def _context(text: str, start: int, around: int = _AROUND) -> str:
    """The kind that the last telling word before ``start`` speaks of; empty without one."""
    for word in reversed(_WORD.findall(text, max(0, start - around), start)):
        kind = _KIND_OF.get(word.lower(), "")
        if not kind and not word.isascii() and (korean := _KOREAN.search(word)):
            kind = str(korean.lastgroup)
        if kind:
            return kind
    return ""


def _is_identifier(text: str, start: int) -> bool:
    """Whether the words right before ``start`` name a number that is not a person's, such as "order no."."""
    for word in reversed(_WORD.findall(text, max(0, start - _AROUND), start)):
        word = word.lower()
        if word in _IDENTIFIERS or (not word.isascii() and _KOREAN_IDENTIFIER.search(word)):
            return True
        if word not in _BETWEEN:
            return False
    return False


# -------------------------------------------------------------------------------------------------------------- numbers

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
            (?: \([2-9][0-9]{{2}}\)[ \-]?[2-9][0-9]{{2}}[ \-.]?
              | [2-9][0-9]{{2}}(?:[ \-.][2-9][0-9]{{2}}[ \-.]|[2-9][0-9]{{2}}) )[0-9]{{4}}
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


def _numbers(text: str) -> Iterator[Match]:
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
        if len(digits) == 13 and _is_ean(digits) and _context(text, start) != "credit_card":
            continue  # one in ten bar codes that start with a 4 passes for a Visa number of 13 digits
        return None if _is_identifier(text, start) else Match("credit_card", start, stop)
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
    checked, named = int(digits[12]) in valid, _context(text, start, 20) == "resident_number"
    unlike = dashed or not (_is_ean(digits) or _is_identifier(text, start))  # any other number
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
    if _in_calculation(text, start, end) or _is_identifier(text, start):
        return None
    return Match("ssn", start, end) if text[start + 3] == "-" or _context(text, start) == "ssn" else None


def _bare(text: str, start: int, end: int) -> Match | None:
    """Digits without separators are what the words before them say."""
    context = _context(text, start)
    if context == "ssn" and end - start == 9:
        return _ssn(text, start, end)
    if context != "phone" or _is_identifier(text, start) or _AFTER_PHONE.match(text, end):
        return None
    return Match("phone", start, end)


def _phone(text: str, start: int, end: int) -> Match | None:
    """A number written as a country's phone numbers are."""
    shown = text[start:end]
    if shown.isdigit() and not shown.startswith("010"):
        return _bare(text, start, end)
    if len(shown.translate(_PUNCTUATION)) < 9 or _is_identifier(text, start):
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
        if shown.isdigit() and _context(text, start) != "phone":
            return None
    code = _CALLING_CODES.match(national)
    if not code or code.group() == "1" or not 9 <= len(national.replace("0", "", 1)) <= 15:
        return None
    if re.fullmatch(r"\+[0-9]+\.[0-9]+", shown) or _is_identifier(text, start):
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


def _ibans(text: str) -> Iterator[Match]:
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


# --------------------------------------------------------------------------------------------------- addresses of hosts

_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![0-9A-Za-z_]|\.[0-9]|-[0-9A-Za-z])")
_IPV6 = re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{0,40}")
_FIRST_GROUP = re.compile(r"(?<![0-9A-Za-z_:.])[0-9A-Fa-f]{1,4}$")


def _ip_addresses(text: str) -> Iterator[Match]:
    """Addresses of hosts, public or private: not of the machine itself, of groups or of nobody."""
    if text.count(".") >= 3:
        for shape in _IPV4.finditer(text):
            if _is_ipv4(text, *shape.span()):
                yield Match("ip_address", *shape.span())
    if text.count(":") >= 2:
        for shape in _IPV6.finditer(text):
            first = _FIRST_GROUP.search(text, max(0, shape.start() - 5), shape.start())
            if not first:
                continue
            shown = text[first.start() : shape.end()].rstrip(".")
            if shown.endswith(":") and not shown.endswith("::"):
                shown = shown[:-1]
            end = first.start() + len(shown)
            if _is_ipv6(shown) and not (text[end : end + 1].isascii() and text[end : end + 1].isalnum()):
                yield Match("ip_address", first.start(), end)


_VERSION_WORDS = (
    "version ver v release build firmware driver section chapter clause revision rev kernel oid objectidentifier "
    "버전 版本"
)
_VERSIONED = frozenset(_VERSION_WORDS.split())
_PINNED = re.compile(r"[A-Za-z][/-]$|[=<>~^!]=[ ]?$|[~^]$")


def _is_ipv4(text: str, start: int, end: int) -> bool:
    before = text[max(0, start - 1) : start]
    inside = before.isascii() and (before.isalnum() or before in ("_", ".", "+"))
    if inside or _PINNED.search(text, max(0, start - 3), start):
        return False
    words = _WORD.findall(text, max(0, start - _AROUND), start)
    if words and words[-1].lower() in _VERSIONED:
        return False
    try:
        address = ipaddress.IPv4Address(text[start:end])
    except ValueError:  # a part above 255, or with a leading zero
        return False
    if address.is_loopback or address.is_multicast or address.packed[0] in (0, *range(240, 256)):
        return False
    if end - start > len("1.2.3.4"):
        return True
    return _context(text, start) == "ip_address" or text[end : end + 1] in ("/", ":")  # else it may be a section's


def _is_ipv6(shown: str) -> bool:
    try:
        address = ipaddress.IPv6Address(shown)
    except ValueError:
        return False
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        return False
    groups = shown.split(":")
    if "" not in groups:  # eight groups of two are the name of a device
        return max(map(len, groups)) > 2
    # a::b is also a name in some programming languages: only what is assigned to hosts
    return (len(groups[0]) > 2 and address.packed[0] >> 5 == 1) or address.packed[0] in (0xFC, 0xFD, 0xFE)


# --------------------------------------------------------------------------------------------------------------- emails

_DOMAIN = re.compile(r"@([A-Za-z0-9\u00c0-\u024f.\-]{1,190}\.[A-Za-z]{2,24})(?![A-Za-z0-9(\[])")
_LOCAL = re.compile(r"[A-Za-z0-9\u00c0-\u024f._%+'\-]{1,64}$")
_FILES = frozenset(["png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "html", "xml", "txt", "pdf"])
_SHORT = frozenset(["com", "org", "net", "co"])  # top-level domains with names of one letter


def _emails(text: str) -> Iterator[Match]:
    if "@" not in text:
        return
    for shape in _DOMAIN.finditer(text):
        at = shape.start()
        local = _LOCAL.search(text[max(0, at - 64) : at])
        if not local:
            continue
        name = local.group().lstrip(".'-%+").split("..")[-1]
        labels = shape.group(1).split(".")
        top = labels[-1].lower()
        if not name or name.endswith(".") or top in _FILES:
            continue
        if name == "git" and text[shape.end() : shape.end() + 1] == ":":  # the address of a repository
            continue
        if any(not label or len(label) > 63 or label[0] == "-" or label[-1] == "-" for label in labels):
            continue
        if len(labels) > 2 or len(labels[0]) > 1 or top in _SHORT:
            yield Match("email", at - len(name), shape.end())


# -------------------------------------------------------------------------------------------------------------- secrets


def _token(prefix: str, rest: str) -> str:
    """The pattern of a token that starts a word. The look behind comes after the prefix, which the search skips to."""
    return rf"{prefix}(?<![A-Za-z0-9_-]{prefix}){rest}"


_TOKENS = re.compile(
    "|".join(
        [
            *(_token(prefix, "[A-Z0-9]{16}(?![A-Za-z0-9])") for prefix in ("AKIA", "ASIA", "AROA", "AIDA")),
            _token("gh[pousr]_", "[A-Za-z0-9]{36,255}"),
            _token("github_pat_", "[A-Za-z0-9_]{22,255}"),
            _token("glpat-", "[A-Za-z0-9_-]{20,64}"),
            _token("xox[abeoprs]-", "[A-Za-z0-9-]{10,255}"),
            _token("hf_", "[A-Za-z0-9]{30,64}(?![A-Za-z0-9_])"),
            _token("AIza", "[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
            *(_token(f"{who}k_{where}_", "[A-Za-z0-9]{16,255}") for who in "sr" for where in ("live", "test")),
            _token("sk-", "(?P<sk>[A-Za-z0-9_-]{20,255})"),
            _token("eyJ", r"(?P<jwt>[A-Za-z0-9_-]{6,4096})\.[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}"),
        ]
    )
)
_TOKEN_SIGNS = ("_", "sk-", "eyJ", "AKIA", "AIza", "xox", "ASIA", "glpat-", "AROA", "AIDA")
_PEM = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PEM_END = re.compile(r"-----END [A-Z0-9 ]{0,40}-----")
_PEM_DATA = re.compile(r"[A-Za-z0-9+/]{16}")
_PEM_BODY = re.compile(r"[A-Za-z0-9+/=\s\\]*")
_LOGIN = re.compile(r"://[^\s:/@]{1,64}:([^\s:/@]{3,100})@")
_ASSIGNED = re.compile(r"[=:]>?[ \t]{0,3}[\"'`]?([A-Za-z0-9+/=_.~!@#$%^&*\-]{8,200})")
_SECRET_NAME = re.compile(
    r"(?:pass(?:word|wd|phrase)|pwd|secret|token|(?:api|access|private|auth|account|encryption|signing)[_ -]?key"
    r"|credentials?|비밀번호|암호|패스워드)(?:[_-]?(?:key|value|id))?[\"'`]?[ \t]{0,3}$",
    re.I,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")  # of something in a program
_PLACEHOLDER = re.compile(
    r"your|example|change|dummy|placeholder|sample|insert|xxx|\*\*\*|\.\.\.|123456|://|^\$[A-Z_{]", re.I
)


def _secrets(text: str) -> Iterator[Match]:
    """What is a secret by its own shape."""
    if "-----BEGIN " in text:
        yield from _private_keys(text)
    if any(sign in text for sign in _TOKEN_SIGNS):
        for shape in _TOKENS.finditer(text):
            if shape["jwt"] and not _is_header("eyJ" + shape["jwt"]):
                continue
            if shape["sk"] and not _is_base62(shape["sk"]):
                continue
            yield Match("secret", *shape.span())
    if "@" in text and "://" in text:
        for shape in _LOGIN.finditer(text):
            if shape[1].lower() not in ("password", "passwd", "pass", "secret"):
                yield Match("secret", *shape.span(1))


def _private_keys(text: str) -> Iterator[Match]:
    """From the first line to the last, or to the end of the body where the last line was cut off."""
    at, closed = 0, True
    while begin := _PEM.search(text, at):
        end = _PEM_END.search(text, begin.end()) if closed else None
        closed = end is not None  # where one has no end, the others behind it have none either
        end = end or _PEM_BODY.match(text, begin.end())
        at = end.end() if end else begin.end()
        if _PEM_DATA.search(text, begin.end(), at):
            yield Match("secret", begin.start(), at)


def _is_header(part: str) -> bool:
    """Whether it is the first part of a JSON web token (RFC 7519)."""
    try:
        header = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, RecursionError):
        return False
    return isinstance(header, dict) and "alg" in header


def _is_base62(token: str) -> bool:
    """Unlike the words of an address with hyphens: digits in a long piece, or in both cases."""
    long = max(re.split("[_-]", token), key=len)
    digit = any(c.isdigit() for c in token)
    return digit and (len(long) >= 20 or (token.lower() != token and token.upper() != token))


def _assigned_secrets(text: str) -> Iterator[Match]:
    """What is given to a name such as ``password`` or ``api_key``, if it looks random."""
    for shape in _ASSIGNED.finditer(text):
        if not _SECRET_NAME.search(text, max(0, shape.start() - 40), shape.start()):
            continue
        value = shape[1].rstrip(".")
        if text[shape.end() : shape.end() + 1] not in ("(", "[", "{") and _is_random(value):
            yield Match("secret", shape.start(1), shape.start(1) + len(value))


def _is_random(value: str) -> bool:
    """Digits and letters in both cases or with signs, or many of them; nothing that stands for a value to come."""
    digits = sum(c.isdigit() for c in value)
    cases = any(c.islower() for c in value) + any(c.isupper() for c in value)
    if not digits or not cases or _PLACEHOLDER.search(value) or _NAME.fullmatch(value):
        return False
    if -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values()) < 2.5:  # bits a character
        return False
    signs = any(c in "!@#$%^&*+/=~" for c in value)
    return cases + signs >= 2 or (len(value) >= 16 and digits >= 3 and value.isalnum())


_DETECTORS: tuple[Callable[[str], Iterable[Match]], ...] = (
    _secrets,
    _ibans,
    _numbers,
    _ip_addresses,
    _emails,
    _assigned_secrets,
)
