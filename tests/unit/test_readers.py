"""Reading: which files a path means, and what every form of file gives, whole or broken."""

from __future__ import annotations

import gzip
import json
import os
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_lora.data.files import BLOCK, expand, identity, is_hub_name
from raytune_lora.data.readers import hub_commit, read_file, read_hub
from raytune_lora.data.rows import Fault
from raytune_lora.errors import UserError

ROW = {"instruction": "i", "input": "n", "output": "o"}
GOOD = json.dumps(ROW)
MANY = [{"instruction": f"ask {i}", "output": f"답 {i} " + "x" * 80} for i in range(3000)]
MANY_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in MANY).encode()


def write(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def values(file: str) -> list[Any]:
    return [record.value for record in read_file(file)]


def places(file: str) -> list[str]:
    return [record.where.removeprefix(file) for record in read_file(file)]


def refusal(file: str) -> str:
    with pytest.raises(UserError) as caught:
        list(read_file(file))
    return str(caught.value)


def reasons(file: str) -> list[str]:
    """For each record, `row`, or the reason why it could not be read."""
    found = []
    for value in values(file):
        assert not isinstance(value, Fault) or value.kind == "unreadable"
        found.append(value.reason if isinstance(value, Fault) else "row")
    return found


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return packed


# --------------------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.csv.gz", "sub/c.parquet", "sub/deep/d.JSON", "README.md", ".hidden.jsonl", ".h/e.csv"):
        write(tmp_path, name, "")
    write(tmp_path, "dataset_info.json", "{}")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("b.jsonl", ["b.jsonl"]),
        ("", ["a.csv.gz", "b.jsonl", "sub/c.parquet", "sub/deep/d.JSON"]),
        ("*", ["a.csv.gz", "b.jsonl"]),
        ("*.jsonl", ["b.jsonl"]),
        ("**", ["a.csv.gz", "b.jsonl", "sub/c.parquet", "sub/deep/d.JSON"]),
        ("s*/*.parquet", ["sub/c.parquet"]),
        ("dataset_info.json", ["dataset_info.json"]),
    ],
)
def test_a_path_means_its_files(tree: Path, path: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand(str(tree / path)) == [str(tree / file) for file in files]
    monkeypatch.chdir(tree)
    assert [os.path.normpath(file) for file in expand(path or ".")] == files


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.jsonl", "does not exist"),
        ("missing/*.jsonl", "matches no file"),
        ("README.md", "has no suffix that is known; known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
        ("*.md", "holds no file of a known suffix"),
        ("empty", "holds no file of a known suffix"),
        ("memory://nothing/x.jsonl", "does not exist"),
        ("nonsense://x/y.jsonl", "Protocol not known"),
    ],
)
def test_a_path_that_means_nothing_is_refused(tree: Path, path: str, reason: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=r"^data: ") as caught:
        expand(path if "://" in path else str(tree / path))
    assert reason in str(caught.value)


def test_a_name_with_a_pattern_sign_is_a_file_where_there_is_one(tmp_path: Path) -> None:
    file = write(tmp_path, "a[1].jsonl", GOOD)
    assert expand(file) == [file]


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/a.jsonl", GOOD.encode())
    fs.pipe("/bucket/sub/b.jsonl.gz", gzip.compress(GOOD.encode()))
    fs.pipe("/bucket/.hidden/c.jsonl", b"")
    fs.pipe("/bucket/notes.txt", b"")
    yield fs
    fs.rm("/bucket", recursive=True)


def test_a_uri_means_its_files(memory: Any) -> None:
    both = ["memory:///bucket/a.jsonl", "memory:///bucket/sub/b.jsonl.gz"]
    assert expand("memory://bucket") == both
    assert expand("memory://bucket/**") == both
    assert expand("memory://bucket/*.jsonl") == both[:1]
    assert expand("memory://bucket/a.jsonl") == ["memory://bucket/a.jsonl"]
    assert [values(file) for file in both] == [[ROW], [ROW]]
    assert places(both[0]) == [":1"]


