"""A model without weights: what it is made of, and which of that a row of text meets.

Adapters belong where text goes through a module's own ``forward``: not to a vision tower, and not to layers whose
weights are read past it (Mamba's ``dt_proj``), where PEFT's would have no effect and no gradient.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

_TOKENS = 8  # of the row; more than any convolution in use is wide
_UNKNOWN = "what its layers keep is not known, as its code does not run without values"
_LEARNED = 2  # virtual tokens, where PEFT's prompts are tried
_KNOWN: dict[tuple[type, str], Skeleton] = {}


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model on the meta device, with the names of what takes part when a row of text is trained on."""

    model: Any
    called: frozenset[str]  # modules whose forward runs
    trains: frozenset[str]  # parameters that would get a gradient
    keys: tuple[int, int, int] | None = None  # layers, and heads and width of the keys and values each of them keeps
    unprompted: str = ""  # why PEFT cannot put learned vectors before a row; empty where it can
    unprefixed: str = ""  # why PEFT cannot put learned keys and values before those of a row


def skeleton_of(model: Any) -> Skeleton:
    """The skeleton of a model, whatever quantization or ZeRO made of its weights; known ones are kept."""
    key = (type(model), model.config.to_json_string())
    if key not in _KNOWN:
        with torch.random.fork_rng(devices=[]), _quiet():
            _KNOWN[key] = _probed(type(model), model.config)
    return _KNOWN[key]


def _probed(cls: type, config: Any) -> Skeleton:
    """Run a row without values through the model, as far as its code works without values.

    Masks are looked into by the code of some models, their absence leads others into looking at positions; fake tensors
    are taken for those that ask whether they are traced. Where nothing works, the language model is all that its
    ``get_decoder`` holds, and the head.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    whole = _made(cls, config, torch.device("meta"))
    for place, masked in ((torch.device("meta"), True), (torch.device("meta"), False), (FakeTensorMode(), True)):
        try:
            called, trains = _run(_made(cls, config, place), place, masked=masked)
        except Exception:  # the code of a model may do anything
            continue
        return Skeleton(whole, called, trains, *_prompts(cls, config, place, masked=masked))
    return Skeleton(whole, *_language_model(whole), unprefixed=_UNKNOWN)


Row = dict[str, torch.Tensor]


def _row(*, masked: bool) -> Row:
    row = {"input_ids": torch.zeros((1, _TOKENS), dtype=torch.long)}
    return row | ({"attention_mask": torch.ones((1, _TOKENS), dtype=torch.long)} if masked else {})


def _prompts(
    cls: type, config: Any, place: AbstractContextManager[Any], *, masked: bool
) -> tuple[tuple[int, int, int] | None, str, str]:
    """What a model has for PEFT's learned prompts: see ``Skeleton``. Where a row runs, a row behind a prompt must."""
    from peft import PrefixTuningConfig, PromptTuningConfig, PromptTuningInit

    keys = _keys(_made(cls, config, place), place, masked=masked)
    width = _made(cls, config, place).get_input_embeddings().weight.shape[1]
    vectors = PromptTuningConfig(
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, **prompt_sizes(_LEARNED, (1, 1, width))
    )
    learned: list[tuple[Any, int]] = [(vectors, _LEARNED)]
    if keys is not None:
        learned.append((PrefixTuningConfig(**prompt_sizes(_LEARNED, keys)), 0))
    found = ["", ""]
    for which, (prompt, longer) in enumerate(learned):
        try:
            _run_behind(prompt, _made(cls, config, place), place, longer, masked=masked)
        except Exception as error:  # PEFT knows nothing of some models, and these nothing of it
            found[which] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return keys, found[0], found[1]


def prompt_sizes(tokens: int, keys: tuple[int, int, int]) -> dict[str, Any]:
    """Settings of PEFT's prompts, which it would read from configs that call them by other names, or mean others.

    Args:
        tokens: virtual ones.
        keys: layers, and heads and width of their keys and values; of input vectors 1, 1 and the embedding's width.
    """
    from peft import TaskType

    layers, heads, width = keys
    sizes = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}
    return {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": tokens} | sizes


def _keys(model: Any, place: AbstractContextManager[Any], *, masked: bool) -> tuple[int, int, int] | None:
    """Layers, heads and width of the keys and values that the model keeps of a row; None where layers differ."""
    try:
        with place, torch.no_grad():
            kept = model.eval()(**_row(masked=masked), use_cache=True).past_key_values
        kept = getattr(kept, "self_attention_cache", kept)
        if getattr(kept, "linear_cache", None):  # MiniMax's, beside its layers
            return None
        shapes = {(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in kept.layers}
    except Exception:  # no cache, or one without keys and values
        return None
    if len(shapes) != 1:
        return None
    ((keys, values),) = shapes
    return (len(kept.layers), keys[1], keys[3]) if keys == values and len(keys) == 4 else None


def _run_behind(prompt: Any, model: Any, place: AbstractContextManager[Any], longer: int, *, masked: bool) -> None:
    """A row behind a prompt of PEFT's, forward and back; raises where that goes wrong."""
    from peft import get_peft_model

    with place, _staying(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, prompt).train()
        logits = tuned(**_row(masked=masked), use_cache=False).logits
        logits.sum().backward()
        if logits.shape[1] != _TOKENS + longer:
            raise ValueError(f"{_TOKENS} tokens behind {_LEARNED} learned vectors give {logits.shape[1]} outputs")
    idle = [name for name, p in tuned.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise ValueError("what is learned gets no gradient")


def _made(cls: type, config: Any, place: AbstractContextManager[Any]) -> Any:
    with place:
        model: Any = cls(copy.deepcopy(config))
    for setting, value in (("set_attn_implementation", "eager"), ("set_experts_implementation", "batched_mm")):
        with contextlib.suppress(AttributeError, ValueError):
            getattr(model, setting)(value)  # neither looks at values
    return model


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """Modules stay where they were made: fake ones cannot be moved, not even to where they are."""
    move = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *_args, **_kwargs: module  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]


def _run(model: Any, place: AbstractContextManager[Any], *, masked: bool) -> tuple[frozenset[str], frozenset[str]]:
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: called.add(name))
    with place:
        model.train()(**_row(masked=masked), use_cache=False).logits.sum().backward()
    return frozenset(called), frozenset(name for name, p in model.named_parameters() if p.grad is not None)


def _language_model(model: Any) -> tuple[frozenset[str], frozenset[str]]:
    inside = [model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()]
    modules = {id(m) for part in inside if part is not None for m in part.modules()}
    parameters = {id(p) for part in inside if part is not None for p in part.parameters()}
    return (
        frozenset(name for name, m in model.named_modules() if id(m) in modules),
        frozenset(name for name, p in model.named_parameters() if id(p) in parameters),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of the probe into the log: the model itself has said it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
