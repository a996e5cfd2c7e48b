"""What a sweep and a single run have in common: the folder, the phases around the training, and the results."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from raytune_lora import storage
from raytune_lora.artifacts import MANIFEST, remove_folder, write_json
from raytune_lora.cache import Cache
from raytune_lora.cluster.connect import connected
from raytune_lora.config.compose import dump
from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import LogFormat, RunConfig, SweepConfig
from raytune_lora.config.typed import typed
from raytune_lora.data.build import REPORT, in_short
from raytune_lora.data.prepare import prepare
from raytune_lora.data.store import TokenStore
from raytune_lora.data.trained_template import TEMPLATE, TRIED
from raytune_lora.errors import Halted, JobFailed, Passing, Refused, StorageError, UserError
from raytune_lora.evaluation import ANSWERS
from raytune_lora.evaluation.figures import disagreement
from raytune_lora.models.card import recipe
from raytune_lora.models.export import ADAPTER, export_adapter
from raytune_lora.models.methods import method_for
from raytune_lora.models.methods.fit import notes as model_notes
from raytune_lora.models.record import make_record
from raytune_lora.models.shape import known_shape
from raytune_lora.models.sources import display_name, materialize
from raytune_lora.models.stored import as_stored
from raytune_lora.models.tokenizer import load_tokenizer, tokenizer_identity
from raytune_lora.planning.shape import Shape
from raytune_lora.training.driver import PROCESS_ENDED, Pool
from raytune_lora.training.failures import halting
from raytune_lora.training.place import LOGS
from raytune_lora.training.plan import Plan, plan_run
from raytune_lora.training.task import Task, TaskFailed
from raytune_lora.tuning import limits
from raytune_lora.tuning.budget import reopen as reopen_search
from raytune_lora.tuning.constraints import Constraints, advice, memory_limit
from raytune_lora.tuning.disk import explained
from raytune_lora.tuning.disk import problems as disk_problems
from raytune_lora.tuning.folder import CONFIG, JOURNAL, SweepFolder, address, create, held, reopen
from raytune_lora.tuning.gauges import exported
from raytune_lora.tuning.interrupt import Interrupts
from raytune_lora.tuning.isolated import attempts
from raytune_lora.tuning.parts import Parts
from raytune_lora.tuning.preflight import check, model_problems
from raytune_lora.tuning.progress import Progress
from raytune_lora.tuning.results import BASELINE, BEST, remarks, write_results
from raytune_lora.tuning.resume import changed_data
from raytune_lora.tuning.space import apply, extremes, lookup
from raytune_lora.tuning.study import STUDY_FILE
from raytune_lora.tuning.trials import PACKING, PREPARE, Journal, Trial

SWEEP, RUN = "sweep", "run"


@dataclass
class Job:
    """A sweep or run at work."""

    kind: str
    cfg: SweepConfig
    folder: SweepFolder
    journal: Journal
    progress: Progress
    store: TokenStore
    model_folder: Path
    interrupts: Interrupts
    constraints: Constraints
    pool: Pool = field(init=False)  # while it is at work
    learned: dict[str, Any] = field(default_factory=dict)  # what the study says: ``importance`` and ``pareto``

    @property
    def plan(self) -> Plan:
        """Of a trial with the config as it stands."""
        return plan_run(self.cfg, self.store.rows["train"])

    @contextlib.contextmanager
    def phase(self, name: str, what: str) -> Iterator[dict[str, Any]]:
        """Time a phase; what it puts into the dictionary is recorded with it at its end."""
        began, facts = time.monotonic(), dict[str, Any]()
        with self.progress.doing(what):
            yield facts
        self.journal.append("phase", name=name, seconds=round(time.monotonic() - began, 3), **facts)

    def check_packing(self) -> None:
        """Refuse to pack rows that the model would let see each other; the model is asked once a kind of device.

        Raises:
            Refused: with the reason.
        """
        packing, remedy = "training.packing=true", "set training.packing=false"
        if not self.cfg.training.packing:
            if (dimension := self._packing_dimension()) is None:
                return
            packing, remedy = f"space.{dimension}: training.packing=true", f"take true out of space.{dimension}"
        if self.journal.record.phases.get(PACKING, {}).get("gpus_per_worker") == self.cfg.gpus_per_worker:
            return
        with self.phase(PACKING, "asking the model whether it keeps packed rows apart") as facts:
            facts["gpus_per_worker"] = self.cfg.gpus_per_worker
            if reason := self._ask(self.cfg, PACKING, _probe_packing)["leak"]:
                raise Refused(
                    f"{packing}: {display_name(self.cfg.model)} does not keep packed rows apart ({reason}), so that "
                    f"they would train on each other; {remedy}"
                )

    def _packing_dimension(self) -> str | None:
        """The dimension of a search that turns packing on."""
        found = extremes(self.cfg.space, self.cfg) if self.kind == SWEEP else iter(())
        return next((name for name, params in found if apply(self.cfg, params).training.packing), None)

    def measure_baseline(self) -> None:
        """The untouched model on the validation and test rows."""
        if BASELINE not in self.journal.record.phases:
            with self.phase(BASELINE, "measuring the base model") as facts:
                facts |= self._measure(self.cfg, BASELINE, None)
                self._say_if_unanswered("the base model", facts)

    def finish(self) -> None:
        """Measure and export the best adapter, if a trial has one.

        Raises:
            JobFailed: it does not have the loss that its trial reported; the journal has both, and nothing is exported.
        """
        best = self.journal.record.best()
        if best is None or best.checkpoint is None or BEST in self.journal.record.phases:
            return
        winner = apply(self.cfg, best.params)
        with self.phase(BEST, f"measuring the best model, trial {best.trial_id}") as facts:
            facts |= self._measure(winner, BEST, f"{best.checkpoint}/{ADAPTER}")
            self._see_that_it_is_what_was_trained(best, facts)
            self._say_if_unanswered("the best adapter", facts)
            checkpoint = self.folder.copy.here(best.checkpoint)
            target = self.folder.best / "adapter"
            record = export(plain_run(winner), self.store, self.model_folder, checkpoint, target, facts)
            facts["loading"] = recipe(record, str(target.relative_to(self.folder.path)))
            config = segments(self.journal.record.lineage(best)) + dump(winner)
            (self.folder.best / "config.yaml").write_text(config)
            write_json(self.folder.best / "params.json", best.params)
            self.folder.copy.send(self.folder.best)

    def _say_if_unanswered(self, what: str, measured: dict[str, Any]) -> None:
        if measured["unanswered"]:
            self.progress.note(f"no exact match of {what}: {measured['unanswered']}")

    def _see_that_it_is_what_was_trained(self, best: Trial, measured: dict[str, Any]) -> None:
        assert best.eval_loss is not None
        found = disagreement(best.eval_loss, measured)
        if found is None:
            return
        why = (
            f"the adapter of the best trial, {best.trial_id}, is not what was trained: its loss is "
            f"{found['measured']:.5f}, and the trial's was {found['trial']:.5f} on the same validation rows (computed "
            f"again it may differ by {found['tolerance']:.1g}). It is not exported; the trials and their checkpoints "
            f"are kept, this one in {best.checkpoint}. To measure it again: {typed('resume', self.folder.address)}"
        )
        self.journal.append("mismatch", trial_id=best.trial_id, why=why, **found)
        raise JobFailed(why)

    def write_results(self) -> dict[str, Any]:
        """``results.json`` and ``report.html``, and the study as it now is in the store."""
        self.journal.check()
        record = self.journal.record
        results = write_results(self.folder, self.cfg, self.store, record, kind=self.kind, learned=self.learned)
        self.folder.copy.send(self.folder.results, self.folder.report, self.folder.path / STUDY_FILE)
        return results

    def _measure(self, cfg: SweepConfig, name: str, adapter: str | None) -> dict[str, Any]:
        measured = self._ask(cfg, name, _measure, adapter=adapter)
        self.folder.copy.within(name).bring(ANSWERS)
        return measured

    def _ask(self, cfg: SweepConfig, name: str, function: Callable[..., None], **extra: Any) -> dict[str, Any]:
        """Have a worker group do something, and return its last report."""
        folder = self.folder.phase(name)
        cpus = cfg.cpus_per_worker * (cfg.search.concurrent if self.kind == SWEEP else 1)  # nothing else is running
        task = Task(name, function, plain_run(cfg), self.store, folder, cpus, extra)
        try:
            return list(attempts(self.pool.board, task))[-1]
        except TaskFailed as error:
            if (halt := halting(error.ended.status, error.ended.error)) is not None:
                raise halt from error
            raise JobFailed(f"the phase {name} failed: {error}; log: {folder / LOGS}") from error


def export(
    cfg: RunConfig, store: TokenStore, model_folder: Path, checkpoint: Path, target: Path, measured: dict[str, Any]
) -> dict[str, Any]:
    """Export what a checkpoint learned, with all that is known of it: the record, which is returned.

    Args:
        cfg: of the run.
        store: its data.
        model_folder: of its base model.
        checkpoint: of the run.
        target: folder of the adapter, made anew.
        measured: what ``evaluation.compare.measure`` reported of it.
    """
    figures = ("eval_loss", "eval_loss_rows", "exact_match", "exact_match_rows")
    rows = {f"{split}_rows": store.rows[split] for split in ("validation", "test")}
    record = make_record(
        cfg,
        model_folder,
        dtype=measured["dtype"],
        loader=measured["loader"],
        template=json.loads((store.folder / TRIED).read_text()),
        stop_ids=store.stop_ids,
        measured={name: measured[name] for name in figures} | rows,
    )
    export_adapter(checkpoint, target, model_folder=model_folder, record=record, template=store.folder / TEMPLATE)
    return record


def segments(lineage: Sequence[Trial]) -> str:
    """Comment lines that say which parameters a model had in turn; none where it had the same ones throughout."""
    if len(lineage) == 1:
        return ""
    lines = ["# population based training: the weights were trained with these parameters in turn"]
    for trial in lineage:
        values = " ".join(f"{key}={json.dumps(value)}" for key, value in trial.params.items())
        lines.append(f"# from sample {trial.born} on, as trial {trial.trial_id}: {values}")
    return "\n".join([*lines, ""])


def _measure(*arguments: Any, **extra: Any) -> None:
    """``evaluation.compare.measure``, imported where it runs: it brings torch and transformers."""
    from raytune_lora.evaluation import compare

    compare.measure(*arguments, **extra)


def _probe_packing(*arguments: Any) -> None:
    """``training.leaks.probe_packing``, likewise."""
    from raytune_lora.training import leaks

    leaks.probe_packing(*arguments)


def plain_run(cfg: SweepConfig) -> RunConfig:
    """The run in a sweep's config."""
    return RunConfig(**{f.name: getattr(cfg, f.name) for f in fields(RunConfig)})


