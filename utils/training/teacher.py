"""State beside the trained weights: a mean teacher, and buffers whose sizes change with the clusters."""

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


def teacher_of(model):
    """A copy of a model for the running mean of its weights.

    The weights are buffers: a checkpoint holds them, but no optimizer and no exchange of gradients sees them.
    """
    teacher = copy.deepcopy(model)
    for module in list(teacher.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone())
    return teacher


@torch.no_grad()
def move_teacher(teacher, model, keep):
    """weight <- keep weight + (1 - keep) model's weight; averages of BatchNorm are the teacher's own."""
    weights = dict(teacher.named_buffers())
    for name, parameter in model.named_parameters():
        weights[name].lerp_(parameter, 1 - keep)


def running_mean(keep):
    """For `AveragedModel`. Whole numbers are copied: means of Swin's table of places would be cut off, one too low."""
    mean = get_ema_multi_avg_fn(keep)

    def update(averages, values, count):
        if averages[0].is_floating_point():
            mean(averages, values, count)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    return update


def warmed_momentum(momentum, step):
    """What a teacher keeps in a step, from 0: a plain mean of the weights so far, until that is `momentum`."""
    return min(1 - 1 / (step + 1), momentum)


def buffer_shapes(module):
    """{name: shape} of a module's buffers."""
    return {name: list(buffer.shape) for name, buffer in module.named_buffers()}


def reshape_buffers(module, shapes):
    """Give buffers the shapes that a checkpoint has, before it is loaded; their values are zeros."""
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        owner = module.get_submodule(owner)
        setattr(owner, attribute, getattr(owner, attribute).new_zeros(shape))
