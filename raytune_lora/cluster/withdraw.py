"""A job that was refused is stopped rather than failed, where whoever runs it tries again what has failed.

KubeRay does, on a new cluster each time, whatever the exit status. It takes a stopped job for one that is complete.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time

REFUSED = "RAYTUNE_LORA_REFUSED"  # says how a refused job ends: ``stopped``; else it fails
_STOPPED = "stopped"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray tells a driver by it what job it is
_PATIENCE = 60.0  # seconds until Ray has ended this process


def withdraw() -> None:
    """Have Ray stop the job whose driver this process is, where that is asked for; it ends this process by a signal.

    Where Ray does not, that is said, and the job fails.
    """
    if os.environ.get(REFUSED) != _STOPPED:
        return
    try:
        _stop(json.loads(os.environ[_JOB])["metadata"]["job_submission_id"])
    except KeyboardInterrupt:  # RAY_JOB_STOP_SIGNAL may say so
        return
    except Exception as error:  # nothing narrower is raised where no dashboard answers, or this is no driver
        print(f"the job could not be stopped, and fails: {error!r}", file=sys.stderr)


def _stop(job: str) -> None:
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    print("the job is stopped, so that nobody tries again what would be refused again", file=sys.stderr, flush=True)
    JobSubmissionClient().stop_job(job)
    time.sleep(_PATIENCE)
    raise TimeoutError(f"Ray has not stopped it within {_PATIENCE:.0f} s")
