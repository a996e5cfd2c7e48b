"""One Ray instance and one worker group of each size for all tests that train."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from raytune_lora.cluster import connect
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.driver import Pool
from raytune_lora.tuning.job import plain_run, prepare_inputs
from tests import s3

# persistent=0: ZeRO-3 divides, and gathers, even the smallest parameter, as it would those of a model of a usual size
TRAINING = ("training.global_batch=8", "training.max_steps=8", "training.learning_rate=3e-3", "deepspeed.persistent=0")
TINY = ("model=tiny", "data=fake", *TRAINING)
EVALUATION = ("evaluation.every=32", "evaluation.loss_rows=16", "evaluation.generate_rows=4")

METRICS_INTERVAL = 1.0  # seconds between two exports of Ray's gauges; ten by default
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """As the program starts it, with room for the groups of all tests."""
    os.environ |= connect.ENVIRONMENT | {"RAY_metrics_report_interval_ms": str(round(METRICS_INTERVAL * 1000))}
    ray.init(address="local", num_cpus=8, object_store_memory=128 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def configure(cache: Path) -> Configure:
    """The config of a tiny run, with overrides."""

    def configured(*overrides: str) -> RunConfig:
        return plain_run(compose([*TINY, *EVALUATION, f"cache={cache}", *overrides]))

    return configured


@pytest.fixture(scope="session")
def store(configure: Configure, cache: Path) -> TokenStore:
    return prepare_inputs(compose([*TINY, f"cache={cache}"])).store


@pytest.fixture(scope="session")
def single(ray_instance: None, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A resident group of one worker."""
    with Pool(configure("workers=1"), tmp_path_factory.mktemp("single"), groups=1) as pool:
        yield pool


@pytest.fixture(scope="session")
def pair(ray_instance: None, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A resident group of two workers."""
    with Pool(configure("workers=2"), tmp_path_factory.mktemp("pair"), groups=1) as pool:
        yield pool


@pytest.fixture(scope="session")
def upstream() -> Iterator[int]:
    with s3.server() as port:
        yield port


@pytest.fixture
def proxy(upstream: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    """A proxy, to which the environment's settings of S3 lead."""
    proxy = s3.Proxy(upstream)
    with proxy.listening() as port:
        settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1"}
        for name, value in {**settings, "ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield proxy


@pytest.fixture
def bucket(proxy: s3.Proxy, upstream: int) -> str:
    name = f"bucket-{secrets.token_hex(4)}"
    s3.make_bucket(upstream, name)
    return f"s3://{name}"
