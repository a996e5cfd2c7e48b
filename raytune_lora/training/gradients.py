"""Whether all that is to train gets a gradient: an adapter on a layer that the model goes around would never train."""

from __future__ import annotations

from typing import Any

from raytune_lora.errors import UserError
from raytune_lora.training.state import trained

_SHOWN = 3
_ROUTED = "expert"  # of those that are modules of their own, a token meets a few: the others wait for their turn


class FirstGradients:
    """Listens for the first gradient of each trainable parameter, whatever DeepSpeed makes of it afterwards."""

    def __init__(self, model: Any) -> None:
        self._handles = {name: p.register_hook(lambda _, name=name: self._seen(name)) for name, p in trained(model)}
        self._count = len(self._handles)

    def _seen(self, name: str) -> None:
        if name in self._handles:
            self._handles.pop(name).remove()

    def check(self, kind: str) -> None:
        """Stop listening after the first optimizer step.

        Args:
            kind: of the method.

        Raises:
            UserError: some parameters have had none; on every worker, as what a forward pass meets does not depend on
                the row.
        """
        silent = [name for name in self._handles if _ROUTED not in name]
        for name in list(self._handles):
            self._seen(name)
        if not silent:
            return
        more = f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
        raise UserError(
            f"method={kind}: {len(silent)} of {self._count} trainable parameters get no gradient "
            f"({', '.join(silent[:_SHOWN])}{more}): the model's forward pass goes around their layers on this machine, "
            "so that they would never train; leave those layers out of method.target_modules"
        )
