"""Models whose code wants more than text, or does more with its weights: refused before the start, or right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import ModelConfig
from raytune_lora.errors import UserError
from raytune_lora.models.export import ADAPTER
from raytune_lora.models.loading import loader_of
from raytune_lora.models.methods import fit, method_for
from raytune_lora.models.shape import shape_of, shape_of_folder
from raytune_lora.training.checkpoint import write_parts
from raytune_lora.training.worker import clean_up
from tests.unit import zoo
from tests.unit.method_bench import Bench, config

_SMALL = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": zoo.VOCAB, "pad_token_id": 0, "eos_token_id": 1}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {  # config, a word of the reason
    "wants an image": (zoo.idefics, "does not train on a row of text alone, of any length (ValueError: Exactly 1 of"),
    "wants rows of one length": (
        lambda: T.ReformerConfig(
            is_decoder=True, axial_pos_embds_dim=[16, 16], axial_pos_shape=[16, 32], attn_layers=["local"], **_SMALL
        ),
        "does not train on a row of text alone, of any length (ValueError: If training",
    ),
    "wants a text to read": (
        lambda: T.VisionEncoderDecoderConfig(encoder=T.ViTConfig().to_dict(), decoder=zoo.gpt2().to_dict()),
        "has an encoder, and rows of text have nothing for it",
    ),
    "says no width": (T.BltConfig, "the architecture blt does not say how wide its decoder is"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_text_alone_cannot_train_is_refused(kind: str, tmp_path: Path) -> None:
    made, reason = REFUSED[kind]
    made().save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        shape_of_folder(tmp_path, ModelConfig())
    (problem,) = refused.value.problems
    assert problem.startswith("model: the architecture ")
    assert reason in problem
    assert "name " in problem


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"model_type": "nonesuch"}, "nonesuch"),
        (zoo.llama().to_dict() | {"num_attention_heads": 5}, "heads (5)"),
    ],
)
def test_a_config_that_nothing_can_be_built_from_is_refused(said: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"transformers does not build what .*config\.json describes") as refused:
        shape_of_folder(tmp_path, ModelConfig())
    assert reason in str(refused.value)


def test_prompts_are_refused_by_what_is_there_and_what_is_needed() -> None:
    """Mllama's embedding has rows beyond its vocabulary; DeepSeek-V4 sends tokens to experts by their numbers."""
    for model, kind, reason in (
        ("mllama", "prompt_tuning", f"vocab_size={zoo.VOCAB} rows, and the model's has {zoo.VOCAB + 8}"),
        ("mllama", "prefix_tuning", "not every layer of this model keeps both"),
        ("deepseek_v4", "prompt_tuning", "its code does not run on vectors in place of tokens"),
        ("deepseek_v4", "prefix_tuning", "its code does not run behind keys and values that it has not computed"),
    ):
        (problem,) = method_for(config(kind)).problems(shape_of(zoo.build(model)))
        assert reason in problem
        assert "Error" not in problem


def test_an_image_s_places_limit_no_row() -> None:
    """Git's table of them lies within its decoder, and text does not meet it."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    sizes = {"num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 48}
    git = T.GitConfig(vision_config=vision, **_SMALL | sizes)
    assert shape_of(T.AutoModelForCausalLM.from_config(git)).positions == 48


def test_a_language_model_within_another_is_loaded_by_a_class_that_knows_its_config(tmp_path: Path) -> None:
    """Mllama's folder has the config of all of it, and the language model that is trained that of its text alone."""
    base = zoo.build("mllama")
    base.save_pretrained(tmp_path)
    zoo.mllama().save_pretrained(tmp_path)
    cfg = ModelConfig()
    assert loader_of(base, tmp_path, cfg) == "AutoModelForCausalLM"
    assert loader_of(base, tmp_path, cfg, whole=True) == "MllamaForCausalLM"
    base.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert loader_of(zoo.build("llama"), _saved(zoo.llama(), tmp_path / "llama"), cfg, whole=True) == (
        "AutoModelForCausalLM"
    )


def _saved(made: Any, folder: Path) -> Path:
    made.save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------- weights that change for the evaluation


@pytest.mark.parametrize(
    ("kind", "changes"), [("full", {}), ("lora", {"modules_to_save": ["output", "value"]}), ("diff_pruning", {})]
)
def test_what_is_saved_after_an_evaluation_has_its_loss(
    kind: str, changes: dict[str, Any], folder: Callable[..., Path], tmp_path: Path
) -> None:
    """RWKV's code divides weights by 2 for every second layer before it evaluates, and again where it is loaded."""
    bench = Bench(kind, folder("rwkv"), **changes)
    trained = bench.applied()
    optimizer = Accelerator(cpu=True).prepare(bench.optimizer(trained))
    bench.train(trained, optimizer=optimizer)
    measured = bench.loss(trained)
    write_parts(tmp_path / "saved", trained.train(), optimizer, bench.method, rank=0)
    clean_up()
    loaded = bench.method.load(bench.base(), tmp_path / "saved" / ADAPTER, bench.folder)
    assert bench.loss(loaded) == pytest.approx(measured, rel=1e-5)
    if kind == "full":
        assert bench.loss(T.AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / ADAPTER)) == pytest.approx(
            measured, rel=1e-5
        )
    merged = bench.method.merge(bench.method.load(bench.base(), tmp_path / "saved" / ADAPTER, bench.folder))
    assert bench.loss(merged) == pytest.approx(measured, rel=1e-5)


def test_weights_that_change_for_the_evaluation_are_not_divided_among_workers() -> None:
    for name in ("rwkv", "llama"):
        shape = shape_of(zoo.build(name))
        for stage in (2, 3):
            problems = fit.model_problems(compose(["model.path=here", "data=fake", f"deepspeed=zero{stage}"]), shape)
            refused = any(problem.startswith("deepspeed=zero3 does not work with this model") for problem in problems)
            assert refused is (name == "rwkv" and stage == 3)


def test_an_evaluation_between_steps_changes_no_training(folder: Callable[..., Path]) -> None:
    bench = Bench("full", folder("rwkv"))
    plain, measured = bench.applied(), bench.applied()
    expected, optimizer = bench.train(plain), bench.optimizer(measured)
    found = []
    for step in range(1, 7):
        found += bench.train(measured, range(step, step + 1), optimizer)
        bench.loss(measured)
    assert torch.tensor(found).allclose(torch.tensor(expected))
