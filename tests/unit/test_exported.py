"""What is exported is what was reported: trained by a worker, exported, and loaded in another process by its card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raytune_lora.config.compose import compose
from raytune_lora.models.loading import load_model, loader_of
from raytune_lora.models.methods import registered
from raytune_lora.models.sources import byte_tokenizer
from raytune_lora.training.place import Place
from raytune_lora.training.worker import train
from raytune_lora.tuning.job import export, plain_run, prepare_inputs
from tests import load_exported
from tests.unit import zoo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # all runs are made before the first test

RUN = (
    "deepspeed=off", "training.max_steps=3", "training.global_batch=4", "training.learning_rate=1e-2",
    "training.warmup=0", "data.max_length=256", "evaluation.every=1000000", "evaluation.loss_rows=0",
)  # fmt: skip
OWN = {
    "bitfit": ["model=tiny_bias"],
    "ir_qlora": ["method.r=8"],  # it divides the widths
    "vera": ["method.r=16"],
    "diff_pruning": ["method.sparsity=0.9"],
    "eva": ["method.rho=2.0"],
    "prompt_tuning": ["method.text=Answer."],
    "adapter": ["method.placement=houlsby"],
}
QUANTIZED = {
    "nf4": (
        "lora",
        "dora",
        "adalora",
        "ia3",
        "adapter",
        "bitfit",
        "diff_pruning",
        "layernorm",
        "p_tuning",
        "loftq",
        "ir_qlora",
    ),
    "int8": ("lora", "diff_pruning"),
    "fp4": ("rslora",),
}
ON_OTHERS = {  # name: model of the zoo, method, what else
    "tied-head": ("tied_llama", "lora", ["method.target_modules=[lm_head,q_proj]"]),
    "tied-head-pissa": ("tied_llama", "pissa", ["method.target_modules=[lm_head]"]),
    "gpt2-diff_pruning": ("gpt2", "diff_pruning", ["method.sparsity=0.5"]),
    "gpt2-adapter": ("gpt2", "adapter", []),
    "gpt2-bitfit": ("gpt2", "bitfit", []),
    "gemma2-full": ("gemma2", "full", []),
    "llava-lora": ("llava", "lora", []),
    "qwen2-lora-nf4": ("qwen2", "lora", ["quantization=nf4"]),
    "rwkv-full": ("rwkv", "full", []),
    "mamba-lora-nf4": ("mamba", "lora", ["quantization=nf4"]),
    "mllama-lora": ("mllama", "lora", []),
    "mllama-full": ("mllama", "full", []),
    "hrm_text-loftq-nf4": ("hrm_text", "loftq", ["quantization=nf4"]),
}

OWN_QUANTIZATION = ("ir_qlora-nf4", "mamba-lora-nf4")  # no other package has it


def runs() -> dict[str, list[str]]:
    """Overrides of each run, by its name."""
    kinds = [cls.config_class().kind for cls in registered().values()]
    found = {kind: [f"method={kind}"] for kind in kinds if kind not in ("loftq", "ir_qlora")}
    found |= {f"{kind}-{q}": [f"method={kind}", f"quantization={q}"] for q in QUANTIZED for kind in QUANTIZED[q]}
    found = {name: ["model=tiny", *own, *OWN.get(own[0][7:], [])] for name, own in found.items()}
    others = {
        name: [f'model.path="~/{model}"', f"method={kind}", *own] for name, (model, kind, own) in ON_OTHERS.items()
    }
    return found | others


def heard(reports: list[dict[str, Any]], report: dict[str, Any]) -> bool:
    reports.append(report)
    return True


@pytest.fixture(scope="module")
def exported(
    rows: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float], dict[str, Any]]:
    """Folder of the exports, the loss that each run reported, and what another process found."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("exported")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reported: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for model in {model for model, _, _ in ON_OTHERS.values()}:
            zoo.build(model, pad_token_id=0, eos_token_id=1).save_pretrained(home / model)
            # as it was made: Mllama's language model is saved with the config of its text alone
            zoo.ZOO[model](pad_token_id=0, eos_token_id=1).save_pretrained(home / model)
            byte_tokenizer().save_pretrained(home / model)
        for name, own in runs().items():
            cfg = compose([*own, *RUN, f"data.path={rows}", f"cache={cache}"])
            inputs = prepare_inputs(cfg)
            reports: list[dict[str, Any]] = []
            place = Place(0, 1, tmp_path_factory.mktemp("run"), partial(heard, reports), lambda: 0)
            train(plain_run(cfg), inputs.store, place)
            reported[name] = reports[-1]["eval_loss"]
            figures: dict[str, Any] = {
                "eval_loss": reported[name],
                "eval_loss_rows": 1,
                "exact_match": None,
                "exact_match_rows": 0,
            }
            checkpoint = Path(reports[-1]["checkpoint"])
            target = folder / name
            base = load_model(inputs.model, cfg.model, cfg.quantization)
            loader = loader_of(base, inputs.model, cfg.model, whole=cfg.method.kind == "full")
            figures |= {"dtype": "float32", "loader": loader}
            export(plain_run(cfg), inputs.store, inputs.model, checkpoint, target, figures)
    torch.set_num_threads(threads)
    validation = [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in inputs.store.split("validation")]
    (folder.parent / "validation.json").write_text(json.dumps(validation))
    command = [sys.executable, load_exported.__file__, str(folder), str(folder.parent / "validation.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return folder, reported, json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", runs())
def test_an_export_has_the_loss_that_was_reported(name: str, exported: Any) -> None:
    folder, reported, found = exported
    loss, needed = found[name]
    assert loss == pytest.approx(reported[name], rel=1e-5)
    assert needed == (name in OWN_QUANTIZATION), "the card's code needs this package for what nothing else computes"
    front = yaml.safe_load((folder / name / "README.md").read_text().split("---")[1])
    base = json.loads((folder / name / "record.json").read_text())["base"]
    assert front["base_model"] == base["name"]
    assert Path(base["name"]).is_absolute()
