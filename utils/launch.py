"""Start and end of a script: the accelerator, helpers for several processes, and errors in one line.

accelerate is imported where it is first needed: filter_generated.py can choose from existing scores without it.
"""

import ctypes
import json
import os
import platform
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError

from utils.flags import STANDINS

SCRIPTS = (
    "adapt_reid.py", "app.py", "evaluate.py", "filter_generated.py", "finetune_reid.py", "pretrain_backbone.py",
    "train_dcac.py", "train_dreambooth_reid.py",
)  # fmt: skip


def check_folder(folder, script):
    """ValueError where `folder` cannot be written to, or holds results of another of our scripts.

    Scripts must not overwrite each other's results. A copy of a script may use the folder of its original.
    """
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--output_dir {folder}: {place} is no folder that can be written to; give another")
    try:
        command = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))["command"]
        words = [word for word in command.split() if word.endswith(".py")] if isinstance(command, str) else command
        owner = words[0]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if owner in SCRIPTS and owner != script:
        raise ValueError(f"{folder} holds what {owner} left; give another --output_dir")


def end_with(main, args, script, *, lean="lower --train_batch_size, or add --gradient_checkpointing", kept=None):
    """Run main(args) and exit. Errors that a user can fix are printed in one line.

    `lean` says what to do when GPU memory is full. `kept` says what a failed write leaves; default: everything stays
    as it was.
    """
    kept = kept or f"checkpoints and results in {args.output_dir} are as they were before"
    try:
        check_folder(args.output_dir, script)
        code = main(args)
    except ValueError as error:
        # `python -X dev` shows where.
        if sys.flags.dev_mode:
            raise
        message = str(error)
    except (OSError, SafetensorError) as error:
        message = f"{error}; {kept}"
    except RuntimeError as error:
        name = type(error).__name__
        if str(error).startswith("DataLoader worker"):
            message = f"{error}; lower --dataloader_num_workers, or give more shared memory (docker run --shm-size 8g)"
        elif name in ("OutOfMemoryError", "LostProcess"):
            message = f"{error}; {lean if name == 'OutOfMemoryError' else kept}"
        else:
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        # Other values that a main returns are for its callers in Python.
        sys.exit(code if isinstance(code, int) else 0)
    sys.exit(f"{script}: {' '.join(message.split())}")


def use_all_cores(num_processes):
    """Use all cores in a single process on the CPU; `accelerate launch` sets OMP_NUM_THREADS to 1 by default."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_accelerate and num_processes == 1:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(allowed)


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory():
    """Let glibc's malloc keep what is freed; other systems and allocators are left as they are.

    Otherwise it gives large blocks back, and a network on the CPU spends up to half of its time on new pages.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def start_accelerator(mixed_precision=None, *, patient=False, handlers=(), **options):
    """The Accelerator of any script. A run without a GPU prints a line about it.

    `patient`: processes wait for each other without a time limit. `options` are those of `Accelerator`.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # Otherwise output to a file or a pipe appears only when its buffer is full: after hours of training.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    # Without `cpu`, accelerate treats torchrun's processes on a machine without a GPU as separate single processes.
    options = {"cpu": on_cpu()} | options
    if patient:
        handlers = [*handlers, InitProcessGroupKwargs(timeout=timedelta(days=365))]
    here = precision_here(mixed_precision)
    accelerator = Accelerator(mixed_precision=here, kwargs_handlers=list(handlers), **options)
    if here != mixed_precision:
        reasons = {"fp16": "this GPU has no bf16: computing in fp16", "no": "fp16 needs a GPU: computing in float32"}
        accelerator.print(reasons[here])
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
        keep_freed_memory()
        in_half = accelerator.mixed_precision != "no"
        slow = f", in {accelerator.mixed_precision}, which few CPUs compute fast" if in_half else ""
        accelerator.print(f"No GPU found, running on the CPU{slow}")
    return accelerator


def on_cpu():
    """Whether there is no GPU to compute on, or none is wanted; Apple's know no float64, which measurements need."""
    unwanted = asked("ACCELERATE_USE_CPU") or torch.backends.mps.is_available()
    return unwanted or not torch.accelerator.is_available()


def precision_here(mixed_precision):
    """The precision asked for, or another where the machine cannot compute in it; None leaves it to accelerate."""
    wanted = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wanted == "bf16" and not on_cpu() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "no" if wanted == "fp16" and on_cpu() else mixed_precision


