"""The loss of the trained tokens alone, within a model's forward pass, a chunk of logits at a time.

Logits of a whole batch take 12 bytes and more for each of its tokens and each word of the vocabulary: for 8,000 tokens
and 128,000 words, 13 GB. Here the model computes its hidden states, those of the tokens whose next one is trained are
picked, and the model's own code behind them (a head with an adapter, a cap, a scale) is run for a chunk of them at a
time, and again in the backward pass. The loss is that of transformers' causal language models: of the next token,
summed, over the number of trained tokens of the whole batch, whatever loss the model itself has.

B: batch, T: time (tokens), H: width of the hidden states, V: vocabulary, N: trained tokens.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from raytune_lora.data.encode import IGNORED
from raytune_lora.planning.activations import LOGITS

# Nats a token between two ways to one loss: from the same logits, from others in fp32, and from others in 16 bits.
_EQUAL, _SAME, _SAME_ROUNDED = 1e-4, 1e-3, 0.1
_OWN = "_raytune_lora_scoring"  # attribute of a model
_logger = logging.getLogger(__name__)


def scoring_of(model: Any) -> Scoring:
    """The scoring of a model, which is put into it where it has none: from then on it takes labels as described above.

    Args:
        model: of transformers, in whatever PEFT, torch or DeepSpeed have wrapped it.
    """
    while not isinstance(model, PreTrainedModel):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.module
    found: Scoring = vars(model).get(_OWN) or Scoring(model)
    vars(model)[_OWN] = found
    return found


class Scoring:
    """What a forward pass does with labels: with gradients it gives ``loss``, without them ``rows``.

    ``rows`` are (B, 2) in float64: each row's cross-entropy in nats, and how many tokens that is the sum of.

    Attributes:
        fits: whether the model's hidden states lead to its logits as this module goes about it; None before ``fit``.
        own_loss: whether it is trained by its own loss: that has more in it (a router's balance), or Liger computes it.
        limit: trained tokens that a forward pass has at most; needed where weights are divided among workers, who all
            have to come by the head equally often.
    """

    def __init__(self, base: Any) -> None:
        """
        Args:
            base: the model itself, whose forward pass is replaced.
        """
        self.fits: bool | None = None
        self.own_loss = False
        self.limit = 0
        self._base = base
        self._forward = base.forward
        self._by_liger = "liger" in getattr(vars(base).get("forward"), "__module__", "")
        self._chunk = max(1, LOGITS // base.config.get_text_config().vocab_size)  # tokens
        self._divided = False  # whether its weights are, among the workers
        self._own_now = False  # its own loss is asked for, though without gradients
        self._backbone = ""  # name of the module that gives hidden states
        base.forward = functools.wraps(base.forward)(lambda *inputs, **settings: self._scored(*inputs, **settings))

    @torch.no_grad()
    def fit(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        *,
        takes_common_loss: bool = False,
        start_afresh: Callable[[], None] | None = None,
    ) -> None:
        """Find out how this model is scored, by a few rows; all workers call it at once.

        Args:
            model: as it is called in training, in evaluation mode.
            inputs: of a forward pass, with labels.
            takes_common_loss: whether its own loss, but for what it adds, is that of causal language models.
            start_afresh: called after a forward pass that failed; of a model that is divided among workers.
        """
        self.fits = False
        self._divided = any(hasattr(p, "ds_id") for p in self._base.parameters())
        expected_B2 = model(**inputs)["rows"]
        tokens = int(expected_B2[:, 1].sum())
        nats = float(expected_B2[:, 0].sum()) / tokens
        whole = all(p.dtype in (torch.float32, torch.float64) for p in self._base.parameters() if p.is_floating_point())
        same = _SAME if whole else _SAME_ROUNDED
        chunk, self._chunk = self._chunk, max(1, tokens // 2)
        limit, self.limit = self.limit, tokens
        for name in _backbones(self._base):
            try:
                self._backbone, self.fits = name, True
                found_B2 = model(**inputs)["rows"]
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model's code says of a backbone that gives it fewer tokens
                _logger.debug("%s is scored at once: %s", type(self._base).__name__, error)
                self.fits = False
                if start_afresh is not None:
                    start_afresh()
                continue
            self.fits = float((found_B2 - expected_B2)[:, 0].abs().sum()) / tokens < same
            if self.fits:
                break
        self._chunk, self.limit = chunk, limit
        if takes_common_loss:
            self.own_loss = self._own_now = True
            self.own_loss = self._by_liger or not abs(float(model(**inputs)["loss"]) - nats) < _EQUAL
            self._own_now = False
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            votes = torch.tensor([self.fits, not self.own_loss], dtype=torch.int32, device=expected_B2.device)
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
            self.fits, self.own_loss = bool(votes[0]), not votes[1]

    def _scored(
        self,
        *inputs: Any,
        labels: Any = None,
        num_items_in_batch: Any = None,
        trained: int | None = None,
        **settings: Any,
    ) -> Any:
        """The model's forward pass; whoever knows how many tokens ``labels`` train spares the host to wait for it."""
        if labels is None:
            return self._forward(*inputs, **settings)
        if self.own_loss and (torch.is_grad_enabled() or self._own_now):
            return self._forward(*inputs, labels=labels, num_items_in_batch=num_items_in_batch, **settings)
        targets_BT = pad(labels[:, 1:], (0, 1), value=IGNORED)
        is_trained = (targets_BT != IGNORED).flatten()
        picked_N = (is_trained.nonzero() if trained is None else is_trained.nonzero_static(size=trained))[:, 0]
        targets_N = targets_BT.flatten()[picked_N]
        score = self._by_chunks if self.fits else self._at_once
        nats_N = score(functools.partial(self._forward, *inputs, **settings), labels.shape, picked_N, targets_N)
        if torch.is_grad_enabled():
            return {"loss": nats_N.sum() / (len(picked_N) if num_items_in_batch is None else num_items_in_batch)}
        sums_B2 = torch.zeros(len(labels), 2, dtype=torch.float64, device=nats_N.device)
        each_N2 = torch.stack([nats_N.double(), torch.ones_like(nats_N, dtype=torch.float64)], dim=1)
        return {"rows": sums_B2.index_add_(0, picked_N // labels.shape[1], each_N2)}

    def _at_once(self, forward: Any, shape: Any, picked_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Nats of the trained tokens, from the logits of all; those of learned vectors may come first."""
        logits_BTV = forward().logits[:, -shape[1] :]
        return _nats(logits_BTV.flatten(0, 1)[picked_N], targets_N)

    def _by_chunks(self, forward: Any, shape: Any, picked_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        found: list[tuple[Any, torch.Tensor]] = []

        def pick(module: Any, inputs: Any, output: Any) -> Any:
            hidden_BTH = output[0]
            if hidden_BTH.shape[:2] != shape:
                raise ValueError(f"hidden states of {tuple(hidden_BTH.shape)} for labels of {tuple(shape)}")
            found.append((output, hidden_BTH.flatten(0, 1)[picked_N]))
            return _with(output, hidden_BTH[:1, :0])  # its head has nothing to do yet

        hook = self._base.get_submodule(self._backbone).register_forward_hook(pick)
        try:
            forward()
        finally:
            hook.remove()
        ((output, hidden_NH),) = found
        count = max(1, -(-(self.limit if self._divided else len(picked_N)) // self._chunk))
        again = count > 1 and torch.is_grad_enabled()
        nats = []
        for hidden, targets in zip(hidden_NH.tensor_split(count), targets_N.tensor_split(count), strict=True):
            if again:
                nats.append(checkpoint(self._chunk_nats, output, hidden, targets, use_reentrant=False))
            else:
                nats.append(self._chunk_nats(output, hidden, targets))
        return torch.cat(nats)

    def _chunk_nats(self, output: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """By the model's own code behind its hidden states: of its backbone it is told that it gave these."""
        name, _, leaf = self._backbone.rpartition(".")
        parent = self._base.get_submodule(name)
        backbone = parent._modules[leaf]
        parent._modules[leaf] = _Given(backbone, _with(output, hidden[None]))
        try:
            logits = self._forward(input_ids=targets[None]).logits
        finally:
            parent._modules[leaf] = backbone
        return _nats(logits[0], targets)


class _Given(torch.nn.Module):
    """In the place of a module: gives what that gave."""

    def __init__(self, module: Any, output: Any) -> None:
        super().__init__()
        self._given = (module, output)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._given[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_given"][0], name)


def _backbones(base: Any) -> Iterator[str]:
    """Names of the modules that may give a model's hidden states."""
    names = {id(module): name for name, module in base.named_modules()}
    asked = [getattr(base, "base_model", base), getattr(base, "get_decoder", lambda: base)()]
    yield from dict.fromkeys(name for module in asked if (name := names.get(id(module))))


def _with(output: Any, hidden: torch.Tensor) -> Any:
    """What a backbone gives, with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    changed = copy.copy(output)
    changed["last_hidden_state"] = hidden
    return changed


def _nats(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_NV.float(), targets_N, reduction="none")
