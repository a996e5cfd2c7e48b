"""What the methods that PEFT knows have in common."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from raytune_lora.config.methods import ALL_LINEAR, TargetedMethodConfig
from raytune_lora.errors import UserError
from raytune_lora.models.methods.base import C, Method, Start
from raytune_lora.planning.shape import UNMET, Linear, Shape, is_name

T = TypeVar("T", bound=TargetedMethodConfig)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's own names
_SHOWN = 4  # names in a message
BASE = "base_model.model."  # what PEFT puts before the names of the base model's modules
_ADAPTER = "default"  # PEFT's name of a model's only adapter


class PeftMethod(Method[C]):
    """Applied, loaded and merged by PEFT, and saved in its format, so that plain PEFT loads it."""

    @abstractmethod
    def peft_config(self, model: Any, start: Start) -> Any:
        """PEFT's config for a base model."""

    def apply(self, model: Any, start: Start) -> Any:
        from peft import get_peft_model

        try:
            return get_peft_model(model, self.narrowed(self.peft_config(model, start), model))
        except ValueError as error:
            raise UserError(f"method={self.cfg.kind} does not fit the model: {error}") from error

    def narrowed(self, config: Any, model: Any) -> Any:
        """PEFT's config, so that it goes where it should in this model and nowhere else."""
        return config

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        write_adapter(model, adapter_weights(model, state), folder)

    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder).requires_grad_(False).eval()

    def merge(self, model: Any) -> Any:
        from raytune_lora.models.tying import untie_adapted

        if not self.mergeable:
            return super().merge(model)
        untie_adapted(model)
        return model.merge_and_unload()


