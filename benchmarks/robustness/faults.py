"""What happens when things go wrong: every long job killed many times, on a full disk, in a folder that is none.

    python -m benchmarks.robustness.faults
    python -m benchmarks.robustness.faults --jobs dcac images --kills 50 --seed 1

A job runs once in one piece. Then it is killed at seeded moments, by SIGKILL and SIGTERM in turn, and started again by
the same command until it has been killed so often; whenever it comes to its end, the result must be that of the one
piece. After each kill every file under its own name must be whole, and what was done must still be done.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, environment
from utils.files import to_json, write_together
from utils.launch import end_with
from utils.reporting.report import text_table

PEOPLE = "synthetic:domain=a,num_ids=4,images_per_id=4"
TARGET = "synthetic:domain=b,num_ids=2,images_per_id=4"
SMALL = "--resolution 64 32 --train_batch_size 8 --eval_every 99"
TRAINED = f"--source {PEOPLE} --target {TARGET} {SMALL} --checkpointing_steps 1 --resume_from_checkpoint latest"
CLUSTERS = "--images_per_id 2 --steps_per_epoch 3 --k1 6 --k2 2 --eps 0.5 --min_samples 2 --lr_warmup_epochs 0"
DRAWN = f"--source {PEOPLE} --resolution 64 32 --max_train_steps 2 --num_images 2 --num_reference_images 2 "
DRAWN += "--num_inference_steps 2 --train_batch_size 2 --save_resolution 64 32 --clip_model_name_or_path none"
SCORED = "--num_train_epochs 1 --classifier_epochs 1 --train_batch_size 8 --eval_batch_size 8 --resolution 64 32 "
SCORED += "--dataloader_num_workers 0 --keep_fraction 0.5"
# Bytes that a file may have: a small and a larger one meet the limit at different places.
DISKS = (3000, 40_000)


@dataclass
class Job:
    """`{inputs}` and `{out}` in the command are folders; `done` are the files of work that must not get fewer.

    `once`: its folder appears when it is whole, and the same command then refuses it.
    """

    command: str
    done: str
    result: tuple
    trains: bool = False
    once: bool = False


JOBS = {
    "dcac": Job(
        f"train_dcac {TRAINED} --diffusion_resolution 64 64 --validation_ids 0 --cache_dir {{inputs}}/cache "
        "--output_dir {out}",
        "checkpoint-*/files.json",
        ("log.jsonl", "model/model.safetensors", "prompts.safetensors"),
        trains=True,
    ),
    "pretrain": Job(
        f"pretrain_backbone {TRAINED} --output_dir {{out}}",
        "checkpoint-*/files.json",
        ("log.jsonl", "backbone/model.safetensors"),
        trains=True,
    ),
    "finetune": Job(
        f"finetune_reid {TRAINED} --output_dir {{out}}",
        "checkpoint-*/files.json",
        ("log.jsonl", "model/model.safetensors"),
        trains=True,
    ),
    "adapt": Job(
        f"adapt_reid --target {PEOPLE.replace('=a,', '=b,')} {SMALL} {CLUSTERS} --checkpointing_steps 1 "
        "--resume_from_checkpoint latest --output_dir {out}",
        "checkpoint-*/files.json",
        ("log.jsonl", "model/model.safetensors"),
        trains=True,
    ),
    "captions": Job(
        f"train_dreambooth_reid {DRAWN} --captions_only --output_dir {{out}}",
        "identities/*/*/captions.json",
        ("captions.parquet",),
    ),
    "images": Job(
        f"train_dreambooth_reid {DRAWN} --output_dir {{out}}",
        "identities/*/*/images.json",
        ("metadata.parquet", "captions.parquet", "images/*/*/*.jpg"),
    ),
    "filter": Job(
        f"filter_generated --source {PEOPLE} --generated {{inputs}}/drawn {SCORED} --output_dir {{out}}",
        ".pieces/*.parquet",
        ("features.npy", "dataset/**/*.parquet"),
    ),
    "evaluate": Job(
        "evaluate --model {inputs}/clip --resolution 64 32 --data synthetic:domain=b,num_ids=16 --batch_size 4 "
        "--report_queries 0 --output_dir {out}",
        "chunks-*/*.safetensors",
        ("features.safetensors", "rankings.csv"),
    ),
    "latents": Job(
        "benchmarks.robustness.faults --latents {out}", "latents/*/*.safetensors", ("latents/*/*.safetensors",)
    ),
    "export": Job(
        "utils.datasets synthetic:domain=a,num_ids=16,images_per_id=4 --save_to {out}",
        "dataset_dict.json",
        ("dataset_dict.json", "*/data-*.arrow"),
        once=True,
    ),
}  # fmt: skip


# Runs, each a fork of one process that has imported everything


def serve():
    """Lines on stdin, each a run: answers with its process's number, and with its exit code when it has ended."""
    import datasets
    import torch

    for job in JOBS.values():
        importlib.import_module(job.command.split()[0])
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(**asked)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def child(words, log, limit):
    """The script as if it had been started by itself; never returns."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    code = 1
    try:
        sys.argv = words
        start = entry(words)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        start()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            os.write(2, f"{error.code}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def entry(words):
    """What a script does under `if __name__ == "__main__"`."""
    name, arguments = words[0], words[1:]
    if name == "benchmarks.robustness.faults":
        # The cache has no script of its own.
        return lambda: end_with(build_latents, argparse.Namespace(output_dir=arguments[-1]), "latents")
    script = importlib.import_module("utils.datasets.__main__" if name == "utils.datasets" else name)
    if name == "utils.datasets":
        return lambda: script.main(arguments)
    args = script.parse_args(arguments)
    if name == "filter_generated":
        # Several pieces of so few images.
        importlib.import_module("utils.generated.images").PIECE = 8
    for end in ("run_script", "start"):
        if hasattr(script, end):
            return lambda: getattr(script, end)(args)
    return lambda: end_with(script.main, args, f"{name}.py")


def build_latents(args):
    from accelerate import Accelerator

    from utils.datasets.load import load_reid
    from utils.diffusion.latents import build_latent_cache
    from utils.diffusion.unet import load_vae
    from utils.flags import DIFFUSION_DIR

    people = load_reid("synthetic", domain="a", num_ids=16, images_per_id=8)["train"]
    options = {"accelerator": Accelerator(cpu=True), "vae_name": "stand-in", "batch_size": 4}
    build_latent_cache(people, load_vae(DIFFUSION_DIR), (64, 32), cache_dir=args.output_dir, **options)
    return 0


class Runner:
    """Starts jobs, and kills them when they have used so much of the processor: the same moment on a busy machine.

    `epochs` is how long trainings last; the longer, the fewer of their kills fall outside of the steps.
    """

    def __init__(self, epochs=2):
        self.epochs = epochs
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.robustness.faults", "--serve"]
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        with open(self.folder / "server.log", "w") as errors:
            self.server = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=-1, stdout=-1, stderr=errors, text=True
            )
        self.inputs = self.folder / "inputs"
        self.inputs.mkdir()
        prepare(self.inputs)
        self.pieces = {}
        while (line := self.server.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def words(self, job, out, more=()):
        words = JOBS[job].command.format(inputs=self.inputs, out=out).split()
        return [*words, *(["--num_train_epochs", str(self.epochs)] if JOBS[job].trains else []), *more]

    def run(self, words, *, kill=None, sign=signal.SIGKILL, limit=None):
        """(exit code, CPU seconds, what it said); `kill` is after how many CPU seconds."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        self.server.stdin.write(json.dumps({"words": words, "log": str(log), "limit": limit}) + "\n")
        self.server.stdin.flush()
        pid, used, sent = int(self.server.stdout.readline()), 0.0, False
        while (now := cpu_seconds(pid)) is not None:
            used = now
            if kill is not None and used >= kill and not sent:
                os.kill(pid, sign)
                sent = True
            time.sleep(0.005)
        return int(self.server.stdout.readline()), used, log.read_text(errors="replace") if log.exists() else ""

    def one_piece(self, job):
        """(digests of the result, CPU seconds) of a run that nothing disturbs; made once."""
        if job not in self.pieces:
            out = self.folder / "whole" / job
            out.parent.mkdir(exist_ok=True)
            code, used, said = self.run(self.words(job, out))
            assert code == 0, f"{job} ended with {code} undisturbed: {said[-2000:]}"
            self.pieces[job] = digests(job, out), used
        return self.pieces[job]


