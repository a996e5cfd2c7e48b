"""Statistics that parts of a data set gather apart and add up: lengths, languages, diversity, outliers; and the advice.

All are bounded in memory whatever the number of rows. Counts, smallest, largest and mean are exact; quantiles are
within 2.5 % (half a bin), numbers of distinct n-grams within 0.8 % (one standard error of the sketch).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_lora.data.rows import ASSISTANT, USER, Row

Words = NDArray[np.uint64]

# -------------------------------------------------------------------------------------------------------------- lengths

_RATIO = 1.05  # of a bin's upper to its lower edge
_PER_LOG = 1 / math.log(_RATIO)
_SHOWN_BINS = 4  # bins in one bar of the report


@dataclass
class Lengths:
    """A histogram of lengths whose bins grow geometrically by 5 %."""

    count: int = 0
    total: int = 0
    low: int = 0
    high: int = 0
    bins: dict[int, int] = field(default_factory=dict)  # floor(log(length) / log(1.05)) -> rows; -1: length 0

    def add(self, length: int) -> None:
        if not self.count or length < self.low:
            self.low = length
        if length > self.high:
            self.high = length
        self.count += 1
        self.total += length
        index = int(math.log(length) * _PER_LOG) if length else -1
        self.bins[index] = self.bins.get(index, 0) + 1

    def merge(self, other: Lengths) -> None:
        if other.count:
            self.low = min(self.low, other.low) if self.count else other.low
        self.high = max(self.high, other.high)
        self.count += other.count
        self.total += other.total
        for index, rows in other.bins.items():
            self.bins[index] = self.bins.get(index, 0) + rows

    def quantile(self, share: float) -> float:
        """The length that ``share`` of the rows do not exceed, within 2.5 %; 0 without rows."""
        if not self.count:
            return 0.0
        value = _weighted_quantile([(_middle(index), rows) for index, rows in self.bins.items()], share)
        return min(max(value, self.low), self.high)

    def spread(self) -> tuple[float, float]:
        """Median of the logarithm, and the median absolute deviation (MAD) from it."""
        logs = [(math.log(max(_middle(index), 1.0)), rows) for index, rows in self.bins.items()]
        center = _weighted_quantile(logs, 0.5)
        return center, _weighted_quantile([(abs(log - center), rows) for log, rows in logs], 0.5)

    def report(self) -> dict[str, Any]:
        bars: Counter[int] = Counter()
        for index, rows in self.bins.items():
            bars[index // _SHOWN_BINS] += rows
        edges = [(bar, math.ceil(_RATIO ** (bar * _SHOWN_BINS)) if bar >= 0 else 0) for bar in sorted(bars)]
        return {
            "min": self.low,
            "max": self.high,
            "mean": round(self.total / self.count, 1) if self.count else 0.0,
            **{f"p{percent}": round(self.quantile(percent / 100)) for percent in (50, 90, 99)},
            "histogram": [[edge, bars[bar]] for bar, edge in edges],  # each bar's least length, and its rows
        }


def _middle(index: int) -> float:
    """The geometric middle of a bin's whole numbers: exact where it holds only one."""
    if index < 0:
        return 0.0
    least, most = math.ceil(_RATIO**index - 1e-9), math.ceil(_RATIO ** (index + 1) - 1e-9) - 1
    return math.sqrt(least * max(least, most))


def _weighted_quantile(weighted: list[tuple[float, int]], share: float) -> float:
    left = share * sum(weight for _, weight in weighted)
    for value, weight in sorted(weighted):
        left -= weight
        if left <= 0:
            return value
    return weighted[-1][0] if weighted else 0.0


# ------------------------------------------------------------------------------------------------------------ diversity

_ORDERS = 3  # n-grams of 1, 2 and 3 words
_INDEX_BITS = 14  # 16,384 registers, 16 KiB for each order
_RANK_BITS = 64 - _INDEX_BITS
SKETCH_ERROR = 1.04 / math.sqrt(2**_INDEX_BITS)  # relative standard error
_LONGEST = 20_000  # characters of a text whose n-grams are counted
_PENDING = 16_384  # characters that are gathered before they are counted
_BUFFER = 2**18  # bytes: holds the two together, at up to four bytes a character
_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it vanishes
_SEPARATORS = {byte: 32 for byte in range(1, 128) if not (chr(byte).isalnum() or chr(byte) == "'")}
_LOWER = bytes(_SEPARATORS.get(byte, byte + 32 if 65 <= byte <= 90 else byte) for byte in range(256))


