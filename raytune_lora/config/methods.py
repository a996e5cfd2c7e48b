"""The typed configuration of each fine-tuning method; ``models/methods`` holds what each one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from raytune_lora.config.plain import MISSING

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head


class Placement(Enum):
    """Where bottleneck adapters sit: behind attention and feed-forward, or behind feed-forward alone."""

    houlsby = "houlsby"
    pfeiffer = "pfeiffer"


class Bias(Enum):
    """Biases of the base model that train beside the adapters: none, all, or those of the adapted layers."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


@dataclass
class MethodConfig:
    """The fine-tuning method; a variant says which."""

    kind: str = MISSING


@dataclass
class TargetedMethodConfig(MethodConfig):
    """A method that works on linear layers chosen by name."""

    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])  # ends of names, or regular expressions


# ------------------------------------------------------------------------------------------------------------- low rank


@dataclass
class LoraMethodConfig(TargetedMethodConfig):
    """Low-rank adapters on linear layers (Hu et al. 2021)."""

    kind: str = "lora"
    r: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / r
    dropout: float = 0.05  # on the adapter's input
    bias: Bias = Bias.none  # of the base model: none, all or lora_only (those of the adapted layers) train, too
    layers_to_transform: list[int] = field(default_factory=list)  # decoder layers that get adapters, from 0; empty: all
    layers_pattern: str | None = None  # the list of those layers in the model (layers, h); null: the first with numbers
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r of layers by name or regular expression: {q_proj: 8}
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha of layers, likewise
    modules_to_save: list[str] = field(default_factory=list)  # trained and saved whole: [embed_tokens, lm_head]
    experts: bool = False  # a mixture's experts too, each with an adapter of its own; needs dropout=0


@dataclass
class RsloraMethodConfig(LoraMethodConfig):
    """LoRA scaled by alpha / sqrt(r), so that large ranks keep learning (Kalajdzievski 2023)."""

    kind: str = "rslora"


@dataclass
class DoraMethodConfig(LoraMethodConfig):
    """LoRA on the direction of each weight column, its length learned apart (Liu et al. 2024)."""

    kind: str = "dora"


@dataclass
class PissaMethodConfig(LoraMethodConfig):
    """LoRA that starts as the principal singular vectors of each weight (Meng et al. 2024)."""

    kind: str = "pissa"
    iterations: int | None = 16  # subspace iterations of the fast decomposition; null: the exact one


@dataclass
class OloraMethodConfig(LoraMethodConfig):
    """LoRA that starts from a QR decomposition of each weight (Büyükakyüz 2024)."""

    kind: str = "olora"


@dataclass
class LoftqMethodConfig(LoraMethodConfig):
    """LoRA on a 4-bit base that starts by making up for the quantization's error (Li et al. 2023)."""

    kind: str = "loftq"


@dataclass
class EvaMethodConfig(LoraMethodConfig):
    """LoRA that starts along the directions in which the data moves each layer's input (Paischer et al. 2024)."""

    kind: str = "eva"
    rho: float = 1.0  # a layer may get rho * r ranks, taken from others; 1 leaves all at r
    samples: int = 64  # of the training split, to see the directions


@dataclass
class LoraPlusMethodConfig(LoraMethodConfig):
    """LoRA with a higher learning rate for B than for A (Hayou et al. 2024)."""

    kind: str = "lora_plus"
    ratio: float = 16.0  # of B's learning rate to A's


@dataclass
class IrQloraMethodConfig(LoraMethodConfig):
    """LoRA on a 4-bit base that keeps more information (IR-QLoRA, Qin et al. 2024)."""

    kind: str = "ir_qlora"
    tau_range: float = 0.1  # half-width of the search for each block's offset, in standard deviations
    tau_steps: int = 25  # offsets tried on each side


@dataclass
class AdaloraMethodConfig(TargetedMethodConfig):
    """Low rank by singular values, the budget moved to the layers that need it (Zhang et al. 2023)."""

    kind: str = "adalora"
    r: int = 12  # of each layer at first
    target_r: int = 8  # of the layers on average at the end
    alpha: float = 32.0
    dropout: float = 0.05
    start: float = 0.1  # share of the steps before the budget falls
    settle: float = 0.3  # share of the steps at the end with the budget as it is
    orthogonality: float = 0.5  # weight of the penalty that keeps the singular vectors orthogonal


