"""A few-step LoRA beside that of an identity: drawn as diffusers draws with both, off everywhere else, bad files."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from tests.families import saved
from utils.diffusion.families.solvers import solver_of
from utils.diffusion.fast_lora import read_fast_lora
from utils.diffusion.text_to_image import TextToImage
from utils.diffusion.unet import save_unet


@pytest.fixture(scope="module")
def models(standins):
    return standins


def few_step_lora(unet, path, *, kohya=False, alpha=3):
    """A LoRA of random weights on attention and convolutions, as trainers write it."""
    unet = copy.deepcopy(unet)
    config = LoraConfig(r=2, lora_alpha=alpha if kohya else 2, target_modules=["to_k", "conv1", "proj_in"])
    unet.add_adapter(config, adapter_name="made")
    generator = torch.Generator().manual_seed(5)
    for name, weight in unet.named_parameters():
        if ".made." in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    state = get_peft_model_state_dict(unet, adapter_name="made")
    if kohya:
        # Names such as lora_unet_mid_block_..._to_k.lora_down.weight, with an alpha beside each pair.
        names = {name: name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.") for name in state}
        layers = {name: name.partition(".lora_")[0] for name in names.values()}
        flat = {layer: f"lora_unet_{layer.replace('.', '_')}" for layer in layers.values()}
        state = {name.replace(layers[name], flat[layers[name]]): state[old] for old, name in names.items()}
        state |= {f"{name}.alpha": torch.tensor(float(alpha)) for name in flat.values()}
    else:
        state = {f"unet.{name}": value for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path)


@pytest.mark.parametrize("family, kohya", [("sd", False), ("sd", True), ("sdxl", True)])
def test_a_few_step_lora_beside_the_identitys_draws_as_in_diffusers(models, tmp_path, family, kohya):
    folder = models / "stable-diffusion"
    if family == "sdxl":
        saved("sdxl", folder := tmp_path / "sdxl")
    model = TextToImage(str(folder), CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), mode="lora")
    plain = DiffusionPipeline.from_pretrained(folder, **{} if family == "sdxl" else {"safety_checker": None})
    few_step_lora(plain.unet, tmp_path / "lcm" / "fast.safetensors", kohya=kohya)
    generator = torch.Generator().manual_seed(1)
    for weight in model.trained_weights():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    own = [weight.clone() for weight in model.trained_weights()]
    prompts, seeds = ["a photo of a person", "a red coat"], [1, 2]
    settings = {"resolution": (64, 32), "steps": 2, "solver": "lcm", "guidance": 1.0}
    before = model.sample(model.encode_all(prompts), seeds, **settings)
    model.add_fast_lora(read_fast_lora(str(tmp_path / "lcm"), model.unet.config))
    assert all(map(torch.equal, model.trained_weights(), own))
    # Off but for drawing: the identity alone.
    assert torch.equal(model.sample(model.encode_all(prompts), seeds, **settings), before)
    latents = model.sample(model.encode_all(prompts), seeds, fast=True, **settings)
    assert (latents - before).abs().max() > 0.01 and len(model.trained_weights()) == len(own)
    save_unet(model.unet, "lora", tmp_path)
    pipeline = plain
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "unet_lora", adapter_name="identity")
    pipeline.load_lora_weights(tmp_path / "lcm", weight_name="fast.safetensors", adapter_name="few")
    pipeline.set_adapters(["identity", "few"])
    pipeline.scheduler = solver_of("lcm", pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators])
    sizes = {"height": 64, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0, "generator": generators}
    wanted = pipeline(prompts, latents=noise, output_type="latent", **sizes).images
    torch.testing.assert_close(latents, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_no_few_step_lora_of_the_model(models, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(models / "stable-diffusion", subfolder="unet")
    few_step_lora(unet, tmp_path / "a.safetensors")
    other = dict(unet.config) | {"block_out_channels": [2 * width for width in unet.config.block_out_channels]}
    with pytest.raises(ValueError, match=r"a.safetensors is of another family of models: \d+ of its \d+ weights"):
        read_fast_lora(str(tmp_path / "a.safetensors"), other)
    save_file({"lora_te1_x.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "plain.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"half")
    for name, message in (
        ("plain.safetensors", "has no weights for a U-Net of Stable Diffusion"),
        ("damaged.safetensors", "cannot be read as a LoRA"),
        ("", "has 4 safetensors files"),
        ("nothing", "is no local file or folder, nor a readable Hub id"),
    ):
        with pytest.raises(ValueError, match=message):
            read_fast_lora(str(tmp_path / name), unet.config)
