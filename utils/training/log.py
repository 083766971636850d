"""`log.jsonl`, one line per step, and the handling of SIGTERM and Ctrl-C between steps."""

import json
import math
import os
import signal
from pathlib import Path

import torch


class StepLog:
    """`log.jsonl`: one line per step, written in whole lines, and equal for two equal runs.

    Values are tensors that stay on the device until `flush`, which reads them all at once, averages them over the
    processes, and raises if one is not finite.
    """

    def __init__(self, path, accelerator, *, every=1, describe=None):
        self.path, self.accelerator, self.every = Path(path), accelerator, every
        # Turns the rows of a step into text for an error.
        self.describe = describe or (lambda rows: "")
        self.waiting, self.last = [], None

    def cut(self, step, beside=None):
        """Keep the lines up to a checkpoint's step, from the log `beside` it if there is one; 0 starts a new log."""
        if self.accelerator.is_main_process:
            path = beside if beside is not None and beside.exists() else self.path
            lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
            kept_lines = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
            if len(kept_lines) < step:
                self.accelerator.print(
                    f"{path} has {len(kept_lines)} of the {step} lines before the checkpoint: curves have a gap"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(self.path.name + ".part")
            part.write_text("".join(kept_lines))
            os.replace(part, self.path)
        self.accelerator.wait_for_everyone()

    def add(self, step, epoch, lr, values, rows=None):
        """Add a step's values; returns whether lines were written."""
        self.waiting.append(({"step": step, "epoch": epoch, "lr": lr}, values, rows))
        if len(self.waiting) >= self.every:
            self.flush()
        return not self.waiting

    def flush(self):
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        names = list(waiting[0][1])
        table = torch.stack(
            [torch.stack([values[name].detach().float() for name in names]) for _, values, _ in waiting]
        )
        # The gradient norm and losses of the whole batch are equal on all processes; other values differ.
        table = self.accelerator.reduce(table, reduction="mean")
        lines = [
            head | dict(zip(names, row, strict=True))
            for (head, _, _), row in zip(waiting, table.tolist(), strict=True)
        ]
        bad = [self.not_finite(line, names) for line in lines]
        good = next((number for number, problem in enumerate(bad) if problem), len(lines))
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write("".join(json.dumps(_without_infinity(line)) + "\n" for line in lines[:good]))
        for line in lines[:good]:
            self.accelerator.log({name: line[name] for name in ("lr", *names)}, step=line["step"])
            self.last = line
        if good < len(lines):
            raise ValueError(
                f"not finite at step {lines[good]['step']}: {bad[good]}. {self.describe(waiting[good][2])}"
                "Lower --learning_rate, or train without --mixed_precision fp16; the last checkpoint is kept"
            )

    def not_finite(self, line, names):
        # With a loss scale the norm may overflow: the scaler skips that step and lowers the scale.
        allowed = ("grad_norm",) if self.accelerator.scaler else ()
        bad = [name for name in names if not math.isfinite(line[name]) and name not in allowed]
        return ", ".join(f"{name} {line[name]}" for name in bad)


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _without_infinity(line):
    return {name: value if math.isfinite(value) else None for name, value in line.items()}


class StopSignal:
    """Records SIGTERM, which clusters send before they kill, and Ctrl-C, for a checkpoint between two steps.

    A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received = None
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])
            # `print` is not to be called in the middle of a print.
            os.write(2, b"\nCtrl-C: a checkpoint is written after the next step; once more to stop at once\n")
        self.received = number

    @property
    def number(self):
        """The signal; another process may have received it."""
        return self.received or signal.SIGTERM

    def asked(self, accelerator):
        """Whether any process has received one; all processes must ask at the same place."""
        if accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor(float(self.received is not None), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