@dataclass
class Distinct:
    """How many different n-grams of words there are, by HyperLogLog (Flajolet et al. 2007).

    A word is what stands between spaces and ASCII punctuation, and each character of Chinese and Japanese. Capitals
    of ASCII count as small letters; n-grams do not reach from one text to the next.
    """

    registers: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((_ORDERS, 2**_INDEX_BITS), dtype=np.uint8))
    totals: list[int] = field(default_factory=lambda: [0] * _ORDERS)  # n-grams seen, of each order
    pending: list[str] = field(default_factory=list)  # texts not counted yet
    waiting: int = 0  # characters of them

    def add(self, text: str) -> None:
        self.pending.append(text if len(text) <= _LONGEST else text[:_LONGEST])
        self.waiting += min(len(text), _LONGEST) + 1
        if self.waiting >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Count what is pending: numpy is fast only for many words at once."""
        if not self.pending:
            return
        words, texts = _words("\0".join([*self.pending, ""]))
        self.pending, self.waiting = [], 0
        grams = words
        for order in range(_ORDERS):
            if order:  # an n-gram is the one of n - 1 words before it, and a word of the same text
                grams = _mixed(grams[:-1] * np.uint64(_BASE) + words[order:])
                inside = texts[order:] == texts[: len(texts) - order]
            kept = grams[inside] if order else grams
            self.totals[order] += len(kept)
            rest = (kept & np.uint64(2**_RANK_BITS - 1)).astype(np.float64)  # exact: fewer than 53 bits
            ranks = (_RANK_BITS + 1 - np.frexp(rest)[1]).astype(np.uint8)  # 1 + leading zeros
            np.maximum.at(self.registers[order], (kept >> np.uint64(_RANK_BITS)).astype(np.intp), ranks)

    def merge(self, other: Distinct) -> None:
        self.flush()
        other.flush()
        np.maximum(self.registers, other.registers, out=self.registers)
        self.totals = [mine + theirs for mine, theirs in zip(self.totals, other.totals, strict=True)]

    def distinct(self) -> list[int]:
        """Different n-grams of each order."""
        self.flush()
        return [min(round(_cardinality(r)), total) for r, total in zip(self.registers, self.totals, strict=True)]

    def report(self) -> dict[str, Any]:
        """Words, different words, and the share of n-grams that are different (distinct-n, Li et al. 2016)."""
        distinct = self.distinct()
        shares = {f"distinct_{n + 1}": round(distinct[n] / max(self.totals[n], 1), 4) for n in range(_ORDERS)}
        return {"words": self.totals[0], "types": distinct[0], **shares}


def _words(text: str) -> tuple[Words, NDArray[np.int64]]:
    """The hash of every word of texts that end in NUL, and the number of the text that it is in.

    The hash is polynomial, from prefix sums, so that no loop runs over words; it is the same in every process.
    """
    data = np.frombuffer(text.encode("utf-8", "surrogatepass").translate(_LOWER), dtype=np.uint8)
    space = data <= 32
    wide = (data >= 0xE3) & (data <= 0xE9)  # first of the three bytes of kana and Han characters
    begins = wide.copy()
    begins[3:] |= wide[:-3]
    begins[1:] |= space[:-1]
    begins[0] = True
    begins &= ~space
    starts = np.flatnonzero(begins)
    ends = np.flatnonzero((space | begins)[1:] & ~space[:-1]) + 1
    powers = _powers()
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data * powers[: len(data)], out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * powers[_BUFFER - starts]  # as if all began at one place
    return _mixed(hashes), np.cumsum(data == 0)[starts]


@cache
def _powers() -> Words:
    powers = np.full(_BUFFER + 1, _BASE, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _mixed(values: Words) -> Words:
    """High bits that depend on every bit of the value: one round of SplitMix64's finalizer (Steele et al. 2014)."""
    values = values ^ (values >> np.uint64(32))
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _cardinality(registers: NDArray[np.uint8]) -> float:
    """The improved raw estimator of Ertl 2017 (arXiv:1702.01284, algorithm 6): unbiased from none to very many."""
    size = len(registers)
    counts = np.bincount(registers, minlength=_RANK_BITS + 2)
    full, empty = 1 - counts[_RANK_BITS + 1] / size, counts[0] / size
    if empty == 1:
        return 0.0
    tau, weight, before = 1 - full, 1.0, -1.0
    while full not in (0, 1) and tau != before:
        full, weight, before = math.sqrt(full), weight / 2, tau
        tau -= (1 - full) ** 2 * weight
    total = size * tau / 3
    for rank in range(_RANK_BITS, 0, -1):
        total = (total + counts[rank]) / 2
    sigma, weight, before = empty, 1.0, -1.0
    while sigma != before:
        empty, before = empty * empty, sigma
        sigma += empty * weight
        weight *= 2
    return float(size * size / (2 * math.log(2) * (total + size * sigma)))


