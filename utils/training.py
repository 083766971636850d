"""What every training loop has: arguments with recipes, optimiser, learning rate, the log of steps, a way to stop."""

import json
import math
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, LoggerType
from diffusers.optimization import SchedulerType, get_scheduler
from huggingface_hub import HfApi

# Scripts find these here, beside what they train with.
from utils.arguments import check_ranges, describe_origin, end_with, parse_with_recipes  # noqa: F401
from utils.cpu import use_all_cores

OWN_SCHEDULE = "warmup_multistep"
SCHEDULES = (OWN_SCHEDULE, *(one.value for one in SchedulerType if one is not SchedulerType.PIECEWISE_CONSTANT))
# What a shell reports for a process that SIGTERM ended.
EXIT_SIGTERM = 128 + signal.SIGTERM
OPTIMIZERS = ("adam", "adamw", "sgd")


def start_accelerator(args, *, find_unused_parameters=False, max_zero_stage=2):
    """The Accelerator of a training script: one process, DDP, or DeepSpeed; ZeRO-3 needs `whole_weights` there."""
    # Into a file or a pipe, lines would wait for the buffer to fill: hours of a training.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    # Without `cpu`, accelerate takes several processes of torchrun on a machine without a GPU for single ones.
    cpu = not torch.accelerator.is_available()
    if cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        # With `cpu`, accelerate leaves DeepSpeed out: its processes are joined first, and then it is not told.
        PartialState(cpu=True)
        os.environ["ACCELERATE_USE_CPU"] = "false"
        cpu = False
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=args.mixed_precision,
        log_with=check_trackers(args.report_to) or None,
        project_dir=args.output_dir,
        # Buffers are computed from the whole batch and equal everywhere.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=find_unused_parameters)
        ],
    )
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage > max_zero_stage:
            raise ValueError(
                f"ZeRO-{plugin.zero_stage} splits weights that evaluation needs whole; use ZeRO-{max_zero_stage}"
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError("DeepSpeed in fp16 would cast all weights and buffers; use --mixed_precision bf16 or no")
        if accelerator.mixed_precision == "bf16":
            # So would its bf16; with this, `accelerator.autocast` computes in bf16 as it does without DeepSpeed.
            plugin.deepspeed_config["bf16"] = {"enabled": False}
            accelerator.native_amp = True
            torch.set_autocast_dtype(accelerator.device.type, torch.bfloat16)
        if plugin.zero_stage == 3:
            # Else transformers splits weights as it loads them, before they are put together into our model.
            from transformers.integrations import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1
        # Offloaded, our optimiser runs too; DeepSpeed's own would have to be compiled first.
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        if args.max_grad_norm:
            plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
    elif kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(f"distributed training by {kind.value} is not known here; use DDP or DeepSpeed")
    if getattr(args, "use_8bit_adam", False):
        bitsandbytes_module()
    if args.push_to_hub:
        try:
            HfApi().whoami()
        except Exception as error:
            raise ValueError(f"--push_to_hub needs a login that works: {error}; run `hf auth login`") from None
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


@contextmanager
def whole_weights(model, accelerator):
    """Under ZeRO-3 every process holds a part of each weight; while this lasts, all hold all of them."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or model.zero_optimization_stage() < 3:
        yield
        return
    from deepspeed.runtime.zero import unwrap_model_for_generation

    with unwrap_model_for_generation(model):
        yield


def global_batch_size(args, accelerator):
    """Images of one step: of all passes and processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def gather_with_gradient(tensor):
    """The whole batch from each process's share, in order; accelerate's `gather` would stop the gradient."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


def check_trackers(names):
    """The list for `Accelerator(log_with=...)`; ValueError for one that is unknown or not installed."""
    names = [name for name in names or () if name != "none"]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"--report_to {name} is unknown; known: none, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if LoggerType(name) not in get_available_trackers():
            raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {name}")
    return names


def build_optimizer(
    groups, name="adam", *, learning_rate, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8, use_8bit=False
):
    """adam (weight decay as L2), adamw (decoupled) or sgd (momentum betas[0]) over parameter groups.

    In 8 bit, bitsandbytes' Adam and AdamW both decouple the decay.
    """
    if use_8bit:
        if name == "sgd":
            raise ValueError("--use_8bit_adam goes with --optimizer adam or adamw, not sgd")
        optim = bitsandbytes_module().optim
        kind = optim.Adam8bit if name == "adam" else optim.AdamW8bit
        return kind(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=betas[0], weight_decay=weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay)


def bitsandbytes_module():
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"--use_8bit_adam needs bitsandbytes ({error}); pip install bitsandbytes") from None
    return bitsandbytes


def warmup_multistep(epoch, warmup_epochs, warmup_factor, milestones, gamma):
    """Factor on the learning rate in an epoch (from 1): linear from `warmup_factor` at epoch 0, then steps down."""
    if epoch < warmup_epochs:
        return warmup_factor + (1 - warmup_factor) * epoch / warmup_epochs
    return gamma ** sum(epoch >= milestone for milestone in milestones)


class LearningRate:
    """Sets each group's rate to its own `initial_lr` times a factor of (epoch, step), so it resumes by itself.

    `warmup_multistep` moves with epochs; diffusers' schedules with steps out of `num_steps`. A function of epoch and
    step in place of a name is the factor itself.
    """

    def __init__(
        self,
        optimizer,
        name=OWN_SCHEDULE,
        *,
        warmup_epochs=0,
        warmup_factor=0.1,
        milestones=(),
        gamma=0.1,
        warmup_steps=0,
        num_steps=None,
    ):
        # Not its groups: loading a state puts others in their place.
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if callable(name):
            self.factor = name
        elif name == OWN_SCHEDULE:
            self.factor = lambda epoch, step: warmup_multistep(epoch, warmup_epochs, warmup_factor, milestones, gamma)
        else:
            # diffusers' schedules are factors of the step, one of them also of the rate; the optimiser below only
            # carries them.
            rate = optimizer.param_groups[0]["initial_lr"]
            carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
            by_step = get_scheduler(name, carrier, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
            self.factor = lambda epoch, step: by_step.lr_lambdas[0](step)

    def set(self, epoch, step):
        """For the step about to be taken: `epoch` from 1, `step` from 0. Returns the first group's rate."""
        factor = self.factor(epoch, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return self.optimizer.param_groups[0]["lr"]


class StepLog:
    """`log.jsonl`: one line a step, in whole lines, and nothing in it that differs between two equal runs.

    Values are tensors that stay on the device until `flush`, which reads them all at once, averages them over the
    processes, and raises where one is not finite.
    """

    def __init__(self, path, accelerator, *, every=1, describe=None):
        self.path, self.accelerator, self.every = Path(path), accelerator, every
        # Turns the rows of a step into what an error should name.
        self.describe = describe or (lambda rows: "")
        self.waiting, self.last = [], None

    def cut(self, step, beside=None):
        """Keep the lines up to a checkpoint's step, of the log `beside` it where there is one; 0 starts anew."""
        if self.accelerator.is_main_process:
            path = beside if beside is not None and beside.exists() else self.path
            lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
            if len(kept) < step:
                raise ValueError(
                    f"{path} has {len(kept)} lines up to the checkpoint's step {step}: it is of another run or "
                    "damaged. Start anew without --resume_from_checkpoint, or give another --output_dir"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(self.path.name + ".part")
            aside.write_text("".join(kept))
            os.replace(aside, self.path)
        self.accelerator.wait_for_everyone()

    def add(self, step, epoch, lr, values, rows=None):
        """True when the lines were written."""
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
        # The gradient norm and the losses of the whole batch are the same everywhere; the others are shares.
        table = self.accelerator.reduce(table, reduction="mean")
        lines = [
            head | dict(zip(names, row, strict=True))
            for (head, _, _), row in zip(waiting, table.tolist(), strict=True)
        ]
        bad = [self.not_finite(line, names) for line in lines]
        good = next((number for number, found in enumerate(bad) if found), len(lines))
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
        # With a loss scale the norm may overflow: the scaler leaves out that step and lowers the scale.
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
    """SIGTERM, which clusters send before they kill: asked for between steps, so that a checkpoint can be written."""

    def __init__(self):
        self.received = False
        self.before = signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number, frame):
        self.received = True

    def asked(self, accelerator):
        """Whether any process was told to stop; all of them must ask at the same place."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())

    def close(self):
        signal.signal(signal.SIGTERM, self.before)


def tracked(args):
    """The arguments as trackers take them: plain values."""
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in vars(args).items()}
