"""Methods that train some of the model's own weights, or all of them: full, BitFit and LayerNorm tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raytune_lora.config.methods import BitfitMethodConfig, FullMethodConfig, LayernormMethodConfig
from raytune_lora.models.methods.base import UNQUANTIZED, Method, Start
from raytune_lora.models.methods.own import OwnMethod
from raytune_lora.models.methods.peft_method import PeftMethod, anywhere, few
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import BYPASSED, IDLE, UNMET, Shape

CONFIG_NAME = "config.json"  # transformers'
_WITH_BIASES = "GPT-2, GPT-NeoX and Pythia, OPT, BLOOM, Phi, StarCoder2, and the attention of Qwen2 and Qwen2.5"


class Full(Method[FullMethodConfig]):
    """Saved as a whole model, so that transformers loads it."""

    config_class = FullMethodConfig
    bases = UNQUANTIZED
    because = "quantized weights cannot train: set quantization=none"

    def apply(self, model: Any, start: Start) -> Any:
        """All that text meets trains: a vision tower would have no gradient."""
        from raytune_lora.models.skeleton import skeleton_of

        self._dtype = model.dtype  # what trains is in fp32
        trains = skeleton_of(model).trains
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trains)
        return model

    def count(self, shape: Shape) -> int:
        return shape.parameters - shape.unmet

    def left_out(self, shape: Shape) -> list[str]:
        return [f"{shape.unmet:,} parameters ({UNMET}, or {IDLE})"] if shape.unmet else []

    def added(self, shape: Shape) -> Added:
        normed = shape.layers * shape.block.norm_width + shape.hidden
        return Added(self.count(shape), own=True, inputs=shape.linears, per_token=normed, from_start=True)

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        from raytune_lora.models.loading import keep_cache, keeps_cache

        weights = _untrained(model, set(state)) | {name: tensor.to(self._dtype) for name, tensor in state.items()}
        before = keeps_cache(model)
        keep_cache(model, True)  # it is off for the training alone
        model.save_pretrained(folder, state_dict=weights)
        keep_cache(model, before)
        config = json.loads((folder / CONFIG_NAME).read_text())  # transformers names the format that it was trained in
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        from raytune_lora.models.loading import keep_cache, keeps_cache

        place = {"device_map": {"": model.device}} if model.device.type == "cuda" else {}
        tuned = type(model).from_pretrained(folder, dtype=model.dtype, **place)
        keep_cache(tuned, keeps_cache(model))
        return tuned.requires_grad_(False).eval()

    def merge(self, model: Any) -> Any:
        return model


def _untrained(model: Any, trained: set[str]) -> dict[str, Any]:
    """What a model holds beside what trains: weights that text does not meet, and buffers."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    known = {name for alike in names.values() if alike & trained for name in alike}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in known}


class Bitfit(OwnMethod[BitfitMethodConfig]):
    """Every parameter called bias trains (arXiv:2106.10199)."""

    config_class = BitfitMethodConfig

    def apply(self, model: Any, start: Start) -> Any:
        from raytune_lora.models.shape_parts import biases

        model.requires_grad_(False)
        for _, parameter in biases(model):
            parameter.requires_grad_(True)
        return model

    def count(self, shape: Shape) -> int:
        return sum(size for _, size in shape.biases)

    def added(self, shape: Shape) -> Added:
        return Added(trained=self.count(shape), own=True)

    def merge(self, model: Any) -> Any:
        return model

    def problems(self, shape: Shape) -> list[str]:
        if shape.biases:
            return []
        return [
            "method=bitfit trains biases, and the model has none, as most newer ones; models that have some: "
            f"{_WITH_BIASES}; method=layernorm is as small and works on any"
        ]


class Layernorm(PeftMethod[LayernormMethodConfig]):
    """The scales, and shifts where there are, of normalization layers (arXiv:2312.11420)."""

    config_class = LayernormMethodConfig
    stages = frozenset({0, 1, 2})
    because = "PEFT copies the layers that train, and ZeRO-3 knows nothing of the copies"

    def peft_config(self, model: Any, start: Start) -> Any:
        from peft import LNTuningConfig, TaskType

        from raytune_lora.models.shape_parts import scales

        return LNTuningConfig(task_type=TaskType.CAUSAL_LM, target_modules=[name for name, _ in scales(model)])

    def problems(self, shape: Shape) -> list[str]:
        if shape.norms:
            return []
        return [
            "method=layernorm trains the weights of normalization layers, and those of this model have none that could "
            "train; take method=lora"
        ]

    def left_out(self, shape: Shape) -> list[str]:
        places = dict.fromkeys(anywhere(name) for name in shape.norms_apart)
        return [f"{few(places)} ({BYPASSED})"] if places else []

    def count(self, shape: Shape) -> int:
        return shape.norms

    def added(self, shape: Shape) -> Added:
        """PEFT trains copies; what the scales multiply is kept."""
        return Added(trained=self.count(shape), per_token=shape.layers * shape.block.norm_width + shape.hidden)
