"""Search for the best fine-tune: ``python jobs/sweep.py experiment=quickstart``."""

import sys

from raytune_lora.cli import job

if __name__ == "__main__":
    sys.exit(job("sweep"))
