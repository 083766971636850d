"""Every long job killed many times, run on a full disk, and given a file as its folder: whether anything is lost.

    python -m benchmarks.robustness.faults
    python -m benchmarks.robustness.faults --jobs dcac images --kills 50 --seed 1

Each job first runs undisturbed. Then SIGKILL and SIGTERM in turn stop it at random moments of a fixed seed, and the
same command starts it again, until it was killed as often as asked. Whenever it ends, its result must equal that of
the undisturbed run. After each kill, every file with a final name must be complete, and finished work must still be
there.
"""

import argparse
import json
import random
import signal
import sys
from pathlib import Path

from benchmarks.common import RESULTS, command_line, revision, write_result
from benchmarks.robustness.checks import check_end, check_words, digests, half_written, progress
from benchmarks.robustness.jobs import JOBS
from benchmarks.robustness.runner import Runner
from utils.reporting.report import text_table

# Bytes that a file may have: the two limits stop a job at different places.
DISKS = (3000, 40_000)
COLUMNS = ["job", "kills", "SIGKILL", "SIGTERM", "saved at SIGTERM", "ends like one piece", "full disk"]
COLUMNS += ["folder is a file", "lost"]


def killed_often(runner, job, kills, seed=0, signs=(signal.SIGKILL, signal.SIGTERM)):
    """Kill a job so often, and let it start anew whenever it ends; return the counts."""
    wanted, whole = runner.one_piece(job)
    draw, out = random.Random(f"{seed}/{job}"), runner.folder / "killed" / job
    happened = {"kills": 0, **{sign.name: 0 for sign in signs}, "saved": 0, "ends": 0}
    out.parent.mkdir(exist_ok=True)
    runner.start(job, out)
    reached, turn = 0, 0
    while happened["kills"] < kills or not happened["ends"]:
        more = happened["kills"] < kills
        sign = signs[turn % len(signs)]
        turn += 1
        code, _, said = runner.run(runner.words(job, out), kill=draw.uniform(0, whole) if more else None, sign=sign)
        check_end(job, code, said, sign)
        assert not (bad := half_written(out)), f"{job}, turn {turn}: half-written {bad}"
        if code:
            happened["kills"] += 1
            happened[sign.name] += 1
            happened["saved"] += code == 128 + signal.SIGTERM
        # A kill may also fall between the last rename and the end of the process.
        if code == 0 or (JOBS[job].once and out.exists()):
            assert digests(job, out) == wanted, f"{job}, turn {turn}: another result than in one piece"
            happened["ends"] += 1
            runner.start(job, out)
            reached = 0
            continue
        now = progress(job, out)
        # The chunks of features go once all of them are in one file; checkpoints never, nor what there was before.
        once = not JOBS[job].trains and not JOBS[job].before
        gone = once and (out / JOBS[job].result[0]).exists()
        assert now >= reached or gone, f"{job}: {reached} were done, {now} are left"
        reached = now
    return happened


def full_disk(runner, job, limits):
    """Under a limit of the file size: one clear error, no half-written file, and the same command continues."""
    wanted, _ = runner.one_piece(job)
    out = runner.folder / "full" / job
    out.parent.mkdir(exist_ok=True)
    runner.start(job, out)
    refused = 0
    for limit in limits:
        code, _, said = runner.run(runner.words(job, out), limit=limit)
        if code:
            check_words(job, said)
            refused += 1
        assert not (bad := half_written(out)), f"{job}: half-written {bad} under a limit of {limit} bytes"
    assert refused, f"{job} never met the limits {limits}"
    code, _, said = runner.run(runner.words(job, out))
    assert code == 0, f"{job} did not go on: {said[-2000:]}"
    assert digests(job, out) == wanted, f"{job}: another result after a full disk"
    return refused


def no_folder(runner, job):
    """Run with an output folder below a file; return the error."""
    file = runner.folder / "file"
    file.write_text("kept")
    code, _, said = runner.run(runner.words(job, file / "out"))
    assert code and file.read_text() == "kept", f"{job} took a file for a folder"
    return check_words(job, said)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="default all")
    parser.add_argument("--kills", type=int, default=10, help="of each job; default 10")
    parser.add_argument("--epochs", type=int, default=12, help="of each training; default 12")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    parser.add_argument("--json", type=Path, default=RESULTS / "faults.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
    runner, rows, failed = Runner(args.epochs), [], []
    try:
        for job in args.jobs:
            try:
                happened = killed_often(runner, job, args.kills, args.seed)
                numbers = [happened[name] for name in ("kills", "SIGKILL", "SIGTERM", "saved", "ends")]
                refused = full_disk(runner, job, DISKS)
                no_folder(runner, job)
                rows.append([job, *numbers, f"{refused} of {len(DISKS)} refused, went on", "refused", "nothing"])
            except AssertionError as error:
                print(f"{job} FAILED: {error}", flush=True)
                failed.append(job)
            else:
                print(f"{job}: {happened}", flush=True)
            write(args, command_line(__spec__.name, input_args), rows, failed)
    finally:
        runner.close()
    print(text_table(COLUMNS, rows))
    if failed:
        sys.exit(f"benchmarks.robustness.faults: {', '.join(failed)} lost something, see above")


def write(args, command, rows, failed=()):
    """Write the file after each job, so that a stop loses one job only.

    Rows of jobs that were not run stay, if they are of the same revision, seed and epochs.
    """
    settings, kept = {"revision": revision(), "seed": args.seed, "epochs": args.epochs}, []
    if args.json.is_file():
        before = json.loads(args.json.read_text(encoding="utf-8"))
        kept = before["table"] if before["raw"] == settings else []
    table = [row for row in kept if row[0] not in {*failed, *(one[0] for one in rows)}] + rows
    table.sort(key=lambda row: list(JOBS).index(row[0]))
    write_result(args.json, command, COLUMNS, table, settings)


if __name__ == "__main__":
    main()
