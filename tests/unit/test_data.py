"""Rows: what a file may hold, what the generators make, and how a row is written as a prompt."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from raytune_lora.config.schema import DataConfig, ExtractionDataConfig, FakeDataConfig, FileDataConfig
from raytune_lora.data.extraction import extraction_rows
from raytune_lora.data.sources import problems, read_rows, source_identity
from raytune_lora.data.templates import TEMPLATES, Row, alpaca
from raytune_lora.errors import UserError

GOOD = '{"instruction": "i", "input": "n", "output": "o"}'
ROW = Row("i", "n", "o")


def file(tmp_path: Path, content: str | bytes) -> FileDataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return FileDataConfig(path=str(path))


def faults(cfg: FileDataConfig) -> list[str]:
    """What reading says, which is also what the check before a job says."""
    with pytest.raises(UserError) as caught:
        read_rows(cfg)
    assert problems(cfg) == caught.value.problems
    return caught.value.problems


# ------------------------------------------------------------------------------------------------------------ templates


def test_the_alpaca_prompt() -> None:
    assert alpaca(ROW) == "### Instruction:\ni\n\n### Input:\nn\n\n### Response:\n"
    assert alpaca(Row("i", "", "o")) == "### Instruction:\ni\n\n### Response:\n"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_prompt_holds_the_question_and_never_the_answer(template: object) -> None:
    prompt = template(Row("asked", "about", "ANSWER"))  # type: ignore[operator]
    assert "asked" in prompt
    assert "about" in prompt
    assert "ANSWER" not in prompt


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (GOOD, [ROW]),
        (GOOD + "\n", [ROW]),
        ("\ufeff" + GOOD + "\n", [ROW]),
        (f"{GOOD}\r\n{GOOD}\r\n", [ROW, ROW]),
        (f"\n{GOOD}\n\n  \n{GOOD}\n\n", [ROW, ROW]),
        ('{"instruction": "i", "output": "o"}', [Row("i", "", "o")]),
        ('{"instruction": "i", "output": "o", "source": 7}', [Row("i", "", "o")]),
        (
            '{"instruction": "요약하세요", "input": "안녕\\n하세요", "output": "인사 \U0001f600"}',
            [Row("요약하세요", "안녕\n하세요", "인사 \U0001f600")],
        ),
        ('{"instruction": "i", "output": "\\ud83d\\ude00 \\u2028"}', [Row("i", "", "\U0001f600 \u2028")]),
    ],
    ids=["plain", "newline", "byte order mark", "CRLF", "blank lines", "no input", "extra key", "Korean", "escapes"],
)
def test_a_file_is_read(content: str, rows: list[Row], tmp_path: Path) -> None:
    cfg = file(tmp_path, content)
    assert read_rows(cfg) == rows
    assert problems(cfg) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: "),
        (b"instruction,input,output", "not JSON: Expecting value at column 1"),
        (b'{"instruction": "i"} {}', "not JSON: Extra data at column 22"),
        (b'{"instruction": "\xff"}', "not UTF-8 (byte 18 of the line)"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b"[]", "a row is a JSON object with instruction, input and output, not list"),
        (b'"text"', "a row is a JSON object with instruction, input and output, not str"),
        (b"{}", "no 'instruction'"),
        (b'{"instruction": "i", "input": "n"}', "no 'output'"),
        (b'{"instruction": "i", "output": null}', "no 'output'"),
        (b'{"instruction": "i", "input": null, "output": "o"}', "no 'input'"),
        (b'{"instruction": ["i"], "output": "o"}', "'instruction' must be a string (got list)"),
        (b'{"instruction": "i", "input": 3, "output": "o"}', "'input' must be a string (got int)"),
        (b'{"instruction": " ", "output": "o"}', "'instruction' is empty"),
        (b'{"instruction": "i", "output": "\\n"}', "'output' is empty"),
        (b'{"instruction": "i", "output": "\\ud83d"}', "'output' holds half a character (a lone surrogate)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_row_is_named_with_its_line_and_the_reason(line: bytes, reason: str, tmp_path: Path) -> None:
    cfg = file(tmp_path, GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    (fault,) = faults(cfg)
    assert fault.startswith(f"{cfg.path}:3: {reason}")


def test_five_malformed_rows_are_named_and_the_others_counted(tmp_path: Path) -> None:
    cfg = file(tmp_path, "\n".join([GOOD, *["{}"] * 5]))
    assert [fault.split(":")[1] for fault in faults(cfg)] == ["2", "3", "4", "5", "6"]
    cfg = file(tmp_path, "{}\n" * 12)
    found = faults(cfg)
    assert len(found) == 6
    assert found[-1] == f"{cfg.path}: 7 more malformed rows"


@pytest.mark.parametrize("content", ["", "\n \n", "\r\n"])
def test_a_file_without_rows_is_refused(content: str, tmp_path: Path) -> None:
    cfg = file(tmp_path, content)
    assert faults(cfg) == [f"data.path: {cfg.path} has no rows; it needs one JSON object a line"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing.jsonl", "does not exist"), (".", "is a folder, not a file"), ("missing/x.jsonl", "does not exist")],
)
def test_a_path_that_is_no_file_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    (fault,) = faults(FileDataConfig(path=str(path)))
    assert fault.startswith(f"data.path: {path} {reason}; name a JSONL file")


def test_a_file_that_cannot_be_read_is_refused() -> None:
    (fault,) = faults(FileDataConfig(path="/proc/self/mem"))
    assert fault.startswith("data.path: /proc/self/mem cannot be read (")


def test_no_path_is_answered_with_what_there_is() -> None:
    (fault,) = faults(FileDataConfig())
    assert "data.path=my.jsonl" in fault
    assert "data=extraction" in fault


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    first = source_identity(file(tmp_path, GOOD))
    assert source_identity(file(tmp_path, GOOD)) == first
    assert source_identity(file(tmp_path, GOOD + "\n")) != first


# ----------------------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("cls", [FakeDataConfig, ExtractionDataConfig])
def test_a_generator_is_a_function_of_its_seed(cls: type[DataConfig]) -> None:
    rows = read_rows(cls(rows=30, seed=1))  # type: ignore[call-arg]  # of the generators
    assert len(rows) == 30
    assert rows == read_rows(cls(rows=30, seed=1))  # type: ignore[call-arg]
    assert rows != read_rows(cls(rows=30, seed=2))  # type: ignore[call-arg]
    assert rows[:10] == read_rows(cls(rows=10, seed=1))  # type: ignore[call-arg]


def test_fake_rows_are_words_and_the_same_in_capitals() -> None:
    rows = read_rows(FakeDataConfig(rows=50))
    assert all(row.output == row.input.upper() and row.instruction for row in rows)
    assert len({row.input for row in rows}) == 50


def renderings(day: date) -> list[str]:
    return [
        f"{day:%B} {day.day}, {day.year}",
        f"{day.day} {day:%b} {day.year}",
        day.isoformat(),
        f"{day.year}년 {day.month}월 {day.day}일",
        f"{day:%Y.%m.%d}",
    ]


def test_an_extraction_answer_says_what_the_message_says() -> None:
    for row in extraction_rows(200, 0.5, seed=3):
        record = json.loads(row.output)
        assert list(record) == ["name", "company", "city", "date", "amount"]
        assert row.output == json.dumps(record, ensure_ascii=False)
        for key in ("name", "company", "city"):
            assert record[key].strip()
            assert record[key] in row.input
        assert any(text in row.input for text in renderings(date.fromisoformat(record["date"])))
        assert type(record["amount"]) is int
        assert str(record["amount"]) in row.input.replace(",", "")


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_the_share_of_korean_messages_is_near_what_is_asked(share: float) -> None:
    rows = extraction_rows(600, share, seed=0)
    korean = [any("가" <= sign <= "힣" for sign in row.input) for row in rows]
    assert korean == [any("가" <= sign <= "힣" for sign in row.instruction) for row in rows]
    assert sum(korean) / 600 == pytest.approx(share, abs=0.05)
    assert share not in (0.0, 1.0) or sum(korean) == 600 * share
