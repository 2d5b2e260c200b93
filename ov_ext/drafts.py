"""
Drafts: a file or a folder is written in a hidden folder beside its target, and takes the target's place when complete.

The hidden folder is named ``.NAME.draft-XXXXXXXX`` and locked while its process lives. One that a killed process left
is removed when the same target is next written.

This file stands in ``nncf_ext`` and in ``ov_ext``, which do not import each other. The two are equal, and tested to be.
"""

import atexit
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays there
    fcntl = None  # type: ignore[assignment]

_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_HERE = -100  # AT_FDCWD of <fcntl.h>
_NO_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)  # a mount point, or a folder of an image's layer


@contextmanager
def whole_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """
    A file that is the old one or the complete new one, whenever the process ends.

    :param target: The file. Of a link, the file it leads to.
    :return: Context manager. It gives a path of the same name, to be written in the block.
    :raises OSError: It cannot be written; of a full disk the message says what to do.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "This is no regular file, so it cannot be replaced", str(target))
    with aside(target) as place:
        draft = place / target.name
        yield draft
        if target.exists():
            _take_rights(draft, target)
        else:  # the umask shows in the folder; safetensors makes files that only their owner reads
            draft.chmod(place.stat().st_mode & 0o666)
        _sync(draft)
        os.replace(draft, target)
        _sync(target.parent)


@contextmanager
def whole_folder(
    target: str | os.PathLike[str], keeps: Callable[[str], bool] | None = None, size: int = 0
) -> Iterator[Path]:
    """
    A folder that is the old one or the complete new one, whenever the process ends.

    Both change places in one step where the system can (Linux; else two renames, and a kill between them leaves the old
    folder to the next writer). A folder that cannot be renamed, because it is a mount point, the current folder, or in
    a folder that may not be written, gets its new files one by one, and holds no model meanwhile.

    :param target: The folder; made if it is not there. Of a link, the folder it leads to.
    :param keeps: Tells of a name in the old folder whether it stays, beside the new ones. None: nothing does.
    :param size: Bytes that will be written, see :func:`aside`.
    :return: Context manager. It gives an empty folder, to be filled in the block.
    :raises OSError: It cannot be written; of a full disk the message says what to do.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    with aside(target, size) as place:
        new = place / target.name
        new.mkdir()
        yield new
        for folder, _, files in os.walk(new):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                _sync(path)
        written = {entry.name for entry in new.iterdir()}
        if place.parent == target:
            _put_one_by_one(new, target, written, keeps)
            return
        if target.is_dir():
            for entry in target.iterdir() if keeps is not None else ():
                if keeps is not None and keeps(entry.name) and entry.name not in written:
                    _link(entry, new / entry.name)
            _take_rights(new, target)
            _sync(new)
        try:
            _put(new, target)
        except OSError as error:
            if error.errno not in _NO_RENAME or not target.is_dir():
                raise
            _put_one_by_one(new, target, written, keeps)
        _sync(target.parent)


@contextmanager
def aside(target: Path, size: int = 0) -> Iterator[Path]:
    """
    A hidden folder on the file system of a target, for the time of a block.

    :param target: What will be written, a resolved path.
    :param size: Bytes that the block writes, where its writer does not say why it fails (OpenVINO): if there is no room
        for so many, that is the reason.
    :return: Context manager. It gives the folder.
    :raises OSError: The disk is full. Whatever else is raised in the block stays as it is.
    """
    home = _home(target)
    home.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    place = home / f".{target.name}.draft-{secrets.token_hex(4)}"
    # Ctrl-C may fall between here and the caller's block, where no frame of ours is left that could clean up.
    clean = partial(shutil.rmtree, place, ignore_errors=True)
    atexit.register(clean)
    lock = None
    try:
        while lock is None:  # a process that cleans up can have been quicker
            place.mkdir(exist_ok=True)
            try:
                lock = _lock(place)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in _NO_LOCK:
                    raise
                break
        yield place
    except Exception as error:
        number = _full_disk(error, place, size)
        if number is None:
            raise
        text = f"{os.strerror(number)}. Nothing was written. Free some space, or choose another disk"
        raise OSError(number, text, str(target)) from error
    finally:
        if lock is not None:
            os.close(lock)
        clean()
        atexit.unregister(clean)


