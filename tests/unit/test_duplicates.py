"""Rows that say the same: what counts as nearly, and that all of it is found."""

from __future__ import annotations

import random

import numpy as np
import pytest

from raytune_lora.data.duplicates import (
    Clusters,
    groups,
    near_pairs,
    prompt_digest,
    row_digest,
    shingles,
    signatures,
    similarity,
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
    assert list(near_pairs([signatures(lines)], np.arange(len(lines)), lines.__getitem__, 0.7)) == [(0, 1)]


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_every_pair_above_the_threshold_is_joined_and_none_below(threshold: float) -> None:
    draw = random.Random(0)
    lines = [text(draw) for _ in range(400)]
    copies = [changed(line, number % 6, draw) for number, line in enumerate(lines[:300])]
    every = lines + copies
    expected = {(i, 400 + i) for i in range(300) if similarity(every[i], every[400 + i]) >= threshold}
    found = set(near_pairs([signatures(every)], np.arange(len(every)), every.__getitem__, threshold))
    assert found <= expected, "chance texts share next to nothing"
    assert len(found) >= 0.99 * len(expected)
    assert len(expected) > 50


def test_the_exact_comparison_decides() -> None:
    """Texts that meet in a band by their common frame, and differ in what counts."""
    frame = " ".join(f"frame{i}" for i in range(20))
    lines = [f"{frame} {text(random.Random(i), 10)}" for i in range(60)]
    assert 0.4 < similarity(lines[0], lines[1]) < 0.6
    assert list(near_pairs([signatures(lines)], np.arange(len(lines)), lines.__getitem__, 0.8)) == []


def test_a_field_of_megabytes_takes_no_longer_than_its_beginning() -> None:
    draw = random.Random(0)
    huge = text(draw, 300_000)
    pairs = list(near_pairs([signatures([huge, huge + " end"])], np.arange(2), [huge, huge + " end"].__getitem__, 0.8))
    assert pairs == [(0, 1)]


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
