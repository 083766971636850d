"""Checkpoints: continuing to the same numbers, kills, full disks, damage, what belongs to what."""

import json
import pickle
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.runs import launch, torchrun
from utils.files import sha256, to_json
from utils.modeling.memories import PrototypeMemory
from utils.training.checkpoints import (
    LATEST,
    MANIFEST,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    open_state,
    random_states,
    read_state,
    save_checkpoint,
    set_random_states,
)
from utils.training.optimizer import LearningRate, build_optimizer

SCRIPT = "train.py"
FILES = ["model.safetensors", "optimizer.pt", "rng-0.pt", "state.json"]


class Model(nn.Module):
    """Something of each kind: a frozen layer, BatchNorm's averages, prototypes, dropout's random draws."""

    def __init__(self, width=8):
        super().__init__()
        self.frozen = nn.Linear(16, width).requires_grad_(False)
        self.layer = nn.Sequential(nn.Linear(width, 96), nn.BatchNorm1d(96), nn.Dropout(0.5), nn.Linear(96, 64))
        self.memory = PrototypeMemory(torch.ones(5, 64), 0.1)

    def forward(self, images):
        return self.layer(self.frozen(images))


def build(accelerator, seed, width=8, **options):
    torch.manual_seed(1)
    frozen = Model(width).frozen.state_dict()
    torch.manual_seed(seed)
    model = Model(width)
    model.frozen.load_state_dict(frozen)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return accelerator.prepare(model, build_optimizer(params, learning_rate=0.01, **options))


def step_of(model, optimizer, rates, step):
    """The loss of a step that draws from all three sources of randomness."""
    rates.set(epoch=step, step=step)
    images = torch.randn(12, 16) + random.gauss(0, 1) + np.random.standard_normal()
    labels = torch.arange(12) % 5
    features = model.train()(images)
    loss = model.memory(features, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.memory.update(features.detach(), labels)
    return loss.item()


def state_at(step, **more):
    return {"script": SCRIPT, "step": step, "arguments": {}, **more}


def save(folder, step, accelerator, limit=None, **options):
    model, optimizer = build(accelerator, seed=0, **options)
    return save_checkpoint(folder, step, state_at(step), model, optimizer, accelerator=accelerator, limit=limit)


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# Going on


@pytest.mark.parametrize("name, use_8bit", [("adam", False), ("sgd", False), ("adamw", True), ("adamw", "torchao")])
def test_a_resumed_training_goes_on_to_the_same_numbers(tmp_path, accelerator, name, use_8bit):
    if use_8bit == "torchao":
        pytest.importorskip("torchao", reason="pip install torchao, and a C++ compiler")
    options = {"name": name, "use_8bit": use_8bit, "weight_decay": 0.01}
    for draw in (random.seed, np.random.seed, torch.manual_seed):
        draw(3)
    model, optimizer = build(accelerator, seed=3, **options)
    rates = LearningRate(optimizer, milestones=[3, 5], gamma=0.5)
    for step in range(1, 4):
        step_of(model, optimizer, rates, step)
    path = save_checkpoint(tmp_path, 3, state_at(3), model, optimizer, accelerator=accelerator)
    want = [step_of(model, optimizer, rates, step) for step in range(4, 8)]

    for draw in (random.seed, np.random.seed, torch.manual_seed):
        draw(77)
    other, optimizer = build(accelerator, seed=8, **options)
    rates = LearningRate(optimizer, milestones=[3, 5], gamma=0.5)
    assert read_state(path, SCRIPT)["step"] == 3
    load_checkpoint(path, other, optimizer, accelerator=accelerator)
    assert [step_of(other, optimizer, rates, step) for step in range(4, 8)] == want
    for (key, tensor), again in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, again), key


def test_frozen_weights_stay_out(tmp_path, accelerator):
    kept = load_file(save(tmp_path, 1, accelerator) / "model.safetensors")
    assert not [name for name in kept if name.startswith("frozen")]
    assert {"memory.prototypes", "layer.1.running_var", "layer.0.weight"} <= set(kept)


def test_random_states_come_back():
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(2).tolist(),
        )

    # Both generators of normal numbers draw two at once and keep one.
    random.gauss(0, 1), np.random.standard_normal()
    states = random_states()
    first = draw()
    draw()
    set_random_states(states)
    assert draw() == first


