"""Solvers by which images are drawn: of noise schedules, and of flow matching."""

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

# An image depends only on its seed: the last two also draw noise in their steps, from the generator of the image.
NOISE_SOLVERS = {
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "ddim-trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
WITH_NOISE = ("lcm", "tcd")
FLOW_EULER = "flow-euler"


def noise_solver(name, config, steps, shape):
    """One of NOISE_SOLVERS, ready for `steps`."""
    solver = solver_of(name, config)
    solver.set_timesteps(steps)
    return solver


def solver_of(name, config):
    """One of NOISE_SOLVERS for a model, from the configuration of the model's own scheduler."""
    solver_class, options = NOISE_SOLVERS[name]
    return solver_class.from_config(config, **options)


def flow_solver(config, steps, num_patches, sigmas=None):
    """Euler's steps along the flow; where the shift depends on the size of an image, `num_patches` is that size."""
    solver = FlowMatchEulerDiscreteScheduler.from_config(config)
    shift = {}
    if solver.config.use_dynamic_shifting:
        low, high = (solver.config[f"{end}_image_seq_len"] for end in ("base", "max"))
        start, end = solver.config.base_shift, solver.config.max_shift
        shift = {"mu": start + (end - start) * (num_patches - low) / (high - low)}
    solver.set_timesteps(steps, sigmas=sigmas, **shift)
    return solver


def scaled(solver, latents, step):
    """Latents as the network takes them in a step."""
    return solver.scale_model_input(latents, step) if hasattr(solver, "scale_model_input") else latents


def first_strength(solver):
    """The factor of the first noise."""
    return getattr(solver, "init_noise_sigma", torch.tensor(1.0))
