"""What a fine-tuning method is, and the registry of methods.

Nothing here or in the methods' own modules imports torch or PEFT until a model is there, so that a job's own process
can ask for counts and refusals at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from raytune_lora.config.methods import MethodConfig
from raytune_lora.config.schema import Quantization
from raytune_lora.planning.added import Added
from raytune_lora.planning.shape import Shape

C = TypeVar("C", bound=MethodConfig)

ANY = frozenset(Quantization)
FOUR_BITS = frozenset({Quantization.nf4, Quantization.fp4})
UNQUANTIZED = frozenset({Quantization.none})

_REGISTRY: dict[type[MethodConfig], type[Method[Any]]] = {}


@dataclass(frozen=True)
class Start:
    """What a method may look at when it is applied to a base model."""

    steps: int  # of the run
    weights: Path  # folder of the base model, unquantized
    samples: Callable[[int], Iterator[dict[str, Any]]]  # the run's first samples in batches, as the model takes them
    earlier: dict[str, Any] | None = None  # ``Method.extra_state`` of the run that goes on


class Method(ABC, Generic[C]):
    """Turns a frozen base model into one that trains, and back into files.

    A subclass names its config class and is registered by being defined. What it says of itself:

    Attributes:
        config_class: the dataclass of its config.
        mergeable: whether what it learned can be worked into the base model's own weights.
        bases: the quantizations of the base model it works on.
        stages: the ZeRO stages it works under.
        needs_deepspeed_off: whether it reads gradients at each step, which DeepSpeed has thrown away by then.
        packable: whether rows can lie end to end in one sequence.
        starts_as_base: whether the model computes the same before the first step as without the method.
        because: why it does not work on the other bases and stages.
        settled_from: the step from which on losses tell whether ``training.patience`` is at an end; set by ``apply``.
        apart: bases that it works on, but not under ZeRO-3, though it does work under that on others; and why.
    """

    config_class: ClassVar[type[MethodConfig]]
    mergeable: ClassVar[bool] = True
    bases: ClassVar[frozenset[Quantization]] = ANY
    stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    needs_deepspeed_off: ClassVar[bool] = False
    packable: ClassVar[bool] = True
    starts_as_base: ClassVar[bool] = True
    because: ClassVar[str] = ""
    apart: ClassVar[tuple[frozenset[Quantization], str]] = (frozenset(), "")
    settled_from: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("config_class")
        if own is None:  # a base of several methods
            return
        if own in _REGISTRY:
            raise TypeError(f"{own.__name__} has two methods: {_REGISTRY[own]} and {cls}")
        _REGISTRY[own] = cls

    def __init__(self, cfg: C) -> None:
        self.cfg = cfg

    @abstractmethod
    def apply(self, model: Any, start: Start) -> Any:
        """The model with what the method trains added and set trainable; its random start comes from torch's seed.

        Raises:
            UserError: the method does not fit the model.
        """

    @abstractmethod
    def count(self, shape: Shape) -> int:
        """How many parameters train on a model of that shape, exactly."""

    def added(self, shape: Shape) -> Added:
        """What the method adds to the memory of a model of that shape, ``count`` among it."""
        return Added(trained=self.count(shape))

    @abstractmethod
    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        """Write what was learned.

        Args:
            model: as ``apply`` made it; its weights may lie in parts on other workers and are not read.
            state: the trained parameters, whole, by their names in the model.
            folder: there already, and empty.
        """

    @abstractmethod
    def load(self, model: Any, folder: Path, weights: Path) -> Any:
        """A base model with what ``save`` wrote, frozen, in evaluation mode.

        Args:
            model: loaded as it was for the training.
            folder: that ``save`` wrote into.
            weights: folder of the base model, unquantized.
        """

    def merge(self, model: Any) -> Any:
        """The base model with what was learned worked into its weights, and no other use of them changed.

        Args:
            model: as ``load`` gave it.
        """
        raise NotImplementedError(f"{self.cfg.kind} cannot be merged")

    def problems(self, shape: Shape) -> list[str]:
        """Why the method does not fit a model of that shape; empty where it does."""
        return []

    def left_out(self, shape: Shape) -> list[str]:
        """Parts of such a model that one might think are trained and are not, each with the reason."""
        return []

    def parameter_groups(self, model: Any, learning_rate: float) -> list[dict[str, Any]] | None:
        """The optimizer's groups with ``params`` and ``lr`` each; None leaves one learning rate for all."""
        return None

    def penalty(self, model: Any) -> Any | None:
        """A scalar to add to the loss of each optimizer step, differentiable; None for none."""
        return None

    def after_step(self, model: Any, step: int) -> None:
        """Called after each optimizer step with its number from 1, before gradients are cleared."""

    def extra_state(self, model: Any) -> dict[str, Any]:
        """Tensors by name that a run needs to go on, beside the trained parameters.

        What ``apply`` found from the data or the weights and could not find again, and what was measured since.
        """
        return {}


def method_for(cfg: MethodConfig) -> Method[Any]:
    """The method of a config."""
    return _REGISTRY[type(cfg)](cfg)


def registered() -> dict[type[MethodConfig], type[Method[Any]]]:
    """All methods by their config class."""
    return dict(_REGISTRY)
