"""Secrets have no place in a config: it is written to disk, shown in reports and sent to trackers.

They come from the environment of the process that needs them; on Kubernetes, from a Secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from raytune_lora.config.plain import to_plain
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.pii_secrets import assigned_secrets, query_secrets, secrets

PASSWORD = "RAYTUNE_LORA_STORAGE_PASSWORD"  # of the study's database
_REMEDIES = {
    "search.storage": f"write user@host, and set {PASSWORD} in the environment (PostgreSQL also reads ~/.pgpass)",
    "tracking.mlflow_uri": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
}
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIALS?)$|^AWS_ACCESS_KEY_ID$")
_SHORT, _LONG = 6, 12  # characters of a value that is a text, and of one that is in it: a word may be anywhere
_REMEDY = "leave it out, and set the variable that its library reads in the environment (HF_TOKEN, AWS_…)"


def problems(cfg: RunConfig) -> list[str]:
    """The keys that hold what looks like a password, a token or a key; what they hold is not shown."""
    found = []
    for key, value in _texts(to_plain(cfg)):
        if variable := _of_environment(value):
            found.append(
                f"{key} holds what the variable {variable} holds here, and would be written to config.yaml for all to "
                f"read: {_REMEDIES.get(key, _REMEDY)}"
            )
        elif looks_secret(value) or _has_password(key, value):
            found.append(
                f"{key} holds a secret, which would be written to config.yaml for all to read: "
                f"{_REMEDIES.get(key, _REMEDY)}"
            )
    return found


def looks_secret(text: str) -> bool:
    """Whether a text holds a token, a key, or a password in an address or beside its name."""
    return any(True for find in (secrets, assigned_secrets, query_secrets) for _ in find(text))


def _of_environment(text: str) -> str | None:
    """The variable whose value a text is, or holds, where its name says that it is secret."""
    known = {name: value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    alike = (n for n, v in known.items() if (len(v) >= _SHORT and v == text) or (len(v) >= _LONG and v in text))
    return next(alike, None)


def with_password(url: str) -> str:
    """The URL of a database, with the password that the environment holds for it."""
    parsed = make_url(url)
    given = os.environ.get(PASSWORD)
    if given and parsed.username and not parsed.password:
        parsed = parsed.set(password=given)
    return parsed.render_as_string(hide_password=False)


def _has_password(key: str, value: str) -> bool:
    """Whether the URL of the study's database holds a password, be it a plain word."""
    if key != "search.storage" or value.startswith("journal:"):
        return False
    try:
        url = make_url(value)
    except ArgumentError:
        return False
    return bool(url.password) or any("password" in name.lower() for name in url.query)


def _texts(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, prefix)
    elif isinstance(value, str):
        yield prefix, value
