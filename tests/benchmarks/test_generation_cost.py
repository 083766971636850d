"""Counted memory of an identity: what must lie on the card, and what does not."""

import pytest

import train_dreambooth_reid as script
from benchmarks.common import GIB
from benchmarks.memory.generation_cost import count, forward_tflop, step_tflop
from benchmarks.speed.generation import (
    WAYS,
    counts_of,
    flags_of,
    identity_seconds,
    measure,
    median_of,
    open_tuning,
    save_few_step_lora,
)
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


def test_parts_of_an_identity_are_measured(tmp_path):
    few = ["--train_batch_size", 1, "--sample_batch_size", 2]
    short = ["--finetune", "full", "--num_inference_steps", 5]
    parts = measure(DIFFUSION_DIR, (64, 64), 2, [*short, *few], "paper")
    named = {"load", "step", "reference", "image", "image_50", "encode", "restore"}
    seconds = {name: value for name, value in parts.items() if name != "peak_gib"}
    assert set(seconds) == named and min(seconds.values()) > 0
    assert parts["image_50"] > parts["image"]
    assert identity_seconds(parts, (4, 5, 6)) > 10 * min(parts["image"], parts["reference"]) + 5 * parts["step"]
    flags = ["--fast_lora", save_few_step_lora(DIFFUSION_DIR, tmp_path), *few]
    fast = measure(DIFFUSION_DIR, (64, 64), 2, flags, "lora")
    # Four steps without guidance, and references as without it.
    assert fast["image"] < fast["reference"] and "image_50" not in fast
    args, *_ = open_tuning(DIFFUSION_DIR, (64, 64), tmp_path, flags, script.RECIPES["lora"])
    of_references, of_images = (script.sampling(args, of_references=kind) for kind in (True, False))
    assert (of_references["steps"], of_references["guidance"], of_images["steps"]) == (20, 7.5, 4)


def test_the_ways_are_the_recipes():
    flags = {way: " ".join(map(str, flags_of(way, "FILE"))) for way in WAYS}
    assert "--finetune full --train_batch_size 1 --num_inference_steps 25 --guidance_scale 7.5" in flags["paper"]
    assert "--finetune lora --train_batch_size 2 --num_inference_steps 20" in flags["lora"]
    assert flags["lora, guidance on half of the steps"].endswith("--guidance_share 0.5")
    few_step = flags["lora with a few-step LoRA: 4 steps, no guidance"]
    assert few_step == "--fast_lora FILE --sample_batch_size 10 --finetune lora --train_batch_size 2"
    assert counts_of("paper") == (200, 1000, 220) and counts_of("lora")[1:] == (400, 220)


def test_the_median_of_rounds():
    rounds = [{"step": value, "peak_gib": None} for value in (3.0, 1.0, 9.0)]
    assert median_of(rounds) == {"step": 3.0, "peak_gib": None}
