"""The Stable Diffusion side: schedules, noise loss, what trains in each mode, files, and checkpoints that do not fit.

References are written out here in float64, or are diffusers' own pipeline.
"""

import json
import math
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory.alive import gpu_autocast, hollow
from utils.diffusion.checkpoint import check_diffusion
from utils.diffusion.schedule import NoiseSchedule, noise_loss
from utils.diffusion.unet import (
    UNET_MODES,
    enable_memory_efficient_attention,
    load_unet,
    load_vae,
    recompute_activations,
    save_unet,
    set_unet_mode,
)
from utils.standins import build

BF16 = torch.bfloat16
WIDTH = build.TEXT_WIDTH
SD1 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SD2 = SD1 | {"prediction_type": "v_prediction"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def pipeline(unet=None, vae=None):
    """A pipeline without its text half, which no function here reads."""
    return StableDiffusionPipeline(
        vae=vae or build.build_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet or build.build_unet(),
        scheduler=build.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion") / "sd"
    torch.manual_seed(0)
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(original, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(original, tmp_path / "sd")


def edit(folder, part, **values):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def draws(batch=2, dtype=torch.float32):
    torch.manual_seed(1)
    latents, noise = torch.randn(2, batch, 4, 16, 16, dtype=dtype)
    timesteps = torch.tensor([3, 640, 999, 0])[:batch]
    condition = torch.randn(batch, 1, WIDTH, dtype=dtype, requires_grad=True)
    return latents, noise, timesteps, condition


def cumulated_alphas(config):
    """The definition, in float64."""
    steps = config["num_train_timesteps"]
    start, end = config.get("beta_start"), config.get("beta_end")
    places = [step / (steps - 1) for step in range(steps)]
    if config.get("trained_betas"):
        betas = config["trained_betas"]
    elif config["beta_schedule"] == "linear":
        betas = [start + place * (end - start) for place in places]
    elif config["beta_schedule"] == "scaled_linear":
        betas = [(start**0.5 + place * (end**0.5 - start**0.5)) ** 2 for place in places]
    else:

        def bar(place):
            return math.cos((place + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - bar((step + 1) / steps) / bar(step / steps), 0.999) for step in range(steps)]
    alphas = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    if config.get("rescale_betas_zero_snr"):
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas


SCHEDULES = {
    "sd1": SD1,
    "sd2": SD2,
    "linear": SD1 | {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": SD1 | {"beta_schedule": "squaredcos_cap_v2"},
    "zero": SD2 | {"rescale_betas_zero_snr": True},
    "trained": {"num_train_timesteps": 1000, "trained_betas": [0.001 + 0.00001 * step for step in range(1000)]},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_definition(name):
    config = SCHEDULES[name]
    schedule, a = NoiseSchedule(config), cumulated_alphas(config)
    assert schedule.num_steps == 1000 and schedule.alphas_cumprod.dtype == torch.float32
    torch.testing.assert_close(schedule.alphas_cumprod.double(), a, rtol=2e-4, atol=1e-6)
    latents, noise, timesteps, _ = draws(4, torch.float64)
    a = a[timesteps].view(-1, 1, 1, 1)
    noised = a.sqrt() * latents + (1 - a).sqrt() * noise
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), noised, rtol=0, atol=1e-4)
    v = config.get("prediction_type") == "v_prediction"
    target = a.sqrt() * noise - (1 - a).sqrt() * latents if v else noise
    assert schedule.prediction_type == ("v_prediction" if v else "epsilon")
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), target, rtol=0, atol=1e-4)
    # A right prediction gives the latents back, even of pure noise where the velocity is predicted.
    own = schedule.add_noise(latents, noise, timesteps)
    back = schedule.denoised(own, schedule.target(latents, noise, timesteps), timesteps)
    torch.testing.assert_close(back, latents, rtol=0, atol=1e-5)


def test_schedule_from_any_scheduler_and_folder(copy):
    for scheduler in (DDPMScheduler(**SD2), EulerDiscreteScheduler(**SD2)):
        schedule = NoiseSchedule(scheduler)
        assert schedule.prediction_type == "v_prediction"
        torch.testing.assert_close(schedule.alphas_cumprod, NoiseSchedule(SD2).alphas_cumprod)
    edit(copy, "scheduler", prediction_type="v_prediction", num_train_timesteps=500)
    schedule = NoiseSchedule.from_pretrained(copy)
    assert (schedule.prediction_type, schedule.num_steps) == ("v_prediction", 500)


def test_schedule_keeps_its_precision_and_leaves_no_trace():
    schedule = NoiseSchedule(SD1)
    exact = schedule.alphas_cumprod.clone()
    module = torch.nn.ModuleList([schedule]).half().to(torch.bfloat16)
    assert torch.equal(schedule.alphas_cumprod, exact)
    assert module.to("meta")[0].alphas_cumprod.is_meta
    assert not module.state_dict()


@pytest.mark.parametrize("config", [SD1, SD2])
def test_noise_loss_is_the_mean_squared_error(config):
    torch.manual_seed(0)
    unet = set_unet_mode(build.build_unet(), "frozen").double()
    latents, noise, timesteps, condition = draws(4, torch.float64)
    a = cumulated_alphas(config)[timesteps].view(-1, 1, 1, 1)
    noised = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * latents if config is SD2 else noise
    prediction = unet(noised, timesteps, encoder_hidden_states=condition).sample
    want = ((prediction - target) ** 2).sum() / prediction.numel()
    (gradient,) = torch.autograd.grad(want, condition)
    loss = noise_loss(unet.float(), NoiseSchedule(config), latents, noise, timesteps, condition)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(condition.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def expected_to_train(name, mode):
    top = name.split(".")[0]
    if mode == "lora":
        return "lora_A" in name or "lora_B" in name
    wanted = {"partial-1": {"up_blocks", "time_embedding", "conv_norm_out", "conv_out"}}
    wanted["partial-2"] = wanted["partial-1"] | {"mid_block"}
    return mode in ("full", "scratch") or top in wanted.get(mode, ())


@pytest.mark.parametrize("mode, autocast", [*((mode, torch.bfloat16) for mode in UNET_MODES), ("lora", torch.float16)])
def test_what_trains_and_gets_gradient(original, mode, autocast):
    unet = load_unet(original, mode, dtype=autocast)
    assert unet.training == (mode != "frozen")
    saved = load_file(original / "unet" / WEIGHTS)
    for name, parameter in unet.named_parameters():
        name = name.replace(".base_layer", "")
        if name in saved and mode != "scratch":
            # What trains must not have been rounded on its way.
            assert torch.equal(parameter, saved[name].to(parameter.dtype)), name
    # What starts at 0, such as LoRA's second matrices, lets no gradient through yet.
    for name, parameter in unet.named_parameters():
        if name.endswith("weight") and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    latents, noise, timesteps, condition = draws()
    schedule = NoiseSchedule(SD1)
    with torch.autocast("cpu", dtype=autocast):
        loss = noise_loss(unet, schedule, latents, noise, timesteps, condition)
    loss.backward()
    for name, parameter in unet.named_parameters():
        trains = expected_to_train(name, mode)
        assert parameter.requires_grad == trains, name
        assert parameter.dtype == (torch.float32 if trains else autocast), name
        assert (parameter.grad is not None) == trains, name
        # Attention to a single token is the same whatever its query and key are.
        if trains and not ("attn2.to_q" in name or "attn2.to_k" in name or "norm2" in name):
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
    assert condition.grad.dtype == torch.float32 and condition.grad.abs().amax((1, 2)).min() > 0
    with torch.no_grad():
        exact = noise_loss(unet.float(), schedule, latents, noise, timesteps, condition)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_frozen_halves_without_autocast(original):
    """Sampling of validation pictures needs no autocast where all of the U-Net is in one precision."""
    for mode in ("frozen", "lora"):
        unet = load_unet(original, mode, dtype=torch.bfloat16)
        loss = noise_loss(unet, NoiseSchedule(SD1), *draws())
        assert loss.isfinite()


@pytest.mark.parametrize("rank", [3, 8])
def test_lora_adds_the_product_of_its_matrices_over_the_rank(original, rank):
    unet = load_unet(original, "lora", rank=rank)
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")
    linear = [
        name.removesuffix(".base_layer")
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert set(layers) == {name for name in linear if name.endswith(ends)}
    plain = load_unet(original, "frozen")
    assert torch.equal(unet(*draws()[::2], draws()[3]).sample, plain(*draws()[::2], draws()[3]).sample)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = layers[name]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (rank, WIDTH) and not up.any()
    torch.nn.init.normal_(up)
    inputs = torch.randn(5, WIDTH)
    want = inputs @ (plain.get_submodule(name).weight + up @ down / rank).t()
    torch.testing.assert_close(layer(inputs), want, rtol=1e-4, atol=1e-5)


def test_lora_under_autocast_keeps_no_float32_copies(original):
    """The same numbers as with peft's own casts, with less kept for the backward pass."""

    def run(hooks):
        unet = load_unet(original, "lora", dtype=torch.bfloat16)
        kept = {}
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.02)
        for module in unet.modules():
            if not hooks and hasattr(module, "lora_A"):
                module._forward_pre_hooks.clear()

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = noise_loss(unet, NoiseSchedule(SD1), *draws())
        loss.backward()
        gradients = [parameter.grad for parameter in unet.parameters() if parameter.requires_grad]
        size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
        return loss.detach(), gradients, size

    (loss, gradients, size), (usual_loss, usual_gradients, usual_size) = run(True), run(False)
    assert torch.equal(loss, usual_loss)
    assert all(map(torch.equal, gradients, usual_gradients))
    assert size < 0.95 * usual_size


@pytest.mark.parametrize("mode", ["lora", "frozen", "partial-1"])
def test_recomputation_changes_no_gradient(original, mode):
    found = []
    for which in (None, "all", "outer"):
        unet = load_unet(original, mode, dtype=torch.bfloat16)
        if which:
            recompute_activations(unet, which)
        latents, noise, timesteps, condition = draws()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = noise_loss(unet, NoiseSchedule(SD1), latents, noise, timesteps, condition)
        loss.backward()
        trained = [parameter.grad for parameter in unet.parameters() if parameter.requires_grad]
        found.append([loss.detach(), condition.grad, *trained])
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


def test_outer_blocks_alone_are_computed_again(original):
    unet = load_unet(original, "lora")
    recompute_activations(unet, "outer")
    again = {
        name.split(".resnets")[0].split(".attentions")[0]
        for name, module in unet.named_modules()
        if getattr(module, "gradient_checkpointing", False)
    }
    assert {"down_blocks.0", f"up_blocks.{len(unet.up_blocks) - 1}"} <= again
    assert not [name for name in again if name.startswith(("mid_block", "down_blocks.1", "up_blocks.0"))]


@pytest.mark.parametrize("mode, kinds", [("lora", (BF16, BF16)), ("partial-1", (BF16, torch.float32))])
def test_frozen_norms_stay_in_half_under_the_autocast_of_a_gpu(original, mode, kinds):
    """Shapes and types only: the GPU need not be there. partial-1 trains what follows the last block, its norm too."""
    unet = load_unet(original, mode, dtype=BF16)
    with FakeTensorMode(), gpu_autocast(BF16):
        for norm, kind in zip((unet.down_blocks[0].resnets[0].norm1, unet.conv_norm_out), kinds, strict=True):
            values = torch.empty(2, norm.num_channels, 4, 4, dtype=BF16, device="cuda")
            assert hollow(norm, "cuda")(values).dtype == kind


def test_what_is_drawn_belongs_to_the_seed(original, copy):
    (copy / "unet" / WEIGHTS).unlink()
    for mode, folder in (("lora", original), ("scratch", copy)):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        states = [load_unet(folder, mode, seed=seed).state_dict() for seed in (0, 0, 1)]
        assert torch.equal(before, torch.get_rng_state())
        drawn = [name for name in states[0] if "lora_A" in name or (mode == "scratch" and "conv1.weight" in name)]
        assert drawn
        for name in drawn:
            assert torch.equal(states[0][name], states[1][name])
            assert not torch.equal(states[0][name], states[2][name])
    unet, pretrained = build.build_unet(), load_file(original / "unet" / WEIGHTS)
    unet.load_state_dict(pretrained)
    before = torch.get_rng_state()
    state = set_unet_mode(unet, "scratch", seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    for name, value in state.items():
        assert torch.equal(value, states[2][name]), name
        assert value.unique().numel() == 1 or not torch.equal(value, pretrained[name]), name
    # The usual draw of a convolution is uniform within 1 / sqrt(inputs).
    weight = state["mid_block.resnets.0.conv1.weight"]
    bound = weight[0].numel() ** -0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    torch.testing.assert_close(weight.std().item(), bound / 3**0.5, rtol=0.02, atol=0)


def test_real_lora_on_the_meta_device():
    """Stable Diffusion 1.x with rank 8: 2,492,928 parameters train."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    set_unet_mode(unet, "lora", rank=8, dtype=torch.bfloat16)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 2_492_928
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.is_meta for parameter in unet.parameters())


def test_vae_is_frozen(original):
    vae = load_vae(original, dtype=torch.bfloat16)
    saved = load_file(original / "vae" / WEIGHTS)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    assert all(torch.equal(value, saved[name].bfloat16()) for name, value in vae.state_dict().items())


def test_vae_with_the_names_of_older_checkpoints(copy):
    """The released 1.x VAEs have other names in their attention."""
    path = copy / "vae" / WEIGHTS
    saved, renamed = load_file(path), {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, value in saved.items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = value
    assert len(set(renamed) - set(saved)) == 16
    save_file(renamed, path)
    assert all(torch.equal(value, saved[name]) for name, value in load_vae(copy).state_dict().items())


@pytest.mark.parametrize("rank", [3, 8])
def test_lora_opens_in_a_pipeline(original, tmp_path, rank):
    unet = load_unet(original, "lora", rank=rank, dtype=torch.float32)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_unet(unet, "lora", tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "unet_lora",
        f"unet_lora/{LORA}",
    ]
    saved = load_file(tmp_path / "unet_lora" / LORA)
    assert all(name.startswith("unet.") and value.dtype == torch.float32 for name, value in saved.items())
    pipe = pipeline(load_unet(original, "frozen"))
    latents, _, timesteps, condition = draws()
    with torch.no_grad():
        want, plain = unet(latents, timesteps, condition).sample, pipe.unet(latents, timesteps, condition).sample
        pipe.load_lora_weights(tmp_path / "unet_lora")
        found = pipe.unet(latents, timesteps, condition).sample
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 0.01


def test_saved_lora_is_replaced_or_stays(original, tmp_path, monkeypatch):
    unet = load_unet(original, "lora", rank=2)
    save_unet(unet, "lora", tmp_path)
    path = tmp_path / "unet_lora" / LORA
    first = path.read_bytes()
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("utils.diffusion.unet.save_file", full_disk)
        with pytest.raises(OSError):
            save_unet(unet, "lora", tmp_path)
    assert path.read_bytes() == first and list(path.parent.iterdir()) == [path]
    save_unet(unet, "lora", tmp_path)
    assert path.read_bytes() != first


@pytest.mark.parametrize("mode", ["partial-1", "partial-2", "full", "scratch"])
def test_whole_unet_opens_again(original, tmp_path, mode):
    unet = load_unet(original, mode, dtype=torch.float32).to(memory_format=torch.channels_last)
    save_unet(unet, mode, tmp_path)
    save_unet(unet, mode, tmp_path)
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == ["config.json", WEIGHTS]
    assert str(original) not in (tmp_path / "unet" / "config.json").read_text()
    again = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in again.state_dict().items())
    assert dict(again.config)["cross_attention_dim"] == WIDTH


def test_from_scratch_the_last_layers_are_zero(original):
    """Each residual branch adds nothing at first, and the U-Net predicts zeros."""
    unet = load_unet(original, "scratch")
    ends = [name for name, _ in unet.named_parameters() if name.split(".")[-2] in ("conv2", "proj_out", "conv_out")]
    zero = [name for name, value in unet.named_parameters() if not value.any() and name.endswith("weight")]
    assert zero == [name for name in ends if name.endswith("weight")] and len(zero) > 10
    assert not any(dict(unet.named_parameters())[name].any() for name in ends)
    latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 3, WIDTH)
    assert not unet(latents, torch.tensor([3, 900]), encoder_hidden_states=condition).sample.any()


def test_a_variant_of_the_unet(original, copy):
    path = copy / "unet" / WEIGHTS
    other = {name: value + 1 for name, value in load_file(path).items()}
    save_file(other, path.with_name(WEIGHTS.replace(".safetensors", ".non_ema.safetensors")), {"format": "pt"})
    assert check_diffusion(copy, variant="non_ema").variant == "non_ema"
    assert check_diffusion(copy).variant is check_diffusion(original, variant="non_ema").variant is None
    name = "conv_in.weight"
    plain, variant = (load_unet(copy, "frozen", variant=one).state_dict()[name] for one in (None, "non_ema"))
    assert torch.equal(plain, load_file(original / "unet" / WEIGHTS)[name]) and torch.equal(variant, plain + 1)


def test_a_unet_of_one_variant_alone(copy):
    """As the Hub's cache has it after a run with --variant: the default file was never downloaded."""
    weights = copy / "unet" / WEIGHTS
    weights.rename(weights.with_name(WEIGHTS.replace(".", ".non_ema.", 1)))
    assert check_diffusion(copy, variant="non_ema", needs_variant=True).variant == "non_ema"
    assert load_unet(copy, "frozen", variant="non_ema").num_parameters()
    with pytest.raises(ValueError, match=f"has no unet/{WEIGHTS}; the weights there have another name"):
        check_diffusion(copy)
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 24}))
    with pytest.raises(ValueError, match="says cross_attention_dim 24, the weights beside it have"):
        check_diffusion(copy, variant="non_ema")


