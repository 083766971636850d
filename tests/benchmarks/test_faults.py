"""Every long job against kills, full disks, folders that are none, damaged work and hostile files: job x fault."""

import argparse
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.robustness import faults
from benchmarks.robustness.checks import check_words, digests, half_written
from benchmarks.robustness.jobs import JOBS
from benchmarks.robustness.runner import Runner

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="moments are counted from /proc")
HOSTILE = ["with space", "häßlich 人", "new\nline", "-rf", "..two dots", "a'b\"c", "<b>&amp;", "%s{0}$HOME", "x" * 200]
QUICK = ["export", "captions", "evaluate", "finetune", "latents"]
TRAINERS = [name for name, job in JOBS.items() if job.trains]


@pytest.fixture(scope="module")
def runner():
    """One process that has imported everything; each run is a fork of it."""
    made = Runner()
    yield made
    made.close()


@pytest.mark.parametrize(
    "job, sign", [("captions", signal.SIGTERM), ("export", signal.SIGKILL), ("finetune", signal.SIGKILL)]
)
def test_killed_at_a_moment_a_job_goes_on_to_the_same_result(runner, job, sign):
    """One kill each of those that their own tests do not kill so."""
    happened = faults.killed_often(runner, job, 1, seed=2, signs=(sign,))
    assert happened["kills"] == 1 and happened["ends"] >= 1


def test_a_kill_between_the_last_rename_and_the_end_is_an_end(runner, monkeypatch):
    def late(words, *, kill=None, sign=signal.SIGKILL, limit=None):
        code, used, said = run(words, limit=limit)
        return (code or -sign) if kill is not None else code, used, said

    run = runner.run
    wanted = runner.one_piece("export")
    monkeypatch.setattr(runner, "run", late)
    happened = faults.killed_often(runner, "export", 2, signs=(signal.SIGKILL,))
    assert wanted and happened == {"kills": 2, "SIGKILL": 2, "saved": 0, "ends": 2}


def test_a_training_that_loses_its_checkpoints_fails(runner, monkeypatch):
    def losing(words, *, kill=None, sign=signal.SIGKILL, limit=None):
        out = Path(words[words.index("--output_dir") + 1])
        if kill is None:
            return run(words, limit=limit)
        # The first run is killed after its training, the second has lost everything but the log.
        if not list(out.glob("checkpoint-*")):
            code, used, said = run(words, limit=limit)
            return code or -sign, used, said
        for left in out.glob("checkpoint-*"):
            shutil.rmtree(left)
        return -sign, 0.0, ""

    run = runner.run
    runner.one_piece("finetune")
    monkeypatch.setattr(runner, "run", losing)
    with pytest.raises(AssertionError, match="were done, 0 are left"):
        faults.killed_often(runner, "finetune", 3, signs=(signal.SIGKILL,))


def test_a_row_of_a_job_that_fails_goes(tmp_path):
    args = argparse.Namespace(json=tmp_path / "faults.json", seed=0, epochs=2)
    faults.write(args, "command", [["dcac", 10], ["images", 10], ["filter", 10]])
    faults.write(args, "command", [["images", 5]], ["dcac"])
    assert json.loads(args.json.read_text())["table"] == [["images", 5], ["filter", 10]]
    # Rows of other settings would be said to be of these.
    args.epochs = 3
    faults.write(args, "command", [["images", 5]])
    assert json.loads(args.json.read_text())["table"] == [["images", 5]]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_killed_often(runner, job):
    happened = faults.killed_often(runner, job, 10, seed=1)
    assert happened["kills"] >= 10 and happened["SIGKILL"] >= 3 and happened["SIGTERM"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_full_disk(runner, job):
    assert faults.full_disk(runner, job, faults.DISKS)


@pytest.mark.parametrize(
    "job", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in JOBS if one not in QUICK)]
)
def test_a_file_in_place_of_the_folder(runner, job):
    said = faults.no_folder(runner, job)
    assert str(runner.folder / "file") in said


@pytest.mark.slow
@pytest.mark.parametrize("job", TRAINERS)
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(runner, job, how):
    wanted, _ = runner.one_piece(job)
    out = runner.folder / "damaged" / f"{job}-{how}"
    shutil.copytree(runner.folder / "whole" / job, out)
    newest, older = sorted(out.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))[:2]
    damage(newest / "model.safetensors", how)
    code, _, said = runner.run(runner.words(job, out))
    line = check_words(job, said)
    assert code and newest.name in line and "damaged" in line and older.name in line
    code, _, said = runner.run(runner.words(job, out, ["--resume_from_checkpoint", older.name]))
    assert code == 0, said[-2000:]
    assert digests(job, out) == wanted


def damage(path, how):
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] if how == "truncated" else flipped(content, half))


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


