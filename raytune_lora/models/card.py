"""The card of an adapter, ``README.md`` beside it: what it is, and code that loads it as it was trained."""

from __future__ import annotations

import json
from typing import Any

CARD = "README.md"

_ADAPTER = """
from raytune_lora.models.export import load

model = load(adapter{trust})
"""
_PEFT = """
model = PeftModel.from_pretrained(model, adapter).eval()
"""
_BITFIT = """
with torch.no_grad():
    for name, bias in load_file(f"{adapter}/weights.safetensors").items():
        model.get_parameter(name).copy_(bias)
"""
_BOTTLENECK = """
def behind(D, d, U, u):
    def hook(sublayer, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        y = x + F.linear(F.gelu(F.linear(x.to(D.dtype), D, d)), U, u).to(x.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


weights = {name: tensor.to(model.device) for name, tensor in load_file(f"{adapter}/weights.safetensors").items()}
for name in {name.partition(".adapter.")[0] for name in weights}:
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    hook = behind(*(weights[f"{name}.adapter.{part}"] for part in parts))
    model.get_submodule(name).register_forward_hook(hook)
"""
_DIFFERENCES = """
def beside(D):
    return lambda layer, inputs, output: output + F.linear(inputs[0].to(D.dtype), D).to(output.dtype)


weights = {name: tensor.to(model.device) for name, tensor in load_file(f"{adapter}/weights.safetensors").items()}
for name in {name.partition(".sparse.")[0] for name in weights}:
    shape, places, values = (weights[f"{name}.sparse.diff.{part}"] for part in ("shape", "places", "values"))
    D = torch.zeros(shape.tolist(), dtype=values.dtype, device=model.device)
    D.view(-1)[places] = values
    model.get_submodule(name).register_forward_hook(beside(D))
"""
_OWN = {"bitfit": _BITFIT, "adapter": _BOTTLENECK, "diff_pruning": _DIFFERENCES}
_IMPORTS = {
    "F.": "import torch.nn.functional as F",
    "PeftModel": "from peft import PeftModel",
    "prepare_model_for_kbit_training": "from peft import prepare_model_for_kbit_training",
    "load_file": "from safetensors.torch import load_file",
}
_TEMPLATES = {"text": "patterns of text, as a chat template", "chat": "a chat template"}
_FULL_BITS = """
# bitsandbytes would compute in bf16 on some CPUs
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
"""
_AS_TRAINED = """
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # its norms and head are in fp32
"""


def card(record: dict[str, Any]) -> str:
    """The card.

    Args:
        record: that lies beside it.
    """
    base, method = record["base"], record["method"]
    front = {"base_model": base["name"], "library_name": "transformers", "pipeline_tag": "text-generation"}
    whole = method["kind"] == "full"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        f"tags: [{', '.join(['raytune-lora', method['kind']])}]",
        "---",
        "",
        f"# {'A model' if whole else 'An adapter'} trained with `method={method['kind']}`",
        "",
        *(f"- {name}: {said}" for name, said in _facts(record).items()),
        "",
        "## Loading it",
        "",
        f"As it was trained, {'' if whole else 'on the same base model and '}in the same number format; another one "
        "gives other answers. `adapter` is this folder.",
        "",
        "```python",
        recipe(record).strip(),
        "```",
        "",
        *_asking(record),
    ]
    return "\n".join(lines) + "\n"


def _facts(record: dict[str, Any]) -> dict[str, str]:
    base, found = record["base"], record["measured"]
    settings = {key: value for key, value in record["method"].items() if key != "kind"}
    quantization = {key: value for key, value in record["quantization"].items() if key != "kind"}
    facts = {
        "base model": f"`{base['name']}`" + (f", revision `{base['revision']}`" if base["revision"] else ""),
        "number format": f"`{record['dtype']}`"
        + (f", quantized: {_listed(quantization, record['quantization']['kind'])}" if _kind(record) != "none" else ""),
        "method": _listed(settings, record["method"]["kind"]),
        "template": f"{_TEMPLATES[record['template']['kind']]}, in `chat_template.jinja`",
    }
    if found["eval_loss"] is not None:
        facts["validation loss"] = (
            f"{found['eval_loss']:.4f} nats a token, over {found['eval_loss_rows']} of {found['validation_rows']} rows"
        )
    if found["exact_match"] is not None:
        facts["exact match"] = (
            f"{found['exact_match']:.4f}, of {found['exact_match_rows']} of {found['test_rows']} rows"
        )
    return facts


def _listed(settings: dict[str, Any], kind: str) -> str:
    return ", ".join([f"`{kind}`", *(f"{key} {json.dumps(value)}" for key, value in settings.items())])


