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

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays there
    fcntl = None  # type: ignore[assignment]

_DRAFT = re.compile(r"\.(.+)\.draft-[0-9a-f]{8}", re.DOTALL)
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_HERE = -100  # AT_FDCWD of <fcntl.h>
_NO_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOST = (*_FULL, errno.EIO)  # what a synchronization reports of bytes that are not on the disk
_APPEARED = (errno.EEXIST, errno.ENOTEMPTY)
_NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)  # a mount point, or a folder of an image's layer


@contextmanager
def whole_file(target: str | os.PathLike[str], clean_up: bool = True) -> Iterator[Path]:
    """
    A file that is the old one or the complete new one, whenever the process ends.

    :param target: The file. Of a link, the file it leads to.
    :param clean_up: Whether to look for what killed processes left of this file, which lists its folder. False for one
        of many files, where :func:`remove_leftovers` has looked for all of them.
    :return: Context manager. It gives a path of the same name, to be written in the block.
    :raises OSError: It cannot be written; of a full disk the message says what to do.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "This is no regular file, so it cannot be replaced", str(target))
    with aside(target, clean_up=clean_up) as place:
        draft = place / target.name
        yield draft
        if target.exists():
            _take_rights(draft, target)
        else:  # the umask shows in the folder; safetensors makes files that only their owner reads
            with suppress(OSError):
                draft.chmod(place.stat().st_mode & 0o666)
        _sync(draft)
        os.replace(draft, target)
        _sync_names(target.parent)


@contextmanager
def whole_folder(
    target: str | os.PathLike[str], keeps: Callable[[str], bool] | None = None, size: int = 0
) -> Iterator[Path]:
    """
    A folder that is the old one or the complete new one, whenever the process ends.

    Both change places in one step where the system can (Linux; else two renames, and a kill between them leaves the old
    folder to the next writer). A folder that cannot be renamed, because it is a mount point, the current folder, or in
    a folder that may not be written, gets its new files one by one, and holds no model meanwhile. So does one with
    files that stay and cannot have a second name (no hard links): these are not touched.

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
        if place.parent == target or not _take_place(new, target, written, keeps):
            _put_one_by_one(new, target, written, keeps)
        else:
            _sync_names(target.parent)


@contextmanager
def aside(target: Path, size: int = 0, clean_up: bool = True) -> Iterator[Path]:
    """
    A hidden folder on the file system of a target, for the time of a block.

    :param target: What will be written, a resolved path.
    :param size: Bytes that the block writes, where its writer does not say why it fails (OpenVINO): if there is no room
        for so many, that is the reason.
    :param clean_up: See :func:`whole_file`.
    :return: Context manager. It gives the folder.
    :raises OSError: The target's disk is full. Whatever else is raised in the block stays as it is.
    """
    home = _home(target)
    home.mkdir(parents=True, exist_ok=True)
    if clean_up:
        for folder in (target.parent, *([target] if target.is_dir() else [])):
            remove_leftovers(folder, target.name)
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
        number = _full_disk(error, target, place, size)
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


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """
    Removes drafts of processes that were killed, and puts an old folder back that one had renamed.

    :param folder: Where drafts can lie. Nothing is done in one that cannot be listed.
    :param name: The name of the target. None: of any.
    """
    if fcntl is None:
        return
    try:
        drafts = [(entry, of) for entry in folder.iterdir() if (of := _target_of(entry)) and name in (None, of)]
    except OSError:
        return
    for place, of in drafts:
        try:
            lock = _lock(place)
        except OSError:
            continue  # not ours, gone, or on a file system without locks
        if lock is not None:
            with suppress(OSError):  # an old folder that cannot be put back stays where it is
                target = folder / of
                if not target.exists() and _old(place / of).exists():
                    _old(place / of).rename(target)
                shutil.rmtree(place, ignore_errors=True)
            os.close(lock)


def _target_of(place: Path) -> str | None:
    """:return: The name of the target, if this can be a draft."""
    match = _DRAFT.fullmatch(place.name)
    return match[1] if match else None


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


def _take_place(new: Path, target: Path, written: set[str], keeps: Callable[[str], bool] | None) -> bool:
    """Gives a folder its place, with what stays of the old one; False where only its files can be put one by one."""
    while True:
        there = target.is_dir()
        if there:
            try:
                for entry in _staying(target, written, keeps):
                    if not os.path.lexists(new / entry.name):
                        _link(entry, new / entry.name)
            except OSError:
                return False
            _take_rights(new, target)
            _sync(new)
        try:
            if there:
                _put(new, target)
            else:
                new.rename(target)
        except OSError as error:
            if error.errno in _APPEARED and target.is_dir():
                continue  # another process has just put one there: it is the old one now
            if error.errno in _NO_RENAME and target.is_dir():
                return False
            raise
        return True


def _staying(target: Path, written: set[str], keeps: Callable[[str], bool] | None) -> list[Path]:
    """What is in a folder and not replaced."""
    return [
        entry for entry in target.iterdir() if keeps is not None and keeps(entry.name) and entry.name not in written
    ]


def _put(new: Path, target: Path) -> None:
    """Gives a folder the place of another. That one lies in the draft afterwards."""
    if _exchange(new, target):
        return
    if _old(new).exists():  # this is not the first attempt
        _old(new).rename(new.with_name(secrets.token_hex(4)))
    try:
        with suppress(FileNotFoundError):  # another process is here, too
            target.rename(_old(new))
        new.rename(target)
    finally:
        if not target.exists() and _old(new).exists():  # an error or an interrupt between the two
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

    staying = _staying(target, written, keeps)
    for entry in sorted(target.iterdir(), key=configurations_first):
        if entry not in staying and _target_of(entry) != target.name:  # another process may write here, too
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    for name in sorted(written, key=lambda name: configurations_first(Path(name)), reverse=True):
        shutil.move(new / name, target / name)
    _sync_names(target)


def _link(source: Path, place: Path) -> None:
    """Lets a file, or all files of a folder, stand at a second place, too. A copy would miss what is still written."""
    link = partial(os.link, follow_symlinks=False)
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, place, symlinks=True, copy_function=link)
    else:
        link(source, place)


def _take_rights(new: Path, old: Path) -> None:
    """What replaces a file or folder has its owner and its permissions, as far as this process may give them."""
    status = old.stat()
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
    with suppress(OSError):
        new.chmod(stat.S_IMODE(status.st_mode))


def _sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk, where the file system can tell."""
    if os.path.islink(path) or not (os.path.isfile(path) or hasattr(os, "O_DIRECTORY")):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _LOST:
            raise


def _sync_names(folder: Path) -> None:
    """The same of a folder that holds the result already: an error there would deny what stands."""
    with suppress(OSError):
        _sync(folder)


def _full_disk(error: Exception, target: Path, place: Path, size: int) -> int | None:
    """:return: The number of the system's error, where the target's full disk is behind an error of any library."""
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename if error.filename2 is None else error.filename2  # of a copy: the second
        if isinstance(name, str | bytes):
            path = Path(os.path.realpath(os.fsdecode(name)))
            if not path.is_relative_to(place) and not path.is_relative_to(target):
                return None  # another disk: that of temporary files or of a cache
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
