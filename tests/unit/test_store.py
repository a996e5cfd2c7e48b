"""The token store: who goes into which split, what is trained, and when it is built."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from raytune_lora.cache import Cache
from raytune_lora.config.data import (
    Action,
    DataConfig,
    ExtractionDataConfig,
    FakeDataConfig,
    FileDataConfig,
    MixConfig,
    TemplateKind,
    Truncation,
)
from raytune_lora.config.schema import HubModelConfig
from raytune_lora.data.build import REPORT, DataRefused, in_short
from raytune_lora.data.encode import IGNORED
from raytune_lora.data.prepare import prepare
from raytune_lora.data.sources import sources
from raytune_lora.data.splits import SPLITS
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError
from raytune_lora.models.tokenizer import tokenizer_identity

Prepare = Callable[..., TokenStore]
Alpaca = dict[str, str]


@pytest.fixture
def prepared(tokenizer: Any, tmp_path: Path) -> Prepare:
    """Prepare a store in a cache of the test's own."""

    def run(cfg: DataConfig, tokenizer_id: str = "bytes") -> TokenStore:
        return prepare(cfg, lambda: tokenizer, tokenizer_id, Cache(tmp_path / "cache"))

    return run


def file(tmp_path: Path, rows: list[Alpaca]) -> FileDataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileDataConfig(path=str(path), validation=0.2, test=0.2, max_length=200)


def rows(count: int) -> list[Alpaca]:
    (source,) = sources(FakeDataConfig(rows=count))
    return [record.value for record in source.records()]


def answers(store: TokenStore, split: str) -> set[str]:
    return set(store.split(split)["answer"])


def report(store: TokenStore) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store.folder / REPORT).read_text())
    return found


# ---------------------------------------------------------------------------------------------------- tokens and labels


def test_the_answer_and_its_end_are_trained_and_the_prompt_is_not(prepared: Prepare, tokenizer: Any) -> None:
    cfg = ExtractionDataConfig(rows=60, korean=0.5, max_length=1000)
    store = prepared(cfg)
    (source,) = sources(cfg)
    expected = {
        f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n": row["output"]
        for row in (record.value for record in source.records())
    }
    seen = [row for split in SPLITS for row in store.split(split)]
    assert {tokenizer.decode(row["input_ids"][: row["prompt_length"]]): row["answer"] for row in seen} == expected
    for row in seen:
        prompt_ids = row["input_ids"][: row["prompt_length"]]
        answer_ids = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        assert row["input_ids"] == prompt_ids + answer_ids
        assert row["labels"] == [IGNORED] * len(prompt_ids) + answer_ids


