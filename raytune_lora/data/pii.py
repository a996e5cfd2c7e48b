"""Personal data and secrets in text: where they are, and the text without them.

A detector is a regular expression that finds a shape, and a check in Python of what a shape cannot say: a checksum, a
date, what stands around it. Every expression is bounded, so that the time is linear in the text's length, and starts
with characters that are rare in prose, which the search skips to fast.

What its shape does not tell from any other number needs a word before it: ten bare digits are a phone number after
"call", nine a social security number after "SSN". What follows "order no." or the like is not a person's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from raytune_lora.data.pii_addresses import emails, ip_addresses
from raytune_lora.data.pii_context import Match
from raytune_lora.data.pii_numbers import ibans, numbers
from raytune_lora.data.pii_secrets import assigned_secrets, secrets

KINDS = ("email", "phone", "credit_card", "iban", "resident_number", "ssn", "ip_address", "secret")
DOTS = 10  # at most, that stand for what ``hidden`` hides

_DETECTORS: tuple[Callable[[str], Iterable[Match]], ...] = (  # surest first
    secrets,
    ibans,
    numbers,
    ip_addresses,
    emails,
    assigned_secrets,
)


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
    for detect in _DETECTORS:
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
