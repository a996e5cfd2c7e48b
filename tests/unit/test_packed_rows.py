"""Attention of packed rows: as of each row alone, by transformers' own attention, and without anything of T x T."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_lora.models import packed
from raytune_lora.models.loading import keep_cache
from raytune_lora.models.packed import PackedAttention, Rows
from raytune_lora.training.batches import pack
from tests.unit import zoo
from tests.unit.test_leaks import CANNOT, JOIN
from tests.unit.zoo import VOCAB, ZOO

LENGTHS = (40, 24, 37)  # some longer than the zoo's windows of 32, none of a size that models have
PACKS = sorted(set(ZOO) - JOIN - CANNOT)


class Largest(TorchDispatchMode):
    """Looks for tensors that are as long and as wide as a pack."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.found: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and sum(size in (self.side, self.side + 1) for size in leaf.shape) > 1:
                self.found.append((str(func), leaf.shape))
        return out


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    draw = random.Random(1)
    drawn = [[draw.randrange(3, VOCAB - 3) for _ in range(length)] for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]} for ids in drawn]


def nats(logits_1TV: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_1TV[0, :-1].double(), labels[0, 1:], reduction="sum")


def alone(forward: Any) -> torch.Tensor:
    """The sum of the rows' losses, each in a forward pass of its own."""
    parts = []
    for row in rows():
        logits = forward(input_ids=torch.tensor([row["input_ids"]])).logits
        parts.append(nats(logits, torch.tensor([row["labels"]])))
    return torch.stack(parts).sum()


def together(model: Any) -> torch.Tensor:
    """The same, packed."""
    inputs, kept = pack(rows())
    labels = inputs.pop("labels")
    with PackedAttention(model).of(kept) as given:
        loss = nats(model(**inputs, **given).logits, labels)
        if loss.requires_grad:
            loss.backward()
    return loss


def built(name: str, **changes: Any) -> Any:
    model = zoo.spread(zoo.build(name, **changes), 0.1).double()
    keep_cache(model, False)
    if model._can_set_experts_implementation():  # the other one has no kernel for float64
        model.set_experts_implementation("eager")
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", PACKS)
def test_losses_and_gradients_are_those_of_rows_alone(name: str) -> None:
    model = built(name)
    expected = alone(model)
    expected.backward()
    wanted = gradients(model)
    with Largest(sum(LENGTHS)) as seen:
        loss = together(model)
    assert seen.found == []
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_search_for_large_tensors_finds_transformers_own_mask(name: str) -> None:
    inputs, _ = pack(rows())
    with Largest(sum(LENGTHS)) as seen, torch.no_grad():
        built(name)(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])
    assert seen.found


def test_with_gradient_checkpointing_and_a_dropout_of_attention() -> None:
    model = built("gemma2")
    together(model)
    wanted = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    with Largest(sum(LENGTHS)) as seen:
        together(model)
    assert seen.found == []
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key])
    model = built("llama", attention_dropout=0.5).train()
    torch.manual_seed(0)
    first = float(together(model).detach())
    torch.manual_seed(0)
    assert float(together(model).detach()) == first
    assert float(together(model).detach()) != first


def test_the_model_is_as_before_afterwards() -> None:
    model = built("gemma3")
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    expected = float(alone(model).detach())
    together(model)
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    assert float(alone(model).detach()) == expected


