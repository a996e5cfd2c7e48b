"""File names that come from outside: keys of a store, names in manifests, archives and journals.

Whoever may write to a bucket or a shared folder chooses such a name. None is made part of a path but by ``inside``. Of
texts from there, such as logs, none is shown on a terminal but by ``printable``.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from raytune_lora.errors import UserError

_DRIVE = re.compile(r"[A-Za-z]:")
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NEVER = re.compile(r"[\x00-\x1f\x7f\\]")  # a backslash parts folders on other systems


class Outside(UserError):
    """A name leads out of the folder that it was given for."""


def plain(name: object) -> bool:
    """Whether a name is relative, has no part that leads up or nowhere, and means the same on every system."""
    if not isinstance(name, str) or not name or _NEVER.search(name) or _DRIVE.match(name):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def checked(name: str, where: str, *, deep: bool = True) -> str:
    """A name from outside as it is.

    Args:
        name: from a folder on, with slashes.
        where: it was found, for people.
        deep: whether it may lead into folders below.

    Raises:
        Outside: it would lead out of the folder.
    """
    if not plain(name) or ("/" in name and not deep):
        raise Outside(
            f"{where}: {name!r} is no name of a file in a folder, and is not followed: somebody may have put it there "
            "to have files written elsewhere; find out who may write there, and delete it"
        )
    return name


def inside(folder: Path, name: str, where: str) -> Path:
    """The path in a folder of this machine that a name from outside stands for, to be read or written.

    Args:
        folder: which need not be there yet.
        name: from it on, with slashes.
        where: it was found, for people.

    Raises:
        Outside: it would lead out of the folder, also by a link that lies in it.
    """
    path = folder / PurePosixPath(checked(name, where))
    for at in (path, *path.parents):
        if at == folder:
            break
        if at.is_symlink():
            raise Outside(f"{where}: {name} would be written through the link {at}, out of {folder}; remove the link")
    return path


def printable(text: str) -> str:
    """A text from outside for a terminal, to which a control character is a command: to set the clipboard, for one."""
    return _COMMANDS.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
