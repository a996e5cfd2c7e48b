"""Prepare data and show what is trained: ``python jobs/prepare.py model=smollm2 data.path=my.jsonl``."""

import sys

from raytune_lora.cli import job

if __name__ == "__main__":
    sys.exit(job("prepare"))