def test_parquet_and_zstandard_are_read_from_a_uri(memory: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    memory.pipe("/bucket/x.parquet", (tmp_path / "x.parquet").read_bytes())
    memory.pipe("/bucket/x.jsonl.zst", zstd(MANY_LINES)[:-5])
    assert values("memory://bucket/x.parquet") == [{"text": "a"}]
    assert values("memory://bucket/x.jsonl.zst")[0] == MANY[0]


def test_a_uri_is_identified_by_what_its_store_says(memory: Any) -> None:
    ((uri, size, mark),) = identity(["memory://bucket/a.jsonl"])
    assert (uri, size) == ("memory://bucket/a.jsonl", len(GOOD))
    memory.pipe("/bucket/a.jsonl", GOOD.encode())
    assert identity(["memory://bucket/a.jsonl"])[0][2] != mark


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    first = identity([write(tmp_path, "a.jsonl", GOOD)])
    assert identity([file.as_uri()]) == first
    known = file.stat()
    file.write_text(GOOD.swapcase())
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert identity([file.as_uri()]) != first, "rows may change under the same size and time"
    assert first == identity([write(tmp_path, "else/where/a.jsonl", GOOD)])
    assert first[0][:2] == ["a.jsonl", len(GOOD)]
    assert identity([write(tmp_path, "a.jsonl", GOOD + "\n")]) != first


def test_a_hub_name_is_what_is_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "here/rows", "")
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("tatsu-lab/alpaca")
    assert is_hub_name("owner/name-v1.2")
    for path in ("here/rows", "data/my.jsonl", "a/b/c", "alpaca", "./alpaca", "../alpaca", "s3://a/b", "/a/b", "a/*"):
        assert not is_hub_name(path)


# ------------------------------------------------------------------------------------------------------------ all forms


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json", "x.csv", "x.tsv", "x.jsonl.gz", "x.csv.zst"])
def test_an_empty_file_has_no_records(name: str, tmp_path: Path) -> None:
    assert values(write(tmp_path, name, "")) == []


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
def test_a_packed_file_is_read_as_it_was(name: str, pack: Any, tmp_path: Path) -> None:
    rows = MANY[:20]
    if name == "x.csv":
        content = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows)
    else:
        content = json.dumps(rows) if name == "x.json" else "\n".join(map(json.dumps, rows))
    file = write(tmp_path, name + (".gz" if pack is gzip.compress else ".zst"), pack(content.encode()))
    assert values(file) == rows
    two = write(tmp_path, os.path.basename(file), pack(content[:300].encode()) + pack(content[300:].encode()))
    assert values(two) == rows


