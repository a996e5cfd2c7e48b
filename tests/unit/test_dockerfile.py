"""The Dockerfile: what hadolint would say, what this project asks of it, and that it installs as a laptop and CI do."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.readme import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Each instruction and its arguments, comments cut and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def stages(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each stage, with those of the stage that it is built on."""
    found: dict[str, list[Instruction]] = {"": []}
    name = ""
    for verb, rest in instructions(text):
        if verb == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        found[name].append((verb, rest))
    return found


def problems(text: str) -> Iterator[str]:
    """What is wrong with a Dockerfile."""
    yield from base_problems(text)
    for verb, rest in instructions(text):
        if verb == "RUN":
            yield from run_problems(rest)
        if verb in ("ENV", "ARG", "LABEL") and re.search(r"token|password|secret|api_key", rest, re.IGNORECASE):
            yield f"{verb}: what looks like a secret stays in the image"
        if verb == "ADD" or (verb == "COPY" and re.search(r"https?://", rest)):
            yield f"{verb}: COPY what is here"
        if verb == "WORKDIR" and not rest.startswith("/"):
            yield "WORKDIR: an absolute path"
        if verb in ("CMD", "ENTRYPOINT", "SHELL") and not rest.startswith("["):
            yield f"{verb}: as a list, so that signals arrive"
    for target in ("cpu", "cuda"):
        if target not in stages(text):
            yield f"there is no target {target}"
            continue
        whole = stages(text)[target]
        users = [rest for verb, rest in whole if verb == "USER"]
        if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
            yield f"{target}: the last USER is a number other than 0, as runAsNonRoot must be able to see"
        if ("HEALTHCHECK", "NONE") not in whole or not any(verb == "LABEL" for verb, _ in whole):
            yield f"{target}: HEALTHCHECK NONE, and labels"
        if any(verb == "COPY" and "--from" not in rest for verb, rest in whole):
            yield f"{target}: files come from the stage that installed them"


def base_problems(text: str) -> Iterator[str]:
    """Images are named by arguments with a tag that stays; stages are there before they are used."""
    known: set[str] = set()
    arguments = dict(rest.split("=", 1) for verb, rest in instructions(text) if verb == "ARG" and "=" in rest)
    for name, image in arguments.items():
        if name.endswith("_IMAGE") and not re.search(r":\d+\.\d+\.\d+-", image):
            yield f"{image}: a tag with a whole version"
    for verb, rest in instructions(text):
        if verb == "FROM":
            base, _, name = rest.partition(" AS ")
            argument = re.fullmatch(r"\$\{(\w+)\}", base)
            if not name or (base not in known and (argument is None or argument[1] not in arguments)):
                yield f"FROM {rest}: an argument or an earlier stage, and a name"
            known.add(name)
        for source in re.findall(r"--from=(\S+)", rest) if verb == "COPY" else []:
            if source not in known:
                yield f"COPY --from={source}: there is no such stage before it"


def run_problems(command: str) -> Iterator[str]:
    if "apt-get install" in command:
        for wanted in ("apt-get update", "--yes", "--no-install-recommends", "rm -rf /var/lib/apt/lists/*"):
            if wanted not in command:
                yield f"RUN: apt-get install without {wanted}"
    if re.search(r"\b(sudo|apt|ssh|vim)\s", command) or re.search(r"(curl|wget)[^|]*\|", command):
        yield "RUN: sudo, apt, or a script from the network"
    for install in re.findall(r"pip\"? install[^&]*", command):
        if "--constraint constraints.txt" not in install and "--requirement /tmp/first.txt" not in install:
            yield "RUN: pip install of what is not pinned"
        if "--mount=type=cache,target=/root/.cache/pip" not in command:
            yield "RUN: pip keeps its cache in the image"
    if "|" in command.replace("(torch|setuptools|ninja|py-cpuinfo)", ""):
        yield "RUN: a pipe hides failures"


def test_it_is_well() -> None:
    assert list(problems(DOCKERFILE)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("python:3.11.14-slim-bookworm", "python:latest"),
        ("python:3.11.14-slim-bookworm", "python:3-slim"),
        ("FROM ${PYTHON_IMAGE} AS runtime", "FROM python:3.11 AS runtime"),
        ("FROM build AS build-cpu", "FROM builder AS build-cpu"),
        ("COPY --from=toolkit", "COPY --from=cuda"),
        ("AS cuda", "AS gpu"),
        ("USER 1000:1000", "USER ray"),
        ("USER 1000:1000", "USER 0"),
        ("USER 1000:1000\n", ""),
        ("HEALTHCHECK NONE\n", ""),
        ("LABEL ", "ENV "),
        (" --no-install-recommends", ""),
        (" --yes", ""),
        ("&& rm -rf /var/lib/apt/lists/* \\\n    && groupadd", "&& groupadd"),
        ("WORKDIR /app", "WORKDIR app"),
        ('CMD ["raytune-lora", "--help"]', "CMD raytune-lora --help"),
        ("COPY . .", "ADD . ."),
        ("ENV PATH", "ENV HF_TOKEN=hf_x PATH"),
        ("COPY --from=build-cpu /app /app", "COPY . /app"),
        ("--constraint constraints.txt --no-build-isolation", "--no-build-isolation"),
        ("--mount=type=cache,target=/root/.cache/pip", ""),
        ("apt-get update \\", "curl -s https://x.sh | bash \\"),
    ],
)
def test_a_fault_is_found(old: str, new: str) -> None:
    assert old in DOCKERFILE
    assert list(problems(DOCKERFILE.replace(old, new)))


