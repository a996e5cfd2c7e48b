"""Packing on a model whose packed rows see each other: refused by whole jobs before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_lora.cli import job
from raytune_lora.models.sources import byte_tokenizer
from tests.integration.conftest import EVALUATION, TINY
from tests.unit import zoo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SEARCHED = "+space.ends={key: training.packing, kind: categorical, choices: [false, true]}"


@pytest.mark.parametrize(
    ("verb", "override", "said", "remedy"),
    [
        ("train", "training.packing=true", "training.packing=true", "set training.packing=false"),
        ("sweep", SEARCHED, "space.ends: training.packing=true", "take true out of space.ends"),
    ],
)
def test_packed_rows_that_would_see_each_other_are_refused(
    verb: str,
    override: str,
    said: str,
    remedy: str,
    ray_instance: None,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, output = tmp_path / "bloom", tmp_path / "out"
    zoo.build("bloom").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    capsys.readouterr()  # of transformers, which shows that it writes
    overrides = [*TINY[1:], *EVALUATION, f"model.path={model}", f"cache={cache}", f"output={output}", override]
    assert job(verb, overrides) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"error: {said}: {model} does not keep packed rows apart (other words in one row ")
    assert told[-1].endswith(f"; {remedy}")
    assert not any("measuring" in line or "baseline" in line for line in told)
    assert not output.exists(), "the same command without packing can be given at once"
