"""The report page: whole, safe and self-contained, whatever the results hold."""

from __future__ import annotations

import copy
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.report import render
from raytune_lora.report.charts import Dot, Line, Scale, curves, number, scatter

SAMPLE = json.loads((Path(__file__).parent / "results_sample.json").read_text(encoding="utf-8"))
HOSTILE = "<script>alert(1)</script>\"'&</title>{{ 7 * 7 }}"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Parses a page, and fails where a tag is closed that is not the one open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data

    def count(self, tag: str, cls: str = "") -> int:
        return sum(t == tag and (not cls or cls in (a.get("class") or "").split()) for t, a in self.tags)


def sample(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SAMPLE), **changes}


def minimal(kind: str = "sweep") -> dict[str, Any]:
    """Everything that may be null or empty is."""
    return {
        "schema_version": 2,
        "kind": kind,
        "name": "nothing",
        "version": "0.1.0",
        "state": "interrupted",
        "created": "2026-11-25T10:00:00+00:00",
        "model": {"name": "tiny", "parameters": None},
        "data": {"name": "fake", "fingerprint": "", "rows": {}, "loss_rows": None, "generate_rows": None},
        "search": None,
        "baseline": {"eval_loss": None, "exact_match": None},
        "best": None,
        "trials": [],
        "importance": {},
        "examples": [],
        "seconds": {},
    }


