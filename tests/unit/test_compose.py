"""Composing: every shipped YAML is well, and every mistake of the user is answered by its key and a remedy."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raytune_lora.cli import _WITH_OPTIONS, VERBS, job
from raytune_lora.config import validate
from raytune_lora.config.compose import compose, dump, load
from raytune_lora.config.data import FileDataConfig
from raytune_lora.config.groups import conf_dir, groups
from raytune_lora.config.methods import LoraMethodConfig
from raytune_lora.config.schema import HubModelConfig, Precision, TinyModelConfig
from raytune_lora.config.typed import typed
from raytune_lora.errors import UserError

CONFIGURED = [verb for verb in VERBS if verb not in _WITH_OPTIONS]  # what they take are overrides of the config
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(conf_dir().rglob("*.yaml"))
IDS = [str(path.relative_to(conf_dir())) for path in FILES]
TINY = ["model=tiny", "data=fake"]


def problems(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    return caught.value.problems


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )


def group_of(path: Path) -> str | None:
    return path.parent.relative_to(conf_dir()).as_posix() if path.parent != conf_dir() else None


def command(path: Path) -> tuple[str, list[str]]:
    """The verb and the overrides of the one command in a file's header."""
    header = [line for line in path.read_text().split("\ndefaults:")[0].splitlines() if line.startswith("#")]
    commands = [shlex.split(line[1:]) for line in header if line.startswith("# python jobs/")]
    assert len(commands) == 1, f"{path} names {len(commands)} commands"
    return Path(commands[0][1]).stem, commands[0][2:]


# -------------------------------------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_file_composes(path: Path) -> None:
    group = group_of(path)
    others = [choice for choice in TINY if group != "experiment" and not choice.startswith(f"{group}=")]
    cfg = compose([*others, f"{group}={path.stem}"] if group else others)
    assert validate.problems(cfg) == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_file_says_how_it_is_used(path: Path) -> None:
    verb, overrides = command(path)
    assert (ROOT / "jobs" / f"{verb}.py").is_file()
    assert validate.problems(compose(overrides)) == []
    if group := group_of(path):
        defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
        assert {group: path.stem} in defaults or f"{group}={path.stem}" in overrides


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_file_is_short_and_starts_with_its_schema(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 22
    if group_of(path) not in ("experiment", "space", "data/mix"):
        assert yaml.safe_load(text)["defaults"][0].startswith("base_")


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "overrides",
    [
        TINY,
        ["experiment=quickstart", "output=sweeps/x"],
        ["model.path=Qwen/Qwen2.5-0.5B", 'data.path="한국어.jsonl"', "deepspeed=zero3", "workers=2"],
        [*TINY, "tracking=wandb", "tracking.wandb_mode=online", "tracking.mlflow_uri=http://host:5000"],
        ["model=smollm2", "data=extraction", "scheduler=none", "search=random", "model.precision=bf16"],
        [*TINY, "method.target_modules=[q_proj,v_proj]", "training.learning_rate=1e-05", "training.max_steps=null"],
        [*TINY, "~space.alpha", "+space.batch={key: training.micro_batch, kind: categorical, choices: [1, 2]}"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_what_dump_writes_load_reads(overrides: list[str], tmp_path: Path) -> None:
    cfg = compose(overrides)
    path = tmp_path / "config.yaml"
    path.write_text(dump(cfg), encoding="utf-8")
    assert load(path) == cfg


def test_a_composed_config_is_made_of_the_variants_chosen() -> None:
    cfg = compose(["model.path=x", "data.path=y", "model.precision=fp32"])
    assert (type(cfg.model), type(cfg.data), type(cfg.method)) == (HubModelConfig, FileDataConfig, LoraMethodConfig)
    assert cfg.model.precision is Precision.fp32
    assert isinstance(compose(TINY).model, TinyModelConfig)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "a: [", "model: {kind: nothing}", "model: {kind: tiny}\ndata: {kind: fake}\nmethod: {kind: lora, r: x}"],
)
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: not a config of this version"):
        load(path)


def test_a_config_with_a_key_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(compose(TINY)).replace("training:\n", "training:\n  old_key: 1\n"))
    with pytest.raises(UserError, match="old_key"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "config.yaml")


