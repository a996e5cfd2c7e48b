"""Answers: the same for every batch, ended where the rows train their end, compared with the text that is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_lora.config.methods import METHODS
from raytune_lora.config.schema import Quantization, kind_of
from raytune_lora.data.encode import IGNORED, encode, spell
from raytune_lora.data.rows import ASSISTANT, USER
from raytune_lora.errors import UserError
from raytune_lora.evaluation import generate
from raytune_lora.evaluation.generate import answer, exact_match, stops
from raytune_lora.models.methods import method_for
from raytune_lora.training.batches import collate
from tests.unit import zoo
from tests.unit.chat_templates import CHAT, FAMILIES, Family, byte_level_tokenizer, talk
from tests.unit.method_bench import Bench, config

NEW = 5
STOP = [zoo.VOCAB - 1]
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # weights that answers depend on
MODELS: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "qwen2": _WIDE,
    "qwen3": _WIDE,
    "gemma2": _WIDE,
    "gpt2": {"n_embd": 64, "initializer_range": 0.1},
    "opt": {"init_std": 0.1},
    "bloom": {"initializer_range": 0.1},
    "roberta": {"initializer_range": 0.2},
    "mamba": {"initializer_range": 0.3},
    "lfm2": _WIDE,
    "rwkv": {},
    "bamba": {"initializer_range": 0.2},
    "zamba2": {"initializer_range": 0.2},
    "minimax": {"initializer_range": 0.2},
}
PROMPT = [kind for kind in map(kind_of, METHODS) if not method_for(config(kind)).packable]
COMBINATIONS = [
    *(("qwen2" if kind == "bitfit" else "llama", kind) for kind in map(kind_of, METHODS)),
    *((model, kind) for model in ("gpt2", "gemma2", "opt") for kind in PROMPT),
    *((model, kind) for model in ("bamba", "zamba2", "minimax") for kind in ("lora", "prompt_tuning")),
    ("roberta", "lora"),
    *((model, None) for model in MODELS),
]


@pytest.fixture(scope="module")
def folder(folder: Callable[..., Path]) -> Callable[[str], Path]:
    """Folders of models of the zoo, by name, with what this module changes."""
    return lambda name: folder(name, **MODELS[name])


def prompts() -> list[list[int]]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (length,), generator=drawn).tolist() for length in (9, 2, 5, 5, 14)]


@torch.no_grad()
def by_a_plain_loop(model: Any, prompt: Sequence[int], stop_ids: Sequence[int], new: int = NEW) -> list[int]:
    """Greedy, one token after the other, all computed anew for each: no cache and no padding."""
    ids = list(prompt)
    for _ in range(new):
        inputs = torch.tensor([ids])
        token = int(model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_too_little_memory_is_told_from_wrong_answers(tokenizer: Any) -> None:
    def answered(rows: int) -> list[str]:
        """Where memory ends for more rows at once than that, but not for a row's own logits."""
        model = zoo.build("llama", **_WIDE)

        def fill(_: Any, inputs: tuple[torch.Tensor]) -> None:
            if len(inputs[0]) > rows:
                torch.empty(2**60)

        model.model.layers[0].mlp.register_forward_pre_hook(fill)
        return answer(model, tokenizer, prompts(), stop_ids=STOP, batch=4, max_new_tokens=NEW)

    assert answered(1) == answered(4)  # one at a time
    with pytest.raises(generate.NoRoom, match="evaluation"):
        answered(0)


# ------------------------------------------------------------------------------------------------- the same in a batch


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_answers_in_a_batch_are_those_of_a_plain_loop(
    name: str, kind: str | None, folder: Callable[[str], Path], tokenizer: Any
) -> None:
    model = _model(folder(name), kind)
    expected = spell([by_a_plain_loop(model, prompt, STOP) for prompt in prompts()], tokenizer)
    assert len(set(expected)) > 1
    for batch in (1, 4):
        given = answer(model, tokenizer, prompts(), stop_ids=STOP, batch=batch, max_new_tokens=NEW)
        assert given == expected, batch


def _model(folder: Path, kind: str | None) -> Any:
    """With what a method trains moved from its start, or the base model; in fp64, where rounding decides nothing."""
    if kind is None:
        return _exact(Bench("full", folder).base())
    bases = method_for(config(kind)).bases
    model = Bench(kind, folder, Quantization.none if Quantization.none in bases else Quantization.nf4).applied().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model if getattr(model, "is_quantized", False) else _exact(model)


def _exact(model: Any) -> Any:
    """In fp64, which not every implementation of experts knows."""
    with contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation("batched_mm")
    return model.double()