def leave_interrupts(worker):
    """For the workers of a loader: Ctrl-C, which all processes of a terminal get, is for the script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_training(args, *, find_unused_parameters=False, max_zero_stage=2, fsdp=False):
    """The Accelerator of a training script: one process, DDP, DeepSpeed, or FSDP2 where it uses `prepare` below.

    What it does with a model under ZeRO-3 and FSDP2, apart from training it, stands in `whole_weights`.
    """
    from accelerate import DistributedDataParallelKwargs, PartialState
    from accelerate.utils import DistributedType

    cpu, settings = on_cpu(), None
    if asked("ACCELERATE_USE_FSDP"):
        from utils.sharding import fsdp_settings

        settings = fsdp_settings(args, cpu, fsdp)
    elif cpu and asked("ACCELERATE_USE_DEEPSPEED"):
        # With `cpu`, accelerate ignores DeepSpeed: the processes are connected first, and then the setting is removed.
        PartialState(cpu=True)
        os.environ["ACCELERATE_USE_CPU"] = "false"
        cpu = False
    accelerator = start_accelerator(
        args.mixed_precision,
        cpu=cpu,
        log_with=check_trackers(args.report_to) or None,
        project_dir=args.output_dir,
        patient=True,
        # Buffers are computed from the whole batch, so they are equal on all processes.
        handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=find_unused_parameters)
        ],
    )
    accelerator.fsdp_settings = settings
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from utils.sharding import set_up_deepspeed

        set_up_deepspeed(accelerator, args, max_zero_stage)
    elif kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(f"distributed training by {kind.value} is not known here; use DDP, FSDP2 or DeepSpeed")
    if getattr(args, "use_8bit_adam", False):
        eight_bit_optimizers(args.use_8bit_adam)
    if args.push_to_hub:
        check_login()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def check_login():
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(f"--push_to_hub needs a login that works: {error}; run `hf auth login`") from None


def asked(name):
    """Whether `accelerate launch` asks for one of its ways to train, by the environment."""
    return os.environ.get(name, "false").lower() == "true"


def splitter(accelerator):
    """What splits the training among the processes and owns the weights for that: FSDP, DeepSpeed or None."""
    if getattr(accelerator, "fsdp_settings", None) is not None:
        return "FSDP"
    return "DeepSpeed" if accelerator.distributed_type.value == "DEEPSPEED" else None


def prepare(accelerator, model, networks, build_optimizer):
    """(model, optimizer) ready for training. FSDP2 splits the blocks of `networks` one by one, then the rest.

    `build_optimizer()` is called when the model has the parameters that will be trained.
    """
    if splitter(accelerator) != "FSDP":
        return accelerator.prepare(model, build_optimizer())
    from utils.sharding import split

    split(model, networks, accelerator.fsdp_settings, accelerator.device)
    return model, accelerator.prepare(build_optimizer())


def whole_weights(model, accelerator):
    """A context in which every process holds all weights whole; under ZeRO-3 and FSDP2 each holds a part of them."""
    owner = splitter(accelerator)
    if owner == "FSDP":
        from utils.sharding import all_whole

        return all_whole(model, accelerator.device)
    if owner == "DeepSpeed" and model.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        return unwrap_model_for_generation(model)
    return nullcontext()


def print_notes(accelerator, notes):
    """What a reader of another project's weights did or left out."""
    for note in notes:
        accelerator.print(note)


def global_batch_size(args, accelerator):
    """Images in one step: over all accumulated batches and all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def gather_with_gradient(tensor):
    """The whole batch from all processes' shares, in order, with gradient; accelerate's `gather` has no gradient."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


def own_rows(whole, count):
    """The rows of a gathered batch that are this process's, as a slice; `count` is the size of its share."""
    start = torch.distributed.get_rank() * count if len(whole) > count else 0
    return slice(start, start + count)


def check_trackers(names):
    """The list for `Accelerator(log_with=...)`; ValueError for one that is unknown or not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    names = [name for name in names or () if name != "none"]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"--report_to {name} is unknown; known: none, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if LoggerType(name) not in get_available_trackers():
            raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {name}")
    return names


def bitsandbytes_module(flag="--use_8bit_adam"):
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{flag} needs bitsandbytes ({error}); pip install bitsandbytes") from None
    return bitsandbytes


def eight_bit_optimizers(name):
    """The module with Adam8bit and AdamW8bit that --use_8bit_adam names; True is bitsandbytes."""
    if name != "torchao":
        return bitsandbytes_module().optim
    try:
        import torchao.optim
    except ImportError as error:
        raise ValueError(f"--use_8bit_adam torchao needs torchao ({error}); pip install torchao") from None
    return torchao.optim


def tracked(args):
    """The arguments as plain values, for trackers."""
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in vars(args).items()}


def stand_ins_among(args, names, published):
    """The line about shipped stand-ins among these flags, or None; `published` has the real model of each."""
    names = [name for name in names if str(getattr(args, name)).startswith(str(STANDINS))]
    words = f"Not given: --{' and --'.join(names)}. Using the shipped stand-ins, which know drawn people only. "
    return f"{words}Real ones: {' '.join(f'--{name} {published[name]}' for name in names)}" if names else None


def introduce(args, accelerator, *, demo, stand_ins=None):
    """Print the first lines of a run: `demo` for a run without flags, `stand_ins` where it uses stand-ins by default.

    Without an accelerator, this process prints them.
    """
    say = accelerator.print if accelerator else print
    if args.demo:
        say(demo)
    elif stand_ins:
        say(stand_ins)
    elif all(args.origin.get(name) == "default" for name in ("resolution", "learning_rate")):
        say("--resolution and --learning_rate keep defaults that suit small models; --recipe sets those of real ones")
    for line in args.notes:
        say(line)