def as_csv(rows: list[dict[str, str]]) -> bytes:
    return ("instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows)).encode()


@pytest.mark.parametrize("cut", [5, 700, 4000])
@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize(
    ("name", "content", "end"),
    [
        ("x.jsonl", MANY_LINES, b"}\n"),
        ("x.json", MANY_LINES, b"}"),
        ("x.json", json.dumps(MANY).encode(), b"}"),
        ("x.json", json.dumps(MANY, indent=1).encode(), b" }"),
        ("x.csv", as_csv(MANY), b"x\n"),
    ],
    ids=["jsonl", "json lines", "json array", "indented json", "csv"],
)
def test_a_file_that_is_cut_off_gives_its_whole_rows_and_one_fault(
    name: str, content: bytes, end: bytes, pack: Any, cut: int, tmp_path: Path
) -> None:
    packed = pack(content)[:-cut]
    file = write(tmp_path, name + (".gz" if pack is gzip.compress else ".zst"), packed)
    *rows, fault = values(file)
    assert rows == MANY[: len(rows)]
    assert isinstance(fault, Fault)
    assert "the file is damaged from here on (" in fault.reason
    if pack is gzip.compress:
        assert len(rows) == zlib.decompressobj(31).decompress(packed).count(end)
    else:  # a frame can be unpacked by blocks of 128 KiB
        assert len(rows) in [content[: blocks * 2**17].count(end) for blocks in range(len(content) // 2**17 + 1)]


def test_rows_before_the_damage_are_all_there(tmp_path: Path) -> None:
    frame = zstd(MANY_LINES)
    file = write(tmp_path, "x.jsonl.zst", frame + zstd(GOOD.encode() + b"\n")[:-1])
    *rows, fault = values(file)
    assert rows[:3000] == MANY
    assert "Truncated" in fault.reason
    assert places(file)[2999] == ":3000"


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.zst", "x.json.gz"])
def test_a_file_that_is_not_packed_as_its_name_says_is_one_fault(name: str, tmp_path: Path) -> None:
    (reason,) = reasons(write(tmp_path, name, GOOD))
    assert "the file is damaged" in reason


def test_a_wrong_checksum_is_told_after_the_rows(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(MANY_LINES))
    packed[-5] ^= 1
    packed[-8] ^= 1
    *rows, fault = values(write(tmp_path, "x.jsonl.gz", bytes(packed)))
    assert rows == MANY
    assert "CRC check failed" in fault.reason


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "gone.csv.gz"])
def test_a_file_that_vanished_is_refused(name: str, tmp_path: Path) -> None:
    assert refusal(str(tmp_path / name)).endswith("cannot be read (No such file or directory); name another file")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("/proc/self/mem")
    (tmp_path / "folder.json").mkdir()
    assert "x.jsonl cannot be read (Input/output error)" in refusal(str(tmp_path / "x.jsonl"))
    assert "folder.json cannot be read (Is a directory)" in refusal(str(tmp_path / "folder.json"))


def test_a_remote_file_that_vanished_is_refused() -> None:
    assert "memory://bucket/gone.jsonl cannot be read" in refusal("memory://bucket/gone.jsonl")


@pytest.mark.parametrize("name", ["x.txt", "x", "x.gz", "x.parquet.gz"])
def test_an_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    assert "has no suffix that is known" in refusal(write(tmp_path, name, ""))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_utf16_is_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    assert "is UTF-16 text; write it as UTF-8" in refusal(write(tmp_path, name, GOOD.encode("utf-16")))


# ---------------------------------------------------------------------------------------------------------------- JSONL


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (GOOD, [1]),
        (GOOD + "\n", [1]),
        ("\ufeff" + GOOD + "\n", [1]),
        (f"{GOOD}\n\ufeff{GOOD}\n", [1, 2]),
        (f"{GOOD}\r\n{GOOD}\r\n", [1, 2]),
        (f"\n{GOOD}\n\n  \n\t{GOOD} \n\n", [2, 5]),
        ("\n \n\r\n", []),
    ],
    ids=["plain", "newline", "byte order mark", "marks of joined files", "CRLF", "blank lines", "only blank lines"],
)
def test_each_line_is_a_record(content: str, lines: list[int], tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", content)
    assert values(file) == [ROW] * len(lines)
    assert places(file) == [f":{line}" for line in lines]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"instruction,input,output", "not JSON: Expecting value at column 1"),
        (b'  {"a": tru}', "not JSON: Expecting value at column 9"),
        (b'{"instruction": "i"} {}', "not JSON: Extra data at column 22"),
        (b'{"instruction": "a\0b"}', "not JSON: Invalid control character at at column 19"),
        (b"\0\0\0", "not JSON: Expecting value at column 1"),
        (b'{"instruction": "\xff"}', "not UTF-8 (byte 18 of the line)"),
        (b'{"instruction": "\xed\xa0\xbd"}', "not UTF-8 (byte 18 of the line)"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "not JSON that can be read: a number of more than 4300 digits"),
        (b"[" * 100_000, "not JSON that can be read: it is nested too deep"),
        (b'{"NaN": "Infinity", "score": NaN}', "not JSON: NaN at column 30"),
        (b"[1, -Infinity]", "not JSON: -Infinity at column 5"),
        (b'{"output": "\\ud83d"}', "holds half a character (a lone surrogate)"),
        (b'{"output": ["a", {"b": "\\uDE00 \\ud83d"}]}', "holds half a character (a lone surrogate)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_unreadable_line_is_a_fault_in_its_place(line: bytes, reason: str, tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    assert values(file) == [ROW, Fault("unreadable", reason), ROW]
    assert places(file) == [":1", ":3", ":4"]


def test_escapes_and_scalars_are_values(tmp_path: Path) -> None:
    lines = ['{"a": "\\ud83d\\ude00 \\u2028"}', '"\\\\ud83d"', "3", "null", "[]", '{"a": "\\u0000"}']
    found = [{"a": "\U0001f600 \u2028"}, "\\ud83d", 3, None, [], {"a": "\0"}]
    assert values(write(tmp_path, "x.jsonl", "\n".join(lines))) == found


def test_a_field_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    long = {"output": "long " * 2_000_000}
    text = json.dumps(long)
    assert values(write(tmp_path, "x.jsonl", f"{text}\n{GOOD}")) == [long, ROW]
    assert values(write(tmp_path, "x.json", f"[{text}, {GOOD}]")) == [long, ROW]
    assert values(write(tmp_path, "y.json", text)) == [long]
    assert values(write(tmp_path, "x.csv", f"output\n{long['output']}\nb\n")) == [long, {"output": "b"}]
    with_lines = ("a," * 50 + "\n") * 100_000
    assert values(write(tmp_path, "y.csv", f'output\n"{with_lines}"\n')) == [{"output": with_lines}]


def test_a_line_without_an_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune_lora.data.files.LONGEST", 2**20)
    long = json.dumps({"output": "x" * 3 * 2**20})
    lines = f"{long}\n{GOOD}\n"
    assert reasons(write(tmp_path, "x.jsonl", lines)) == [
        "a line of more than 1 MiB, or something in it is not closed",
        "row",
    ]
    (first, second) = reasons(write(tmp_path, "x.json", f"[\n{long},\n{GOOD}\n]"))
    assert (first, second) == ("a value of more than 1 MiB, or something in it is not closed", "row")
    quote = 'a\n"' + "x" * 100 + "\n" + "y\n" * 2**19
    assert reasons(write(tmp_path, "x.csv", quote))[0].startswith("not CSV: field larger than field limit (1048576)")


# ----------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "content",
    [
        f"[{GOOD},{GOOD}]",
        f"\ufeff[{GOOD}, {GOOD}]\r\n",
        f"[\n  {GOOD},\n  {GOOD},\n]",
        json.dumps([ROW, ROW], indent=4),
        f"{GOOD}\n{GOOD}\n",
        f"{GOOD}\r\n\r\n{GOOD}",
        f"{GOOD},\n{GOOD}\n",
        f"{json.dumps(ROW, indent=2)}\n{json.dumps(ROW, indent=2)}",
        f"[{GOOD}]\n[{GOOD}]",
        json.dumps({"data": [ROW, ROW]}),
        json.dumps({"version": 1, "meta": {"data": [{"a": 1}]}, "train": [ROW, ROW], "n": [1, 2]}, indent=1),
    ],
)
def test_a_json_file_has_many_forms(content: str, tmp_path: Path) -> None:
    file = write(tmp_path, "x.json", content)
    assert values(file) == [ROW, ROW]
    assert places(file) == ["#1", "#2"]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"messages": [{"role": "user", "content": "a"}]},
        {"data": ["not", "objects"], "rows": []},
        {"data": {"a": 1}, "n": -1.5e3},
    ],
)
def test_a_single_object_is_one_record(value: Any, tmp_path: Path) -> None:
    for indent in (None, 2):
        assert values(write(tmp_path, "x.json", json.dumps(value, indent=indent))) == [value]


