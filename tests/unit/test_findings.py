"""Findings: each reason is counted and has an example, and no field is left out unsaid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.cli import job
from raytune_lora.config.data import Action, FileDataConfig, PiiConfig
from raytune_lora.data.build import every_finding, survey
from raytune_lora.data.duplicates import prompt_digest, row_digest
from raytune_lora.data.findings import MOST_REASONS, OTHER, SHOWN, Findings
from raytune_lora.data.rows import ASSISTANT, TOOL, USER, Call, Row, Turn
from raytune_lora.data.sources import sources
from tests.unit.chat_templates import CHAT
from tests.unit.test_tools import tokenizer
from tests.unit.tool_templates import ASKED, QWEN3, QWEN25, said
from tests.unit.tool_templates import TOOL as TIDE


def surveyed(
    tmp_path: Path, rows: list[Any], template: str = QWEN3, **settings: Any
) -> tuple[dict[str, Any], list[str]]:
    """The report's findings that have rows, and the texts of the training rows."""
    from datasets import Dataset

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = FileDataConfig(path=str(file), template=CHAT.template, max_length=4000, validation=0, test=0, processes=1)
    cfg = replace(cfg, **settings)
    work = tmp_path / "work"
    work.mkdir()
    report = survey(cfg, sources(cfg), tokenizer(template), work)
    found = {name: finding for name, finding in every_finding(report).items() if finding["count"]}
    ids = Dataset.from_file(str(work / "train.arrow"))["input_ids"]
    return found, [tokenizer(template).decode(each) for each in ids]


def test_each_reason_is_counted_and_has_an_example() -> None:
    parts = [Findings(), Findings()]
    for number in range(40):
        parts[number // 30].add(
            "wrong_types", f"f:{number}", "", f"messages[{number}] is bad", [f"messages[{number}] is bad"]
        )
    parts[0].add("wrong_types", "f:90", "", "a list", ["a list"])
    parts[1].add("wrong_types", "f:91", "", "a number", ["a number"])
    parts[0].merge(parts[1])
    report = parts[0].report("wrong_types")
    assert report["count"] == 42
    assert report["reasons"] == {"messages[#] is bad": 40, "a list": 1, "a number": 1}
    assert [example["where"] for example in report["examples"]] == [f"f:{n}" for n in (*range(SHOWN), 90, 91)]


def test_very_many_reasons_are_counted_together() -> None:
    findings = Findings()
    for letter in map(chr, range(ord("A"), ord("A") + 2 * MOST_REASONS)):
        findings.add("wrong_types", letter, "", letter, [letter])
    report = findings.report("wrong_types")
    assert (len(report["reasons"]), report["reasons"][OTHER]) == (MOST_REASONS + 1, MOST_REASONS)
    assert len(report["examples"]) == MOST_REASONS


def test_what_is_not_used_is_said_by_name(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": n, "source": "web", "messages": [said("user", f"{n}?"), said("assistant", f"{n}.")]} for n in range(9)
    ]
    rows[3]["messages"][1]["reasoning_content"] = "three"
    found, _ = surveyed(tmp_path, rows, QWEN25)
    assert found["unused_fields"]["reasons"] == {"id": 9, "source": 9}
    assert (found["unused_fields"]["count"], found["unused_fields"]["action"]) == (9, "report")
    assert found["unwritten"]["reasons"] == {"the thought, for which the template has no place": 1}


def test_rows_that_a_template_cannot_write_are_left_out_alone(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}?", "output": f"{n}."} for n in range(9)] + [{"messages": ASKED, "tools": [TIDE]}]
    found, texts = surveyed(tmp_path, rows)
    assert len(texts) == 10
    assert "mixed_formats" in found
    silent = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "again").mkdir()
    found, texts = surveyed(tmp_path / "again", rows, silent)
    assert (len(texts), found["wrong_types"]["count"]) == (9, 1)
    (reason,) = found["wrong_types"]["reasons"]
    assert reason.startswith("the chat template does not write the definitions of tools")


def test_rows_with_nothing_to_train_are_counted_apart(tmp_path: Path) -> None:
    rows = [{"messages": [said("user", f"{n}?"), said("assistant", f"{n}.", weight=int(n > 1))]} for n in range(9)]
    found, texts = surveyed(tmp_path, rows)
    assert (len(texts), list(found)) == (7, ["nothing_trained"])
    assert found["nothing_trained"]["count"] == 2


def test_personal_data_is_masked_wherever_it_is(tmp_path: Path) -> None:
    secret = "ann@example.org"
    call = {"name": "mail", "arguments": {"to": secret, "copies": 2, "card": 4111111111111111}}
    tool = {"name": "mail", "description": f"From {secret}", "parameters": {}}
    messages = [
        said("user", "Mail Ann."),
        said("assistant", "", reasoning_content=f"She is {secret}", tool_calls=[{"function": call}]),
        said("tool", f"sent to {secret}"),
        said("assistant", "Done."),
    ]
    pii = PiiConfig(action=Action.mask)
    found, (text,) = surveyed(tmp_path, [{"messages": messages, "tools": [tool]}], pii=pii)
    assert {name for name in found if name.startswith("pii")} == {"pii.email", "pii.credit_card"}
    assert secret not in text
    assert "4111111111111111" not in text
    assert '"copies": 2' in text
    assert "She is [" in text


def test_a_digest_changes_with_all_that_a_row_holds() -> None:
    ask, call = Turn(USER, "q"), Call("tide", {"at": "x"})
    plain = Row((ask, Turn(ASSISTANT, "a"), ask, Turn(ASSISTANT, "b")))
    first = plain.turns[1]
    others = [
        Row((ask, replace(first, **change), *plain.turns[2:]))
        for change in ({"thought": "t"}, {"calls": (call,)}, {"calls": (replace(call, arguments={"at": "y"}),)})
    ]
    others += [replace(plain, tools=(TIDE,)), Row((ask, first, Turn(TOOL, "q"), *plain.turns[3:]))]
    flagged = Row((ask, replace(first, trained=False), *plain.turns[2:]))
    assert len({row_digest(row) for row in (plain, flagged, *others)}) == len(others) + 2
    assert len({prompt_digest(row) for row in (plain, *others[:-1])}) == len(others)
    assert prompt_digest(flagged) == prompt_digest(plain)  # the same question


def test_the_terminal_and_the_page_list_the_reasons(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [
        {"instruction": "Say it.", "input": f"number {n} of {n * 7919 % 1009}", "output": f"it {n}", "id": n}
        for n in range(60)
    ]
    rows += [
        {"instruction": 1, "output": "o"},
        {"instruction": "i", "output": 2},
        {"instruction": "i", "output": ["x"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "report"
    told = job("prepare", [f"data.path={file}", f"cache={cache}", f"output={out}"])
    shown = capsys.readouterr().out
    assert told == 0, shown
    page = (out / "data_report.html").read_text()
    for reason in ("instruction must be text (found a number", "output must be text (found a list)"):
        assert reason in " ".join(shown.split())
        assert reason in page
    assert "unused_fields" in shown
