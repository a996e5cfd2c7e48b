"""The commands in README.md, for the tests that execute them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[str]:
    """Each command of each bash block, continued lines joined, comments cut."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        joined = block.replace("\\\n", " ")
        found += [" ".join(shlex.split(line, comments=True)) for line in joined.splitlines() if line.strip()]
    return found


def command(part: str) -> str:
    """The one command that has the part."""
    (found,) = [command for command in commands() if part in command]
    return found


def arguments(part: str, replaced: dict[str, str]) -> list[str]:
    """What follows the script's name in a command, with placeholders replaced."""
    text = command(part)
    for old, new in replaced.items():
        assert old in text, f"{old} is not in {text}"
        text = text.replace(old, new)
    return shlex.split(text.partition(".py")[2])
