"""Weights split among processes, by torch's `fully_shard` (FSDP2) or by DeepSpeed.

This file is opened only in a run that asks for one of the two. accelerate starts the processes and reads the settings;
FSDP2's split is made here, because accelerate makes none on CPUs, where the tests run.
"""

import os
from contextlib import contextmanager

import torch
from torch import nn

# What `fully_shard` changes in a module: its class, and these hooks.
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


# FSDP2


def fsdp_settings(args, cpu, known):
    """accelerate's settings of FSDP; ValueError for what does not work with it. `known`: whether the script does.

    The processes are connected here. accelerate's own FSDP is switched off: it starts plain data parallelism.
    """
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    settings = FullyShardedDataParallelPlugin()
    if not known:
        raise ValueError(
            "FSDP is for train_dcac.py and finetune_reid.py; start this with accelerate_configs/multi_gpu.yaml"
        )
    if settings.fsdp_version != 2:
        raise ValueError(f"fsdp_version {settings.fsdp_version} is not known here; use fsdp_version 2")
    if settings.activation_checkpointing:
        raise ValueError("fsdp_activation_checkpointing: use --gradient_checkpointing of the script instead")
    if getattr(args, "torch_compile", False):
        raise ValueError("--torch_compile has not been tried with FSDP; leave one of them out")
    if getattr(args, "use_8bit_adam", False):
        raise ValueError("--use_8bit_adam keeps a state in blocks, which FSDP cannot split; leave one of them out")
    if (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        raise ValueError("the loss scale of fp16 has not been tried with FSDP; use --mixed_precision bf16 or no")
    PartialState(cpu=cpu)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    if not torch.distributed.is_initialized():
        raise ValueError(
            "FSDP splits weights among processes, and here is one without a launcher: start it with `accelerate "
            "launch --config_file accelerate_configs/fsdp2.yaml`"
        )
    return settings


def split(model, networks, settings, device):
    """Split a model's weights among the processes, in place: the blocks of each network by themselves, then the rest.

    What is not in a block is whole from the start of the model's `forward` to the end of the backward pass. Give the
    optimizer the parameters that the model has afterwards. Gradients are means over processes, as in DDP.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise ValueError(f"FSDP cannot split {name}, a single number; start the training without FSDP")
        # `fully_shard` takes no weights in channels_last.
        parameter.data = parameter.data.contiguous()
    offloads = isinstance(settings.cpu_offload, CPUOffloadPolicy)
    options = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type != "cpu") if offloads else OffloadPolicy(),
    }
    model.whole_modules = {module: (module.__class__, hooks_of(module, copied=True)) for module in model.modules()}
    for network in filter(None, networks):
        for block in blocks_of(network):
            fully_shard(block, reshard_after_forward=settings.reshard_after_forward, **options)
    return fully_shard(model, **options)


def blocks_of(network):
    """The repeated blocks of a network: what its outermost lists hold, where that has weights."""
    for child in network.children():
        inner = child.children() if isinstance(child, nn.ModuleList) else blocks_of(child)
        yield from (block for block in inner if any(True for _ in block.parameters()))


def whole(tensor, device=None):
    """A tensor that is split among the processes, whole; all of them must call this."""
    if hasattr(tensor, "full_tensor"):
        return tensor.detach().to(device or tensor.device_mesh.device_type).full_tensor()
    return tensor


def share_of(tensor, like):
    """This process's share of a whole tensor that all of them hold, split as `like` is; other values stay."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "full_tensor") or not torch.is_tensor(tensor) or tensor.shape != like.shape:
        return tensor
    on_mesh = tensor.to(like.device_mesh.device_type, like.dtype)
    return distribute_tensor(on_mesh, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


@contextmanager
def all_whole(model, device):
    """Inside, each process holds a plain model with all weights, whose modules can be called without the others."""
    parameters = {module: dict(module._parameters) for module in model.whole_modules}
    plain = {}
    for parameter in model.parameters():
        plain[parameter] = nn.Parameter(whole(parameter, device), requires_grad=parameter.requires_grad)
    as_split = {}
    for module, (kind, hooks) in model.whole_modules.items():
        as_split[module] = module.__class__, hooks_of(module)
        take_on(module, kind, hooks, {name: plain.get(value, value) for name, value in parameters[module].items()})
    try:
        yield
    finally:
        for module, (kind, hooks) in as_split.items():
            take_on(module, kind, hooks, parameters[module])


def hooks_of(module, copied=False):
    return {name: getattr(module, name).copy() if copied else getattr(module, name) for name in HOOKS}


def take_on(module, kind, hooks, parameters):
    module.__class__ = kind
    module._parameters.update(parameters)
    for name, value in hooks.items():
        setattr(module, name, value)


def put_together(tensors, state, keep):
    """A model's tensors and an optimizer's state, whole and on the CPU; empty on processes that do not `keep` them."""
    states = {number: whole_values(values, keep) for number, values in state["state"].items()}
    return whole_values(tensors, keep), state | {"state": states}


def whole_values(values, keep):
    kept = {}
    for name, value in values.items():
        value = whole(value)
        if keep:
            kept[name] = value.cpu() if torch.is_tensor(value) else value
    return kept


def shares_of(tensors, model_tensors, state, optimizer):
    """What `put_together` made of all processes, in the shares that this process has of model and optimizer."""
    tensors = {name: share_of(tensor, model_tensors[name]) for name, tensor in tensors.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {name: share_of(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return tensors, state | {"state": states}


# DeepSpeed


def set_up_deepspeed(accelerator, args, max_zero_stage):
    """Our settings in accelerate's plugin; ValueError for what does not work with it."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage > max_zero_stage:
        raise ValueError(
            f"ZeRO-{plugin.zero_stage} splits weights that evaluation needs whole; use ZeRO-{max_zero_stage}"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("DeepSpeed in fp16 would cast all weights and buffers; use --mixed_precision bf16 or no")
    if accelerator.mixed_precision == "bf16":
        # DeepSpeed's bf16 would cast them too. This way `accelerator.autocast` uses bf16, as without DeepSpeed.
        plugin.deepspeed_config["bf16"] = {"enabled": False}
        accelerator.native_amp = True
        torch.set_autocast_dtype(accelerator.device.type, torch.bfloat16)
    if getattr(args, "use_8bit_adam", False) == "torchao":
        raise ValueError("--use_8bit_adam torchao has not been tried with DeepSpeed; leave the word torchao out")
    if plugin.zero_stage == 3:
        # Otherwise transformers splits weights while it loads them, before our model is built from them.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    plugin.deepspeed_config["gradient_accumulation_steps"] = 1
    # Our optimiser works with offloading too; DeepSpeed's own would have to be compiled first.
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    # Without a number accelerate would write 1.
    plugin.deepspeed_config["gradient_clipping"] = float(args.max_grad_norm or 0.0)


def load_deepspeed(folder, model, load):
    """Load with DeepSpeed, but by `load`, and unpickle only the classes that DeepSpeed writes; it would any."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    usual = model.checkpoint_engine.load
    model.checkpoint_engine.load = load
    try:
        with torch.serialization.safe_globals(classes):
            model.load_checkpoint(str(folder), "state", load_module_strict=False)
    finally:
        model.checkpoint_engine.load = usual
