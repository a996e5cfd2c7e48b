"""Addresses: of hosts (IPv4 and IPv6) and of mail."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from raytune_lora.data.pii_context import Match, context, words_before

# --------------------------------------------------------------------------------------------------- addresses of hosts

_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![0-9A-Za-z_]|\.[0-9]|-[0-9A-Za-z])")
_IPV6 = re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{0,40}")
_FIRST_GROUP = re.compile(r"(?<![0-9A-Za-z_:.])[0-9A-Fa-f]{1,4}$")


def ip_addresses(text: str) -> Iterator[Match]:
    """Addresses of hosts, public or private: not of the machine itself, of groups or of nobody."""
    if text.count(".") >= 3:
        for shape in _IPV4.finditer(text):
            if _is_ipv4(text, *shape.span()):
                yield Match("ip_address", *shape.span())
    if text.count(":") >= 2:
        for shape in _IPV6.finditer(text):
            first = _FIRST_GROUP.search(text, max(0, shape.start() - 5), shape.start())
            if not first:
                continue
            shown = text[first.start() : shape.end()].rstrip(".")
            if shown.endswith(":") and not shown.endswith("::"):
                shown = shown[:-1]
            end = first.start() + len(shown)
            if _is_ipv6(shown) and not (text[end : end + 1].isascii() and text[end : end + 1].isalnum()):
                yield Match("ip_address", first.start(), end)


_VERSION_WORDS = (
    "version ver v release build firmware driver section chapter clause revision rev kernel oid objectidentifier "
    "버전 版本"
)
_VERSIONED = frozenset(_VERSION_WORDS.split())
_PINNED = re.compile(r"[A-Za-z][/-]$|[=<>~^!]=[ ]?$|[~^]$")


def _is_ipv4(text: str, start: int, end: int) -> bool:
    before = text[max(0, start - 1) : start]
    inside = before.isascii() and (before.isalnum() or before in ("_", ".", "+"))
    if inside or _PINNED.search(text, max(0, start - 3), start):
        return False
    words = words_before(text, start)
    if words and words[-1].lower() in _VERSIONED:
        return False
    try:
        address = ipaddress.IPv4Address(text[start:end])
    except ValueError:  # a part above 255, or with a leading zero
        return False
    if address.is_loopback or address.is_multicast or address.packed[0] in (0, *range(240, 256)):
        return False
    if end - start > len("1.2.3.4"):
        return True
    return context(text, start) == "ip_address" or text[end : end + 1] in ("/", ":")  # else it may be a section's


def _is_ipv6(shown: str) -> bool:
    try:
        address = ipaddress.IPv6Address(shown)
    except ValueError:
        return False
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        return False
    groups = shown.split(":")
    if "" not in groups:  # eight groups of two are the name of a device
        return max(map(len, groups)) > 2
    # a::b is also a name in some programming languages: only what is assigned to hosts
    return (len(groups[0]) > 2 and address.packed[0] >> 5 == 1) or address.packed[0] in (0xFC, 0xFD, 0xFE)


# --------------------------------------------------------------------------------------------------------------- emails

_DOMAIN = re.compile(r"@([A-Za-z0-9\u00c0-\u024f.\-]{1,190}\.[A-Za-z]{2,24})(?![A-Za-z0-9(\[])")
_LOCAL = re.compile(r"[A-Za-z0-9\u00c0-\u024f._%+'\-]{1,64}$")
_FILES = frozenset(["png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "html", "xml", "txt", "pdf"])
_SHORT = frozenset(["com", "org", "net", "co"])  # top-level domains with names of one letter


def emails(text: str) -> Iterator[Match]:
    if "@" not in text:
        return
    for shape in _DOMAIN.finditer(text):
        at = shape.start()
        local = _LOCAL.search(text[max(0, at - 64) : at])
        if not local:
            continue
        name = local.group().lstrip(".'-%+").split("..")[-1]
        labels = shape.group(1).split(".")
        top = labels[-1].lower()
        if not name or name.endswith(".") or top in _FILES:
            continue
        if name == "git" and text[shape.end() : shape.end() + 1] == ":":  # the address of a repository
            continue
        if any(not label or len(label) > 63 or label[0] == "-" or label[-1] == "-" for label in labels):
            continue
        if len(labels) > 2 or len(labels[0]) > 1 or top in _SHORT:
            yield Match("email", at - len(name), shape.end())
