"""Run a sweep on a Ray cluster: ``python jobs/submit.py --address http://127.0.0.1:8265 output=/shared/mine …``."""

import sys

from raytune_lora.cli import job

if __name__ == "__main__":
    sys.exit(job("submit"))
