"""Train one configuration: ``python jobs/train.py model=tiny data=fake training.max_steps=4 output=runs/tiny``."""

import sys

from raytune_lora.cli import job

if __name__ == "__main__":
    sys.exit(job("train"))
