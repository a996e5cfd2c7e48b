"""A model without weights: what it is made of, and which of that a row of text meets.

Adapters belong where text goes through a module's own ``forward``: not to a vision tower, and not to layers whose
weights are read past it (Mamba's ``dt_proj``), where PEFT's would have no effect and no gradient.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

_TOKENS = 8  # of the row; more than any convolution in use is wide
_KNOWN: dict[tuple[type, str], Skeleton] = {}


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model on the meta device, with the names of what takes part when a row of text is trained on."""

    model: Any
    called: frozenset[str]  # modules whose forward runs
    trains: frozenset[str]  # parameters that would get a gradient


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
        return Skeleton(whole, called, trains)
    return Skeleton(whole, *_language_model(whole))


def _made(cls: type, config: Any, place: AbstractContextManager[Any]) -> Any:
    with place:
        return cls(copy.deepcopy(config))


def _run(model: Any, place: AbstractContextManager[Any], *, masked: bool) -> tuple[frozenset[str], frozenset[str]]:
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: called.add(name))
    for setting, value in (("set_attn_implementation", "eager"), ("set_experts_implementation", "batched_mm")):
        with contextlib.suppress(AttributeError, ValueError):
            getattr(model, setting)(value)  # neither looks at values
    with place:
        row = torch.zeros((1, _TOKENS), dtype=torch.long)
        mask = {"attention_mask": torch.ones((1, _TOKENS), dtype=torch.long)} if masked else {}
        model.train()(input_ids=row, use_cache=False, **mask).logits.sum().backward()
    return frozenset(called), frozenset(name for name, p in model.named_parameters() if p.grad is not None)


def quantized(skeleton: Skeleton) -> frozenset[str]:
    """The layers whose weights bitsandbytes holds once such a model is loaded in 4 or 8 bits.

    Its own replacement is run on a copy: it takes neither subclasses of linear layers nor those that share weights.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    model = _made(type(skeleton.model), skeleton.model.config, torch.device("meta"))
    before = dict(model.named_modules())
    said = getattr(model.config, "quantization_config", None) or {}  # of a checkpoint that is quantized already
    said = said if isinstance(said, dict) else said.to_dict()
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=said.get("llm_int8_skip_modules"))
    with _quiet():
        Bnb4BitHfQuantizer(settings, pre_quantized=bool(said))._process_model_before_weight_loading(model, None)
    return frozenset(name for name, module in model.named_modules() if module is not before.get(name))


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