def open_job(kind: str, cfg: SweepConfig, moved: Sequence[str], run: Callable[[Job], None]) -> dict[str, Any]:
    """Check the config, open or reopen the folder, run, and write the results whatever happened.

    Args:
        kind: ``SWEEP`` or ``RUN``.
        cfg: as composed.
        moved: keys whose values in ``cfg`` replace those in the folder that is reopened.
        run: what to do.

    Returns:
        What ``results.json`` says.

    Raises:
        UserError: the config cannot work; nothing was started.
        JobFailed: a phase around the trials failed, or storage is full or cannot be written.
    """
    fresh = cfg.resume is None
    cfg, changes = _settled(kind, cfg, moved)
    try:
        check(cfg, searching=kind == SWEEP, fresh=fresh)
    except UserError as error:
        if fresh:
            raise
        raise Passing(error.problems) from error  # when it began it was not refused: the config is not at fault
    folder = SweepFolder.of(cfg)
    as_json = cfg.tracking.log is LogFormat.json
    progress = Progress(folder.name, cfg.search.trials if kind == SWEEP else 1, as_json)
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress.shown())
        if not fresh:
            stack.enter_context(explained(folder.path, f"go on with {typed('resume', folder.address)}"))
        interrupts = stack.enter_context(Interrupts(progress.note))
        own = partial(held, folder, cfg.cluster.lease, progress.note, interrupts.ask)
        claim = None if fresh else stack.enter_context(own())
        began = time.monotonic()
        cache = Path(cfg.cache).expanduser().absolute()
        with progress.doing("preparing the model and the data"), explained(cache, "start it again"):
            inputs, constraints = _prepared(kind, cfg)
        if fresh:
            _room(cfg, inputs.shape, folder.path, kind)
            with explained(folder.path, "start it again"):
                create(folder.path, cfg, kind, folder.uri)
            stack.enter_context(_not_kept(folder))
            stack.enter_context(explained(folder.path, f"go on with {typed('resume', folder.address)}"))
            claim = stack.enter_context(own())
        parts = None if claim is None else Parts(f"{folder.uri}/{JOURNAL}", claim.label, claim.check)
        journal = Journal(folder.journal, progress.watch, began, parts)
        data = {name: inputs.store.manifest[name] for name in ("content", "inputs")}
        trains = bool(changes) or BEST not in journal.record.phases
        if trains and (changed := changed_data(journal.record.phases.get(PREPARE, {}), data)):
            raise UserError(f"{typed('resume', folder.address)}: {changed}")
        if changes:
            journal.append("moved", changes=to_plain(changes))
            folder.rewrite(cfg)
            reopen_search(journal, cfg.budget, math.inf if cfg.scheduler.goes_on else cfg.search.trials)
        job = Job(kind, cfg, folder, journal, progress, inputs.store, inputs.model, interrupts, constraints)
        progress.know(job.plan.total, journal.record)
        if BEST in journal.record.phases:
            return job.write_results()
        _report_inputs(job, inputs.shape)
        journal.append("phase", name=PREPARE, seconds=round(time.monotonic() - began, 3), **data)
        return _work(job, run)