# ------------------------------------------------------------------------------------------------------------ languages

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
_CJK_SIGNS = "\u3000\u3001\u3002\u300a\u300b\u300c\u300d\u3010\u3011"  # in kana's block, and in Chinese
_BY_SCRIPT: dict[str, tuple[str, re.Pattern[str] | None]] = {  # the language, and letters that are only in others
    "K": ("ko", None),
    "R": ("ru", re.compile("[\u0454\u0456-\u045c\u0452\u04d9\u049b]")),  # Ukrainian, Serbian, Kazakh
    "A": ("ar", re.compile("[\u067e\u0686\u0698\u06a9\u06af\u06cc\u06d2]")),  # Persian, Urdu
    "H": ("hi", re.compile("[\u0980-\u09ff]|ळ|आह|आणि|च्या|हरू|गर्न|लाई|छन्")),  # Bengali, Marathi, Nepali
    "O": ("other", None),
}


def language(text: str) -> str:
    """The language of a text: ``en ko ja zh de fr es it pt ru ar hi``; ``other`` where it is none of them or unclear.

    By script where one character of it comes on four of Latin or fewer; else by words that are frequent in it.
    """
    signs = ""
    if not text.isascii():
        pages = text.encode("utf-16-be", "surrogatepass")[::2].translate(_PAGES)
        latin = pages.count(b"L")
        if (len(pages) - latin) * 4 >= latin and (found := _by_script(text, pages, latin)):
            return found
        signs = "".join([letters for sign, letters in _SIGNS if sign in text])
    words = text.lower().split()
    hits = "".join([_STOPS[word] for word in words if word in _STOPS]) + signs
    best = max("edfsipo", key=hits.count)
    count = hits.count(best)
    return _NAMES[best] if count and count * 6 >= len(words) else "other"


def _by_script(text: str, pages: bytes, latin: int) -> str | None:
    counts = {script: pages.count(script.encode()) for script in "KRAHO"}
    counts["Z"] = pages.count(b"Z") + pages.count(b"J")
    script = max(counts, key=counts.__getitem__)
    if not counts[script] or counts[script] * 4 < latin:
        return None
    if script == "Z":
        kana = pages.count(b"J") - sum(map(text.count, _CJK_SIGNS))
        return "ja" if kana * 5 >= counts["Z"] else "zh"
    name, foreign = _BY_SCRIPT[script]
    return "other" if foreign and foreign.search(text) else name


# --------------------------------------------------------------------------------------------------------- instructions

_IMPERATIVES = (  # that instructions begin with
    "add analyze answer arrange ask brainstorm build calculate categorize change check choose classify combine"
    " compare complete compose compute construct continue convert convince correct count create debug decide"
    " define delete derive describe design detect determine develop discuss draft edit elaborate estimate evaluate"
    " examine expand explain explore extract fill find fix format formulate generate give guess help identify"
    " illustrate imagine implement improve infer insert interpret invent justify label list make match modify name"
    " optimize organize outline paraphrase predict prepare produce propose prove provide rank rate recommend"
    " remove reorder rephrase replace replicate respond restate retrieve return reverse review revise rewrite say"
    " search select share show simplify solve sort speculate split state suggest summarize synthesize take tell"
    " think transform translate turn update use verify write"
)
_VERBS = frozenset(_IMPERATIVES.split())
# Endings by which Korean asks for the action of a verb in 하다.
_KOREAN_REQUEST = re.compile("[하해](?:세요|시오|십시오|라|줘|주세요| 줘| 주세요| 주십시오| 보세요)")
_AROUND = " \t\r\n.,:;!?\"'()[]{}<>*#`-\u201c\u201d\u2018\u2019\u3002\uff0c\u3001\uff1a\u300c\u300d"


