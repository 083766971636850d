"""The feedback of a diffusion model to an encoder: its balance with other losses, and what the condition says."""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from utils.batches.transforms import test_transform
from utils.diffusion.latents import fixed_draws, image_for_vae
from utils.diffusion.schedule import noise_loss

# Of the numbers of `examined`.
FEEDBACK_WORDS = (
    "own, another, zero: noise loss on fixed noise under the image's own condition, another image's, and zeros. "
    "another_worse: how much more it is under another's; the condition is alive if that is above its deviation over "
    "draws of noise. gradient_ratio, gradient_cosine: the gradient of L_ldm at the features beside that of the other "
    "losses. entropy, top: of the probabilities of identities. effective_rank: of the prompts. matters_at: the "
    "timestep about which another's condition is worse most."
)
# Draws of noise that each evaluation looks at the condition with.
DRAWS = 4


class GradientBalance(nn.Module):
    """Scales the gradient that the noise loss sends to features to `share` of the gradient of the other losses there.

    Give the noise loss `balance(features)` and the other losses the features; call `update` after each backward pass.
    The factor follows the norms of earlier steps, at first their mean, later smoothed, and is 0 before the first; a
    checkpoint holds it. A gradient that is rounding alone, as under equal prompts, is not scaled up.
    """

    # Ratios below float32's rounding are noise.
    SMOOTHING, LEAST = 0.9, 2e-7

    def __init__(self, share):
        super().__init__()
        self.share, self.measured = share, None
        # log |gradient of the other losses| / |gradient of the noise loss|; nan before the first step.
        self.register_buffer("log_ratio", torch.tensor(torch.nan))
        self.register_buffer("count", torch.tensor(0.0))

    @property
    def factor(self):
        return (self.share * self.log_ratio.exp()).nan_to_num(0.0)

    def forward(self, features):
        factor, scaled = self.factor, features.view_as(features)
        scaled.register_hook(lambda gradient: gradient * factor)
        # What arrives here is not scaled yet.
        self.measured = features, scaled.view_as(scaled)
        for tensor in self.measured:
            tensor.retain_grad()
        return self.measured[1]

    @torch.no_grad()
    def update(self, mean):
        """Measure both gradients, with a mean over processes; returns this step's factor and the share it led to."""
        factor = ratio = torch.zeros_like(self.log_ratio)
        if self.measured is not None:
            total, of_noise = mean(torch.stack([tensor.grad for tensor in self.measured]))
            factor, self.measured = self.factor, None
            log_ratio = ((total - factor * of_noise).norm() / of_noise.norm()).log()
            kept = (self.count / (self.count + 1)).clamp(max=self.SMOOTHING)
            smoothed = torch.where(self.log_ratio.isnan(), log_ratio, log_ratio.lerp(self.log_ratio, kept))
            # A step whose gradients overflow in half precision says nothing.
            counts = smoothed.isfinite() & (log_ratio < -math.log(self.LEAST))
            self.log_ratio.copy_(torch.where(counts, smoothed, self.log_ratio))
            self.count += counts
            ratio = (factor / log_ratio.exp()).nan_to_num(0.0, 0.0)
        return {"feedback_scale": factor, "feedback_ratio": ratio}


@torch.no_grad()
def examined_images(model, vae, images, labels, size, *, autocast, seed, pictured=()):
    """(numbers, rows of pictures) about the conditions of images (PIL); `size` is that of the VAE's input.

    A row for each image in `pictured`: the image, and what comes out of its noised latents under its own condition and
    under that of the row before. Leaves the model in eval mode.
    """
    encoder, device, home = model.encoder, labels.device, vae.device
    transform = test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, "bicubic")
    model.eval()
    with autocast():
        features = encoder.backbone(torch.stack([transform(image) for image in images]).to(device))
        seen = torch.stack([image_for_vae(image, size) for image in images])
        draws = fixed_draws(vae.to(device), seen, seed, DRAWS, model.schedule.num_steps)
        condition, numbers = examined(model, features, labels, draws)
        rows, shown = list(pictured), encoder.image_size
        columns = [[images[row].convert("RGB").resize(shown[::-1]) for row in rows]]
        noised = *(drawn[rows] for drawn in draws[0][:2]), numbers["matters_at"]
        for tokens in (condition[rows], condition[rows].roll(1, 0)) if rows else ():
            columns.append(decode(vae, denoise(model.unet, model.schedule, tokens, *noised), shown))
    vae.to(home)
    return numbers, list(zip(*columns, strict=True))


