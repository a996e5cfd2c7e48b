"""What packed rows cost by their own attention and by transformers' mask: ``python jobs/bench/packed_attention.py``.

Forward and backward passes of a small Llama over packs of more and more rows of equal length, by three ways in turns:
a mask of all tokens times all, as transformers makes one from the positions (SDPA); each row apart, as training does;
and the same rows side by side, of which none is padded, as the least there could be. Prints the fastest pass of each.
The exit status is 1 where rows apart take more than ``--limit`` times rows side by side. It needs neither Ray nor
Hydra, and takes the GPU where there is one, in bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_lora.models.packed import PackedAttention
from raytune_lora.training.batches import pack

WAYS = ("mask of all", "rows apart", "side by side")
VOCABULARY = 1024


def passes(model: Any, rows: int, length: int) -> dict[str, Callable[[], Any]]:
    """By way, the logits of so many rows."""
    device = next(model.parameters()).device
    ids = torch.randint(VOCABULARY, (rows, length))
    batch, where = pack([{"input_ids": row, "labels": row} for row in ids.tolist()])
    tensors = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    attention, where = PackedAttention(model), where.on(device)

    def apart() -> Any:
        with attention.of(where) as given:
            return model(**tensors, **given).logits

    beside = ids.to(device)
    return dict(
        zip(WAYS, (lambda: model(**tensors).logits, apart, lambda: model(input_ids=beside).logits), strict=True)
    )


def seconds(model: Any, forward: Callable[[], Any]) -> float:
    """Of one forward and backward pass."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    forward().float().logsumexp(-1).mean().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="of a pack")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.5)
    args = parser.parse_args()
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=args.length)
    model = AutoModelForCausalLM.from_config(config).train()
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    found: dict[int, dict[str, float]] = {}
    for tokens in args.tokens:
        ways = passes(model, tokens // args.length, args.length)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.turns + 1):
            for way, forward in ways.items():
                times[way].append(seconds(model, forward))
        found[tokens] = {way: min(taken[1:]) for way, taken in times.items()}
        print(f"{tokens:6} tokens: " + ", ".join(f"{way} {taken:.3f} s" for way, taken in found[tokens].items()))
    within = all(of["rows apart"] <= args.limit * of["side by side"] for of in found.values())
    print(f"{'within' if within else 'ABOVE'} the limit of {args.limit} x rows side by side")
    if args.json:
        args.json.write_text(json.dumps({"length": args.length, "seconds": found, "within": within}, indent=2) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
