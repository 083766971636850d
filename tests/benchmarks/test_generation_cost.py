"""Counted memory of an identity: what must lie on the card, and what does not."""

import pytest

from benchmarks.common import GIB
from benchmarks.memory.generation_cost import count, forward_tflop, step_tflop
from benchmarks.speed.generation import measure, ours_of
from utils.flags import DIFFUSION_DIR

UNET, TEXT, VAE = 859_520_964, 123_060_480, 83_653_863


@pytest.mark.slow
def test_weights_gradients_and_states_are_all_that_small_pictures_take():
    tuning, drawing = count("full, 8-bit Adam", (64, 64))
    beside = 2 * (TEXT + VAE)
    # Float32 weights and gradients and two bytes of state; no second copy of the weights.
    assert 0 < tuning - (10 * UNET + beside) / GIB < 0.8
    # Without gradients: float32 weights, and autocast's copy in half.
    assert 0 < drawing - (6 * UNET + beside) / GIB < 0.5
    tuning, drawing = count("lora", (64, 64))
    assert 0 < tuning - (2 * UNET + beside) / GIB < 0.3 and 0 < drawing - (2 * UNET + beside) / GIB < 0.3


@pytest.mark.slow
def test_activations_that_are_computed_twice_cost_a_quarter_of_the_step():
    once, twice = (step_tflop(f"full, 8-bit Adam{more}", (64, 64)) for more in ("", ", checkpointing"))
    assert 1.2 < twice / once < 1.34


@pytest.mark.slow
def test_attention_is_counted():
    """A pass of Stable Diffusion's U-Net at 512 x 512 takes 0.80 TFLOP; without attention it would be 0.68."""
    assert forward_tflop((512, 512))[0] == pytest.approx(0.80, abs=0.02)


def test_parts_of_an_identity_are_measured():
    parts = measure(DIFFUSION_DIR, "lora", (64, 64), 2, ["--train_batch_size", 1, "--sample_batch_size", 2])
    seconds = {name: value for name, value in parts.items() if name != "peak_gib"}
    assert set(seconds) == {"load", "step", "image", "image_50", "encode", "restore"} and min(seconds.values()) > 0
    assert parts["image_50"] > parts["image"]
    assert ours_of(parts, {"references": 4, "images": 6, "steps": 5}) > 10 * parts["image"] + 5 * parts["step"]
