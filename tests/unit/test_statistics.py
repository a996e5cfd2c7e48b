"""Statistics: exact where they say so, near where they estimate, the same whether gathered at once or in parts."""

from __future__ import annotations

import json
import math
import pickle
import random

import numpy as np
import pytest

from raytune_lora.data.language import language
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn
from raytune_lora.data.sketches import SKETCH_ERROR, Distinct, Lengths
from raytune_lora.data.statistics import KEPT, MOST_TURNS, Statistics, advice


def row(instruction: str, answer: str, about: str = "") -> Row:
    return Row((Turn(USER, instruction, about), Turn(ASSISTANT, answer)))


def gathered(rows: list[Row]) -> Statistics:
    statistics = Statistics()
    for each in rows:
        length = sum(map(len, each.texts()))
        statistics.add(each, length // 4, len(each.answer) // 4, "alpaca")
    return statistics


def random_rows(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    words = [f"word{number}" for number in range(500)]
    return [
        row(
            f"{rng.choice(['Write', 'Sort', 'Say'])} {' '.join(rng.choices(words, k=5))}",
            " ".join(rng.choices(words, k=20)),
        )
        for _ in range(count)
    ]


# -------------------------------------------------------------------------------------------------------------- lengths


def test_quantiles_are_within_a_bin_of_the_exact_ones() -> None:
    values = [int(value) for value in np.random.default_rng(0).lognormal(5, 1.2, 20_000)]
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    assert (lengths.low, lengths.high, lengths.total) == (min(values), max(values), sum(values))
    for share in (0.01, 0.5, 0.9, 0.99):
        assert lengths.quantile(share) == pytest.approx(np.quantile(values, share), rel=0.03)


def test_short_lengths_are_exact() -> None:
    lengths = Lengths()
    for value in (0, 1, 1, 2, 3, 3, 3, 7, 12):
        lengths.add(value)
    assert [lengths.quantile(share) for share in (0.1, 0.3, 0.6, 0.85, 1.0)] == [0, 1, 3, 7, 12]
    assert lengths.report()["histogram"] == [[0, 1], [1, 2], [2, 1], [3, 3], [6, 1], [11, 1]]


def test_no_lengths_have_quantiles_and_a_report_too() -> None:
    assert Lengths().quantile(0.5) == 0
    assert Lengths().report()["mean"] == 0


# ------------------------------------------------------------------------------------------------------------ diversity


@pytest.mark.parametrize("count", [1, 50, 2_000, 30_000, 120_000])
@pytest.mark.parametrize("word", ["w{}", "{}", "단어{}"])
def test_different_words_are_estimated_within_four_standard_errors(count: int, word: str) -> None:
    words = [word.format(number) for number in range(count)]
    distinct = Distinct()
    for start in range(0, count, 1_000):
        distinct.add(" ".join(words[start : start + 1_000]))
        distinct.add(" ".join(words[start : start + 1_000]))
    assert distinct.distinct()[0] == pytest.approx(count, rel=4 * SKETCH_ERROR)
    assert distinct.totals[0] == 2 * count


def test_n_grams_are_those_of_each_text() -> None:
    distinct = Distinct()
    for text in ("a b c", "a b", "", "c", "a b c d"):
        distinct.add(text)
    distinct.flush()
    assert distinct.totals == [3 + 2 + 1 + 4, 2 + 1 + 3, 1 + 2]
    assert distinct.distinct() == [4, 3, 2]
    assert distinct.report() == {"words": 10, "types": 4, "distinct_1": 0.4, "distinct_2": 0.5, "distinct_3": 0.6667}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't, don't!  DON'T\n", 3),
        ("f(x)=y_1", 4),
        ("한국어 문장 하나.", 3),
        ("漢字かな", 4),
        ("日本 GPT2を使う", 6),
        ("naïve café", 2),
        ("emoji 😀 here", 3),
        ("half \ud83d", 2),
        ("...", 0),
        ("", 0),
    ],
)
def test_what_a_word_is(text: str, words: int) -> None:
    distinct = Distinct()
    distinct.add(text)
    distinct.flush()
    assert distinct.totals[0] == words


