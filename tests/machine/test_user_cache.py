"""The folder of what is kept for this user is this user's alone."""

import os
from pathlib import Path

import pytest

from splitwiser.machine.user_cache import cache_directory

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def reason() -> str:
    """Why the folder is refused, in one line."""
    with pytest.raises(OSError, match=r"\A[^\n]+; set XDG_CACHE_HOME to a folder of your own\Z") as raised:
        cache_directory()
    return str(raised.value)


@pytest.mark.parametrize("given", [None, "", "relative"])
def test_it_is_in_the_home_folder(given: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "splitwiser"


def test_it_is_created_for_this_user_alone(base: Path) -> None:
    before = os.umask(0)
    try:
        folder = cache_directory()
    finally:
        os.umask(before)
    assert folder == base / "splitwiser"
    assert [path.stat().st_mode & 0o777 for path in (base, folder)] == [0o700, 0o700]
    assert cache_directory() == folder


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_one_that_others_can_write_to_is_refused(mode: int, base: Path) -> None:
    cache_directory().chmod(mode)
    assert reason().startswith(f"{base}/splitwiser can be written to by other users")


@only_root
@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(("group", "refused"), [(0, False), (12345, True)])
def test_a_group_counts_as_others_unless_it_is_the_users_own(group: int, refused: bool) -> None:
    folder = cache_directory()
    os.chown(folder, 0, group)
    folder.chmod(0o775)
    if refused:
        assert reason().startswith(f"{folder} can be written to by other users")
    else:
        assert cache_directory() == folder


@only_root
@pytest.mark.parametrize("place", ["splitwiser", "."])
def test_one_of_another_user_is_refused(place: str, base: Path) -> None:
    cache_directory()
    os.chown(base / place, 12345, 12345)
    assert reason().startswith(f"{(base / place).resolve()} belongs to user 12345")


def test_one_that_others_could_replace_is_refused(base: Path) -> None:
    cache_directory()
    base.chmod(0o777)
    assert reason().startswith(f"{base} can be written to by other users")
    base.chmod(0o1777)  # as /tmp
    assert cache_directory() == base / "splitwiser"


def test_a_link_in_its_place_is_refused(base: Path, tmp_path: Path) -> None:
    base.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (base / "splitwiser").symlink_to(tmp_path / "elsewhere")
    assert reason().startswith(f"{base}/splitwiser is not a directory")


def test_the_folder_it_is_in_may_be_a_link(base: Path, tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    base.symlink_to(tmp_path / "large disk")
    assert cache_directory() == tmp_path / "large disk" / "splitwiser"


def test_one_that_cannot_be_created_is_said(base: Path) -> None:
    base.write_text("")
    assert reason().startswith(f"{base}")


@only_root
def test_a_home_that_cannot_be_written_to_is_said(base: Path) -> None:
    os.seteuid(12345)
    try:
        assert reason().startswith(f"{base}/splitwiser: Permission denied")
    finally:
        os.seteuid(0)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_it_is_said_how_to_choose_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(FileNotFoundError, match="no home folder to keep it; set XDG_CACHE_HOME"):
        cache_directory()
