"""The last lines on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.tuning.summary import lines

SAMPLE = json.loads((Path(__file__).parent / "results_sample.json").read_text(encoding="utf-8"))


def trial(trial_id: str, status: str, error: str | None = None) -> dict[str, Any]:
    return {"trial_id": trial_id, "status": status, "error": error, "log": f"trials/{trial_id}/logs"}


def results(*trials: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "baseline": {"eval_loss": 2.5, "exact_match": 0.0},
        "best": {
            "trial_id": "0001",
            "eval_loss": 0.51239,
            "eval_loss_rows": 74,
            "eval_loss_interval": [0.4, 0.6248],
            "exact_match": 0.75,
            "exact_match_rows": 24,
            "exact_match_interval": [0.5510, 0.8800],
            "adapter": "best/adapter",
        },
        "data": {"rows": {"validation": 74, "test": 80}},
        "trials": list(trials),
        "seconds": {"total": 81.4},
        **changes,
    }


def test_what_came_out_and_where_it_is() -> None:
    text, good = lines(results(trial("0000", "stopped"), trial("0001", "completed"), trial("0002", "stopped")), "/s")
    assert good
    assert text.splitlines() == [
        "trials: 2 stopped, 1 completed; 81 s in all",
        "best trial:      0001",
        "validation loss: 2.5000 before, 0.5124 after (95% interval 0.4000 to 0.6248), on all 74 validation rows",
        "exact match:     0.0000 before, 0.7500 after (95% interval 0.5510 to 0.8800), on 24 of 80 test rows",
        "adapter: /s/best/adapter",
        "report:  /s/report.html",
        "logs:    /s/trials/<trial>/logs",
    ]


def test_a_failed_trial_shows_its_error_and_its_log() -> None:
    text, good = lines(results(trial("0000", "failed", "RuntimeError: [x]"), trial("0001", "completed")), "sweeps/s")
    assert good
    assert "trial 0000 failed: RuntimeError: [x] (log: sweeps/s/trials/0000/logs)" in text.splitlines()


@pytest.mark.parametrize("trials", [[], [trial("0000", "oom", "out of memory")]])
def test_no_model_is_no_success(trials: list[dict[str, Any]]) -> None:
    text, good = lines(results(*trials, best=None), "/s")
    assert not good
    assert text.splitlines()[0].startswith("trials: 1 oom;" if trials else "trials: none;")
    assert text.splitlines()[-1] == "no trial gave a model; logs: /s/trials"


def test_what_was_not_measured_is_said() -> None:
    nothing = {"eval_loss": None, "exact_match": None}
    best = {"trial_id": "0000", "adapter": "best/adapter", **nothing}
    text, _ = lines(results(trial("0000", "completed"), baseline=nothing, best=best), "/s")
    assert "exact match:     not measured before, not measured after" in text


def test_the_results_of_a_whole_sweep_have_a_summary() -> None:
    text, good = lines(SAMPLE, "sweeps/quickstart")
    assert good
    assert SAMPLE["best"]["trial_id"] in text
