"""A directory or file appears complete or not at all: errors, kills at every point, two writers."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from amx_tvm.artifact import publication
from amx_tvm.artifact.publication import Publication
from amx_tvm.errors import ArtifactError

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def write(output, text, replace=False):
    """Make a directory of two files and a folder."""
    with Publication(output) as new:
        (new.path / "inner").mkdir(parents=True)
        (new.path / "a").write_text(text)
        (new.path / "inner" / "b").write_text(text)
        new.publish(replace)


def content(output):
    if not output.exists():
        return None
    return {
        f.relative_to(output).as_posix(): f.read_text() for f in output.rglob("*") if f.is_file()
    }


def killed(action, place, at):
    """Run in a child that kills itself before its operation ``at``; whether it was killed."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    count = 0

    def step():
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if event in OPERATIONS and (place in str(arguments[0]) or event != "open"):
            step()

    def rename(*given):  # renameat2 is called through ctypes, which no audit sees
        step()
        plain(*given)
        step()

    plain, publication._rename = publication._rename, rename
    sys.addaudithook(audit)
    try:
        action()
    finally:
        os._exit(0)


@pytest.fixture(params=["exchange", "two steps"])
def exchange(request, monkeypatch):
    """With renameat2, and as on systems without it."""
    if request.param == "two steps":
        monkeypatch.setattr(publication.ctypes, "CDLL", lambda *_, **__: object())
    return request.param == "exchange"


def test_killed_anywhere_it_is_the_old_or_the_new(tmp_path, exchange):
    output, old = tmp_path / "out", {"a": "old", "inner/b": "old"}
    new = {"a": "new", "inner/b": "new"}
    write(output, "old")
    points, missing = 0, 0
    while killed(lambda: write(output, "new", replace=True), str(tmp_path), points + 1):
        points += 1
        missing += content(output) is None  # for a moment, where there is no exchange
        assert content(output) in (old, new) or not exchange
        with Publication(output):  # the next run sweeps, and gives back what was taken away
            pass
        assert content(output) in (old, new)
        assert os.listdir(tmp_path) == ["out"]
        write(output, "old", replace=True)
    assert points > 15 and content(output) == new and missing <= 2
    assert os.listdir(tmp_path) == ["out"]


def test_killed_where_nothing_was(tmp_path):
    output, points = tmp_path / "out", 0
    while killed(lambda: write(output, "new"), str(tmp_path), points + 1):
        points += 1
        assert content(output) in (None, {"a": "new", "inner/b": "new"})
        write(output, "again", replace=True)
        assert os.listdir(tmp_path) == ["out"]
        for file in ("a", "inner/b"):
            (output / file).unlink()
        (output / "inner").rmdir()
        output.rmdir()
    assert points > 10


def test_a_second_writer_is_refused_whatever_its_process_id(tmp_path):
    output, other = tmp_path / "out", []

    def second():
        with pytest.raises(ArtifactError, match="another run is writing"):
            write(output, "second", replace=True)
        script = (
            "import os, sys; os.getpid = lambda: int(sys.argv[2])\n"
            "from amx_tvm.artifact.publication import Publication\n"
            "with Publication(sys.argv[1]): pass"
        )
        command = [sys.executable, "-c", script, str(output), str(os.getpid())]
        done = subprocess.run(command, capture_output=True, text=True)
        other.append(done.returncode == 1 and "another run is writing" in done.stderr)

    with Publication(output) as new:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        new.path.write_text("first")
        new.publish()
    assert other == [True] and output.read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_what_appeared_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ArtifactError, match="made by another run"), Publication(output) as new:
        new.path.write_text("mine")
        output.write_text("theirs")
        new.publish()
    assert output.read_text() == "theirs" and os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_and_a_link_give_way(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "x")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write(tmp_path / "link", "y", replace=True)
    assert not (tmp_path / "link").is_symlink() and content(tmp_path / "out")["a"] == "x"
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_more_than_is_free_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ArtifactError, match=r"needs 1000000000.0 GB, and \S+ [MG]B are free under"):
        with Publication(tmp_path / "out") as new:
            new.require(10**18)
    assert os.listdir(tmp_path) == []


def test_what_is_made_inside_a_workspace_is_named_as_the_whole(tmp_path):
    """An export compiles there; its user knows the bundle's name only."""
    for failing in (OSError(errno.ENOSPC, "No space left"), OSError(errno.EROFS, "Read-only")):
        with pytest.raises(ArtifactError, match=f" {tmp_path}/out: ") as caught:
            with Publication(tmp_path / "out") as new, Publication(new.workspace / "part"):
                raise failing
        assert ".partial" not in str(caught.value)
    with pytest.raises(ArtifactError, match=f"{tmp_path}/out needs .* free under {tmp_path};"):
        with Publication(tmp_path / "out") as new, Publication(new.workspace / "part") as part:
            part.require(10**18)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=f"cannot write {tmp_path}/file/out: "):
        write(tmp_path / "file" / "out", "x")
    with pytest.raises(ArtifactError, match="cannot write .*File name too long"):
        write(tmp_path / ("x" * 250), "x")


@pytest.mark.parametrize("name", [".out.partial", ".out.partial/lock"])
def test_links_in_the_place_of_what_is_swept(tmp_path, name):
    """Somebody else's repository or shared folder may hold them, and lead anywhere."""
    other, link = tmp_path / "other", tmp_path / "here" / name
    other.mkdir()
    (other / "precious").write_text("x")
    link.parent.mkdir(parents=True)
    link.symlink_to(other if name.endswith("partial") else other / "made")
    with pytest.raises(ArtifactError, match="is a link|cannot write"):
        write(tmp_path / "here" / "out", "new")
    assert [path.name for path in other.iterdir()] == ["precious"]
    assert not (tmp_path / "here" / "out").exists()
