"""Many pieces in one folder: shares, seeds, commits that a kill at any moment leaves whole, several writers."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.runs import files_of as files
from utils.worklist import Progress, Worklist, differences, seed_of, share

PIECES = ["a/0001", "a/0002", "b/0001"]


def commit(work, piece, text="x"):
    with work.scratch() as aside:
        (aside / "images").mkdir()
        for number in range(3):
            (aside / "images" / f"{number}.txt").write_text(f"{piece} {number} {text}")
        work.commit(piece, "images", {"piece": piece, "text": text}, {aside / "images": f"images/{piece}"})


@pytest.mark.parametrize("num_shards, num_processes", [(1, 1), (3, 1), (1, 4), (3, 2), (20, 3)])
def test_shares_are_a_partition_in_order(num_shards, num_processes):
    pieces = list(range(17))
    parts = [
        share(pieces, num_shards=num_shards, shard=shard, num_processes=num_processes, process=process)
        for shard in range(num_shards)
        for process in range(num_processes)
    ]
    assert sorted(piece for part in parts for piece in part) == pieces
    assert all(part == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_share_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="shard 2 of 2 does not exist"):
        share(PIECES, num_shards=2, shard=2)


def test_seeds_depend_on_the_words_alone():
    assert seed_of(0, "a/0001", "image", 3) == seed_of("0", "a/0001/image", 3) == 200768194823356
    assert len({seed_of(0, piece, index) for piece in PIECES for index in range(50)}) == 150
    assert 0 <= seed_of(0) < 2**48


def test_a_commit_is_whole_and_is_read_again(tmp_path):
    work = Worklist(tmp_path, PIECES)
    assert work.read("a/0001", "images") is None
    commit(work, "a/0001")
    assert work.read("a/0001", "images") == {"piece": "a/0001", "text": "x"}
    assert work.recorded("images") == ["a/0001"]
    assert (tmp_path / "images/a/0001/2.txt").read_text() == "a/0001 2 x"
    commit(work, "a/0001", "again")
    assert (tmp_path / "images/a/0001/2.txt").read_text() == "a/0001 2 again"
    work.tidy()
    assert set(files(tmp_path)) == {"identities/a/0001/images.json", *(f"images/a/0001/{n}.txt" for n in range(3))}


def test_an_error_while_writing_leaves_nothing(tmp_path):
    work = Worklist(tmp_path, PIECES)
    with pytest.raises(RuntimeError):
        with work.scratch() as aside:
            (aside / "half.txt").write_text("half")
            raise RuntimeError
    assert files(tmp_path) == {}


def test_a_damaged_record_counts_as_none(tmp_path):
    work = Worklist(tmp_path, PIECES)
    commit(work, "a/0001")
    work.record_path("a/0001", "images").write_text('{"piece": "a/00')
    assert work.read("a/0001", "images") is None


def commit_and_die(folder, calls):
    """A commit in a process that is killed before its call number `calls` that changes the disk."""
    left = calls

    def dying(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("rename", "replace", "mkdir", "unlink", "fsync", "chmod", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    commit(Worklist(folder, []), "a/0001", "new")


def test_killed_at_any_moment_a_commit_is_old_new_or_not_done(tmp_path):
    """The record never speaks of files that are not there, and doing it again gives the same as never being killed."""
    whole = tmp_path / "whole"
    commit(Worklist(whole, []), "a/0001", "new")
    Worklist(whole, []).tidy()
    seen, code = set(), -signal.SIGKILL
    for calls in range(100):
        folder = tmp_path / str(calls)
        commit(Worklist(folder, []), "a/0001", "old")
        process = multiprocessing.get_context("fork").Process(target=commit_and_die, args=(folder, calls))
        process.start()
        process.join()
        code = process.exitcode
        work = Worklist(folder, [])
        record = work.read("a/0001", "images")
        seen.add(record and record["text"])
        if record is not None:
            assert (folder / "images/a/0001/2.txt").read_text() == f"a/0001 2 {record['text']}"
            assert len(list((folder / "images/a/0001").iterdir())) == 3
        commit(work, "a/0001", "new")
        work.tidy()
        assert files(folder) == files(whole)
        if code == 0:
            break
    assert code == 0 and calls > 10 and seen == {"old", None, "new"}


def test_a_place_taken_away_by_another_writer_is_no_error(tmp_path, monkeypatch):
    work, rename = Worklist(tmp_path, PIECES), os.rename
    commit(work, "a/0001", "old")

    def other_was_faster(source, target):
        if Path(source) == tmp_path / "images/a/0001":
            shutil.rmtree(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", other_was_faster)
    commit(work, "a/0001", "new")
    assert work.read("a/0001", "images")["text"] == "new"
    assert (tmp_path / "images/a/0001/2.txt").read_text() == "a/0001 2 new"


def commit_many(folder):
    work = Worklist(folder, PIECES)
    for _ in range(50):
        for piece in PIECES:
            commit(work, piece)


def test_two_writers_of_the_same_piece_do_not_break_it(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=commit_many, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    work = Worklist(tmp_path, PIECES)
    work.tidy()
    assert len(files(tmp_path)) == 4 * len(PIECES)
    assert all(work.read(piece, "images")["piece"] == piece for piece in PIECES)


def test_progress_counts_what_lies_in_the_folder(tmp_path, capsys):
    work = Worklist(tmp_path, PIECES)
    commit(work, "b/0001")
    progress = Progress(work, "images", "images", 3)
    commit(work, "a/0001")
    progress.finished("a/0001")
    progress.finished("a/0002", "no reason")
    progress.once("cut", "cut one")
    progress.once("cut", "cut another")
    out, err = capsys.readouterr()
    assert "a/0001: 2 of 3 done" in out and "images a minute" in out and "min left" in out
    assert "a/0002 failed: no reason" in err
    assert "cut one" in out + err and "cut another" not in out + err


def test_differences_are_told_in_words():
    assert differences({"a": 1, "b": 2, "c": [1]}, {"a": 1, "b": 3, "d": None}) == [
        "b was 2 and is 3",
        "c was [1] and is None",
    ]


def test_records_are_json(tmp_path):
    work = Worklist(tmp_path, PIECES)
    work.commit("a/0001", "failed", {"error": "é"})
    assert json.loads(work.record_path("a/0001", "failed").read_text()) == {"error": "é"}
    work.forget("a/0001", "failed")
    work.forget("a/0001", "failed")
    work.tidy()
    assert not (tmp_path / "identities/a").exists()


def test_tidying_leaves_those_who_still_write(tmp_path, monkeypatch):
    """Another job in the folder, here or on another host, keeps its scratch folder; a dead one's goes."""
    first, second = Worklist(tmp_path, PIECES), Worklist(tmp_path, PIECES)
    alive = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    alive.start()
    names = {"dead": f"{socket.gethostname()}-{2**22 + 1}-ab", "alive": f"{socket.gethostname()}-{alive.pid}-ab"}
    names |= {"far": "other-host-7-ab", "old": "other-host-8-ab", "from before": "0123"}
    for name in names.values():
        (tmp_path / ".work" / name).mkdir(parents=True)
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / ".work" / names["old"], (long_ago, long_ago))
    first.tidy()
    left = {path.name for path in (tmp_path / ".work").iterdir()}
    assert left == {names["alive"], names["far"], names["from before"]}
    alive.kill()
    alive.join()
    second.tidy()
    assert names["alive"] not in {path.name for path in (tmp_path / ".work").iterdir()}