@dataclass
class VeraMethodConfig(TargetedMethodConfig):
    """Fixed random low-rank matrices, shared, with learned scales (Kopiczko et al. 2023)."""

    kind: str = "vera"
    r: int = 256
    dropout: float = 0.05
    initial: float = 0.1  # of the inner scale
    seed: int = 0  # of the fixed matrices


@dataclass
class LohaMethodConfig(TargetedMethodConfig):
    """The elementwise product of two low-rank updates (Hyeon-Woo et al. 2021)."""

    kind: str = "loha"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # share of the ranks left out at a step


@dataclass
class LokrMethodConfig(TargetedMethodConfig):
    """The Kronecker product of a small matrix and a low-rank one (Yeh et al. 2023)."""

    kind: str = "lokr"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # share of the ranks left out at a step
    factor: int = -1  # of the small matrix's size; -1: as near to square as it goes


# ------------------------------------------------------------------------------------------------------------- additive


@dataclass
class AdapterMethodConfig(MethodConfig):
    """Small two-layer networks behind the sublayers (Houlsby et al. 2019, Pfeiffer et al. 2020)."""

    kind: str = "adapter"
    placement: Placement = Placement.pfeiffer
    width: int = 64  # of the bottleneck
    dropout: float = 0.0


@dataclass
class PrefixTuningMethodConfig(MethodConfig):
    """Learned keys and values in front of each attention layer's own (Li and Liang 2021)."""

    kind: str = "prefix_tuning"
    virtual_tokens: int = 20
    projection: int | None = None  # width of the network the prefix is computed by; null: learned directly


@dataclass
class PromptTuningMethodConfig(MethodConfig):
    """Learned embeddings in front of the input (Lester et al. 2021)."""

    kind: str = "prompt_tuning"
    virtual_tokens: int = 20
    text: str | None = None  # whose embeddings they start from; null: those of random tokens


@dataclass
class PTuningMethodConfig(MethodConfig):
    """Embeddings in front of the input, computed by a small network while training (Liu et al. 2021)."""

    kind: str = "p_tuning"
    virtual_tokens: int = 20
    width: int = 128  # of the network


@dataclass
class Ia3MethodConfig(TargetedMethodConfig):
    """Learned scales on keys, values and feed-forward activations (Liu et al. 2022)."""

    kind: str = "ia3"
    target_modules: list[str] = field(default_factory=lambda: ["k_proj", "v_proj", "down_proj"])
    feedforward_modules: list[str] = field(default_factory=lambda: ["down_proj"])  # scaled at their input


# ------------------------------------------------------------------------------------------------------------ selective


@dataclass
class FullMethodConfig(MethodConfig):
    """Every weight trains."""

    kind: str = "full"


@dataclass
class BitfitMethodConfig(MethodConfig):
    """Biases alone train (Ben Zaken et al. 2021)."""

    kind: str = "bitfit"


@dataclass
class LayernormMethodConfig(MethodConfig):
    """Normalization layers alone train (Zhao et al. 2023)."""

    kind: str = "layernorm"


@dataclass
class DiffPruningMethodConfig(TargetedMethodConfig):
    """A learned sparse difference to the weights, kept sparse by a relaxed L0 penalty (Guo et al. 2021)."""

    kind: str = "diff_pruning"
    l0_weight: float = 1e-7  # of the penalty, for each expected non-zero
    sparsity: float | None = 0.995  # share of zeros the difference is cut to; null: as learned
    settle: float = 0.5  # share of the steps at the end, in which what the cut has left trains on


@dataclass
class ShiraMethodConfig(TargetedMethodConfig):
    """A fixed random sparse part of each weight trains (Bhardwaj et al. 2024)."""

    kind: str = "shira"
    r: int = 16  # as many weights train as LoRA of this rank has
    seed: int = 0  # of the choice


METHODS: tuple[type[MethodConfig], ...] = (
    FullMethodConfig,
    AdapterMethodConfig,
    PrefixTuningMethodConfig,
    PromptTuningMethodConfig,
    PTuningMethodConfig,
    Ia3MethodConfig,
    LoraMethodConfig,
    RsloraMethodConfig,
    DoraMethodConfig,
    PissaMethodConfig,
    OloraMethodConfig,
    LoftqMethodConfig,
    EvaMethodConfig,
    LoraPlusMethodConfig,
    AdaloraMethodConfig,
    VeraMethodConfig,
    LohaMethodConfig,
    LokrMethodConfig,
    BitfitMethodConfig,
    DiffPruningMethodConfig,
    LayernormMethodConfig,
    ShiraMethodConfig,
    IrQloraMethodConfig,
)
