"""The typed configuration of a run and of a sweep.

Every field has its unit beside it. Where a group has variants (model, data, method), each variant is a subclass that
names itself in ``kind``; ``VARIANTS`` lists them, and a YAML file of the group picks one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from raytune_lora.config.data import SOURCES, DataConfig
from raytune_lora.config.methods import METHODS, MethodConfig
from raytune_lora.config.plain import MISSING
from raytune_lora.config.search import BudgetConfig, ConfirmConfig, DimensionConfig, SchedulerConfig, SearchConfig


class Precision(Enum):
    """The number format of weights and arithmetic; ``auto`` is bf16 on a GPU that has it and fp32 elsewhere."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Optimizer(Enum):
    """Of the trained weights. In 8 bits it is bitsandbytes'; paged, its states go to the CPU where the GPU is short."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"


class Attention(Enum):
    """The implementation of attention; ``auto`` is transformers' choice for the model."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


class Offload(Enum):
    """Where DeepSpeed keeps what the GPU has no room for."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class LogFormat(Enum):
    text = "text"
    json = "json"


class WandbMode(Enum):
    offline = "offline"
    online = "online"


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class ModelConfig:
    """The base model; a variant says where its weights come from."""

    kind: str = MISSING
    precision: Precision = Precision.auto
    attention: Attention = Attention.auto


@dataclass
class HubModelConfig(ModelConfig):
    """A Hugging Face model: a folder on disk, or a name on the hub."""

    kind: str = "hub"
    path: str | None = None  # folder with config.json, or `owner/name` on the hub
    revision: str | None = None  # hub only: branch, tag or commit
    trust_remote_code: bool = False


@dataclass
class PackageModelConfig(ModelConfig):
    """A GGUF file inside an installed Python package, converted once to safetensors in the cache."""

    kind: str = "package"
    package: str = MISSING  # import name of the package
    file: str = MISSING  # GGUF file inside the package


@dataclass
class TinyModelConfig(ModelConfig):
    """A random Llama made on the spot, with a byte tokenizer of its own: for tests and dry runs."""

    kind: str = "tiny"
    layers: int = 2
    hidden: int = 64  # width of the residual stream
    heads: int = 4
    bias: bool = False  # biases in attention and MLP projections
    seed: int = 0


# --------------------------------------------------------------------------------------------------------- quantization


class Quantization(Enum):
    """The number format that the base model's linear layers are kept in; ``none`` is the model's own precision."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"
    fp4 = "fp4"


@dataclass
class QuantizationConfig:
    """How the frozen base model is kept (bitsandbytes); arithmetic is in the model's precision."""

    kind: Quantization = Quantization.none
    double: bool = True  # 4 bits: quantize the scales too, which saves 0.37 bits a weight
    compute: Precision = Precision.auto  # 4 bits: of the arithmetic; auto is the model's own
    int8_threshold: float = 6.0  # int8: inputs beyond it are multiplied unquantized


# ------------------------------------------------------------------------------------------------------------- training


@dataclass
class TrainingConfig:
    learning_rate: float = 2e-4  # the peak
    optimizer: Optimizer = Optimizer.adamw
    global_batch: int = 32  # sequences an optimizer step
    micro_batch: int = 4  # sequences a forward pass a worker
    epochs: float = 3.0
    max_steps: int | None = None  # optimizer steps; overrides epochs
    lr_scheduler: str = "cosine"  # a name transformers knows
    warmup: float = 0.03  # share of the steps; of n steps, the first has 1 / (n + 1) of the peak
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    packing: bool = False  # rows end to end, up to micro_batch * data.max_length tokens, not padded; same losses
    group_by_length: bool = False  # rows of like length in one step, so that less is padded
    liger: bool = False  # Liger's fused kernels (needs a GPU and liger-kernel)
    patience: int | None = 3  # validations without a lower loss before the run ends; null: it goes through to the end
    keep_checkpoints: int = 2  # of the newest; the best one stays beside them
    seed: int = 0  # of the weights' start, the order of the data and dropout


