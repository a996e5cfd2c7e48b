"""Object stores, against a real S3 server, through a proxy that does what networks and busy servers do."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_lora import storage
from raytune_lora.artifacts import MANIFEST, build_once, read_manifest
from raytune_lora.cache import Cache
from raytune_lora.cluster.bring import bring
from raytune_lora.config.compose import compose
from raytune_lora.config.data import FakeDataConfig, FileDataConfig
from raytune_lora.config.schema import TinyModelConfig
from raytune_lora.data.files import expand, identity
from raytune_lora.data.prepare import prepare
from raytune_lora.data.readers import read_file
from raytune_lora.data.splits import SPLITS
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError
from raytune_lora.models.sources import materialize
from raytune_lora.training.batches import Batches
from raytune_lora.training.place import CHECKPOINTS
from raytune_lora.training.plan import plan_run
from raytune_lora.tuning.preflight import check_inputs
from tests import s3

ROOT = Path(__file__).resolve().parents[2]
SHORT = storage.Patience(attempts=4, silence=10.0)  # a few seconds of pauses
ROWS = [{"instruction": "Say it.", "input": "", "output": f"word {number}"} for number in range(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole folder."""

    def build(work: Path) -> dict[str, Any]:
        (work / "part").mkdir()
        (work / "part" / "large").write_bytes(secrets.token_bytes(300_000))
        (work / "small").write_text("small")
        return {"facts": [1, "둘"]}

    build_once(tmp_path / "folder", build)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -------------------------------------------------------------------------------------------------------------- sources


def test_rows_in_a_store_are_those_of_the_same_files_here(bucket: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_bytes(lines)
    (tmp_path / "data" / "more" / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "data" / "more" / "c.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "d.parquet")
    (tmp_path / "data" / "notes.txt").write_text("not rows")
    for name, content in contents(tmp_path / "data").items():
        storage.write(f"{bucket}/data/{name}", content)
    for path in ("data", "data/a.jsonl", "data/*.parquet", "data/**/*.gz", "data/**"):
        here, there = expand(f"{tmp_path}/{path}"), expand(f"{bucket}/{path}")
        assert [file.replace(bucket, str(tmp_path)) for file in there] == here
        for file in there:
            local = [record.value for record in read_file(file.replace(bucket, str(tmp_path)))]
            assert [record.value for record in read_file(file)] == local == ROWS


def test_a_large_file_is_read_in_few_requests_and_through_faults(bucket: str, proxy: s3.Proxy) -> None:
    row = {"text": "x" * 2000}
    storage.write(f"{bucket}/large.jsonl", (json.dumps(row) + "\n").encode() * 10_000)  # 20 MB
    proxy.faults += [s3.Fault("busy", "GET", "large"), s3.Fault("cut_answer", "GET", "large")]
    assert sum(record.value == row for record in read_file(f"{bucket}/large.jsonl")) == 10_000
    assert proxy.count("GET", "large.jsonl") <= 7


def test_what_is_changed_in_a_store_is_other_data(bucket: str) -> None:
    storage.write(f"{bucket}/a.jsonl", b"{}\n")
    first = identity([f"{bucket}/a.jsonl"])
    assert identity([f"{bucket}/a.jsonl"]) == first
    storage.write(f"{bucket}/a.jsonl", b"{}\n\n")
    assert identity([f"{bucket}/a.jsonl"]) != first


# -------------------------------------------------------------------------------------------------------------- objects


def test_a_small_object_is_one_request(bucket: str, proxy: s3.Proxy) -> None:
    assert storage.read(f"{bucket}/state.json") is None
    storage.write(f"{bucket}/state.json", b"one")
    storage.write(f"{bucket}/state.json", b"two")
    assert storage.read(f"{bucket}/state.json") == b"two"
    assert [line.split()[0] for line in proxy.requests].count("PUT") == 2
    assert storage.sizes(bucket) == {"state.json": 3}
    storage.delete(f"{bucket}/state.json")
    assert storage.sizes(bucket) == storage.sizes(f"{bucket}/nothing") == {}


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("{bucket}/cache", []),
        ("s3://no-such-bucket/x", ["cannot be written (NO_SUCH_BUCKET", "make the bucket first"]),
        ("s3://key:secret@bucket/x", ["holds more than a bucket and a path", "AWS_ACCESS_KEY_ID"]),
        ("nonsense://bucket/x", ["nonsense://bucket/x: Protocol not known"]),
    ],
)
def test_a_cache_is_tried_before_anything_starts(uri: str, expected: list[str], bucket: str, tmp_path: Path) -> None:
    cfg = compose(["model=tiny", "data=fake", f"cluster.node_cache={tmp_path}", "cache=/nowhere"])
    cfg.cache = uri.format(bucket=bucket)
    try:
        check_inputs(cfg)
        found = ""
    except UserError as error:
        (found,) = error.problems
    assert [part for part in expected if part not in found] == []
    assert bool(found) == bool(expected)
    assert "secret" not in found
    assert found.startswith("cache: " * bool(expected))
    assert storage.sizes(bucket) == {}


