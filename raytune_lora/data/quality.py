"""What one row shows by itself: text that was decoded wrongly, invisible characters, leftovers of templates and HTML.

Every check reads a row and gives the detail of what it found first, or None. Most rows have nothing to find, so that
each check begins with a search for the few characters that it could be about at all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection

from raytune_lora.data.rows import ASSISTANT, Row, Turn

# ------------------------------------------------------------------------------------------------------------- encoding

# The bytes 0x80-0xBF continue a character in UTF-8. Each can have become two characters: Latin-1's and Windows-1252's.
_BYTE = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(0x80, 0xC0)}
_BYTE |= {chr(byte): byte for byte in [*range(0x80, 0xC0), *range(0xC2, 0xF5)]}
_NEXT = "[" + "".join(re.escape(char) for char, byte in _BYTE.items() if byte < 0xC0) + "]"
_UTF8 = re.compile(f"(?:[\xc2-\xdf]{_NEXT}|[\xe0-\xef]{_NEXT}{{2}}|[\xf0-\xf4]{_NEXT}{{3}})+")
_EUC_KR = re.compile("(?:[\xb0-\xc8][\xa1-\xfe]){3,}")  # Hangul syllables of two bytes each
_LOST = re.compile("[\ufffd\ud800-\udfff]")
# A lost character, a combining mark, or where one of the two encodings may have been misread: one pass over most texts.
_SUSPECT = re.compile(
    f"[\xb0-\xf4\u0300-\u036f\ufffd\ud800-\udfff](?:(?<=[\u0300-\u036f\ufffd\ud800-\udfff])|{_NEXT}|[\xa1-\xfe])"
)
_LOOSE = re.compile(
    "(?:^|(?<=[ \t\r\n]))[\u0300-\u036f]|[\u0300-\u036f]{4,}"
)  # NFD has three marks on a letter at most
# What texts hold: not U+0080-9F and U+0180-02AF, which capitals before a quotation mark would be.
_PLAUSIBLE = re.compile(
    "[\xa0-\u017f\u0370-\u06ff\u0900-\u0eff\u1ea0-\u1ef9\u2010-\u27bf\u2e80-\u30ff\u3130-\u318f"
    "\u4e00-\u9fff\uac00-\ud7a3\ufeff\uff00-\ufffd\U0001f000-\U0001faff\ufe0f]+"
)
_QUOTES = frozenset("\u201a\u201e\u2026\u2039\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u203a\xa0\xab\xb7\xbb")
_SIGNS = _QUOTES | frozenset("\u2122\xa8\xa9\xaa\xae\xaf\xb0\xb2\xb3\xb4\xb9\xba\xbc\xbd\xbe\xd7")
_ON_ENCODINGS = re.compile(r"mojibake|utf-?8|latin-?1|cp-?1252|iso-?8859|encod|인코딩|깨진 글자", re.IGNORECASE)


def encoding(row: Row) -> str | None:
    """Characters that a wrong decoding left: U+FFFD, lone surrogates, UTF-8 or EUC-KR read as Latin-1, loose accents.

    Capitals before quotation marks („MENÜ“), units (10 Å²) and rows about encodings are let be.
    """
    for text in row.texts():
        if text.isascii() or not _SUSPECT.search(text):
            continue
        if lost := _LOST.search(text):
            what = "a lost character" if lost.group() == "\ufffd" else "half a character"
            return f"U+{ord(lost.group()):04X}, {what}, {_times(len(_LOST.findall(text)))}"
        if loose := _LOOSE.search(text):
            return f"{_named(loose.group()[0])} without a letter, or too many on one"
        if (misread := _misread(text)) and not any(map(_ON_ENCODINGS.search, row.texts())):
            return misread
    return None


def _misread(text: str) -> str | None:
    for match in _UTF8.finditer(text):
        plain = bytes(map(_BYTE.__getitem__, match.group())).decode("utf-8", "ignore")
        if _PLAUSIBLE.fullmatch(plain) and not _is_text(text, match, plain):
            return f"{match.group()[:12]!r} is {plain[:4]!r} of UTF-8 read as Latin-1"
    for match in _EUC_KR.finditer(text):
        kinds = {char >= "\xc0" for char in match.group()}  # a letter, or a sign: words have one kind only
        if len(kinds) == 2 and len(set(match.group())) > 2:
            plain = match.group().encode("latin-1").decode("euc_kr", "replace")
            return f"{match.group()[:8]!r} is {plain[:4]!r} of EUC-KR read as Latin-1"
    return None


def _is_text(text: str, match: re.Match[str], plain: str) -> bool:
    """Whether what could be misread UTF-8 is rather a letter and the punctuation after it."""
    if len(plain) > 1:
        return False
    lead, rest = match.group()[0], match.group()[1:]
    if lead in "\xc2\xc3":
        after_capital = text[match.start() - 1 : match.start()].isupper()
        return rest in _QUOTES and (after_capital or rest != "\xa0")
    if len(rest) == 1 and lead > "\xc9":  # one letter of another script, whose words have more: a product and a half
        return True
    return all(char in _SIGNS for char in rest)


# --------------------------------------------------------------------------------------------------- control characters

_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]"
)
_JOINED = re.compile("[\u0590-\u109f\u1700-\u1fff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]")  # Arabic, Indic, emoji
_SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")


def control_characters(row: Row) -> str | None:
    """Control characters other than tab and line ends, and characters of no width that do not belong to the script.

    Joiners within emoji and within Arabic and Indic words, zero-width spaces in Thai, direction marks in texts that run
    from right to left, and the tags of flags are let be. Overrides of the direction (U+202D, U+202E) never are.
    """
    for text in row.texts():
        # None of them is printable, and to ask that takes half the time of the search.
        if not text.replace("\n", " ").isprintable() and _CONTROL.search(text):
            mixed = _RIGHT_TO_LEFT.search(text) is not None
            found = [m.group() for m in _CONTROL.finditer(text) if not _belongs(text, m.start(), mixed)]
            if found:
                return f"{_named(found[0])}, {_times(len(found))}"
    return None


def _belongs(text: str, at: int, right_to_left: bool) -> bool:
    char, before = text[at], text[at - 1 : at] if at else ""
    if char in "\u200c\u200d":
        return _JOINED.match(before) is not None
    if char == "\u200b":
        return _SPACELESS.match(before) is not None
    if char in "\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069":
        return right_to_left
    return char > "\U000e001f" and "\U0001f3f4" in text[max(at - 8, 0) : at]  # tags after a black flag name a region


# ------------------------------------------------------------------------------------------------------------ leftovers

_TEMPLATE = re.compile(
    r"###\s?(?:Instruction|Response|Human|Assistant|User)s?:|<[|\uff5c][\w\u2581-]{2,40}[|\uff5c]>|\[/?INST\]|<</?SYS>>"
    r"|</?(?:start_of_turn|end_of_turn|bos|eos|pad)>|</s>|\A<s>|Below is an instruction that describes a task"
)
_SPEAKER = re.compile(r"^[ \t]*(?:Human|Assistant|USER|ASSISTANT):", re.MULTILINE)
_ATTRIBUTES = r"(?:\s{1,9}[\w:-]{1,40}\s?=\s?(?:\"[^\"<>]{0,2000}\"|'[^'<>]{0,2000}'|[^\s<>\"'=]{1,500}))"
_BLOCKS = "br|hr|div|span|li|ul|ol|strong|em|h[1-6]|td|tr|th|tbody|blockquote|font|center|img|nobr"  # no placeholders
_OTHERS = (
    "p|a|b|i|u|s|table|sup|sub|html|body|head|script|style|code|pre|form|input|button|iframe|section|article|small"
)
_HTML = re.compile(
    rf"<(?:{_BLOCKS}){_ATTRIBUTES}{{0,20}}\s?/?>|<(?:{_OTHERS}){_ATTRIBUTES}{{1,20}}\s?/?>|</(?:{_BLOCKS}|{_OTHERS})\s?>"
    r"|(?<!\w)<[pbiu]>"  # after a letter it is a type's parameter, or less than
    r"|&(?:nbsp|amp|lt|gt|quot|apos|copy|reg|trade|hellip|[mn]dash|[lr][sd]quo|[lr]aquo|bull|middot|euro|pound|deg|times|shy"
    r"|[aeiouy](?:acute|grave|circ|uml|tilde|ring)|[nN]tilde|ccedil|szlig|oslash|#\d{2,6}|#x[\da-f]{2,5});",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]{1,500}`", re.DOTALL)
_DOCUMENT = re.compile(r"<!doctype|<html[\s>]|<\?xml|<svg[\s>]|<\?php", re.IGNORECASE)
_ON_HTML = re.compile(
    r"\b(?:x?html5?|xml|css|svg|jsx|javascript|typescript|vue|angular|php|markup|regex|xss|scrap(?:e|ing)|tags?"
    r"|(?-i:React|DOM)|character entit(?:y|ies)|(?:build|create|make|design|write)\b.{0,40} (?:page|web ?site))\b"
    r"|웹 ?페이지|웹 ?사이트|태그|마크업",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"^\s*(?:def \w+\(|class \w+.*[:{]|import \w|from [\w.]+ import|function\b.*\(|(?:const|let|var) \w+ ?=|\$\w+ ?="
    r"|#include|(?:public|private|static) \w|return\b.*;$)|\)\s*;\s*$|[)=]\s*\{\s*$|=> ?[{(]",
    re.MULTILINE,
)
_ON_TEMPLATES = re.compile(
    r"chatml|special tokens?|(?:chat|prompt|instruction) (?:template|format)s?|tokeni[sz]er|jinja"
    r"|프롬프트 ?템플릿|특수 ?토큰",
    re.IGNORECASE,
)
_ON_DIALOGUES = re.compile(
    r"dialog|conversation|\bchat\b|chatbot|\bscript\b|screenplay|interview|transcript|role.?play|debate|대화|대본|인터뷰|채팅",
    re.IGNORECASE,
)
_URL = re.compile(r"https?://\S+")
# What pandas, databases and spreadsheets write where there is no value; "None" and "N/A" may be answers.
_NO_VALUE = {
    "nan",
    "nat",
    "<na>",
    "null",
    *(f"#{name}" for name in ("n/a", "value!", "ref!", "name?", "div/0!", "num!")),
}
_LONGEST_NO_VALUE = max(map(len, _NO_VALUE))


def leftovers(row: Row) -> str | None:
    """Marks of a prompt template or of HTML within the text, and a text that is what a table has for no value.

    Code between backticks, whole documents, texts that read as code, and rows that are about HTML, about templates or
    (for ``Human:`` and ``Assistant:``) about a dialogue are let be.
    """
    for turn in row.turns:
        for text in (turn.text, turn.input):
            if len(text) <= _LONGEST_NO_VALUE and text.strip().lower() in _NO_VALUE:
                return f"the text of the {turn.role} is {text.strip()!r}, which tables have where there is no value"
        for text in turn.texts():
            suspect = "<" in text or "&" in text or "###" in text or "INST]" in text or "Below is an instr" in text
            if suspect and (found := _template_mark(text, row) or _html_mark(text, row)):
                return f"{found!r} in the text of the {turn.role}"
        if turn.role == ASSISTANT and (found := _speaker(turn, row)):
            return f"{found!r} begins a line of the {ASSISTANT}'s text"
    return None


def _template_mark(text: str, row: Row) -> str | None:
    found = _TEMPLATE.search(text) and _TEMPLATE.search(_unquoted(text))
    return found.group() if found and not any(map(_ON_TEMPLATES.search, row.texts())) else None


def _html_mark(text: str, row: Row) -> str | None:
    if not _HTML.search(text) or _DOCUMENT.search(text):
        return None
    plain = _unquoted(text)
    found = _HTML.search(plain)
    if not found or _CODE.search(_HTML.sub(" ", plain)):
        return None
    return None if any(_ON_HTML.search(_URL.sub(" ", _HTML.sub(" ", each))) for each in row.texts()) else found.group()


def _speaker(turn: Turn, row: Row) -> str | None:
    text = turn.text
    if "Human:" not in text and "Assistant:" not in text and "USER:" not in text and "ASSISTANT:" not in text:
        return None
    found = _SPEAKER.search(_unquoted(text))
    asked = any(_ON_DIALOGUES.search(piece) for each in row.prompt for piece in (each.text, each.input))
    return found.group().strip() if found and not asked else None


def _unquoted(text: str) -> str:
    return _QUOTED.sub(" ", text) if "`" in text else text


# --------------------------------------------------------------------------------------------------------------- checks

CHECKS: dict[str, Callable[[Row], str | None]] = {
    "encoding": encoding,
    "control_characters": control_characters,
    "leftovers": leftovers,
}


def check(row: Row, names: Collection[str]) -> list[tuple[str, str]]:
    """What the named checks find in a row.

    Args:
        row: the row.
        names: of ``CHECKS``.

    Returns:
        The name of each finding with its detail; empty for a good row.
    """
    return [(name, detail) for name in names if (detail := CHECKS[name](row)) is not None]


def _named(char: str) -> str:
    name = unicodedata.name(char, "")
    return f"U+{ord(char):04X} {name}".rstrip()


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
