"""Runs of the jobs, each a fork of one process that has imported everything, killed after so much processor time.

`python -m benchmarks.robustness.runner` is that process; `Runner` starts it and sends it the runs.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.robustness.checks import digests
from benchmarks.robustness.jobs import JOBS
from utils.launch import end_with


def serve():
    """Read a run from each line of stdin; print its process number, and its exit code when it has ended."""
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
    """Run the script as if it had been started alone; never returns."""
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
    if name == __spec__.name:
        # The latent cache has no script of its own.
        return lambda: end_with(build_latents, argparse.Namespace(output_dir=arguments[-1]), "latents")
    script = importlib.import_module("utils.datasets.__main__" if name == "utils.datasets" else name)
    if name == "utils.datasets.part_masks":
        # So few images still make several chunks.
        script.CHUNK = 8
    if name.startswith("utils."):
        return lambda: script.main(arguments)
    args = script.parse_args(arguments)
    if name == "filter_generated":
        # So few images still make several pieces.
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
    """Starts jobs and kills them after so much processor time, which is the same moment on a busy machine.

    `epochs` is the length of trainings: the longer they are, the more kills fall between steps.
    """

    def __init__(self, epochs=2):
        self.epochs = epochs
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name]
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
        epochs = max(self.epochs, JOBS[job].epochs)
        return [*words, *(["--num_train_epochs", str(epochs)] if JOBS[job].trains else []), *more]

    def start(self, job, out):
        """The folder as it is before the job: absent, or as the command before left it, which runs once."""
        shutil.rmtree(out, ignore_errors=True)
        if not JOBS[job].before:
            return
        made = self.folder / "before" / job
        if not made.exists():
            code, _, said = self.run(JOBS[job].before.format(inputs=self.inputs, out=made).split())
            assert code == 0, f"what comes before {job} ended with {code}: {said[-2000:]}"
        shutil.copytree(made, out)

    def run(self, words, *, kill=None, sign=signal.SIGKILL, limit=None):
        """(exit code, processor seconds, output); `kill` is after how many processor seconds."""
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
        """(digests of the result, processor seconds) of an undisturbed run, which runs once."""
        if job not in self.pieces:
            out = self.folder / "whole" / job
            out.parent.mkdir(exist_ok=True)
            self.start(job, out)
            code, used, said = self.run(self.words(job, out))
            assert code == 0, f"{job} ended with {code} undisturbed: {said[-2000:]}"
            self.pieces[job] = digests(job, out), used
        return self.pieces[job]


def prepare(inputs):
    from utils.datasets.load import load_reid
    from utils.flags import CLIP_DIR
    from utils.generated.drawn_set import World, write_drawn

    shutil.copytree(CLIP_DIR, inputs / "clip")
    write_drawn(inputs / "drawn", World(num_ids=4))
    data = load_reid("synthetic", domain="b", num_ids=4)
    for split in ("query", "gallery"):
        for number, row in enumerate(data[split]):
            # A part of the gallery comes first.
            places = [split, "part"] if split == "gallery" and number % 2 else [split]
            for place in places:
                path = inputs / "people" / place / f"{row['pid']:04d}_c{row['camid'] + 1}_{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                row["image"].save(path)


def cpu_seconds(pid):
    """Processor seconds of a process, None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in "ZX":
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    serve()
