"""What a process prints, sent to a file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send all that the process prints, native libraries included, to the end of a file."""
    streams = (sys.stdout, sys.stderr)
    with log.open("ab", buffering=0) as file:
        saved = os.dup(1), os.dup(2)
        for stream in streams:
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
            for number, copy in enumerate(saved, 1):
                os.dup2(copy, number)
                os.close(copy)