# ------------------------------------------------------------------------------------------------- the user's own files


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment of the user's own."""
    folder = tmp_path / "my conf"
    (folder / "experiment").mkdir(parents=True)
    mine = "# @package _global_\ndefaults: [override /model: tiny, override /data: fake]\nworkers: 2\n"
    (folder / "experiment" / "mine.yaml").write_text(mine)
    monkeypatch.setenv("RAYTUNE_LORA_CONF", str(folder))
    return folder


def test_own_groups_are_found(own: Path) -> None:
    assert groups()["experiment"] == ["mine", "quickstart", "tiny"]
    cfg = compose(["experiment=mine", "training.max_steps=3"])
    assert (cfg.workers, cfg.training.max_steps, cfg.model.kind) == (2, 3, "tiny")
    assert problems("experiment=nine") == [
        "experiment: there is no 'nine'. Did you mean experiment=mine? Known: mine, quickstart, tiny."
    ]


def test_a_mounted_config_map_is_found_once(own: Path) -> None:
    """As the kubelet lays it out: a link to a link into a folder of that version."""
    versions = own / "experiment" / "..2026_01_01"
    versions.mkdir()
    (own / "experiment" / "mine.yaml").rename(versions / "mine.yaml")
    (own / "experiment" / "..data").symlink_to(versions.name)
    (own / "experiment" / "mine.yaml").symlink_to("..data/mine.yaml")
    assert groups()["experiment"] == ["mine", "quickstart", "tiny"]
    assert not any(name.startswith("experiment/") for name in groups())
    assert compose(["experiment=mine"]).workers == 2


def test_an_own_group_with_the_name_of_another_is_refused(own: Path) -> None:
    (own / "experiment" / "tiny.yaml").write_text("workers: 2\n")
    assert problems(*TINY) == [
        f"RAYTUNE_LORA_CONF: {own}/experiment/tiny.yaml has the name of a file that comes with the project; rename it"
    ]


