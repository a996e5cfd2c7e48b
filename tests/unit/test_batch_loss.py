"""The loss of a batch is the same however it is cut into micro-batches, also of models that know no batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers as T

from raytune_lora.config.compose import compose
from raytune_lora.models.sources import byte_tokenizer
from raytune_lora.training.place import Place
from raytune_lora.training.worker import train
from raytune_lora.tuning.job import plain_run, prepare_inputs
from tests.unit import zoo
from tests.unit.test_exported import heard

pytestmark = pytest.mark.timeout(120)


def qwen3_vl() -> Any:
    """Its loss is the mean of what it is given (``accepts_loss_kwargs`` is false)."""
    text = zoo.qwen3(rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}).to_dict()
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 14,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    places = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: zoo.VOCAB - 1 - at for at, name in enumerate(places)}
    text = {name: value for name, value in text.items() if name != "model_type"}
    model = T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    assert not model.accepts_loss_kwargs
    return model


def bart() -> Any:
    """A decoder whose own loss is of the token itself."""
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    config = T.BartConfig(vocab_size=zoo.VOCAB, d_model=32, decoder_layers=2, decoder_ffn_dim=64, dropout=0.0, **heads)
    return T.BartForCausalLM(config)


@pytest.mark.parametrize("made", [qwen3_vl, bart])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_micro_batches_make_the_same_loss(
    method: str, made: Callable[[], Any], rows: Path, cache: Path, tmp_path: Path
) -> None:
    made().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    found = []
    for size in (1, 4):
        cfg = compose(
            [
                f"model.path={tmp_path / 'model'}",
                f"data.path={rows}",
                f"cache={cache}",
                f"method={method}",
                f"training.micro_batch={size}",
                *(["method.dropout=0"] if method == "lora" else []),
                *("deepspeed=off", "training.max_steps=3", "training.global_batch=8", "training.learning_rate=1e-2"),
                *("data.max_length=200", "evaluation.every=1000000", "evaluation.loss_rows=0"),
            ]
        )
        reports: list[dict[str, Any]] = []
        (tmp_path / str(size)).mkdir()
        place = Place(0, 1, tmp_path / str(size), partial(heard, reports), lambda: 0)
        train(plain_run(cfg), prepare_inputs(cfg).store, place)
        found.append(reports[-1])
    for name in ("eval_loss", "train_loss"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
    assert found[0]["train_loss"] == pytest.approx(found[0]["eval_loss"], rel=0.2), "they are of the same kind"
