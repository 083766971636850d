"""Denoised pictures: DDIM with a U-Net that is right gives the clean latents back."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn

from utils.diffusion.feedback import decode, denoise
from utils.diffusion.schedule import NoiseSchedule
from utils.reporting.report import sheet
from utils.standins import build

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
}  # fmt: skip


def schedule_of(prediction_type):
    return NoiseSchedule({**STABLE_DIFFUSION, "prediction_type": prediction_type}, "test")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Exact(nn.Module):
    """A U-Net that knows the picture: the very noise that lies in what it is given, or the velocity."""

    def __init__(self, schedule, latents, dtype=torch.float32):
        super().__init__()
        self.schedule, self.latents, self.times = schedule, latents, []
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, noised, timesteps, encoder_hidden_states):
        assert noised.dtype == encoder_hidden_states.dtype == self.weight.dtype and not torch.is_grad_enabled()
        self.times.append(timesteps.tolist())
        cumulated = self.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noised.float() - cumulated.sqrt() * self.latents) / (1 - cumulated).sqrt()
        if self.schedule.prediction_type == "v_prediction":
            noise = cumulated.sqrt() * noise - (1 - cumulated).sqrt() * self.latents
        return SimpleNamespace(sample=noise.to(noised.dtype))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("start", [299, 599, 999])
def test_exact_predictions_give_the_clean_latents(prediction_type, start):
    latents, noise, condition = drawn(3, 4, 4, 2), drawn(3, 4, 4, 2, seed=1), torch.zeros(3, 1, 8)
    schedule = schedule_of(prediction_type)
    unet = Exact(schedule, latents)
    clean = denoise(unet, schedule, condition, latents, noise, start, num_steps=10)
    torch.testing.assert_close(clean, latents, rtol=0, atol=2e-4)
    times = [one[0] for one in unet.times]
    assert len(times) == 10 and times == sorted(times, reverse=True) and times[0] == start
    assert all(len(set(one)) == 1 for one in unet.times)


class Wrong(nn.Module):
    """A U-Net with an opinion of its own, from what it is given, when, and under which condition."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(drawn(4, 4, seed=3) / 3)

    def forward(self, noised, timesteps, encoder_hidden_states):
        told = encoder_hidden_states.mean((1, 2)) + timesteps / 1000
        return SimpleNamespace(sample=torch.einsum("oc,bchw->bohw", self.mix, noised) + told[:, None, None, None])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_wrong_predictions_follow_ddim_s_formula(prediction_type):
    latents, noise, condition = drawn(2, 4, 4, 2), drawn(2, 4, 4, 2, seed=1), drawn(2, 1, 8, seed=2)
    unet = Wrong()
    got = denoise(unet, schedule_of(prediction_type), condition, latents, noise, 599, num_steps=5)

    cumulated = DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod.double()
    unet, condition = unet.double(), condition.double()
    times = [599, 479, 359, 239, 119, 0]
    a = cumulated[599]
    noised = a.sqrt() * latents.double() + (1 - a).sqrt() * noise.double()
    with torch.no_grad():
        for now, then in pairwise(times):
            a, later = cumulated[now], cumulated[then]
            prediction = unet(noised, torch.full((2,), now), condition).sample
            if prediction_type == "epsilon":
                rest = prediction
                clean = (noised - (1 - a).sqrt() * rest) / a.sqrt()
            else:
                rest = a.sqrt() * prediction + (1 - a).sqrt() * noised
                clean = a.sqrt() * noised - (1 - a).sqrt() * prediction
            noised = later.sqrt() * clean + (1 - later).sqrt() * rest
    torch.testing.assert_close(got.double(), clean, rtol=1e-4, atol=1e-4)


def test_a_half_precision_unet_gets_what_it_computes_in():
    latents = drawn(2, 4, 4, 2)
    schedule = schedule_of("epsilon")
    unet = Exact(schedule, latents, torch.bfloat16)
    clean = denoise(unet, schedule, torch.zeros(2, 1, 8), latents, drawn(2, 4, 4, 2, seed=1), 599)
    assert clean.dtype == torch.float32
    torch.testing.assert_close(clean, latents, rtol=0, atol=0.1)


def test_decoded_pictures_have_the_size_and_colours_of_the_vae():
    torch.manual_seed(0)
    vae = build.build_vae().requires_grad_(False).eval()
    latents = drawn(2, 4, 8, 4)
    pictures = decode(vae, latents, (64, 32))
    pixels = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    want = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert [picture.size for picture in pictures] == [(32, 64)] * 2
    for picture, expected in zip(pictures, want, strict=True):
        assert picture.tobytes() == Image.fromarray(expected.numpy()).tobytes()
    assert decode(vae, latents, (32, 20))[0].size == (20, 32)


def test_a_sheet_shows_rows_from_left_to_right():
    colours = [[(10 * row, 20 * column, 50) for column in range(3)] for row in range(2)]
    whole = sheet([[Image.new("RGB", (8, 16), colour) for colour in row] for row in colours], margin=4)
    assert whole.size == (3 * 8 + 2 * 4, 2 * 16 + 4)
    for row in range(2):
        for column in range(3):
            left, top = column * 12, row * 20
            assert {whole.getpixel((left + x, top + y)) for x in range(8) for y in range(16)} == {colours[row][column]}
    assert whole.getpixel((9, 5)) == whole.getpixel((3, 17)) == (255, 255, 255)
