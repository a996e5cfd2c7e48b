"""Losses of a run in bf16 and in fp32, beside PEFT alone: ``python jobs/bench/mixed_precision.py``.

The same LoRA on the same rows from the same start: in fp32, and in bf16 as runs are, with what trains in fp32 and all
else in bf16. Beside each stands a plain loop over PEFT's model that was loaded in that precision, with PEFT's own
casts. In bf16 the first steps gain less, here as there: an update that is small beside the output of its layer is
rounded away with it. The exit status is 1 where a step's loss is further than ``--within`` from the plain loop's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_lora.cache import Cache
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.models.sources import materialize
from raytune_lora.training.batches import Batches
from raytune_lora.training.place import Place
from raytune_lora.training.plan import plan_run, stream
from raytune_lora.training.schedule import schedule, warmup_steps
from raytune_lora.training.worker import clean_up, train
from raytune_lora.tuning.job import plain_run, prepare_inputs

COMMON = (
    *("data=fake", "deepspeed=off", "training.global_batch=8", "training.micro_batch=8", "method.dropout=0"),
    *("evaluation.loss_rows=1", "evaluation.every=1000000", "training.patience=null"),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the config, as training.learning_rate=1e-3")
    parser.add_argument("--model", default="smollm2", help="of conf/model (default: smollm2)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (default: 8)")
    parser.add_argument("--within", type=float, default=0.02, help="nats a token (default: 0.02)")
    parser.add_argument("--json", type=Path, help="file for the losses")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for precision, dtype in DTYPES.items():
        own = [f"model={args.model}", f"training.max_steps={args.steps}", f"model.precision={precision}"]
        cfg = compose([*COMMON, *own, *args.overrides])
        store = prepare_inputs(cfg).store
        found[f"{precision}, ours"] = ours(plain_run(cfg), store)
        found[f"{precision}, PEFT alone"] = peft_alone(plain_run(cfg), store, dtype)
    print(f"{'step':>4}" + "".join(f"{name:>20}" for name in found))
    for step, row in enumerate(zip(*found.values(), strict=True), 1):
        print(f"{step:>4}" + "".join(f"{loss:>20.4f}" for loss in row))
    apart = {
        name: max(abs(a - b) for a, b in zip(found[f"{name}, ours"], found[f"{name}, PEFT alone"], strict=True))
        for name in DTYPES
    }
    print(", ".join(f"{name}: {gap:.1e} apart at most" for name, gap in apart.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(max(apart.values()) > args.within)


def ours(cfg: RunConfig, store: TokenStore) -> list[float]:
    """The loss of each step of a run."""
    with tempfile.TemporaryDirectory() as folder:
        train(cfg, store, Place(0, 1, Path(folder), lambda _: True, lambda: 0))
        clean_up()
        lines = (Path(folder) / "steps.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def peft_alone(cfg: RunConfig, store: TokenStore, dtype: torch.dtype) -> list[float]:
    """The same of a plain loop."""
    settings, method = cfg.training, cfg.method
    plan = plan_run(cfg, store.rows["train"], store.lengths("train"))
    model: Any = AutoModelForCausalLM.from_pretrained(
        materialize(cfg.model, Cache.of(cfg.cache, cfg.cluster.node_cache)), dtype=dtype
    )
    torch.manual_seed(stream(settings.seed, "weights"))
    lora = LoraConfig(task_type="CAUSAL_LM", r=method.r, lora_alpha=method.alpha, target_modules="all-linear")  # type: ignore[attr-defined]
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = warmup_steps(settings.warmup, plan.steps)
    rates = schedule(settings.lr_scheduler, optimizer, warmup=warmup, steps=plan.steps)
    found, batches = [], Batches(store.split("train"), plan, 0, 0)
    for step in batches:
        loss = torch.zeros(())
        for micro in step.micro:
            inputs, _ = micro.on(torch.device("cpu"))
            labels_BT = inputs.pop("labels")
            logits_BTV = model(**inputs).logits[:, :-1].float()
            part = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (part / step.trained).backward()
            loss += part.detach() / step.trained
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        found.append(loss.item())
    batches.close()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
