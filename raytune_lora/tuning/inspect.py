"""What is in the data and what of it a model will be trained on: printed, and written as a report."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytune_lora.artifacts import write_json
from raytune_lora.config.schema import HubModelConfig, SweepConfig
from raytune_lora.data.build import OWN, REPORT, DataRefused, every_finding, survey, why_left_out
from raytune_lora.data.encode import IGNORED
from raytune_lora.data.sources import sources
from raytune_lora.data.splits import SPLITS
from raytune_lora.data.store import TokenStore
from raytune_lora.models.tokenizer import load_tokenizer
from raytune_lora.report.data import render_data
from raytune_lora.training.plan import plan_run, remarks
from raytune_lora.tuning.disk import explained
from raytune_lora.tuning.folder import SweepFolder
from raytune_lora.tuning.job import prepare_inputs
from raytune_lora.tuning.preflight import check_inputs

OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there is no colour
_AGAIN = "start it again"  # once there is room
PAGE = "data_report.html"


def show_data(cfg: SweepConfig, console: Console | None = None) -> dict[str, Any]:
    """Check the data, write the token store where a model is named, print a summary and write the reports.

    Args:
        cfg: model, data and cache; ``evaluation.examples`` says how many rows are shown, ``output`` where
            ``data_report.json`` and ``data_report.html`` go.
        console: to print on; standard output by default.

    Returns:
        What ``data_report.json`` says.

    Raises:
        UserError: the config cannot work, or the data is not fit to be trained on (the reports are written first).
        JobFailed: storage is full or cannot be written.
    """
    check_inputs(cfg)
    console = console or Console(highlight=False, soft_wrap=True)
    refused: DataRefused | None = None
    store: TokenStore | None = None
    try:
        if isinstance(cfg.model, HubModelConfig) and cfg.model.path is None:
            with tempfile.TemporaryDirectory() as work, explained(Path(work), _AGAIN):
                report = survey(cfg.data, sources(cfg.data), None, Path(work))
        else:
            with explained(Path(cfg.cache).expanduser().absolute(), _AGAIN):
                inputs = prepare_inputs(cfg)
            store = inputs.store
            report = json.loads((store.folder / REPORT).read_text())
            tokenizer = load_tokenizer(inputs.model, cfg.model)
            rows = store.split("train").select(range(min(cfg.evaluation.examples, store.rows["train"])))
            report["preview"] = [list(pieces(row, tokenizer)) for row in rows]
            report["cost"] = _cost(cfg, store)
            report["advice"] += [f"{remark}." for remark in remarks(cfg, store.rows["train"])]
    except DataRefused as error:
        refused, report = error, error.report
    _print(console, report, store)
    if cfg.output is not None:
        folder = SweepFolder.of(cfg).path
        with explained(folder, _AGAIN):
            _write(folder, report)
        console.print(f"report     {folder / PAGE}")
    if refused is not None:
        raise refused
    return report


def pieces(row: dict[str, Any], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """A row's text in pieces, each with whether it is trained.

    Args:
        row: ``input_ids`` and ``labels`` of the token store.
        tokenizer: that made it.
    """
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
        yield tokenizer.decode([token for token, _ in run], skip_special_tokens=False), trained


def marked(row: list[tuple[str, bool]], *, colour: bool) -> Text:
    """Pieces: what is trained in green, or within brackets where there is no colour, and what is masked dimmed."""
    text = Text()
    for piece, trained in row:
        shown = f"{OPEN}{piece}{CLOSE}" if trained and not colour else piece
        text.append(shown, style="bold green" if trained else "dim")
    return text


def _cost(cfg: SweepConfig, store: TokenStore) -> dict[str, Any]:
    """What an epoch takes."""
    rows = store.rows["train"]
    plan = plan_run(cfg, rows, store.lengths("train"))
    return {
        "tokens_per_epoch": store.manifest["tokens"]["train"],
        "steps_per_epoch": math.ceil(rows / plan.global_batch),
        "global_batch": plan.global_batch,
        "forward_passes_per_step": plan.accumulation * plan.workers,
        "packing": cfg.training.packing,
    }


def _write(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT, report)
    (folder / PAGE).write_text(render_data(report), encoding="utf-8", errors="backslashreplace")


def _print(console: Console, report: dict[str, Any], store: TokenStore | None) -> None:
    rows, tokens = report["rows"], report["tokens"]
    for source in report["sources"]:
        files = "" if source["name"].endswith(tuple(source["files"])) else f": {', '.join(source['files'])}"
        console.print(Text(f"read       {rows['read'][source['name']]} rows from {source['name']}{files}"))
    for split in SPLITS:
        count = rows["splits"][split]
        of = f", {tokens[split]} tokens, {tokens[split] / count:.0f} a row" if tokens and count else ""
        console.print(f"{split:<11}{count} rows{of}")
    console.print(f"left out   {rows['left_out']} rows{': ' * bool(rows['left_out'])}{why_left_out(report)}")
    if rows["cut"]:
        console.print(f"cut        {rows['cut']} rows, to data.max_length={report['max_length']} tokens")
    for source in report["sources"]:
        if source["left_out"] and source["role"] not in OWN:
            console.print(Text(f"left out   of {source['name']}: {why_left_out(report, source['left_out'])}"))
    for name, mixed in report["mixed"].items():
        console.print(f"mixed in   {mixed['rows']} rows of {name}: {mixed['share']:.1%} (asked {mixed['asked']:.1%})")
    _print_findings(console, report)
    for sentence in report["advice"]:
        console.print(f"advice     {sentence}")
    if report["tokens"] is None:
        console.print("tokens     not counted: name a model (model.path=…, model=smollm2) to write the token store")
    elif store is not None:
        console.print(f"in         {store.folder}")
    for number, row in enumerate(report.get("preview", ())):
        console.print(f"\n[dim]-- row {number} of train; what is trained is marked[/dim]")
        console.print(marked(row, colour=console.is_terminal))


def _print_findings(console: Console, report: dict[str, Any]) -> None:
    seen = {name: finding for name, finding in every_finding(report).items() if finding["count"]}
    if not seen:
        console.print("findings   none")
        return
    table = Table("finding", "rows", "action", "for example", box=None, pad_edge=False)
    for name, finding in seen.items():
        example = finding["examples"][0] if finding["examples"] else {"where": "", "detail": ""}
        table.add_row(name, str(finding["count"]), finding["action"], Text(f"{example['where']} {example['detail']}"))
        reasons = finding.get("reasons") or {}
        for reason, count in reasons.items() if len(reasons) > 1 else ():
            table.add_row("", f"({count})", "", Text(reason))
    console.print(table)
