"""Where files are put: beside their place first, then in it, whole. What was there before stays when anything fails."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..core.errors import WriteError

HIDDEN = ".lora-lite-"
"""How a file begins that is not in its place yet."""


@contextlib.contextmanager
def _writing(path: Path, *temporary: Path) -> Iterator[None]:
    """Inside, what the system refuses is a `FileError`; after any exception nothing temporary stays."""
    try:
        yield
    except BaseException as e:
        for one in temporary:
            with contextlib.suppress(OSError):
                shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)
        if isinstance(e, (OSError, SafetensorError)):
            raise WriteError(f"{path} could not be written ({e}). What was there before is as it was.") from e
        raise


def real(path: Path) -> Path:
    """The place behind links.

    Raises:
        FileError: no file can have this name, or links lead around in a circle.
    """
    try:
        found = Path(os.path.realpath(path))
        circular = found.is_symlink()
    except (OSError, ValueError) as e:
        raise WriteError(f"{str(path)!r} is no place for a file ({e}).") from None
    if circular or "\0" in str(path):
        raise WriteError(f"{str(path)!r} is no place for a file.")
    return found


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[str]:
    """The name of a new file, which takes the place of `path` at the end and has the mode of what stood there.

    Raises:
        FileError: the system refuses; an old file is still there.
    """
    place = real(path)
    with _writing(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_file():
            raise WriteError(f"{path} is no file, so none is put in its place.")
        descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=HIDDEN)
    with _writing(path, Path(name)):
        os.close(descriptor)
        yield name
        _take_over(place, Path(name), 0o666 & ~_umask())
        os.replace(name, place)


@contextlib.contextmanager
def replaced_folder(folder: Path, adapter: str) -> Iterator[Path]:
    """A new folder, whose files take the place of those of the same name in `folder` at the end, all at once. `adapter`
    names the file that must not stand beside old ones.

    Whoever is killed leaves the old files or the new ones: a single changed file is renamed, and for several the two
    folders change places, with everything else that lies in the old one. Where the system cannot exchange folders, the
    old one is moved away first.

    Raises:
        FileError: the system refuses; the old files are still there.
    """
    place = real(folder)
    with _writing(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_dir():
            raise WriteError(f"{folder} is a file; give the name of a folder.")
        new = Path(tempfile.mkdtemp(dir=place.parent, prefix=HIDDEN))
    with _writing(folder, new):
        yield new
        for file in new.iterdir():
            _take_over(place / file.name, file, 0o666 & ~_umask())
        with _alone(place.parent):
            _put(new, place, adapter)


@contextlib.contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """One process, or thread, at a time: the ranks of a run export into one folder at the same moment. A file system
    without such locks keeps no order."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _put(new: Path, place: Path, adapter: str) -> None:
    """The new files into their place."""
    if not place.exists():
        new.chmod(0o777 & ~_umask())
        new.rename(place)
        return
    files = list(new.iterdir())
    changed = [file for file in files if file.name == adapter or not _same(file, place / file.name)]
    if len(changed) == 1:
        changed[0].replace(place / changed[0].name)
    else:
        _swap(new, place)
    shutil.rmtree(new)


def _swap(new: Path, place: Path) -> None:
    """Exchange two folders; afterwards `new` holds what was replaced."""
    for file in place.iterdir():
        if not (new / file.name).exists():
            _link(file, new / file.name)
    _take_over(place, new, 0o777)
    if not exchange(new, place):
        old = new.with_name(f"{new.name}-old")
        place.rename(old)
        try:
            new.rename(place)
        except BaseException:
            old.rename(place)
            raise
        old.rename(new)
    for file in new.iterdir():  # what somebody else wrote meanwhile
        if not os.path.lexists(place / file.name):
            file.rename(place / file.name)


def exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step, which only Linux offers; False where that is not to be had."""
    rename: Any = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swapping = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), swapping) == 0


def _link(source: Path, to: Path) -> None:
    """Another name for a file, or for all files of a folder; a copy where the system has no such names."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, to, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, to)


def _link_file(source: str | Path, to: str | Path) -> None:
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)


def _same(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _take_over(old: Path, new: Path, mode: int) -> None:
    """Mode and owner of what is replaced; `mode` where nothing is."""
    if old.exists():
        facts = old.stat()
        mode = stat.S_IMODE(facts.st_mode)
        if (facts.st_uid, facts.st_gid) != (new.stat().st_uid, new.stat().st_gid):
            with contextlib.suppress(OSError):  # only root gives files away
                os.chown(new, facts.st_uid, facts.st_gid)
    new.chmod(mode)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