def test_its_versions_are_those_of_the_project() -> None:
    """Python, Ray in the tags of its header, and CUDA, all as the manifests' tags name them."""
    pins = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.", DOCKERFILE, re.MULTILINE)
    cuda = re.search(r"^ARG CUDA_IMAGE=\S+:(\d+)\.(\d+)\.", DOCKERFILE, re.MULTILINE)
    assert cuda is not None
    assert f"/usr/local/cuda-{cuda[1]}.{cuda[2]} /usr/local/cuda" in DOCKERFILE
    (version,) = re.findall(r'__version__ = "(.+)"', (ROOT / "raytune_lora" / "__init__.py").read_text())
    tags = {f"{version}-ray{pins['ray']}-{build}" for build in ("cpu", f"cu{cuda[1]}{cuda[2]}")}
    assert set(re.findall(r"raytune-lora:(\S+) ", DOCKERFILE)) == tags
    named = {tag for path in (ROOT / "k8s").rglob("*.yaml") for tag in re.findall(r"newTag: (\S+)", path.read_text())}
    assert named == tags


def test_it_installs_by_the_lines_that_ci_runs() -> None:
    """`make setup` in the image is CI's in a plain virtual environment, but for the folder and the extra dev."""
    for stage, extras in (
        ("build-cpu", "quickstart,search,tracking"),
        ("build-cuda", "quickstart,search,tracking,gpu"),
    ):
        whole = stages(DOCKERFILE)[stage]
        environment = " ".join(rest for verb, rest in whole if verb == "ENV")
        assert "VENV=/opt/venv " in environment
        assert re.findall(r"EXTRAS=(\S+)", environment)[-1] == extras
        assert whole[-1][1].endswith("&& make setup")
        assert ("COPY", ". .") in whole
    image = setup("VENV=/opt/venv", "EXTRAS=quickstart,search,tracking")
    assert len(image) >= 5
    assert [line.replace("/opt/venv", ".venv").replace("tracking]", "tracking,dev]") for line in image] == setup()
    assert "make" in (ROOT / ".ci" / "run").read_text()


def test_kernels_for_gpus_are_at_the_pins_of_the_extra() -> None:
    """flash-attn is built before the rest, with what is there, by a compiler that later stages have not."""
    (listed,) = re.findall(r"^gpu = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    extra = [kernel.strip(' "') for kernel in listed.split(",")]
    assert len(extra) == 2
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", kernel) for kernel in extra)
    arguments = dict(rest.split("=", 1) for verb, rest in stages(DOCKERFILE)["build-cuda"] if verb == "ARG")
    assert arguments["FLASH_ATTN"] in extra
    (command,) = [rest for verb, rest in stages(DOCKERFILE)["build-cuda"] if verb == "RUN" and "FLASH_ATTN" in rest]
    assert command.index("first.txt") < command.index("$FLASH_ATTN") < command.index("make setup")


def setup(*variables: str) -> list[str]:
    """The commands of `make setup`, not executed."""
    command = ["make", "--dry-run", "--always-make", "setup", *variables]
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


# -------------------------------------------------------------------------------------------------------- .dockerignore


def sent(path: str) -> bool:
    """Whether a file goes to the builder: of the patterns that match it or a folder above it, the last decides."""
    parts = Path(path).parts
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.lstrip("!")
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            matches = pattern in above or (pattern == "*")
        if matches:
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize(
    "path",
    ["pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "conf/config.yaml", "jobs/sweep.py"],
)
def test_what_is_installed_goes_to_the_builder(path: str) -> None:
    assert (ROOT / path).exists()
    assert sent(path)
    assert sent("raytune_lora/tuning/sweep.py")


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", "sweeps/mine/best/adapter", "my.jsonl", "k8s/base/rayjob.yaml"),
        *("conf/.env", "raytune_lora/key.pem", "id_rsa", "raytune_lora/__pycache__/cli.cpython-311.pyc"),
    ],
)
def test_nothing_else_does(path: str) -> None:
    assert not sent(path)