def test_a_folder_of_own_groups_that_is_not_there_is_refused(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYTUNE_LORA_CONF", str(own / "none"))
    assert problems(*TINY) == [f"RAYTUNE_LORA_CONF: {own}/none is no folder"]
    assert job("sweep", ["--help"]) == 2
    assert capsys.readouterr().err == f"error: RAYTUNE_LORA_CONF: {own}/none is no folder\n"


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("typed", "key", "near"),
    [
        ("learning_rate=1", "learning_rate", "training.learning_rate"),
        ("worker=2", "worker", "workers"),
        ("space.rank.hihg=2", "space.rank.hihg", "space.rank.high"),
        ("+training.max_step=1", "training.max_step", "training.max_steps"),
        ("++method.alfa=1", "method.alfa", "method.alpha"),
        ("+space.rank.lo=1", "space.rank.lo", "space.rank.low"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(typed: str, key: str, near: str) -> None:
    (problem,) = problems(typed)
    assert problem.startswith(f"{key}: unknown key. Did you mean ")
    assert near in problem
    assert "--cfg job" in problem


@pytest.mark.parametrize("typed", ["+training.foo=1", "++training.foo=1", "+foo=1", "+cluster.foo.bar=1"])
def test_no_sign_adds_a_key_that_no_schema_has(typed: str) -> None:
    (problem,) = problems(*TINY, typed)
    assert problem.startswith(f"{typed.lstrip('+').partition('=')[0]}: unknown key.")


def test_a_key_of_another_variant_is_unknown() -> None:
    (problem,) = problems(*TINY, "model.path=x")
    assert problem.startswith("model.path: unknown key")


def test_columns_are_named_as_one_types_them() -> None:
    """The key of a dictionary, new or not, with a plus or without."""
    assert compose(["data.columns.instruction=question", "data.columns.output=the reply"]).data.columns == {
        "instruction": "question",
        "output": "the reply",
    }
    for said in ("data.columns={label: good}", "+data.columns={label: good}", "++data.columns.label=good"):
        assert compose([said]).data.columns == {"label": "good"}
    mix = compose(
        ["data/mix=general", "data.mix.general.path=g.jsonl", "data.mix.general.columns.output=reply"]
    ).data.mix
    assert mix["general"].columns == {"output": "reply"}


def test_a_dimension_is_added_to_the_space() -> None:
    space = compose([*TINY, "+space.decay={key: training.weight_decay, low: 0.0, high: 0.1}"]).space
    assert list(space) == ["rank", "alpha", "learning_rate", "dropout", "decay"]
    assert (space["decay"].key, space["decay"].high) == ("training.weight_decay", 0.1)
    (problem,) = problems(*TINY, "+space.decay={kay: training.weight_decay}")
    assert problem.startswith("space.decay: Key 'kay' not in 'DimensionConfig'")


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("method.r=abc", "could not be converted to Integer"),
        ("method.r=null", "not Optional"),
        ("training.learning_rate=fast", "could not be converted to Float"),
        ("training.gradient_checkpointing=perhaps", "not a valid bool"),
        ("model.precision=fp16", "expected one of [auto, fp32, bf16]"),
    ],
)
def test_a_wrong_type_is_refused(typed: str, reason: str) -> None:
    key, _, value = typed.partition("=")
    (problem,) = problems(*TINY, typed)
    assert problem.startswith(f"{key}: ")
    assert reason in problem
    assert problem.endswith(f"(got {value!r})")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("model=tinny", "model: there is no 'tinny'. Did you mean model=tiny? Known: hub, smollm2, tiny, tiny_bias."),
        ("scheduler=zzz", "scheduler: there is no 'zzz'. Known: asha, hyperband, median, none, pbt."),
        ("experiment=null", "experiment: there is no 'null'. Known: quickstart, tiny."),
        ("+experiment=tiny", "+experiment=tiny: a choice is written experiment=tiny"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_known(typed: str, answer: str) -> None:
    assert problems(typed) == [answer]


@pytest.mark.parametrize("typed", ["method.r", "a b=1", "data.path=a=b.jsonl", "data.path=한국어.jsonl"])
def test_what_is_no_override_is_shown(typed: str) -> None:
    (problem,) = problems(typed)
    assert problem.startswith(f"{typed!r} is not an override: write key=value")


def test_the_quotes_that_an_answer_shows_work() -> None:
    (problem,) = problems(*TINY, "output=~/한국어 a=b")
    (quoted,) = shlex.split(problem.rpartition("in quotes: ")[2])
    assert compose([*TINY, quoted]).output == "~/한국어 a=b"


@pytest.mark.parametrize("typed", ["hydra.run.dir=x", "+hydra.verbose=true", "hydra/launcher=basic"])
def test_hydras_own_keys_are_refused(typed: str) -> None:
    (problem,) = problems(*TINY, typed)
    assert problem.startswith(f"{typed}: Hydra only composes")


def test_all_mistakes_are_told_at_once() -> None:
    found = problems(*TINY, "training.foo=1", "workers=2", "method.r=x", "+bar=1")
    assert [problem.partition(":")[0] for problem in found] == ["training.foo", "method.r", "bar"]
    assert len(problems("model=nothing", "data=nothing")) == 2


# ------------------------------------------------------------------------------------------ mistakes in one's own files

_TOP = "# @package _global_\ndefaults: [tiny]\n"


def said(own: Path, text: str, *others: str, file: str = "experiment/mine.yaml") -> list[str]:
    """The problems with a file of the user's own, which each of them names first."""
    path = own / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = problems(file.removesuffix(".yaml").replace("/", "="), *others)
    assert [problem for problem in found if not problem.startswith(str(path))] == []
    return [problem.removeprefix(str(path)).removeprefix(": ") for problem in found]


@pytest.mark.parametrize(
    ("written", "typed"),
    [
        ("search: {trails: 3}", "search.trails=3"),
        ("worker: 2", "worker=2"),
        ("method: {r: abc}", "method.r=abc"),
        ("model: {precision: fp16}", "model.precision=fp16"),
        ("model: {path: x}", "model.path=x"),
        ("training: {learning_rate: fast}", "training.learning_rate=fast"),
        ("method: {target_modules: {a: 1}}", "method.target_modules={a: 1}"),
        ("output: ${nowhere}", "output=${nowhere}"),
    ],
)
def test_a_mistake_in_a_file_is_answered_as_on_the_command_line(own: Path, written: str, typed: str) -> None:
    (problem,), (answer,) = said(own, f"{_TOP}{written}\n"), problems("experiment=tiny", typed)
    assert problem.partition(" (got")[0] == answer.partition(" (got")[0]
    assert problem.partition(":")[0] == typed.partition("=")[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (_TOP.replace("tiny", "tinny"), "experiment: there is no 'tinny'. Did you mean experiment=tiny? Known: "),
        (_TOP.replace("tiny", "override /model: x"), "model: there is no 'x'. Known: hub, smollm2, tiny, tiny_bias."),
        (_TOP.replace("tiny", "override /modle: tiny"), "defaults: there is no group 'modle'. Did you mean `overr"),
        (_TOP.replace("tiny", "model: tiny"), "defaults: write `override /model: tiny` (got `model: tiny`)"),
        (_TOP.replace("[tiny]", "tiny"), "defaults is a list, as `defaults: [tiny]` (got 'tiny')"),
        (_TOP.replace("tiny", "mine"), "its defaults lead back to "),
        (_TOP.partition("\n")[2], "its first line is `# @package _global_`; without that, its keys are "),
        (f"{_TOP}search: 3\n", "search is a section, whose keys are written below it (got 3)"),
        (f"{_TOP}search:\n", "search is a section, whose keys are written below it (got None)"),
        (f"{_TOP}model: tiny_bias\n", "model: tiny_bias is chosen in the defaults: `- override /model: tiny_bias`"),
        (f"{_TOP}space: {{x: {{kay: 1}}}}\n", "space.x: Key 'kay' not in 'DimensionConfig'"),
        (f"{_TOP}method: {{rank_pattern: {{q: a}}}}\n", "method.rank_pattern.q: Value 'a' of type 'str' could not"),
        (f"{_TOP}workers: 2\nworkers: 3\n", ", line 4, column 1: not YAML: found duplicate key workers"),
        (f"{_TOP}workers: [2\nlr: 1\n", ", line 4, column 3: not YAML: expected ',' or ']', but got ':'"),
        (f"{_TOP}search:\n\ttrials: 3\n", ", line 4, column 1: not YAML: found character"),
        (f"{_TOP}workers: &a [*a]\n", "it is nested more than 50 deep, or in itself; write it flatter"),
        ("- workers\n", "it holds keys with their values, as `search: {trials: 8}` (got ['workers'])"),
        (f"{_TOP}on: 2\n", "True: YAML reads a number as a number, and yes, no, on and off as true and false: write"),
        (f"{_TOP}cluster: {{1: 2}}\n", "cluster.1: YAML reads a number as a number"),
        (f"{_TOP}search.trials: 4\n", "search.trials: the keys of a section are written below its name, as `sear"),
        (f"{_TOP}method: {{target_modules: q_proj}}\n", "method.target_modules is a list, as `['q_proj']` (got"),
        (f"{_TOP}workers: {'9' * 5000}\n", "not YAML: Exceeds the limit"),
        (f"{_TOP}workers: 2026-13-45\n", "workers: Value '2026-13-45' of type 'str' could not"),
        (f"{_TOP}x: [{'1, ' * 50_000}]\n", "it stands for 50,0"),
        (_TOP.replace("[tiny]", ""), "defaults is a list, as `defaults: [tiny]` (got None)"),
        (f"\ufeff{_TOP}", "it begins with a byte order mark"),
        ("just words\n", "it holds keys with their values, as `search: {trials: 8}` (got 'just words')"),
    ],
)  # fmt: skip
def test_every_mistake_in_a_file_is_explained(own: Path, text: str, answer: str) -> None:
    (problem,) = said(own, text)
    assert problem.startswith(answer)


@pytest.mark.parametrize("name", ["10", "true", "일", "a,b"])
def test_a_file_is_chosen_whatever_it_is_called(own: Path, name: str) -> None:
    (own / "experiment").mkdir(exist_ok=True)
    (own / "experiment" / f"{name}.yaml").write_text(_TOP)
    (problem,) = problems(f"experiment={name}")
    quoted = f'experiment="{name}"'
    assert f"'{quoted}'" in problem
    compose([quoted])


def test_all_mistakes_in_a_file_are_told_at_once(own: Path) -> None:
    found = said(own, f"{_TOP}training: {{learning_rate: fast, global_batch: eight}}\nserch: {{trials: 3}}\n")
    keys = ["training.learning_rate", "training.global_batch", "serch"]
    assert [problem.partition(":")[0] for problem in found] == keys


def test_a_mistake_in_another_group_of_ones_own_and_below(own: Path) -> None:
    (problem,) = said(own, "defaults: [base_hub]\npaht: x\n", file="model/mine.yaml")
    assert problem.startswith("model.paht: unknown key. Did you mean model.path")
    chosen = f"{_TOP.replace('tiny', 'override /model: mine')}"
    (problem,) = said(own, chosen)
    assert problem.startswith(f"{own / 'model' / 'mine.yaml'}: model.paht: unknown key")


def test_a_file_that_does_not_go_with_another_choice(own: Path) -> None:
    (problem,) = said(own, f"{_TOP}model: {{layers: 3}}\n", "model=hub")
    assert problem.startswith("model.layers: unknown key.")


def test_a_file_with_all_that_files_may_have_composes(own: Path) -> None:
    (own / "experiment" / "mine.yaml").write_text(
        f"{_TOP}space: {{decay: {{key: training.weight_decay, high: 0.1}}}}\nmethod: {{rank_pattern: {{q_proj: 8}}}}\n"
    )
    cfg = compose(["experiment=mine"])
    assert cfg.space["decay"].high == 0.1
    assert cfg.method.rank_pattern == {"q_proj": 8}  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------- command line


def test_the_config_rooms_load_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, raytune_lora.config.compose, raytune_lora.config.validate as v\n"
        "assert not v.problems(raytune_lora.config.compose.compose(['experiment=tiny']))\n"
        "print({'torch', 'ray', 'transformers', 'optuna', 'numpy'} & set(sys.modules))"
    )
    assert python("-c", code, cwd=tmp_path).stdout == "set()\n"