def test_a_model_is_given_no_more_than_its_own_code_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrapped around it, as autocast is."""
    model = built("llama")
    own, cls = model.forward, type(model)

    def plain(self: Any, input_ids: Any, position_ids: Any, attention_mask: Any) -> Any:
        return own(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask)

    assert "cu_seq_lens_q" in given(model)
    monkeypatch.setattr(cls, "forward", plain)
    model.forward = lambda **inputs: plain(model, **inputs)
    assert set(given(model)) == {"attention_mask"}
    assert float(together(model).detach()) == pytest.approx(float(alone(own).detach()), rel=1e-9)


def given(model: Any) -> dict[str, Any]:
    with PackedAttention(model).of(pack(rows())[1]) as found:
        return dict(found)


@pytest.mark.parametrize("window", [None, 3, 64])
def test_what_a_mask_is_of_is_told_by_asking_it(window: int | None) -> None:
    from transformers.masking_utils import (
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    size = window or 8
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    assert packed._is_window(function, window)
    assert not packed._is_window(sliding_window_causal_mask_function(size + 1), window)
    assert not packed._is_window(chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)), size)


def test_chunks_begin_anew_with_each_row() -> None:
    """Llama 4's mask: no kernel here knows it, the rows' own loop does."""
    from transformers.masking_utils import chunked_causal_mask_function

    function = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    sees = packed._Sees(Rows(torch.tensor([0, 6]), [6]), function, 4, False, False)
    mask = sees.mask(6, torch.device("cpu"))
    assert mask is not None
    expected = torch.tensor([[q // 4 == k // 4 and k <= q for k in range(6)] for q in range(6)])
    assert torch.equal(mask, expected)


# ------------------------------------------------------------------------------------------ the kernels of a GPU


SIZES = {  # heads, heads of keys, width, window of every other layer
    "Llama 3.1 8B": (32, 8, 128, None),
    "Llama 3.1 70B": (64, 8, 128, None),
    "Gemma 3 27B": (32, 16, 128, 1024),
    "width of no multiple of 8": (8, 8, 20, 16),
}


def sees(lengths: list[int], window: int | None, device: str) -> packed._Sees:
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    return packed._Sees(Rows(starts, lengths), function, window, True, False)


@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_torch_is_given_the_rows_as_they_are(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and settings of large models, on a GPU that is not there."""
    heads, shared, width, window = SIZES[size]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    packed._has_flash_kernels.cache_clear()
    calls: list[Any] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "varlen_attn" in str(func):
                calls.append((str(func), args))
            return func(*args, **(kwargs or {}))

    lengths = [3000, 1096, 4096]
    with FakeTensorMode(), Spy():
        shape = {"dtype": torch.bfloat16, "device": "cuda"}
        query = torch.empty(1, heads, sum(lengths), width, **shape)  # type: ignore[arg-type]
        key, value = (torch.empty(1, shared, sum(lengths), width, **shape) for _ in range(2))  # type: ignore[arg-type]
        module = torch.nn.Module()
        found, _ = packed._attention(module, query, key, value, sees(lengths, window, "cuda"), scaling=0.1)
        assert found.shape == (1, sum(lengths), heads, width)
    packed._has_flash_kernels.cache_clear()
    assert [name for name, _ in calls] == ["torch_attn._varlen_attn.default"]
    q, k, v, starts, _, longest, _, causal, scale, window_size, *gqa = calls[0][1]
    wide = -(-width // 8) * 8
    assert [t.shape for t in (q, k, v)] == [(sum(lengths), n, wide) for n in (heads, shared, shared)]
    assert (starts.dtype, starts.shape, longest, scale) == (torch.int32, (4,), 4096, 0.1)
    assert gqa[:1] == [True] * (heads != shared)  # false is left out
    assert (causal, window_size) == ((True, [-1, 0]) if window is None else (False, [window - 1, 0]))


def reference(query: Any, key: Any, value: Any, starts: Any, _: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """What torch documents of its kernel, spelled out: (T, H, D) row by row."""
    _, _, _, scale, window, *_ = rest
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    found = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        place = torch.arange(end - start)
        back = place[:, None] - place[None, :]
        seen = (back >= 0) & (back <= window[0] if window[0] >= 0 else True)
        found.append(((q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found), query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@pytest.fixture
def torch_kernel_on_the_cpu() -> Iterator[None]:
    library = torch.library.Library("torch_attn", "IMPL")
    packed._varlen()
    library.impl("_varlen_attn", reference, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize(("shared", "width", "of_values"), [(4, 16, 16), (2, 16, 16), (4, 12, 8)])
@pytest.mark.usefixtures("torch_kernel_on_the_cpu")
def test_what_torch_is_asked_is_what_the_loop_computes(
    window: int | None, shared: int, width: int, of_values: int
) -> None:
    lengths = [9, 5, 14]
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(lengths), width)
    key, value = torch.randn(1, shared, sum(lengths), width), torch.randn(1, shared, sum(lengths), of_values)
    what = sees(lengths, window, "cpu")
    with torch.no_grad():
        asked = packed._by_torch(what, query, key, value, 0.3)
        looped = packed._row_by_row(what, query, key, value, 0.3, 0.0, None, None)
    torch.testing.assert_close(asked, looped)
