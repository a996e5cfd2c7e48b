"""Loads exported adapters by the code of their own cards, and measures them by a plain loop: a process of its own.

``python tests/load_exported.py <folder> <rows.json>``: the folder holds one adapter a folder; the rows have
``input_ids`` and ``labels``. Prints a line of JSON: by adapter, its loss and whether raytune_lora was needed.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch


def loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean cross entropy over the trained tokens of all rows, one row at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(labels) :].double()
            total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
            count += int((labels[1:] != -100).sum())
    return total / count


def main(folder: Path, rows: list[dict[str, list[int]]]) -> None:
    found = {}
    by_need = sorted(folder.iterdir(), key=lambda adapter: "raytune_lora" in (adapter / "README.md").read_text()[500:])
    for adapter in by_need:
        code = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
        os.chdir(adapter)
        names: dict[str, Any] = {}
        exec(compile(code, str(adapter), "exec"), names)
        found[adapter.name] = [loss(names["model"], rows), "raytune_lora" in sys.modules]
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