def prepare(inputs):
    from utils.flags import CLIP_DIR
    from utils.generated.drawn_set import World, write_drawn

    shutil.copytree(CLIP_DIR, inputs / "clip")
    write_drawn(inputs / "drawn", World(num_ids=4))


def cpu_seconds(pid):
    """None once the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in "ZX":
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# What must hold


def digests(job, out):
    """SHA-256 of every file of a job's result; AssertionError where one is missing."""
    found = {}
    for pattern in JOBS[job].result:
        paths = sorted(out.glob(pattern))
        assert paths, f"{job} ended without {pattern}"
        found |= {str(path.relative_to(out)): hashlib.sha256(content(path)).hexdigest() for path in paths}
    return found


def content(path):
    """The bytes of a file; safetensors writes what a header says in any order, so that is put in one."""
    whole = path.read_bytes()
    if path.suffix != ".safetensors":
        return whole
    size = int.from_bytes(whole[:8], "little")
    return json.dumps(json.loads(whole[8 : 8 + size]), sort_keys=True).encode() + whole[8 + size :]


def progress(job, out):
    """How much is done: the newest checkpoint's step, or the number of finished parts."""
    found = list(out.glob(JOBS[job].done))
    if JOBS[job].trains:
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)
    return len(found)


def half_written(out):
    """Files under their own names that cannot be read to their end."""
    import pyarrow.parquet as pq
    from PIL import Image
    from safetensors import safe_open

    def read_tensors(path):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)

    def read_page(path):
        assert path.read_text().rstrip().endswith("</html>")

    def read_image(path):
        with Image.open(path) as image:
            image.load()

    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".parquet": pq.read_table,
        ".safetensors": read_tensors,
        ".html": read_page,
        **dict.fromkeys((".png", ".jpg"), read_image),
    }
    bad = []
    for path in sorted(out.rglob("*")) if out.is_dir() else ():
        if any(part.startswith(".") for part in path.relative_to(out).parts) or path.suffix not in readers:
            continue
        try:
            readers[path.suffix](path)
        except Exception as error:
            bad.append(f"{path.relative_to(out)}: {type(error).__name__}")
    return bad


