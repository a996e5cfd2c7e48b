"""Which rows go where, and which stay out, seen from the files that a user has."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from raytune_lora.cache import Cache
from raytune_lora.config.data import Action, DataConfig, FileDataConfig, MixConfig
from raytune_lora.data import build
from raytune_lora.data.build import REPORT, DataRefused
from raytune_lora.data.prepare import prepare
from raytune_lora.data.sampling import held_out_order
from raytune_lora.data.splits import SPLITS
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError

Alpaca = dict[str, str]
Prepare = Callable[[DataConfig], TokenStore]


@pytest.fixture
def prepared(tokenizer: Any, tmp_path: Path) -> Prepare:
    return lambda cfg: prepare(cfg, lambda: tokenizer, "bytes", Cache(tmp_path / "cache"))


def words(draw: random.Random, count: int = 30) -> str:
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(count))


def rows(count: int, seed: int = 0) -> list[Alpaca]:
    draw = random.Random(seed)
    return [{"instruction": "Say it.", "input": words(draw), "output": f"a{seed}-{n}"} for n in range(count)]


def write(path: Path, content: list[Alpaca]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def mine(tmp_path: Path, content: list[Alpaca], **settings: Any) -> FileDataConfig:
    path = write(tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl", content)
    return FileDataConfig(path=path, validation=0.2, test=0.2, **settings)


def where(store: TokenStore) -> dict[str, str]:
    """The split of each answer."""
    return {answer: split for split in SPLITS for answer in store.split(split)["answer"]}


def findings(store: TokenStore) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store.folder / REPORT).read_text())["findings"]
    return found


def nearly(row: Alpaca, answer: str) -> Alpaca:
    return row | {"input": row["input"].upper() + "!", "output": answer}


# --------------------------------------------------------------------------------------------------------------- shares


def test_the_splits_are_near_their_shares(prepared: Prepare, tmp_path: Path) -> None:
    store = prepared(mine(tmp_path, rows(2000)))
    for split, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        assert store.rows[split] / 2000 == pytest.approx(share, abs=0.03)


def test_a_row_stays_in_its_split_whatever_is_added(prepared: Prepare, tmp_path: Path) -> None:
    few = where(prepared(mine(tmp_path, rows(100))))
    many = where(prepared(mine(tmp_path, [*rows(80, seed=1), *rows(100)[::-1]])))
    assert few.items() <= many.items()


def test_the_answer_decides_nothing(prepared: Prepare, tmp_path: Path) -> None:
    other = [row | {"output": row["output"] + " again"} for row in rows(100)]
    first, second = where(prepared(mine(tmp_path, rows(100)))), where(prepared(mine(tmp_path, other)))
    assert {f"{answer} again": split for answer, split in first.items()} == second


def test_a_stratum_keeps_its_shares_to_the_row(prepared: Prepare, tmp_path: Path) -> None:
    content = [row | {"kind": "rare" if n % 20 == 0 else "common"} for n, row in enumerate(rows(400))]
    kinds = {row["output"]: row["kind"] for row in content}
    store = prepared(mine(tmp_path, content, stratify="kind"))
    counts = Counter((kinds[answer], split) for answer, split in where(store).items())
    assert [counts["rare", split] for split in SPLITS] == [12, 4, 4]
    assert [counts["common", split] for split in SPLITS] == [228, 76, 76]


# ------------------------------------------------------------------------------------------ the order of held-out rows


def sorted_by_kind(count: int) -> list[Alpaca]:
    """A tenth is of one kind, and comes last."""
    return [row | {"kind": "b" if n >= count * 9 // 10 else "a"} for n, row in enumerate(rows(count))]


@pytest.mark.parametrize("files", [False, True])
def test_the_first_rows_of_a_file_sorted_by_kind_are_of_all_kinds(
    files: bool, prepared: Prepare, tmp_path: Path
) -> None:
    content = sorted_by_kind(1000)
    own = {f"{split}_path": write(tmp_path / f"{split}.jsonl", content) for split in SPLITS[1:]} if files else {}
    store = prepared(mine(tmp_path, rows(60, seed=1) if files else content, **own))
    kinds = {row["output"]: row["kind"] for row in content}
    for split in ("validation", "test"):
        assert store.rows[split] > 150
        first = Counter(kinds[answer] for answer in store.split(split)["answer"][:100])
        assert 2 <= first["b"] <= 22, "within four standard deviations of 10"


def test_the_order_is_of_the_rows_and_not_of_the_file(prepared: Prepare, tmp_path: Path) -> None:
    few, many = rows(300), [*rows(200, seed=1), *rows(300)[::-1]]
    for split in ("validation", "test"):
        order = prepared(mine(tmp_path, few)).split(split)["answer"][:]
        with_others = prepared(mine(tmp_path, many)).split(split)["answer"][:]
        assert order == [answer for answer in with_others if answer.startswith("a0-")]
        assert order != sorted(order, key=lambda answer: int(answer[3:]))


def test_a_training_split_stays_in_the_order_of_its_files(prepared: Prepare, tmp_path: Path) -> None:
    order = [int(answer[3:]) for answer in prepared(mine(tmp_path, rows(100))).split("train")["answer"]]
    assert order == sorted(order)


def test_every_prefix_of_a_stratified_split_keeps_the_shares(prepared: Prepare, tmp_path: Path) -> None:
    content = sorted_by_kind(300)
    others = [row | {"kind": "a"} for row in rows(60, seed=1)]
    store = prepared(mine(tmp_path, others, stratify="kind", validation_path=write(tmp_path / "v.jsonl", content)))
    kinds = {row["output"]: row["kind"] for row in content}
    assert farthest_from_shares([kinds[answer] for answer in store.split("validation")["answer"]]) <= 1.5


def farthest_from_shares(kinds: list[str]) -> float:
    """By how many rows a prefix misses the share of a kind, at most."""
    lengths = np.arange(1, len(kinds) + 1)
    counts = {kind: np.cumsum([one == kind for one in kinds]) for kind in set(kinds)}
    return max(float(np.abs(each - each[-1] / len(kinds) * lengths).max()) for each in counts.values())


def test_strata_of_a_row_each_come_as_by_chance() -> None:
    strata = [f"single {n}" if n < 400 else "common" for n in range(4000)]
    digests = np.random.default_rng(0).integers(0, 2**64, 4000, np.uint64)
    order = held_out_order(digests, strata)
    assert sorted(order) == list(range(4000))
    assert 25 < sum(strata[row] != "common" for row in order[:400]) < 60
    few = np.array(["common", *"abc"], dtype=object)[np.minimum(np.arange(4000) // 500, 3)].tolist()
    assert farthest_from_shares([few[row] for row in held_out_order(digests, few)]) <= 2.5


def test_rows_of_more_than_one_part_are_put_in_order_whole(
    prepared: Prepare, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_AT_ONCE", 37)
    monkeypatch.setattr(build, "_STRETCH", 40)
    content = rows(150)
    own = {"validation_path": write(tmp_path / "v.jsonl", content)}
    store = prepared(mine(tmp_path, rows(60, seed=1), processes=1, **own))
    seen = store.split("validation")
    by_answer = {row["output"]: row for row in content}
    assert sorted(seen["answer"]) == sorted(by_answer)
    for row in seen:
        assert by_answer[row["answer"]]["input"] in tokenizer.decode(row["input_ids"][: row["prompt_length"]])


# ----------------------------------------------------------------------------------------------------------- rows alike


def test_exact_duplicates_are_trained_once(prepared: Prepare, tmp_path: Path) -> None:
    content = rows(60)
    store = prepared(mine(tmp_path, content + content[:7] + content[:2]))
    assert sum(store.rows.values()) == 60
    found = findings(store)["exact_duplicates"]
    assert (found["count"], found["action"], len(found["examples"])) == (9, "drop", 5)
    assert found["examples"][0]["where"].endswith(".jsonl:61")
    assert found["examples"][0]["detail"].endswith(".jsonl:1")
    assert findings(store)["near_duplicates"]["count"] == findings(store)["contradictions"]["count"] == 0


def test_near_duplicates_stay_together(prepared: Prepare, tmp_path: Path) -> None:
    content = rows(150)
    copies = [nearly(row, f"copy {number}") for number, row in enumerate(content)]
    store = prepared(mine(tmp_path, content + copies))
    split = where(store)
    assert all(split[f"a0-{number}"] == split[f"copy {number}"] for number in range(150))
    found = findings(store)
    assert found["near_duplicates"]["count"] == 150
    assert 50 < found["leakage"]["count"] < 120, "as many would have been apart by chance: 1 - 0.6² - 2 * 0.2²"
    assert found["leakage"]["action"] == "keep together"
    assert sum(store.rows.values()) == 300
    cfg = mine(tmp_path, content + copies)
    cfg.quality.near_duplicates = Action.drop
    assert set(where(prepared(cfg))) == {row["output"] for row in content}


def test_rows_that_ask_the_same_stay_together_and_are_told(prepared: Prepare, tmp_path: Path) -> None:
    content = rows(60)
    others = [row | {"output": f"no {number}"} for number, row in enumerate(content[:9])]
    store = prepared(mine(tmp_path, content + others))
    split = where(store)
    assert all(split[f"a0-{number}"] == split[f"no {number}"] for number in range(9))
    found = findings(store)
    assert (found["contradictions"]["count"], found["near_duplicates"]["count"]) == (9, 0)
    assert "answers otherwise than" in found["contradictions"]["examples"][0]["detail"]


@pytest.mark.parametrize("asked", ["the same", "each its own"])
def test_answers_that_differ_in_a_word_are_near_duplicates(asked: str, prepared: Prepare, tmp_path: Path) -> None:
    draw = random.Random(0)
    content = [
        {"instruction": words(draw, 9) if asked != "the same" else "Tell a story.", "output": words(draw, 20)}
        for _ in range(200)
    ]
    copies = [row | {"output": row["output"].replace(row["output"].split()[7], "changed")} for row in content[:9]]
    cfg = mine(tmp_path, content + copies)
    found = findings(prepared(cfg))
    assert found["near_duplicates"]["count"] == 9
    assert found["contradictions"]["count"] == (208 if asked == "the same" else 9), "they answer otherwise all the same"
    cfg.quality.near_duplicates = Action.drop
    assert set(where(prepared(cfg))) == {row["output"] for row in content}


def test_a_long_fixed_instruction_makes_no_near_duplicates(prepared: Prepare, tmp_path: Path) -> None:
    draw = random.Random(0)
    fixed = {"instruction": words(draw, 80)}
    content = [fixed | {"input": words(draw, 6), "output": draw.choice("abc") + f"{n}"} for n in range(300)]
    copies = [nearly(row, row["output"] + "!") for row in content[:5]]
    store = prepared(mine(tmp_path, content + copies, max_length=1000))
    assert findings(store)["near_duplicates"]["count"] == 5
    assert store.rows["validation"] / 305 == pytest.approx(0.2, abs=0.06)
    split = where(store)
    assert all(split[row["output"]] == split[row["output"] + "!"] for row in content[:5])


def sentences(draw: random.Random, count: int) -> str:
    return " ".join(words(draw, 12).capitalize() + "." for _ in range(count))


def about_passages(draw: random.Random, families: int, size: int) -> list[dict[str, str]]:
    """Questions and answers, ``size`` about each passage."""
    passages = [sentences(draw, 10) for _ in range(families)]
    return [
        {"passage": passage, "question": f"Who is the {words(draw, 5)}?", "answer": words(draw, 2)}
        for passage in passages
        for _ in range(size)
    ]


FORMS: dict[str, Callable[[dict[str, str]], Alpaca]] = {
    "fixed instructions": lambda of: {"instruction": of["passage"], "input": of["question"], "output": of["answer"]},
    "passages": lambda of: {"instruction": of["question"], "input": of["passage"], "output": of["answer"]},
    "one field": lambda of: {
        "prompt": f"question: {of['question']} context: {of['passage']}",
        "completion": of["answer"],
    },
    "plain text": lambda of: {"text": f"### In:\n{of['passage']}\n\n{of['question']}\n\n### Out:\n{of['answer']}"},
    "labels": lambda of: {"prompt": f"{of['passage']}\n{of['question']}", "completion": of["answer"][-1]},
}


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_ask_different_things_about_one_text_are_not_near_duplicates(
    form: str, size: int, prepared: Prepare, tmp_path: Path
) -> None:
    draw = random.Random(0)
    content = about_passages(draw, 240 // size, size)
    copies = [of | {"passage": of["passage"].replace(of["passage"].split()[30], "changed")} for of in content[:60:7]]
    cfg = mine(tmp_path, [FORMS[form](of) for of in content + copies], max_length=4000)
    cfg.quality.near_duplicates = Action.drop
    store = prepared(cfg)
    found = findings(store)["near_duplicates"]
    assert found["count"] == len(copies)
    assert int(found["examples"][0]["where"].rpartition(":")[2]) == 241
    told = json.loads((store.folder / REPORT).read_text())
    assert told["rows"]["groups"]["count"] == 240 // size, "what is about one text stays in one split all the same"


def test_rows_about_a_text_of_held_out_rows_are_trained_on(prepared: Prepare, tmp_path: Path) -> None:
    every = [FORMS["passages"](of) for of in about_passages(random.Random(0), 12, 10)]
    held, content = every[::10], [row for number, row in enumerate(every) if number % 10]
    leak = [held[3] | {"input": held[3]["input"].replace(".", ";")}]
    cfg = mine(tmp_path, content + leak, max_length=4000, validation_path=write(tmp_path / "v.jsonl", held))
    cfg.test = 0.0
    store = prepared(cfg)
    assert findings(store)["leakage"]["count"] == 1
    assert store.rows == {"train": 108, "validation": 12, "test": 0}


def test_a_few_instructions_of_few_rows_each_can_be_divided(prepared: Prepare, tmp_path: Path) -> None:
    content = [FORMS["fixed instructions"](of) for of in about_passages(random.Random(0), 10, 12)]
    rows_of = prepared(mine(tmp_path, content, max_length=4000)).rows
    assert rows_of["validation"] / 120 == pytest.approx(0.2, abs=0.1)
    assert rows_of["test"] / 120 == pytest.approx(0.2, abs=0.1)


def test_too_few_groups_to_divide_are_the_reason_told(prepared: Prepare, tmp_path: Path) -> None:
    draw = random.Random(1)
    asked = [words(draw), words(draw)]
    content = [{"instruction": asked[n % 2], "output": words(draw)} for n in range(40)]
    cfg = mine(tmp_path, content)
    cfg.validation = cfg.test = 0.1
    with pytest.raises(
        DataRefused, match=r"40 rows make 2 groups .* the largest of 20, .*data\.validation_path"
    ) as told:
        prepared(cfg)
    assert "raise the share" not in str(told.value)
    cfg.validation_path = write(tmp_path / "v.jsonl", rows(9, seed=3))
    cfg.test_path = write(tmp_path / "t.jsonl", rows(9, seed=4))
    assert prepared(cfg).rows == {"train": 40, "validation": 9, "test": 9}


def test_rows_that_all_ask_the_same_are_divided_by_their_answers(prepared: Prepare, tmp_path: Path) -> None:
    store = prepared(mine(tmp_path, [{"instruction": "Tell a joke.", "output": row["input"]} for row in rows(500)]))
    assert store.rows["validation"] / 500 == pytest.approx(0.2, abs=0.06)


def test_nothing_is_looked_for_where_it_is_off(prepared: Prepare, tmp_path: Path) -> None:
    content = rows(60)
    cfg = mine(tmp_path, content + content)
    for name, value in vars(cfg.quality).items():
        if isinstance(value, Action) and name not in ("unreadable", "missing_fields", "wrong_types", "empty_fields"):
            setattr(cfg.quality, name, Action.off)
    cfg.pii.action = Action.off
    store = prepared(cfg)
    assert sum(store.rows.values()) == 120
    assert set(findings(store)) == {"unreadable", "missing_fields", "wrong_types", "empty_fields", "pii"}
    assert findings(store)["pii"] == {}


def test_a_finding_can_stop_the_job(prepared: Prepare, tmp_path: Path) -> None:
    cfg = mine(tmp_path, [*rows(60), nearly(rows(60)[3], "copy")])
    cfg.quality.near_duplicates = Action.stop
    with pytest.raises(DataRefused, match=r"near_duplicates in 1 rows, the first at .*:61: nearly .*:4"):
        prepared(cfg)


# -------------------------------------------------------------------------------------- files for splits and benchmarks


def test_own_files_for_validation_and_test_are_taken_whole(prepared: Prepare, tmp_path: Path) -> None:
    own = {
        "validation_path": write(tmp_path / "v.jsonl", rows(20, 1)),
        "test_path": write(tmp_path / "t.jsonl", rows(9, 2)),
    }
    store = prepared(mine(tmp_path, rows(60), **own))
    assert store.rows == {"train": 60, "validation": 20, "test": 9}


def said(count: int, *names: Any, column: str = "split") -> list[dict[str, Any]]:
    """Rows whose column says the names in turn."""
    return [row | {column: names[number % len(names)]} for number, row in enumerate(rows(count))]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_column_that_says_a_split_of_every_row_gives_the_splits(
    suffix: str, prepared: Prepare, tmp_path: Path
) -> None:
    content = said(60, "train", "Dev", "eval", "train", "train")
    path = tmp_path / f"all.{suffix}"
    if suffix == "jsonl":
        write(path, content)
    else:
        getattr(Dataset.from_list(content), f"to_{suffix}")(str(path))
    store = prepared(FileDataConfig(path=str(path)))
    of = {row["output"]: {"Dev": "validation", "eval": "test"}.get(row["split"], "train") for row in content}
    assert where(store) == of
    told = json.loads((store.folder / REPORT).read_text())
    assert findings(store)["unused_fields"]["count"] == 0
    assert [(source["role"], told["rows"]["read"][source["name"]]) for source in told["sources"]] == [
        ("data", 36),
        ("validation", 12),
        ("test", 12),
    ]
    assert (told["rows"]["left_out"], told["rows"]["groups"]["rows"]) == (0, 36)


def test_rows_that_a_column_holds_out_are_not_trained_on_in_other_words(prepared: Prepare, tmp_path: Path) -> None:
    content = said(60, "train", "test", "train", "train")
    leak = [dict(nearly(content[1], "leak"), split="train")]
    store = prepared(FileDataConfig(path=write(tmp_path / "all.jsonl", content + leak)))
    assert (store.rows["test"], findings(store)["leakage"]["count"]) == (15, 1)
    assert store.rows["validation"] > 0, "a share of the training rows, where the column says none"


@pytest.mark.parametrize(
    ("names", "unused"), [(("a", "b"), 60), (("train",), 0), (("test",), 0), (("train", "extra"), 30), ((3, 4), 60)]
)
def test_a_column_that_holds_no_rows_out_leaves_them_to_be_divided(
    names: tuple[Any, ...], unused: int, prepared: Prepare, tmp_path: Path
) -> None:
    store = prepared(mine(tmp_path, said(60, *names)))
    assert where(store) == where(prepared(mine(tmp_path, rows(60))))
    assert findings(store)["unused_fields"]["count"] == unused


def test_a_column_that_says_what_the_files_names_say_is_used(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number, name in enumerate(("train", "validation")):
        write(tmp_path / "rows" / f"{name}.jsonl", [row | {"split": name} for row in rows(30, seed=number)])
    store = prepared(FileDataConfig(path=str(tmp_path / "rows"), test=0.0))
    assert (store.rows, findings(store)["unused_fields"]["count"]) == ({"train": 30, "validation": 30, "test": 0}, 0)


def test_another_column_may_say_the_splits_and_none_may(prepared: Prepare, tmp_path: Path) -> None:
    content = [row | {"fold": "test"} for row in said(20, "train", "x")] + [*said(40, "train", "test")][20:]
    other = said(60, "train", "train", "test", column="part")
    assert prepared(mine(tmp_path, other, split_column="part")).rows["test"] == 20
    assert prepared(mine(tmp_path, other, split_column=None)).rows["test"] < 20
    with pytest.raises(
        UserError, match=r"'part' says train .* and test of others: data\.split_column=part uses them so"
    ):
        prepared(mine(tmp_path, other))
    for names in (("train", "test", "x"), ("dev", "test")):
        assert sum(prepared(mine(tmp_path, said(60, *names, column="part"))).rows.values()) == 60
    for settings in ({"split_column": None}, {"stratify": "split"}, {"columns": {"system": "split"}}):
        assert sum(prepared(mine(tmp_path, content, max_length=2000, **settings)).rows.values()) == 40


@pytest.mark.parametrize(
    ("names", "settings", "told"),
    [
        (("train", "test", "x"), {}, r"'split' says test of some rows, and no split of others \(the first at .*:3\);"),
        (("train", None, "dev"), {}, "says validation of some rows, and no split of others"),
        (("dev", "test"), {}, "says validation and test of some rows, and train of none"),
        (
            ("train", "test"),
            {"test_path": "v"},
            r"holds test rows, as 'split' says, beside those of .*t\.jsonl \(test\); leave",
        ),
        (("train", "test"), {"mix": "v"}, r"data\.mix\.general\.path: .* name a file of the rows to mix in alone"),
    ],
)
def test_a_column_that_leaves_open_what_rows_are_for_is_refused(
    names: tuple[Any, ...], settings: dict[str, str], told: str, prepared: Prepare, tmp_path: Path
) -> None:
    cfg = mine(tmp_path, said(60, *names))
    if "test_path" in settings:
        cfg.test_path = write(tmp_path / "t.jsonl", rows(9, seed=1))
    if "mix" in settings:
        cfg.mix, cfg.path = {"general": MixConfig(path=cfg.path)}, write(tmp_path / "own.jsonl", rows(60, seed=1))
    with pytest.raises(UserError, match=told) as caught:
        prepared(cfg)
    assert "data.split_column=null" in str(caught.value)
    cfg.split_column = None
    prepared(cfg)


@pytest.mark.parametrize("action", [Action.drop, Action.report])
def test_training_rows_that_leak_into_them_are_found(action: Action, prepared: Prepare, tmp_path: Path) -> None:
    content, held = rows(60), rows(20, seed=1)
    leaks = [held[0], nearly(held[1], "leak"), held[2] | {"output": "leak 2"}]
    cfg = mine(tmp_path, content + leaks, validation_path=write(tmp_path / "v.jsonl", held))
    cfg.quality.leakage, cfg.test = action, 0.0
    store = prepared(cfg)
    assert findings(store)["leakage"]["count"] == 3
    assert "which is not for training" in findings(store)["leakage"]["examples"][0]["detail"]
    assert store.rows == {"train": 60 if action is Action.drop else 63, "validation": 20, "test": 0}


@pytest.mark.parametrize("settings", [{}, {"stratify": "kind"}], ids=["hashed", "stratified"])
@pytest.mark.parametrize("held", ["test_path", "validation_path", "benchmarks"])
def test_a_row_of_a_named_split_is_in_no_split_that_is_divided_off(
    held: str, settings: dict[str, str], prepared: Prepare, tmp_path: Path
) -> None:
    content = [row | {"kind": "a"} for row in rows(80)]
    known = [*content[:30], *(nearly(row, f"near {n}") for n, row in enumerate(content[30:40])), *rows(10, seed=1)]
    path = write(tmp_path / "held.jsonl", [row | {"kind": "a"} for row in known])
    store = prepared(mine(tmp_path, content, **{held: [path] if held == "benchmarks" else path}, **settings))
    assert findings(store)["leakage"]["count"] == 40
    report = json.loads((store.folder / REPORT).read_text())
    assert report["rows"]["reasons"] == {"leakage": 40}
    others = sum(store.rows.values()) - (0 if held == "benchmarks" else len(known))
    assert others == 40
    if settings:
        assert store.rows["validation" if held == "test_path" else "test"] == 8


def test_rows_of_a_benchmark_are_not_trained_on(prepared: Prepare, tmp_path: Path) -> None:
    content = rows(60)
    bench = write(tmp_path / "bench.jsonl", [content[0], nearly(content[1], "x"), *rows(30, seed=3)])
    cfg = mine(tmp_path, content, benchmarks=[bench])
    cfg.validation, cfg.test = 0.1, 0.0
    split = where(prepared(cfg))
    assert "a0-0" not in split or split["a0-0"] != "train"
    assert "a0-1" not in split or split["a0-1"] != "train"
    assert not any(answer.startswith("a3-") for answer in split), "its own rows are not trained on either"


# --------------------------------------------------------------------------------------------------------------- mixing


def test_a_source_is_mixed_in_by_its_share(prepared: Prepare, tmp_path: Path) -> None:
    general = write(tmp_path / "general.jsonl", rows(200, seed=5))
    cfg = mine(tmp_path, rows(200), mix={"general": MixConfig(path=general, share=0.15)})
    store = prepared(cfg)
    split = where(store)
    mixed = {answer for answer in split if answer.startswith("a5-")}
    assert {split[answer] for answer in mixed} == {"train"}
    assert len(mixed) / store.rows["train"] == pytest.approx(0.15, abs=0.005)
    told = json.loads((store.folder / REPORT).read_text())
    assert told["mixed"]["general"] == {
        "asked": 0.15,
        "rows": len(mixed),
        "available": 200,
        "share": pytest.approx(len(mixed) / store.rows["train"], abs=1e-4),
    }
    assert told["rows"]["left_out"] == 0, "rows that are not needed are not faulty"
    assert {answer for answer in where(prepared(cfg)) if answer.startswith("a5-")} == mixed


def test_what_is_there_is_mixed_in_where_it_is_too_little(prepared: Prepare, tmp_path: Path) -> None:
    general = write(tmp_path / "general.jsonl", rows(3, seed=5))
    store = prepared(mine(tmp_path, rows(200), mix={"general": MixConfig(path=general, share=0.5)}))
    told = json.loads((store.folder / REPORT).read_text())["mixed"]["general"]
    assert (told["asked"], told["rows"]) == (0.5, 3)
    assert told["share"] < 0.03


def test_a_leak_from_what_is_mixed_in_is_found(prepared: Prepare, tmp_path: Path) -> None:
    held = rows(20, seed=1)
    general = write(tmp_path / "general.jsonl", [*held, *rows(60, seed=5)])
    cfg = mine(
        tmp_path,
        rows(200),
        mix={"general": MixConfig(path=general, share=0.2)},
        validation_path=write(tmp_path / "v.jsonl", held),
    )
    store = prepared(cfg)
    assert findings(store)["leakage"]["count"] == 20
    assert not any(answer.startswith("a1-") for answer in store.split("train")["answer"])


def test_rows_held_out_that_are_also_trained_on_do_not_contradict(prepared: Prepare, tmp_path: Path) -> None:
    content = rows(30)
    cfg = mine(tmp_path, content)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in content[:5]))
    cfg.validation_path = str(held)
    store = prepared(cfg)
    assert findings(store)["contradictions"]["count"] == 0
    assert findings(store)["leakage"]["count"] > 0
    assert not {row["output"] for row in content[:5]} & {a for a, split in where(store).items() if split == "train"}
