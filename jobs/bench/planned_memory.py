"""Planned memory beside what is there: ``python jobs/bench/planned_memory.py``.

Random models of several families are trained for one forward and backward pass. Kept is what the forward pass leaves
for the backward pass, without the loss's log-probabilities; peak is the most that is there at once, without weights and
gradients. On the CPU both are counted by watching every tensor that an operation makes; with ``--gpu`` the peak is
torch's own count on the GPU, and that of the whole step, with the optimizer's states. The exit status is 1 where a
ratio leaves ``--within``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import Attention, Precision, SweepConfig
from raytune_lora.models.loading import precision
from raytune_lora.models.methods import Start, method_for
from raytune_lora.models.planned import planned_memory
from raytune_lora.models.shape import shape_of
from raytune_lora.planning.activations import Batch, passes
from raytune_lora.planning.memory import Memory, formats_of
from raytune_lora.training.precision import compute_in, hold_in_fp32
from raytune_lora.training.scoring import scoring_of

VOCABULARY = 32000
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
}
GPT2 = {"n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 4096, "vocab_size": VOCABULARY}
MIDDLE = SMALL | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4}
LARGE = SMALL | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32}


@dataclass
class Row:
    """One measurement, bytes."""

    model: str
    what: str
    trained: int  # parameters
    kept: int
    planned_kept: int
    peak: int
    planned_peak: int
    gradients: int
    planned: Memory


# ------------------------------------------------------------------------------------------------------------ measuring


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known if not t.is_sparse}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


def measure(name: str, cfg: SweepConfig, length: int) -> Row:
    """One pass of a model on the CPU."""
    torch.manual_seed(0)
    base = build(name, cfg)
    shape = shape_of(base)
    model = adapted(name, cfg, base)
    batch = random_batch(cfg.training.micro_batch, length)
    live = Live([*model.parameters(), *model.buffers()])
    with live:
        loss = model(**batch)["loss"]
        held = live.now
        loss.backward()
    added = method_for(cfg.method).added(shape)
    scored = cfg.training.micro_batch * (length - 1)
    plan = planned_memory(cfg, shape, length)
    one = passes(shape, added, formats_of(cfg, added), Batch.of(cfg, length), liger=False)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return Row(
        model=name,
        what=words(cfg, length),
        trained=added.trained,
        kept=held - scored * VOCABULARY * 4,
        planned_kept=one.kept,
        peak=live.peak - gradients,
        planned_peak=plan.activations + plan.logits,
        gradients=gradients,
        planned=plan,
    )


def measure_gpu(name: str, cfg: SweepConfig, length: int) -> Row:
    """Two steps on the GPU: the second has the optimizer's states from its start."""
    cfg.gpus_per_worker = 1
    torch.manual_seed(0)
    base = build(name, cfg)
    shape = shape_of(base)
    model = adapted(name, cfg, base.to("cuda")).to("cuda")
    before = torch.cuda.memory_allocated()
    batch = {key: tensor.to("cuda") for key, tensor in random_batch(cfg.training.micro_batch, length).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss = model(**batch)["loss"]
        held = torch.cuda.memory_allocated()
        loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    added, plan = method_for(cfg.method).added(shape), planned_memory(cfg, shape, length)
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.is_cuda)
    one = passes(shape, added, formats_of(cfg, added), Batch.of(cfg, length), liger=False)
    scored = cfg.training.micro_batch * (length - 1)
    return Row(
        model=name,
        what=words(cfg, length),
        trained=added.trained,
        kept=held - before - states - scored * VOCABULARY * 4,
        planned_kept=one.kept,
        peak=torch.cuda.max_memory_allocated(),
        planned_peak=plan.total - plan.runtime,
        gradients=gradients,
        planned=plan,
    )


def build(name: str, cfg: SweepConfig | None = None) -> Any:
    """A random model of a family, frozen, as the config has its attention and, without a GPU, its precision."""
    config = FAMILIES[name]()
    from transformers import AutoModelForCausalLM

    asked: dict[str, Any] = {}
    if cfg is not None and cfg.model.attention is not Attention.auto:
        asked["attn_implementation"] = cfg.model.attention.value
    model = AutoModelForCausalLM.from_config(config, **asked)
    model.config.use_cache = False
    if cfg is not None and (cfg.model.precision is Precision.bf16 or cfg.gpus_per_worker):
        model = model.to(torch.bfloat16)
    return model.requires_grad_(False)


