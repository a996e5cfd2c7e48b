"""What the methods that PEFT knows have in common."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from raytune_lora.config.methods import ALL_LINEAR, TargetedMethodConfig
from raytune_lora.errors import UserError
from raytune_lora.models.methods.base import C, Method, Start
from raytune_lora.planning.shape import Linear, Shape

T = TypeVar("T", bound=TargetedMethodConfig)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's own names
_ADAPTER = "default"  # PEFT's name of a model's only adapter


class PeftMethod(Method[C]):
    """Applied, loaded and merged by PEFT, and saved in its format, so that plain PEFT loads it."""

    @abstractmethod
    def peft_config(self, model: Any, start: Start) -> Any:
        """PEFT's config for a base model."""

    def apply(self, model: Any, start: Start) -> Any:
        from peft import get_peft_model

        try:
            return get_peft_model(model, self.peft_config(model, start))
        except ValueError as error:
            raise UserError(f"method={self.cfg.kind} does not fit the model: {error}") from error

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        from peft import get_peft_model_state_dict

        named = state | dict(model.named_buffers(remove_duplicate=False))
        write_adapter(model, get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False), folder)

    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder).requires_grad_(False).eval()

    def merge(self, model: Any) -> Any:
        from raytune_lora.models.tying import untie_adapted

        if not self.mergeable:
            return super().merge(model)
        untie_adapted(model)
        return model.merge_and_unload()


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

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    config = deepcopy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)


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
        found = target_problems(self.cfg, shape)
        transposed = [linear.name for linear in self.targets(shape) if linear.transposed]
        if transposed and not self.on_transposed:
            found.append(
                f"method={self.cfg.kind} works on torch.nn.Linear alone, and {len(transposed)} of its targets are "
                f"Conv1D, with transposed weights ({transposed[0]} is one); take method=lora, or another model"
            )
        return found

    def targets(self, shape: Shape) -> list[Linear]:
        """The layers it works on."""
        return shape.targets(list(self.cfg.target_modules))


def target_problems(cfg: TargetedMethodConfig, shape: Shape) -> list[str]:
    """Names among ``target_modules`` that no linear layer of the model has."""
    names = list(cfg.target_modules)
    missing = [name for name in names if name != ALL_LINEAR and not shape.targets([name])]
    if not missing:
        return []
    known = sorted({linear.name.rpartition(".")[2] for linear in shape.linears})
    return [
        f"method.target_modules: the model has no linear layer called {', '.join(missing)}; "
        f"it has {', '.join(known)}, and {ALL_LINEAR} takes all but the head"
    ]