def test_no_right_to_write_is_told(bucket: str, proxy: s3.Proxy) -> None:
    proxy.faults.append(s3.Fault("denied", "PUT", times=100))
    (found,) = storage.problems(f"{bucket}/cache")
    assert found.startswith(f"{bucket}/cache cannot be written (ACCESS_DENIED")
    assert "check the right to read and write there" in found
    assert proxy.count("PUT") == 1, "it is not tried again: time does not heal it"


def test_a_server_that_is_gone_or_silent_is_noticed(bucket: str, proxy: s3.Proxy, monkeypatch: Any) -> None:
    storage.write(f"{bucket}/x", b"x")
    proxy.faults.append(s3.Fault("silent", "GET", times=100, seconds=30))
    began = time.monotonic()
    with pytest.raises(storage.StorageError, match=r"/x cannot be read \(NETWORK_CONNECTION.*it was tried 2 times"):
        storage.read(f"{bucket}/x", storage.Patience(attempts=2, silence=1.0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(storage.StorageError, match=r"Could not connect to server\); it was tried 3 times; see that"):
        storage.write(f"{bucket}/x", b"x", storage.QUICK)
    assert time.monotonic() - began < 15


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_goes_there_and_comes_back(bucket: str, folder: Path, proxy: s3.Proxy, tmp_path: Path) -> None:
    uri = f"{bucket}/deep/er/folder"
    assert storage.whole(uri) is None
    storage.upload(folder, uri)
    assert proxy.requests[-1].endswith(f"{MANIFEST}")
    sent = proxy.count("PUT")
    storage.upload(folder, uri)
    assert proxy.count("PUT") == sent == 3
    assert storage.download(uri, tmp_path / "back") == read_manifest(folder)
    assert contents(tmp_path / "back") == contents(folder)
    storage.delete(uri)
    assert storage.sizes(bucket) == {}
    with pytest.raises(storage.NotWhole, match="is not there, or not whole"):
        storage.download(uri, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["busy", "cut_request"])
def test_a_request_that_fails_is_made_again(
    kind: str, bucket: str, folder: Path, proxy: s3.Proxy, tmp_path: Path
) -> None:
    proxy.faults += [s3.Fault(kind, "PUT", name) for name in ("large", MANIFEST)]
    storage.upload(folder, f"{bucket}/it", SHORT)
    assert proxy.count("PUT", "large") == proxy.count("PUT", MANIFEST) == 2
    proxy.faults += [s3.Fault("cut_answer" if kind == "cut_request" else kind, "GET", "large", times=2)]
    storage.download(f"{bucket}/it", tmp_path / "back", SHORT)
    assert contents(tmp_path / "back") == contents(folder)


@pytest.mark.parametrize("victim", ["large", "small", MANIFEST])
def test_what_was_sent_in_part_is_never_whole(
    victim: str, bucket: str, folder: Path, proxy: s3.Proxy, tmp_path: Path
) -> None:
    fault = s3.Fault("cut_request", "PUT", victim, times=100)
    proxy.faults.append(fault)
    uri, hasty = f"{bucket}/it", storage.Patience(attempts=1)
    with pytest.raises(storage.StorageError, match=r"cannot be written .*it was tried 1 times"):
        storage.upload(folder, uri, hasty)
    assert storage.whole(uri) is None
    with pytest.raises(storage.NotWhole):
        storage.download(uri, tmp_path / "back")
    fault.times = 0
    storage.upload(folder, uri, hasty)
    storage.download(uri, tmp_path / "back", hasty)
    assert contents(tmp_path / "back") == contents(folder)


def test_what_was_brought_in_part_is_never_whole(bucket: str, folder: Path, proxy: s3.Proxy, tmp_path: Path) -> None:
    storage.upload(folder, f"{bucket}/it")
    fault = s3.Fault("cut_answer", "GET", "large", times=100)
    proxy.faults.append(fault)
    with pytest.raises(storage.StorageError, match="cannot be read"):
        storage.download(f"{bucket}/it", tmp_path / "back", storage.Patience(attempts=1))
    assert not (tmp_path / "back").exists()
    fault.times = 0
    storage.download(f"{bucket}/it", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_two_send_the_same_folder_at_once(bucket: str, folder: Path, tmp_path: Path) -> None:
    meet = threading.Barrier(2)

    def send(_: int) -> None:
        meet.wait(20)
        storage.upload(folder, f"{bucket}/it")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send, range(2)))
    storage.download(f"{bucket}/it", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_another_content_replaces_a_folder(bucket: str, folder: Path, tmp_path: Path) -> None:
    storage.upload(folder, f"{bucket}/it")
    (folder / "small").write_text("other")  # of the same size
    storage.upload(folder, f"{bucket}/it")
    storage.download(f"{bucket}/it", tmp_path / "back")
    assert (tmp_path / "back" / "small").read_text() == "other"


def test_a_key_that_leads_up_is_not_followed(bucket: str, proxy: s3.Proxy, tmp_path: Path) -> None:
    """The server keeps keys as they are sent, and the client lists them so."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=20)
    for key in ("sweeps/mine/report.html", "sweeps/mine/best/../../../jobs/sweep.py", "jobs/sweep.py"):
        connection.request("PUT", f"/{bucket.removeprefix('s3://')}/{key}", b"hostile")
        assert connection.getresponse().read() == b""
    connection.close()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "sweep.py").write_text("mine")
    with pytest.raises(UserError, match=r"'best/\.\./\.\./\.\./jobs/sweep\.py' is no name of a file in a folder"):
        bring(None, "mine", {"output": f"{bucket}/sweeps/mine"}, tmp_path / "sweeps" / "mine")  # type: ignore[arg-type]
    assert contents(tmp_path) == {"jobs/sweep.py": b"mine"}


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def prepared(tokenizer: Any) -> Callable[[Cache], TokenStore]:
    return lambda cache: prepare(FakeDataConfig(rows=120), lambda: tokenizer, "bytes", cache)


def train_files(proxy: s3.Proxy) -> tuple[int, int]:
    """How often the training rows were sent and brought."""
    return proxy.count("PUT", "train.arrow"), proxy.count("GET", "train.arrow")


def test_a_node_brings_the_store_once(bucket: str, proxy: s3.Proxy, prepared: Any, tmp_path: Path) -> None:
    first, second = (Cache(tmp_path / name, f"{bucket}/cache", SHORT) for name in ("first", "second"))
    store = prepared(first)
    assert train_files(proxy) == (1, 0)
    with ThreadPoolExecutor(8) as workers:
        stores = list(workers.map(lambda _: store.here(second), range(8)))
    assert train_files(proxy) == (1, 1)
    assert {str(one.folder) for one in stores} == {str(tmp_path / "second" / "tokens" / store.folder.name)}
    assert contents(stores[0].folder) == contents(store.folder)
    assert batch(stores[0]) == batch(store)
    assert prepared(second) == stores[0], "the next job on that node finds it"
    assert prepared(Cache(tmp_path / "third", f"{bucket}/cache")).rows == store.rows, "and one elsewhere brings it"
    assert train_files(proxy) == (1, 2)


def batch(store: TokenStore) -> list[list[int]]:
    """The input ids of the first training batch."""
    cfg = compose(["model=tiny", "data=fake", "training.max_steps=2"])
    plan = plan_run(cfg, store.rows["train"], store.lengths("train"))
    ids: list[list[int]] = Batches(store.split("train"), plan, 0, 0).step(0).micro[0].whole[0].tolist()
    return ids


def test_a_store_damaged_on_a_node_is_brought_anew(bucket: str, proxy: s3.Proxy, prepared: Any, tmp_path: Path) -> None:
    store = prepared(Cache(tmp_path / "first", f"{bucket}/cache"))
    second = Cache(tmp_path / "second", f"{bucket}/cache")
    file = store.here(second).folder / "train.arrow"
    os.truncate(file, 100)
    assert contents(store.here(second).folder) == contents(store.folder)
    assert train_files(proxy) == (1, 2)


@pytest.mark.parametrize("damage", ["content", "cut", "gone", "manifest"])
def test_an_artifact_damaged_in_the_store_is_made_anew(
    damage: str, bucket: str, proxy: s3.Proxy, prepared: Any, tmp_path: Path
) -> None:
    uri = f"{bucket}/cache"
    store = prepared(Cache(tmp_path / "first", uri))
    there = f"{uri}/tokens/{store.folder.name}"
    content = storage.read(f"{there}/train.arrow") or b""
    if damage == "manifest":
        storage.write(f"{there}/{MANIFEST}", b"{")
    elif damage == "gone":
        storage.delete(f"{there}/train.arrow")
    else:
        storage.write(f"{there}/train.arrow", content[:100] if damage == "cut" else content[::-1])
    with pytest.raises(storage.NotWhole, match="begin the job anew"):
        store.here(Cache(tmp_path / "second", uri))
    assert prepared(Cache(tmp_path / "third", uri)).rows == store.rows
    assert storage.read(f"{there}/train.arrow") == content
    assert contents(store.here(Cache(tmp_path / "fourth", uri)).folder) == contents(store.folder)


def test_a_store_cleared_of_all_is_filled_again(bucket: str, prepared: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "first", f"{bucket}/cache")
    store = prepared(cache)
    storage.delete(f"{bucket}/cache")
    assert prepared(cache) == store
    assert store.here(Cache(tmp_path / "second", f"{bucket}/cache")).split("test")[0] == store.split("test")[0]


def test_a_model_is_made_once_for_all_nodes(bucket: str, proxy: s3.Proxy, tmp_path: Path) -> None:
    first, second = (Cache(tmp_path / name, f"{bucket}/cache") for name in ("first", "second"))
    folder = materialize(TinyModelConfig(), first)
    first.publish(folder)
    other = materialize(TinyModelConfig(), second)
    assert other.is_relative_to(second.folder)
    assert proxy.count("GET", "model.safetensors") == 1
    assert contents(other) == contents(folder)
    first.publish(Path("/somewhere/else"))  # a user's own model folder stays where it is


def test_rows_in_a_store_make_the_token_store_of_the_same_rows_here(
    bucket: str, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{**row, "input": secrets.token_hex(8)} for _ in range(5) for row in ROWS]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    storage.write(f"{bucket}/rows.jsonl", lines)
    here = FileDataConfig(path=str(tmp_path / "rows.jsonl"), processes=2)
    there = replace(here, path=f"{bucket}/rows.jsonl")
    local, remote = (prepare(cfg, lambda: tokenizer, "bytes", Cache(tmp_path / "cache")) for cfg in (here, there))
    assert local.folder != remote.folder
    assert [list(local.split(name)) for name in SPLITS] == [list(remote.split(name)) for name in SPLITS]


# ----------------------------------------------------------------------------------------------------------------- jobs


@pytest.fixture
def cluster(proxy: s3.Proxy, tmp_path: Path) -> Iterator[str]:
    """The address of a Ray node whose home folder is not that of the job."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", "--object-store-memory=134217728"]
    command += ["--include-dashboard=false", f"--dashboard-agent-listen-port={free_port()}"]
    with (tmp_path / "head.log").open("w") as log:
        environment = os.environ | at_home(tmp_path / "node")
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    yield f"127.0.0.1:{port}"
    os.killpg(head.pid, signal.SIGKILL)
    head.wait(60)


def at_home(folder: Path) -> dict[str, str]:
    folder.mkdir()
    return {"HOME": str(folder), "RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_on_another_node_trains_from_the_store(
    bucket: str, proxy: s3.Proxy, cluster: str, tmp_path: Path
) -> None:
    storage.write(f"{bucket}/rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "model=tiny", f"data.path={bucket}/rows.jsonl"]
    command += [f"cache={bucket}/cache", 'cluster.node_cache="~/cache"', f"cluster.address={cluster}", "deepspeed=off"]
    command += ["training.global_batch=8", "training.max_steps=4", "evaluation.loss_rows=8", "workers=2"]
    command += ["evaluation.generate_rows=2", "evaluation.max_new_tokens=4", f"output={bucket}/run"]
    done = subprocess.run(
        command, env=os.environ | at_home(tmp_path / "job"), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(storage.read(f"{bucket}/run/results.json") or b"")
    assert [trial["status"] for trial in results["trials"]] == ["completed"]
    store = f"tokens/{results['data']['fingerprint']}"
    assert contents(tmp_path / "node" / "cache" / store) == contents(tmp_path / "job" / "cache" / store)
    (model,) = (path.name for path in (tmp_path / "job" / "cache" / "models").iterdir() if path.is_dir())
    assert (tmp_path / "node" / "cache" / "models" / model / "model.safetensors").is_file()
    assert train_files(proxy) == (1, 1), "two workers of a node bring it once"
    assert proxy.count("GET", "/model.safetensors") == 1
    there = storage.sizes(f"{bucket}/run")
    assert {"best/adapter/adapter_model.safetensors", "report.html", "trials/0000/logs/worker-1.log"} <= set(there)
    left = list((tmp_path / "node" / "cache" / "outputs").glob(f"*/trials/*/{CHECKPOINTS}"))
    assert [path.name for path in left] == ["checkpoint-00000004"], "the one that was measured; all are in the store"