@pytest.mark.parametrize(
    ("name", "kind", "cached", "several"),
    [
        ("roberta", None, True, True),
        ("llama", "prompt_tuning", True, True),
        ("llama", "prefix_tuning", True, True),
        ("bamba", "lora", True, True),
        ("bamba", "prompt_tuning", False, True),  # its positions count anew behind learned vectors
        ("minimax", "p_tuning", False, True),  # its cache says that it is empty, as long as its first layer's is
        ("rwkv", None, True, False),  # with a cache, it mixes what stands side by side
    ],
)
def test_a_cache_and_company_are_used_where_they_change_nothing(
    name: str, kind: str | None, cached: bool, several: bool, folder: Callable[[str], Path]
) -> None:
    settings = generate._PLAIN | {"max_new_tokens": NEW, "eos_token_id": STOP, "pad_token_id": 0}
    way = generate._way(_model(folder(name), kind), sorted(prompts(), key=len), settings, 4, generate.Group())
    assert (way.cached, way.batch > 1) == (cached, several)


def test_a_model_that_generates_something_else_is_refused(folder: Callable[[str], Path], tokenizer: Any) -> None:
    model = Bench("full", folder("llama")).base()
    prepare = model.prepare_inputs_for_generation

    def elsewhere(input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(input_ids, attention_mask=attention_mask, **kwargs)
        return inputs | {"input_ids": torch.full_like(inputs["input_ids"], 3)}

    model.prepare_inputs_for_generation = elsewhere
    with pytest.raises(UserError, match=r"evaluation\.generate_rows=0"):
        answer(model, tokenizer, prompts(), stop_ids=STOP, batch=4, max_new_tokens=NEW)


@pytest.mark.parametrize("blind_to", ["attention_mask", "position_ids"])
def test_a_model_that_sees_padding_is_not_given_any(
    blind_to: str, folder: Callable[[str], Path], tokenizer: Any
) -> None:
    model = Bench("full", folder("gpt2")).base()
    forward, widths = model.forward, []

    def careless(*arguments: Any, **inputs: Any) -> Any:
        inputs.pop(blind_to, None)
        widths.append(tuple(inputs["input_ids"].shape))
        return forward(*arguments, **inputs)

    model.forward = careless
    expected = [
        answer(model, tokenizer, [prompt], stop_ids=STOP, batch=4, max_new_tokens=NEW)[0] for prompt in prompts()
    ]
    assert answer(model, tokenizer, prompts(), stop_ids=STOP, batch=4, max_new_tokens=NEW) == expected
    assert (2, 5) in widths, "prompts of one length are answered together all the same"


def test_a_model_that_does_not_see_it_answers_prompts_of_all_lengths_at_once(
    folder: Callable[[str], Path], tokenizer: Any
) -> None:
    model = Bench("full", folder("llama")).base()
    forward, widths = model.forward, []

    def noted(*arguments: Any, **inputs: Any) -> Any:
        widths.append(tuple(inputs["input_ids"].shape))
        return forward(*arguments, **inputs)

    model.forward = noted
    answer(model, tokenizer, prompts(), stop_ids=STOP, batch=5, max_new_tokens=NEW)
    assert (5, 14) in widths


# ----------------------------------------------------------------------------------------------- settings of the model


def test_chance_is_left_out_and_the_other_settings_of_the_model_apply(
    folder: Callable[[str], Path], tokenizer: Any
) -> None:
    model = Bench("full", folder("llama")).base()
    plain = answer(model, tokenizer, prompts(), stop_ids=STOP, batch=2, max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, num_beams=2, max_length=3)
    model.generation_config.update(return_dict_in_generate=True, min_new_tokens=8, penalty_alpha=0.6, top_k=4)
    model.generation_config.update(prompt_lookup_num_tokens=3, min_length=100)
    model.generation_config.update(forced_bos_token_id=5, forced_eos_token_id=6)
    assert answer(model, tokenizer, prompts(), stop_ids=STOP, batch=2, max_new_tokens=8) == plain
    banned = by_a_plain_loop(model, prompts()[0], [])[0]
    model.generation_config.suppress_tokens = [banned]
    given = answer(model, tokenizer, prompts()[:1], stop_ids=STOP, batch=2, max_new_tokens=1)
    assert given != spell([[banned]], tokenizer)


def test_answers_end_at_any_of_the_stops(folder: Callable[[str], Path], tokenizer: Any) -> None:
    model = Bench("full", folder("llama")).base()
    whole = [by_a_plain_loop(model, prompt, [], 8) for prompt in prompts()]
    stop_ids = sorted({whole[0][3], whole[1][1]})
    expected = spell([by_a_plain_loop(model, prompt, stop_ids, 8) for prompt in prompts()], tokenizer)
    assert answer(model, tokenizer, prompts(), stop_ids=stop_ids, batch=5, max_new_tokens=8) == expected


def test_an_end_within_an_expected_answer_does_not_end_it(folder: Callable[[str], Path], tokenizer: Any) -> None:
    model = Bench("full", folder("llama")).base()
    whole = [by_a_plain_loop(model, prompt, [], 8) for prompt in prompts()]
    stop_ids = sorted({whole[0][3], whole[0][5], whole[1][1]})
    within = [1, 0, 2, 0, 8]
    ends = [[at for at, token in enumerate(ids) if token in stop_ids] for ids in whole]
    expected = [ids[: ([*at, *[8] * 9])[n]] for ids, at, n in zip(whole, ends, within, strict=True)]
    for batch in (1, 5):
        given = answer(model, tokenizer, prompts(), stop_ids=stop_ids, batch=batch, max_new_tokens=8, within=within)
        assert given == spell(expected, tokenizer)


def test_a_models_own_ends_count_unless_an_expected_answer_holds_one(
    folder: Callable[[str], Path], tokenizer: Any
) -> None:
    model = Bench("full", folder("llama")).base()
    model.generation_config.eos_token_id = [7, 8]
    eos = tokenizer.eos_token_id
    assert stops(model, tokenizer, [9], [[20, 21]]) == sorted({7, 8, 9, eos})
    assert stops(model, tokenizer, [9], [[20, 8], [9]]) == sorted({7, 9, eos}), "a trained end stays one"
    model.generation_config.eos_token_id = None
    assert stops(model, tokenizer, [9], [[20]]) == sorted({9, eos})


# --------------------------------------------------------------------------------- a model that has learned its answers

GPT_OSS = """{%- for m in messages -%}
{%- if m.role == 'user' -%}
<|start|>user<|message|>{{ m.content }}<|end|>
{%- elif loop.last -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
TOKENIZERS: dict[str, Callable[[], Any]] = {
    **{name: FAMILIES[name].tokenizer for name in ("chatml", "llama2", "llama3", "gemma", "qwen3", "marked")},
    "marked with a newline": lambda: _marked("{{- m.content + '<|end|>\\n' -}}"),
    "marked without an end": lambda: _marked("{{- m.content -}}"),
    "gpt-oss": lambda: byte_level_tokenizer(
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|endoftext|>"),
        eos_token="<|endoftext|>",
        chat_template=GPT_OSS,
    ),
    "an end that is no token": lambda: byte_level_tokenizer(
        ("<eos>",),
        eos_token="<eos>",
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
    ),
}
ANSWERS = {"a?": "ok", "bb?": "Four. Five.", "ccc?": "no\nway", "dddd?": "The capital"}


def _marked(answer: str) -> Any:
    family: Family = FAMILIES["marked"]
    template = family.template.replace("{{- m.content + '<|end|>' -}}{% endgen", f"{answer}{{% endgen")
    return replace(family, template=template).tokenizer()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_learned_answers_match_exactly(name: str) -> None:
    """Whatever ends a turn and whatever the template adds to an answer; untrained, none matches."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [talk((USER, question), (ASSISTANT, text)) for question, text in ANSWERS.items()]
    encoded = [each for each in encode(rows, CHAT, tokenizer) if each is not None]
    expected = [each.answer for each in encoded if each.answer is not None]
    trained = {each.input_ids[each.end] for each in encoded if each.end is not None}
    model = zoo.build("llama", vocab_size=len(tokenizer), hidden_size=64, initializer_range=0.1)
    stop_ids = stops(model, tokenizer, sorted(trained), expected)

    def matches() -> float:
        asked = [each.input_ids[: each.prompt_length] for each in encoded]
        given = answer(model, tokenizer, asked, stop_ids=stop_ids, batch=4, max_new_tokens=48)
        return exact_match(given, spell(expected, tokenizer))

    assert len(expected) == len(ANSWERS)
    assert all(
        text.split()[-1] in whole for text, whole in zip(ANSWERS.values(), spell(expected, tokenizer), strict=True)
    )
    assert matches() == 0
    _learn(model, collate([vars(each) for each in encoded], tokenizer.pad_token_id))
    assert matches() == 1


def _learn(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Train until each trained token is the likeliest after those before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    wanted = batch["labels"][:, 1:]
    for _ in range(400):
        output = model(**batch)
        if (output.logits[:, :-1].argmax(-1) == wanted)[wanted != IGNORED].all():
            return
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("not learned")