def examined(model, features, labels, draws):
    """(condition of each image, numbers about the conditions), of a DCAC model and features (B, D) of its backbone.

    `draws`: several (latents, noise, timesteps) of the images. FEEDBACK_WORDS explains the numbers. The neck's
    statistics are of these images, as in training; those of a bottleneck are its running averages.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        inputs = model.scored(features.float(), *model.neck_again(features.float()))
        own = model.condition(*inputs, labels, model.memory)
        numbers = {"effective_rank": effective_rank(model.condition.prompts)}
        if model.condition.kind == "correlation":
            p = model.condition.identity_probabilities(*inputs, model.memory)
            numbers |= {"entropy": float(torch.special.entr(p).sum(-1).mean()), "top": float(p.max(-1).values.mean())}
    conditions = own, own.roll(1, 0), torch.zeros_like(own)
    errors = partial(noise_loss, model.unet, model.schedule, reduction="none")
    with torch.no_grad():
        rows = [torch.stack([model.in_passes(errors, *draw, one) for one in conditions]) for draw in draws]
    # Of draws, conditions, and images.
    losses = torch.stack(rows).flatten(3).mean(3)
    worse = (losses[:, 1] - losses[:, 0]).mean(1)
    numbers |= dict(zip(("own", "another", "zero"), losses.mean((0, 2)).tolist(), strict=True))
    numbers |= {"another_worse": float(worse.mean()), "another_worse_std": float(worse.std())}
    numbers["matters_at"] = where_largest(losses[:, 1] - losses[:, 0], draws, model.schedule.num_steps)
    return own, numbers | gradients_at_features(model, features, labels, *draws[0])


def middle_of(mask):
    """The middle one of the rows of an identity; the first is of its first camera, which may be unlike the others."""
    rows = mask.nonzero().flatten()
    return int(rows[len(rows) // 2])


def where_largest(values, draws, num_steps, num_parts=8):
    """The timestep in the middle of that part of the schedule where the mean of values (draws, images) is largest."""
    timesteps = torch.stack([timesteps for _, _, timesteps in draws])
    parts = F.one_hot(timesteps * num_parts // num_steps, num_parts).to(values)
    means = torch.einsum("di,dip->p", values, parts) / parts.sum((0, 1))
    return int((means.nan_to_num(-torch.inf).argmax() + 0.5) * num_steps / num_parts)


@torch.enable_grad()
def gradients_at_features(model, features, labels, latents, noise, timesteps):
    """Norm of the noise loss' gradient by that of the others at features (B, D), and cosine; scaled for float16."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.detach().float().requires_grad_()
        outputs = logits, bn_features = model.neck_again(features)
        losses = [sum(model.identity_losses(features, bn_features, logits, labels).values())]
        condition = model.condition(*model.scored(features, *outputs), labels, model.memory)
    losses.append(model.in_passes(model.denoise, latents, noise, timesteps, condition).mean())
    others, of_noise = (
        torch.autograd.grad(2**16 * loss, features, retain_graph=True, materialize_grads=True)[0].cpu().double()
        for loss in losses
    )
    ratio = of_noise.norm() / others.norm()
    cosine = (others * of_noise).sum() / (others.norm() * of_noise.norm())
    return {"gradient_ratio": float(ratio.nan_to_num(0.0)), "gradient_cosine": float(cosine.nan_to_num(0.0))}


def effective_rank(prompts):
    """exp(entropy of the singular values, by their sum): 1 if all prompts are equal, at most their number."""
    # In parts: whole captions of a large set would take a gigabyte in float64.
    gram = sum(part.double() @ part.double().t() for part in prompts.detach().cpu().flatten(1).split(4096, 1))
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())


@torch.no_grad()
def denoise(unet, schedule, condition, latents, noise, start, *, num_steps=10):
    """Add noise to latents up to the timestep `start`, then denoise with `condition`, by DDIM."""
    times = torch.linspace(start, 0, num_steps + 1).long().tolist()
    times = [torch.full((len(latents),), time, device=latents.device) for time in times]
    dtype = next(unet.parameters()).dtype
    noised = schedule.add_noise(latents, noise, times[0])
    for now, then in pairwise(times):
        prediction = unet(noised.to(dtype), now, encoder_hidden_states=condition.to(dtype)).sample.float()
        clean = schedule.denoised(noised, prediction, now)
        signal, strength = schedule.parts(noised, now)
        noised = schedule.add_noise(clean, (noised - signal * clean) / strength, then)
    return clean


@torch.no_grad()
def decode(vae, latents, size):
    """Decode latents to PIL pictures of `size` (height, width)."""
    shift = vae.config.get("shift_factor") or 0.0
    decoded = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.device, vae.dtype)).sample
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC) for picture in pixels]
