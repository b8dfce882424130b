"""Whose a folder and a file are: what other users could have written is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pellucid.ownership import open_own_folder, own_folder, read_own_file

STRANGER = 54321
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def read(folder: Path, name: str, at_most: int = 100) -> bytes:
    descriptor = open_own_folder(folder)
    try:
        return read_own_file(descriptor, name, at_most)
    finally:
        os.close(descriptor)


def test_a_missing_folder_and_its_missing_parents_are_made_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        made = own_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert made == tmp_path / "a" / "b"
    assert mode(made) == mode(made.parent) == 0o700
    assert own_folder(made) == made  # and is good the second time


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_others_may_write_is_refused(tmp_path, bits):
    folder = tmp_path / "kept"
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(PermissionError, match=f"others may write .*kept .mode {bits:04o}"):
        own_folder(folder)


@pytest.mark.parametrize("bits", [0o755, 0o700, 0o500, 0o750])
def test_a_folder_others_may_only_read_is_good(tmp_path, bits):
    folder = tmp_path / "kept"
    folder.mkdir()
    folder.chmod(bits)
    assert own_folder(folder) == folder


@pytest.mark.parametrize(
    ("bits", "good"), [(0o777, False), (0o775, False), (0o1777, True), (0o755, True)]
)
def test_every_folder_above_counts(tmp_path, bits, good):
    above = tmp_path / "above"
    (above / "between" / "kept").mkdir(parents=True)
    (above / "between" / "kept").chmod(0o700)
    above.chmod(bits)
    if good:
        assert own_folder(above / "between" / "kept").is_dir()
        return
    with pytest.raises(PermissionError, match="others may write in .*above .* exchange"):
        own_folder(above / "between" / "kept")
    with pytest.raises(PermissionError):  # nor is anything made there
        own_folder(above / "new")
    assert not (above / "new").exists()


def test_a_link_is_followed_and_the_place_it_leads_to_is_what_counts(tmp_path):
    good, open_to_all = tmp_path / "good", tmp_path / "open"
    good.mkdir(mode=0o700)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "to-good").symlink_to(good)
    (tmp_path / "to-open").symlink_to(open_to_all)
    assert own_folder(tmp_path / "to-good" / "kept") == good / "kept"
    with pytest.raises(PermissionError, match="open"):
        own_folder(tmp_path / "to-open" / "kept")
    with pytest.raises(PermissionError, match="open"):
        own_folder(tmp_path / "to-open")


def test_no_folder_can_be_made_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        own_folder(tmp_path / "file" / "kept")
    with pytest.raises(OSError, match="/proc/kept"):  # a file system that takes no folders
        own_folder(Path("/proc/kept"))


@as_root
def test_what_belongs_to_somebody_else_is_refused(tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "kept").mkdir(parents=True)
    os.chown(theirs / "kept", STRANGER, STRANGER)
    with pytest.raises(PermissionError, match=f"belongs to user {STRANGER}"):
        own_folder(theirs / "kept")
    os.chown(theirs / "kept", 0, 0)
    os.chown(theirs, STRANGER, STRANGER)  # who may then put another `kept` there
    with pytest.raises(PermissionError, match=f"belongs to user {STRANGER}"):
        own_folder(theirs / "kept")
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "kept").mkdir()
    os.chown(sticky / "kept", STRANGER, STRANGER)  # made beforehand by somebody else
    with pytest.raises(PermissionError, match=f"belongs to user {STRANGER}"):
        own_folder(sticky / "kept")


def test_a_file_is_read_only_where_nobody_else_can_have_written_it(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    file.chmod(0o644)
    assert read(tmp_path, "file") == b"content"
    with pytest.raises(OSError, match="more than 6 bytes"):
        read(tmp_path, "file", at_most=6)
    for bits in (0o666, 0o620, 0o602):
        file.chmod(bits)
        with pytest.raises(PermissionError, match=f"others may write .*mode {bits:04o}"):
            read(tmp_path, "file")
    with pytest.raises(FileNotFoundError):
        read(tmp_path, "nothing")


def test_only_a_regular_file_is_read_and_nothing_waits_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, message in (("pipe", "no regular file"), ("folder", "no regular"), ("link", "link")):
        with pytest.raises(PermissionError, match=message):
            read(tmp_path, name)


@as_root
def test_a_file_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    os.chown(tmp_path / "file", STRANGER, STRANGER)
    with pytest.raises(PermissionError, match="belongs to user"):
        read(tmp_path, "file")
