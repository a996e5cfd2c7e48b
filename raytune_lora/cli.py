"""The command line: ``raytune-lora sweep experiment=quickstart``, or ``python jobs/sweep.py experiment=quickstart``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

VERBS = {
    "sweep": "search for the best fine-tune",
    "train": "train one configuration",
    "prepare": "check and prepare the data, and show what is in it",
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
    "  output=<folder>   where everything of it goes; it must be new",
    "  resume=<folder>   go on with one that was interrupted",
)
# what may change when a sweep or run goes on: where and how it is computed and when it ends, and not what
_WHERE = (
    r"workers|[cg]pus_per_worker|training\.micro_batch|search\.concurrent|search\.stalled"
    r"|(deepspeed|cluster|tracking|budget|search\.constraints)(\..*)?"
)
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
    if "--help" in arguments or "-h" in arguments:
        print(_help(verb, program))
        return 0
    from raytune_lora.errors import UserError

    try:
        return _run(verb, arguments)
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 2


def _run(verb: str, arguments: list[str]) -> int:
    from raytune_lora.config.compose import compose, dump
    from raytune_lora.errors import UserError

    only_config = _take_cfg(arguments)
    cfg = compose(arguments)
    searched = [a for a in arguments if a.lstrip("+~").split("=")[0].split(".")[0] in _SEARCH_ONLY]
    if verb != "sweep" and searched:
        raise UserError(f"{searched[0]}: {verb} has no search; leave it out, or use sweep")
    if verb == "prepare" and cfg.resume is not None:
        raise UserError("resume: prepare finds by itself what it has made before")
    moved = [key for a in arguments if (key := a.lstrip("+~").partition("=")[0]) != "resume"]
    if cfg.resume is not None and (fixed := [key for key in moved if not re.fullmatch(_WHERE, key)]):
        raise UserError(
            f"resume: a sweep or run goes on with the config in its folder; leave {', '.join(fixed)} out (what can be "
            "changed is where it runs and when it ends: workers, cpus_per_worker, gpus_per_worker, "
            "training.micro_batch, search.concurrent, search.stalled, and the groups deepspeed, cluster, tracking and "
            "budget)"
        )
    if only_config:
        print(dump(cfg), end="")
        return 0
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if verb == "prepare":
        from raytune_lora.tuning.inspect import show_data

        show_data(cfg)
        return 0
    from raytune_lora.tuning.job import JobFailed
    from raytune_lora.tuning.run import run_once
    from raytune_lora.tuning.sweep import run_sweep

    jobs: dict[str, Callable[..., dict[str, object]]] = {"sweep": run_sweep, "train": run_once}
    try:
        results = jobs[verb](cfg, moved if cfg.resume is not None else ())
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; go on with resume={cfg.resume or cfg.output}", file=sys.stderr)
        return 130
    return _summary(results, str(cfg.resume or cfg.output))


def _summary(results: dict[str, object], folder: str) -> int:
    from raytune_lora.tuning.summary import lines

    text, good = lines(results, folder)
    print(text)
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
