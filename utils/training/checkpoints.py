"""Checkpoints of a training: written to a temporary folder, renamed, checked when read; old ones are removed last.

    checkpoint-120/
        state.json            step, place in the epoch, arguments, and what else the script stores there
        model.safetensors     the tensors that training changes (frozen weights of a known origin are left out)
        optimizer.pt, rng-0.pt, ...
        files.json            SHA-256 of all other files: a folder without it, or that differs from it, is damaged

With DeepSpeed the model and optimizer files are DeepSpeed's own, in `deepspeed/`; FSDP2 has the same as DDP, and each
resumes the other's. A killed run leaves hidden folders (`.checkpoint-120.part`, `.checkpoint-80.old`), which the next
checkpoint removes.
"""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.files import sha256, to_json
from utils.launch import splitter

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST, STATE, MODEL, OPTIMIZER = "files.json", "state.json", "model.safetensors", "optimizer.pt"
LATEST = "latest"


def list_checkpoints(folder):
    """{step: path} of the checkpoints in a folder, in the order of their steps."""
    folder = Path(folder)
    entries = folder.iterdir() if folder.is_dir() else ()
    checkpoints = {int(match[1]): path for path in entries if (match := NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(checkpoints.items()))


def find_checkpoint(output_dir, name_or_path):
    """The folder for `--resume_from_checkpoint`: `latest` (None if there is none yet), a name or a path."""
    if name_or_path == LATEST:
        return next(reversed(list_checkpoints(output_dir).values()), None)
    for path in (Path(output_dir) / name_or_path, Path(name_or_path)):
        if path.is_dir():
            # The folder of a run means its latest.
            return next(reversed(list_checkpoints(path).values()), path)
    names = ", ".join(path.name for path in list_checkpoints(output_dir).values()) or "none"
    raise ValueError(
        f"there is no checkpoint {name_or_path!r}, neither in {output_dir} (found: {names}) nor as a path"
    )


def read_state(path, script):
    """The content of state.json; ValueError if a file is damaged or another script wrote the checkpoint."""
    name = MANIFEST
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, digest in ({STATE: None} | files).items():
            if sha256(path / name) != digest:
                raise ValueError("changed since it was written")
        name = STATE
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error
        others = [checkpoint.name for checkpoint in list_checkpoints(path.parent).values() if checkpoint != path]
        advice = f"; the others there: {', '.join(others)}" if others else ""
        raise ValueError(f"{path} is damaged or no checkpoint of ours: {name}: {reason}{advice}") from None
    if state.get("script") != script:
        raise ValueError(f"{path} was written by {state.get('script')}, not by {script}")
    return state


def open_state(args, script, *, effective_batch_size, data, free, precision=None, say=print):
    """(checkpoint to resume or None, its state or the state of a new training).

    A state holds what a training needs to resume: the step, the epoch and the batches done in it, the history of
    measurements, the arguments and the data. Arguments named in `free` may differ from the checkpoint's.
    """
    arguments = {**json.loads(to_json(vars(args))), "effective_batch_size": effective_batch_size, "data": data}
    fresh = {"script": script, "step": 0, "epoch": 1, "batch": 0, "history": [], "arguments": arguments}
    fresh["precision"] = precision
    if not args.resume_from_checkpoint:
        if old := unfinished(args.output_dir):
            raise ValueError(
                f"{old} is of a training that has not ended, which this one would replace: add "
                "--resume_from_checkpoint latest to continue it, give another --output_dir, or remove it"
            )
        return None, fresh
    path = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if path is None:
        say(f"No checkpoint in {args.output_dir} yet: starting from step 0")
        return None, fresh
    state = read_state(path, script)
    check_arguments(path, state["arguments"], arguments, free)
    before = state.setdefault("precision", precision)
    if before != precision:
        advice = (
            "continue on a GPU" if arguments.get("mixed_precision") == before else f"give --mixed_precision {before}"
        )
        raise ValueError(f"{path} was trained in precision {before}, accelerate's setting is {precision}: {advice}")
    say(f"Resuming from {path}, step {state['step']}")
    history = renamed(state["history"], state["arguments"], arguments)
    return path, state | {"arguments": arguments, "history": history}


def unfinished(folder):
    """The newest checkpoint of a training that has written no report since, or None."""
    newest, report = find_checkpoint(folder, LATEST), Path(folder) / "report.html"
    ended = report.is_file() and newest and report.stat().st_mtime >= newest.stat().st_mtime
    return None if ended else newest


def check_arguments(path, before, now, free):
    """ValueError naming the arguments that differ from the checkpoint's; those in `free` may.

    A flag that the checkpoint does not name counts as equal if it has its default. So do images, models and files that
    have moved to another place.
    """
    origin, same_images = now.get("origin") or {}, before.get("data") == now.get("data")

    def differs(name):
        old, new = before.get(name), now.get(name)
        if old == new or (name not in before and origin.get(name) == "default"):
            return False
        if name in ("source", "target") and not same_images:
            return True
        old, new = (value if isinstance(value, list) else [value] for value in (old, new))
        return len(old) != len(new) or not all(map(same_or_moved, old, new))

    names = [name for name in {**before, **now} if name not in free and differs(name)]
    if names:
        if names == ["data"]:
            raise ValueError(f"{path} was trained on other images than the source holds now")
        listed = "; ".join(
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in sorted(names) if name != "data"
        )
        if "effective_batch_size" in names:
            listed += "; the batch is --train_batch_size times the number of processes"
        raise ValueError(f"{path} belongs to a run with other arguments: {listed}. Give the same")


def same_or_moved(old, new):
    """Whether values are equal, or paths, also of data sets, of one name and options, and only the new is there."""
    if old == new or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    (old, *old_options), (new, *new_options) = (name.split(":") for name in (old, new))
    alike = Path(old).name == Path(new).name and old_options == new_options
    return alike and not os.path.exists(old) and os.path.exists(new)


def renamed(history, before, now):
    """The measurements of a training under the names that its sources and targets have now."""
    old, new = ([*(one.get("source") or ()), *(one.get("target") or ())] for one in (before, now))
    places = {str(one).split(":")[0]: str(other).split(":")[0] for one, other in zip(old, new, strict=False)}
    named = [entry["target"].partition(":") for entry in history]
    names = ["".join((places.get(place, place), *options)) for place, *options in named]
    return [entry | {"target": name} for entry, name in zip(history, names, strict=True)]


def save_checkpoint(output_dir, step, state, model, optimizer, *, accelerator, limit=None):
    """Write `checkpoint-STEP` and return its path; every process must call this.

    Then the oldest checkpoints beyond `limit` are removed, and those of later steps: they belong to an older training
    that this one replaces.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    part = Path(output_dir) / f".checkpoint-{step}.part"
    main = accelerator.is_main_process
    if main:
        for leftover in Path(output_dir).glob(".checkpoint-*"):
            shutil.rmtree(leftover)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        write_share(part, model, optimizer, accelerator)
        accelerator.wait_for_everyone()
        if main:
            seal(part, state)
    # For a full disk, torch and safetensors raise their own error classes.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(output_dir).free / 1e9
        raise OSError(f"{final} could not be written ({free:.1f} GB are free there): {error}") from error
    if main:
        replaced = final.with_name(f".{final.name}.old")
        if final.exists():
            os.replace(final, replaced)
        os.replace(part, final)
        shutil.rmtree(replaced, ignore_errors=True)
        checkpoints = list_checkpoints(output_dir)
        kept_steps = [number for number in checkpoints if number <= step][-(limit or 0) :]
        for number in checkpoints.keys() - set(kept_steps):
            put_away(checkpoints[number])
    accelerator.wait_for_everyone()
    return final


def write_share(part, model, optimizer, accelerator):
    """Write this process's part of a checkpoint."""
    torch.save(random_states(), part / f"rng-{accelerator.process_index}.pt")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.save_checkpoint(str(part / "deepspeed"), "state", exclude_frozen_parameters=True)
        return
    tensors, state = changing_tensors(accelerator.unwrap_model(model)), optimizer.state_dict()
    if splitter(accelerator) == "FSDP":
        from utils.sharding import put_together

        tensors, state = put_together(tensors, state, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        save_file({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, part / MODEL)
        states = {"optimizer": state}
        if accelerator.scaler is not None:
            states["scaler"] = accelerator.scaler.state_dict()
        torch.save(states, part / OPTIMIZER)


def seal(part, state):
    """Write the state and the digests of all files, and wait until everything is on the disk."""
    (part / STATE).write_text(to_json(state))
    names = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
    (part / MANIFEST).write_text(to_json({"files": {name: sha256(part / name) for name in names}}))
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def put_away(path):
    """Rename a checkpoint to a hidden name and remove it: a killed process leaves no incomplete checkpoint."""
    hidden = path.with_name(f".{path.name}.old")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def load_checkpoint(path, model, optimizer, *, accelerator):
    """Load model, optimizer, loss scale and random states from a checkpoint that `read_state` has checked."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if not (path / "deepspeed").is_dir():
            raise ValueError(f"{path} was written without DeepSpeed; continue without it")
        from utils.sharding import load_deepspeed

        load_deepspeed(path / "deepspeed", model, load_plain)
    else:
        if not (path / MODEL).is_file():
            raise ValueError(f"{path} was written with DeepSpeed; continue with it")
        bare = accelerator.unwrap_model(model)
        tensors, expected = load_file(path / MODEL), changing_tensors(bare)
        if unlike := sorted(
            name for name in {**tensors, **expected} if _shape(tensors, name) != _shape(expected, name)
        ):
            raise ValueError(f"{path} holds another model: {', '.join(unlike[:3])} differ in shape or are missing")
        saved = load_plain(path / OPTIMIZER)
        if splitter(accelerator) == "FSDP":
            from utils.sharding import shares_of

            tensors, saved["optimizer"] = shares_of(tensors, expected, saved["optimizer"], optimizer)
        bare.load_state_dict(tensors, strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        if (accelerator.scaler is None) != ("scaler" not in saved):
            raise ValueError(f"{path} was written with another --mixed_precision")
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
    states = path / f"rng-{accelerator.process_index}.pt"
    # With more processes than before, the new ones find no state in the checkpoint and keep their current one.
    if states.is_file():
        set_random_states(load_plain(states))


def load_plain(path, map_location="cpu"):
    """Tensors and plain values from a torch.save file; code in the file is an error and does not run."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        # torch's advice to allow the found classes is left out.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]
        raise ValueError(f"{path} holds more than tensors and plain values, or is damaged: {reason}") from None


def changing_tensors(model):
    """The tensors of a model that training changes: trained parameters and all buffers."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in frozen}


def _shape(tensors, name):
    return tensors[name].shape if name in tensors else None


def random_states():
    """The random states of Python, NumPy and torch, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": [position, has_gauss, cached]},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states):
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    np.random.set_state(("MT19937", numpy["keys"].numpy().astype(np.uint32), *numpy["rest"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
