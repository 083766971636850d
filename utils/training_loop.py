"""The loop around a script's training step: learning rate, log, measurements, checkpoints, SIGTERM.

The step itself, and what is measured, stand in the script.
"""

from pathlib import Path

from tqdm.auto import tqdm

from utils.checkpoints import save_checkpoint
from utils.training import StepLog, StopSignal


def train_epochs(args, accelerator, state, model, optimizer, loader, sampler, rates, *, step, measure, describe=None):
    """All epochs from where `state` stands. Returns the checkpoint's path if SIGTERM ended them, else None.

    `loader` draws from `sampler`, a RemainingBatches. `step(batch)` trains on a batch and returns the values to log,
    tensors on the device; `measure(epoch)` is called every `args.eval_every` epochs and at the end; `describe(rows)`
    turns `batch["indices"]` into what an error should name.
    """
    log = StepLog(Path(args.output_dir) / "log.jsonl", accelerator, every=args.log_every, describe=describe)
    log.cut(state["step"])
    stop, saved = StopSignal(), state["step"]
    steps = sampler.steps_of(args.num_train_epochs)
    bar = tqdm(
        total=min(steps, args.max_train_steps or steps),
        initial=state["step"],
        desc="training",
        disable=None if accelerator.is_main_process else True,
    )

    def done():
        return args.max_train_steps is not None and state["step"] >= args.max_train_steps

    def save():
        log.flush()
        limit = args.checkpoints_total_limit
        return save_checkpoint(
            args.output_dir, state["step"], state, model, optimizer, accelerator=accelerator, limit=limit
        )

    while state["epoch"] <= args.num_train_epochs and not done():
        epoch = state["epoch"]
        sampler.set_epoch(epoch, done=state["batch"])
        model.train()
        for batch in loader:
            rate = rates.set(epoch, state["step"])
            values = step(batch)
            state["step"], state["batch"] = state["step"] + 1, state["batch"] + 1
            bar.update()
            if log.add(state["step"], epoch, rate, values, batch["indices"]):
                bar.set_postfix({name: f"{log.last[name]:.3f}" for name in values}, refresh=False)
                if stop.asked(accelerator):
                    return save()
            if done():
                break
            if state["step"] % args.checkpointing_steps == 0:
                saved = state["step"]
                save()
        # A training that --max_train_steps cuts keeps its place in the epoch, for one that goes on.
        ended = done()
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