def test_the_loss_scale_is_kept(tmp_path, accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    path = save(tmp_path, 1, accelerator)
    model, optimizer = build(accelerator, seed=1)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    load_checkpoint(path, model, optimizer, accelerator=accelerator)
    assert accelerator.scaler.get_scale() == 512.0
    accelerator.scaler = None
    with pytest.raises(ValueError, match="another --mixed_precision"):
        load_checkpoint(path, model, optimizer, accelerator=accelerator)


# Which checkpoints there are


def test_the_limit_keeps_the_newest(tmp_path, accelerator):
    for step in (5, 10, 100, 105):
        save(tmp_path, step, accelerator, limit=2)
    assert names_in(tmp_path) == ["checkpoint-100", "checkpoint-105"]
    save(tmp_path, 110, accelerator)
    assert list(list_checkpoints(tmp_path)) == [100, 105, 110]
    assert find_checkpoint(tmp_path, LATEST).name == "checkpoint-110"


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_a_training_that_starts_again_replaces_the_checkpoints_of_the_one_before(tmp_path, accelerator, limit):
    for step in (10, 20, 30):
        save(tmp_path, step, accelerator)
    path = save(tmp_path, 20, accelerator, limit=limit)
    assert find_checkpoint(tmp_path, LATEST) == path
    assert list(list_checkpoints(tmp_path)) == ([20] if limit == 1 else [10, 20])
    assert read_state(path, SCRIPT)["step"] == 20 and not list(tmp_path.glob(".checkpoint*"))


def test_what_a_killed_run_left_goes_with_the_next_checkpoint(tmp_path, accelerator):
    for name in (".checkpoint-7.part", ".checkpoint-20.old", ".checkpoint-20.part"):
        (tmp_path / name / "deepspeed").mkdir(parents=True)
        (tmp_path / name / "state.json").write_text("half")
    assert list_checkpoints(tmp_path) == {} and find_checkpoint(tmp_path, LATEST) is None
    save(tmp_path, 20, accelerator)
    save(tmp_path, 20, accelerator)
    assert names_in(tmp_path) == ["checkpoint-20"] and names_in(tmp_path / "checkpoint-20") == sorted(
        [*FILES, MANIFEST]
    )


def test_only_checkpoints_are_found(tmp_path):
    for name in ("checkpoint-3", "checkpoint-20", "checkpoint-x", "checkpoint-5.part", "my-checkpoint-9", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert list(list_checkpoints(tmp_path)) == [3, 20]
    assert find_checkpoint(tmp_path, "checkpoint-3") == tmp_path / "checkpoint-3"
    assert find_checkpoint("elsewhere", str(tmp_path / "checkpoint-3")) == tmp_path / "checkpoint-3"
    assert find_checkpoint(tmp_path / "absent", LATEST) is None


@pytest.mark.parametrize("asked", ["checkpoint-7", "/no/such/checkpoint-7", "checkpoint-99"])
def test_a_named_checkpoint_that_is_absent_is_an_error(tmp_path, asked):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    with pytest.raises(ValueError, match=rf"no checkpoint '{asked}'.*found: checkpoint-3\)"):
        find_checkpoint(tmp_path, asked)


# What belongs to what


def arguments(folder, **changes):
    given = {"output_dir": str(folder), "resume_from_checkpoint": LATEST, "rank": 8, "tau": 0.6, "source": ["a"]}
    return SimpleNamespace(**given | changes)


def opened(args, data="digest", said=None, script=SCRIPT):
    free = ("output_dir", "resume_from_checkpoint", "origin")
    said = [] if said is None else said
    return open_state(args, script, effective_batch_size=32, data=data, free=free, say=said.append)


def written(folder, accelerator, step=4, **changes):
    _, state = opened(arguments(folder, resume_from_checkpoint=None))
    state |= {"step": step, "epoch": 2, "batch": 1, "history": [{"epoch": 0, "target": "t", "mAP": 0.1}], **changes}
    model, optimizer = build(accelerator, seed=0)
    return save_checkpoint(folder, step, state, model, optimizer, accelerator=accelerator), state


def test_latest_without_any_starts_from_the_beginning_and_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        said = []
        path, state = opened(arguments(folder), said=said)
        assert path is None and said == [f"No checkpoint in {folder} yet: starting from step 0"]
        assert {key: state[key] for key in ("step", "epoch", "batch", "history")} == {
            "step": 0, "epoch": 1, "batch": 0, "history": [],
        }  # fmt: skip


def test_a_state_comes_back(tmp_path, accelerator):
    path, state = written(tmp_path, accelerator)
    for asked in (LATEST, "checkpoint-4", str(path)):
        said = []
        args = arguments(tmp_path, resume_from_checkpoint=asked)
        found, again = opened(args, said=said)
        assert found == path and said == [f"Resuming from {path}, step 4"]
        # The state's arguments are those of the run that continues.
        assert again == state | {"arguments": vars(args) | {"effective_batch_size": 32, "data": "digest"}}
    # A training that has not ended is not replaced by chance.
    with pytest.raises(
        ValueError, match=f"{path} is of a training that has not ended.*--resume_from_checkpoint latest"
    ):
        opened(arguments(tmp_path, resume_from_checkpoint=None))
    (tmp_path / "report.html").touch()
    assert opened(arguments(tmp_path, resume_from_checkpoint=None))[0] is None
    # The folder of a run means its latest checkpoint.
    assert opened(arguments(tmp_path / "new", resume_from_checkpoint=str(tmp_path)))[0] == path


def test_moved_folders_and_new_flags_are_no_difference(tmp_path, accelerator):
    for place in ("data", "here"):
        (tmp_path / place / "people").mkdir(parents=True)
        (tmp_path / place / "clip").mkdir()
    places = {"source": [f"{tmp_path}/data/people", "market1501"], "target": [f"{tmp_path}/data/people:holdout=0.3"]}
    given = places | {"backbone": f"{tmp_path}/here/clip"}
    _, state = opened(arguments(tmp_path, resume_from_checkpoint=None, **given))
    model, optimizer = build(accelerator, seed=0)
    history = [{"epoch": 0, "target": given["target"][0]}, {"epoch": 0, "target": "market1501"}]
    save_checkpoint(tmp_path, 4, state | {"step": 4, "history": history}, model, optimizer, accelerator=accelerator)
    now = {name: [one.replace("/data/", "/mnt/") for one in words] for name, words in places.items()}
    now |= {"backbone": f"{tmp_path}/there/clip", "later": 3, "origin": {"later": "default"}}
    # Two folders of one name that are both there are two: nothing moved.
    for place in ("mnt", "there"):
        shutil.copytree(tmp_path / "data", tmp_path / place)
    for name in ("source", "target", "backbone"):
        with pytest.raises(ValueError, match=f"{name} was"):
            opened(arguments(tmp_path, **given | {name: now[name]}))
    for place in ("data", "here"):
        shutil.rmtree(tmp_path / place)
    found, again = opened(arguments(tmp_path, **now))
    assert found is not None
    assert [entry["target"] for entry in again["history"]] == [now["target"][0], "market1501"]
    for change, words in (
        ({"later": 3, "origin": {"later": "flag"}}, "later was None, is 3"),
        ({"backbone": "/there/other"}, "backbone was '.*clip', is '/there/other'"),
        ({"source": [f"{now['source'][0]}:holdout=0.3", "market1501"]}, "source was"),
        # Neither of these is on the disk.
        ({"source": [f"{now['source'][0]}", "other/market1501"]}, "source was"),
    ):
        with pytest.raises(ValueError, match=words):
            opened(arguments(tmp_path, **now | change))


def test_changed_arguments_are_named(tmp_path, accelerator):
    written(tmp_path, accelerator)
    with pytest.raises(ValueError) as refused:
        opened(arguments(tmp_path, tau=1.0, source=["a", "b"]), data="other")
    assert "source was ['a'], is ['a', 'b']; tau was 0.6, is 1.0." in str(refused.value)
    assert "rank" not in str(refused.value) and "digest" not in str(refused.value)
    with pytest.raises(ValueError, match="new was None, is True"):
        opened(arguments(tmp_path, new=True))
    with pytest.raises(ValueError, match="effective_batch_size was 32, is 64.*the batch is --train_batch_size times"):
        open_state(arguments(tmp_path), SCRIPT, effective_batch_size=64, data="digest", free=(), say=print)


def test_other_images_are_refused(tmp_path, accelerator):
    path, _ = written(tmp_path, accelerator)
    with pytest.raises(ValueError, match=f"{path} was trained on other images than the source holds now"):
        opened(arguments(tmp_path), data="other")


def test_another_script_s_checkpoint_is_refused(tmp_path, accelerator):
    path, _ = written(tmp_path, accelerator)
    with pytest.raises(ValueError, match=f"{path} was written by train.py, not by adapt.py"):
        opened(arguments(tmp_path), script="adapt.py")
    # One of diffusers' scripts.
    foreign = tmp_path / "checkpoint-9"
    foreign.mkdir()
    (foreign / "optimizer.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{foreign} is damaged or no .* files.json: missing; .* there: checkpoint-4"):
        opened(arguments(tmp_path))


def test_another_shape_of_model_is_refused(tmp_path, accelerator):
    path = save(tmp_path, 1, accelerator)
    model, optimizer = build(accelerator, seed=0, width=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="holds another model: layer.0.weight differ in shape or are missing"):
        load_checkpoint(path, model, optimizer, accelerator=accelerator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="holds another model: frozen.bias, frozen.weight, layer.0.weight"):
        load_checkpoint(path, model, optimizer, accelerator=accelerator)


# Damage


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["truncated", "empty", "flipped", "missing"])
def test_damage_names_the_file(tmp_path, accelerator, name, kind):
    path = save(tmp_path, 6, accelerator)
    save(tmp_path, 3, accelerator)
    path = save(tmp_path, 6, accelerator)
    whole = (path / name).read_bytes()
    # In files.json, a bit of its first key; inside a digest it would be the digest's file that differs.
    place = 6 if name == MANIFEST else len(whole) // 2
    flipped = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
    contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "flipped": flipped}
    if kind == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(contents[kind])
    reason = "missing" if kind == "missing" else ".+"
    with pytest.raises(
        ValueError, match=rf"{path} is damaged .*ours: {name}: {reason}; the others there: checkpoint-3"
    ):
        read_state(path, SCRIPT)


