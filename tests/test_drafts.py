"""A file or a folder is the old one or the complete new one, whatever happens to the process that writes it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nncf_ext import drafts
from tests.killing import contents, kill_points

OLD = {"config.json": b"old", "weights": b"old", "notes": b"mine", "logs": {"deep": {"1.txt": b"mine"}}}
NEW = {"config.json": b"new", "weights": b"new", "more": {"a": b"new"}}
BOTH = NEW | {"notes": b"mine", "logs": {"deep": {"1.txt": b"mine"}}}


def keeps(name: str) -> bool:
    return name in ("notes", "logs")


def make(folder: Path, tree: dict) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            make(folder / name, content)
        else:
            (folder / name).write_bytes(content)


def write(target: Path, keep=None) -> None:
    with drafts.whole_folder(target, keep) as draft:
        make(draft, NEW)


def write_text(target: Path, text: str) -> None:
    with drafts.whole_file(target) as draft:
        draft.write_text(text)


def refuse(number: int):
    """A call that the system refuses."""

    def call(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return call


def begin(target: Path) -> None:
    """A writer that gives up at once."""
    with pytest.raises(KeyError), drafts.aside(target):
        raise KeyError


# Killed at every point


@pytest.fixture
def no_waiting(monkeypatch):
    """For the disk: a kill loses nothing that was written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.slow
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("keep", [None, keeps], ids=["replaces", "keeps"])
@pytest.mark.parametrize("there", [True, False], ids=["old", "none"])
@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_a_folder_of_a_killed_writer_is_old_or_new(tmp_path, monkeypatch, keep, there, exchange) -> None:
    if not exchange:
        monkeypatch.setattr(drafts, "_exchange", lambda one, other: False)
    target, seen = tmp_path / "out", []
    before, after = OLD if there else None, BOTH if there and keep else NEW

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if there:
            make(target, OLD)

    for _ in kill_points(lambda: write(target, keep), prepare):
        seen.append(contents(target))
        if exchange or not there:
            assert seen[-1] in (before, after)
        begin(target)
        assert contents(target) in (before, after)
        assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    assert contents(target) == after
    assert len(seen) > 8 and before in seen and after in seen
    assert exchange or not there or None in seen  # between two renames, until the next writer


@pytest.mark.parametrize("there", [True, False], ids=["old", "none"])
def test_a_file_of_a_killed_writer_is_old_or_new(tmp_path, there) -> None:
    target = tmp_path / "plan.json"

    def prepare() -> None:
        target.write_text("old") if there else target.unlink(missing_ok=True)

    def write_file() -> None:
        with drafts.whole_file(target) as draft:
            draft.write_text("new")

    points = 0
    for _ in kill_points(write_file, prepare):
        points += 1
        assert contents(target) in (b"old" if there else None, b"new")
        begin(target)
        assert {path.name for path in tmp_path.iterdir()} <= {"plan.json"}
    assert contents(target) == b"new" and points > 4


