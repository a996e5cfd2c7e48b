"""The shape of a base model, read from the model itself."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_lora.artifacts import fingerprint, read_manifest
from raytune_lora.cache import Cache
from raytune_lora.config.schema import ModelConfig
from raytune_lora.errors import UserError
from raytune_lora.models import shape_parts as parts
from raytune_lora.models import shape_settings as settings
from raytune_lora.models.tokenizer import own_code, trusted
from raytune_lora.planning.shape import UNMET, Block, Experts, Linear, Shape

if TYPE_CHECKING:
    from raytune_lora.models.skeleton import Skeleton

_FUSED = {"query_key_value", "qkv_proj", "c_attn", "Wqkv"}
_SHAPES: dict[Skeleton, Shape] = {}
_GATES = {"gate_proj", "gate_up_proj", "w3"}
_BIDIRECTIONAL = {"xlnet", "cpmant", "xlm", "prophetnet"}
_TABLE = re.compile(r"(^|\.)(wpe|\w*position\w*)(\.|$)")  # names of embeddings that are looked up by position
_COMPUTED = re.compile(r"(^|\.)(embed_positions|pos_encoding)$")  # names of buffers that are
_NAME = "name a decoder"
_KEPT = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 2}  # tensors that activations of several operations keep


def known_shape(folder: Path, cfg: ModelConfig, cache: Cache) -> Shape:
    """The shape of the model in a folder, from the cache if it was asked for before: torch is not needed then.

    Importing torch and transformers takes seconds, and more than half of a driver's memory.

    Raises:
        UserError: the model cannot be fine-tuned on text.
    """
    said = [folder / "config.json", *sorted(folder.glob("*.py")), *sorted(Path(__file__).parent.glob("[sw]*.py"))]
    versions = [metadata.version(name) for name in ("transformers", "peft", "bitsandbytes")]
    name = fingerprint(*versions, trusted(cfg), [f.read_text() for f in said if f.is_file()])
    try:
        kept = cache.build_once(f"shapes/{name}", lambda _work: {"shape": asdict(shape_of_folder(folder, cfg))})
        found = (read_manifest(kept) or {})["shape"]
    except OSError:  # that the cache cannot be written is told by who needs it to be
        return shape_of_folder(folder, cfg)
    parts = {
        "block": Block(**found["block"]),
        "linears": tuple(Linear(**linear) for linear in found["linears"]),
        "experts": tuple(Experts(**experts) for experts in found["experts"]),
        "claimed": tuple(found["claimed"]),
        "sublayers": tuple(found["sublayers"]),
        "modules": tuple(map(tuple, found["modules"])),
        "biases": tuple(map(tuple, found["biases"])),
        "norms_apart": tuple(found["norms_apart"]),
        "keys": found["keys"] and tuple(found["keys"]),
    }
    return Shape(**{**found, **parts})


def shape_of_folder(folder: Path, cfg: ModelConfig) -> Shape:
    """The shape of the model in a folder; no weight is read or made.

    Raises:
        UserError: the model cannot be fine-tuned on text.
    """
    import torch
    from transformers import AutoConfig

    from raytune_lora.models.skeleton import in_one_line

    try:
        with own_code(folder, cfg), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted(cfg))
            model = auto_class(config).from_config(config, trust_remote_code=trusted(cfg))
    except UserError:
        raise
    except Exception as error:  # the code of a model may do anything
        raise UserError(
            f"model: transformers does not build what {folder / 'config.json'} describes ({in_one_line(error)}); "
            "install what it asks for, mend the file, or name another model"
        ) from error
    _check_causal(model)
    _check_text(model)
    return shape_of(model)


def _check_text(model: Any) -> None:
    """Raise for a model that a row of text alone cannot train.

    Raises:
        UserError: it is of this kind.
    """
    from raytune_lora.models.skeleton import skeleton_of

    kind = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"model: the architecture {kind} has an encoder, and rows of text have nothing for it; {_NAME}")
    try:
        text, embedding = model.config.get_text_config(), model.get_input_embeddings().weight
        described = text.hidden_size > 0 and text.num_hidden_layers > 0 and embedding.dim() > 1
    except (AttributeError, NotImplementedError):
        described = False
    if not described:
        raise UserError(
            f"model: the architecture {kind} does not say how wide its decoder is, how many layers it has and what "
            "embeds its tokens, without which nothing could be planned; name another model"
        )
    if said := skeleton_of(model).untrained:
        raise UserError(
            f"model: the architecture {kind} does not train on a row of text alone, of any length ({said}); {_NAME}"
        )


def _check_causal(model: Any) -> None:
    """Raise for a model whose tokens see those that come after them: it would be trained on answers that it is shown.

    Raises:
        UserError: it is of this kind.
    """
    config, code = model.config, parts.source_of(sys.modules[type(model).__module__])
    reason = ""
    if getattr(config, "is_decoder", True) is False and "create_bidirectional_mask" in code:
        reason = "is_decoder=false in its config.json: set it to true there, if its weights are those of a decoder"
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        reason = "use_bidirectional_attention in its config.json"
    if config.model_type in _BIDIRECTIONAL:
        reason = f"the architecture {config.model_type}"
    if reason:
        raise UserError(
            f"model: its tokens see those after them ({reason}), so that it would be trained on answers that it "
            f"is shown; {_NAME}"
        )


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of a config: that of text alone where there is one.

    Raises:
        UserError: neither that nor the one of models that see images too knows the architecture.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for cls in (AutoModelForCausalLM, AutoModelForImageTextToText):
        own_code = cls.__name__ in (getattr(config, "auto_map", None) or {})
        if own_code or type(config) in cls._model_mapping:
            return cls
    raise UserError(
        f"model: transformers has no language model of the architecture {config.model_type!r}; name a decoder that "
        "AutoModelForCausalLM or AutoModelForImageTextToText loads"
    )


def shape_of(model: Any) -> Shape:
    """The shape of a base model without adapters, quantized or not; of a known config it is kept."""
    from raytune_lora.models.skeleton import skeleton_of

    skeleton = skeleton_of(model)
    if skeleton not in _SHAPES:
        _SHAPES[skeleton] = _shape(skeleton)
    return _SHAPES[skeleton]


def _shape(skeleton: Skeleton) -> Shape:
    from raytune_lora.models.skeleton import rescales

    model = skeleton.model
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    config = model.config.get_text_config()
    experts = tuple(parts.experts(model))
    linears = tuple(parts.linears(skeleton, mixture=bool(experts) or settings.experts_per_token(config) > 0))
    met = [linear for linear in linears if linear.apart != UNMET]
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        block=_block(skeleton, config, {linear.name.rpartition(".")[2] for linear in met}),
        vocab=config.vocab_size,
        head=names.get(id(head)),
        linears=linears,
        norms=sum(p.numel() for _, norm in parts.scales(model) for p in norm.parameters()),
        norms_apart=parts.norms_apart(model),
        biases=tuple((name, p.numel()) for name, p in parts.biases(model)),
        parameters=sum(p.numel() for p in model.parameters()),
        softcap=getattr(config, "final_logit_softcapping", None) is not None,
        sublayers=_sublayers(model),
        keys=skeleton.keys,
        unprompted=skeleton.unprompted,
        unprefixed=skeleton.unprefixed,
        checkpointable=_checkpointable(model),
        experts=experts,
        claimed=_claimed(model.config),
        unmet=sum(p.numel() for name, p in model.named_parameters() if name not in skeleton.trains),
        approximate=_unlike_attention(config),
        embeddings=model.get_input_embeddings().weight.shape[0],
        embedded=model.get_input_embeddings().weight.shape[1],
        positions=_positions(skeleton, config),
        context=_context(config),
        embedding=names.get(id(model.get_input_embeddings())),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        modules=parts.modules(skeleton),
        rescaled=any(map(rescales, model.modules())),
    )


def decoder_layers(model: Any) -> list[Any]:
    """The model's decoder layers: its list of as many like modules as its config has layers; empty where it has none.

    In a model that sees, too, they are those of its text part.
    """
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(min(lists, key=lambda found: "vision" in found[0])[1]) if lists else []


def _sublayers(model: Any) -> tuple[str, ...]:
    layers = [dict(layer.named_children()) for layer in decoder_layers(model)]
    return tuple(name for name in (layers[0] if layers else ()) if all(name in layer for layer in layers))


def _checkpointable(model: Any) -> bool:
    """Transformers' own condition: the class says so, and there is a module to switch."""
    said = getattr(model, "supports_gradient_checkpointing", False)
    return bool(said) and any(hasattr(module, "gradient_checkpointing") for module in model.modules())