def test_case_and_punctuation_make_no_other_word() -> None:
    distinct = Distinct()
    distinct.add("Hello, world")
    distinct.add("hello world!")
    assert distinct.distinct() == [2, 1, 0]


def test_a_very_long_text_is_counted_by_its_start() -> None:
    distinct = Distinct()
    distinct.add("\U0001f600 " * 5_000_000)
    assert distinct.waiting <= 20_001
    distinct.flush()
    assert distinct.totals[0] == 10_000


# ------------------------------------------------------------------------------------------------------------ languages

SENTENCES = {
    "en": [
        "Summarize the following article in three sentences.",
        "What is the capital of France?",
        "Gradient descent is an algorithm that finds a minimum.",
        'Extract the record as JSON. Invoice of $300 for Smith, due May 2. {"name": "Smith"}',
        "Write a function that sorts a list: def f(x): return sorted(x)",
        "The word 안녕하세요 is what people say.",  # five letters of Hangul
        "What does the sign 서울특별시청 in front of the large building on the main square of the city mean?",
        "What do ありがとう and 谢谢 mean in the book that you gave me, and how are the two of them pronounced?",
    ],
    "ko": [
        "다음 글을 요약하세요.",
        "서울은 한국의 수도이다.",
        'JSON으로 추출하세요. {"이름": "김", "total": 30, "city": "서울"}',
        'JSON으로 추출하세요. {"name": "김하늘", "company": "한빛", "email": null, "address": null, "amount": 12000}',
        "ㅋㅋㅋ 그래",
    ],
    "ja": [
        "次の文章を要約してください。",
        "東京は日本の首都です。",
        "データの品質が重要だ。",
        'JSONで抽出してください。 {"name": "田中", "company": null, "email": null, "address": null, "amount": 12000}',
    ],
    "zh": [
        "请总结下面的文章。",
        "北京是中国的首都。",
        "數據的質量很重要、「對吧」。",
        '请提取为JSON。 {"name": "王小明", "company": "春风电子", "city": "北京", "amount": 12000}',
    ],
    "de": [
        "Fasse den folgenden Text zusammen.",
        "Was ist die Hauptstadt von Frankreich?",
        "Straße und Größe",
        "Ich weiß es nicht.",
    ],
    "fr": [
        "Résumez le texte suivant en trois phrases.",
        "Quelle est la capitale de la France ?",
        "Il ne faut pas le dire.",
    ],
    "es": [
        "Resume el siguiente texto en tres frases.",
        "¿Cuál es la capital de Francia?",
        "Mañana no está aquí.",
    ],
    "it": [
        "Riassumi il testo seguente in tre frasi.",
        "Qual è la capitale della Francia?",
        "Non lo so, ma il gatto è nel giardino.",
    ],
    "pt": [
        "Resuma o texto a seguir em três frases.",
        "Qual é a capital da França?",
        "Não sei, mas o gato não está em casa.",
    ],
    "ru": ["Кратко изложите следующий текст.", "Столица Франции — Париж.", "Напиши функцию sort на Python"],
    "ar": ["لخص النص التالي في ثلاث جمل.", "ما هي عاصمة فرنسا؟"],
    "hi": ["निम्नलिखित पाठ का सारांश लिखें।", "फ्रांस की राजधानी क्या है?"],
    "other": [
        "Vat de volgende tekst samen in het Nederlands, en niet te kort.",
        "Sammanfatta texten på svenska och skriv inte att det är för långt.",
        "Podsumuj tekst, który się nie zmieści na stronie i jest za długi.",
        "Bu metni bir cümle ile özetle ve bir liste haline getir.",
        "\u041f\u0456\u0434\u0441\u0443\u043c\u0443\u0439\u0442\u0435 \u0446\u0435",  # Ukrainian
        "متن زیر را به فارسی خلاصه کنید و گزارش دهید",
        "สรุปข้อความต่อไปนี้",
        "Συνοψίστε το κείμενο.",
        "סכם את הטקסט הבא",
        "নিচের লেখাটি সংক্ষেপ করো।",
        "x = 1; y = 2",
        "12345 😀",
        "",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in SENTENCES.items() for text in texts])
