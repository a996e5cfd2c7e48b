"""The shape of a known model."""

from __future__ import annotations

from raytune_lora.planning.shape import Block, Linear, Shape


def _llama_1b() -> Shape:
    """Llama 3.2 1B."""
    linears = []
    for number in range(16):
        at, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        widths = {"q_proj": 2048, "k_proj": 512, "v_proj": 512}
        linears += [Linear(f"{at}.{name}", 2048, width, f"{at}.input") for name, width in widths.items()]
        linears.append(Linear(f"{at}.o_proj", 2048, 2048, f"{at}.inside"))
        linears += [Linear(f"{mlp}.{name}", 2048, 8192, f"{mlp}.input") for name in ("gate_proj", "up_proj")]
        linears.append(Linear(f"{mlp}.down_proj", 8192, 2048, f"{mlp}.inside"))
    block = Block(32, 2048, 512, 8192, 3, 4096, True)
    linears.append(Linear("lm_head", 2048, 128256, ".input", quantized=False))
    return Shape(2048, 16, block, 128256, "lm_head", tuple(linears), 67584, (), 1_235_814_400)


LLAMA = _llama_1b()