@dataclass
class DeepSpeedConfig:
    enabled: bool = True  # off: plain torch.distributed data parallelism
    stage: int = 2  # ZeRO stage 0-3
    offload_optimizer: Offload = Offload.none  # stages 1-3: where the optimizer's states are kept and stepped
    offload_weights: Offload = Offload.none  # stage 3: where weights wait for their turn
    hpz: int = 1  # stage 3: workers, those of one node, that keep all weights among them again: none go between nodes
    nvme_path: str | None = None  # folder on a fast local disk of every node, for what is offloaded to nvme
    persistent: int = 100_000  # stage 3: parameters of fewer elements stay whole on every worker


@dataclass
class EvaluationConfig:
    every: int | None = None  # samples between two validations; null: ten times a run
    loss_rows: int = 256  # rows of the validation split for the loss that trials are compared by; 0: all
    final_rows: int = 10_000  # rows of it for the loss that is reported of the base model and of the best; 0: all
    generate_rows: int = 64  # rows of the test split that both answer, compared for exact match; 0: none
    generate_batch: int = 8  # rows answered at once
    max_new_tokens: int = 256
    examples: int = 5  # answers shown side by side in the report


@dataclass
class ClusterConfig:
    address: str | None = None  # of a running Ray cluster; null: $RAY_ADDRESS, or else a local one made for the job
    object_store_mb: int = 128  # of the local one
    dashboard: bool = False  # of the local one
    node_cache: str = "~/.cache/raytune-lora"  # on each node: copies of `cache` and `output` where they are URIs
    reuse_workers: bool = True  # a worker group takes one trial after the other; false starts a new one for each
    retries: int = 3  # of a trial whose worker or machine was lost: each goes on from its last checkpoint
    lease: float = 120.0  # seconds without a sign of life of a driver whose `output` is a URI until another may go on
    autoscaler: bool = False  # machines are added when they are asked for: trials that do not fit now wait for them


@dataclass
class DiskConfig:
    """How much room checkpoints may take; GB are 10^9 bytes."""

    trial_gb: float | None = None  # of one trial's folder; a trial that needs more ends as `quota`
    sweep_gb: float | None = None  # of all trials' checkpoints; those of trials that ended go first
    keep_best: int = 3  # trials whose best checkpoint is never deleted for sweep_gb


@dataclass
class TrackingConfig:
    """Where the numbers of each step go, beside ``steps.jsonl`` in the trial's folder."""

    log: LogFormat = LogFormat.text  # what the driver prints: for people, or a JSON object a line
    trackers: list[str] = field(default_factory=list)  # of tensorboard, wandb, mlflow, ray
    project: str = "raytune-lora"  # W&B project and MLflow experiment
    wandb_mode: WandbMode = WandbMode.offline  # offline: in the trial's folder, for `wandb sync`
    mlflow_uri: str | None = None  # server or store; null: $MLFLOW_TRACKING_URI, or else mlflow.db in the output folder


@dataclass
class RunConfig:
    """One training run."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    method: MethodConfig = MISSING
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    workers: int = 1  # processes that train one model together
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    output: str | None = None  # folder of the sweep or run, or URI; null: sweeps/<time> or runs/<time>
    cache: str = "~/.cache/raytune-lora"  # folder that all nodes share, or URI: token stores and converted models


# ---------------------------------------------------------------------------------------------------------------- sweep


@dataclass
class SweepConfig(RunConfig):
    """A run, and how to search for the best one."""

    space: dict[str, DimensionConfig] = field(default_factory=dict)
    search: SearchConfig = field(default_factory=SearchConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    confirm: ConfirmConfig = field(default_factory=ConfirmConfig)
    resume: str | None = None  # a sweep or run folder to go on with; auto: the one in output, begun where there is none


VARIANTS: dict[str, tuple[type, ...]] = {
    "model": (HubModelConfig, PackageModelConfig, TinyModelConfig),
    "data": SOURCES,
    "method": METHODS,
}


def variant(group: str, kind: str) -> type:
    """The dataclass of a group's variant.

    Raises:
        KeyError: the group has no such variant.
    """
    for cls in VARIANTS[group]:
        if kind_of(cls) == kind:
            return cls
    raise KeyError(f"{group} has no variant {kind!r}")


def kind_of(cls: type) -> str:
    """The name of a variant."""
    return str(next(f.default for f in fields(cls) if f.name == "kind"))
