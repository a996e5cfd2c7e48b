"""Statistics that parts of a data set gather apart and add up: lengths, languages, diversity, outliers; and the advice.

All are bounded in memory whatever the number of rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_lora.data.language import language
from raytune_lora.data.rows import ASSISTANT, USER, Row
from raytune_lora.data.sketches import SKETCH_ERROR, Distinct, Lengths

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
        answered = sum(map(len, row.turns[-1].texts()))
        for turn in row.turns:
            before += sum(map(len, turn.texts()))
            if turn.role == ASSISTANT:
                self.answered.add(" ".join(turn.texts()))
            elif turn.role == USER:
                instruction = instruction or turn.text
                self.asked.add(f"{turn.text} {turn.input}" if turn.input else turn.text)
        self.characters.add(before)
        self.prompt_characters.add(before - answered)
        self.answer_characters.add(answered)
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
        rows: that are trained on; where there are none, nothing is said.
        tokens: of one epoch of them; ``trained`` is named where it is there.
        findings: rows by the finding's name, as ``Findings.counts``.
        general: share of the training rows that comes from ``data.mix``.
    """
    if not rows:
        return []
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
