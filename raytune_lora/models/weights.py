"""Single tensors out of a model folder's safetensors, without loading the model.

Checkpoints of some architectures name them otherwise than today's code does; transformers' own rules translate.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_lora.errors import UserError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def is_transposed(layer: Any) -> bool:
    """Whether the checkpoint of a linear layer holds d_in x d_out, as GPT-2's Conv1D does; quantized or not."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)  # bitsandbytes' layers name what they replaced


class Weights:
    """The unquantized weights of a base model."""

    def __init__(self, folder: Path, model: Any) -> None:
        """
        Args:
            folder: of the model.
            model: itself, quantized or not, without adapters.

        Raises:
            UserError: it holds no safetensors.
        """
        self._folder = folder
        index = folder / _INDEX
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / _SINGLE).is_file():
            from safetensors import safe_open

            with safe_open(folder / _SINGLE, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), _SINGLE)
        else:
            raise UserError(
                f"model.path: {folder} holds no {_SINGLE}; this method reads the unquantized weights from it"
            )
        self._model = _whole(model)
        self._stored, self._converted = _stored_names(self._model, list(self._files))

    def linear(self, name: str, layer: Any) -> Any:
        """The weight of a linear layer, d_out x d_in.

        Args:
            name: of the layer in the model.
            layer: itself, quantized or not.

        Raises:
            UserError: there is none of that name.
        """
        weight = self.get(f"{name}.weight")
        return weight.T.contiguous() if is_transposed(layer) else weight

    def get(self, name: str) -> Any:
        """A tensor by its name in the model.

        Raises:
            UserError: there is none of that name.
        """
        if name in self._converted:
            found = self._converted[name].tensors(self._model, self._read)[name]
            return found[0] if isinstance(found, list) else found
        stored = self._stored.get(name)
        if stored is None:
            raise UserError(f"model.path: {self._folder} stores no weight {name}; this method needs it as it was")
        return self._read(stored)

    def _read(self, stored: str) -> Any:
        from safetensors import safe_open

        with safe_open(self._folder / self._files[stored], framework="pt") as file:
            return file.get_tensor(stored)


@dataclass
class _Conversion:
    """Tensors of a checkpoint that become others in the model, by a rule of transformers."""

    rule: Any
    first: str  # name of the first of what they become
    parts: list[tuple[str, str]] = field(
        default_factory=list
    )  # names of the tensors, each with its pattern of the rule

    def tensors(self, model: Any, read: Callable[[str], Any]) -> dict[str, Any]:
        """What they become, by name.

        Args:
            model: without weights.
            read: gives a tensor of the checkpoint.
        """
        rule = copy.deepcopy(self.rule)
        for stored, pattern in self.parts:
            rule.add_tensor(self.first, stored, pattern, read(stored))
        converted: dict[str, Any] = rule.convert(self.first, model=model, config=model.config)
        return converted

    def names(self) -> list[str]:
        first, *others = self.rule.target_patterns
        return [self.first, *(self.first.replace(first, other) for other in others)]


def _whole(model: Any) -> Any:
    from raytune_lora.models.skeleton import skeleton_of

    return skeleton_of(model).model


def _stored_names(model: Any, stored: list[str]) -> tuple[dict[str, str], dict[str, _Conversion]]:
    """By names in the model, the names in a checkpoint of what is stored as it is, and how the rest is made of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own, found, converted = model.state_dict(), dict[str, str](), dict[str, _Conversion]()
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if renamed not in own and name in own:  # a checkpoint of today's names
            renamed, pattern = name, None
        if pattern is None:
            found[renamed] = name
        else:
            rule = converted.setdefault(renamed, _Conversion(by_pattern[pattern], renamed))
            rule.parts.append((name, pattern))
    return found, {name: rule for rule in converted.values() for name in rule.names()}


def saved_names(model: Any, layers: list[str]) -> dict[str, str]:
    """The names to save LoRA's matrices of layers under, so that PEFT finds the layers again; none where it never does.

    On loading, PEFT renames what a checkpoint of the base model would call otherwise, and takes some of today's names
    for such. Then the checkpoint's own name is what it understands.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(model, add_legacy=False) if isinstance(rule, WeightRenaming)]
    back: list[Any] = [rule.reverse_transform() for rule in reversed(rules)]
    found = _found_by_peft(model, {layer: layer for layer in layers})
    lost = {layer: apply_renamings(layer, back) for layer in layers if layer not in found}
    return found | (_found_by_peft(model, found | lost) if lost else {})


def _found_by_peft(model: Any, names: dict[str, str]) -> dict[str, str]:
    """Those layers among ``names`` that PEFT finds if their matrices are saved under the other name."""
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    def key(name: str) -> str:
        return f"base_model.model.{name}.lora_A.weight"

    saved = {key(name): torch.empty(1, device="meta") for name in names.values()}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), saved)
    return {layer: name for layer, name in names.items() if key(layer) in loaded}
