"""The checks of single rows: what they find, what they let be, and how well they tell the two apart."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from faker import Faker

from raytune_lora.data.quality import CHECKS, check
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn

ZWJ = "\u200d"


def asked(instruction: str, answer: str, about: str = "") -> Row:
    return Row((Turn(USER, instruction, about), Turn(ASSISTANT, answer)))


def says(answer: str) -> Row:
    return asked("Answer the question.", answer)


def found(row: Row) -> list[str]:
    return [name for name, _ in check(row, CHECKS)]


def misread(text: str, encoding: str = "cp1252") -> str:
    """UTF-8 bytes read as another encoding; bytes that it does not have stay as in Latin-1, as browsers do it."""
    read = (bytes([byte]) for byte in text.encode())
    return "".join(byte.decode(encoding, "ignore") or byte.decode("latin-1") for byte in read)


# ------------------------------------------------------------------------------------------------------------- encoding

READ_RIGHT = [
    "café",
    "don\u2019t",
    "\u201cyes\u201d",
    "5 €",
    "20 °C",
    "naïve \u2013 déjà vu",
    "안녕하세요",
    "日本語です",
    "中文",
    "Привет",
    "αβγ",
    "مرحبا",
    "नमस्ते",
    "Łódź ładny",
    "😀",
    "à la carte",
]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", READ_RIGHT)
def test_utf_8_read_as_another_encoding_is_found_and_the_right_text_is_not(text: str, encoding: str) -> None:
    assert CHECKS["encoding"](says(f"so {text}, then")) is None
    assert CHECKS["encoding"](says(f"so {misread(text, encoding)}, then"))


def test_the_detail_shows_what_was_meant() -> None:
    assert check(says("the cafÃ© is open"), ["encoding"]) == [("encoding", "'Ã©' is 'é' of UTF-8 read as Latin-1")]
    euc_kr = "안녕하세요".encode("euc_kr").decode("latin-1")
    assert check(says(euc_kr), ["encoding"]) == [
        ("encoding", f"'{euc_kr[:8]}' is '안녕하세' of EUC-KR read as Latin-1")
    ]


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("lost \ufffd and \ufffd", "U+FFFD, a lost character, 2 times"),
        ("half \ud83d", "U+D83D, half a character, once"),
        (" \u0301alone", "U+0301 COMBINING ACUTE ACCENT without a letter, or too many on one"),
        ("z\u0301\u0302\u0303\u0304algo", "U+0301 COMBINING ACUTE ACCENT without a letter, or too many on one"),
    ],
)
def test_lost_and_loose_characters_are_found(text: str, detail: str) -> None:
    assert CHECKS["encoding"](says(text)) == detail


@pytest.mark.parametrize(
    "text",
    [
        "\u201eMENÜ\u201c und \u201eSPAß\u201c",
        "\u201cAMANHÃ\u201d",
        "\u201cCAFÉ\u201d… NESTLÉ™ CAFÉ®",
        "« Il répond à\xa0« moi\xa0», fatigué…\xa0»",
        "fatigué…\u201d",
        "VOCÊ… você…\u201d",
        "10 Å² and 5 Å³",
        "3\xd7½ and 10\xd7²",
        "ÀÁÂÃÄÅÆÇÈÉ",
        "·············· 12",
        "e\u0301te\u0301 in NFD, and Vie\u0323\u0302t",
        "Tiếng Việt rất hay",
        "à 5\xa0€ \u2013 très bon marché",
        "Ærø, Ångström, Þór, señor ¿qué?",
        "ไทย हिन्दी العربية עברית",
        "👨‍👩‍👧 ❤️ 🇰🇷",
    ],
)
def test_ordinary_text_that_resembles_a_wrong_decoding_is_let_be(text: str) -> None:
    assert CHECKS["encoding"](says(text)) is None


def test_a_row_about_encodings_may_show_one() -> None:
    assert found(asked("Why does my page show Ã© for é?", "It is UTF-8 read as Latin-1.")) == []


# --------------------------------------------------------------------------------------------------- control characters


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("nul \0 here", "U+0000, once"),
        ("\x1b[31mred\x1b[0m", "U+001B, 2 times"),
        ("page\x0cbreak", "U+000C, once"),
        ("del\x7f", "U+007F, once"),
        ("c1 \x85", "U+0085, once"),
        ("zero\u200bwidth", "U+200B ZERO WIDTH SPACE, once"),
        ("\ufeffstart", "U+FEFF ZERO WIDTH NO-BREAK SPACE, once"),
        ("a\u200db", "U+200D ZERO WIDTH JOINER, once"),
        ("\u200dfirst", "U+200D ZERO WIDTH JOINER, once"),
        ("한\u200b글\u2060", "U+200B ZERO WIDTH SPACE, 2 times"),
        ("safe\u202egpj.exe", "U+202E RIGHT-TO-LEFT OVERRIDE, once"),
        ("שלום \u202dabc", "U+202D LEFT-TO-RIGHT OVERRIDE, once"),
        ("\u200e2024", "U+200E LEFT-TO-RIGHT MARK, once"),
        ("hidden\U000e0041\U000e0042", "U+E0041 TAG LATIN CAPITAL LETTER A, 2 times"),
    ],
)
def test_control_characters_are_named_and_counted(text: str, detail: str) -> None:
    assert CHECKS["control_characters"](says(text)) == detail


@pytest.mark.parametrize(
    "text",
    [
        "tab\there\r\nand a line",
        f"👨{ZWJ}👩{ZWJ}👧 and ❤️{ZWJ}🔥",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        f"क्{ZWJ}ष",
        "ไทย\u200bภาษา",
        "שלום \u200eabc\u200f \u2067x\u2069",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "no\xa0break\u3000space \u2028",
    ],
)
def test_characters_without_width_that_belong_to_a_script_are_let_be(text: str) -> None:
    assert CHECKS["control_characters"](says(text)) is None


# ------------------------------------------------------------------------------------------------------------ leftovers


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Paris.\n\n### Response:\nParis", "### Response:"),
        ("###Instruction: go on", "###Instruction:"),
        ("ok### Human: and then?", "### Human:"),
        ("done<|im_end|>", "<|im_end|>"),
        ("<|start_header_id|>assistant", "<|start_header_id|>"),
        ("<|eot_id|>", "<|eot_id|>"),
        ("<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        ("[INST] hello [/INST] hi", "[INST]"),
        ("<<SYS>> be good", "<<SYS>>"),
        ("<start_of_turn>model", "<start_of_turn>"),
        ("the end</s>", "</s>"),
        ("Below is an instruction that describes a task. Write", "Below is an instruction that describes a task"),
        ("one<br>two", "<br>"),
        ("one<br />two", "<br />"),
        ('<div class="x">text', '<div class="x">'),
        ("A paragraph.</p>", "</p>"),
        ("<p>A paragraph.", "<p>"),
        ('see <a href="https://example.org/index.html">this</a>', '<a href="https://example.org/index.html">'),
        ("10&nbsp;km", "&nbsp;"),
        ("Tom &amp; Jerry", "&amp;"),
        ("it&#39;s", "&#39;"),
        ("10 &lt; 20", "&lt;"),
    ],
)
def test_marks_of_templates_and_html_are_found(answer: str, mark: str) -> None:
    assert CHECKS["leftovers"](says(answer)) == f"{mark!r} in the text of the assistant"


@pytest.mark.parametrize("text", ["nan", " NaN", "<NA>", "NULL", "#N/A", "#VALUE!", "#DIV/0!"])
def test_what_a_table_has_for_no_value_is_no_text(text: str) -> None:
    assert "no value" in (CHECKS["leftovers"](says(text)) or "")
    assert CHECKS["leftovers"](asked("Sum up.", "ok", text))
    assert CHECKS["leftovers"](says(f"It is {text}")) is None
    assert CHECKS["leftovers"](says("None")) is CHECKS["leftovers"](says("N/A")) is None


def test_they_are_found_in_every_text_of_a_row() -> None:
    row = Row((Turn(SYSTEM, "Be brief.<br>"), Turn(USER, "Hi"), Turn(ASSISTANT, "Hello")))
    assert CHECKS["leftovers"](row) == "'<br>' in the text of the system"
    assert CHECKS["leftovers"](asked("Sum up.", "ok", "text &amp; more")) == "'&amp;' in the text of the user"
    assert CHECKS["leftovers"](Row((Turn(ASSISTANT, "plain text</div>"),)))


def test_a_speaker_at_the_start_of_a_line_is_left_over_unless_a_dialogue_was_asked_for() -> None:
    answer = "Sure.\nHuman: and then?\nAssistant: then go."
    assert CHECKS["leftovers"](says(answer)) == "'Human:' begins a line of the assistant's text"
    assert CHECKS["leftovers"](says("USER: hi"))
    assert CHECKS["leftovers"](asked("Write a dialogue of a user and a bot.", answer)) is None
    assert CHECKS["leftovers"](asked("두 사람의 대화를 써 주세요.", answer)) is None
    assert CHECKS["leftovers"](says("To err is Human: Pope said it. The Assistant: a film")) is None
    assert CHECKS["leftovers"](asked("Human: hello", "Hi")) is None  # a user may write so


ABOUT_CODE = [
    says("Type `<br>` or:\n```html\n<div>&nbsp;</div>\n```\nand it works."),
    says("Run this:\n```\nprint('[INST]')\n<br>"),
    asked("Write an HTML page with a heading.", "<h1>Hello</h1>\n<p>World</p>"),
    asked("Make me a landing page", "<!DOCTYPE html>\n<html><body><p>Hi</p></body></html>"),
    asked("What does the <br> tag do?", "It breaks a line."),
    asked("웹 페이지를 만들어 주세요.", "<div>안녕</div>"),
    asked("What ends a turn in ChatML?", "The special token <|im_end|>."),
    says("Use List<String> and Map<K, V>, or Box<P> and Vec<i32>."),
    says("If a<b and c>d, then a<p>q is odd."),
    says("Either a < b && b < c; or x &y; R&D, AT&T"),
    says("Usage: git commit -m <title> [file]; cp <input> <table>"),
    says("#include <string>\nvector<int> v;"),
    says("def f(x):\n    return '<br>' + x"),
    says("function f(x) {\n  return <div>{x}</div>;\n}"),
    says("[1, 2] |> sum <| 3"),
    says("### Response time\nIt is low.\n### Input:\n5 3\n### Example:\n7"),
    says("<answer>42</answer> <think>hm</think>"),
    says("https://example.org/?a=1&b=2&copy=3"),
    says("I <3 you; 1 <2; <- back; x <= y"),
]


@pytest.mark.parametrize("row", ABOUT_CODE, ids=lambda row: row.answer[:20])
def test_code_and_rows_about_it_are_let_be(row: Row) -> None:
    assert found(row) == []


# ------------------------------------------------------------------------------------------------------------- measures

WORDS = {
    "ko_KR": "다음 글을 읽고 핵심을 요약하세요. 데이터의 품질은 모델의 성능을 좌우한다.",
    "de_DE": "Die Größe der \u201eStraße\u201c ändert sich über Nacht \u2013 für Bürger, außer im März.",
    "fr_FR": "Il a été décidé que l\u2019été, « où » il naît \u2014 ça coûte 5\xa0€… Très près d\u2019un château.",
}
CODE = [
    "for (int i = 0; i < n; i++) { a[i] &= mask; }",
    "```html\n<ul><li>one</li></ul>\n```",
    "Map<String, List<Integer>> m = new HashMap<>();",
    "`<|im_start|>` begins a turn",
    "a < b && b > c",
]


HARD = [
    "\u201eMENÜ\u201c",
    "\u201cCAFÉ\u201d",
    "10 Å²",
    "3\xd7½",
    "fatigué…\xa0»",
    "R&D;",
    "a<b",
    "x<-1",
    "### Note:",
    "AT&T",
]


def ordinary(rng: random.Random, fakers: dict[str, Faker]) -> Row:
    """Text of a language, names and addresses, at times code, HTML on purpose, emoji or what resembles a find."""
    locale = rng.choice(list(fakers))
    fake = fakers[locale]
    words = (WORDS[locale] if locale in WORDS else fake.paragraph(9)).split(" ")
    text = f"{' '.join(rng.choices(words, k=30))} {fake.name()}, {fake.address()}, {fake.company()}"
    if rng.random() < 0.3:
        text = f"{text}\n{rng.choice(CODE)}"
    if rng.random() < 0.3:
        text = f"{rng.choice(HARD)} {text}"
    if rng.random() < 0.1:
        return asked("Write it as HTML.", f"<p>{text}</p><br>")
    if rng.random() < 0.1:
        text += f" 👩{ZWJ}💻 ❤️"
    return asked(" ".join(rng.choices(words, k=8)), text)


def spoiled(name: str, row: Row, rng: random.Random) -> Row:
    words = row.answer.split(" ")
    at = rng.randrange(len(words))
    if name == "encoding":
        bad = rng.choice(["\ufffd", *(misread(word, rng.choice(["cp1252", "latin-1"])) for word in READ_RIGHT)])
    elif name == "control_characters":
        bad = rng.choice(["\0", "\x08", "a\u200bb", "\ufeff", "\u202e", "\x1b[0m"])
    else:
        marks = ["<br>", "&nbsp;", "</p>", '<span style="a: b">', "<|im_end|>", "[/INST]", "### Response:", "&#39;"]
        bad = rng.choice(marks)
    return asked(row.turns[0].text, " ".join([*words[:at], words[at] + bad, *words[at:]]))


def labelled() -> Iterator[tuple[Row, set[str]]]:
    """Rows and the names of what they hold."""
    rng = random.Random(0)
    fakers = {locale: Faker(locale) for locale in ("en_US", *WORDS)}
    for fake in fakers.values():
        fake.seed_instance(0)
    for _ in range(300):
        row = ordinary(rng, fakers)
        yield row, set()
        if not any(mark in row.answer for mark in "<`&"):  # what is added to code is not left over
            for name in CHECKS:
                bad = spoiled(name, row, rng)
                c1 = any("\x80" <= char <= "\x9f" for char in bad.answer)  # misread as Latin-1, bytes become these
                yield bad, {name, "control_characters"} if c1 else {name}


def test_precision_and_recall_are_at_least_95_percent() -> None:
    rows = list(labelled())
    for name, look in CHECKS.items():
        flagged = [name in labels for row, labels in rows if look(row)]
        right = sum(flagged)
        assert right >= 150
        assert right / len(flagged) >= 0.95, name
        assert right / sum(name in labels for _, labels in rows) >= 0.95, name


def test_only_the_named_checks_run() -> None:
    row = says("Ã©\0<br>")
    assert found(row) == list(CHECKS)
    assert [name for name, _ in check(row, ["leftovers"])] == ["leftovers"]
    assert check(row, []) == []


@pytest.mark.parametrize(
    "piece", ["<", "&", "`", "<div ", '<a b="', "Ã", "é…", "\u200d", "`<br>", "### ", "\u0301", "·"]
)
def test_a_long_text_of_one_kind_takes_no_more_than_its_length(piece: str) -> None:
    start = time.process_time()
    check(says(piece * (300_000 // len(piece))), CHECKS)
    assert time.process_time() - start < 2
