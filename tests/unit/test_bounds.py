"""What others wrote comes to an end, and in a sentence: templates that loop, YAML that swells, code with a model."""

from __future__ import annotations

import json
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.compose import compose, dump, parse
from raytune_lora.config.data import TemplateConfig, TemplateKind
from raytune_lora.config.schema import HubModelConfig
from raytune_lora.config.yaml_text import read_yaml
from raytune_lora.data import endless
from raytune_lora.data.endless import Endless
from raytune_lora.data.harmful import load_words
from raytune_lora.data.rows import ASSISTANT, USER, Row, Turn
from raytune_lora.data.templates import render, writer
from raytune_lora.errors import UserError
from raytune_lora.models.export import load
from raytune_lora.models.record import RECORD
from raytune_lora.models.shape import shape_of_folder
from raytune_lora.models.tokenizer import load_tokenizer
from raytune_lora.tuning import relations
from raytune_lora.tuning.constraints import problems
from raytune_lora.tuning.relations import Unreadable
from tests.unit.chat_templates import byte_level_tokenizer

CHAT = TemplateConfig(kind=TemplateKind.chat)
LOOP = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
TALK = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
ROW = Row((Turn(USER, "a question"), Turn(ASSISTANT, "an answer")))


def tokenizer(template: str) -> Any:
    return byte_level_tokenizer(("<|im_start|>", "<|im_end|>", "<eos>"), eos_token="<eos>", chat_template=template)


# ------------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    "template",
    [
        LOOP + TALK,
        TALK + "{% if messages|length > 2 %}" + LOOP + "{% endif %}",  # where the template is tried out
        TALK + "{% if add_generation_prompt %}" + LOOP + "{% endif %}",
        "{% if 'question' in messages[0].content %}" + LOOP + "{% endif %}" + TALK,  # at one row alone
    ],
)
def test_a_template_without_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endless, "SECONDS", 0.3)
    write, began = writer(CHAT, tokenizer(template)), time.process_time()
    with pytest.raises(Endless, match="has computed for 0 s on one text and not come to an end"):
        write(ROW)
    assert time.process_time() - began < 5
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a'|center(10**10) }}",
        "{% set x = namespace(s='a' * 2**20) %}{% for i in range(20) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
        "{% set x = ('a' * 10**5)|replace('a', 'b' * 10**5) %}",
    ],
)
def test_a_template_that_swells_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endless, "MEMORY", 2**29)
    allowed = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(Endless, match=r"wants more than 0\.5 GiB of memory for one text"):
        writer(CHAT, tokenizer(template + TALK))(ROW)
    assert resource.getrlimit(resource.RLIMIT_DATA) == allowed
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_a_template_that_ends_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGPROF)
    assert "an answer" in render(ROW, CHAT, tokenizer(TALK)).text
    assert signal.getsignal(signal.SIGPROF) is handler
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(render(ROW, CHAT, tokenizer(TALK)).text))
    thread.start()
    thread.join()
    assert "an answer" in texts[0], "another thread has no signals"


# ----------------------------------------------------------------------------------------------------------------- YAML


def swelling(levels: int, line: str = "a{n}: &a{n} [{refs}]") -> str:
    lines = [
        line.format(n=n, refs=", ".join([f"*a{n - 1}"] * 10) if n else "x, x, x, x, x, x, x, x, x, x")
        for n in range(levels)
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (swelling(9), "with all that aliases (*name) repeat; at most 50,000 may"),
        ("a0: &a0 {x: 1}\n" + swelling(40, "a{n}: &a{n} {{<<: [{refs}]}}").partition("\n")[2], "with all that aliases"),
        ("a: &a [*a]", "nested more than 50 deep, or in itself"),
        ("[" * 2000, "nested more than 50 deep"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("x" * 2_000_001, "2,000,001 characters are more than are read"),
    ],
)
def test_yaml_that_swells_is_refused(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "config.yaml")
    assert said in str(caught.value)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    monkeypatch.setenv("RAYTUNE_LORA_CONF", str(tmp_path))
    with pytest.raises(UserError) as caught:
        compose(["experiment=mine"])
    assert str(tmp_path / "experiment" / "mine.yaml") in str(caught.value)


def test_aliases_may_repeat_a_little(tmp_path: Path) -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: *a}}", "x") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    assert read_yaml("", "x") is None
    (tmp_path / "words.yaml").write_bytes("en: ['one', 'two']\n".encode("utf-16"))
    load_words(str(tmp_path / "words.yaml"))


def test_a_config_that_was_written_is_read_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may be another's: what is in this machine's environment does not come into it."""
    monkeypatch.setenv("MINE", "a secret of mine")
    cfg = compose(["model=tiny", "data=fake"])
    for text in ("${oc.env:MINE}", "${output}", "a\\${b}", "a\\\\${b} $c {d}", "\\", "${"):
        cfg.tracking.project = text
        assert parse(dump(cfg), "config.yaml").tracking.project == text


# ------------------------------------------------------------------------------------------------------------ relations


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-" * 20_000 + "method.r <= 4", "it has 20,013 characters, and may have 1000"),
        ("-" * 900 + "method.r <= 4", "more than 50 operations stand within each other"),
        ("(" * 900 + "method.r" + ")" * 900 + "<= 4", "it has"),
        ("(" * 400 + "method.r" + ")" * 400 + "<= 4", "this is no comparison"),
        ("min(1, " * 100 + "1" + ")" * 100 + "<= 4", "more than 50 operations"),
        ("not " * 200 + "method.r <= 4", "it compares nothing"),
    ],
)
def test_relations_that_are_too_deep(text: str, said: str) -> None:
    with pytest.raises(Unreadable) as caught:
        relations.parse(text)
    assert said in str(caught.value)
    cfg = compose(["model=tiny", "data=fake"])
    cfg.search.constraints.relations = [text]
    (problem,) = problems(cfg)
    assert len(problem) < 500


def test_a_long_sum_is_a_relation() -> None:
    relations.parse(" + ".join(["method.r"] * 40) + " <= 4")


# ------------------------------------------------------------------------------------------------ code that comes along


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """A model of a kind that transformers does not know, whose code does not work here."""
    said = {"model_type": "mine", "auto_map": {"AutoConfig": "code_of.Mine", "AutoModelForCausalLM": "code_of.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code_of.Mine", None]}}))
    (tmp_path / "code_of.py").write_text("import not_there\n")
    return tmp_path


@pytest.mark.parametrize("read", [shape_of_folder, load_tokenizer])
def test_code_of_a_model_is_refused_or_told_in_a_sentence(read: Any, coded: Path) -> None:
    with pytest.raises(UserError, match=r"comes with code of its own.*set model\.trust_remote_code=true"):
        read(coded, HubModelConfig(path=str(coded)))
    with pytest.raises(UserError, match=r"does not work here \(ImportError: .*not_there"):
        read(coded, HubModelConfig(path=str(coded), trust_remote_code=True))


def test_an_exported_adapter_does_not_decide_that_code_is_trusted(tmp_path: Path) -> None:
    base = {"name": str(tmp_path), "revision": None, "trust_remote_code": True}
    (tmp_path / RECORD).write_text(json.dumps({"format": 1, "base": base, "method": {}}))
    with pytest.raises(UserError, match=r"comes with code of its own, .* load\(…, trust_remote_code=True\)"):
        load(tmp_path)
