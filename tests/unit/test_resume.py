"""``resume=auto``: the same command line begins a sweep and goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_lora import storage
from raytune_lora.config.compose import compose
from raytune_lora.errors import UserError
from raytune_lora.tuning import claim
from raytune_lora.tuning.folder import SweepFolder, create, held, problems, reopen
from raytune_lora.tuning.job import RUN, open_job
from raytune_lora.tuning.resume import changed_data, settle

TYPED = ["experiment=tiny", "resume=auto", "+space.decay={key: training.weight_decay, low: 0.0, high: 0.1}"]


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    return [*TYPED, f"output={tmp_path / 'sweep'}"]


def begin(tmp_path: Path, overrides: list[str]) -> None:
    create(tmp_path / "sweep", compose(overrides), "sweep")


def test_it_begins_where_there_is_nothing(typed: list[str]) -> None:
    cfg = compose(typed)
    assert settle(cfg, typed) == []
    assert cfg.resume is None


def test_the_same_command_goes_on_and_changes_nothing(typed: list[str], tmp_path: Path) -> None:
    begin(tmp_path, typed)
    cfg = compose(typed)
    assert settle(cfg, typed) == []
    assert cfg.resume == str(tmp_path / "sweep")


def test_where_it_runs_may_be_typed_anew(typed: list[str], tmp_path: Path) -> None:
    begin(tmp_path, [*typed, "workers=2", "deepspeed=zero2", "budget.hours=3"])
    again = [*typed, "workers=2", "deepspeed=zero3", "budget.hours=4"]
    assert settle(compose(again), again) == ["deepspeed", "budget.hours"]
    assert settle(compose(typed), typed) == [], "what is not typed stays as the folder has it"


def test_a_folder_whose_first_write_was_killed_is_begun_anew(typed: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.yaml.new").write_text("# the resolved config of a sw")
    cfg = compose(typed)
    settle(cfg, typed)
    assert cfg.resume is None
    assert problems(folder) == []
    begin(tmp_path, typed)
    assert reopen(folder, "sweep").search.trials == 4
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml"]


def test_a_sweep_in_a_store_is_begun_once_and_found_from_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_SETTLES", 0.05)
    uri = f"memory://{tmp_path.name}/sweeps/mine"
    typed = [*TYPED, f"output={uri}/", f"cluster.node_cache={tmp_path / 'node'}"]
    cfg = compose(typed)
    assert settle(cfg, typed) == []
    assert cfg.resume is None
    home = SweepFolder.of(cfg)
    (home.path / "trials").mkdir(parents=True)
    (home.path / "study.db").write_text("of a sweep that was deleted from the store")
    create(home.path, cfg, "sweep", home.uri)
    assert not (home.path / "study.db").exists()

    typed[-1] = f"cluster.node_cache={tmp_path / 'elsewhere'}"
    again = compose(typed)
    assert settle(again, typed) == ["cluster.node_cache"]
    assert again.resume == uri
    assert reopen(uri, "sweep").search.trials == 4
    with pytest.raises(UserError, match=f"{uri} holds a sweep, not a run"):
        reopen(uri, "run")
    other = SweepFolder.of(again)
    (said,) = problems(other.path, other.uri)
    assert f"go on with it (resume={uri})" in said
    with held(other, 30, print) as claimed:
        assert claimed is not None
        assert other.config.read_text() == home.config.read_text()
        assert (other.name, other.address) == ("mine", uri)
    storage.delete(f"{uri}/config.yaml")
    storage.write(f"{uri}/mine.txt", b"")
    assert problems(other.path, other.uri) == [f"output: {uri} is not empty (mine.txt is in it); name a new folder"]


def test_it_goes_on_with_the_same_tokens_only() -> None:
    inputs = {"rows": "r", "settings": "s", "tokenizer": "t", "packages": "transformers 5.0"}
    known = {"content": "a", "inputs": inputs}
    assert changed_data({}, known) is None
    assert "earlier version" in str(changed_data({"seconds": 1.0}, known))
    assert changed_data(known, {"content": "a", "inputs": inputs | {"tokenizer": "u"}}) is None
    why = changed_data(known, {"content": "b", "inputs": inputs | {"tokenizer": "u", "packages": "transformers 6.0"}})
    assert why is not None
    assert "tokenizer or chat template) and packages (it was transformers 5.0)" in why


def test_a_job_whose_template_was_edited_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where workers would start."""
    monkeypatch.setattr("raytune_lora.tuning.job._work", lambda job, run: {"store": job.store.folder.name})
    turns = "{% for m in messages %}X{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    template = tmp_path / "own.jinja"
    template.write_text(f"{turns}{{% if add_generation_prompt %}}Xassistant: {{% endif %}}")
    cache, out = f"cache={tmp_path / 'cache'}", f"output={tmp_path / 'run'}"
    typed = ["experiment=tiny", cache, out, "data/template=chat", f"data.template.chat_template={template}"]
    begun = open_job(RUN, compose(typed), [], lambda job: None)
    again = compose([f"resume={tmp_path / 'run'}"])
    assert open_job(RUN, again, [], lambda job: None) == begun
    template.write_text(template.read_text().replace("X", "Y"))
    with pytest.raises(UserError, match=r"other tokens than the data now gives.*a file that data\.template"):
        open_job(RUN, compose([f"resume={tmp_path / 'run'}"]), [], lambda job: None)
