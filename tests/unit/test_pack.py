"""What goes with a sweep to its cluster, and what must not."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from raytune_lora.cluster import secret_files
from raytune_lora.cluster.pack import Package, collect, listing
from raytune_lora.errors import UserError
from tests.readme import ROOT

TOKEN = "hf_" + "Ab1" * 11


def write(root: Path, *files: str, text: str = "x = 1\n") -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


def names(package: Package) -> list[str]:
    return [str(file) for file in package.files]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def test_what_git_ignores_stays(repository: Path) -> None:
    write(repository, "train.py", "conf/a.yaml", "private/notes.txt", "big.log", "untracked.txt", "scratch.txt")
    write(repository, ".gitignore", text="private/\n*.log\n")
    write(repository, ".rayignore", text="scratch.txt\nconf/\n")
    subprocess.run(["git", "add", "train.py", "conf"], cwd=repository, check=True)
    assert names(collect(repository)) == [".gitignore", ".rayignore", "train.py", "untracked.txt"]


def test_data_weights_and_what_sweeps_leave_stay(repository: Path) -> None:
    kept = ("a.py", "settings.json")
    write(
        repository,
        *kept,
        "rows.jsonl",
        "rows.csv.gz",
        "old.zip",
        "home.tar.xz",
        "m/model.safetensors",
        "m/pytorch_model.bin",
        "sweeps/a/x.yaml",
    )
    write(repository, "runs/x.py", ".venv/lib/y.py", "tests/test_a.py", "sub/__pycache__/z.pyc", ".ssh/config")
    assert names(collect(repository)) == list(kept)
    with_data = collect(repository, [repository / "rows.jsonl"])
    assert names(with_data) == ["a.py", "rows.jsonl", "settings.json"]


def test_a_folder_without_git(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "b/c.yaml", "sweeps/x.py", ".hidden/x.py")
    assert names(collect(tmp_path)) == ["a.py", "b/c.yaml"]
    write(tmp_path, "b/.gitignore")
    with pytest.raises(UserError, match=r"says what to leave out, and only git can read it: install git"):
        collect(tmp_path)


def test_links_out_of_the_folder_stay(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    write(outside, "secret.txt")
    write(repository, "a.py")
    os.symlink(outside / "secret.txt", repository / "link.txt")
    os.symlink(outside, repository / "folder")
    assert names(collect(repository)) == ["a.py"]


@pytest.mark.parametrize(
    "file",
    [
        ".env",
        ".env.production",
        "certs/server.pem",
        "id_rsa",
        "deploy/id_ed25519",
        "credentials.json",
        ".netrc",
        "a.key",
        "service-account-1.json",
        "kubeconfig",
        "auth_token",
        ".npmrc",
        "_netrc",
        ".dockercfg",
        "prod.env",
        ".envrc",
        ".boto",
        "secrets.yaml",
        "gcp-credentials.json",
        "application_default_credentials.json",
        "id_ed25519_sk",
        "release.jks",
        "prod.tfvars",
        "kaggle.json",
        "token",
        "hf_token.txt",
        "deploy_key",
        "id_rsa.bak",
        "server.pem.old",
        ".env~",
    ],
)
def test_files_of_secrets_are_refused_by_name(repository: Path, file: str) -> None:
    write(repository, "a.py", file)
    with pytest.raises(UserError, match=f"^{file.replace('.', '[.]')} looks like a file of secrets: "):
        collect(repository)
    write(repository, ".gitignore", text=f"{Path(file).name}\n")
    assert file not in names(collect(repository))


@pytest.mark.parametrize(
    "text",
    [
        f"login('{TOKEN}')\n",
        "url = 'postgresql://me:hunter22@db/x'\n",
        "password: Tr0ub4dor&3x\n",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA0123456789abcdef\n-----END RSA PRIVATE KEY-----\n",
    ],
)
def test_secrets_within_files_are_refused_and_not_shown(repository: Path, text: str) -> None:
    write(repository, "a.py", "conf/b.yaml")
    write(repository, "conf/c.yaml", text=text)
    with pytest.raises(UserError) as caught:
        collect(repository)
    (said,) = caught.value.problems
    assert said.startswith("conf/c.yaml holds what looks like a token, key or password: ")
    assert not any(part in said for part in (TOKEN, "hunter22", "Tr0ub4dor", "MIIEpAI"))


@pytest.mark.parametrize(
    "name", [".env.example", "example.env", "key.py", "credentials.py", "tokens.txt", "bak.py", "token.py", "env"]
)
def test_names_that_are_none(repository: Path, name: str) -> None:
    write(repository, name)
    assert names(collect(repository)) == [name]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_secrets_in_other_encodings(repository: Path, encoding: str) -> None:
    (repository / "notes.txt").write_bytes(f"a note\nlogin('{TOKEN}')\n".encode(encoding))
    with pytest.raises(UserError, match=r"^notes\.txt holds what looks like a token"):
        collect(repository)


@pytest.mark.parametrize("before", [2**20 - 20, 3 * 2**20, 5 * 2**20 - 7])
def test_secrets_anywhere_in_large_files(repository: Path, before: int) -> None:
    key = "-----BEGIN PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA\n" * 200 + "-----END PRIVATE KEY-----\n"
    for secret in (f" login('{TOKEN}') ", key):
        (repository / "notes.txt").write_text("a note\n" * (before // 7) + secret + "more\n" * 10**5)
        with pytest.raises(UserError, match=r"^notes\.txt holds what looks like a token"):
            collect(repository)


def test_a_models_folder_is_looked_into_and_rows_are_not(repository: Path) -> None:
    model = ["model/config.json", "model/tokenizer.json", "model/model.safetensors", "model/chat_template.jinja"]
    write(repository, *model, text="{}")
    write(repository, "rows.jsonl", "more.json", text=f'{{"text": "{TOKEN}"}}\n')
    write(repository, ".gitignore", text="more.json\n")
    named = [repository / file for file in (*model, "rows.jsonl", "more.json")]
    assert set(names(collect(repository, named))) >= {*model, "rows.jsonl", "more.json"}
    for file, said in (("model/push.py", "holds what looks like a token"), ("model/.npmrc", "a file of secrets")):
        write(repository, file, text=f"login('{TOKEN}')\n")
        with pytest.raises(UserError, match=said) as caught:
            collect(repository, [*named, repository / file])
        assert TOKEN not in str(caught.value)
        (repository / file).unlink()
    write(repository, "model/model.safetensors", text=TOKEN)
    collect(repository, named)


def uploaded(folder: Path, to: Path) -> set[str]:
    """What Ray's own code for ``ray job submit --working-dir`` packs of a folder."""
    create_package(str(folder), to, include_gitignore=True)
    with zipfile.ZipFile(to) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_ray_itself_uploads_no_secrets(tmp_path: Path) -> None:
    kept = [
        "jobs/sweep.py",
        "raytune_lora/cli.py",
        "conf/config.yaml",
        "data/my.jsonl",
        "models/m/config.json",
        "a.env.py",
    ]
    secret = [".env", "deploy/.env.production", "prod.env", ".aws/credentials", ".ssh/config", "keys/id_rsa", "a/b.pem"]
    secret += [".npmrc", "_netrc", ".dockercfg", ".git/config", "gcp-credentials.json", "service-account-1.json"]
    secret += ["kubeconfig", "k8s/secrets.yaml", "auth_token", ".docker/config.json", "credentials"]
    write(tmp_path / "work", *kept, *secret)
    everything = uploaded(tmp_path / "work", tmp_path / "before.zip")
    assert everything == {*kept, *secret}, "Ray leaves nothing out by itself"
    shutil.copy(ROOT / ".rayignore", tmp_path / "work")
    assert uploaded(tmp_path / "work", tmp_path / "after.zip") == set(kept)