def _verb(instruction: str, code: str) -> str | None:
    """The first known imperative among six words; in Korean the stem of the first request, with 하다."""
    if code == "ko":
        request = _KOREAN_REQUEST.search(instruction, 0, 300)
        before = instruction[: request.start()] if request else ""
        return f"{before.split()[-1].strip(_AROUND)[-8:]}하다" if before and not before[-1].isspace() else None
    for word in instruction[:120].lower().split(None, 6)[:6]:
        if word in _VERBS or (word := word.strip(_AROUND)) in _VERBS:
            return word
    return None


def _first_word(instruction: str, code: str) -> str:
    if code in ("ja", "zh"):
        return instruction.lstrip(_AROUND)[:2]
    word = instruction[:80].split(None, 1)[:1]
    return word[0].lower().strip(_AROUND)[:24] if word else ""


# ----------------------------------------------------------------------------------------------------------- statistics

KEPT = 2_000  # most common words of a part that are kept
SHOWN = 30  # of them in the report
MOST_TURNS = 50  # this many or more are counted together
_SAMPLE = 200  # characters of the instruction and of the answer that tell the language
# A modified z-score beyond 3.5 is an outlier (Iglewicz and Hoaglin 1993): 0.05 % of rows whose log length is normal.
# 1.4826 MAD estimate the standard deviation of a normal distribution.
_OUTLYING = 3.5 * 1.4826
_ORDINARY = math.log(2)  # within a factor of two of the median nothing is an outlier, however alike the rows are


@dataclass
class Statistics:
    """What a data set is like. Parts are gathered in processes of their own, pickled and merged in any order."""

    rows: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    verbs: Counter[str] = field(default_factory=Counter)
    first_words: Counter[str] = field(default_factory=Counter)
    characters: Lengths = field(default_factory=Lengths)  # of whole rows
    prompt_characters: Lengths = field(default_factory=Lengths)  # before the last answer
    answer_characters: Lengths = field(default_factory=Lengths)  # of the last answer
    tokens: Lengths = field(default_factory=Lengths)  # of whole rows
    prompt_tokens: Lengths = field(default_factory=Lengths)  # not trained
    answer_tokens: Lengths = field(default_factory=Lengths)  # trained
    asked: Distinct = field(default_factory=Distinct)  # in the user's turns
    answered: Distinct = field(default_factory=Distinct)  # in the assistant's turns

    def add(self, row: Row, tokens: int | None, trained: int | None, formats: str) -> None:
        """Count a row.

        Args:
            row: the row.
            tokens: of the whole row; None where they are not known.
            trained: how many of them are trained; None where that is not known.
            formats: the form that the record had, a name of ``Format``.
        """
        self.rows += 1
        self.formats[formats] += 1
        self.turns[min(len(row.turns), MOST_TURNS)] += 1
        answer, instruction, before = row.answer, "", 0
        for turn in row.turns:
            before += len(turn.text) + len(turn.input)
            if turn.role == ASSISTANT:
                self.answered.add(turn.text)
            elif turn.role == USER:
                instruction = instruction or turn.text
                self.asked.add(f"{turn.text} {turn.input}" if turn.input else turn.text)
        self.characters.add(before)
        self.prompt_characters.add(before - len(answer))
        self.answer_characters.add(len(answer))
        if tokens is not None:
            self.tokens.add(tokens)
            if trained is not None:
                self.prompt_tokens.add(tokens - trained)
                self.answer_tokens.add(trained)
        code = language(f"{instruction[:_SAMPLE]} {answer[:_SAMPLE]}")
        self.languages[code] += 1
        if instruction:
            self._count_words(instruction, code)

    def _count_words(self, instruction: str, code: str) -> None:
        if first := _first_word(instruction, code):
            self.first_words[first] += 1
        if verb := _verb(instruction, code):
            self.verbs[verb] += 1
        if len(self.first_words) > 4 * KEPT or len(self.verbs) > 4 * KEPT:
            self._forget_rare_words()

    def _forget_rare_words(self) -> None:
        self.first_words = Counter(dict(self.first_words.most_common(KEPT)))
        self.verbs = Counter(dict(self.verbs.most_common(KEPT)))

    def merge(self, other: Statistics) -> None:
        """Add another part of the same data."""
        self.rows += other.rows
        for name, theirs in vars(other).items():
            if isinstance(theirs, Counter):
                getattr(self, name).update(theirs)
            elif isinstance(theirs, Lengths | Distinct):
                getattr(self, name).merge(theirs)
        if len(self.first_words) > 4 * KEPT or len(self.verbs) > 4 * KEPT:
            self._forget_rare_words()

    @property
    def unit(self) -> str:
        """What ``outlier_bounds`` counts: ``tokens`` where those of every row are known, else ``characters``."""
        return "tokens" if self.rows and self.tokens.count == self.rows else "characters"

    def outlier_bounds(self) -> tuple[float, float]:
        """The least and the greatest ordinary length of a whole row, in ``unit``; without rows every length is one.

        Median ± 3.5 · 1.4826 · MAD of the logarithm (modified z-score, Iglewicz and Hoaglin 1993).
        """
        lengths = self.tokens if self.unit == "tokens" else self.characters
        if not lengths.count:
            return 0.0, math.inf
        center, deviation = lengths.spread()
        reach = max(_OUTLYING * deviation, _ORDINARY)
        return math.exp(center - reach), math.exp(center + reach)

    def report(self) -> dict[str, Any]:
        """Plain JSON: counts and shares, lengths with histograms, diversity, words, and the bounds of outliers."""
        low, high = self.outlier_bounds()
        lengths = {name: value.report() for name, value in self._lengths() if value.count}
        return {
            "rows": self.rows,
            "languages": {
                name: {"rows": rows, "share": round(rows / self.rows, 4)} for name, rows in self.languages.most_common()
            },
            "formats": dict(self.formats.most_common()),
            "turns": {str(turns): self.turns[turns] for turns in sorted(self.turns)},
            "lengths": lengths,
            "diversity": {
                "asked": self.asked.report(),
                "answered": self.answered.report(),
                "standard_error": round(SKETCH_ERROR, 4),
            },
            "verbs": dict(self.verbs.most_common(SHOWN)),
            "first_words": dict(self.first_words.most_common(SHOWN)),
            "outliers": {"unit": self.unit, "low": math.floor(low), "high": math.ceil(high) if self.rows else None},
        }

    def _lengths(self) -> Iterator[tuple[str, Lengths]]:
        yield from ((name, value) for name, value in vars(self).items() if isinstance(value, Lengths))