def check_end(job, code, said, sign):
    """A run that was killed ended by the signal or, after SIGTERM, in order with a checkpoint."""
    if code in (0, -sign):
        return
    assert sign == signal.SIGTERM and JOBS[job].trains and code == 128 + sign, f"{job}: {code}\n{said[-2000:]}"
    assert "--resume_from_checkpoint latest" in said


def killed_often(runner, job, kills, seed=0, signs=(signal.SIGKILL, signal.SIGTERM)):
    """Kills a job so often, and ends it as often as it gets through; returns what happened."""
    wanted, whole = runner.one_piece(job)
    draw, out = random.Random(f"{seed}/{job}"), runner.folder / "killed" / job
    happened = {"kills": 0, **{sign.name: 0 for sign in signs}, "saved": 0, "ends": 0}
    out.parent.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
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
            shutil.rmtree(out)
            reached = 0
            continue
        now = progress(job, out)
        # The chunks of features go once all of them are in one file.
        assert now >= reached or (out / JOBS[job].result[0]).exists(), f"{job}: {reached} were done, {now} are left"
        reached = now
    return happened


def full_disk(runner, job, limits):
    """No file may be larger than a limit: one clear line, nothing half written, and the same command continues."""
    wanted, _ = runner.one_piece(job)
    out = runner.folder / "full" / job
    out.parent.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    refused = 0
    for limit in limits:
        code, _, said = runner.run(runner.words(job, out), limit=limit)
        if code:
            check_words(job, said)
            refused += 1
        assert not (bad := half_written(out)), f"{job}: half-written {bad} under a limit of {limit} bytes"
    assert refused, f"{job} never met the limits {limits}"
    code, _, said = runner.run(runner.words(job, out))
    assert code == 0, f"{job} did not continue: {said[-2000:]}"
    assert digests(job, out) == wanted, f"{job}: another result after a full disk"
    return refused


def no_folder(runner, job):
    """The output folder lies below a file."""
    file = runner.folder / "file"
    file.write_text("kept")
    code, _, said = runner.run(runner.words(job, file / "out"))
    assert code and file.read_text() == "kept", f"{job} took a file for a folder"
    return check_words(job, said)


def check_words(job, said):
    """The end is one line for a person."""
    assert "Traceback" not in said, f"{job}: {said[-3000:]}"
    line = said.strip().splitlines()[-1]
    assert len(line) > 20, f"{job} said only {line!r}"
    return line


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="default all")
    parser.add_argument("--kills", type=int, default=10, help="of each job; default 10")
    parser.add_argument("--epochs", type=int, default=12, help="of each training; default 12")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    parser.add_argument("--json", type=Path, default=RESULTS / "faults.json", help="default benchmarks/results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(input_args)
    if args.serve:
        return serve()
    columns = ["job", "kills", "SIGKILL", "SIGTERM", "saved at SIGTERM", "ends like one piece", "full disk"]
    columns += ["folder is a file", "lost"]
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
                continue
            print(f"{job}: {happened}", flush=True)
            write(args, columns, rows)
    finally:
        runner.close()
    print(text_table(columns, rows))
    if failed:
        sys.exit(f"benchmarks.robustness.faults: {', '.join(failed)} lost something, see above")


def write(args, columns, rows):
    """After each job, so that a stop loses one; rows of jobs that were not asked for stay."""
    kept = json.loads(args.json.read_text(encoding="utf-8"))["table"] if args.json.is_file() else []
    table = [row for row in kept if row[0] not in {one[0] for one in rows}] + rows
    table.sort(key=lambda row: list(JOBS).index(row[0]))
    with write_together(args.json.parent) as part:
        content = {
            "environment": environment(),
            "seed": args.seed,
            "epochs": args.epochs,
            "columns": columns,
            "table": table,
        }
        part(args.json.name).write_text(to_json(content), encoding="utf-8")


if __name__ == "__main__":
    main()