def _prepared(kind: str, cfg: SweepConfig) -> tuple[Inputs, Constraints]:
    """Model and data, which fit together and into memory."""
    searching = kind == SWEEP  # a run that does not fit is tried with a smaller micro batch
    inputs = prepare_inputs(cfg, searching=searching)
    if found := limits.problems(cfg, inputs.shape, inputs.store):
        raise UserError(found)
    constraints = Constraints(cfg, memory_limit(cfg, inputs.shape, inputs.store) if searching else None)
    if searching:
        constraints.check()
    return inputs, constraints


def _report_inputs(job: Job, shape: Shape) -> None:
    """Copy the report on the data into the job's folder, and say what one should know before it trains."""
    shutil.copyfile(job.store.folder / REPORT, job.folder.path / REPORT)
    job.folder.copy.send(job.folder.path / REPORT)
    for note in (
        *model_notes(job.cfg, shape),
        in_short(json.loads((job.folder.path / REPORT).read_text())),
        *limits.notes(job.cfg, shape, job.store),
        *advice(job.cfg, memory_limit(job.cfg, shape, job.store)),
        *remarks(job.cfg, job.store.rows["train"], searching=job.kind == SWEEP),
    ):
        job.progress.note(note)


@contextlib.contextmanager
def _not_kept(folder: SweepFolder) -> Iterator[None]:
    """Leave nothing behind of a new job that is refused."""
    try:
        yield
    except Refused:
        remove_folder(folder.path)
        if folder.uri is not None:
            storage.delete(folder.uri)
        raise


