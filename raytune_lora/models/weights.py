"""Single tensors out of a model folder's safetensors, without loading the model.

Checkpoints of some architectures name them otherwise than today's code does; transformers' own rules translate.
"""

from __future__ import annotations

import json
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
        self._stored = _stored_names(model, list(self._files))

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
        from safetensors import safe_open

        stored = self._stored.get(name)
        if stored is None:
            raise UserError(f"model.path: {self._folder} stores no weight {name}; this method needs it as it was")
        with safe_open(self._folder / self._files[stored], framework="pt") as file:
            return file.get_tensor(stored)


def _stored_names(model: Any, stored: list[str]) -> dict[str, str]:
    """The names in a checkpoint, by those in the model, of all that is stored as it is in the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from raytune_lora.models.skeleton import skeleton_of

    whole = skeleton_of(model).model
    rules = get_model_conversion_mapping(whole)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own, found = whole.state_dict(), {}
    for name in sorted(stored):
        renamed, converted = rename_source_key(name, renamings, converters, whole.base_model_prefix, own)
        if renamed not in own and name in own:  # a checkpoint of today's names
            renamed, converted = name, None
        if converted is None:
            found[renamed] = name
    return found


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
