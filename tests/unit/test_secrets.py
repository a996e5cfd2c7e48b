"""Secrets stay out of configs, pickles out of models, and paths within their folders."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import HubModelConfig, PackageModelConfig
from raytune_lora.models import sources
from raytune_lora.tuning import secrets

TOKEN = "hf_" + "Ab1" * 11
RANDOM = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4"


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("search.storage=postgresql+psycopg2://me:plain@db/x", "set RAYTUNE_LORA_STORAGE_PASSWORD in the environment"),
        (
            "search.storage='mysql+pymysql://me@db/x?password=plain'",
            "set RAYTUNE_LORA_STORAGE_PASSWORD in the environment",
        ),
        (
            "tracking.mlflow_uri=https://me:hunter22@mlflow/",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        (f"tracking.project={TOKEN}", "leave it out, and set the variable that its library reads"),
        ("data=file data.path=https://me:hunter22@host/rows.jsonl", "leave it out"),
        ("data=file data.path='https://a.blob.core.windows.net/c/r.jsonl?sv=2024&sig=plain%3D'", "leave it out"),
        ("data=file data.path='https://host/rows.jsonl?access_token=hunter22'", "leave it out"),
        ("data=file data.path='s3://b/r.jsonl?X-Amz-Credential=a&X-Amz-Signature=hunter22'", "leave it out"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_shown(override: str, remedy: str) -> None:
    overrides = override.split(" ")
    (problem,) = secrets.problems(compose(["model=tiny", "data=fake", *overrides]))
    assert problem.startswith(
        overrides[-1].partition("=")[0] + " holds a secret, which would be written to config.yaml"
    )
    assert remedy in problem
    assert not any(part in problem for part in ("plain", "hunter22", TOKEN))


@pytest.mark.parametrize(
    "override",
    ["search.storage=postgresql+psycopg2://me@db/x", "search.storage=journal:///shared/x", "tracking.project=mine"],
)
def test_what_is_none(override: str) -> None:
    assert not secrets.problems(compose(["model=tiny", "data=fake", override]))


@pytest.mark.parametrize(
    ("variable", "value", "override"),
    [
        ("WANDB_API_KEY", "0a1b2c3d4e5f6a1b2c3d4e5f6a1b2c3d4e5f6a7b", "tracking.project=${oc.env:WANDB_API_KEY}"),
        ("MY_PASSWORD", "plainword", "tracking.project=${oc.env:MY_PASSWORD}"),
        ("HF_TOKEN", "not-of-its-usual-shape", "tracking.project=mine-${oc.env:HF_TOKEN}"),
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG", "tracking.project=my_wJalrXUtnFEMIK7MDENG"),
    ],
)
def test_what_a_secret_variable_holds_is_refused(
    variable: str, value: str, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    (problem,) = secrets.problems(compose(["model=tiny", "data=fake", override]))
    assert problem.startswith(f"{override.partition('=')[0]} holds what the variable {variable} holds here")
    assert value not in problem


def test_what_an_ordinary_variable_holds_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT", "something-of-mine")
    monkeypatch.setenv("MY_KEY", "tiny")
    monkeypatch.setenv("OTHER_TOKEN", "")
    assert not secrets.problems(compose(["model=tiny", "data=fake", "tracking.project=${oc.env:PROJECT}"]))


@pytest.mark.parametrize(
    "text",
    [
        "//npm.example.org/:_authToken=npm_" + "a1B2" * 9,
        "password = pypi-AgE" + "IcHlwaS5vcmc" * 7,
        "SG." + "a1B2c3D4e5_" * 2 + "." + "a" * 43,
        "sq0csp-" + "a1B2" * 10 + "xyz",
        "dop_v1_" + "0a1b" * 16,
        *(f"gl{kind}-" + "a1B2" * 6 for kind in ("dt", "ft", "soat", "rt", "cbt", "imt", "ptt", "agent", "oas", "pat")),
        "DefaultEndpointsProtocol=https;AccountName=mine;AccountKey=" + "a1B2" * 21 + "ab==;EndpointSuffix=x",
        "https://hooks.slack.com/services/T0A1B2C3D/B0A1B2C3D/" + "a1B2" * 6,
        "https://mine.blob.core.windows.net/c/rows.jsonl?sp=r&sig=" + "a1B2" * 10 + "%3D",
        "s3://bucket/rows.jsonl?X-Amz-Signature=" + "0a1b" * 16,
        "https://host/rows.jsonl?access_token=hunter22",
        "xapp-1-A0B1C2D3E4F-1234567890123-" + "0a1b" * 16,
        "GOCSPX-" + "a1B2" * 7,
        "ya29." + "a1B2_" * 20,
        "AGE-SECRET-KEY-1" + "Q1W2" * 14 + "XY",
        *(f"{prefix}{'a1B2' * 20}"[:length] for prefix, length in {"gsk_": 56, "r8_": 40, "pplx-": 53}.items()),
        "xai-" + "a1B2" * 20,
        "nvapi-" + "a1B2" * 16,
        "lsv2_pt_" + "0a1b" * 8 + "_0a1b2c3d4e",
        "dapi" + "0a1b" * 8,
        "wandb_v1_" + "a1B2" * 19,
        "wandb login --relogin " + "0a1b" * 10,
        "dckr_pat_" + "a1B2" * 6 + "xyz",
        "bot 1234567890:AA" + "a1B2" * 8 + "x",
        "https://discord.com/api/webhooks/123456789012345678/" + "a1B2" * 17,
        "https://hooks.slack.com/workflows/T0A1B2C3D/A0B1C2D3E/123456789012345678/" + "a1B2" * 6,
        "redis://:S3cretP4ss@host:6379/0",
        f"https://{RANDOM}@dev.azure.com/x/_git/y",
        "jdbc:mysql://host/db?user=bob&password=Tr0ub4dor3xY",
        f'curl -H "Authorization: Bearer {RANDOM}"',
        "machine api.wandb.ai login user password " + "0a1b" * 10,
        '{"auths": {"https://index.docker.io/v1/": {"auth": "Ym9iOlRyMHViNGRvcjM="}}}',
        '{"kty": "RSA", "n": "x", "e": "AQAB", "d": "' + "a1B2" * 40 + '"}',
        "client-key-data: " + b64encode(b"-----BEGIN EC PRIVATE KEY-----\n" + b"a1B2" * 16).decode(),
        "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\nComment: x\n" + "a1B2" * 16,
        "PuTTY-User-Key-File-2: ssh-rsa\nPrivate-Lines: 1\n" + "a1B2" * 16,
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A1B\n\n" + "a1B2" * 16,
    ],
)
def test_shapes_of_tokens(text: str) -> None:
    assert secrets.looks_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://host/rows.jsonl?page=2&sort=token",
        "glass-of-water-for-the-two-of-us",
        "SG.not-a-key",
        "npm_config_cache",
        "postgresql://<user>:<password>@host/db and https://me:${PASSWORD}@host and mysql://u:{password}@h",
        "hdfs://username:pwd@host, https://user:token@host, s3://***:***@host",
        "https://" + "0a1b" * 8 + "@o1.ingest.sentry.io/1",  # a public key
        "Authorization: Bearer <token>, Authorization: Bearer $TOKEN, Authorization: Basic realm",
        "client-certificate-data: " + b64encode(b"-----BEGIN CERTIFICATE-----\n" + b"a1B2" * 16).decode(),
        "id 123e4567-e89b-12d3-a456-426614174000, sha256:" + "0a1b" * 16 + ", sha512-" + "a1B+" * 21 + "==",
        "dapi_client, xai-explainable, gsk_ratio, at 12:34:56:AAAA",
    ],
)
def test_shapes_of_none(text: str) -> None:
    assert not secrets.looks_secret(text)


def test_every_config_that_is_shipped_is_free_of_them() -> None:
    for experiment in ("tiny", "quickstart"):
        assert not secrets.problems(compose([f"experiment={experiment}"]))


def test_the_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+psycopg2://me@db/x"
    assert secrets.with_password(url) == url
    monkeypatch.setenv("RAYTUNE_LORA_STORAGE_PASSWORD", "p@ss word")
    assert secrets.with_password(url) == "postgresql+psycopg2://me:p%40ss word@db/x"
    assert secrets.with_password("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"


# ----------------------------------------------------------------------------------------------------- models and paths


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (problem,) = sources.problems(HubModelConfig(path=str(tmp_path)))
    assert problem.startswith(
        f"model.path: the weights in {tmp_path} are pickled (pytorch_model.bin); a pickle can run"
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not sources.problems(HubModelConfig(path=str(tmp_path)))


def test_a_model_is_loaded_from_safetensors_alone(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    from raytune_lora.config.schema import QuantizationConfig
    from raytune_lora.models.loading import load_model

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder, HubModelConfig(path=str(folder)), QuantizationConfig())


def test_code_that_comes_with_a_model_is_not_trusted() -> None:
    assert not HubModelConfig().trust_remote_code


@pytest.mark.parametrize("file", ["../json/__init__.py", "/etc/hostname"])
def test_a_models_file_lies_in_its_package(file: str) -> None:
    (problem,) = sources.problems(PackageModelConfig(package="email", file=file))
    assert problem == f"model.file: the package email holds no {file}"


def test_nothing_is_unpickled() -> None:
    root = Path(sources.__file__).parents[1]
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "import pickle" not in text, path
        assert "weights_only=False" not in text, path