def test_no_flipped_bit_anywhere_goes_unseen(tmp_path, accelerator):
    path = save(tmp_path, 6, accelerator)
    draw = random.Random(0)
    for name in [*FILES, *[MANIFEST] * 8]:
        whole = (path / name).read_bytes()
        for _ in range(10):
            place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
            (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with pytest.raises(ValueError, match="is damaged"):
                read_state(path, SCRIPT)
        (path / name).write_bytes(whole)
    assert read_state(path, SCRIPT)["step"] == 6


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng-0.pt"])
@pytest.mark.parametrize(
    "write",
    [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))],
    ids=["torch", "pickle"],
)
def test_code_in_a_checkpoint_does_not_run(tmp_path, accelerator, name, write):
    path = save(tmp_path, 1, accelerator)
    write({"optimizer": Harm(tmp_path / "harmed")}, path / name)
    files = json.loads((path / MANIFEST).read_text())["files"]
    (path / MANIFEST).write_text(to_json({"files": files | {name: sha256(path / name)}}))
    read_state(path, SCRIPT)
    model, optimizer = build(accelerator, seed=0)
    with pytest.raises(ValueError, match=f"{name} holds more than tensors and plain values.*: .*GLOBAL .*"):
        load_checkpoint(path, model, optimizer, accelerator=accelerator)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("size", [0, 400, 5_000, 30_000, 60_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, accelerator, size):
    save(tmp_path, 1, accelerator, limit=1)
    model, optimizer = build(accelerator, seed=0)
    step_of(model, optimizer, LearningRate(optimizer), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written \([\d.]+ GB are free there\): .+"):
            save_checkpoint(tmp_path, 2, state_at(2), model, optimizer, accelerator=accelerator, limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == ["checkpoint-1"] and read_state(tmp_path / "checkpoint-1", SCRIPT)["step"] == 1
    save_checkpoint(tmp_path, 2, state_at(2), model, optimizer, accelerator=accelerator, limit=1)
    assert names_in(tmp_path) == ["checkpoint-2"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from accelerate import Accelerator
from utils.training.checkpoints import list_checkpoints, load_checkpoint, read_state, save_checkpoint

folder, turns = Path(sys.argv[1]), int(sys.argv[2])
accelerator, draw = Accelerator(cpu=True), random.Random(0)
model = torch.nn.Linear(200, 100)
optimizer = torch.optim.Adam(model.parameters())
model(torch.ones(1, 200)).sum().backward()
optimizer.step()
newest = inside = 0


def save(step):
    state = {"script": "train.py", "step": step}
    save_checkpoint(folder, step, state, model, optimizer, accelerator=accelerator, limit=3)


started = time.perf_counter()
for step in range(1, 5):
    save(step)
once = (time.perf_counter() - started) / 4
for turn in range(turns):
    found = list_checkpoints(folder)
    # Every other time as after a resume at an earlier step: checkpoints of these steps are there already.
    start = max(found) + 1 if turn % 2 else min(found)
    child = os.fork()
    if child == 0:
        for step in range(start, start + 1000):
            save(step)
    time.sleep(draw.uniform(0, 4 * once))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += bool(list(folder.glob(".checkpoint-*")))
    left = list_checkpoints(folder)
    assert left, f"turn {turn}: all checkpoints are gone"
    for step, path in left.items():
        assert read_state(path, "train.py")["step"] == step
        load_checkpoint(path, model, optimizer, accelerator=accelerator)
    newest = max(newest, *left)
print(newest, inside)
"""


def killed(folder, turns):
    script = folder.with_name(f"{folder.name}.py")
    script.write_text(KILLED)
    return map(int, launch(script, folder, turns).stdout.splitlines()[-1].split())


def test_no_kill_leaves_a_checkpoint_that_does_not_read(tmp_path):
    newest, inside = killed(tmp_path, 20)
    # How many fall inside a save is the machine's to say.
    assert newest > 4 and inside > 0


@pytest.mark.slow
def test_no_kill_of_many_leaves_a_checkpoint_that_does_not_read(tmp_path):
    newest, inside = killed(tmp_path, 200)
    assert newest > 10 and inside > 10


DEEPSPEED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from utils.training.checkpoints import load_checkpoint, read_state, save_checkpoint
from utils.training.optimizer import build_optimizer; from utils.launch import start_training


class Harm:
    def __reduce__(self):
        return Path.touch, (folder / "harmed",)


folder = Path(sys.argv[1])
settings = {"report_to": ["none"], "push_to_hub": False, "allow_tf32": False, "max_grad_norm": 0}
settings |= {"train_batch_size": 4, "mixed_precision": sys.argv[2], "output_dir": str(folder)}
accelerator = start_training(SimpleNamespace(**settings))
assert accelerator.distributed_type.value == "DEEPSPEED"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8).requires_grad_(False), torch.nn.Linear(8, 2))
params = [parameter for parameter in model.parameters() if parameter.requires_grad]
model, optimizer = accelerator.prepare(model, build_optimizer(params, learning_rate=0.1))


def steps(numbers):
    losses = []
    for number in numbers:
        images = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        loss = model(images.to(next(model.parameters()).dtype)).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


steps(range(3))
path = save_checkpoint(folder, 3, {"script": "train.py"}, model, optimizer, accelerator=accelerator, limit=1)
want = steps(range(3, 6))
read_state(path, "train.py")
load_checkpoint(path, model, optimizer, accelerator=accelerator)
assert steps(range(3, 6)) == want and len(set(want)) == 3
files = sorted((path / "deepspeed").rglob("*.pt"))
assert len(files) == 2
for file in files:
    whole = file.read_bytes()
    torch.save(torch.load(file, weights_only=False) | {"more": Harm()}, file)
    try:
        load_checkpoint(path, model, optimizer, accelerator=accelerator)
    except ValueError as error:
        assert f"{file} holds more than tensors and plain values" in str(error)
    else:
        raise AssertionError(f"{file} was read")
    file.write_bytes(whole)
assert not (folder / "harmed").exists()
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision, offload", [("no", "none"), ("bf16", "cpu")])
def test_a_deepspeed_checkpoint_goes_on_and_runs_no_code(tmp_path, precision, offload):
    pytest.importorskip("deepspeed")
    (tmp_path / "train.py").write_text(DEEPSPEED)
    settings = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    settings |= {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": offload}
    torchrun(tmp_path / "train.py", tmp_path, precision, processes=1, **settings)
