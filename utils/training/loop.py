"""The loop every training runs: epochs and steps from where a checkpoint stands, logs, measurements, a way to stop."""

import random
from pathlib import Path

import torch
from tqdm.auto import tqdm

from utils.training.checkpoints import find_checkpoint, save_checkpoint
from utils.training.log import StepLog, StopSignal


def train_epochs(
    args,
    accelerator,
    state,
    loader,
    sampler,
    rates,
    *,
    kept,
    optimizer,
    num_steps,
    step,
    measure,
    before=None,
    rows=None,
):
    """All epochs from where `state` stands. Returns the checkpoint's path if SIGTERM ended them, else None.

    `step(batch)` takes one step and returns its values, `measure(epoch)` evaluates, `before(epoch)` is called when an
    epoch starts anew or goes on. `kept` is the module whose tensors a checkpoint holds, `rows(batch indices)` names
    images for an error. `sampler` is a `RemainingBatches`, `loader` gives batches that hold their `indices`.
    """
    log = StepLog(Path(args.output_dir) / "log.jsonl", accelerator, every=args.log_every, describe=rows)
    # Another run's checkpoint may be gone on with in a new folder.
    came_from = state["step"] and find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    log.cut(state["step"], beside=came_from.parent / "log.jsonl" if came_from else None)
    stop, saved = StopSignal(), state["step"]
    bar = tqdm(
        total=min(num_steps, args.max_train_steps or num_steps),
        initial=state["step"],
        desc="training",
        disable=None if accelerator.is_main_process else True,
    )

    def save():
        log.flush()
        limit = args.checkpoints_total_limit
        return save_checkpoint(
            args.output_dir, state["step"], state, kept, optimizer, accelerator=accelerator, limit=limit
        )

    while state["epoch"] <= args.num_train_epochs and not done(args, state):
        epoch = state["epoch"]
        sampler.set_epoch(epoch, done=state["batch"])
        if before is not None:
            before(epoch)
        for batch in loader:
            rate = rates.set(epoch, state["step"])
            # Swin drops paths by torch's own generator, from which measurements and loaders draw too.
            torch.manual_seed(seed_of(args.seed, state["step"], accelerator.process_index))
            values = step(batch)
            state["step"], state["batch"] = state["step"] + 1, state["batch"] + 1
            bar.update()
            if log.add(state["step"], epoch, rate, values, batch["indices"]):
                bar.set_postfix({name: f"{log.last[name]:.3f}" for name in values}, refresh=False)
                if stop.asked(accelerator):
                    return save()
            if done(args, state):
                break
            if state["step"] % args.checkpointing_steps == 0:
                saved = state["step"]
                save()
        # A training that --max_train_steps cuts keeps its place in the epoch, for one that goes on.
        ended = done(args, state)
        if not ended:
            state["epoch"], state["batch"] = epoch + 1, 0
        if epoch % args.eval_every == 0 or epoch == args.num_train_epochs or ended:
            log.flush()
            measure(epoch)
    if state["step"] > saved:
        save()
    bar.close()
    stop.close()
    return None


def seed_of(seed, step, process):
    """Of what a step drops out on one process: again the same after a resume."""
    return random.Random(f"paths/{seed}/{step}/{process}").getrandbits(62)


def done(args, state):
    return args.max_train_steps is not None and state["step"] >= args.max_train_steps


def name_images(accelerator, dataset, rows):
    """The images of a batch, of all processes, for an error; the first 64 of a large one."""
    rows = sorted(set(accelerator.gather(rows.to(accelerator.device)).tolist()))
    more = f" and {len(rows) - 64} others" if len(rows) > 64 else ""
    return f"Images of that batch: {', '.join(dataset[row]['path'] for row in rows[:64])}{more}. "
