"""The page about a data set: whole, safe and self-contained, whatever the data holds."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.data import Action, PiiConfig, QualityConfig
from raytune_lora.data.rows import Row, Turn
from raytune_lora.data.statistics import Statistics
from raytune_lora.report import render
from raytune_lora.report.charts import Bar, histogram
from raytune_lora.report.data import render_data
from tests.unit.test_report import SAMPLE, Page

HOSTILE = "<script>alert(1)</script>\"'&</pre></details></title>{{ 7 * 7 }}"
KOREAN = "배송이 언제 도착하나요? 알려 주세요"
TURNED = "user \u202eevil\u202c \u2066x\u2069 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627"
MEANT = ("role", "action", "truncation", "unit", "turns")  # keys whose values are words that mean something
NAMES = [name for name, value in vars(QualityConfig()).items() if isinstance(value, Action)]
KINDS = [name for name in vars(PiiConfig()) if name != "action"]


def finding(count: int, action: str, *details: str) -> dict[str, Any]:
    shown = [{"where": f"my.jsonl:{i}", "text": f"text {i}", "detail": detail} for i, detail in enumerate(details, 1)]
    return {"count": count, "examples": shown, "action": action}


def statistics(*, tokenized: bool = True, texts: tuple[str, ...] = ("Write a poem for me", KOREAN)) -> dict[str, Any]:
    figures = Statistics()
    for n in range(60):
        row = Row((Turn("user", texts[n % len(texts)]), Turn("assistant", "word " * (n % 17 + 1))))
        figures.add(row, 20 + n if tokenized else None, 5 + n if tokenized else None, "alpaca" if n % 9 else "chat")
    report: dict[str, Any] = json.loads(json.dumps(figures.report()))
    return report


def full(**changes: Any) -> dict[str, Any]:
    """Everything that a report can hold."""
    found: dict[str, Any] = {name: finding(0, "report") for name in NAMES}
    found |= {
        "exact_duplicates": finding(30, "drop", "the same as my.jsonl:1", "the same as my.jsonl:2"),
        "unreadable": finding(2, "drop", "Expecting value"),
        "near_duplicates": finding(400, "report", "0.9 like my.jsonl:3"),
        "pii": {kind: finding(0, "report") for kind in KINDS} | {"email": finding(7, "mask", "")},
    }
    report = {
        "schema_version": 1,
        "sources": [
            {"role": "data", "name": "my.jsonl"},
            {"role": "mix.general", "name": "general.jsonl"},
            {"role": "benchmark", "name": "bench.jsonl"},
        ],
        "rows": {
            "read": {"my.jsonl": 1000, "general.jsonl": 5000, "bench.jsonl": 50},
            "left_out": 44,
            "splits": {"train": 900, "validation": 100, "test": 80},
            "reasons": {"exact_duplicates": 30, "too_long": 12, "unreadable": 2},
            "too_long": 12,
            "cut": 3,
        },
        "max_length": 96,
        "truncation": "right",
        "tokens": {"train": 90000, "validation": 10000, "test": 8000},
        "trained_tokens": {"train": 45000, "validation": 5000, "test": 4000},
        "findings": found,
        "mixed": {"general": {"asked": 0.15, "rows": 124, "available": 4900, "share": 0.1378}},
        "statistics": statistics(),
        "padding": 0.2315,
        "advice": ["Set method.dropout=0.1."],
        "gate": [],
        "preview": [[["### Instruction:\nHow?\n\n### Response:\n", False], ["So.</s>", True]] for _ in range(4)],
        "cost": {
            "tokens_per_epoch": 90000,
            "steps_per_epoch": 29,
            "global_batch": 32,
            "forward_passes_per_step": 4,
            "packing": False,
        },
    }
    return copy.deepcopy(report | changes)


def unread(**changes: Any) -> dict[str, Any]:
    """What a report holds where no model is named and no row is left."""
    return full(
        rows={"read": {"my.jsonl": 3}, "left_out": 3, "splits": {"train": 0, "validation": 0, "test": 0}},
        max_length=None,
        tokens=None,
        trained_tokens=None,
        mixed={},
        statistics=json.loads(json.dumps(Statistics().report())),
        padding=None,
        advice=[],
        gate=["data: no row is left to train on, of 3 read (3 unreadable; the first at my.jsonl:1: Expecting value)"],
        preview=None,
        cost=None,
        **changes,
    )


def filled_with(text: str, value: Any) -> Any:
    """The same with every text, name and key of the data another one."""
    if isinstance(value, dict):
        given = {k: v if k in MEANT else filled_with(text, v) for k, v in value.items()}
        words = {"verbs", "first_words", "languages", "formats", "read", "mixed"} & set(value)
        return given | {k: {f"{name}{text}": v for name, v in given[k].items()} for k in words}
    if isinstance(value, list):
        return [filled_with(text, item) for item in value]
    return text if isinstance(value, str) else value


def nothing(value: Any) -> Any:
    """The same with null for everything but what holds something else, and the version."""
    return {k: v if k == "schema_version" else None for k, v in value.items()}


CASES = {
    "full": full(),
    "no row": unread(),
    "only the version": {"schema_version": 1},
    "null everywhere": nothing(full()),
    "no tokenizer": full(tokens=None, trained_tokens=None, max_length=None, statistics=statistics(tokenized=False)),
    "hostile": filled_with(HOSTILE, full(gate=["x"])),
    "hostile words": full(statistics=statistics(texts=(HOSTILE,))),
    "right to left": filled_with(TURNED, full(gate=["x"])),
    "long": filled_with("x" * 10_000, full(gate=["x"])),
    "long words": filled_with("a b " * 2500, full(gate=["x"])),
    "Korean": filled_with(KOREAN, full()),
    "half a character": filled_with("\ud800\x00\x1b[31m", full()),
    "no checks": full(findings={"pii": {}}),
    "nothing found": full(findings={n: finding(0, "report") for n in NAMES} | {"pii": {}}),
    "unknown names": full(findings={"new_check": finding(1, "new", "d"), "pii": {"passport": finding(2, "drop", "d")}}),
    "one row": full(rows={"read": {"my.jsonl": 1}, "left_out": 0, "splits": {"train": 1}}),
}


@pytest.mark.parametrize("report", CASES.values(), ids=CASES.keys())
def test_every_page_is_balanced_fetches_nothing_and_runs_nothing(report: dict[str, Any]) -> None:
    html = render_data(report)
    page = Page(html)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.search(r"https?://|url\(|@import", html)
    assert page.count("script") == 0
    assert page.count("h1") == 1
    assert "None" not in page.text
    assert re.search(r"\b(nan|inf)\b", page.text) is None


def test_rendering_leaves_the_report_alone() -> None:
    report = full()
    render_data(report)
    assert report == full()


def test_both_pages_have_the_same_style() -> None:
    def style(html: str) -> list[str]:
        return re.findall(r"<style>(.*?)</style>", html, re.DOTALL)

    assert style(render_data(full())) == style(render(SAMPLE))
    assert len(style(render_data(full()))[0]) > 5000


def test_nothing_may_be_loaded_or_run_even_if_it_got_onto_the_page() -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', render_data(full()))
    assert policy is not None
    assert policy[1].startswith("default-src 'none'")
    assert "script-src" not in policy[1]


# --------------------------------------------------------------------------------------------------------------- header


def test_the_headline_says_how_many_rows_there_are_and_that_they_are_fit() -> None:
    text = Page(render_data(full())).text
    assert "1,080 rows, fit for training" in text
    for part in ("90,000 tokens, 100 a row", "50%", "23%", "29 steps", "of 32 rows; 4 forward passes a step"):
        assert part in text
    assert "3 cut at the end, 12 longer, left out" in text
    assert (
        "44 of them left out (30 exact duplicates, 12 with nothing to train in what the cut leaves, 2 unreadable)"
        in text
    )


def test_what_makes_the_data_unfit_stands_at_the_top() -> None:
    text = Page(render_data(unread())).text
    assert "0 rows, not fit for training" in text
    assert text.index("no row is left to train on, of 3 read") < text.index("Where the rows went")


def test_without_a_tokenizer_lengths_are_of_characters() -> None:
    text = Page(render_data(CASES["no tokenizer"])).text
    assert "not counted" in text
    assert "Rows, in characters" in text
    assert "in tokens" not in text


# ------------------------------------------------------------------------------------------------------------- findings


def test_what_stops_the_job_comes_first_and_what_is_only_shown_last() -> None:
    report = full()
    report["findings"]["pii"]["credit_card"] = finding(1, "stop", "")
    shown = re.findall(r'<b title="([\w.]+)">', render_data(report))
    assert shown == ["pii.credit_card", "exact_duplicates", "unreadable", "pii.email", "near_duplicates"]


def test_what_was_not_found_and_what_was_not_looked_for_take_a_line_each() -> None:
    report = full()
    del report["findings"]["harmful"], report["findings"]["pii"]["secret"]
    text = Page(render_data(report)).text
    absent, off = (re.search(rf"{words}: (.*)\.\n", text) for words in ("Not found", "Not looked for"))
    assert absent is not None
    assert {"missing fields", "leakage", "IBAN"} <= set(absent[1].split(", "))
    assert off is not None
    assert off[1] == "harmful, secret"


@pytest.mark.parametrize("name", [*NAMES, *(f"pii.{kind}" for kind in KINDS)])
def test_every_finding_is_explained(name: str) -> None:
    report = full(findings={"pii": {}})
    of, _, kind = name.partition(".")
    (report["findings"]["pii"] if kind else report["findings"])[kind or of] = finding(1, "report", "d")
    assert re.search(rf'<b title="{name}">[^<]+</b> <span class="soft">[^<]{{10,80}}</span>', render_data(report))


def test_an_example_says_where_it_is_and_what_is_wrong() -> None:
    page = Page(render_data(full()))
    for part in ("my.jsonl:2", "the same as my.jsonl:2", "text 2", "2 examples"):
        assert part in page.text


def test_shares_are_of_the_rows_that_could_be_trained_on() -> None:
    assert '30 <span class="soft">0.5%</span>' in render_data(full())  # of 6,000: not of the benchmark's


# ----------------------------------------------------------------------------------------------- what the data is like


def test_there_is_a_histogram_of_rows_prompts_and_answers() -> None:
    page = Page(render_data(full()))
    assert page.count("svg") == 3
    lengths = statistics()["lengths"]
    assert page.count("rect", "bar") == sum(len(lengths[name]["histogram"]) for name in lengths if "tokens" in name)
    assert "median" in page.text
    assert "at most 96" in page.text


def test_the_bars_of_a_histogram_name_every_length_once() -> None:
    lengths = statistics()["lengths"]["tokens"]
    spans = re.findall(r"<title>(\d+)(?:\N{EN DASH}(\d+))? tokens: (\d+) rows?</title>", render_data(full()))
    rows = spans[: len(lengths["histogram"])]
    assert rows[0][0] == str(lengths["min"])
    assert (rows[-1][1] or rows[-1][0]) == str(lengths["max"])
    assert sum(int(count) for *_, count in rows) == 60
    for (low, high, _), (following, *_) in pairwise(rows):
        assert int(high or low) + 1 == int(following)


@pytest.mark.parametrize("longest", [16, 29, 4000])
def test_length_zero_has_a_bar_of_its_own(longest: int) -> None:
    drawing = histogram([Bar(0, 1, 5, "0"), Bar(15, 16, 9, "15"), Bar(longest - 1, longest, 2, "long")], "t")
    places = [float(x) for x in re.findall(r'<rect class="bar" x="([\d.]+)"', drawing)]
    assert len(places) == 3
    assert places[0] > 46  # right of the axis
    assert places[1] - places[0] > 8  # and clear of the next one
    assert ">0</text>" in drawing


def test_rows_that_are_all_of_one_length_make_one_narrow_bar() -> None:
    drawing = histogram([Bar(15, 16, 60, "15")], "t")
    width = re.findall(r'<rect class="bar" [^>]*width="([\d.]+)"', drawing)
    assert len(width) == 1
    assert 5 < float(width[0]) < 60
    assert ">10</text>" in drawing or ">20</text>" in drawing


def test_lengths_that_are_all_zero_have_no_histogram() -> None:
    figures = Statistics()
    figures.add(Row((Turn("assistant", "plain text"),)), None, None, "text")
    page = Page(render_data(full(statistics=json.loads(json.dumps(figures.report())))))
    assert "Prompts" not in page.text
    assert page.count("svg") == 2


def test_languages_verbs_and_diversity_are_shown() -> None:
    text = Page(render_data(full())).text
    for part in ("English", "Korean", "alpaca", "Verbs of instructions", "write", "Asked", "Answered", "of triples"):
        assert part in text


def test_what_is_trained_is_marked_and_the_rest_is_not() -> None:
    html = render_data(full())
    assert '<mark class="trained">So.&lt;/s&gt;</mark>' in html
    assert html.count('<mark class="trained">So.') == 4
    assert "border-bottom" in re.findall(r"^\.trained \{.*$", html, re.MULTILINE)[0]  # not by colour alone
    assert "2 more rows" in html


def test_mixed_sources_show_what_was_asked_and_what_came_of_it() -> None:
    text = Page(render_data(full())).text
    assert "14% of training, 15% asked" in text
    assert "124 of 4,900 usable" in text
    assert "benchmark, not trained on" in text


# -------------------------------------------------------------------------------------------------------------- hostile


def test_hostile_text_is_shown_not_run() -> None:
    html = render_data(CASES["hostile"])
    assert "<script" not in html
    assert Page(html).text.count(HOSTILE) > 20  # as it came: the template in it is not filled in either


def test_characters_that_turn_the_text_around_them_are_made_visible() -> None:
    html = render_data(CASES["right to left"])
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", html)
    assert "user \ufffdevil\ufffd" in html
    assert "\u05e9\u05dc\u05d5\u05dd" in html  # Hebrew is left alone
    assert all(attributes.get("dir") == "auto" for tag, attributes in Page(html).tags if tag == "pre")


def test_a_page_of_half_characters_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_data(CASES["half a character"]), encoding="utf-8")


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(ValueError, match="schema version 2"):
        render_data(full(schema_version=2))
