"""Harmful words: what the packaged list finds and leaves alone, and a user's own list."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raytune_lora.data.harmful import PACKAGED, Words, load_words
from raytune_lora.errors import UserError


@pytest.fixture(scope="module")
def words() -> Words:
    return load_words(None)


def problems(path: Path, content: str | bytes | None) -> list[str]:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_words(str(path))
    return caught.value.problems


# --------------------------------------------------------------------------------------------------- the packaged list


def test_every_language_has_a_short_list(words: Words) -> None:
    assert set(words.languages) == {"en", "ko", "de", "es", "fr", "ja", "zh"}
    assert all(15 <= len(listed) <= 40 for listed in words.languages.values())
    assert all(len(listed) == len(set(listed)) for listed in words.languages.values())


def test_every_word_is_found_as_it_is_listed(words: Words) -> None:
    for listed in words.languages.values():
        for word in listed:
            assert word in words.find(f"… {word}!") or any(other in word for other in words.find(word)), word


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Just KILL  Yourself.", ["kill yourself"]),
        ("kill\nyourself", ["kill yourself"]),
        ("“I\u2019m going to kill you”, he wrote", ["i'm going to kill you"]),
        ("그냥 나가뒈져라", ["나가 뒈져"]),
        ("가만두면 죽여  버리겠다", ["죽여 버리겠"]),
        ("이 씨발아", ["씨발"]),
        ("DU HURENSOHN", ["hurensohn"]),
        ("du SCHEISSNEGER", ["scheißneger"]),
        ("¡Hijo de puta!", ["hijo de puta"]),
        ("Suicide-toi.", ["suicide-toi"]),
        ("おまえなんか死ねよ", ["死ねよ"]),
        ("ｷﾁｶﾞｲだ", ["キチガイ"]),  # half-width
        ("你这个傻逼啊", ["傻逼"]),
        ("cunt을 말했다", ["cunt"]),  # a particle follows
        ("kys kys, cunt, kys", ["kys", "cunt"]),
        ("", []),
    ],
)
def test_what_is_found(words: Words, text: str, expected: list[str]) -> None:
    assert words.find(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Scunthorpe, Essex, Sussex, Penistone, Cockburn, Lightwater and Clitheroe are places",
        "assess the classic assassin's grass, bass and mass; pass the analysis to a therapist",
        "Dick Van Dyke, Kike Hernández, a chink in the armour, spick and span, a cocktail of shiitake mushrooms",
        "niggardly, snigger, skyscraper, monkeys in the jungle, white powder, to kill a process, kill your darlings",
        "Killing yourself with work; I will kill your process; kill -9 you; skys and kyser",
        "le train est en retard, l'ordinateur tue le temps, un sale temps, la mort aux trousses",
        "Ich bringe dich um acht nach Hause, bring dich in Sicherheit, hier wird vergast",
        "la palabra matate con ele, negro de humo, un hijo de puertorriqueños",
        "병신년(丙申年)에 태어났다. 시발점은 서울역이다. 새끼 고양이. 개나리. 자살 예방 상담 전화. 5개년 계획",
        "死ねない理由、必死ね?、片割れ、雰囲気違いの販売女性。犯人を捜す。",
        "杂种优势是遗传学概念。他去世了。黑色的鬼屋。自杀预防热线。",
    ],
)
def test_what_is_left_alone(words: Words, text: str) -> None:
    assert words.find(text) == []


def test_the_list_is_fast(words: Words) -> None:
    prose = "The quick brown fox jumps over the lazy dog, and then it rests for a while under the old oak tree. " * 3
    korean = "오늘 날씨가 좋아서 공원에 산책을 나갔다가 친구를 만나 커피를 마셨다. " * 8
    words.find(prose)  # compiles
    for text in (prose, korean):
        start = time.process_time()
        for _ in range(500):
            words.find(text)
        assert (time.process_time() - start) / 500 < 500e-6  # some ten times what is measured on a slow core


@pytest.mark.parametrize("piece", ["kill ", "a", " ", "씨", "나가 ", "死"])
def test_a_long_text_takes_no_time(words: Words, piece: str) -> None:
    start = time.process_time()
    words.find(piece * (2**20 // len(piece)))
    assert time.process_time() - start < 5


# --------------------------------------------------------------------------------------------------------- a user's own


def test_a_users_own_list_replaces_the_packaged_one(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("en: [Acme Corp, c++, '***']\nko: [경쟁 사]\n", encoding="utf-8")
    words = load_words(str(path))
    assert words.find("ACME  corp uses C++; 경쟁사는 kys") == ["Acme Corp", "c++", "경쟁 사"]
    assert words.find("acme corporation") == []
    assert words.find("no letters: ***") == ["***"]


def test_no_languages_find_nothing() -> None:
    assert Words({}).find("anything") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "holds nothing"),
        ("- a\n- b", "holds ['a', 'b']"),
        ("en: [a", "is not YAML"),
        (b"en: [\xff\xfe]", "is not YAML"),
        ("en: word", "must have a list of words for en, but has 'word'"),
        ("en: []", "must have a list of words for en, but has []"),
        ("no: [ord]", "has the language False, which is not text"),
        ("en: [yes, fine]", "has True as a word of en"),
        ("en: ['  ']", "has '  ' as a word of en"),
        (f"en: [{'x' * 101}]", "as a word of en: write 1 to 100 characters"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    path = tmp_path / "own.yaml"
    (problem,) = problems(path, content)
    assert said in problem
    assert str(path) in problem


def test_all_problems_of_a_file_are_said_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path / "own.yaml", "en: [1, 2]\nde: x\n")) == 3


def test_the_list_is_beside_the_module() -> None:
    assert PACKAGED.is_file()