@pytest.mark.parametrize("verb", CONFIGURED)
def test_help_is_instant_and_whole(verb: str, tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        shown = python(str(ROOT / "jobs" / f"{verb}.py"), "--help", cwd=tmp_path).stdout
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1
    for group, names in groups().items():
        assert any(line.split() == f"{group} {', '.join(names)}".split() for line in shown.splitlines())
    examples = shown.partition("examples:\n")[2].splitlines()
    assert len(examples) >= 3
    for example in examples:
        compose(shlex.split(example)[2:])


@pytest.mark.parametrize("verb", CONFIGURED)
def test_cfg_job_prints_a_config_and_leaves_no_trace(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert job(verb, [*TINY, "--cfg", "job", "training.max_steps=7"]) == 0
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert load(path) == compose([*TINY, "training.max_steps=7"])


def test_cfg_job_as_a_command_leaves_no_outputs_folder(tmp_path: Path) -> None:
    shown = python(str(ROOT / "jobs" / "sweep.py"), "experiment=tiny", "--cfg", "job", cwd=tmp_path).stdout
    assert yaml.safe_load(shown)["search"]["trials"] == 4
    assert list(tmp_path.iterdir()) == []


NAMES = (
    "my,file.jsonl",
    "it's.jsonl",
    "a b (1).jsonl",
    "a=b.jsonl",
    'say "hi".jsonl',
    "both ' and \".jsonl",
    "파일.jsonl",
    "[x]{y}.jsonl",
    "a#b&c;d!.jsonl",
    "~/x.jsonl",
    "${x}.jsonl",
    "a\\${x}.jsonl",
    "ends in \\",
    "rows*.jsonl",
    "null",
    "1e5",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_proposed_override_works_when_pasted(name: str) -> None:
    proposed = typed("data.path", name)
    assert compose(shlex.split(proposed)).data.path == name  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES[:2] + NAMES[3:11])
def test_a_value_that_needs_quotes_is_refused_with_them(name: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([f"data.path={name}"])
    assert typed("data.path", name) in str(caught.value)


def test_what_needs_no_quotes_is_proposed_without() -> None:
    assert typed("resume", "s3://bucket/sweeps/a-1") == "resume=s3://bucket/sweeps/a-1"
