"""The template that goes with an adapter: it gives the tokens that the rows were trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from raytune_lora.config.data import DataConfig, TemplateConfig, TemplateKind
from raytune_lora.data.encode import encode
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn
from raytune_lora.data.trained_template import TEMPLATE, TRIED, write_template
from raytune_lora.models.export import ADAPTER, export_adapter
from raytune_lora.models.sources import byte_tokenizer
from tests.unit.chat_templates import FAMILIES, byte_level_tokenizer

PATTERNS = {
    "alpaca": TemplateConfig(),
    "plain": TemplateConfig(system="{text}", with_input="{text}{input}", without_input="{text}", between=""),
    "own": TemplateConfig(
        system="S: {text}\n",
        with_input="질문 \"'\\ {{ x }} 😀 {% if %}{text} ({input})\nA:\n",
        without_input="Q: {text}\nA:\n",
        between=" | ",
    ),
}


def prepending() -> Any:
    """Llama-2's: every stretch between special tokens begins with a space, and the text with BOS."""
    tokenizer = FAMILIES["llama2"].tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "byte-level": lambda: byte_level_tokenizer(("<|im_end|>",), eos_token="<|im_end|>"),
    "metaspace": FAMILIES["llama2"].tokenizer,  # a space before the first stretch alone
    "prepending": prepending,
    "gemma": FAMILIES["gemma"].tokenizer,
}
ROWS = [
    Row((Turn(USER, "Name a colour of the sky."), Turn(ASSISTANT, "blue, 파란색"))),
    Row((Turn(USER, "다음을 번역하세요.", "Guten Tag {text}"), Turn(ASSISTANT, "안녕하세요"))),
    Row(
        (
            Turn(SYSTEM, "짧게 {x}"),
            Turn(USER, "One?"),
            Turn(ASSISTANT, "Two."),
            Turn(USER, "둘?"),
            Turn(ASSISTANT, "셋."),
        )
    ),
]


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} | ({"input": turn.input} if turn.input else {}) for turn in turns]


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_patterns_as_a_chat_template_give_the_tokens_of_the_token_store(
    name: str, patterns: str, tmp_path: Path
) -> None:
    cfg, tokenizer = PATTERNS[patterns], TOKENIZERS[name]()
    write_template(cfg, tokenizer, tmp_path)
    assert json.loads((tmp_path / TRIED).read_text()) == {"prompts": True, "rows": True, "parts": False}
    tokenizer.chat_template = (tmp_path / TEMPLATE).read_text()
    for row, own in zip(ROWS, encode(ROWS, DataConfig(kind="file", template=cfg), tokenizer), strict=True):
        assert own is not None
        assert tokenizer.apply_chat_template(messages(row.turns), return_dict=True)["input_ids"] == own.input_ids
        asked = tokenizer.apply_chat_template(messages(row.prompt), add_generation_prompt=True, return_dict=True)
        assert asked["input_ids"] == own.input_ids[: own.prompt_length]


def test_a_seam_that_a_tokenizer_joins_is_said(tmp_path: Path) -> None:
    """``A: `` and an answer share the space in one text, and not where each is tokenized apart."""
    write_template(TemplateConfig(without_input="Q: {text} A: "), TOKENIZERS["byte-level"](), tmp_path)
    assert json.loads((tmp_path / TRIED).read_text())["rows"] is False


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_template_goes_as_it_is(name: str, tmp_path: Path) -> None:
    write_template(TemplateConfig(kind=TemplateKind.chat), FAMILIES[name].tokenizer(), tmp_path)
    assert (tmp_path / TEMPLATE).read_text() == FAMILIES[name].template
    assert json.loads((tmp_path / TRIED).read_text()) == {"prompts": True, "rows": True, "parts": False}


def test_the_exported_tokenizer_writes_with_the_trained_template(tmp_path: Path) -> None:
    """Whatever the base model's files say, embedded or beside it; and what ends an answer is what was trained."""
    base, checkpoint, target = tmp_path / "base", tmp_path / "checkpoint", tmp_path / "adapter"
    byte_tokenizer().save_pretrained(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "embedded"}))
    (base / "chat_template.jinja").write_text("of the base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "temperature": 0.6}))
    (checkpoint / ADAPTER).mkdir(parents=True)
    (checkpoint / ADAPTER / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../x", "r": 4}))
    trained = tmp_path / "trained.jinja"
    trained.write_text("{{ messages[0].content }}!")
    record = {
        "base": {"name": "owner/name", "revision": "abc", "trust_remote_code": False, "stored_quantized": False}
        | {"loader": "AutoModelForCausalLM"},
        "dtype": "float32",
        "quantization": {"kind": "none"},
        "method": {"kind": "lora", "r": 4},
        "template": {"kind": "chat", "file": "trained.jinja", "prompts": True, "rows": True, "parts": False},
        "stop_ids": [1, 7],
        "measured": {"eval_loss": None, "exact_match": None},
    }
    export_adapter(checkpoint, target, model_folder=base, record=record, template=trained)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    assert "chat_template" not in json.loads((target / "tokenizer_config.json").read_text())
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": [1, 7], "temperature": 0.6}
    adapter = json.loads((target / "adapter_config.json").read_text())
    assert adapter == {"base_model_name_or_path": "owner/name", "revision": "abc", "r": 4}
    card = (target / "README.md").read_text()
    assert '"owner/name", dtype=torch.float32, revision="abc"' in card


def test_a_template_that_takes_parts_alone_is_asked_with_parts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    write_template(TemplateConfig(kind=TemplateKind.chat), tokenizer, tmp_path)
    assert json.loads((tmp_path / TRIED).read_text()) == {"prompts": True, "rows": True, "parts": True}