def test_records_are_found_wherever_the_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"t": 'q"\\{}[] é😀', "n": -12.5e3, "b": [True, None, {"x": []}]}, 123, "s", ROW]
    forms = [json.dumps(rows), json.dumps(rows, indent=1), json.dumps({"k": 1, "rows": [ROW, *rows[:1]]}, indent=3)]
    for text in (*forms, json.dumps(rows, ensure_ascii=False)):
        expected = values(write(tmp_path, "x.json", text))
        for size in (1, 2, 3, 7, 13):
            monkeypatch.setattr("raytune_lora.data.files.BLOCK", size)
            assert values(str(tmp_path / "x.json")) == expected
        monkeypatch.setattr("raytune_lora.data.files.BLOCK", BLOCK)


def test_two_lists_of_rows_in_one_file_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "x.json", json.dumps({"train": [ROW], "data": [ROW]}))
    assert "has two lists of rows (train, data)" in refusal(file)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"a": tru}', "not JSON: Expecting value at column 7"),
        (b'{"a": "x" "b": 1}', "not JSON: Expecting ',' delimiter at column 11"),
        (b'{"a": "x', "not JSON: Invalid control character at at column "),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud83d"}', "holds half a character"),
        (b'{"a": NaN}', "not JSON: NaN"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number of more than 4300 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "it is nested too deep"),
        (b"{} junk", "something follows the "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("form", [b"[\n  %s,\n  %s,\n  %s\n]", b"%s\n%s\n%s\n"], ids=["array", "lines"])
def test_a_bad_record_of_a_json_file_is_a_fault_in_its_place(
    form: bytes, bad: bytes, reason: str, tmp_path: Path
) -> None:
    good = GOOD.encode()
    first, middle, last = values(write(tmp_path, "x.json", form % (good, bad, good)))
    assert (first, last) == (ROW, ROW)
    assert isinstance(middle, Fault)
    assert middle.kind == "unreadable"
    assert reason in middle.reason
    first, second, last = values(write(tmp_path, "x.json", form % (bad, good, good)))
    assert (second, last) == (ROW, ROW)
    assert reason in first.reason or "not JSON" in first.reason


def test_a_bad_record_of_an_array_on_one_line_ends_it(tmp_path: Path) -> None:
    found = reasons(write(tmp_path, "x.json", f'[{GOOD}, {{"a": tru}}, {GOOD}]'))
    assert found == ["row", "not JSON: Expecting value at column 7; what may follow in the file is not read"]


@pytest.mark.parametrize("content", [f"[{GOOD}", f"[{GOOD},", f"[\n{GOOD},\n{GOOD[:-3]}", f'{{"data": [{GOOD},\n'])
def test_an_array_that_does_not_end_is_told_after_its_rows(content: str, tmp_path: Path) -> None:
    row, reason = reasons(write(tmp_path, "x.json", content))
    assert row == "row"
    assert reason.endswith("what may follow in the file is not read")


@pytest.mark.parametrize(
    "content", ["{", '{"a"', '{"a":', '{"a": 1', '{"a": 1,', '{"a" 1}', "{1: 2}", "]", "tru", '"a']
)
def test_what_is_no_json_is_one_fault(content: str, tmp_path: Path) -> None:
    (reason,) = reasons(write(tmp_path, "x.json", content))
    assert reason.startswith("not JSON")


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("instruction,input,output\ni,n,o\n", [2]),
        ('\ufeff"instruction", input ,output\r\ni,n,o\r\n\r\ni,n,o', [2, 4]),
        ("\n\ninstruction,input,output\n\n\ni,n,o\n", [6]),
        ("instruction;input;output\ni;n;o\n", [2]),
        ("instruction\tinput\toutput\ni\tn\to\n", [2]),
        ("instruction,input,output\ri,n,o\ri,n,o\r", [2, 3]),
        ("instruction,input,output\n", []),
    ],
    ids=["plain", "mark, quotes and CRLF", "blank lines", "semicolons", "tabs", "CR", "header only"],
)
def test_each_row_of_a_table_is_a_record(content: str, lines: list[int], tmp_path: Path) -> None:
    file = write(tmp_path, "x.csv", content)
    assert values(file) == [ROW] * len(lines)
    assert places(file) == [f":{line}" for line in lines]


