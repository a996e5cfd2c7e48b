"""Single tensors out of a model folder's safetensors, without loading the model."""

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

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: of the model.

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

        stored = next((n for n in (name, name.partition(".")[2]) if n in self._files), None)
        if stored is None:
            raise UserError(f"model.path: {self._folder} stores no weight {name}; this method needs it as it was")
        with safe_open(self._folder / self._files[stored], framework="pt") as file:
            return file.get_tensor(stored)
