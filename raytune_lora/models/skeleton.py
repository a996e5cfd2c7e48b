"""A model without weights: what it is made of, and which of that a row of text meets.

Adapters belong where text goes through a module's own ``forward``: not to a vision tower, and not to layers whose
weights are read past it (Mamba's ``dt_proj``), where PEFT's would have no effect and no gradient.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SAID = 300  # characters of an error that are shown
_TOKENS = 11  # of the row; more than any convolution in use is wide, and no multiple of what rows might be cut into
_UNKNOWN = "what its layers keep is not known, as its code does not run without values"
_NO_VECTORS = "its code does not run on vectors in place of tokens"
_NO_KEYS = "its code does not run behind keys and values that it has not computed"
_ITS_OWN = (AttributeError, TypeError, ValueError)  # of code that misses an input; torch has others for missing values
_LEARNED = 2  # virtual tokens, where PEFT's prompts are tried
_PICKER = "indexer"  # of tokens that are attended to, by their order: no gradient comes back from there
_KNOWN: dict[tuple[type, str], Skeleton] = {}


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model on the meta device, with the names of what takes part when a row of text is trained on."""

    model: Any
    called: frozenset[str]  # modules whose forward runs
    trains: frozenset[str]  # parameters that would get a gradient
    read: frozenset[str] = frozenset()  # parameters that are used outside of their own module's forward
    keys: tuple[int, int, int] | None = None  # layers, and heads and width of the keys and values each of them keeps
    unprompted: str = ""  # why PEFT cannot put learned vectors before a row; empty where it can
    unprefixed: str = ""  # why PEFT cannot put learned keys and values before those of a row
    unlike: frozenset[str] = frozenset()  # linear layers that give something else than inputs times weight
    untrained: str = ""  # what the model's code says where it cannot train on a row of text alone; empty where it can


class _Unfit(Exception):
    """A prompt does not do what it should; says why."""


def skeleton_of(model: Any) -> Skeleton:
    """The skeleton of a model, whatever quantization or ZeRO made of its weights; known ones are kept."""
    key = (type(model), model.config.to_json_string())
    if key not in _KNOWN:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), _quiet():
            _KNOWN[key] = _probed(type(model), model.config)
    return _KNOWN[key]


def _probed(cls: type, config: Any) -> Skeleton:
    """Run a row without values through the model, as far as its code works without values.

    Masks are looked into by the code of some models, their absence leads others into looking at positions; fake tensors
    are taken for those that ask whether they are traced. Where nothing works, the language model is all that its
    ``get_decoder`` holds, and the head; and all of it trains but what picks the tokens to attend to.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    whole = _made(cls, config, torch.device("meta"))
    untrained = ""
    for place, masked in ((torch.device("meta"), True), (torch.device("meta"), False), (FakeTensorMode(), True)):
        try:
            called, trains, read, unlike = _run(_runnable(cls, config, place), place, masked=masked)
        except Exception as error:  # the code of a model may do anything
            if masked and isinstance(error, _ITS_OWN):
                untrained = untrained or in_one_line(error)
            continue
        return Skeleton(whole, called, trains, read, *_prompts(whole, place, called, masked=masked), unlike)
    unlike = frozenset(name for name, m in whole.named_modules() if is_linear(m) and _own_forward(type(m)))
    unprompted = _NO_VECTORS if _needs_tokens(whole) else ""
    return Skeleton(
        whole,
        *_language_model(whole),
        unprompted=unprompted,
        unprefixed=_UNKNOWN,
        unlike=unlike,
        untrained=untrained,
    )


def in_one_line(error: Exception) -> str:
    """What an error says, cut where that is long."""
    said = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {said[:_SAID]}{'…' * (len(said) > _SAID)}"


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer, or GPT-2's transposed one."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def rescales(module: Any) -> bool:
    """Whether a module's code changes the weights within for evaluation, as RWKV's does."""
    return hasattr(module, "layers_are_rescaled")


def _own_forward(cls: type) -> bool:
    from transformers.pytorch_utils import Conv1D

    return getattr(cls, "forward", None) not in (torch.nn.Linear.forward, Conv1D.forward)


def _made(cls: type, config: Any, place: AbstractContextManager[Any]) -> Any:
    with place:
        return cls(copy.deepcopy(config))


def _runnable(cls: type, config: Any, place: AbstractContextManager[Any]) -> Any:
    """A model with the implementations that look at no values."""
    model = _made(cls, config, place)
    for setting, value in (("set_attn_implementation", "eager"), ("set_experts_implementation", "batched_mm")):
        with contextlib.suppress(AttributeError, ValueError):
            getattr(model, setting)(value)
    return model


def _row(*, masked: bool) -> dict[str, torch.Tensor]:
    row = {"input_ids": torch.zeros((1, _TOKENS), dtype=torch.long)}
    return row | ({"attention_mask": torch.ones((1, _TOKENS), dtype=torch.long)} if masked else {})


def _run(model: Any, place: AbstractContextManager[Any], *, masked: bool) -> tuple[frozenset[str], ...]:
    watch = _Watch(model)
    with place:
        row = _row(masked=masked)
        with watch:
            logits = model.train()(**row, use_cache=False).logits
        logits.sum().backward()
        called = frozenset(watch.called)
        with (
            watch,
            torch.no_grad(),
            contextlib.suppress(Exception),
        ):  # some code reads weights then alone: see ``rescales``
            model.eval()(**row, use_cache=False)
    named = list(model.named_parameters(remove_duplicate=False))  # shared ones by all their names
    return (
        called,
        frozenset(name for name, p in named if p.grad is not None),
        frozenset(name for name, p in named if id(p) in watch.read),
        frozenset(watch.unlike),
    )


def _prompts(
    whole: Any, place: AbstractContextManager[Any], called: frozenset[str], *, masked: bool
) -> tuple[tuple[int, int, int] | None, str, str]:
    """What a model has for PEFT's learned prompts: see ``Skeleton``. Where a row runs, a row behind a prompt must."""
    from peft import PrefixTuningConfig, PromptTuningConfig, PromptTuningInit

    cls, config = type(whole), whole.config
    keys = _keys(_runnable(cls, config, place), place, masked=masked)
    rows, width = whole.get_input_embeddings().weight.shape
    vocab = config.get_text_config().vocab_size
    vectors = PromptTuningConfig(
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, **prompt_sizes(_LEARNED, (1, 1, width))
    )
    learned: list[tuple[Any, int]] = [(vectors, _LEARNED)]
    if keys is not None:
        learned.append((PrefixTuningConfig(**prompt_sizes(_LEARNED, keys)), 0))
    found = ["", ""]
    for which, (prompt, longer) in enumerate(learned):
        try:
            if longer and rows != vocab:
                raise _Unfit(f"it looks for an embedding of vocab_size={vocab} rows, and the model's has {rows}")
            with place:
                row = _row(masked=masked)
            _run_behind(prompt, _runnable(cls, config, place), place, row, longer, called)
        except _Unfit as error:
            found[which] = str(error)
        except Exception:  # PEFT knows nothing of some models, and these nothing of it
            found[which] = (_NO_VECTORS, _NO_KEYS)[which]
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