def test_a_store_says_how_its_answers_end(prepared: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    """And its largest token id, be it only of padding."""
    store = prepared(file(tmp_path, rows(60)))
    every = [row for split in SPLITS for row in store.split(split)]
    assert store.stop_ids == report(store)["stop_ids"] == [tokenizer.eos_token_id]
    for row in every:
        end = row["prompt_length"] + row["answer_length"]
        assert row["input_ids"][end:] == [tokenizer.eos_token_id]
        assert tokenizer.decode(row["input_ids"][row["prompt_length"] : end]) == row["answer"]
    largest = max(max(row["input_ids"]) for row in every)
    assert store.manifest["largest_id"] == report(store)["largest_id"] == largest
    assert store.manifest["largest_token"] == tokenizer.convert_ids_to_tokens(largest)


def test_rows_without_a_whole_answer_are_not_answered(prepared: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    answers = [{"instruction": f"q{number}", "output": "y" * (number % 20 + 1)} for number in range(100)]
    store = prepared(replace(file(tmp_path, answers), max_length=46, truncation=Truncation.right))
    test = list(store.split("test"))
    whole = [row for row in test if row["input_ids"][-1] == tokenizer.eos_token_id]
    assert 1 < len(whole) < len(test)
    assert list(store.answered(1000)) == whole
    assert list(store.answered(1)) == whole[:1]
    assert list(store.answered(0)) == []
    assert {(row["answer"], row["answer_length"]) for row in test if row not in whole} == {(None, None)}


def test_rows_that_are_too_long_are_dropped_and_counted(prepared: Prepare, tmp_path: Path) -> None:
    long = [{"instruction": "i", "input": f"{'x' * 300} {number}", "output": "o"} for number in range(7)]
    cfg = file(tmp_path, rows(60) + long)
    store = prepared(cfg)
    assert report(store)["rows"]["too_long"] == 7
    assert sum(store.rows.values()) == 60
    lengths = {split: store.lengths(split).tolist() for split in SPLITS}
    assert lengths == {split: [len(row["input_ids"]) for row in store.split(split)] for split in SPLITS}
    assert {split: sum(each) for split, each in lengths.items()} == store.manifest["tokens"]
    longest = max(max(each) for each in lengths.values())
    assert report(prepared(replace(cfg, max_length=longest)))["rows"]["too_long"] == 7
    assert report(prepared(replace(cfg, max_length=longest - 1)))["rows"]["too_long"] > 7


def test_rows_that_are_too_long_are_cut_where_asked(prepared: Prepare, tmp_path: Path) -> None:
    cfg = file(tmp_path, rows(60))
    longest = max(prepared(cfg).lengths("train"))
    store = prepared(replace(cfg, max_length=int(longest) - 8, truncation=Truncation.right))
    found = report(store)["rows"]
    assert found["cut"] > 0
    assert max(store.lengths("train")) == longest - 8
    assert all(any(label != IGNORED for label in row["labels"]) for row in store.split("train"))
    assert found["too_long"] + sum(store.rows.values()) == 60, "one of whose answer nothing is left is not trained"


def test_every_row_left_out_has_one_reason(prepared: Prepare, tmp_path: Path) -> None:
    usable = rows(60)
    faulty: list[Any] = [
        {"instruction": "i"},
        {"instruction": "i", "output": 3},
        {"instruction": "i", "output": ""},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]},
    ]
    long = [{"instruction": "i", "input": f"{'x' * 300} {number}", "output": "o"} for number in range(7)]
    noted = [row | {"output": row["output"] + " <br>"} for row in rows(5)]
    mailed = [
        {"instruction": f"i{n}", "input": f"a{n}@example.com" + "<br>" * (n == 0), "output": "o"} for n in range(3)
    ]
    cfg = file(tmp_path, [*usable, *usable[:8], *faulty, *long, *noted, *mailed])
    with Path(str(cfg.path)).open("a") as lines:
        lines.write("not json\n")
    cfg.quality.leftovers = cfg.quality.contradictions = cfg.pii.action = Action.drop
    found = report(prepared(cfg))
    assert found["rows"]["reasons"] == {
        "exact_duplicates": 8,
        "too_long": 7,
        "leftovers": 6,
        "pii.email": 2,
        "missing_fields": 1,
        "wrong_types": 1,
        "empty_fields": 1,
        "nothing_trained": 1,
        "unreadable": 1,
    }
    assert sum(found["rows"]["reasons"].values()) == found["rows"]["left_out"] == 28
    assert sum(found["rows"]["splits"].values()) == 60
    assert "; 28 left out: 8 exact_duplicates, 7 longer than data.max_length=200 tokens, 6 leftovers," in in_short(
        found
    )


def test_rows_left_out_of_a_source_that_is_mixed_in_are_its_own(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows(90)[60:], {"output": "o"}]))
    mix = {"general": MixConfig(path=str(tmp_path / "mix.jsonl"))}
    found = report(prepared(replace(file(tmp_path, rows(60)), mix=mix)))
    assert [source["left_out"] for source in found["sources"]] == [{}, {"missing_fields": 1}]
    assert found["rows"]["reasons"] == {}


# ---------------------------------------------------------------------------------------------- what cannot be prepared


def whole_stores(tmp_path: Path) -> list[Path]:
    tokens = tmp_path / "cache" / "tokens"
    return [path for path in tokens.iterdir() if path.is_dir()] if tokens.exists() else []


def test_data_that_is_all_too_long_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no row is left to train on, of 40 read \(40 longer than data\.max_length=20 tokens"
    ):
        prepared(replace(file(tmp_path, rows(40)), max_length=20))
    assert not whole_stores(tmp_path)


