"""Secrets: tokens and keys of a shape of their own, passwords in addresses, and what a secret's name is given."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from raytune_lora.data.pii_context import Match


def _token(prefix: str, rest: str) -> str:
    """The pattern of a token that starts a word. The look behind comes after the prefix, which the search skips to."""
    return rf"{prefix}(?<![A-Za-z0-9_-]{prefix}){rest}"


# of services that give their tokens a prefix of their own, by what follows it
_PREFIXED = {
    "xapp-": "[0-9]-[A-Za-z0-9-]{20,255}",  # Slack
    "GOCSPX-": "[A-Za-z0-9_-]{28}",  # Google
    "ya29[.]": "[A-Za-z0-9_-]{30,2048}",
    "gsk_": "[A-Za-z0-9]{40,60}",  # Groq
    "r8_": "[A-Za-z0-9]{37}",  # Replicate
    "xai-": "[A-Za-z0-9]{60,100}",
    "nvapi-": "[A-Za-z0-9_-]{60,80}",
    "pplx-": "[A-Za-z0-9]{40,60}",
    "lsv2_": "(?:pt|sk)_[a-f0-9]{32}_[a-f0-9]{10}",  # LangSmith
    "dapi": "[a-f0-9]{32}",  # Databricks
    "wandb_v1_": "[A-Za-z0-9_]{60,100}",
    "dckr_": "(?:pat|oat)_[A-Za-z0-9_-]{24,40}",
    "hvs[.]": "[A-Za-z0-9_-]{24,200}",  # HashiCorp Vault
    "glsa_": "[A-Za-z0-9]{32}_[a-f0-9]{8}",  # Grafana
    "ATATT3": "[A-Za-z0-9_=-]{100,255}",  # Atlassian
    "AGE-SECRET-KEY-1": "[A-Z0-9]{58}",
}
_GITLAB = tuple(f"gl{kind}-" for kind in ("dt", "ft", "soat", "rt", "cbt", "imt", "ptt", "agent", "oas"))  # and glpat-
_TOKENS = re.compile(
    "|".join(
        [
            *(_token(prefix, "[A-Z0-9]{16}(?![A-Za-z0-9])") for prefix in ("AKIA", "ASIA", "AROA", "AIDA")),
            _token("gh[pousr]_", "[A-Za-z0-9]{36,255}"),
            _token("github_pat_", "[A-Za-z0-9_]{22,255}"),
            _token("glpat-", "[A-Za-z0-9_-]{20,64}"),
            _token("xox[abeoprs]-", "[A-Za-z0-9-]{10,255}"),
            _token("hf_", "[A-Za-z0-9]{30,64}(?![A-Za-z0-9_])"),
            _token("api_org_", "[A-Za-z0-9]{30,64}(?![A-Za-z0-9_])"),
            _token("npm_", "[A-Za-z0-9]{36}(?![A-Za-z0-9_])"),
            _token("pypi-", "AgE[A-Za-z0-9_-]{70,255}"),
            *(_token(prefix, "[A-Za-z0-9_-]{20,255}") for prefix in _GITLAB),
            _token("SG[.]", r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"),
            _token("sq0csp-", "[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"),
            _token("dop_v1_", "[a-f0-9]{64}(?![A-Za-z0-9_])"),
            _token("AIza", "[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
            *(_token(f"{who}k_{where}_", "[A-Za-z0-9]{16,255}") for who in "sr" for where in ("live", "test")),
            *(_token(prefix, f"{rest}(?![A-Za-z0-9])") for prefix, rest in _PREFIXED.items()),
            _token("sk-", "(?P<sk>[A-Za-z0-9_-]{20,255})"),
            _token("eyJ", r"(?P<jwt>[A-Za-z0-9_-]{6,4096})\.[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}"),
        ]
    )
)
_SIGNS = (
    "_",
    "sk-",
    "eyJ",
    "AKIA",
    "AIza",
    "xox",
    "ASIA",
    "glpat-",
    "AROA",
    "AIDA",
    "SG.",
    "sq0csp-",
    "pypi-",
    *_GITLAB,
    *(prefix.replace("[.]", ".") for prefix in _PREFIXED if "_" not in prefix),
)
_PEM = re.compile(
    r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----|---- BEGIN SSH2 [A-Z ]{0,20}KEY ----"
)
_PEM_END = re.compile(r"----(?:-END [A-Z0-9 ]{0,40}-| END [A-Z0-9 ]{0,40})----")
_PEM_DATA = re.compile(r"[A-Za-z0-9+/]{16}")
_PEM_BODY = re.compile(r"(?:\s{1,3}[A-Za-z-]{1,30}: [^\n]{0,200}){0,9}[A-Za-z0-9+/=\s\\]*")  # headers, and then data
_HOOKS = {  # addresses of which whoever knows them may post
    "hooks.slack.com/": r"hooks\.slack\.com/(?:services|workflows|triggers)/([A-Z0-9]+/[A-Z0-9]+/[A-Za-z0-9/]+)",
    "/api/webhooks/": r"discord(?:app)?\.com/api/webhooks/([0-9]{15,22}/[A-Za-z0-9_-]{50,90})",
    ".webhook.office.com/": r"\.webhook\.office\.com/webhookb2/([^\s\"'`<>]{40,300})",
    "api.telegram.org/bot": r"api\.telegram\.org/bot([0-9]{8,10}:[A-Za-z0-9_-]{35})",
}
_SHAPES = {  # by what must be in a text for it to be looked at
    "AccountKey=": re.compile(r"AccountKey=([A-Za-z0-9+/]{86}==)"),  # of Azure's storage
    "Private-Lines:": re.compile(r"Private-Lines: [0-9]{1,3}\s+([A-Za-z0-9+/=\s]{32,8192})"),  # PuTTY
    '"kty"': re.compile(r'"d"\s{0,9}:\s{0,9}"([A-Za-z0-9_-]{40,1024})"'),  # a JSON web key (RFC 7517)
    '"auths"': re.compile(r'"auth"\s{0,9}:\s{0,9}"([A-Za-z0-9+/]{16,1024}={0,2})"'),  # Docker: user and password
    ":AA": re.compile(r"(?<![A-Za-z0-9_:-])([0-9]{8,10}:AA[A-Za-z0-9_-]{33})(?![A-Za-z0-9_-])"),  # Telegram
    "wandb login ": re.compile(r"wandb login (?:--\S{1,40} ){0,4}([a-f0-9]{40})(?![A-Za-z0-9])"),
    "machine ": re.compile(r"machine\s{1,9}\S{1,100}\s{1,9}login\s{1,9}\S{1,100}\s{1,9}password\s{1,9}(\S{8,200})"),
    **{sign: re.compile(pattern) for sign, pattern in _HOOKS.items()},
}
_AUTHORIZATION = re.compile(
    r"Authorization[\"']?\s?[:=,]\s?[\"']?(?:Bearer|Basic|Token|token)\s([A-Za-z0-9+/=_.~-]{16,2048})"
)
_ENCODED = re.compile(r"(?<![A-Za-z0-9+/])LS0tLS1CRUdJTi[A-Za-z0-9+/]{36,16384}={0,2}")  # base64 of "-----BEGIN "
_QUERY = re.compile(
    r"[?&;](?:sig|signature|x-amz-(?:signature|security-token)|x-goog-signature|access[_-]?token|auth[_-]?token|token"
    r"|api[_-]?key|sas(?:[_-]?token)?|password|secret)=([^\s&;#\"'`<>]{6,2000})",
    re.I,
)
_LOGIN = re.compile(r"://(?:[^\s:/@]{0,64}:([^\s:/@]{3,100})|([A-Za-z0-9_-]{20,100}):?)@")
_HEX = re.compile("[0-9a-f]+")  # a name, or a public key, in an address
_NO_PASSWORD = re.compile(r"pass(word|wd)?|pwd|secret|token|x+|\*+|[<\[{$].*|%[s(].*|.*\$\{.*|.*>", re.I)
_ASSIGNED = re.compile(r"[=:]>?[ \t]{0,3}[\"'`]?([A-Za-z0-9+/=_.~!@#$%^&*\-]{8,200})")
_SECRET_NAME = re.compile(
    r"(?:pass(?:word|wd|phrase)|pwd|secret|token|(?:api|access|private|auth|account|encryption|signing)[_ -]?key"
    r"|credentials?|비밀번호|암호|패스워드)(?:[_-]?(?:key|value|id))?[\"'`]?[ \t]{0,3}$",
    re.I,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")  # of something in a program
_PLACEHOLDER = re.compile(
    r"your|example|change|dummy|placeholder|sample|insert|xxx|\*\*\*|\.\.\.|123456|://|^\$[A-Z_{]", re.I
)


def secrets(text: str) -> Iterator[Match]:
    """What is a secret by its own shape."""
    if "-----BEGIN " in text or "---- BEGIN " in text:
        yield from _private_keys(text)
    if any(sign in text for sign in _SIGNS):
        for shape in _TOKENS.finditer(text):
            if shape["jwt"] and not _is_header("eyJ" + shape["jwt"]):
                continue
            if shape["sk"] and not _is_base62(shape["sk"]):
                continue
            yield Match("secret", *shape.span())
    if "@" in text and "://" in text:
        for shape in _LOGIN.finditer(text):
            if shape[1] and not _NO_PASSWORD.fullmatch(shape[1]):
                yield Match("secret", *shape.span(1))
            elif shape[2] and _is_random(shape[2]) and not _HEX.fullmatch(shape[2]):
                yield Match("secret", *shape.span(2))
    for sign, pattern in _SHAPES.items():
        if sign in text:
            yield from (Match("secret", *shape.span(1)) for shape in pattern.finditer(text))
    if "Authorization" in text:
        found = (shape.span(1) for shape in _AUTHORIZATION.finditer(text) if _is_random(shape[1]))
        yield from (Match("secret", *span) for span in found)
    if "LS0tLS1CRUdJTi" in text:
        found = (shape.span() for shape in _ENCODED.finditer(text) if b"PRIVATE KEY" in base64.b64decode(shape[0][:80]))
        yield from (Match("secret", *span) for span in found)
    for match in query_secrets(text):
        value = text[match.start : match.end]
        if _is_signature(value) or _is_random(value):
            yield match


def query_secrets(text: str) -> Iterator[Match]:
    """What the query of an address gives to a name such as ``sig`` or ``access_token``, whatever it is."""
    if "=" in text and ("?" in text or "&" in text):
        yield from (Match("secret", *shape.span(1)) for shape in _QUERY.finditer(text))


def _is_signature(value: str) -> bool:
    """Long, with digits and letters; nothing that stands for a value to come."""
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return len(value) >= 16 and mixed and not _PLACEHOLDER.search(value)


def _private_keys(text: str) -> Iterator[Match]:
    """From the first line to the last, or to the end of the body where the last line was cut off."""
    at, closed = 0, True
    while begin := _PEM.search(text, at):
        end = _PEM_END.search(text, begin.end()) if closed else None
        closed = end is not None  # where one has no end, the others behind it have none either
        end = end or _PEM_BODY.match(text, begin.end())
        at = end.end() if end else begin.end()
        if _PEM_DATA.search(text, begin.end(), at):
            yield Match("secret", begin.start(), at)


def _is_header(part: str) -> bool:
    """Whether it is the first part of a JSON web token (RFC 7519)."""
    try:
        header = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, RecursionError):
        return False
    return isinstance(header, dict) and "alg" in header


def _is_base62(token: str) -> bool:
    """Unlike the words of an address with hyphens: digits in a long piece, or in both cases."""
    long = max(re.split("[_-]", token), key=len)
    digit = any(c.isdigit() for c in token)
    return digit and (len(long) >= 20 or (token.lower() != token and token.upper() != token))


def assigned_secrets(text: str) -> Iterator[Match]:
    """What is given to a name such as ``password`` or ``api_key``, if it looks random."""
    for shape in _ASSIGNED.finditer(text):
        if not _SECRET_NAME.search(text, max(0, shape.start() - 40), shape.start()):
            continue
        value = shape[1].rstrip(".")
        if text[shape.end() : shape.end() + 1] not in ("(", "[", "{") and _is_random(value):
            yield Match("secret", shape.start(1), shape.start(1) + len(value))


def _is_random(value: str) -> bool:
    """Digits and letters in both cases or with signs, or many of them; nothing that stands for a value to come."""
    digits = sum(c.isdigit() for c in value)
    cases = any(c.islower() for c in value) + any(c.isupper() for c in value)
    if not digits or not cases or _PLACEHOLDER.search(value) or _NAME.fullmatch(value):
        return False
    if -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values()) < 2.5:  # bits a character
        return False
    signs = any(c in "!@#$%^&*+/=~" for c in value)
    return cases + signs >= 2 or (len(value) >= 16 and digits >= 3 and value.isalnum())