def test_quoted_fields_hold_lines_and_quotes(tmp_path: Path) -> None:
    file = write(tmp_path, "x.tsv", 'a\tb\n"one\ntwo ""x"""\t답\n1\t2\n')
    assert values(file) == [{"a": 'one\ntwo "x"', "b": "답"}, {"a": "1", "b": "2"}]
    assert places(file) == [":2", ":4"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1", "1 fields where the header has 2"),
        (b"1,2,3", "3 fields where the header has 2"),
        (b"1,\xff", "not UTF-8"),
        (b"1,a\0b", "holds a NUL byte"),
        (b'"1"x,2', "not CSV: ',' expected after '\"'"),
    ],
)
def test_a_bad_row_of_a_table_is_a_fault_in_its_place(row: bytes, reason: str, tmp_path: Path) -> None:
    file = write(tmp_path, "x.csv", b"a,b\n1,2\n" + row + b"\n3,4\n")
    assert values(file) == [{"a": "1", "b": "2"}, Fault("unreadable", reason), {"a": "3", "b": "4"}]
    assert places(file) == [":2", ":3", ":4"]


def test_a_quote_that_is_not_closed_is_a_fault_with_its_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "x.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    assert reasons(file) == ["row", "not CSV: unexpected end of data (to line 5)"]
    assert places(file) == [":2", ":3"]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "x.csv", "output,a,output,b, a,,\n1,2,3,4,5,6,7\n")
    assert f"{file} has more than one column of the name 'a', 'output'; rename them" in refusal(file)
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "more than one column of the name 'x'" in refusal(str(tmp_path / "x.parquet"))