@pytest.mark.parametrize(
    "index", ["safetensors.index.non_ema.json", "safetensors.non_ema.index.json", "non_ema.safetensors.index.json"]
)
def test_a_variant_of_the_unet_in_several_files(copy, index):
    unet = load_unet(copy, "frozen")
    wanted = {name: value.add_(1).clone() for name, value in unet.state_dict().items()}
    unet.save_pretrained(copy / "unet", max_shard_size="2MB", variant="non_ema")
    written = copy / "unet" / f"{WEIGHTS}.index.non_ema.json"
    assert len(set(json.loads(written.read_text())["weight_map"].values())) > 1
    written.rename(written.with_name(f"diffusion_pytorch_model.{index}"))
    assert check_diffusion(copy, variant="non_ema", needs_variant=True).variant == "non_ema"
    found = load_unet(copy, "frozen", variant="non_ema").state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not torch.equal(load_unet(copy, "frozen").state_dict()["conv_in.bias"], wanted["conv_in.bias"])


def test_frozen_unet_leaves_nothing(original, tmp_path):
    save_unet(load_unet(original, "frozen"), "frozen", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_good_checkpoints(original, copy):
    info = check_diffusion(original, resolution=(128, 64))
    assert info[:4] == (WIDTH, 4, 8, "epsilon")
    assert (info.num_steps, info.scaling_factor, info.multiple) == (1000, 0.18215, 16)
    edit(copy, "scheduler", prediction_type="v_prediction")
    # Older configurations lack the newer entries.
    for name in ("unet", "vae"):
        path = copy / name / "config.json"
        config = json.loads(path.read_text())
        for key in ("addition_embed_type", "num_class_embeds", "mid_block_type", "out_channels", "scaling_factor"):
            config.pop(key, None)
        path.write_text(json.dumps(config))
    assert check_diffusion(str(copy)) == info._replace(prediction_type="v_prediction")


def test_sharded_checkpoint(copy):
    unet = load_unet(copy, "frozen")
    (copy / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(copy / "unet", max_shard_size="2MB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    assert check_diffusion(copy).condition_width == WIDTH
    edit(copy, "unet", cross_attention_dim=96)
    with pytest.raises(ValueError, match="says cross_attention_dim 96, the weights beside it have 128"):
        check_diffusion(copy)


REFUSED = {
    "sample prediction": ("scheduler", {"prediction_type": "sample"}, "prediction_type 'sample'.*epsilon and v_pred"),
    "flow": ("scheduler", {"beta_schedule": None, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "no betas"),
    "unknown betas": ("scheduler", {"beta_schedule": "curved"}, "schedule of .* is not valid.*curved"),
    "widths": ("unet", {"cross_attention_dim": [128, 128]}, "only one width for all blocks"),
    "other width": ("unet", {"cross_attention_dim": 96}, "says cross_attention_dim 96, the weights .* have 128"),
    "sdxl": ("unet", {"addition_embed_type": "text_time"}, "more than one condition .addition_embed_type"),
    "classes": ("unet", {"num_class_embeds": 10}, "more than one condition .num_class_embeds"),
    "upscaler": ("unet", {"class_embed_type": "timestep"}, "more than one condition .class_embed_type"),
    "projected": ("unet", {"encoder_hid_dim": 64}, "more than one condition .encoder_hid_dim"),
    "inpainting": ("unet", {"in_channels": 9}, "in_channels 9, its VAE 4 latent channels"),
    "variance": ("unet", {"out_channels": 8}, "out_channels 8, its VAE 4 latent channels"),
    "no attention": (
        "unet",
        {
            "down_block_types": ["DownBlock2D"] * 2,
            "up_block_types": ["UpBlock2D"] * 2,
            "mid_block_type": "UNetMidBlock2D",
        },
        "has no cross-attention",
    ),
    "other network": ("unet", {"_class_name": "UNet2DModel"}, "is a UNet2DModel, but only UNet2DConditionModel"),
    "other vae": ("vae", {"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny, but only AutoencoderKL"),
    "other latents": ("vae", {"latent_channels": 16}, "in_channels 4, its VAE 16 latent channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configurations(copy, case):
    part, values, message = REFUSED[case]
    edit(copy, part, **values)
    with pytest.raises(ValueError, match=message) as raised:
        check_diffusion(copy)
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("resolution", [(100, 64), (128, 72), (0, 64)])
def test_refused_resolutions(original, resolution):
    with pytest.raises(ValueError, match=f"{resolution[0]} x {resolution[1]} .*multiples of 16"):
        check_diffusion(original, resolution=resolution)


def test_refused_folders(copy, tmp_path):
    weights = copy / "unet" / WEIGHTS
    whole = weights.read_bytes()

    def refused(message, place=copy):
        with pytest.raises(ValueError, match=message) as raised:
            check_diffusion(place)
        assert "\n" not in str(raised.value)

    weights.write_bytes(whole[:100_000])
    refused("cannot read .*Download or save")
    weights.rename(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    refused("another name .*fp16")
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    refused("has no unet/.*pickled weights .* are never read")
    (copy / "unet" / "diffusion_pytorch_model.bin").unlink()
    refused("has no unet/.*again")
    weights.write_bytes(whole)
    (copy / "vae" / WEIGHTS).rename(copy / "vae" / "diffusion_pytorch_model.bin")
    refused("has no vae/.*pickled")
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    refused("cannot read .*scheduler_config.json")
    (copy / "scheduler" / "scheduler_config.json").unlink()
    refused("no scheduler/scheduler_config.json .found: .*unet, vae")
    refused("is a file", weights)
    (tmp_path / "empty").mkdir()
    refused("no unet/config.json .found: nothing", tmp_path / "empty")
    refused("no diffusion checkpoint at .*absent", tmp_path / "absent")


FAMILIES = {
    "FluxPipeline": ("FluxTransformer2DModel", "family Flux "),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", "family Stable Diffusion 3 "),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", "family PixArtSigma "),
    "SanaPipeline": ("SanaTransformer2DModel", "family Sana "),
}


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_whole_checkpoints_of_other_families_are_named(tmp_path, pipeline):
    network, named = FAMILIES[pipeline]
    parts = {
        "transformer": ["diffusers", network],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
    }
    parts |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | parts))
    for part in ("transformer", "vae", "scheduler"):
        (tmp_path / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (tmp_path / part / name).write_text(json.dumps({"_class_name": (parts[part])[1]}))
    with pytest.raises(
        ValueError, match=f"whole checkpoint of the {named}.*{network}.*use Stable Diffusion 1.x or 2.x"
    ):
        check_diffusion(tmp_path)
    # A part that is missing is another matter.
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(ValueError, match=f"is not a whole {pipeline}: its model_index.json names transformer, which"):
        check_diffusion(tmp_path)


def test_loading_refuses_weights_of_another_network(copy):
    weights = load_file(copy / "unet" / WEIGHTS)
    save_file({name: value for name, value in weights.items() if name != "conv_in.bias"}, copy / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match="unet weights .* do not fit its config.json: conv_in.bias is missing"):
        load_unet(copy, "lora")
    save_file(weights | {"extra.weight": torch.ones(3)}, copy / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match="extra.weight is not part of the model"):
        load_unet(copy, "frozen")
    save_file(weights | {"conv_in.bias": torch.ones(3)}, copy / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match="cannot be loaded.*conv_in.bias"):
        load_unet(copy, "full")
    shutil.move(copy / "vae" / WEIGHTS, copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="the vae of .* cannot be loaded"):
        load_vae(copy)
    for options in ({"mode": "half"}, {"mode": "lora", "rank": 0}):
        start = time.time()
        with pytest.raises(ValueError, match="must be"):
            load_unet("nobody/nothing", **options)
        assert time.time() - start < 1


def test_hub_and_its_cache(original, tmp_path, monkeypatch):
    """Out of reach the cache serves; what is not in it is refused at once."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.time()
    with pytest.raises(ValueError, match="no diffusion checkpoint at 'people/diffusion'.*Hub id"):
        check_diffusion("people/diffusion")
    assert time.time() - start < 3
    cache = tmp_path / "models--people--diffusion"
    shutil.copytree(original, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    assert check_diffusion("people/diffusion") == check_diffusion(original)


def test_xformers_that_cannot_run(tmp_path, monkeypatch):
    """Kernels built for another torch refuse at first use."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("")
    refuse = "raise NotImplementedError('No operator found\\nfor these inputs')"
    (tmp_path / "xformers" / "ops.py").write_text(f"def memory_efficient_attention(*inputs):\n    {refuse}\n")
    metadata = tmp_path / "xformers-0.0.35.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    for name in ("xformers", "xformers.ops"):
        # Set first, so that what is imported below is gone after the test.
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as raised:
        enable_memory_efficient_attention(build.build_unet())
    message = str(raised.value)
    assert message.startswith(f"xformers cannot run here (xformers 0.0.35, torch {torch.__version__}, ")
    assert "No operator found for these inputs" in message and "is the default" in message


def test_without_xformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"xformers cannot run here.*scaled-dot-product attention is the default"):
        enable_memory_efficient_attention(build.build_unet())
