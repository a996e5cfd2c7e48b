"""Rows that say the same: what counts as nearly, and that all of it is found."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from raytune_lora.data.duplicates import (
    Asked,
    Clusters,
    Shingles,
    Weights,
    ask_alike,
    groups,
    near_pairs,
    overlap,
    prompt_digest,
    row_digest,
    shingles,
)
from raytune_lora.data.rows import Row, Turn

SENTENCE = "the quick brown fox jumps over the lazy dog near the quiet river bank at dawn every single day of the week"


def row(instruction: str, about: str, answer: str) -> Row:
    return Row((Turn("user", instruction, about), Turn("assistant", answer)))


def text(draw: random.Random, words: int = 40) -> str:
    return " ".join(f"w{draw.randrange(3000)}" for _ in range(words))


def changed(line: str, places: int, draw: random.Random) -> str:
    words = line.split()
    for place in draw.sample(range(len(words)), places):
        words[place] = f"x{draw.randrange(10**6)}"
    return " ".join(words)


def similarity(a: str, b: str, weights: Callable[[bytes], float] = lambda _: 1) -> float:
    """The weighted Jaccard index, by its definition."""
    first, second = shingles(a), shingles(b)
    return sum(map(weights, first & second)) / sum(map(weights, first | second))


def pairs(lines: list[str], threshold: float) -> set[tuple[int, int]]:
    """The near pairs that are found among lines, which come in parts of a hundred."""
    parts = [Shingles.of(lines[start : start + 100]) for start in range(0, len(lines), 100)]
    weights = Weights(parts, np.ones(len(lines), bool))
    of = [part.row(number) for part in parts for number in range(len(part.starts))]
    signatures = [weights.signatures(part) for part in parts]
    near = near_pairs(signatures, np.arange(len(lines)), lambda i, j: weights.similarity(of[i], of[j]) >= threshold)
    return set(near)


def test_case_space_and_punctuation_aside_the_same_words_are_the_same() -> None:
    assert similarity(SENTENCE, SENTENCE.upper().replace(" ", "  ") + "!") == 1
    assert shingles("One two, three") == {b"one two", b"two three"}
    assert shingles("one") == {b"one"}
    assert shingles("") == {b""}


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    chinese = "请把下面的句子翻译成英文并且解释其中每一个成语的意思以及它的来历谢谢你的帮助"
    assert similarity(chinese, chinese.replace("谢谢", "感谢")) > 0.7
    assert similarity(chinese, "今天天气很好我们一起去公园散步吧顺便买一点水果和牛奶回来给大家当早饭") < 0.05


def test_digests_tell_rows_and_prompts_apart() -> None:
    first = row("i", "n", "o")
    assert row_digest(first) == row_digest(row("i", "n", "o")) != row_digest(row("i", "n", "other"))
    assert prompt_digest(first) == prompt_digest(row("i", "n", "other"))
    assert prompt_digest(first) != prompt_digest(row("i", "", "n"))
    assert prompt_digest(Row((Turn("assistant", "text"),))) == 0


def test_one_word_changed_in_a_short_row_is_found() -> None:
    first = (
        "Summarize the text. The quick brown fox jumps over the lazy dog near the river bank. A fox jumps over a dog."
    )
    lines = [
        first,
        first.replace("brown fox jumps", "brown fox leaps"),
        "Say something else about the weather of today.",
    ]
    assert pairs(lines, 0.7) == {(0, 1)}


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_every_pair_above_the_threshold_is_joined_and_none_below(threshold: float) -> None:
    draw = random.Random(0)
    lines = [text(draw) for _ in range(400)]
    copies = [changed(line, number % 6, draw) for number, line in enumerate(lines[:300])]
    every = lines + copies
    expected = {(i, 400 + i) for i in range(300) if similarity(every[i], every[400 + i]) >= threshold}
    found = pairs(every, threshold)
    assert found <= expected, "chance texts share next to nothing"
    assert len(found) >= 0.99 * len(expected)
    assert len(expected) > 50


def test_what_many_rows_share_says_nothing_about_two_of_them() -> None:
    """A frame around what is particular to each row, and copies of some rows with one word changed."""
    draw = random.Random(0)
    frame = " ".join(f"frame{i}" for i in range(200))
    lines = [f"{frame} {text(draw, 20)} {frame[::-1]}" for _ in range(300)]
    copies = [line.replace(line.split()[205], "changed") for line in lines[:30]]
    assert similarity(lines[0], lines[1]) > 0.8
    assert pairs([*lines, *copies], 0.7) == {(i, 300 + i) for i in range(30)}


@pytest.mark.parametrize("rows", [12, 40, 1000])
def test_rows_that_differ_in_an_amount_within_a_long_frame_are_distinct(rows: int) -> None:
    frame = " ".join(f"frame{i}" for i in range(300))
    assert pairs([f"{frame} {number} euros {frame}" for number in range(rows)], 0.7) == set()


def test_weights_are_those_of_the_documented_formula() -> None:
    lines = [f"all rows begin so {'some of them' if number < 100 else ''} row{number} end" for number in range(200)]
    rows_of = Counter(shingle for line in lines for shingle in shingles(line))
    part = Shingles.of(lines)
    weights = Weights([part], np.ones(200, bool))
    for a, b in ((0, 1), (0, 150), (150, 151)):
        expected = similarity(lines[a], lines[b], lambda shingle: min(1.0, (20 / rows_of[shingle]) ** 4))
        assert weights.similarity(part.row(a), part.row(b)) == pytest.approx(expected, rel=1e-5)


def test_copies_do_not_make_a_text_common() -> None:
    lines = [SENTENCE] * 100 + [SENTENCE.replace("fox", "cat")] + [text(random.Random(n)) for n in range(100)]
    part = Shingles.of(lines)
    counted = np.ones(len(lines), bool)
    counted[1:100] = False
    assert Weights([part], counted).similarity(part.row(0), part.row(100)) > 0.7


def test_the_words_of_answers_are_compared() -> None:
    assert overlap("It is five o'clock now", "It is six o'clock now") == pytest.approx(5 / 7)
    chinese = "今天天气很好我们一起去公园散步吧顺便买一点水果和牛奶"
    assert overlap(chinese, chinese.replace("很", "不")) == pytest.approx(23 / 27)


TALE = "A fox lives here. It hunts at night in the old wood by the river, and sleeps by day. Nobody minds it at all."


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ((f"{TALE} Where does the fox sleep?", "here"), (f"{TALE} What does it hunt at night?", "mice"), False),
        ((f"{TALE} Where does the fox sleep?", "yes"), (f"{TALE} Is it hunted much?", "yes"), False),
        ((f"{TALE} 17 euros", "low"), (f"{TALE} 18 euros", "low"), False),
        ((f"{TALE} {SENTENCE} 17 times", "153"), (f"{TALE} {SENTENCE} 18 times", "162"), False),
        ((TALE, "yes"), (f"{TALE} Where does it sleep?", "by day"), False),
        ((TALE, "yes"), (TALE.replace("fox", "cat"), "yes"), True),
        ((TALE, "yes"), (TALE.replace("night in the old", "dusk in the old"), "no"), True),
        ((TALE, "yes"), (TALE.upper().replace(".", " !"), "something else"), True),
        ((TALE, "yes"), (TALE.replace(" Nobody minds it at all.", ""), "yes"), True),
        (("", TALE), ("", TALE.replace("old wood", "new wood")), True),
        (("", f"{TALE}\nQ: Where is it?\nA: Here"), ("", f"{TALE}\nQ: Who hunts by night?\nA: The fox"), False),
        (
            ("狐狸住在这里。它晚上打猎。它睡在哪里。", "这里"),
            ("狐狸住在这里。它晚上打猎。谁看见了它呢。", "没有人"),
            False,
        ),
    ],
)
def test_rows_of_one_text_ask_alike_where_their_own_sentences_do(
    first: tuple[str, str], second: tuple[str, str], alike: bool
) -> None:
    a, b = Asked(*first), Asked(*second)
    assert ask_alike(a, b, 0.7) is ask_alike(b, a, 0.7) is alike


def test_a_field_of_megabytes_takes_no_longer_than_its_beginning() -> None:
    huge = text(random.Random(0), 300_000)
    assert pairs([huge, huge + " end"], 0.8) == {(0, 1)}


def test_equal_keys_are_grouped_in_order() -> None:
    keys = np.array([5, 3, 5, 9, 3, 5], np.uint64)
    assert [members.tolist() for members in groups(keys)] == [[1, 4], [0, 2, 5]]
    assert list(groups(np.zeros(0, np.uint64))) == []


def test_a_cluster_is_known_by_its_earliest_row() -> None:
    clusters = Clusters(6)
    for a, b in ((4, 5), (2, 4), (1, 3)):
        clusters.join(a, b)
    assert clusters.roots().tolist() == [0, 1, 2, 1, 2, 2] == [clusters.root(i) for i in range(6)]
    clusters.join(5, 3)
    assert clusters.roots().tolist() == [0, 1, 1, 1, 1, 1]
