"""What fine-tuning sees: batches under their own texts, one more noise for a channel, masks in the loss, negatives."""

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

import train_dreambooth_reid as script
from utils.diffusion import text_to_image, tuning
from utils.diffusion.families.solvers import solver_of
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.text_to_image import TextToImage, images_at_once
from utils.diffusion.tuning import Batches
from utils.standins import build

OWN = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 8, 4)
TEXTS = ["a", "b", "a", "c", "b"]


@pytest.fixture(scope="module")
def model(standins):
    folder = standins / "stable-diffusion"
    return TextToImage(str(folder), CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), mode="lora")


def batches(reference=None, weights=None, **options):
    """Own images whose latents, but for the VAE's factor, are their numbers."""
    own = ((OWN, torch.zeros_like(OWN)), TEXTS, weights)
    return Batches(own, (reference, "r"), size=64, seed=1, **options)


def numbers(latents, model):
    return (latents[:, 0, 0, 0] / model.vae.config.scaling_factor).round().long().tolist()


def test_each_image_comes_with_its_text_and_its_weights(model):
    weights = 0.1 + torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 8, 4)
    made = batches(torch.full((3, 4, 8, 4), 9.0), weights)
    (latents, noise, timesteps), rows, cells = made.draw(model)
    own = numbers(latents[:64], model)
    assert set(own) == set(range(5)) and (latents[64:] == 9).all()
    assert [made.texts[row] for row in rows] == [TEXTS[number] for number in own] + ["r"] * 64
    assert torch.equal(cells[:64], weights[own]) and (cells[64:] == 1).all()
    assert latents.shape == noise.shape and timesteps.shape == (128,)
    wanted = model.encode_all([made.texts[row] for row in rows])
    torch.testing.assert_close(made.encoded(rows, model), wanted, rtol=1e-4, atol=1e-4)


def test_some_texts_are_dropped(model):
    made = batches(dropped=(0.25, "alone"))
    kept, dropped = 0, 0
    for _ in range(20):
        (latents, _, _), rows, _ = made.draw(model)
        for number, row in zip(numbers(latents, model), rows, strict=True):
            is_dropped = made.texts[row] == "alone"
            assert is_dropped or made.texts[row] == TEXTS[number]
            kept, dropped = kept + (not is_dropped), dropped + is_dropped
    assert dropped / (kept + dropped) == pytest.approx(0.25, abs=0.04)


def test_one_more_noise_for_a_whole_channel(model):
    (latents, noise, timesteps), _, _ = batches(noise_offset=0.5).draw(model)
    (same, plain, _), _, _ = batches().draw(model)
    offset = noise - plain
    assert torch.equal(latents, same) and timesteps.shape == (64,)
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset))
    assert offset[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.15) and offset.mean().abs() < 0.1


def test_a_mask_weighs_the_errors_of_its_cells():
    schedule, timesteps = NoiseSchedule(DDPMScheduler()), torch.tensor([0, 500, 999])
    latents, noise, answer = torch.randn(3, 3, 4, 8, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3, 1, 8, 4, generator=torch.Generator().manual_seed(1))

    def unet(noised, times, encoder_hidden_states):
        return type("Output", (), {"sample": answer})

    errors = script.denoising_errors(unet, schedule, latents, noise, timesteps, torch.zeros(3, 1, 1), None, weights)
    squares = (answer - noise).double().square()
    wanted = (squares * weights).sum((1, 2, 3)) / (4 * weights.double().sum((1, 2, 3)))
    torch.testing.assert_close(errors.double(), wanted, rtol=1e-5, atol=1e-6)


def test_guidance_leads_away_from_the_negative_prompt(model, standins):
    pipeline = StableDiffusionPipeline.from_pretrained(standins / "stable-diffusion", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 4, generator=torch.Generator().manual_seed(3))
    sizes = {"height": 64, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    pipeline.scheduler = solver_of("ddim", pipeline.scheduler.config)
    wanted = pipeline("a coat", negative_prompt="a dog", latents=noise, output_type="latent", **sizes).images
    settings = {"resolution": (64, 32), "steps": 2, "solver": "ddim", "guidance": 3.0}
    condition = model.encode_all(["a coat"])
    latents = model.sample(condition, [3], negative="a dog", **settings)
    torch.testing.assert_close(latents, wanted, rtol=1e-3, atol=1e-3)
    assert (latents - model.sample(condition, [3], **settings)).abs().max() > 1e-3


def test_the_vae_takes_few_large_images_at_once(monkeypatch):
    assert [images_at_once(8, *size) for size in ((128, 64), (512, 256), (512, 512), (1024, 512))] == [8, 2, 1, 1]
    vae = build.build_vae().requires_grad_(False).eval()
    taken, encode = [], tuning.encode
    monkeypatch.setattr(tuning, "encode", lambda vae, pixels: taken.append(len(pixels)) or encode(vae, pixels))
    images = [Image.new("RGB", (32, 64), (40 * number, 9, 9)) for number in range(5)]
    mean, std = tuning.posteriors_of(vae, images, (64, 32), 4)
    monkeypatch.setattr(text_to_image, "VAE_PIXELS", 2 * 64 * 32)
    fewer = tuning.posteriors_of(vae, images, (64, 32), 4)
    assert taken == [4, 1, 2, 2, 1]
    torch.testing.assert_close(fewer, [mean, std], rtol=1e-5, atol=1e-5)
