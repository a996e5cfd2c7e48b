"""The language of a text, from its script and its most frequent words."""

from __future__ import annotations

import re
import string

_STOP_WORDS = {
    "en": "the of and to in is that for it with as on are this be was by what from have you how an or your not can its"
    " write explain describe give create translate which does we they their has will all but",
    "de": "der die das und ist nicht ein eine in zu den mit von für auf dem im es sich des als auch an wie sie ich was"
    " oder aus nach bei einer einem einen eines werden durch diese dieser dass um wenn kann wird sind",
    "fr": "le la les des et est un une de du en que qui dans pour pas sur au avec ce il par plus sont vous je quelle"
    " ou aux ces ses leur être mais ne tout toute nous cette d'un d'une comme si on",
    "es": "el la los las de del es un una en que por con para se no su al lo como más qué cuál está son este sus"
    " o otros otras si esta pero puede ser cuando sobre entre también",
    "it": "il la le di è un una in che per con non si del della dei gli i sono come al da nel più questo qual alla"
    " delle dello nella sul sulla essere altri altre anche questa ed lo se e o",
    "pt": "os as de do da é um uma em que por com para não se no na dos ao mais como são seu qual pelo à das"
    " pela nos nas ser outros outras este você sua e o ou esta também",
    # Dutch, Scandinavian and Slavic languages, Turkish, Indonesian, Tagalog, Vietnamese, Finnish, Hungarian, Romanian
    "other": "het een van niet dat zijn voor de en is op te och att det som är på ett og er til się nie jest że na ve"
    " bir bu için dan yang di untuk dengan là của và các cho không ja ei on että hogy az és egy și este în cu pe"
    " je za od u su koje ili kao ng sa mga ang ste pro să sau din ki lub oraz jak",
}
_CODES = dict(zip(_STOP_WORDS, "edfsipo", strict=True))
_NAMES = {code: name for name, code in _CODES.items()}
_STOPS: dict[str, str] = {}  # word -> the letters of the languages that have it
for _name, _list in _STOP_WORDS.items():
    for _word in set(_list.split()):
        _STOPS[_word] = _STOPS.get(_word, "") + _CODES[_name]
_STOPS = {word: codes * 2 if len(codes) == 1 else codes for word, codes in _STOPS.items()}  # words of one tell more
_SIGNS = (("ß", "dd"), ("ñ", "ss"), ("¿", "ss"), ("ã", "pp"), ("õ", "pp"))


def _page(high: int) -> str:
    """The script of the 256 characters whose codes begin with a byte: Latin, Korean, … or a space for signs."""
    ranges = {"L": "00-02 1e-1e", "K": "11-11 31-31 ac-d7", "J": "30-30", "Z": "34-9f f9-fa", "R": "04-04"}
    ranges |= {"H": "09-09", "A": "06-06 fb-fe", " ": "20-2f 32-33 d8-f8 ff-ff"}
    for script, spans in ranges.items():
        if any(int(span[:2], 16) <= high <= int(span[3:], 16) for span in spans.split()):
            return script
    return "O"


_PAGES = "".join(map(_page, range(256))).encode()
_ASCII_LETTERS = string.ascii_letters.encode()
_CJK_SIGNS = "\u3000\u3001\u3002\u300a\u300b\u300c\u300d\u3010\u3011"  # in kana's block, and in Chinese
_HANGUL, _HAN, _KANA, _LATIN = b"KZJL"
_BY_SCRIPT: dict[int, tuple[str, re.Pattern[str] | None]] = {  # the language, and letters that are only in others
    _HANGUL: ("ko", None),
    ord("R"): ("ru", re.compile("[\u0454\u0456-\u045c\u0452\u04d9\u049b]")),  # Ukrainian, Serbian, Kazakh
    ord("A"): ("ar", re.compile("[\u067e\u0686\u0698\u06a9\u06af\u06cc\u06d2]")),  # Persian, Urdu
    ord("H"): ("hi", re.compile("[\u0980-\u09ff]|ळ|आह|आणि|च्या|हरू|गर्न|लाई|छन्")),  # Bengali, Marathi, Nepali
    ord("O"): ("other", None),
}
_FEWEST, _LEAST_SHARE = 6, 0.15  # letters of Korean, Japanese or Chinese amid Latin, and their share of all letters


def language(text: str) -> str:
    """The language of a text: ``en ko ja zh de fr es it pt ru ar hi``; ``other`` where it is none of them or unclear.

    By script where one character of it comes on four of Latin or fewer; for Korean, Japanese and Chinese also where
    six letters or more are 15 % of all, as in JSON with English keys. Else by words that are frequent in it.
    """
    signs = ""
    if not text.isascii():
        pages = text.encode("utf-16-be", "surrogatepass")[::2].translate(_PAGES)
        if found := _by_script(text, pages):
            return found
        signs = "".join([letters for sign, letters in _SIGNS if sign in text])
    words = text.lower().split()
    hits = "".join([_STOPS[word] for word in words if word in _STOPS]) + signs
    best = max("edfsipo", key=hits.count)
    count = hits.count(best)
    return _NAMES[best] if count and count * 6 >= len(words) else "other"


def _by_script(text: str, pages: bytes) -> str | None:
    """The language of the most frequent script but Latin, if there is enough of it."""
    latin = pages.count(_LATIN)  # with the spaces, digits and signs of ASCII
    others = len(pages) - latin
    if others * 4 < latin and others < _FEWEST:
        return None
    kana = pages.count(_KANA)  # with signs of their block that Chinese uses too
    counts = {script: pages.count(script) for script in _BY_SCRIPT}
    counts[_HAN] = pages.count(_HAN) + kana
    script = max(counts, key=counts.__getitem__)
    count = counts[script]
    if not count or count * 4 < latin:
        if script not in (_HANGUL, _HAN) or count < _FEWEST:
            return None
        signs = len(text.encode("ascii", "ignore").translate(None, _ASCII_LETTERS))
        if count < _LEAST_SHARE * (latin - signs + sum(counts.values())):
            return None
    if script == _HAN:
        if kana * 5 >= count:
            kana -= sum(map(text.count, _CJK_SIGNS))
        return "ja" if kana * 5 >= count else "zh"
    name, foreign = _BY_SCRIPT[script]
    return "other" if foreign and foreign.search(text) else name