def hostile(value: Any) -> Any:
    """The same results with every text a hostile one, but for the words that mean something."""
    if isinstance(value, dict):
        return {k: v if k in ("kind", "created") else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def single(kind: str) -> dict[str, Any]:
    best = next(trial for trial in SAMPLE["trials"] if trial["trial_id"] == SAMPLE["best"]["trial_id"])
    return sample(kind=kind, trials=[best], importance={}, search=None if kind == "run" else SAMPLE["search"])


def confirmed() -> dict[str, Any]:
    """The two best trained again; one run did not come to its end."""
    configurations, runs = [], []
    for name, losses in (("0003", [0.07101, 0.0725]), ("0001", [0.19, None])):
        known = next(t for t in SAMPLE["trials"] if t["trial_id"] == name)
        params = {**known["params"], "training.seed": 1}
        runs.append({**known, "trial_id": f"{name}-s1", "confirms": name, "params": params, "eval_loss": losses[1]})
        configurations.append(
            {
                "trial_id": name,
                "params": known["params"],
                "mean": losses[0],
                "standard_deviation": None if losses[1] is None else 0.001,
                "runs": [
                    {"trial_id": name, "seed": 0, "status": "completed", "eval_loss": losses[0]},
                    {
                        "trial_id": f"{name}-s1",
                        "seed": 1,
                        "status": "diverged" if losses[1] is None else "completed",
                        "eval_loss": losses[1],
                    },
                ],
            }
        )
    words = "configuration 0003 has a mean loss of 0.0718 ± 0.0010 (2 runs)"
    return {
        "trials": [*copy.deepcopy(SAMPLE["trials"]), *runs],
        "confirmation": {
            "winner": "0003",
            "runner_up": "0001",
            "differs": None,
            "p": None,
            "words": words,
            "configurations": configurations,
        },
    }


ENDED = {
    "budget": "target",
    "why": "budget.target=0.1, and trial 0003 has 0.0710",
    "remedy": "budget.target=<lower> (or null)",
}
CASES = {
    "sample": sample(),
    "minimal": minimal(),
    "minimal run": minimal("run"),
    "only the version": {"schema_version": 2},
    "hostile": hostile(sample()),
    "run": single("run"),
    "one trial": single("sweep"),
    "no baseline": sample(baseline={"eval_loss": None, "exact_match": None}),
    "no best": sample(best=None),
    "all failed": sample(best=None, trials=[t for t in SAMPLE["trials"] if t["status"] in ("oom", "diverged")]),
    "null everywhere": sample(trials=[dict.fromkeys(SAMPLE["trials"][0])] * 2, best=dict.fromkeys(SAMPLE["best"])),
    "confirmed": sample(**confirmed()),
    "hostile and confirmed": hostile(sample(**confirmed())),
    "ended by a budget": sample(ended_by=ENDED),
    "many trials": sample(trials=[t | {"trial_id": f"{n:04}"} for n in range(17) for t in SAMPLE["trials"]]),
}


@pytest.mark.parametrize("results", CASES.values(), ids=CASES.keys())
def test_every_page_is_balanced_and_fetches_nothing(results: dict[str, Any]) -> None:
    html = render(results)
    page = Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            link = attributes.get(name) or "./"
            assert link.startswith("./") or link == "data:,"
    assert not re.search(r"url\(|@import|fetch\(", html)
    assert page.count("script") == 1
    assert page.count("h1") == 1
    assert "None" not in page.text
    assert "nan" not in page.text.replace("loss is nan", "")


def test_rendering_leaves_the_results_alone() -> None:
    results = sample()
    render(results)
    assert results == SAMPLE


def test_the_headline_compares_the_best_with_the_untouched_model() -> None:
    text = Page(render(sample())).text
    for part in (
        "0.082",
        "2.104",
        "\N{MINUS SIGN}96%",
        "88%",
        "+88 points",
        "21 of 24 answers right, on 24 of 80 test rows",
    ):
        assert part in text
    assert "on all 80 validation rows · 95% interval 0.063\N{EN DASH}0.101" in text
    assert "95% interval 69%\N{EN DASH}96%" in text
    assert "whatever their batch size, on 32 of 80 validation rows" in text


def test_a_best_that_is_not_measured_is_compared_on_the_rows_of_its_trial() -> None:
    best = {key: SAMPLE["best"][key] for key in ("trial_id", "params", "trial_loss")}
    text = Page(render(sample(best=best, state="interrupted"))).text
    assert "0.071" in text
    assert "2.087" in text
    assert "2.104" not in text
    assert "on 32 of 80 validation rows" in text


def test_an_adapter_that_is_not_what_was_trained_is_said_to_be_so() -> None:
    why = "the adapter of the best trial, 0003, is not what was trained"
    best = {**SAMPLE["best"], "eval_loss": None, "adapter": None, "mismatch": {"why": why}}
    text = Page(render(sample(best=best, state="interrupted"))).text
    assert why in text
    assert "\N{MINUS SIGN}97%" not in text, "its trial's loss is not what it is worth"


def test_a_worse_result_does_not_look_good() -> None:
    worse = render(sample(baseline={"eval_loss": 0.058, "exact_match": 0.925}))
    assert '<span class="change bad">+42%</span>' in worse
    assert '<span class="change bad">\N{MINUS SIGN}5 points</span>' in worse


def test_hostile_text_is_shown_not_run() -> None:
    html = render(hostile(sample()))
    assert "<script>alert" not in html
    assert HOSTILE in Page(html).text


def test_the_best_trial_leads_the_table_and_those_without_a_loss_end_it() -> None:
    order = re.findall(r'<td class="text" data-v="(\d{4})">', render(sample()))
    assert order[0] == "0003"
    assert set(order[-2:]) == {"0005", "0008"}
    assert len(order) == len(SAMPLE["trials"])


def test_each_trial_has_a_line_and_each_parameter_a_plot() -> None:
    page = Page(render(sample()))
    with_curve = sum(bool(trial["curve"]) for trial in SAMPLE["trials"])
    assert page.count("g", "curve") == 2 * with_curve + 2  # a wide and a narrow chart; the lowest loss so far
    assert page.count("svg") == 4 + len(SAMPLE["best"]["params"])


def test_the_lowest_loss_so_far_falls_over_the_samples_of_all_trials() -> None:
    def of(number: int, loss: float | None, seen: int) -> dict[str, Any]:
        return {"trial_id": f"{number:04}", "status": "completed", "eval_loss": loss, "samples_seen": seen}

    html = render(sample(trials=[of(2, 1.0, 40), of(0, 3.0, 10), of(1, None, 30), of(3, 2.0, 20)], best=None))
    assert Page(html).count("circle", "dot") == 2 * 3
    wide = html.partition("What the search found")[2]
    (line,) = re.findall(r'<polyline points="([^"]+)"', wide.partition("</svg>")[0])
    xs, ys = zip(*(map(float, point.split(",")) for point in line.split()), strict=True)
    ends = [x for n, x in enumerate(xs) if x not in xs[:n]]
    assert [round((x - 48) / (ends[-1] - 48), 2) for x in ends] == [0.1, 0.8, 1.0]  # of 100 samples
    assert list(ys) == sorted(ys)
    assert ys[-1] == ys[-2]  # the last trial found nothing better
    assert "What the search found" not in render(sample(trials=[of(0, 3.0, 10), of(1, None, 30)], best=None))


def test_a_run_has_no_search_plots_and_shows_its_training_loss() -> None:
    page = Page(render(single("run")))
    assert page.count("svg") == 2
    assert page.count("g", "train") == 2
    assert "What mattered" not in page.text


def test_a_confirmation_shows_its_words_each_mean_and_each_run() -> None:
    text = Page(render(sample(**confirmed()))).text
    for part in ("configuration 0003 has a mean loss", "0: 0.0710, 1: 0.0725", "0: 0.1900, 1: diverged", "0003-s1"):
        assert part in text
    assert "Confirmation" not in Page(render(sample())).text


def test_a_run_that_confirms_is_no_dot_in_the_plots_and_its_seed_no_parameter() -> None:
    known, page = Page(render(sample())), Page(render(sample(**confirmed())))
    assert page.count("svg") == known.count("svg")
    assert page.count("circle") - page.count("g", "curve") == known.count("circle") - known.count("g", "curve")
    assert "12 trials" in page.text


def test_a_search_that_a_budget_ended_says_why_and_how_to_go_on() -> None:
    text = Page(render(sample(ended_by=ENDED, trials=SAMPLE["trials"][:5]))).text
    assert ENDED["why"] in text
    assert "resume=this folder budget.target=<lower> (or null)" in text
    assert "5 of 12 trials" in text


def test_overrides_survive_the_shell_and_hydra() -> None:
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    params = {
        "method.r": 16,
        "training.learning_rate": 1.2345678e-05,
        "a.b": ["q_proj", "v proj"],
        "c": True,
        "d": "it's",
    }
    html = render(sample(best=SAMPLE["best"] | {"params": params}))
    line = Page(html).text.partition("python jobs/train.py … ")[2].partition("\n")[0]
    read = {o.key_or_group: o.value() for o in map(parser.parse_override, shlex.split(line))}
    assert {k: [str(v) for v in x] if isinstance(x, list) else x for k, x in read.items()} == params


def test_a_tuned_answer_is_right_but_for_the_space_around_it() -> None:
    asked = {"prompt": "p", "expected": "a  b", "base": "x"}
    right, wrong = ({**asked, "tuned": tuned} for tuned in (" a  b\n", "a b"))
    assert "✓ as expected" in render(sample(examples=[right]))
    assert "✓ as expected" not in render(sample(examples=[wrong]))


def test_a_difference_is_marked_where_it_is() -> None:
    example = {"prompt": "p", "expected": '{"n": 30}', "base": None, "tuned": '{"n": 130}'}
    assert "<mark>1</mark>30}" in render(sample(examples=[example]))


def test_a_prompt_folds_to_its_message() -> None:
    assert "<summary><span>최유나예요. 지난번과 같은 원두 커피 3봉지, 12월 1일에 받을 수 있을까요?</span>" in render(
        sample()
    )


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(ValueError, match="schema version 3"):
        render(sample(schema_version=3))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (16, "16"),
        (32.0, "32"),
        (0.05, "0.05"),
        (0.0012, "1.2e-3"),
        (3e-05, "3e-5"),
        (12000.4, "12,000"),
        (2.5e6, "2.5e6"),
    ],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.01, 2.0], [1e-6, 1e3], [3.0], [0.0], [-2.0, 5.0], [0, 1e-9]])
def test_a_scale_holds_its_values_and_has_ticks(values: list[float]) -> None:
    scale = Scale.around(values, 0, 100)
    assert all(0 <= scale(value) <= 100 for value in values)
    ticks = scale.ticks(5)
    assert 2 <= len(ticks) <= 7
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)


def test_a_wide_range_is_logarithmic() -> None:
    assert Scale.around([0.1, 2.0], 0, 1).log
    assert not Scale.around([0.5, 2.0], 0, 1).log
    assert not Scale.around([0.0, 2.0], 0, 1).log


def test_choices_that_are_no_numbers_stand_side_by_side() -> None:
    dots = [Dot(x, 1.0, "completed", "") for x in ("cosine", "linear", "q_proj, v_proj", 1)]
    places = re.findall(r'cx="([\d.]+)"', scatter(dots, [1.0], "schedule"))
    assert len(set(places)) == 4


def test_a_curve_of_one_point_is_a_dot() -> None:
    drawing = curves([Line([(0, 1.0)], "best", "t", "1.0")], None, 360, 300)
    assert "<polyline" not in drawing
    assert "<circle" in drawing