def adapted(name: str, cfg: SweepConfig, base: Any = None) -> Any:
    """The model with its method, ready to train."""
    base = build(name, cfg) if base is None else base
    if cfg.training.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = method_for(cfg.method).apply(base, Start(2, Path(), lambda _count: iter(()))).eval()
    hold_in_fp32(model)
    on_gpu, device = cfg.gpus_per_worker > 0, next(base.parameters()).device
    compute_in(model.to(device), precision(cfg.model.precision, on_gpu=on_gpu), on_gpu=on_gpu)
    scoring_of(model).fit(model, {key: tensor.to(device) for key, tensor in random_batch(2, 8).items()})
    return model.train()


def random_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of random tokens; the first is padded where there are several."""
    ids = torch.randint(2, VOCABULARY, (rows, length))
    mask = torch.ones(rows, length, dtype=torch.long)
    if rows > 1:
        mask[0, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def _family(kind: str, sizes: dict[str, Any], **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import AutoConfig

        ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
        return AutoConfig.for_model(kind, **(sizes | ends | changes))

    return make


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _family("llama", SMALL),
    "llama_biased": _family("llama", SMALL, attention_bias=True, mlp_bias=True),
    "llama_middle": _family("llama", MIDDLE),
    "llama_large": _family("llama", LARGE),
    "qwen3": _family("qwen3", SMALL, head_dim=64),
    "gemma": _family("gemma", SMALL, head_dim=32),
    "phi3": _family("phi3", SMALL),
    "neox": _family("gpt_neox", SMALL, num_key_value_heads=8),
    "gpt2": _family("gpt2", GPT2),
    "mixtral": _family("mixtral", SMALL, num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": _family(
        "qwen3_moe", SMALL, head_dim=32, num_experts=8, moe_intermediate_size=344, num_experts_per_tok=2
    ),
    "gpt_oss": _family("gpt_oss", SMALL, head_dim=32, num_local_experts=8, num_experts_per_tok=2),
}


# ------------------------------------------------------------------------------------------------------------ answering


def words(cfg: SweepConfig, length: int) -> str:
    again = ", checkpointing" if cfg.training.gradient_checkpointing else ""
    share = getattr(cfg.method, "dropout", 0.0)
    dropout = f", dropout {share:g}" if share else ""
    return f"{cfg.method.kind}, {cfg.training.micro_batch} x {length}{dropout}{again}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the config, as method=dora")
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=["llama", "llama_middle", "qwen3"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens of a row")
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 4], help="rows of a forward pass")
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU, in bf16")
    parser.add_argument("--within", type=float, default=0.1, help="of the measured (default: 0.1)")
    parser.add_argument("--json", type=Path, help="file for the table")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU here")
    rows = []
    print(
        f"{'model':14}{'what':44}{'kept MB':>10}{'planned':>10}{'ratio':>8}{'peak MB':>10}{'planned':>10}{'ratio':>8}"
    )
    for name in args.models:
        for length in args.lengths:
            for micro in args.micro:
                for again in ("false", "true"):
                    own = [f"training.micro_batch={micro}", f"training.gradient_checkpointing={again}"]
                    common = ["model=tiny", "data=fake", "deepspeed=off", f"training.global_batch={micro}"]
                    cfg = compose([*common, f"data.max_length={length}", *own, *args.overrides])
                    rows.append((measure_gpu if args.gpu else measure)(name, cfg, length))
                    show(rows[-1], checkpointing=again == "true")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any(abs(row.planned_peak / row.peak - 1) > args.within for row in rows))


def show(row: Row, *, checkpointing: bool) -> None:
    """Print a line; with checkpointing, what is kept is not what all layers keep, and only the peak compares."""
    kept = f"{'':28}"
    if not checkpointing:
        kept = f"{row.kept / 1e6:10.2f}{row.planned_kept / 1e6:10.2f}{row.planned_kept / row.kept:8.3f}"
    peak = f"{row.peak / 1e6:10.2f}{row.planned_peak / 1e6:10.2f}{row.planned_peak / row.peak:8.3f}"
    print(f"{row.model:14}{row.what:44}{kept}{peak}", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