def _home(target: Path) -> Path:
    """Where a draft can lie: beside the target, or in it where the target cannot be renamed."""
    if not target.is_dir():
        return target.parent
    try:
        current = Path(os.getcwd())
    except FileNotFoundError:  # it was removed
        current = target.parent
    fixed = current.is_relative_to(target) or target.is_mount() or not os.access(target.parent, os.W_OK | os.X_OK)
    return target if fixed else target.parent


def _remove_leftovers(target: Path) -> None:
    """Removes drafts of processes that were killed, and puts an old folder back that one had renamed."""
    if fcntl is None:
        return
    name = re.compile(rf"\.{re.escape(target.name)}\.draft-[0-9a-f]{{8}}")
    for home in (target.parent, *([target] if target.is_dir() else [])):
        for place in [entry for entry in home.iterdir() if name.fullmatch(entry.name)]:
            try:
                lock = _lock(place)
            except OSError:
                continue  # not ours, gone, or on a file system without locks
            if lock is not None:
                if not target.exists() and _old(place / target.name).exists():
                    _old(place / target.name).rename(target)
                shutil.rmtree(place, ignore_errors=True)
                os.close(lock)


def _lock(place: Path) -> int | None:
    """:return: A descriptor that holds the lock of a draft; None where another process holds it or has removed it."""
    path = place / f"{place.name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _put(new: Path, target: Path) -> None:
    """Gives a folder its place. What was there lies in the draft afterwards."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        try:
            target.rename(_old(new))
            new.rename(target)
        finally:
            if not target.exists():  # an error or an interrupt between the two
                _old(new).rename(target)


def _old(new: Path) -> Path:
    return new.with_name(f"{new.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Lets two paths change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _put_one_by_one(new: Path, target: Path, written: set[str], keeps: Callable[[str], bool] | None) -> None:
    """Replaces what is in a folder. The configuration goes first and comes last: what is half there cannot be read."""

    def configurations_first(entry: Path) -> tuple[bool, str]:
        return entry.name != "config.json" and entry.suffix != ".xml", entry.name

    for entry in sorted(target.iterdir(), key=configurations_first):
        if entry != new.parent and (entry.name in written or keeps is None or not keeps(entry.name)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    for name in sorted(written, key=lambda name: configurations_first(Path(name)), reverse=True):
        shutil.move(new / name, target / name)
    _sync(target)


def _link(source: Path, place: Path) -> None:
    """Lets a file, or all files of a folder, stand at a second place, too. Copies where there are no hard links."""

    def link(file: Any, second: Any) -> None:
        try:
            os.link(file, second, follow_symlinks=False)
        except OSError:
            shutil.copy2(file, second, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, place, symlinks=True, copy_function=link)
    else:
        link(source, place)


def _take_rights(new: Path, old: Path) -> None:
    """What replaces a file or folder has its owner, as far as this process may, and its permissions."""
    status = old.stat()
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
    new.chmod(stat.S_IMODE(status.st_mode))


def _sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    if os.path.islink(path) or not (os.path.isfile(path) or hasattr(os, "O_DIRECTORY")):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full_disk(error: Exception, place: Path, size: int) -> int | None:
    """:return: The number of the system's error, where a full disk is behind an error of any library; else None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _FULL else None
    # Rust leaves the number in its text. C++ leaves nothing, and has removed what it wrote before we can look.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1]) if int(found[1]) in _FULL else None
    if "iostream error" not in str(error) or not hasattr(os, "posix_fallocate"):
        return None
    try:
        with (place / "probe").open("wb") as probe:
            os.posix_fallocate(probe.fileno(), 0, max(size, 1))
    except OSError as full:
        return full.errno if full.errno in _FULL else None
    return None