def test_the_language_of_a_sentence_is_told(name: str, text: str) -> None:
    assert language(text) == name


def test_an_answer_in_json_with_english_keys_does_not_hide_the_language() -> None:
    answer = '{"name": "김하늘", "company": "한빛전자", "city": "서울", "date": "2024-03-01", "amount": 12000}'
    assert gathered([row("JSON으로 추출하세요.", answer)]).languages == {"ko": 1}


def test_the_share_of_rows_of_each_language_is_reported() -> None:
    rows = [row("Write about the sea.", "It is blue.")] * 3 + [row("바다에 대해 써 주세요.", "파랗다.")]
    assert gathered(rows).report()["languages"] == {"en": {"rows": 3, "share": 0.75}, "ko": {"rows": 1, "share": 0.25}}


# --------------------------------------------------------------------------------------------------------- instructions


@pytest.mark.parametrize(
    ("instruction", "verb"),
    [
        ("Summarize the text.", "summarize"),
        ("Please, **translate** this to the other language.", "translate"),
        ("Can you help me with the text?", "help"),
        ("Your task is to classify the text.", "classify"),
        ("The weather is nice in the south.", None),
        ("다음 글을 요약하세요.\n글: 물을 끓이세요", "요약하다"),
        ("한국어로 번역해 주세요.", "번역하다"),
        ("이유를 설명해줘", "설명하다"),
        ("표를 작성하시오.", "작성하다"),
        ("하세요 라고 했다", None),
        ("수도는 어디인가요?", None),
    ],
)
def test_the_verb_of_an_instruction(instruction: str, verb: str | None) -> None:
    assert list(gathered([row(instruction, "")]).verbs) == ([verb] if verb else [])


def test_first_words_are_counted_without_case_and_punctuation() -> None:
    rows = [row('"Write" it for me.', "x"), row("write, it for me", "x"), row("请写一首诗", "好"), row("...", "x")]
    assert gathered(rows).first_words == {"write": 2, "请写": 1}


def test_only_the_most_common_words_are_kept() -> None:
    statistics = gathered([row("write of", "x")] * 2)
    statistics.first_words.update(f"word{number}" for number in range(4 * KEPT))
    statistics.add(row("last of", "x"), 1, 1, "alpaca")
    assert len(statistics.first_words) == KEPT
    assert statistics.first_words["write"] == 2


# ----------------------------------------------------------------------------------------------------------- statistics


def test_a_report_counts_what_was_added() -> None:
    statistics = Statistics()
    statistics.add(row("Write it.", "ok", "about"), 9, 3, "alpaca")
    chat = Row(
        (Turn(SYSTEM, "Be."), Turn(USER, "Hi"), Turn(ASSISTANT, "Yes?"), Turn(USER, "Go"), Turn(ASSISTANT, "No."))
    )
    statistics.add(chat, 20, 4, "chat")
    statistics.add(Row((Turn(ASSISTANT, "plain"),)), 5, 5, "text")
    report = statistics.report()
    assert json.loads(json.dumps(report)) == report
    assert report["rows"] == 3
    assert report["formats"] == {"alpaca": 1, "chat": 1, "text": 1}
    assert report["turns"] == {"1": 1, "2": 1, "5": 1}
    lengths = report["lengths"]
    assert (lengths["prompt_characters"]["min"], lengths["prompt_characters"]["max"]) == (0, 14)
    assert (lengths["answer_characters"]["min"], lengths["answer_characters"]["max"]) == (2, 5)
    assert (lengths["tokens"]["min"], lengths["tokens"]["max"]) == (5, 20)
    assert (lengths["prompt_tokens"]["max"], lengths["answer_tokens"]["max"]) == (16, 5)
    assert report["diversity"]["asked"]["words"] == 5
    assert report["diversity"]["answered"]["words"] == 4
    assert report["verbs"] == {"write": 1}


def test_nothing_added_has_a_report() -> None:
    report = Statistics().report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["lengths"] == {}
    assert report["outliers"]["high"] is None


