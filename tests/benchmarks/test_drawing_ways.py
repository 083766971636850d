"""benchmarks.generated.drawing_ways: the table of its runs; few_step_lora: its loss, and its file for --fast_lora."""

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

import train_dreambooth_reid
from benchmarks.generated import drawing_ways, few_step_lora
from utils.diffusion.checkpoint import read_config
from utils.diffusion.fast_lora import read_fast_lora
from utils.flags import DIFFUSION_DIR


def test_the_table_is_of_the_same_seeds():
    def run(way, seed, seconds, sets):
        rest = dict.fromkeys(drawing_ways.MEASURES, 0.5)
        return {"way": way, "seed": seed, "cpu_seconds": seconds, "reference_sets": sets, "identities": 6} | rest

    runs = [run(drawing_ways.OWN, 10, 60, 6), run(drawing_ways.OWN, 11, 120, 6), run(drawing_ways.FEW_STEP, 11, 60, 2)]
    own, few = drawing_ways.rows_of(runs)
    assert own[:4] == [drawing_ways.OWN, "6 of 6", "15.0 ± 7.1", "1.00 ± 0.00"]
    assert few[:4] == [drawing_ways.FEW_STEP, "2 of 6", "10.0", "0.50"] and few[4] == "0.500" and few[-1] == 1


def test_every_way_can_be_parsed():
    for words in drawing_ways.WAYS.values():
        words = words.format(few_step="lcm.safetensors")
        args = train_dreambooth_reid.parse_args([*drawing_ways.COMMON.split(), *words.split()])
        assert args.num_inference_steps in (4, 20)


@pytest.fixture(scope="module")
def model():
    before, few_step_lora.NUM_IDS = few_step_lora.NUM_IDS, 1
    yield few_step_lora.Distilled()
    few_step_lora.NUM_IDS = before


def test_f_is_what_the_solver_draws_with(model):
    """What diffusers' LCMScheduler calls the denoised sample, at each of the solver's steps."""
    scheduler = LCMScheduler.from_config(model.pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    noised, condition = torch.randn(1, 4, 16, 8), model.embedded(["a person"])
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            noise = model.unet(noised, timestep, condition).sample
            wanted = scheduler.step(noise, timestep, noised, generator=torch.Generator()).denoised
            found = model.consistent(noised, timestep.view(1), condition)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_lora_alone_learns_and_loads(model, tmp_path):
    torch.manual_seed(0)
    loss = model.loss(0)
    loss.backward()
    learned = {name for name, weight in model.unet.named_parameters() if weight.grad is not None}
    assert loss > 0 and learned and all(".lora_" in name for name in learned)
    file = model.save(tmp_path)
    assert read_fast_lora(str(file), read_config(DIFFUSION_DIR, "unet")).weights
    pipeline = StableDiffusionPipeline.from_pretrained(DIFFUSION_DIR, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