def _settled(kind: str, cfg: SweepConfig, moved: Sequence[str]) -> tuple[SweepConfig, dict[str, Any]]:
    """The config that a job works by, and what of it is new to the folder that is reopened."""
    if cfg.resume is None:
        if cfg.output is None:
            cfg.output = f"{kind}s/{time.strftime('%Y%m%d-%H%M%S')}"
        cfg.output = address(cfg.output)
        return as_stored(cfg), {}
    changes = {key: lookup(cfg, key) for key in moved}
    return apply(reopen(address(str(cfg.resume)), kind), changes), changes


def _work(job: Job, run: Callable[[Job], None]) -> dict[str, Any]:
    cfg = job.cfg
    groups = cfg.search.concurrent if job.kind == SWEEP else 1
    trials = cfg.search.trials if job.kind == SWEEP else 1
    with connected(cfg.cluster, name=job.folder.name), exported(cfg, job.folder, job.journal, trials):
        leave = partial(_leave_machine, job)
        pool = Pool(
            plain_run(cfg), job.folder.groups, groups, cfg.search.stalled, job.progress.note, leave, _marks(job)
        )
        try:
            with pool:
                job.pool = pool
                job.check_packing()
                run(job)
        except BaseException as error:
            job.interrupts.over = True
            with contextlib.suppress(OSError, StorageError, JobFailed):  # where storage is full, that is said once
                job.write_results()
            again = f"go on with {typed('resume', job.folder.address)}"
            if isinstance(error, PROCESS_ENDED):
                said = str(error).splitlines()[0]
                raise JobFailed(f"a process of Ray that the job needs has ended ({said}); {again}") from error
            if isinstance(error, Halted):
                raise JobFailed(f"{error}; {again}") from error
            raise
        return job.write_results()