def adapter_weights(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What belongs to PEFT's adapter, by PEFT's names.

    Args:
        model: PEFT's.
        state: the trained parameters; one that several modules share, by its first name.
    """
    from peft import get_peft_model_state_dict

    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    trained = {name: state[owner] for name, owner in names.items() if owner in state}
    named = state | trained | dict(model.named_buffers(remove_duplicate=False))
    return get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)


def write_adapter(model: Any, weights: dict[str, Any], folder: Path, **changes: Any) -> None:
    """Write an adapter as PEFT does, without asking the hub about the base model.

    Args:
        model: PEFT's.
        weights: by PEFT's names.
        folder: there already.
        changes: to PEFT's config in the file.
    """
    from copy import deepcopy

    from safetensors.torch import save_file

    from raytune_lora.models.shape import shape_of

    others = {linear.name: linear.saved_as for linear in shape_of(model.get_base_model()).linears if linear.saved_as}
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}  # of tied modules, both
    apart = {_saved_as(name, others): tensor for name, tensor in copies.items()}
    save_file(apart, folder / WEIGHTS, {"format": "pt"})
    config = deepcopy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    if tied := getattr(config, "modules_to_tie", None):  # PEFT ties them again only if it reads both of their names
        config.modules_to_save = [*config.modules_to_save, *sorted(tied)]
        config.modules_to_tie = None
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)


def _saved_as(name: str, others: dict[str, str]) -> str:
    """PEFT's name of a weight, or for LoRA's of a layer that has another name in files, with that."""
    layer, lora, rest = name.removeprefix(BASE).partition(".lora_")
    return f"{BASE}{others[layer]}{lora}{rest}" if lora and layer in others else name


class TargetedMethod(PeftMethod[T]):
    """A PEFT method on linear layers that ``target_modules`` names.

    Attributes:
        on_transposed: whether PEFT has it for GPT-2's transposed layers, too.
    """

    on_transposed: ClassVar[bool] = True

    @property
    def target_modules(self) -> str | list[str]:
        """As PEFT takes them."""
        modules = list(self.cfg.target_modules)
        return ALL_LINEAR if modules == [ALL_LINEAR] else modules

    def problems(self, shape: Shape) -> list[str]:
        found = target_problems(list(self.cfg.target_modules), self.reach(shape), shape)
        transposed = [linear.name for linear in self.targets(shape) if linear.transposed]
        if transposed and not self.on_transposed:
            found.append(
                f"method={self.cfg.kind} works on torch.nn.Linear alone, and {len(transposed)} of its targets are "
                f"Conv1D, with transposed weights ({transposed[0]} is one); take method=lora, or another model"
            )
        return found

    def targets(self, shape: Shape) -> list[Linear]:
        """The layers it works on."""
        return self.reach(shape)

    def reach(self, shape: Shape) -> list[Linear]:
        """The layers among ``target_modules`` that it could work on."""
        return shape.targets(list(self.cfg.target_modules))

    def left_out(self, shape: Shape) -> list[str]:
        return layers_apart(list(self.cfg.target_modules), shape) + experts_apart(shape)

    def narrowed(self, config: Any, model: Any) -> Any:
        """The layers are named in full where the names as typed would take others too: a vision tower's, a router."""
        from raytune_lora.models.shape import shape_of

        shape = shape_of(model)
        targets, words = self.targets(shape), list(self.cfg.target_modules)
        if len(targets) < len(shape.named(words)) or not all(map(is_name, words)):
            config.target_modules = {linear.name for linear in targets}
        return config


def layers_apart(names: list[str], shape: Shape) -> list[str]:
    """The linear layers among ``target_modules`` that no adapter goes to, by reason."""
    found: dict[str, dict[str, None]] = {}
    met = [linear.name for linear in shape.linears if linear.apart != UNMET]
    for linear in shape.named(names):
        if linear.apart:
            place = _outermost(linear.name, met) if linear.apart == UNMET else linear.name
            found.setdefault(linear.apart, {})[anywhere(place)] = None
    return [f"{few(places)} ({why})" for why, places in found.items()]


def _outermost(name: str, met: list[str]) -> str:
    """The largest module around a layer that holds no layer that text meets: a vision tower, a cross-attention."""
    parts = name.split(".")
    around = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((place for place in around if not any(m.startswith(f"{place}.") for m in met)), name)


def experts_apart(shape: Shape, remedy: str = "they are no linear layers") -> list[str]:
    """The weights of experts, where they are left as they are."""
    if not shape.experts:
        return []
    share = sum(experts.numel for experts in shape.experts) / shape.parameters
    places = dict.fromkeys(anywhere(experts.name) for experts in shape.experts)
    return [f"{few(places)}, {share:.0%} of the parameters ({remedy})"]


def anywhere(name: str) -> str:
    """A name with a star for the number of the layer."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def few(places: Iterable[str]) -> str:
    """The first of several names, and how many more there are."""
    shown = list(places)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def target_problems(names: list[str], targets: list[Linear], shape: Shape) -> list[str]:
    """Names among ``target_modules`` that no layer has which the method can work on.

    Args:
        names: ``target_modules``.
        targets: what the method works on.
        shape: of the model.
    """
    wanted = {linear.name for linear in targets}
    missing = [name for name in names if not wanted & {linear.name for linear in shape.named([name])}]
    if not missing:
        return []
    known = sorted({linear.name.rpartition(".")[2] for linear in shape.targets([ALL_LINEAR])} - set(shape.claimed))
    found = (
        f"method.target_modules: the model has no linear layer {_meant_by(missing)} that an adapter can go to; "
        f"it has {', '.join(known)}, and {ALL_LINEAR} takes all of these"
    )
    why = {linear.apart for name in missing for linear in shape.named([name]) if linear.apart}
    if set(missing) & {*shape.claimed, *(experts.name.rpartition(".")[2] for experts in shape.experts)}:
        adapted = (
            ""
            if any(experts.below for experts in shape.experts)
            else ": method.experts=true method.dropout=0 adapts those"
        )
        why.add(f"the weights of experts are no linear layers{adapted}")
    return ["; ".join([found, *sorted(why)])]


def _meant_by(words: list[str]) -> str:
    """Names, or regular expressions, which have to match a whole name such as model.layers.0.self_attn.q_proj."""
    names, rules = [w for w in words if is_name(w)], [w for w in words if not is_name(w)]
    called = [f"called {', '.join(names)}"] if names else []
    return " or ".join(called + ([f"whose whole name matches {', '.join(rules)}"] if rules else []))