def test_a_header_that_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "the header cannot be read (not UTF-8)" in refusal(write(tmp_path, "x.csv", b"a,\xff\n1,2\n"))
    assert "the header cannot be read" in refusal(write(tmp_path, "x.csv", b'a,"b\n1,2\n'))


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "n": None if i % 2 else i} for i in range(1500)]
    file = str(tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=700)
    assert values(file) == rows
    assert places(file)[-1] == "#1500"


def test_parquet_text_that_is_not_utf8_is_a_fault_in_its_place(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    file = str(tmp_path / "x.parquet")
    assert values(file) == [{"text": "a"}, Fault("unreadable", "not UTF-8"), {"text": "c"}]


@pytest.mark.parametrize("damage", ["empty", "no Parquet", "cut off", "page"])
def test_a_damaged_parquet_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"row {i} of the table" for i in range(5000)]}), path, use_dictionary=False)
    whole = path.read_bytes()
    page = whole[:2000] + b"\xff" * 500 + whole[2500:]
    path.write_bytes({"empty": b"", "no Parquet": b"x" * 100, "cut off": whole[:-100], "page": page}[damage])
    assert refusal(str(path)).startswith(f"data: {path} is damaged")


# ------------------------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def repository(tmp_path: Path) -> str:
    """A folder laid out as a data set of the hub."""
    for subset in ("first", "second"):
        write(tmp_path, f"repo/{subset}/train.jsonl", GOOD + "\n" + GOOD)
    configs = [{"config_name": name, "data_files": f"{name}/train.jsonl"} for name in ("first", "second")]
    write(tmp_path, "repo/README.md", f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return str(tmp_path / "repo")


def hub(name: str, subset: str | None = None, split: str = "train") -> list[Any]:
    return list(read_hub(name, subset=subset, split=split, revision=None))


def test_a_data_set_of_the_hub_is_streamed(repository: str) -> None:
    records = hub(repository, "second")
    assert [record.value for record in records] == [ROW, ROW]
    assert records[1].where == f"{repository}#2"
    assert [record.value for record in hub(f"{repository}/first")] == [ROW, ROW]


@pytest.mark.parametrize(
    ("subset", "split", "reason"),
    [
        (None, "train", "^data.subset: .* has several subsets; name one of first, second$"),
        ("third", "train", "^data.subset: .* has no subset 'third'; name one of first, second$"),
        ("first", "dev", "^data.split: .* has no split 'dev'; name one of train$"),
    ],
)
def test_what_the_hub_does_not_have_is_answered_with_what_it_has(
    repository: str, subset: str | None, split: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        hub(repository, subset, split)


def test_no_data_set_of_that_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no data set of the hub that can be read .* check the name"):
        hub(str(tmp_path))


def test_a_data_set_that_breaks_off_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "repo/train.jsonl", GOOD + "\n{broken\n")
    with pytest.raises(UserError, match="cannot be read from the hub"):
        hub(str(tmp_path / "repo"))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A hub at this machine's own address; what it answers, by path."""
    answers: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0])
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield answers
        server.shutdown()


