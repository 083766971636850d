"""Runs of the scripts: in this process, in forks of one that has imported them all, or by torchrun.

A Python process that imports torch, diffusers, transformers and peft spends 8 seconds on it. Each pytest process
therefore keeps one server that has done so and forks from it, in a tenth of a second, for every run that is to be a
process of its own. What is about the start itself (imports, `--help`, the environment) uses `subprocess`.
"""

import atexit
import json
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
# The libraries load these modules when they are first asked for; a script that does not import fails in its own tests.
MODULES = [
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft.tuners.lora", "torchvision.transforms.v2",
    *(f"transformers.models.{name}" for name in (
        "auto.modeling_auto", "auto.image_processing_auto", "bert.tokenization_bert", "blip.modeling_blip",
        "clip.modeling_clip", "clip.tokenization_clip", "resnet.modeling_resnet", "swin.modeling_swin",
    )),
]  # fmt: skip
FORKSERVER.set_forkserver_preload([*MODULES, *sorted(path.stem for path in ROOT.glob("*.py"))])


def environment(**more):
    """Of a child: it finds our modules, sums in one order, and asks no network."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def places(processes):
    """What torchrun tells each of several processes on one machine."""
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def calls_of(monkeypatch, owner, name):
    """A list that grows with each call of a function, which does its work as before."""
    calls, original = [], getattr(owner, name)

    def noted(*args, **options):
        calls.append((args, options))
        return original(*args, **options)

    monkeypatch.setattr(owner, name, noted)
    return calls


# In this process


def run(script, *arguments):
    """A script's main, of its module."""
    # accelerate keeps the precision of the first Accelerator of a process.
    AcceleratorState._reset_state(True)
    try:
        return script.main(script.parse_args([str(one) for one in arguments]))
    finally:
        AcceleratorState._reset_state(True)


def refused(script, *arguments):
    """The one line a run ends with."""
    AcceleratorState._reset_state(True)
    with pytest.raises(SystemExit) as stop:
        script.run_script(script.parse_args([str(one) for one in arguments]))
    AcceleratorState._reset_state(True)
    assert stop.value.code not in (0, None)
    assert "\n" not in str(stop.value.code).strip()
    return str(stop.value.code)


# In processes of their own


class Run:
    """One or several processes of one script, and what they print."""

    def __init__(self, processes, folder):
        self.processes, self.folder = processes, folder

    def poll(self):
        """None while any is alive, then the first exit code that is not 0."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def send_signal(self, sign):
        for process in self.processes:
            os.kill(process.pid, sign)

    def wait(self, timeout=300):
        """Its end, as subprocess.run gives it; where one fails the others are not waited for."""
        deadline = time.monotonic() + timeout
        waiting = list(self.processes)
        while waiting:
            waiting = [process for process in waiting if process.exitcode is None]
            late = time.monotonic() > deadline
            if waiting and (late or any(process.exitcode for process in self.processes)):
                for process in waiting:
                    process.join(0 if late else 10)
                    process.kill()
                    process.join()
            assert not late or not waiting, f"still running after {timeout} s: {self.printed('stderr')[-3000:]}"
            multiprocessing.connection.wait([process.sentinel for process in waiting], timeout=1)
        return subprocess.CompletedProcess([], self.poll(), self.printed("stdout"), self.printed("stderr"))

    def printed(self, stream):
        return Path(self.folder.name, stream).read_text(errors="replace")


def start(job, *arguments, processes=1, limit=None, **more):
    """One or several processes of their own, for a script by its path or a function of a module of tests.

    `limit` is the size of the largest file it may write, `more` is for its environment.
    """
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    folder = tempfile.TemporaryDirectory(prefix="run-")
    for stream in ("stdout", "stderr"):
        Path(folder.name, stream).touch()
    started = []
    for place in places(processes) if processes > 1 else [{}]:
        options = job, arguments, environment(**place, **more), Path(folder.name), limit
        started.append(FORKSERVER.Process(target=become, args=options))
        started[-1].start()
    # Where tests are interrupted, nothing waits for what still runs.
    atexit.register(lambda: [process.kill() for process in started])
    return Run(started, folder)


def become(job, arguments, environment, folder, limit):
    """What a fork does: it prints into files and is, from here on, `python SCRIPT ARGUMENTS` or a function's call."""
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(folder / stream, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # Workers of data loaders start as they do in a run that was started by itself.
    multiprocessing.set_start_method(None, force=True)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if callable(job):
        return job(*arguments)
    sys.argv = [str(ROOT / job), *map(str, arguments)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def launch(job, *arguments, check=True, timeout=300, **options):
    """The same to its end: exit code and all it prints."""
    done = start(job, *arguments, **options).wait(timeout)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def torchrun(script, *arguments, processes=2, **more):
    """As people start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, *map(str, (script, *arguments))], cwd=ROOT, env=environment(**more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def stopped(started, when, sign=signal.SIGKILL, timeout=240):
    """Sends the signal to a started run as soon as `when()` holds; its end."""
    deadline = time.monotonic() + timeout
    while not when() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert started.poll() is None, f"ended before it was stopped: {started.printed('stderr')[-3000:]}"
    started.send_signal(sign)
    return started.wait()


# What runs leave


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def lines_written(folder):
    path = Path(folder) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def weights_of(folder, name="model"):
    return load_file(Path(folder) / name / "model.safetensors")


def same_weights(one, other):
    """Whether two sets of tensors are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
