"""What a model will be trained on: the token store, and rows of it with the trained tokens apart from the masked."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from raytune_lora.config.schema import SweepConfig
from raytune_lora.data.store import IGNORED, SPLITS
from raytune_lora.models.tokenizer import load_tokenizer
from raytune_lora.tuning.job import prepare_inputs
from raytune_lora.tuning.preflight import check_inputs

OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there is no colour


def show_data(cfg: SweepConfig, console: Console | None = None) -> None:
    """Write the token store, or find it, and print its counts and its first rows.

    Args:
        cfg: model, data and cache; ``evaluation.examples`` says how many rows.
        console: to print on; standard output by default.

    Raises:
        UserError: the config cannot work, or the data cannot be read.
    """
    check_inputs(cfg)
    console = console or Console(highlight=False, soft_wrap=True)
    folder, store = prepare_inputs(cfg)
    tokenizer = load_tokenizer(folder, cfg.model)
    for split in SPLITS:
        rows, tokens = store.rows[split], store.manifest["tokens"][split]
        console.print(f"{split:<11}{rows} rows, {tokens} tokens" + (f", {tokens / rows:.0f} a row" if rows else ""))
    console.print(f"left out   {store.manifest['dropped_too_long']} rows, longer than {cfg.data.max_length} tokens")
    console.print(f"in         {store.folder}\n")
    train = store.split("train")
    for index in range(min(cfg.evaluation.examples, len(train))):
        row = train[index]
        trained = sum(label != IGNORED for label in row["labels"])
        console.print(f"[dim]-- row {index} of train: {trained} of {len(row['labels'])} tokens are trained[/dim]")
        console.print(marked(row, tokenizer, colour=console.is_terminal))


def marked(row: dict[str, Any], tokenizer: Any, *, colour: bool) -> Text:
    """A row's text: what is trained in green, or within brackets, and what is masked dimmed.

    Args:
        row: ``input_ids`` and ``labels`` of the token store.
        tokenizer: that made it.
        colour: whether there is some.
    """
    text = Text()
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        if trained and not colour:
            piece = f"{OPEN}{piece}{CLOSE}"
        text.append(piece, style="bold green" if trained else "dim")
    return text