CACHES = {
    "captions": "identities/*/*/captions.json",
    "images": "references/*.safetensors",
    "evaluate": "features.safetensors",
    "latents": "latents/*/*.safetensors",
    "part-masks": "masks.safetensors",
    "group": "group_features.safetensors",
}


@pytest.mark.slow
@pytest.mark.parametrize("job", CACHES)
def test_a_truncated_cache_is_made_again(runner, job):
    wanted, _ = runner.one_piece(job)
    out = runner.folder / "cache" / job
    shutil.copytree(runner.folder / "whole" / job, out)
    newest = max(out.glob(CACHES[job]), key=lambda path: path.stat().st_mtime_ns)
    damage(newest, "truncated")
    if job == "images":
        # Or there would be no work left that wants it.
        for record in out.glob("identities/*/*/images.json"):
            record.unlink()
    code, _, said = runner.run(runner.words(job, out))
    assert code == 0, said[-2000:]
    assert digests(job, out) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_gallery_is_refused_or_found_out(runner, how):
    """An addition to a gallery that was cut short says so; nothing but the damage differs afterwards."""
    runner.one_piece("append")
    out = runner.folder / "damaged" / f"append-{how}"
    shutil.copytree(runner.folder / "whole" / "append", out)
    newest = max((out / "index").glob("*.safetensors"))
    # A flip in the header: one in a feature is another number, as any is.
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2] if how == "truncated" else flipped(content, 9))
    before = newest.read_bytes()
    code, _, said = runner.run(runner.words("append", out))
    assert code and newest.name in check_words("append", said) and newest.read_bytes() == before


# Files of others


def people(folder, *, broken=False):
    """Identities and files with every hostile name, some of them links; by flag one image does not decode."""
    image = Image.new("RGB", (16, 32))
    for number, name in enumerate(HOSTILE):
        for camera in (1, 2):
            image.paste((20 * number, 90 * camera, 30), (0, 0, 16, 32))
            for split in ("train", "query" if camera == 1 else "gallery"):
                place = folder / split / name
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{name[:100]}_c{camera}_0.png")
    target = folder / "train" / HOSTILE[0] / f"{HOSTILE[0]}_c1_0.png"
    (folder / "train" / HOSTILE[1] / "link_c1_1.png").symlink_to(target)
    if broken:
        bad = folder / "train" / HOSTILE[2] / "broken_c1_3.png"
        bad.write_bytes(target.read_bytes()[:60])
    return folder


def words_for(runner, job, out, source):
    """A job's command on other people; a later flag wins over an earlier one."""
    words = runner.words(job, out)
    if job == "export":
        return ["utils.datasets", str(source), "--save_to", str(out)]
    if job == "evaluate":
        return [*words, "--data", str(source), "--k1", "1", "--k2", "1"]
    if job == "adapt":
        return [*words, "--target", str(source), "--max_train_steps", "1"]
    more = {"images": ["--max_sequence_images", "2"], "dcac": ["--max_train_steps", "2"]}.get(job, [])
    more += ["--max_train_steps", "2"] if job in ("finetune", "pretrain") else []
    return [*words, "--source", str(source), *more]


HOSTILE_JOBS = ["export", "evaluate", "captions", "finetune"]
SLOW_JOBS = ["images", "dcac", "pretrain", "adapt"]
SOURCES = [*HOSTILE_JOBS[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in HOSTILE_JOBS[2:] + SLOW_JOBS)]


@pytest.mark.parametrize("job", SOURCES)
def test_hostile_names_end_right(runner, job, tmp_path):
    root = tmp_path / "root"
    source, before = people(root / "set of\nothers"), set(os.listdir(tmp_path))
    out = tmp_path / "out"
    if job in ("captions", "images"):
        code, _, said = runner.run(words_for(runner, job, out, source))
        # Its images would lie in a folder of that name.
        assert code and "rename it" in check_words(job, said)
        root = tmp_path / "named"
        source = people(root / "set-of-others")
    code, _, said = runner.run(words_for(runner, job, out, source))
    assert code == 0, said[-2000:]
    assert set(os.listdir(tmp_path)) - before <= {"out", "named"} and len(os.listdir(root)) == 1
    assert half_written(out) == [] and any(out.rglob("*"))


@pytest.mark.parametrize("job", SOURCES)
def test_a_broken_image_is_named_in_one_line(runner, job, tmp_path):
    source = people(tmp_path / "set", broken=True)
    if job == "evaluate":
        shutil.copy(source / "train" / HOSTILE[2] / "broken_c1_3.png", source / "query" / HOSTILE[2])
    code, _, said = runner.run(words_for(runner, job, tmp_path / "out", source))
    line = check_words(job, said)
    assert code and "broken_c1_3.png" in line
    code, _, said = runner.run([*words_for(runner, job, tmp_path / "other", source), "--skip_unreadable"])
    assert code == 0, said[-2000:]
