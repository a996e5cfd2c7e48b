"""Show how a sweep stands, from its folder alone: ``python jobs/status.py sweeps/mine``."""

import sys

from raytune_lora.cli import job

if __name__ == "__main__":
    sys.exit(job("status"))
