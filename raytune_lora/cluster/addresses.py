"""Which cluster is meant: an address, or the name of one in the user's own file of clusters.

The file is ``clusters.yaml`` in ``$XDG_CONFIG_HOME/raytune-lora`` (``~/.config/raytune-lora``), a line each:
``lab: http://127.0.0.1:8265``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from raytune_lora.errors import UserError

DASHBOARD = "http://127.0.0.1:8265"
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # where `ray job submit` looks, too
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def dashboard(asked: str | None) -> str:
    """The URL of a cluster's dashboard.

    Args:
        asked: an address, or a name; None looks where ``ray job`` does, and then on this machine.

    Raises:
        UserError: no cluster is known by that name, or it is no address of a dashboard.
    """
    if asked is None:
        named = next((os.environ[n] for n in VARIABLES if "http" in os.environ.get(n, "")), DASHBOARD)
    elif _NAME.fullmatch(asked) and asked != "localhost":
        named = _by_name(asked)
    else:
        named = asked
    url = named if "://" in named else f"http://{named}"
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"--address {named}: a sweep is submitted through the dashboard; name that (http://<head>:8265)"
        )
    return url


def token_refused(named: str, *, sent: bool) -> str:
    """That a cluster wants a token.

    Args:
        named: its address, as the user named it.
        sent: whether one was sent, which is not shown.
    """
    what = (
        "refuses the token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, which is not its own"
        if sent
        else "wants a token, and none was sent"
    )
    return (
        f"{named}: the cluster {what}; set RAY_AUTH_MODE=token, and, where ~/.ray/auth_token does not hold it, "
        "RAY_AUTH_TOKEN_PATH=<file> or RAY_AUTH_TOKEN (KubeRay: kubectl get secret <cluster> -o "
        "jsonpath='{.data.auth_token}' | base64 -d)"
    )


def _by_name(name: str) -> str:
    file = _file()
    known = _read(file)
    if name not in known:
        there = f"there are: {', '.join(known)}" if known else "there is none"
        raise UserError(
            f"--address {name}: no cluster of that name is in {file} ({there}); add the line `{name}: "
            "http://<head>:8265`, or name its dashboard's address"
        )
    return known[name]


def _file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "raytune-lora" / "clusters.yaml"


def _read(file: Path) -> dict[str, str]:
    try:
        found = yaml.safe_load(file.read_text()) if file.is_file() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); write a line each: name: URL"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise UserError(f"{file}: it has a line for each cluster, name: URL of its dashboard")
    return dict(found)