def _marks(job: Job) -> list[Path]:
    """Files of folders that all nodes share, where they do not share a store."""
    here = {job.folder.path / CONFIG: job.cfg.output, job.store.folder / MANIFEST: job.cfg.cache}
    return [file for file, place in here.items() if storage.local_path(str(place)) is not None]


def _leave_machine(job: Job) -> None:
    job.progress.note("Ray is about to take this machine away; the job ends, to go on elsewhere")
    job.interrupts.ask(KeyboardInterrupt())


def _room(cfg: SweepConfig, shape: Shape, output: Path, kind: str) -> None:
    """Refuse a job whose checkpoints will not fit.

    Raises:
        UserError: with the numbers.
    """
    trainable = method_for(cfg.method).count(shape)
    trials = cfg.search.trials if kind == SWEEP else 1
    if SweepFolder.of(cfg).uri:  # checkpoints lie here while their trials run
        trials = min(trials, cfg.search.concurrent)
    if found := disk_problems(cfg, trainable, output, trials=trials):
        raise UserError(found)


@dataclass(frozen=True)
class Inputs:
    """What a job works on."""

    model: Path  # folder of the base model
    shape: Shape  # of that model
    store: TokenStore


def prepare_inputs(cfg: SweepConfig, *, searching: bool = False) -> Inputs:
    """The base model and the token store, made where they are missing.

    Raises:
        UserError: the model does not fit the config or the bounds of its search, or the data cannot be prepared.
        StorageError: the cache's object store refuses or does not answer.
    """
    cache = Cache.of(cfg.cache, cfg.cluster.node_cache)
    folder = materialize(cfg.model, cache)
    shape = known_shape(folder, cfg.model, cache)
    if found := model_problems(cfg, shape, searching=searching):
        raise UserError(found)
    cache.publish(folder)
    tokenizer = partial(load_tokenizer, folder, cfg.model)
    if found := limits.text_problems(cfg, shape, tokenizer):
        raise UserError(found)
    store = prepare(cfg.data, tokenizer, tokenizer_identity(folder, cfg.model), cache)
    return Inputs(folder, shape, store)