@pytest.mark.slow
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fixed", ["mount", "current", "busy", "no links"])
def test_where_a_folder_cannot_be_renamed_no_half_is_readable(tmp_path, monkeypatch, fixed) -> None:
    """Its files are replaced one by one. A reader needs the configuration, which is there before and afterwards."""
    target = tmp_path / "out"

    def busy(new: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    def prepare() -> None:
        os.chdir(tmp_path)
        shutil.rmtree(target, ignore_errors=True)
        make(target, OLD)
        if fixed == "current":
            os.chdir(target)

    if fixed == "mount":
        monkeypatch.setattr(Path, "is_mount", lambda self: self == target)
    elif fixed == "busy":
        monkeypatch.setattr(drafts, "_put", busy)
    elif fixed == "no links":
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.chdir(tmp_path)
    for _ in kill_points(lambda: write(target, keeps), prepare):
        begin(target)
        found = contents(target)
        assert found in (OLD, BOTH) or "config.json" not in found
        assert found["notes"] == b"mine" and found["logs"] == OLD["logs"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(target) == BOTH


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_what_takes_its_place_is_on_the_disk(tmp_path, monkeypatch, exchange) -> None:
    """A power cut may lose what was not synchronized: so first the bytes and names, then the place, then its folder."""
    events, put, replace = [], drafts._put, os.replace
    if not exchange:
        monkeypatch.setattr(drafts, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(drafts, "_put", lambda *paths: (events.append("put"), put(*paths)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("put"), replace(*paths)))
    make(tmp_path / "out", OLD)
    write(tmp_path / "out", keeps)
    before, after = events[: events.index("put")], events[events.index("put") + 1 :]
    assert {Path(path).name for path in before} == {"out", "config.json", "weights", "more", "a"}
    assert before[-1].endswith("/out") and after == [str(tmp_path)]
    events.clear()
    with drafts.whole_file(tmp_path / "plan.json") as draft:
        draft.write_text("new")
    assert [Path(path).name for path in events] == ["plan.json", "put", tmp_path.name]


# Several writers


def test_a_draft_of_a_living_process_stays(tmp_path) -> None:
    program = (
        "import sys; from pathlib import Path; from nncf_ext.drafts import whole_file\n"
        "with whole_file(sys.argv[1]) as draft:\n"
        "    draft.write_text('theirs'); print('ready', flush=True); sys.stdin.read()\n"
    )
    target = tmp_path / "plan.json"
    command = [sys.executable, "-c", program, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        with drafts.whole_file(target) as draft:
            draft.write_text("mine")
        assert contents(target) == b"mine" and len([*tmp_path.iterdir()]) == 2
        process.communicate()
    assert process.returncode == 0
    assert contents(target) == b"theirs" and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_two_writers_of_a_new_folder_both_succeed(tmp_path, monkeypatch, exchange) -> None:
    """The last one's files are there, and what it keeps of the other one's."""
    if not exchange:
        monkeypatch.setattr(drafts, "_exchange", lambda one, other: False)
    met, rename, failed = threading.Barrier(2, timeout=20), Path.rename, []

    def at_once(path: Path, place) -> Path:
        if threading.current_thread() not in past and Path(place) == tmp_path / "out":
            past.append(threading.current_thread())
            met.wait()
        return rename(path, place)

    def writer(name: str) -> None:
        try:
            with drafts.whole_folder(tmp_path / "out", lambda name: name.startswith("note")) as draft:
                make(draft, {"config.json": name.encode(), f"note {name}": b"", f"weights {name}": b""})
        except BaseException as error:
            failed.append(error)

    past: list[threading.Thread] = []
    monkeypatch.setattr(Path, "rename", at_once)
    writers = [threading.Thread(target=writer, args=(name,)) for name in "ab"]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert failed == [] and len(past) == 2
    found = contents(tmp_path / "out")
    last = found["config.json"].decode()
    assert found == {"config.json": last.encode(), "note a": b"", "note b": b"", f"weights {last}": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("keep", [None, keeps], ids=["replaces", "keeps"])
def test_a_writer_one_by_one_leaves_the_draft_of_another(tmp_path, monkeypatch, keep) -> None:
    target = tmp_path / "out"
    make(target, OLD)
    monkeypatch.chdir(target)  # so drafts lie in it
    with drafts.whole_folder(target, keep) as draft:
        make(draft, {"config.json": b"last", "weights": b"last"})
        write(target, keep)
    assert contents(target)["config.json"] == b"last"
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


def test_what_stays_is_the_same_file_where_there_are_no_hard_links(tmp_path, monkeypatch) -> None:
    """Not a copy of it: a log that is open goes on, and a Trainer's checkpoints need no room twice."""
    target = tmp_path / "out"
    make(target, OLD)
    log = target / "logs" / "deep" / "1.txt"
    with log.open("ab") as opened:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
        monkeypatch.setattr(shutil, "copy2", refuse(errno.ENOSPC))
        write(target, keeps)
        opened.write(b", more")
    assert contents(target) == BOTH | {"logs": {"deep": {"1.txt": b"mine, more"}}}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_drafts_of_the_same_target_are_removed(tmp_path) -> None:
    for name in (".out.draft-notes", ".outer.draft-0123abcd", ".out2.draft-0123abcd", ".out.draft-0123abcd"):
        make(tmp_path / name, {"a": b"a"})
    (tmp_path / ".out.draft-00000000").write_text("a file of somebody")
    begin(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.draft-00000000",
        ".out.draft-notes",
        ".out2.draft-0123abcd",
        ".outer.draft-0123abcd",
    ]


# Errors and permissions


def test_an_error_leaves_what_was_there(tmp_path) -> None:
    make(tmp_path / "out", OLD)
    (tmp_path / "plan.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), drafts.whole_folder(tmp_path / "out") as draft:
        make(draft, NEW)
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="^reason$"), drafts.whole_file(tmp_path / "plan.json") as draft:
        draft.write_text("ne")
        raise RuntimeError("reason")
    assert contents(tmp_path) == {"out": OLD, "plan.json": b"old"}
    with pytest.raises(NotADirectoryError), drafts.whole_folder(tmp_path / "plan.json"):
        pass
    os.mkfifo(tmp_path / "pipe")
    for name in ("out", "pipe"):
        with pytest.raises(FileExistsError, match=f"no regular file.*{name}"), drafts.whole_file(tmp_path / name):
            pass


class FromRust(Exception):
    """As safetensors and tokenizers raise it: of no class that says what happened."""


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (FromRust("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError(errno.EACCES, "Permission denied"), None),
        (FromRust("Permission denied (os error 13)"), None),
        (RuntimeError("basic_ios::clear: iostream error"), None),  # there is room enough: it was something else
        (ValueError("other"), None),
    ],
)
def test_a_full_disk_is_said_with_the_path_and_what_to_do(tmp_path, error, number) -> None:
    with pytest.raises(type(error) if number is None else OSError) as caught, drafts.whole_folder(tmp_path / "out"):
        raise error
    if number is None:
        assert caught.value is error
    else:
        assert caught.value.errno == number and caught.value.filename == str(tmp_path / "out")
        assert os.strerror(number) in str(caught.value) and "Free some space" in str(caught.value)
        assert caught.value.__cause__ is error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("where", ["target", "draft", "temporary"])
@pytest.mark.parametrize("copied", [True, False])
def test_only_the_full_disk_of_the_target_is_blamed_on_it(tmp_path, where, copied) -> None:
    """An error that names a file says which disk it is. Of two names, as shutil gives, the second is the copy's."""
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(OSError) as caught, drafts.whole_folder(tmp_path / "out") as draft:
        folder = {"target": tmp_path / "out", "draft": draft, "temporary": tmp_path / "elsewhere"}[where]
        names = (str(tmp_path / "cache"), None, str(folder / "a")) if copied else (str(folder / "a"),)
        error = OSError(errno.ENOSPC, "No space left on device", *names)
        raise error
    if where == "temporary":
        assert caught.value is error
    else:
        assert caught.value.filename == str(tmp_path / "out") and caught.value.__cause__ is error


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP])
def test_what_a_file_system_cannot_do_loses_no_result(tmp_path, monkeypatch, number) -> None:
    """Network and user-space file systems: no synchronization, and permissions that cannot be set."""
    for name in ("fsync", "chmod"):
        monkeypatch.setattr(os, name, refuse(number))
    for _ in ("new", "old"):
        write(tmp_path / "out", keeps)
        with drafts.whole_file(tmp_path / "plan.json") as draft:
            draft.write_text("new")
        assert contents(tmp_path) == {"out": NEW, "plan.json": b"new"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("placed", [True, False], ids=["after", "before"])
def test_bytes_that_are_not_on_the_disk_replace_nothing(tmp_path, monkeypatch, number, placed) -> None:
    """But once they have replaced what was there, a failure would be a lie."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        after = os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path)
        (refuse(number) if after == placed else fsync)(descriptor)

    make(tmp_path / "out", OLD)
    (tmp_path / "plan.json").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing)
    for save in (lambda: write(tmp_path / "out"), lambda: write_text(tmp_path / "plan.json", "new")):
        if placed:
            save()
        else:
            with pytest.raises(OSError) as caught:
                save()
            assert caught.value.errno == number
    assert contents(tmp_path) == ({"out": NEW, "plan.json": b"new"} if placed else {"out": OLD, "plan.json": b"old"})


def test_a_folder_of_ones_own_in_a_home_that_cannot_be_listed(tmp_path, monkeypatch) -> None:
    """``/home`` with mode 0711: others' names are nobody's business, but each may write into the own folder."""
    home = tmp_path / "home"
    make(home, {"me": OLD})
    real, synchronized = os.open, []

    def open_unlisted(path, flags, *rest, **options):
        if os.fspath(path) == str(home):
            synchronized.append(path)
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    def unlisted(self: Path):
        if self == home:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return [self / name for name in os.listdir(self)]

    monkeypatch.setattr(os, "open", open_unlisted)
    monkeypatch.setattr(Path, "iterdir", unlisted)
    for writable in (True, False):
        monkeypatch.setattr(os, "access", lambda path, mode, writable=writable: writable)
        write(home / "me", keeps)
        assert contents(home / "me") == BOTH
    assert synchronized and os.listdir(home) == ["me"]


def test_permissions_are_those_of_the_old_or_of_the_umask(tmp_path) -> None:
    def private(path: Path) -> None:
        path.write_text("a")
        path.chmod(0o600)

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    file, folder, old = tmp_path / "file", tmp_path / "folder", os.umask(0o027)
    try:
        with drafts.whole_file(file) as draft:
            private(draft)
        with drafts.whole_folder(folder) as draft:
            private(draft / "copied")
        assert (mode(file), mode(folder), mode(folder / "copied")) == (0o640, 0o750, 0o600)
        file.chmod(0o604)
        folder.chmod(0o2701)
        with drafts.whole_file(file) as draft:
            private(draft)
        with drafts.whole_folder(folder) as draft:
            pass
        assert (mode(file), mode(folder)) == (0o604, 0o2701)
    finally:
        os.umask(old)


def test_links_lead_to_what_is_replaced(tmp_path) -> None:
    make(tmp_path / "disk", {"out": OLD, "plan.json": b"old"})
    make(tmp_path / "home", {})
    for name in ("out", "plan.json"):
        (tmp_path / "home" / name).symlink_to(tmp_path / "disk" / name)
    write(tmp_path / "home" / "out")
    with drafts.whole_file(tmp_path / "home" / "plan.json") as draft:
        draft.write_text("new")
    assert contents(tmp_path / "disk") == {"out": NEW, "plan.json": b"new"}
    assert (tmp_path / "home" / "out").is_symlink() and (tmp_path / "home" / "plan.json").is_symlink()


def test_links_in_a_folder_stay_links(tmp_path) -> None:
    make(tmp_path / "out", OLD)
    (tmp_path / "out" / "logs" / "last").symlink_to("deep")
    write(tmp_path / "out", keeps)
    assert os.readlink(tmp_path / "out" / "logs" / "last") == "deep"
