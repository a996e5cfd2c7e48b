"""What a fine-tuning method is, and the registry of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from raytune_lora.config.schema import MethodConfig

C = TypeVar("C", bound=MethodConfig)

_REGISTRY: dict[type[MethodConfig], type[Method[Any]]] = {}


class Method(ABC, Generic[C]):
    """Turns a frozen base model into one that trains.

    A subclass names its config class and is registered by being defined.
    """

    config_class: ClassVar[type[MethodConfig]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.config_class in _REGISTRY:
            raise TypeError(f"{cls.config_class.__name__} has two methods: {_REGISTRY[cls.config_class]} and {cls}")
        _REGISTRY[cls.config_class] = cls

    def __init__(self, cfg: C) -> None:
        self.cfg = cfg

    @abstractmethod
    def apply(self, model: Any) -> Any:
        """The model with what the method trains added and set trainable; its random start comes from torch's seed.

        Raises:
            UserError: the method does not fit the model.
        """


def method_for(cfg: MethodConfig) -> Method[Any]:
    """The method of a config."""
    return _REGISTRY[type(cfg)](cfg)