def _run_behind(
    prompt: Any,
    model: Any,
    place: AbstractContextManager[Any],
    row: dict[str, torch.Tensor],
    longer: int,
    called: frozenset[str],
) -> None:
    """A row behind a prompt of PEFT's, forward and back; raises where that goes wrong."""
    from peft import get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = isinstance(place, FakeTensorMode)
    with place, _staying() if fake else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch = _Watch(model)
        tuned = get_peft_model(model, prompt).train()
        with watch:
            logits = tuned(**row, use_cache=False).logits
        logits.sum().backward()
        if logits.shape[1] != _TOKENS + longer:
            raise _Unfit(f"{_TOKENS} tokens behind {_LEARNED} learned vectors give {logits.shape[1]} outputs")
    if idle := sorted(called - watch.called):  # Gemma 3n has more of each token than its vector
        raise _Unfit(f"{idle[0]} does not take part behind learned vectors")
    if [name for name, p in tuned.named_parameters() if p.requires_grad and p.grad is None]:
        raise _Unfit("what is learned gets no gradient")


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """Modules stay where they were made: fake ones cannot be moved, not even to where they are."""
    move = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *_args, **_kwargs: module  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]


class _Watch(TorchFunctionMode):
    """Sees which modules run, and which parameters one takes from another: adapters and packed weights hide those."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.called: set[str] = set()  # names of modules
        self.read: set[int] = set()  # ids of parameters
        self.unlike: set[str] = set()  # names of linear layers whose outputs are not of their width
        self._running: list[Any] = []  # modules, the innermost last
        self._own: dict[int, set[int]] = {}  # ids of the modules that have a parameter
        for name, module in model.named_modules():
            for p in module.parameters(recurse=False):
                self._own.setdefault(id(p), set()).add(id(module))
            module.register_forward_pre_hook(lambda module, _inputs: self._running.append(module))
            module.register_forward_hook(lambda *given, name=name: self._end(name, *given))

    def _end(self, name: str, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.called.add(name)
        self._running.pop()
        if inputs and is_linear(module):
            width = getattr(module, "out_features", None) or module.nf
            if getattr(output, "shape", None) != (*inputs[0].shape[:-1], width):
                self.unlike.add(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self._running:  # no size or dtype
            used = {id(value) for value in args if isinstance(value, torch.nn.Parameter)}
            self.read |= {p for p in used if id(self._running[-1]) not in self._own.get(p, ())}
        return result


def quantized(skeleton: Skeleton) -> frozenset[str]:
    """The layers whose weights bitsandbytes holds once such a model is loaded in 4 or 8 bits.

    Of what transformers gives it, ``loading`` unpacks the weights that the model's code reads itself.
    """
    return given_to_bitsandbytes(skeleton) - read_past(skeleton)


def read_past(skeleton: Skeleton) -> frozenset[str]:
    """The modules whose weight is read outside of their own forward."""
    return frozenset(name.removesuffix(".weight") for name in skeleton.read)


def given_to_bitsandbytes(skeleton: Skeleton) -> frozenset[str]:
    """The layers that transformers replaces by bitsandbytes' where such a model is loaded in 4 or 8 bits.

    Its own replacement is run on a copy: it takes neither subclasses of linear layers nor those that share weights.
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
    return frozenset(name for name, module in model.named_modules() if module is not before.get(name))


def _language_model(model: Any) -> tuple[frozenset[str], frozenset[str]]:
    inside = [model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()]
    modules = {id(m) for part in inside if part is not None for m in part.modules()}
    parameters = {id(p) for part in inside if part is not None for p in part.parameters()}
    return (
        frozenset(name for name, m in model.named_modules() if id(m) in modules),
        frozenset(
            name
            for name, p in model.named_parameters(remove_duplicate=False)
            if id(p) in parameters and _PICKER not in name.split(".")
        ),
    )


def _needs_tokens(model: Any) -> bool:
    """Whether a layer takes the numbers of tokens, too, and nothing in their place."""
    from transformers import PreTrainedModel

    for module in model.modules():
        taken = inspect.signature(module.forward).parameters
        embeds = isinstance(module, PreTrainedModel) or module is model.get_input_embeddings()
        if "input_ids" in taken and "inputs_embeds" not in taken and not embeds:
            return True
    return False


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