@pytest.mark.parametrize(("validation", "test", "empty"), [(1e-9, 0.2, "validation"), (0.2, 1e-9, "test")])
def test_a_split_without_rows_is_refused(
    validation: float, test: float, empty: str, prepared: Prepare, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"data\.{empty}=1e-09 leaves no row in the {empty} split.*raise the share"):
        prepared(replace(file(tmp_path, rows(60)), validation=validation, test=test))


def test_one_row_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leaves no row|no row is left"):
        prepared(file(tmp_path, rows(1)))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_rows_are_refused(content: str, prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"there are no rows in .*none\.jsonl; name another file"):
        prepared(FileDataConfig(path=str(tmp_path / "none.jsonl")))


def test_a_file_of_malformed_rows_is_refused_and_the_report_says_why(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\nnot json\n" * 3)
    with pytest.raises(DataRefused, match=r"no row is left.*3 unreadable, 3 missing_fields; the first at") as caught:
        prepared(FileDataConfig(path=str(tmp_path / "bad.jsonl")))
    assert caught.value.report["findings"]["unreadable"]["count"] == 3
    assert not whole_stores(tmp_path)


def test_more_left_out_than_allowed_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    cfg = file(tmp_path, rows(60) + [{"instruction": "i", "output": ""}] * 70)
    with pytest.raises(
        UserError, match=r"54% of the rows would be left out, more than data\.quality\.max_dropped=0\.5"
    ):
        prepared(cfg)
    cfg.quality.max_dropped = 0.6
    assert sum(prepared(cfg).rows.values()) == 60


def test_a_full_disk_leaves_no_store_and_says_so(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: writing fails half-way just so."""
    cfg = file(tmp_path, rows(300))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from raytune_lora.cache import Cache\n"
        "from raytune_lora.config.data import FileDataConfig\n"
        "from raytune_lora.data.prepare import prepare\n"
        "from raytune_lora.errors import UserError\n"
        "from raytune_lora.models.sources import byte_tokenizer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))\n"
        "try: prepare(FileDataConfig(path=sys.argv[1]), byte_tokenizer, 'bytes', Cache(Path(sys.argv[2])))\n"
        "except UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(cfg.path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "the token store cannot be written" in done.stdout
    assert "make room" in done.stdout
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))
    assert not whole_stores(tmp_path)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 40_000


class Dying:
    """A tokenizer whose process is ended, as the system does where memory is short."""

    eos_token_id = pad_token_id = 1
    is_fast = True
    bos_token_id = chat_template = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, *_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_ended_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was ended from outside.*data\.processes=1"):
        prepare(replace(file(tmp_path, rows(2500)), processes=2), Dying, "dying", Cache(tmp_path / "cache"))
    assert not whole_stores(tmp_path)


# ----------------------------------------------------------------------------------------------------- when it is built


@pytest.mark.parametrize(
    "other",
    [
        FakeDataConfig(rows=61),
        FakeDataConfig(rows=60, seed=1),
        FakeDataConfig(rows=60, max_length=500),
        FakeDataConfig(rows=60, validation=0.2),
        FakeDataConfig(rows=60, test=0.2),
    ],
    ids=["rows", "seed", "max_length", "validation", "test"],
)
def test_each_setting_has_a_store_of_its_own(other: FakeDataConfig, prepared: Prepare) -> None:
    store = prepared(FakeDataConfig(rows=60))
    assert prepared(other).folder != store.folder
    assert prepared(FakeDataConfig(rows=60)).folder == store.folder


def test_each_tokenizer_and_each_content_has_a_store_of_its_own(prepared: Prepare, tmp_path: Path) -> None:
    first = prepared(file(tmp_path, rows(60)))
    assert prepared(file(tmp_path, rows(60)), "another").folder != first.folder
    assert prepared(file(tmp_path, rows(61))).folder != first.folder


def test_a_moved_file_is_the_same_data(prepared: Prepare, tmp_path: Path) -> None:
    first = prepared(file(tmp_path, rows(60)))
    (tmp_path / "elsewhere").mkdir()
    assert prepared(file(tmp_path / "elsewhere", rows(60))).folder == first.folder


def state(store: TokenStore) -> dict[Path, tuple[int, int]]:
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_a_store_is_built_once(prepared: Prepare) -> None:
    store = prepared(FakeDataConfig(rows=60))
    before = state(store)
    assert prepared(FakeDataConfig(rows=60)) == store
    assert state(store) == before
    assert store.rows == {"train": 51, "validation": 6, "test": 3}


@pytest.mark.parametrize("victim", ["train.arrow", "validation.arrow", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_store_is_built_anew(victim: str, damage: str, prepared: Prepare) -> None:
    cfg = FakeDataConfig(rows=60)
    store = prepared(cfg)
    whole = [list(store.split(split)) for split in SPLITS]
    path = store.folder / victim
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    again = prepared(cfg)
    assert again == store
    assert [list(again.split(split)) for split in SPLITS] == whole


def test_several_processes_write_what_one_writes(prepared: Prepare, tmp_path: Path) -> None:
    cfg = file(tmp_path, rows(2500))
    stores = {}
    for processes in (1, 2):
        store = prepared(replace(cfg, processes=processes))
        stores[processes] = [list(store.split(split)) for split in SPLITS], report(store)
        for path in store.folder.iterdir():
            path.unlink()
    assert stores[1] == stores[2]


def test_a_split_may_be_empty(prepared: Prepare) -> None:
    store = prepared(FakeDataConfig(rows=60, test=0.0))
    assert store.rows["test"] == len(store.split("test")) == len(store.lengths("test")) == 0


# ---------------------------------------------------------------------------------- what the store's address stands for


def test_files_that_the_config_names_count_by_content(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, words = tmp_path / "own.jinja", tmp_path / "words.yaml"
    turns = "{% for m in messages %}<X{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    turns += "{% if add_generation_prompt %}<Xassistant>{% endif %}"
    template.write_text(turns.replace("X", "1"))
    words.write_text("en: [nosuchword]\n")
    cfg = file(tmp_path, rows(60))
    cfg.template.kind, cfg.template.chat_template = TemplateKind.chat, str(template)
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg.quality.harmful_words = "~/words.yaml"
    first = prepared(cfg)
    assert prepared(cfg).folder == first.folder
    template.write_text(turns.replace("X", "2"))
    edited = prepared(cfg)
    assert edited.split("train")[0]["input_ids"] != first.split("train")[0]["input_ids"]
    assert edited.manifest["content"] != first.manifest["content"]
    words.write_text("en: [write]\n")
    told = prepared(cfg)
    assert report(edited)["findings"]["harmful"]["count"] == 0
    assert report(told)["findings"]["harmful"]["count"] > 0
    assert told.manifest["content"] == edited.manifest["content"], "the tokens are the same"
    (tmp_path / "elsewhere.jinja").write_text(template.read_text())
    cfg.template.chat_template = str(tmp_path / "elsewhere.jinja")
    assert prepared(cfg).folder == told.folder, "where a file lies does not matter"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("special_tokens_map.json", True),
        ("added_tokens.json", True),
        ("spiece.model", True),
        ("sentencepiece.bpe.model", True),
        ("vocab.txt", True),
        ("qwen.tiktoken", True),
        ("tekken.json", True),
        ("tokenization_own.py", True),
        ("config.json", True),
        ("model.safetensors", False),
        ("model.safetensors.index.json", False),
        ("pytorch_model.bin", False),
        ("README.md", False),
    ],
)
def test_every_file_that_a_tokenizer_may_read_counts_by_content(name: str, counts: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    seen = [tokenizer_identity(tmp_path, HubModelConfig())]
    for content in ("first", "other"):
        path.write_text(content)
        seen.append(tokenizer_identity(tmp_path, HubModelConfig()))
    assert len(set(seen)) == (3 if counts else 1)


def test_code_that_may_run_counts(tmp_path: Path) -> None:
    ids = {tokenizer_identity(tmp_path, HubModelConfig(trust_remote_code=trust)) for trust in (False, True)}
    assert len(ids) == 2


def test_files_of_other_names_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("x")
    first = tokenizer_identity(tmp_path, HubModelConfig())
    (tmp_path / "vocab.json").rename(tmp_path / "merges.txt")
    assert tokenizer_identity(tmp_path, HubModelConfig()) != first
