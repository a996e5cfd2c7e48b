"""Base models from their folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from raytune_lora.config.schema import Attention, ModelConfig, Precision, Quantization, QuantizationConfig
from raytune_lora.models.shape import auto_class
from raytune_lora.models.skeleton import given_to_bitsandbytes, read_past, rescales, skeleton_of
from raytune_lora.models.stored import read_config, resolved, stored_as
from raytune_lora.models.tokenizer import own_code, trusted
from raytune_lora.models.weights import is_transposed

_OF_THE_RUN = ("bnb_4bit_compute_dtype", "llm_int8_threshold")  # of bitsandbytes' settings, those of the arithmetic
_SLICE = 2**20  # weights quantized at once; a multiple of every block size, so that the result is the same


def keeps_cache(model: Any) -> bool:
    """Whether a forward pass keeps keys and values for the next token."""
    return bool(getattr(model.config.get_text_config(), "use_cache", True))


def keep_cache(model: Any, keep: bool) -> None:
    """Set whether it does: of no use in training, and in its memory."""
    for config in (model.config, model.config.get_text_config()):  # a language model within another has its own
        if hasattr(config, "use_cache"):
            config.use_cache = keep


def take_back_rescaling(model: Any) -> None:
    """Bring the weights that RWKV's code divides for evaluation, by powers of 2, back to what a checkpoint holds.

    It multiplies them again only when the next forward pass in training mode begins.
    """
    for module in model.modules():
        if rescales(module) and module.layers_are_rescaled:
            mode, module.training = module.training, True
            module._rescale_layers()
            module.training = mode


def load_model(
    folder: Path,
    cfg: ModelConfig,
    quantization: QuantizationConfig,
    *,
    on_gpu: bool = False,
    mapped: bool = False,
) -> Any:
    """The base model in evaluation mode, all its weights frozen, in the precision and number format asked for.

    Args:
        folder: of the model.
        cfg: its precision and attention.
        quantization: its number format; a checkpoint that is quantized already keeps its own.
        on_gpu: whether it is loaded onto this process's GPU; a machine may have some that the run does not use.
        mapped: leave what is not quantized in its files until it is read, for who needs a part of each weight.

    Raises:
        UserError: the checkpoint is quantized already, in another format or in one that is not supported.
    """
    dtype = precision(cfg.precision, on_gpu=on_gpu)
    config, own = _as_it_is(folder, cfg, quantization, dtype)
    quantization = resolved(own, quantization)
    settings: dict[str, Any] = {"config": config}
    if cfg.attention is not Attention.auto:
        settings["attn_implementation"] = cfg.attention.value
    quantized = quantization.kind is not Quantization.none
    if quantized and own is None:
        settings["quantization_config"] = _bitsandbytes(quantization, dtype)
    if on_gpu and (
        quantized or not mapped
    ):  # weights are quantized where they go, and no process holds a model in the machine's memory
        settings["device_map"] = {"": torch.cuda.current_device()}
    with _quantizing_in_slices() if quantized and own is None else contextlib.nullcontext():
        model = auto_class(config).from_pretrained(
            folder, dtype=dtype, trust_remote_code=trusted(cfg), use_safetensors=True, **settings
        )
    if quantized:
        _unpack_what_is_read(model)
        _stay_trainable(model)
    keep_cache(model, False)
    return model.requires_grad_(False).eval()


def parameter_count(model: Any) -> int:
    """How many parameters a base model has, whatever quantization or ZeRO made of them."""
    divided = [p.ds_numel for p in model.parameters() if hasattr(p, "ds_id")]
    if divided and getattr(model, "is_quantized", False):
        return sum(p.numel() for p in skeleton_of(model).model.parameters())
    if divided:
        return sum(divided)
    return int(model.num_parameters())


def loader_of(model: Any, folder: Path, cfg: ModelConfig, *, whole: bool = False) -> str | None:
    """The class of transformers that loads a base model as ``load_model`` has; None where no class alone does.

    Args:
        model: as ``load_model`` gave it.
        folder: of the model.
        cfg: of the model.
        whole: whether it is to load what ``model`` itself is saved as, of some architectures the text's part alone.
    """
    if getattr(model, "is_quantized", False):  # else no skeleton need be made
        skeleton = skeleton_of(model)
        if given_to_bitsandbytes(skeleton) & read_past(skeleton):
            return None
    auto = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=trusted(cfg)))
    known = type(model.config) in auto._model_mapping or trusted(cfg)
    return type(model).__name__ if whole and not known else str(auto.__name__)


def _as_it_is(
    folder: Path, cfg: ModelConfig, quantization: QuantizationConfig, dtype: torch.dtype
) -> tuple[Any, QuantizationConfig | None]:
    """The config of the model in a folder, and the format its weights are stored in; None where not quantized.

    A checkpoint also names the precision it is computed in, often one for GPUs; the run's own takes its place.
    """
    own = stored_as(read_config(folder))
    with own_code(folder, cfg):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted(cfg))
    said = getattr(config, "quantization_config", None)
    if own is not None and isinstance(said, dict):
        meant = _bitsandbytes(resolved(own, quantization), dtype).to_dict()
        config.quantization_config = said | {key: meant[key] for key in _OF_THE_RUN}
    return config, own


def precision(asked: Precision, *, on_gpu: bool) -> torch.dtype:
    """The dtype of weights and arithmetic, on the CPU or on this process's GPU."""
    if asked is Precision.auto:
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[asked]


@contextlib.contextmanager
def _quantizing_in_slices() -> Iterator[None]:
    """Have bitsandbytes quantize a weight on the CPU a slice at a time: all at once takes ten times the weight."""
    import bitsandbytes  # noqa: F401  # it registers the operator

    operator: Any = torch.ops.bitsandbytes.quantize_4bit
    original = operator.default

    def in_slices(weight: torch.Tensor, *how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.is_cuda or weight.numel() <= _SLICE:
            quantized, scales = original(weight, *how)
            return quantized, scales
        parts = [original(part, *how) for part in weight.reshape(-1).split(_SLICE)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    operator.default = in_slices
    try:
        yield
    finally:
        operator.default = original


def _unpack_what_is_read(model: Any) -> None:
    """Give layers whose weights other modules read, as Mamba's do in training, the weights they stand for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    read = read_past(skeleton_of(model))
    for name, layer in [(n, m) for n, m in model.named_modules() if n in read]:
        if hasattr(layer, "source_cls"):  # of a layer that bitsandbytes has taken over
            weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(model.dtype)
            plain: Any = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            if is_transposed(layer):
                plain, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
            plain.weight, plain.bias = torch.nn.Parameter(weight), layer.bias
            model.set_submodule(name, plain)


def _stay_trainable(model: Any) -> None:
    """Keep 4-bit layers from changing for good at the first forward pass in evaluation mode.

    On CPUs with AVX512-BF16, bitsandbytes then packs the weights for a kernel that computes in bf16 and has no
    gradient: after the first validation, the training would go on without that of all but the last layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _bitsandbytes(cfg: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if cfg.kind is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=cfg.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=cfg.kind.value,
        bnb_4bit_use_double_quant=cfg.double,
        bnb_4bit_compute_dtype=dtype if cfg.compute is Precision.auto else precision(cfg.compute, on_gpu=True),
        bnb_4bit_quant_storage=dtype,  # ZeRO-3 gathers the weights as the model's dtype
    )
