"""A sweep whose driver is killed (SIGKILL) again and again at random moments, and what each kill costs.

    python jobs/bench/kills.py --kills 10 --seed 0

The moments are drawn over the journal's events, so that each sitting gets somewhere on a fast machine and on a slow
one: after a few events, and then after a random part of the time between two of them. Nothing is waited for between a
kill and the next start. At the end the sweep is let through, and its journal is compared with what was asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOB = Path(__file__).resolve().parents[1] / "sweep.py"
SWEEP = (
    "experiment=tiny",
    "scheduler=none",
    "training.patience=null",
    "training.global_batch=8",
    "training.max_steps=60",
    "evaluation.every=80",
    "evaluation.loss_rows=8",
    "evaluation.generate_rows=0",
)
LIMIT = 300  # seconds of a sitting


@dataclass
class Kill:
    """One sitting that was killed."""

    seconds: float  # that it lasted
    to_first_event: float  # seconds from its start to its first event of a trial
    events: int  # of trials, in this sitting
    ended: int  # trials that had ended by then, in all sittings
    lost: float  # seconds of the trials that ran since their last checkpoints, or since they went on
