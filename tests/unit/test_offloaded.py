"""AdamW of offloaded states: DeepSpeed's computes what torch's does, from any step on; without a compiler, torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_lora.training.deepspeed import forget_steps, offloaded_adamw
from raytune_lora.training.state import _steps_made

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
DECAY = 0.1
FALLS_BACK = "from raytune_lora.training.deepspeed import offloaded_adamw; print(offloaded_adamw().__module__)"


def stepped(cls: Any, dtype: torch.dtype, steps: int, cut: int | None = None) -> torch.Tensor:
    """A parameter after so many steps; ``cut``: of an optimizer that was made anew after so many."""
    draw = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3000, generator=draw).to(dtype))

    def made() -> Any:
        optimizer = cls([{"params": [parameter], "weight_decay": DECAY}], **SETTINGS)
        if hasattr(optimizer, "ds_opt_adam"):
            optimizer.register_step_pre_hook(forget_steps)
        return optimizer

    optimizer = made()
    for step in range(steps):
        if step == cut:
            states = optimizer.state[parameter]
            optimizer = made()
            optimizer.state[parameter] = states | {"step": _steps_made(optimizer, parameter, step)}
        parameter.grad = torch.randn(3000, generator=draw).to(dtype)
        optimizer.step()
    return parameter.detach()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeeds_computes_what_torchs_does_from_any_step_on() -> None:
    cls = offloaded_adamw()
    assert cls.__name__ == "DeepSpeedCPUAdam"
    whole = stepped(cls, torch.float32, 30)
    torch.testing.assert_close(whole, stepped(torch.optim.AdamW, torch.float32, 30), atol=1e-6, rtol=1e-5)
    assert torch.equal(stepped(cls, torch.float32, 30, cut=17), whole)
    halves = stepped(cls, torch.bfloat16, 30).float()
    assert (halves - whole).norm() < 0.05 * whole.norm(), "a bf16 parameter is rounded at each step"


@pytest.mark.slow
def test_without_a_compiler_torchs_serves(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FALLS_BACK], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "torch.optim.adamw"
    assert "DeepSpeed's AdamW for the CPU cannot be built here (" in done.stderr


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_goes_on_whichever_kernel_it_has(fused: bool) -> None:
    def cls(groups: Any, **settings: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, fused=fused, **settings)

    whole = stepped(cls, torch.float32, 12)
    assert torch.equal(stepped(cls, torch.float32, 12, cut=5), whole)
    torch.testing.assert_close(whole, stepped(torch.optim.AdamW, torch.float32, 12), atol=1e-6, rtol=1e-6)
