"""What the methods that PEFT does not have share: files of their own, named after the method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raytune_lora.config.methods import MethodConfig
from raytune_lora.config.plain import to_plain
from raytune_lora.models.methods.base import C, Method, Start

METHOD, WEIGHTS = "method.json", "weights.safetensors"
_FORMAT = 1


class OwnMethod(Method[C]):
    """Saved as the trained parameters under their names in the model, with the method's config beside them."""

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        save_state(self.cfg, state, folder)

    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        adapted = self.apply(model, untouched(weights))
        state, known = load_state(folder), dict(adapted.named_parameters())
        if left := sorted(state.keys() - known.keys()):
            raise ValueError(f"{folder} was saved from another model: it has no {', '.join(left[:3])}")
        put(known, state)
        return adapted.requires_grad_(False).eval()


def put(parameters: dict[str, Any], state: dict[str, Any]) -> None:
    """Set parameters by name, also where ZeRO-3 has divided them: then on all workers at once."""
    import torch
    from peft.utils.integrations import gather_params_ctx

    with torch.no_grad():
        for name, tensor in state.items():
            with gather_params_ctx(parameters[name]):
                parameters[name].copy_(tensor)


def untouched(weights: Path) -> Start:
    """The start of a model that takes saved parameters and does not train."""
    return Start(steps=0, weights=weights, samples=lambda _: iter(()), earlier={})


def save_state(cfg: MethodConfig, state: dict[str, Any], folder: Path) -> None:
    """Write a method's config and trained parameters into a folder."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    text = json.dumps({"format": _FORMAT, "method": to_plain(cfg)}, indent=2)
    (folder / METHOD).write_text(text + "\n")


def load_state(folder: Path) -> dict[str, Any]:
    """The trained parameters of a folder."""
    from safetensors.torch import load_file

    return dict(load_file(folder / WEIGHTS))
