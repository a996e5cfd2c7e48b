"""The command line: ``raytune-lora sweep experiment=quickstart``, or ``python jobs/sweep.py experiment=quickstart``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial

VERBS = {
    "sweep": "search for the best fine-tune",
    "train": "train one configuration",
    "prepare": "check and prepare the data, and show what is in it",
    "submit": "run a sweep on a Ray cluster, and come back to it by its name",
    "status": "show how a sweep or run stands, from its folder",
}
_EXAMPLES = {
    "sweep": (
        "experiment=quickstart",
        "experiment=quickstart search.trials=12 training.micro_batch=2",
        "model.path=Qwen/Qwen2.5-0.5B data.path=my.jsonl output=sweeps/mine",
        "resume=sweeps/mine",
    ),
    "train": (
        "model=tiny data=fake training.max_steps=4 output=runs/tiny",
        "model=smollm2 data.path=my.jsonl method.r=16 training.learning_rate=2e-4",
        "model=smollm2 data.path=my.jsonl workers=2 deepspeed=zero3",
    ),
    "prepare": (
        "data.path=my.jsonl data.pii.action=report output=reports/mine",
        "model=smollm2 data=extraction",
        "model=smollm2 data.path=my.jsonl data.max_length=1024 evaluation.examples=3",
    ),
}
_FOLDERS = (
    "  output=<folder>   where everything of it goes; it must be new; or the URI of one in an object store",
    "  resume=<folder>   go on with one that was interrupted",
    "  resume=auto       go on with the one in output=<folder>, or begin it: the same command works again and again",
)
# what libraries say at each import on a machine without a GPU, by logger
_OF_NO_USE = {"DeepSpeed": "Setting accelerator to CPU", "bitsandbytes.backends.cpu.ops": "kernels-community"}
_as_json = ContextVar("as_json", default=False)  # what a job says
_SEARCH_ONLY = ("search", "scheduler", "space", "budget", "confirm")


def main(argv: Sequence[str] | None = None) -> int:
    """The installed command; the first argument is the verb."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        wanted_help = bool(arguments) and arguments[0] in ("--help", "-h")
        lines = [f"  {verb:<8}{what}" for verb, what in VERBS.items()]
        print("usage: raytune-lora <verb> [key=value …]", "", *lines, "", "raytune-lora <verb> --help", sep="\n")
        return 0 if wanted_help else 2
    return job(arguments[0], arguments[1:], program=f"raytune-lora {arguments[0]}")