def _claimed(config: Any) -> tuple[str, ...]:
    """Names that PEFT's LoRA takes for experts that were linear layers once, whatever layer else has them."""
    from peft.utils import transformers_weight_conversion as conversion

    kinds: dict[str, str] = vars(conversion)["_MODEL_TO_CONVERSION_PATTERN"]
    pattern = kinds.get(config.model_type)
    return tuple(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()) if pattern else ())


def _unlike_attention(config: Any) -> bool:
    """Whether some layers, or all of them, do not attend: convolutions, state spaces, recurrences."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    others = [kind for kind in kinds if "attention" not in str(kind) or "linear" in str(kind)]
    return bool(others) or not all(count for count, _, _ in settings.heads(config))


def _block(skeleton: Skeleton, config: Any, leaves: set[str]) -> Block:
    attention = list(settings.heads(config))
    heads, kv_heads, size = (settings.mean(list(values)) for values in zip(*attention, strict=True))
    experts = settings.experts_per_token(config)
    gated = bool(leaves & _GATES) or experts > 0
    activation = next(iter(settings.each(config, "hidden_act", "activation_function")), "")
    normed, rms = 0, False
    for name, norm in parts.norms(skeleton.model):
        if any(part.isdigit() for part in name.split(".")):
            width = sum(p.numel() for p in norm.parameters(recurse=False)) // max(1, len(list(norm.parameters())))
            of_heads = {"q_norm": heads, "k_norm": kv_heads}.get(name.rpartition(".")[2], 1) if width == size else 1
            normed += width * of_heads
            rms = rms or "rms" in type(norm).__name__.lower()
    return Block(
        heads=heads,
        query_width=settings.mean([count * width for count, _, width in attention]),
        kv_width=settings.mean([count * width for _, count, width in attention]),
        feed_forward=settings.feed_forward(config),
        feed_forward_kept=_KEPT.get(str(activation), 1) + 2 * gated,
        norm_width=normed // config.num_hidden_layers,
        rms=rms,
        experts=experts,
        fused=bool(leaves & _FUSED),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        eager=not getattr(type(skeleton.model), "_supports_sdpa", True),
        dropout=any(settings.each(config, "attn_pdrop", "attention_dropout")),
        thinned=_thinned(skeleton, config),
    )


def _thinned(skeleton: Skeleton, config: Any) -> int:
    """Elements a token that a decoder layer's dropout layers give: each keeps a mask of them; attention's are apart."""
    from torch import nn

    inside = [
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Dropout) and module.p and name in skeleton.called and "attn_drop" not in name
    ]
    layered = [name for name in inside if any(part.isdigit() for part in name.split("."))]
    return len(layered) * config.hidden_size // config.num_hidden_layers


def _positions(skeleton: Skeleton, config: Any) -> int | None:
    """Tokens of a row that the smallest table of the text's positions has room for, learned or computed beforehand.

    Some tables have rows in front that no position uses: OPT's ``offset``, RoBERTa's up to its padding token. MPT has
    no table, but cuts its distances off at as many.
    """
    import torch

    model, found = skeleton.model, []
    text = model.get_decoder() or model  # places in an image have tables of their own
    met = {id(m) for name, m in model.named_modules() if name in skeleton.called or f"{name}.weight" in skeleton.trains}
    for name, module in text.named_modules():
        if hasattr(module, "build_mpt_alibi_tensor"):
            found.append(config.max_seq_len)
        if isinstance(module, torch.nn.Embedding) and _TABLE.search(name) and id(module) in met:
            padding = -1 if module.padding_idx is None else module.padding_idx
            found.append(module.num_embeddings - getattr(module, "offset", padding + 1))
    found += [table.shape[0] for name, table in text.named_buffers() if _COMPUTED.search(name)]
    return min(found, default=None)


def _context(config: Any) -> int | None:
    """What the config says; -1 and the like stand for no limit."""
    said = getattr(config, "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None
