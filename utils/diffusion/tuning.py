"""What is tuned to one identity after the other: its token, the weights, the batches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.diffusion.fast_lora import read_fast_lora
from utils.diffusion.latents import encode, image_for_vae, sample_latents, scale_of
from utils.diffusion.person_masks import PersonMasks
from utils.diffusion.text_to_image import TextToImage, images_at_once
from utils.diffusion.unet import enable_memory_efficient_attention


class IdentityToken(nn.Module):
    """The embedding of new tokens, stored apart from the vocabulary, so that no other row is trained."""

    def __init__(self, text_encoder, first_id, noun_id):
        super().__init__()
        embedding = text_encoder.get_input_embeddings()
        self.first_id, self.noun_id, self.places = first_id, noun_id, None
        self.row = nn.Parameter(embedding.weight[noun_id].detach().float().clone())
        embedding.register_forward_pre_hook(self.find)
        embedding.register_forward_hook(self.put)

    def find(self, module, inputs):
        self.places = inputs[0] >= self.first_id
        return (inputs[0].masked_fill(self.places, self.noun_id),)

    def put(self, module, inputs, output):
        return torch.where(self.places[..., None], self.row.to(output.dtype), output)


@dataclass(frozen=True)
class Tunable:
    """The model, its trained `weights`, with the token's row if the token is new, and their initial values `start`.

    `token`: None where a model has several text encoders, which know no new tokens. `masks`: the `PersonMasks` of a
    masked loss, or None.
    """

    model: TextToImage
    token: IdentityToken
    weights: list
    start: list
    masks: Any = None

    @classmethod
    def of(cls, model, token, *, with_token, masks=None):
        weights = model.trained_weights() + ([token.row] if with_token else [])
        # In the host's memory: a whole U-Net takes 3.2 GiB and is needed once for each identity.
        return cls(model, token, weights, [weight.detach().to("cpu", copy=True) for weight in weights], masks)

    def restore(self):
        """Reset all trained weights to their initial values, in place, and what a failed step left of gradients."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.start)
        for weight in self.weights:
            weight.grad = None


def open_tunable(
    name, prompts, accelerator, *, mode, rank=8, train_text_encoder=False, seed=0, revision=None, fast_lora=None,
    mask_model=None, xformers=False, checkpointing=False, compiled=False, bits=None,
):  # fmt: skip
    """The `Tunable` of a checkpoint on the accelerator's device. prompts: `Prompts` with the tokens of the identities.

    fast_lora: of `read_fast_lora`, for drawing. mask_model: of `PersonMasks`.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    running = {"dtype": dtype, "device": accelerator.device, "autocast": accelerator.autocast}
    trained = {"mode": mode, "rank": rank, "train_text_encoder": train_text_encoder, "seed": seed}
    model = TextToImage(name, prompts.tokenizer, **trained, **running, revision=revision, bits=bits)
    if accelerator.device.type == "cuda":
        # What cuDNN likes best; on a CPU it makes no difference.
        model.unet.to(memory_format=torch.channels_last)
        model.vae.to(memory_format=torch.channels_last)
    if fast_lora:
        model.add_fast_lora(read_fast_lora(fast_lora, model.unet.config))
    if xformers:
        enable_memory_efficient_attention(model.unet)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    if compiled:
        # Weights are restored in place, so the model compiled for the first identity serves all.
        model.compile()
    token = None
    if len(model.texts) == 1:
        noun_id = prompts.tokenizer(prompts.noun, add_special_tokens=False).input_ids[0]
        token = IdentityToken(model.text_encoder, prompts.first_id, noun_id).to(accelerator.device)
    masks = PersonMasks(mask_model, accelerator.device) if mask_model else None
    return Tunable.of(model, token, with_token=prompts.has_new_tokens, masks=masks)


def posteriors_of(vae, images, size, batch_size):
    """Mean and std of the VAE's posterior of pictures, stretched to `size`."""
    pixels = torch.stack([image_for_vae(image, size) for image in images])
    parts = [encode(vae, part) for part in pixels.split(images_at_once(batch_size, *size))]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


class Batches:
    """Draws batches of own images, each under its text, and as many reference images under theirs, if there are any.

    own: mean and std of the VAE's posterior of the images, their texts, and weights of the latents' cells in the loss
    or None. reference: latents or None, and their text. dropped: (share, text in the place of an own one).
    """

    def __init__(self, own, reference, *, size, seed, dropped=(0.0, ""), noise_offset=0.0):
        (self.mean, self.std), own_texts, self.weights = own
        self.reference, reference_text = reference
        self.size, self.dropped, self.noise_offset = size, dropped, noise_offset
        self.generator = torch.Generator().manual_seed(seed)
        others = [dropped[1]] * (dropped[0] > 0) + [reference_text] * (self.reference is not None)
        self.texts = list(dict.fromkeys([*own_texts, *others]))
        place = {text: row for row, text in enumerate(self.texts)}
        self.own_rows = torch.tensor([place[text] for text in own_texts])
        self.dropped_row, self.reference_row = place.get(dropped[1], 0), place.get(reference_text, 0)

    def draw(self, model):
        """(latents, noise, timesteps), the row in `texts` of each image, weights of the cells or None."""
        size, generator, device = self.size, self.generator, model.device
        rows = torch.randint(len(self.mean), (size,), generator=generator)
        posterior, noise = torch.randn(2, size, *self.mean.shape[1:], generator=generator).to(device)
        latents = sample_latents(self.mean[rows], self.std[rows], posterior, *scale_of(model.vae))
        texts, weights = self.own_rows[rows], None if self.weights is None else self.weights[rows].to(device)
        if self.dropped[0]:
            texts = texts.where(torch.rand(size, generator=generator) >= self.dropped[0], self.dropped_row)
        if self.reference is not None:
            rows = torch.randint(len(self.reference), (size,), generator=generator)
            reference_noise = torch.randn(size, *latents.shape[1:], generator=generator).to(device)
            latents, noise = torch.cat([latents, self.reference[rows]]), torch.cat([noise, reference_noise])
            texts = torch.cat([texts, torch.full((size,), self.reference_row)])
            weights = None if weights is None else torch.cat([weights, torch.ones_like(weights)])
        if self.noise_offset:
            whole = torch.randn(*noise.shape[:2], 1, 1, generator=generator).to(device)
            noise = noise + self.noise_offset * whole
        timesteps = model.schedule.draw(len(latents), generator).to(device)
        return (latents, noise, timesteps), texts, weights

    def encoded(self, rows, model):
        """Conditions of the texts in these rows; each text is encoded once."""
        used, places = rows.unique(return_inverse=True)
        return model.encode([self.texts[row] for row in used])[places]