# --------------------------------------------------------------------------------------------------------------- advice

FEW, MANY = 1_000, 10_000  # training rows: small sets overfit below, and quality tells more than number above
_POOR = (
    "exact_duplicates",
    "near_duplicates",
    "contradictions",
    "encoding",
    "leftovers",
    "control_characters",
    "outliers",
)


def advice(rows: int, tokens: Mapping[str, int], findings: Mapping[str, int], general: float = 0.0) -> list[str]:
    """What the data's size and state suggest, each with the reason and the keys to type; at most five sentences.

    Args:
        rows: that are trained on.
        tokens: of one epoch of them; ``trained`` is named where it is there.
        findings: rows by the finding's name, as ``Findings.counts``.
        general: share of the training rows that comes from ``data.mix``.
    """
    said = []
    if rows < FEW:
        said.append(
            f"{rows:,} training rows are under {FEW:,} and soon learned by heart: set method.dropout=0.1 (to 0.2) and "
            "training.weight_decay=0.05 or more, and training.epochs=1 or 2 with training.patience=3, which ends a run "
            "whose validation loss no longer falls."
        )
        said.append(
            f"A smaller base model (model.path, 7B instead of 70B) overfits less on {rows:,} rows, and more rows help "
            f"more than any setting: {FEW:,} to {MANY:,} good ones are better than 100,000 poor ones."
        )
    poor = {name: findings[name] for name in _POOR if findings.get(name)}
    worst = max(poor, key=poor.__getitem__, default="")
    if worst and rows >= FEW and (rows > MANY or poor[worst] * 20 >= rows):
        said.append(
            f"{FEW:,} to {MANY:,} good rows do more than 100,000 poor ones, and {poor[worst]:,} here have the finding "
            f"{worst}: leave them out with data.quality.{worst}=drop."
        )
    if general < 0.1:
        said.append(
            f"{general:.0%} of the training rows are general instructions, and 10-20 % keep the model from forgetting "
            "what it could do: add data/mix=general data.mix.general.path=general.jsonl data.mix.general.share=0.15."
        )
    start = 8 if rows < FEW else 16 if rows <= MANY else 32
    trained = f" and {tokens['trained']:,} trained tokens" if "trained" in tokens else ""
    said.append(
        f"The rank follows the task's complexity, 8 for one narrow task and up to 64 for many or hard ones: with "
        f"{rows:,} rows{trained} start at method.r={start} method.alpha={2 * start}."
    )
    return said
