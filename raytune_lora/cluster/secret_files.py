"""Files that look like secrets, by name or by what is in them: none goes to a cluster, to lie on every node."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from raytune_lora.data.pii_secrets import assigned_secrets, secrets

_NAMES = re.compile(
    r"\.env(rc|\.(?!example$|sample$|template$)[^/]*)?|[^/]*(?<!example)(?<!sample)(?<!template)\.env"
    r"|[^/]*\.(pem|key|p12|pfx|kdbx?|keytab|jks|keystore|ppk|ovpn|tfvars|tfstate)|id_(rsa|dsa|ecdsa|ed25519)(_sk)?"
    r"|[._](netrc|npmrc|pypirc|pgpass|git-credentials|htpasswd|dockercfg|boto|s3cfg|my\.cnf|databrickscfg|vault-token)"
    r"|dockerconfigjson|pgpass\.conf|rclone\.conf|kaggle\.json|wandb\.key"
    r"|([a-z]+[-_])*credentials(\.(json|ya?ml|toml|ini|txt|csv))?|secrets?\.(json|ya?ml|toml|ini|txt)"
    r"|([a-z0-9]+[-_])*token(\.txt)?|stored_tokens|wallet\.dat|([a-z0-9]+[-_])*(deploy|private|ssh)[-_]key"
    r"|kubeconfig([-_.][^/]*)?|(service[-_]?account|client_secret)[^/]*\.json",
    re.IGNORECASE,
)
_KEPT = re.compile(r"(\.(bak|backup|old|orig|save|copy|tmp|swp|[0-9]+)|~)+$", re.IGNORECASE)  # an earlier version
_BLOCK, _OVERLAP = 2**20, 2**13  # bytes looked into at once, and again with those that follow: a key is no longer
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_WIDE = 0.3  # share of zeros, at every other byte, that tells UTF-16 without its mark


def problem(root: Path, file: Path, *, within: bool = True) -> str | None:
    """Why a file must not go along; what it holds is not shown.

    Args:
        root: the folder that it lies in.
        file: from there on.
        within: whether to look at what is in it.
    """
    remedy = "it would lie readable on every node; move it out of the folder, or name it in .gitignore or .rayignore"
    if _NAMES.fullmatch(_KEPT.sub("", file.name)):
        return f"{file} looks like a file of secrets: {remedy}"
    if within and any(_holds_one(text) for text in _texts(root / file)):
        return f"{file} holds what looks like a token, key or password: {remedy}"
    return None


def _holds_one(text: str) -> bool:
    return any(True for find in (secrets, assigned_secrets) for _ in find(text))


def _texts(path: Path) -> Iterator[str]:
    """What is in a file, as text, piece by piece; the pieces overlap."""
    with path.open("rb") as file:
        piece = file.read(_BLOCK)
        encoding = _encoding(piece)
        while piece:
            yield piece.decode(encoding, errors="replace")
            more = file.read(_BLOCK)
            piece = piece[-_OVERLAP:] + more if more else b""


def _encoding(start: bytes) -> str:
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    some = start[: 2**12]
    even, odd = (some[at::2].count(0) / max(1, len(some[at::2])) for at in (0, 1))
    if max(even, odd) > _WIDE and min(even, odd) < _WIDE / 3:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"
