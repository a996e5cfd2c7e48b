"""Model FLOPs utilization (MFU): the share of a GPU's peak that a model's own arithmetic takes.

A token costs two FLOPs a weight in the forward pass, two for the gradient of the layer's input and two for the gradient
of the weight itself: 6 N for training all N weights (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; MFU after
Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). A frozen weight needs no gradient of its own and costs 4.

    FLOPs a token = 6 N_trained + 4 N_frozen
    MFU = FLOPs a token * tokens a second / (peak FLOPs a second of a GPU * GPUs)

N leaves out embedding tables, which are looked up and not multiplied, and counts the output head, also one that shares
an embedding's weights. Tokens are those that are not padding. What activation checkpointing computes twice does not
count, nor does attention's product of queries and keys (12 * layers * width * tokens of a sequence): small beside the
weights for sequences shorter than a few thousand tokens. For mixtures of experts N holds the idle experts too, and MFU
is too high.
"""

from __future__ import annotations

import re
from typing import Any

import torch

# Words of a device's name, and its peak in dense 16-bit matrix products with fp32 sums: TFLOP/s, from NVIDIA's data
# sheets (halved where those count sparsity). The first line whose words are all in the name holds.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500),
    ("B300", 2250),
    ("GB200", 2500),
    ("B200", 2250),
    ("H200 NVL", 836),
    ("H200", 989),
    ("GH200", 989),
    ("H100 NVL", 836),
    ("H100 PCIE", 756),
    ("H100", 989),
    ("H800 PCIE", 756),
    ("H800", 989),
    ("H20", 148),
    ("A100", 312),
    ("A800", 312),
    ("A30", 165),
    ("A40", 149.7),
    ("A10", 125),
    ("A10G", 70),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX A6000", 154.8),
    ("RTX 6000 ADA", 364.2),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71),
    ("V100 PCIE", 112),
    ("V100", 125),
    ("T4", 65),
)
_OTHER_CHIP = {"MIG", "LAPTOP", "D"}  # words that name a part of a chip, or a smaller one


def flops_per_token(model: Any) -> float:
    """FLOPs of one token's forward and backward pass.

    Args:
        model: a transformers model, with or without adapters; its weights may be partitioned or packed in 4 bits.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters(recurse=False)}
    head = model.get_output_embeddings()
    looked_up = tables - {id(p) for p in head.parameters()} if head is not None else tables
    counted = [p for p in model.parameters() if id(p) not in looked_up]
    return float(sum((6 if p.requires_grad else 4) * _size(p) for p in counted))


def peak_flops(device: str) -> float | None:
    """Peak FLOPs a second of a device in dense 16-bit matrix products; None where it is not known.

    Args:
        device: as ``torch.cuda.get_device_name`` has it, such as ``NVIDIA H100 80GB HBM3``.
    """
    words = set(re.split(r"[^A-Z0-9]+", device.upper()))
    if words & _OTHER_CHIP:
        return None
    return next((tera * 1e12 for name, tera in _PEAKS if words >= set(name.split())), None)


def worker_peak(dtype: torch.dtype) -> float | None:
    """Peak FLOPs a second of this worker's GPU; None where it is not known, and for arithmetic in fp32."""
    if dtype is torch.float32:
        return None
    return peak_flops(torch.cuda.get_device_name())


def _size(parameter: Any) -> int:
    """Weights in a parameter: whole where ZeRO-3 has partitioned it, two a byte where bitsandbytes has packed it."""
    count = int(getattr(parameter, "ds_numel", parameter.numel()))
    return 2 * parameter.element_size() * count if type(parameter).__name__ == "Params4bit" else count
