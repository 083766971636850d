"""The optimizer and its learning rate."""

import torch
from diffusers.optimization import get_scheduler

from utils.flags import MULTISTEP
from utils.launch import eight_bit_optimizers


def build_optimizer(
    groups, name="adam", *, learning_rate, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8, use_8bit=False,
    nesterov=False,
):  # fmt: skip
    """adam (weight decay as L2), adamw (decoupled) or sgd (momentum betas[0]) over parameter groups.

    `use_8bit`: True for bitsandbytes, whose Adam decouples the decay too, or "torchao".
    """
    if use_8bit:
        if name == "sgd":
            raise ValueError("--use_8bit_adam goes with --optimizer adam or adamw, not sgd")
        optim = eight_bit_optimizers(use_8bit)
        kind = optim.Adam8bit if name == "adam" else optim.AdamW8bit
        return kind(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay)
    if name == "sgd":
        options = {"momentum": betas[0], "weight_decay": weight_decay, "nesterov": nesterov}
        return torch.optim.SGD(groups, lr=learning_rate, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay)


def warmup_multistep(epoch, warmup_epochs, warmup_factor, milestones, gamma):
    """Factor on the learning rate in an epoch (from 1): linear from `warmup_factor` at epoch 0, then steps down."""
    if epoch < warmup_epochs:
        return warmup_factor + (1 - warmup_factor) * epoch / warmup_epochs
    return gamma ** sum(epoch >= milestone for milestone in milestones)


class LearningRate:
    """Sets each group's rate to its `initial_lr` times a factor of (epoch, step): no state is needed to resume.

    `warmup_multistep` depends on the epoch; diffusers' schedules depend on the step out of `num_steps`. `name` may be
    a function of epoch and step instead: it returns the factor.
    """

    def __init__(
        self, optimizer, name=MULTISTEP, *, warmup_epochs=0, warmup_factor=0.1, milestones=(), gamma=0.1,
        warmup_steps=0, num_steps=None,
    ):  # fmt: skip
        # Not the groups themselves: loading a state replaces them.
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        if callable(name):
            self.factor = name
        elif name == MULTISTEP:
            self.factor = lambda epoch, step: warmup_multistep(epoch, warmup_epochs, warmup_factor, milestones, gamma)
        else:
            # diffusers' schedules are factors that depend on the step, and one of them on the rate too. The optimiser
            # below only holds them.
            rate = optimizer.param_groups[0]["initial_lr"]
            carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
            by_step = get_scheduler(name, carrier, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
            self.factor = lambda epoch, step: by_step.lr_lambdas[0](step)

    def set(self, epoch, step):
        """Set the rates for the next step: `epoch` from 1, `step` from 0. Returns the first group's rate."""
        factor = self.factor(epoch, step)
        rates = [group["initial_lr"] * factor for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            # torchao holds its rates in tensors.
            group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate
        return rates[0]