def test_a_branch_of_the_hub_counts_as_the_commit_that_it_stands_for(endpoint: dict[str, str]) -> None:
    first, second = "a" * 40, "b" * 40
    endpoint["/api/datasets/owner/name"] = json.dumps({"id": "owner/name", "sha": first})
    endpoint["/api/datasets/owner/name/revision/dev"] = json.dumps({"id": "owner/name", "sha": second})
    assert hub_commit("owner/name", None) == first
    assert hub_commit("owner/name", "dev") == second
    endpoint.clear()
    assert hub_commit("owner/name", first) == first, "which needs no hub"
    with pytest.raises(UserError, match=r"which commit of owner/name is the newest .*data\.revision=<40"):
        hub_commit("owner/name", None)


# ----------------------------------------------------------------------------------------------- tables of spreadsheets


@pytest.mark.parametrize(
    ("content", "names", "line"),
    [
        ('"question, as asked";"answer"\r\n"a, b";"c"\r\n', ["question, as asked", "answer"], 2),
        ("\ufeffsep=;\r\nquestion;answer\r\n'a, b';c\r\n", ["question", "answer"], 3),
        ('"sep=|"\nquestion|answer\na|c\n', ["question", "answer"], 3),
        ("SEP=\t\nquestion\tanswer\na;\tc\n", ["question", "answer"], 3),
        ("question|answer\na,b|c\n", ["question", "answer"], 2),
        ('"say ""hi, you""";answer\na;c\n', ['say "hi, you"', "answer"], 2),
        ("question;with,answer\na;b,c\n", ["question;with", "answer"], 2),
        ("sep=,\nquestion,answer\na,c\n", ["question", "answer"], 3),
        ("sep,answer\na,c\n", ["sep", "answer"], 2),
    ],
)
def test_a_table_says_what_separates_it(content: str, names: list[str], line: int, tmp_path: Path) -> None:
    file = write(tmp_path, "x.csv", content)
    (record,) = read_file(file)
    assert list(record.value) == names
    assert record.value["answer"] == "c"
    assert record.where == f"{file}:{line}"


def test_maps_are_objects(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    column = pa.array([[list(message.items()) for message in row["messages"]]], kind)
    twice = pa.array([[[("role", "user"), ("role", "assistant")]]], kind)
    pq.write_table(pa.table({"messages": pa.chunked_array([column, twice])}), tmp_path / "x.parquet")
    first, second = values(str(tmp_path / "x.parquet"))
    assert first == row
    assert isinstance(second, Fault)
