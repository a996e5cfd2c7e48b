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
from torch.overrides import TorchFunctionMode

_TOKENS = 8  # of the row; more than any convolution in use is wide
_KNOWN: dict[tuple[type, str], Skeleton] = {}


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model on the meta device, with the names of what takes part when a row of text is trained on."""

    model: Any
    called: frozenset[str]  # modules whose forward runs
    trains: frozenset[str]  # parameters that would get a gradient
    read: frozenset[str] = frozenset()  # parameters that are used outside of their own module's forward
    embeds: bool = True  # whether it takes the embedding of tokens for the tokens, and all of it then takes part


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
            return Skeleton(whole, **_run(_made(cls, config, place), place, masked=masked))
        except Exception:  # the code of a model may do anything
            continue
    return Skeleton(whole, *_language_model(whole))


def _made(cls: type, config: Any, place: AbstractContextManager[Any]) -> Any:
    with place:
        return cls(copy.deepcopy(config))


def _run(model: Any, place: AbstractContextManager[Any], *, masked: bool) -> dict[str, Any]:
    """The fields of the skeleton, from a training step and an evaluation: RWKV's code rescales weights for that.

    The evaluation has vectors for tokens, if the model takes them.
    """
    _ignore_values(model)
    embedding, embeds = model.get_input_embeddings(), False
    with place:
        row = torch.zeros((1, _TOKENS), dtype=torch.long)
        others = {"use_cache": False} | ({"attention_mask": torch.ones((1, _TOKENS)).long()} if masked else {})
        with _Watch(model) as watch:
            logits = model.train()(input_ids=row, **others).logits
        logits.sum().backward()
        called, read = frozenset(watch.called), watch.read
        for key in ("inputs_embeds", "input_ids"):
            with contextlib.suppress(Exception), torch.no_grad(), _Watch(model) as again:
                model.eval()(**{key: embedding(row) if key == "inputs_embeds" else row}, **others)
                embeds = key == "inputs_embeds" and called <= again.called
                read |= again.read
                break
    named = list(model.named_parameters(remove_duplicate=False))  # shared ones by all their names
    return {
        "called": called,
        "trains": frozenset(name for name, p in named if p.grad is not None),
        "read": frozenset(name for name, p in named if id(p) in read),
        "embeds": embeds,
    }


def _ignore_values(model: Any) -> None:
    """Take the implementations that look at no values."""
    for setting, value in (("set_attn_implementation", "eager"), ("set_experts_implementation", "batched_mm")):
        with contextlib.suppress(AttributeError, ValueError):
            getattr(model, setting)(value)


class _Watch(TorchFunctionMode):
    """Sees which modules run, and which parameters one takes from another: adapters and packed weights hide those."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.called: set[str] = set()  # names of modules
        self.read: set[int] = set()  # ids of parameters
        self._running: list[Any] = []  # modules, the innermost last
        self._own: dict[int, set[int]] = {}  # ids of the modules that have a parameter
        for name, module in model.named_modules():
            for p in module.parameters(recurse=False):
                self._own.setdefault(id(p), set()).add(id(module))
            module.register_forward_pre_hook(lambda module, _inputs: self._running.append(module))
            module.register_forward_hook(lambda _module, _inputs, _output, name=name: self._end(name))

    def _end(self, name: str) -> None:
        self.called.add(name)
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self._running:  # no size or dtype
            used = {id(value) for value in args if isinstance(value, torch.nn.Parameter)}
            self.read |= {p for p in used if id(self._running[-1]) not in self._own.get(p, ())}
        return result


def quantized(skeleton: Skeleton) -> frozenset[str]:
    """The layers whose weights bitsandbytes holds once such a model is loaded in 4 or 8 bits.

    Transformers' own replacement is run on a copy: it takes neither subclasses of linear layers nor those that share
    weights. Of what it takes, ``loading`` unpacks the weights that the model's code reads itself.
    """
    from transformers import BitsAndBytesConfig
    from transformers.initialization import no_tie_weights
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    with no_tie_weights():  # as when it is loaded: the last weight counts, and may be a tied one
        model = _made(type(skeleton.model), skeleton.model.config, torch.device("meta"))
    before = dict(model.named_modules())
    said = getattr(model.config, "quantization_config", None) or {}  # of a checkpoint that is quantized already
    said = said if isinstance(said, dict) else said.to_dict()
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=said.get("llm_int8_skip_modules"))
    with _quiet():
        Bnb4BitHfQuantizer(settings, pre_quantized=bool(said))._process_model_before_weight_loading(model, None)
    packed = {name for name, module in model.named_modules() if module is not before.get(name)}
    return frozenset(name for name in packed if f"{name}.weight" not in skeleton.read)


def _language_model(model: Any) -> tuple[frozenset[str], frozenset[str]]:
    inside = [model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()]
    modules = {id(m) for part in inside if part is not None for m in part.modules()}
    parameters = {id(p) for part in inside if part is not None for p in part.parameters()}
    return (
        frozenset(name for name, m in model.named_modules() if id(m) in modules),
        frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in parameters),
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