def test_parts_add_up_to_the_whole_also_through_pickle() -> None:
    rows = random_rows(400)
    whole, merged = gathered(rows), Statistics()
    for start in range(0, 400, 90):
        merged.merge(pickle.loads(pickle.dumps(gathered(rows[start : start + 90]))))
    assert merged.report() == whole.report()


def test_memory_does_not_grow_with_the_rows() -> None:
    few, many = gathered(random_rows(200)), gathered(random_rows(2_000))
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 60_000  # of texts not counted yet


def test_a_conversation_of_very_many_turns_is_counted_with_the_longest() -> None:
    assert gathered([Row((Turn(ASSISTANT, "a"),) * 1_000)]).turns == {MOST_TURNS: 1}


# ------------------------------------------------------------------------------------------------------------- outliers


def of_lengths(values: list[int]) -> Statistics:
    statistics = Statistics()
    for value in values:
        statistics.tokens.add(value)
        statistics.rows += 1
    return statistics


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.2])
def test_few_rows_of_log_normal_length_are_outliers(sigma: float) -> None:
    values = [max(int(value), 1) for value in np.random.default_rng(1).lognormal(6, sigma, 30_000)]
    low, high = of_lengths(values).outlier_bounds()
    assert sum(not low <= value <= high for value in values) / len(values) < 0.005


def test_lengths_far_from_the_others_are_outliers_however_many_there_are() -> None:
    values = [max(int(value), 1) for value in np.random.default_rng(2).lognormal(6, 0.3, 1_000)]
    low, high = of_lengths([*values, *[2] * 50, *[40_000] * 50]).outlier_bounds()
    assert 2 < low < 400 < high < 40_000


def test_rows_of_one_length_leave_others_a_factor_of_two() -> None:
    low, high = of_lengths([100] * 50).outlier_bounds()
    assert low == pytest.approx(50, rel=0.03)
    assert high == pytest.approx(200, rel=0.03)


def test_bounds_are_in_characters_where_tokens_are_not_known() -> None:
    statistics = Statistics()
    assert statistics.outlier_bounds() == (0.0, math.inf)
    statistics.add(row("Write", "x" * 95), None, None, "alpaca")
    assert statistics.unit == "characters"
    assert statistics.outlier_bounds()[1] == pytest.approx(200, rel=0.03)
    assert "tokens" not in statistics.report()["lengths"]


# --------------------------------------------------------------------------------------------------------------- advice


def test_few_rows_are_told_how_not_to_overfit() -> None:
    said = advice(480, {"trained": 21_000}, {})
    text = "\n".join(said)
    for key in (
        "method.dropout=0.1",
        "training.weight_decay=0.05",
        "training.epochs=1",
        "training.patience=",
        "model.path",
    ):
        assert key in text
    assert "480 training rows are under 1,000" in said[0]
    assert "data/mix=general" in text
    assert "21,000 trained tokens start at method.r=8 method.alpha=16" in said[-1]


def test_where_no_row_is_left_there_is_nothing_to_advise() -> None:
    assert advice(0, {"trained": 0}, {"encoding": 40}) == []


def test_enough_good_rows_are_told_only_what_applies() -> None:
    (said,) = advice(5_000, {}, {"near_duplicates": 3}, general=0.15)
    assert "method.r=16" in said


def test_many_poor_rows_are_told_that_fewer_good_ones_do_more() -> None:
    said = advice(100_000, {}, {"near_duplicates": 9_000, "encoding": 10, "missing_fields": 50_000}, general=0.2)
    assert "data.quality.near_duplicates=drop" in said[0]
    assert "method.r=32" in said[-1]


@pytest.mark.parametrize("rows", [1, 999, 1_000, 10_000, 10_001, 10**7])
def test_no_more_than_five_sentences(rows: int) -> None:
    said = advice(rows, {"trained": 5}, {"encoding": rows, "outliers": 2})
    assert 1 <= len(said) <= 5
    assert all(sentence.endswith(".") and sentence.count(". ") == 0 for sentence in said)
