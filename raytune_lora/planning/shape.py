"""The shape of a base model: the numbers that parameters and memory are computed from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from raytune_lora.config.methods import ALL_LINEAR


@dataclass(frozen=True)
class Linear:
    """A linear layer, or GPT-2's transposed one."""

    name: str  # dotted path in the model
    d_in: int
    d_out: int
    source: str = ""  # layers with the same one are fed the same tensor
    transposed: bool = False  # stored d_in x d_out, as GPT-2's Conv1D is, and not d_out x d_in
    bias: bool = False
    apart: str = ""  # why no adapter goes there, one of the words below; empty where one may
    quantized: bool = True  # whether its weight is, where the model is
    tied: bool = False  # whether its weight is that of a module before it, and counted there
    saved_as: str | None = ""  # the name that PEFT finds its LoRA by, if another; None: by none

    @property
    def numel(self) -> int:
        """Of its weight."""
        return self.d_in * self.d_out


UNMET = "text does not pass through them"  # a vision tower
BYPASSED = "their weights are read past the layers themselves, where an adapter has no effect"  # Mamba's dt_proj
IDLE = "no gradient comes back through them"  # what picks the tokens to attend to, a classifier's pooler
UNLIKE = "they compute something else than their inputs times their weight"  # DeepSeek-V4's, of several groups
ROUTER = "they route tokens to experts"


@dataclass(frozen=True)
class Experts:
    """A weight of all experts of a layer in one parameter."""

    name: str  # dotted path in the model
    count: int
    d_in: int
    d_out: int
    below: bool = False  # whether it is a matrix, with one expert's weight below another's

    @property
    def numel(self) -> int:
        return self.count * self.d_in * self.d_out


@dataclass(frozen=True)
class Block:
    """One decoder layer, as the mean of all of them."""

    heads: int
    query_width: int  # heads times their size
    kv_width: int  # heads for keys and values times their size
    feed_forward: int  # width inside the feed-forward network; of a mixture, that of the experts a token sees
    feed_forward_kept: int  # tensors of that width that the backward pass needs of a frozen network
    norm_width: int  # inputs of its normalization layers, elements a token
    rms: bool  # whether those are computed in fp32 step by step, as RMSNorm is
    experts: int = 0  # that a token sees; 0: no mixture
    fused: bool = False  # whether one layer gives queries, keys and values together
    softcap: bool = False  # whether attention's scores are capped, which only the eager implementation does
    eager: bool = False  # whether the model's code has no other implementation of attention
    dropout: bool = False  # whether the model thins attention's weights when it trains, as GPT-2 does
    thinned: int = 0  # outputs of its own dropout layers, elements a token


@dataclass(frozen=True)
class Shape:
    """Numbers of a base model, without its weights."""

    hidden: int  # width of the residual stream
    layers: int  # decoder layers
    block: Block
    vocab: int
    head: str | None  # name of the linear layer that gives the logits
    linears: tuple[Linear, ...]
    norms: int  # parameters of normalization layers that can train where they lie
    biases: tuple[tuple[str, int], ...]  # name and size of each parameter called bias
    parameters: int  # all, shared ones once
    softcap: bool = False  # whether the logits are capped
    sublayers: tuple[str, ...] = ()  # names of the modules that every decoder layer has
    keys: tuple[int, int, int] | None = None  # layers, and heads and width of their keys and values; None: they differ
    unprompted: str = ""  # why PEFT cannot put learned vectors before a row; empty where it can
    unprefixed: str = ""  # why PEFT cannot put learned keys and values before those of a row
    norms_apart: tuple[str, ...] = ()  # names of those whose weights are read past them
    checkpointable: bool = True  # whether its code knows gradient checkpointing
    experts: tuple[Experts, ...] = ()
    claimed: tuple[str, ...] = ()  # names of linear layers that PEFT's LoRA takes for those of experts
    unmet: int = 0  # parameters that a row of text does not meet
    approximate: bool = False  # whether some layers are of a kind whose activations are not reckoned
    embeddings: int | None = None  # rows of the input embedding; None: not known
    embedded: int | None = None  # its width, where that is not ``hidden``; None: not known
    positions: int | None = None  # tokens of a row that its table of positions has room for; None: it has no table
    embedding: str | None = None  # name of the module that embeds the input
    tied: bool = False  # whether the head's weight is the embedding's
    modules: tuple[tuple[str, int], ...] = ()  # name and parameters of each module that has some and that text meets
    rescaled: bool = False  # whether its code changes weights, whole ones, for evaluation
    context: int | None = None  # tokens of a row that it was made for, as its config says; None: it does not say

    def targets(self, names: list[str]) -> list[Linear]:
        """The linear layers that these ``target_modules`` name and that adapters can go to."""
        return [linear for linear in self.named(names) if not linear.apart]

    def named(self, names: list[str]) -> list[Linear]:
        """The linear layers that PEFT takes for these ``target_modules``."""
        if names == [ALL_LINEAR]:
            return [linear for linear in self.linears if linear.name != self.head]
        return [linear for linear in self.linears if any(matches(name, linear.name) for name in names)]


def is_name(word: str) -> bool:
    """Whether a word of a config names modules by the ends of their names; it is a regular expression if not."""
    return re.fullmatch(r"[\w.-]+", word) is not None


def matches(word: str, name: str) -> bool:
    """Whether a word of a config means the module of that name: by its end, or by a rule for the whole of it."""
    if is_name(word):
        return name == word or name.endswith(f".{word}")
    return re.fullmatch(word, name) is not None