def job(verb: str, overrides: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one job and return the exit status: 0 well, 1 failed, 2 the user's mistake, 130 interrupted.

    Args:
        verb: one of ``VERBS``.
        overrides: the command line without the program; None takes it from ``sys.argv``.
        program: as typed, for the help.
    """
    arguments = list(sys.argv[1:] if overrides is None else overrides)
    program = program or f"python {sys.argv[0]}"
    if verb in _WITH_OPTIONS:
        return _said(lambda: _WITH_OPTIONS[verb](arguments, program))
    if "--help" in arguments or "-h" in arguments:
        return _said(lambda: _show_help(verb, program))
    return _said(lambda: _run(verb, arguments))


def _show_help(verb: str, program: str) -> int:
    print(_help(verb, program))
    return 0


def _said(run: Callable[[], int]) -> int:
    """Run it; a user's mistake is said, and is status 2."""
    from raytune_lora.errors import Passing, UserError
    from raytune_lora.shadows import problems

    try:
        if found := problems(os.getcwd(), sys.path):
            raise UserError(found)
        return run()
    except UserError as error:
        for problem in error.problems:
            _tell("error", f"error: {problem}")
        if not isinstance(error, Passing):
            from raytune_lora.cluster.withdraw import withdraw

            withdraw()
        return 2


def _tell(event: str, words: str, *, well: bool = False) -> None:
    """Print what a job says before and after its ``Progress``: for machines, where that is asked."""
    if _as_json.get():
        words = json.dumps({"time": time.time(), "event": event, "message": words}, ensure_ascii=False)
    print(words, file=sys.stdout if well else sys.stderr, flush=True)


def _useful(words: str, record: logging.LogRecord) -> bool:
    return words not in record.getMessage()


def _run(verb: str, arguments: list[str]) -> int:
    from raytune_lora.config.compose import compose, dump
    from raytune_lora.config.schema import LogFormat
    from raytune_lora.config.typed import typed
    from raytune_lora.errors import JobFailed, UserError
    from raytune_lora.tuning.resume import settle

    only_config = _take_cfg(arguments)
    cfg = compose(arguments)
    searched = [a for a in arguments if a.lstrip("+~").split("=")[0].split(".")[0] in _SEARCH_ONLY]
    if verb != "sweep" and searched:
        raise UserError(f"{searched[0]}: {verb} has no search; leave it out, or use sweep")
    if verb == "prepare" and cfg.resume is not None:
        raise UserError("resume: prepare finds by itself what it has made before")
    moved = settle(cfg, arguments)
    if only_config:
        print(dump(cfg), end="")
        return 0
    _as_json.set(cfg.tracking.log is LogFormat.json)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for logger, words in _OF_NO_USE.items():
        logging.getLogger(logger).addFilter(partial(_useful, words))
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if verb == "prepare":
        from raytune_lora.tuning.inspect import show_data

        show_data(cfg)
        return 0
    from raytune_lora.tuning.run import run_once
    from raytune_lora.tuning.sweep import run_sweep

    jobs: dict[str, Callable[..., dict[str, object]]] = {"sweep": run_sweep, "train": run_once}
    try:
        results = jobs[verb](cfg, moved)
    except JobFailed as error:
        _tell("error", f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _tell("interrupted", f"interrupted; go on with {typed('resume', str(cfg.resume or cfg.output))}")
        return 130
    return _summary(results, str(cfg.resume or cfg.output))


def _status(arguments: list[str], program: str) -> int:
    parser = argparse.ArgumentParser(prog=program, description="Show how a sweep or run stands, from its folder alone.")
    parser.add_argument("folder", help="of the sweep or run, or its URI")
    parser.add_argument("--json", action="store_true", help="for programs; tuning/status.py documents the schema")
    parser.add_argument("--follow", action="store_true", help="go on until no process works on it any more")
    parser.add_argument("--trial", metavar="ID", help="one trial: its numbers, its newest steps and lines of its log")
    asked = parser.parse_args(arguments)
    from raytune_lora.tuning.show import show

    with contextlib.suppress(KeyboardInterrupt):
        return show(asked.folder, as_json=asked.json, follow=asked.follow, trial_id=asked.trial)
    return 0


def _submit(arguments: list[str], program: str) -> int:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Run a sweep on a Ray cluster. The config is checked here; the folder that you are in goes along, "
        "without what git ignores, data and weights. Ctrl-C leaves the sweep to the cluster.",
        epilog=f"example: {program} --address http://127.0.0.1:8265 model.path=/shared/llama data.path=my.jsonl "
        "output=/shared/sweeps/mine cache=/shared/cache workers=4 gpus_per_worker=1",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of sweep; output=<folder of the cluster>")
    parser.add_argument(
        "--address",
        metavar="URL",
        help="of the dashboard, or its name in ~/.config/raytune-lora/clusters.yaml (a line each, lab: http://…:8265); "
        "without it $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS",
    )
    parser.add_argument("--name", help="of the sweep; as the last part of output")
    parser.add_argument("--detach", action="store_true", help="do not wait for its end")
    again = parser.add_argument_group("come back to a sweep by its name")
    again.add_argument("--status", metavar="NAME", help="how it stands, in one line")
    again.add_argument(
        "--list", dest="all", action="store_true", help="how all sweeps of the cluster stand, a line each"
    )
    again.add_argument("--logs", metavar="NAME", help="follow it, and fetch its results at the end")
    again.add_argument("--stop", metavar="NAME", help="end it in order")
    again.add_argument("--resume", metavar="NAME", help="go on with it; without key=value, as it was submitted")
    parser.add_argument("--dry-run", action="store_true", help="check, and show what would go along, with sizes")
    parser.add_argument("--env", metavar="VARIABLE", action="append", default=[], help="pass it on (HF_TOKEN); repeat")
    parser.add_argument(
        "--driver-resource", metavar="NAME", help="run the driver where one of this is free; else on the head"
    )
    parser.add_argument("--limit", type=int, default=100, metavar="MB", help="of what goes along (default: 100)")
    parser.add_argument("--to", metavar="FOLDER", help="for report, results and adapter (default: sweeps/<name>)")
    asked = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")
    from raytune_lora.tuning.remote import Options, remote

    return remote(Options(**vars(asked)), program)


_WITH_OPTIONS: dict[str, Callable[[list[str], str], int]] = {"status": _status, "submit": _submit}


def _summary(results: dict[str, object], folder: str) -> int:
    from raytune_lora.tuning.summary import lines

    text, good = lines(results, folder)
    _tell("summary", text, well=True)
    return 0 if good else 1


def _take_cfg(arguments: list[str]) -> bool:
    """Whether ``--cfg job`` is among the arguments; it is taken out.

    Raises:
        UserError: another option is.
    """
    from raytune_lora.errors import UserError

    asked = False
    if "--cfg" in arguments:
        at = arguments.index("--cfg")
        if arguments[at + 1 : at + 2] != ["job"]:
            raise UserError("--cfg prints the config of the job: write --cfg job")
        del arguments[at : at + 2]
        asked = True
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(
                f"{argument}: there is no such option; there are --help and --cfg job, and key=value overrides"
            )
    return asked


def _help(verb: str, program: str) -> str:
    """Needs no library, so that it answers at once."""
    from raytune_lora.config.groups import groups

    shown = [f"  {name:<15}{', '.join(names)}" for name, names in groups().items()]
    return "\n".join(
        [
            f"usage: {program} [--help] [--cfg job] [key=value …]",
            "",
            f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}.",
            "",
            *(line for line in _FOLDERS if verb != "prepare" or "resume" not in line),
            "  --cfg job         print the whole config, and every key that can be set, without running",
            "",
            "groups, chosen by group=name:",
            *shown,
            "",
            "examples:",
            *(f"  {program} {example}" for example in _EXAMPLES[verb]),
        ]
    )