def _kind(record: dict[str, Any]) -> str:
    return str(record["quantization"]["kind"])


def recipe(record: dict[str, Any], adapter: str = ".") -> str:
    """Python that loads the adapter in a folder, as ``model`` and ``tokenizer``."""
    kind, loader = record["method"]["kind"], record["base"]["loader"]
    trust = ", trust_remote_code=True" if record["base"]["trust_remote_code"] else ""
    if kind == "ir_qlora" or loader is None:  # the quantization is this package's own
        body = _ADAPTER.format(trust=trust)
    elif kind == "full":
        body = _base(record | {"base": {**record["base"], "revision": None}}, name="adapter")
    else:
        body = _base(record, name=json.dumps(record["base"]["name"], ensure_ascii=False)) + _OWN.get(kind, _PEFT)
    body += f"tokenizer = AutoTokenizer.from_pretrained(adapter{trust})\n"
    known = ("AutoConfig", loader, "AutoTokenizer", "BitsAndBytesConfig")
    names = [name for name in known if name and name in body]
    imports = ["import torch"] if "torch." in body else []
    imports += [line for name, line in _IMPORTS.items() if name in body]
    imports.append(f"from transformers import {', '.join(names)}")
    return (
        "\n".join(sorted(imports, key=lambda line: line.startswith("from")))
        + f"\n\nadapter = {json.dumps(adapter)}\n{body}"
    )


def _base(record: dict[str, Any], name: str) -> str:
    """Python that loads the base model."""
    base, quantized = record["base"], _kind(record) != "none"
    settings = [f"dtype=torch.{record['dtype']}"]
    settings += [f'revision="{base["revision"]}"'] if base["revision"] else []
    settings += ["trust_remote_code=True"] if base["trust_remote_code"] else []
    text = ""
    if quantized and base["stored_quantized"]:
        settings.append("config=config")
        text = f"config = AutoConfig.from_pretrained({name})\n"
        if _kind(record) != "int8":
            text += f'config.quantization_config["bnb_4bit_compute_dtype"] = "{_compute(record)}"\n'
    elif quantized:
        settings.append("quantization_config=quantization")
        text = f"quantization = {_quantization(record)}\n"
    text += f"model = {base['loader']}.from_pretrained({name}, {', '.join(settings)}).eval()\n"
    if not quantized:
        return text
    if record["dtype"] == "float32":
        return text + (_FULL_BITS if _kind(record) != "int8" else "")
    return text + _AS_TRAINED


def _quantization(record: dict[str, Any]) -> str:
    cfg = record["quantization"]
    if cfg["kind"] == "int8":
        return f"BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold={cfg['int8_threshold']})"
    lines = [
        "load_in_4bit=True",
        f'bnb_4bit_quant_type="{cfg["kind"]}"',
        f"bnb_4bit_use_double_quant={cfg['double']}",
        f"bnb_4bit_compute_dtype=torch.{_compute(record)}",
    ]
    return "BitsAndBytesConfig(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _compute(record: dict[str, Any]) -> str:
    formats = {"auto": record["dtype"], "fp32": "float32", "bf16": "bfloat16"}
    return str(formats[record["quantization"]["compute"]])


def _asking(record: dict[str, Any]) -> list[str]:
    """How to ask it as in training, and how far that is the same."""
    template = record["template"]
    asked = '[{"type": "text", "text": "…"}]' if template["parts"] else '"…"'
    lines = [
        "## Asking it",
        "",
        "```python",
        f'messages = [{{"role": "user", "content": {asked}}}]',
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
        'return_tensors="pt").to(model.device)',
        f"output = model.generate(**inputs, max_new_tokens=256, do_sample=False{_stops(record)})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
    ]
    if template["kind"] == "text":
        lines += [
            "A user's message may have a field `input` beside its `content`, written as the rows' `input` was.",
            "",
        ]
    if not template["prompts"]:
        lines.append(
            "**The template's text is that of the training, its tokens are not**: prompts were tokenized piece by "
            "piece, and this tokenizer writes the whole text with others."
        )
    elif not template["rows"]:
        lines.append(
            "Prompts of one question have the same tokens as in training. Conversations with earlier answers have the "
            "same text, but may have other tokens where an answer begins or ends: there, training tokenized piece by "
            "piece."
        )
    else:
        lines.append("The template gives prompts and conversations the same tokens as in training.")
    return lines


def _stops(record: dict[str, Any]) -> str:
    return f", eos_token_id={record['stop_ids']}" if record["stop_ids"] else ""