@pytest.mark.parametrize("where", ["", "deep/er/"])
def test_names_that_a_submit_refuses_are_those_that_the_list_leaves_out(where: str, tmp_path: Path) -> None:
    refused = [".env", ".envrc", "x.env", "s.pem", "id_dsa", "id_ecdsa_sk", "_netrc", ".s3cfg", "rclone.conf", "x.ovpn"]
    refused += ["a-credentials.csv", "secret.toml", "secrets.ini", "serviceaccount.json", "client_secret_1.json"]
    refused += ["kubeconfig-prod", "kaggle.json", "wandb.key", "pgpass.conf", "a.tfstate", "dockerconfigjson"]
    assert all(secret_files.problem(tmp_path, Path(name), within=False) for name in refused)
    write(tmp_path / "work", "a.py", *(f"{where}{name}" for name in refused))
    shutil.copy(ROOT / ".rayignore", tmp_path / "work")
    assert uploaded(tmp_path / "work", tmp_path / "it.zip") == {"a.py"}


def test_what_ray_uploads_of_this_project_is_what_a_job_needs(tmp_path: Path) -> None:
    ours = uploaded(ROOT, tmp_path / "ours.zip")
    assert {"jobs/sweep.py", "raytune_lora/tuning/secrets.py", "raytune_lora/cluster/secret_files.py"} <= ours
    assert {"conf/config.yaml", "constraints.txt"} <= ours
    assert not any(name.startswith((".", "tests/")) for name in ours)


def test_too_much_names_the_biggest(repository: Path) -> None:
    write(repository, "small.py")
    (repository / "image.raw").write_bytes(b"\0" * 3_000_000)
    with pytest.raises(UserError, match=r"would send 3\.0 MB to the cluster, more than --limit 2 MB") as caught:
        collect(repository, limit=2)
    assert "the biggest: image.raw (3.0 MB), small.py (0.0 MB); put data and models" in str(caught.value)


def test_the_package_holds_the_files_and_is_the_same_each_time(repository: Path, tmp_path: Path) -> None:
    write(repository, "a.py", "sub/run.sh")
    (repository / "sub" / "run.sh").chmod(0o755)
    package = collect(repository)
    for name in ("one.zip", "two.zip"):
        package.write(tmp_path / name)
        os.utime(repository / "a.py", (1, 1))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["a.py", "sub/run.sh"]
        assert archive.read("a.py") == b"x = 1\n"
        assert archive.getinfo("sub/run.sh").external_attr >> 16 == 0o755
    assert listing(package).endswith(f"          12  in 2 files of {repository}")


def test_this_project_can_go() -> None:
    package = collect(ROOT)
    assert {"jobs/sweep.py", "conf/config.yaml", "raytune_lora/cli.py"} <= set(names(package))
    assert package.size < 5_000_000
