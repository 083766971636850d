"""Stable Diffusion 1 to 3, SDXL and Flux: drawn as diffusers' own pipelines draw, tuned by their published losses."""

import json
import shutil

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import train_dreambooth_reid as script
from tests.families import BUILDERS, saved
from utils.diffusion.families import family_of, flux, sd3, sdxl, stable_diffusion
from utils.diffusion.families.flow import FlowSchedule
from utils.diffusion.families.settings import fitted, said_of_word
from utils.diffusion.families.texts import load_tokenizer
from utils.diffusion.text_to_image import TextToImage
from utils.diffusion.tuning import Batches, Tunable
from utils.diffusion.unet import save_unet

PROMPTS = ["a photo of a sks person, wearing a red coat", "a dog"]
FILES = {
    "sd": stable_diffusion,
    "sd-v": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3-without-t5": sd3,
    "flux": flux,
    "flux-schnell": flux,
}
UNETS = ("sd", "sd-v", "sdxl")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("families") / kind
            made[kind] = saved(kind, folder), str(folder)
        return made[kind]

    return of


def opened(folder, mode="lora"):
    return TextToImage(folder, load_tokenizer(folder), mode=mode)


def drawn_by(pipeline, kind, noise, **options):
    """Pixels (N, 3, H, W), uint8, that a pipeline of diffusers draws from the same noise."""
    if kind.startswith("flux"):
        size = noise.shape
        noise = pipeline._pack_latents(noise, *size)
    images = pipeline(PROMPTS, latents=noise, output_type="pt", height=32, width=16, **options).images
    return (images * 255).round().to(torch.uint8)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("negative", ["", "a blue hat"])
def test_drawn_as_by_the_pipeline(pipelines, kind, negative):
    pipeline, folder = pipelines(kind)
    model, family = opened(folder), FILES[kind]
    assert family_of(folder) is family and family.check(folder) <= 4
    options = {"steps": 3, "guidance": 2.5, "negative": negative, "resolution": (32, 16)}
    solver = "euler" if kind in UNETS else family.SOLVERS[0]
    with torch.no_grad():
        latents = model.sample(model.encode_all(PROMPTS), [7, 8], solver=solver, **options)
    noise = torch.stack([torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    words = {} if kind.startswith("flux") else {"negative_prompt": [negative or None] * 2 if negative else None}
    if kind == "flux-schnell":
        # Its documentation: at most 256. The other one has learned 512.
        words["max_sequence_length"] = 256
    wanted = drawn_by(pipeline, kind, noise, num_inference_steps=3, guidance_scale=2.5, **words)
    apart = (model.decode(latents).int() - wanted.int()).abs()
    print(f"{kind}, negative {negative!r}: at most {int(apart.max())} of 255, mean {apart.float().mean():.1e}")
    assert apart.max() <= 1 and apart.float().mean() < 0.01
    assert wanted.float().std() > 5


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_lora_loads_in_the_pipeline(pipelines, kind, tmp_path):
    """What is tuned here draws the same there, and differs from the untouched model."""
    _, folder = pipelines(kind)
    pipeline = type(pipelines(kind)[0]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    model = opened(folder)
    with torch.no_grad():
        for name, weight in model.unet.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=2.0, generator=torch.Generator().manual_seed(len(name)))
    assert all(weight.requires_grad for weight in model.trained_weights())
    options = {"steps": 2, "guidance": 1.5, "resolution": (32, 16), "negative": "x"}
    latents = model.sample(
        model.encode_all(PROMPTS), [7, 8], solver=FILES[kind].SOLVERS[-1 if kind != "sdxl" else 3], **options
    )
    noise = torch.stack([torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    words = {} if kind == "flux" else {"negative_prompt": ["x", "x"]}
    before = drawn_by(pipeline, kind, noise, num_inference_steps=2, guidance_scale=1.5, **words)
    save_unet(model.unet, "lora", tmp_path)
    pipeline.load_lora_weights(tmp_path / "unet_lora", weight_name="pytorch_lora_weights.safetensors")
    after = drawn_by(pipeline, kind, noise, num_inference_steps=2, guidance_scale=1.5, **words)
    assert (model.decode(latents).int() - after.int()).abs().max() <= 1
    assert (before.int() - after.int()).abs().max() > 5


def reference_loss(kind, pipeline, latents, noise, timesteps, prompts):
    """The published loss of a family, written with the pipeline's own parts."""
    t = timesteps.view(-1, 1, 1, 1)
    if kind in UNETS:
        alphas = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if kind in ("sd", "sd-v"):
        tokens, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        noised = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        return (
            (pipeline.unet(noised, timesteps, tokens).sample - (noise if kind == "sd" else velocity)).square().mean()
        )
    if kind == "sdxl":
        tokens, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        sizes = torch.tensor([[32, 16, 0, 0, 32, 16]]).repeat(len(prompts), 1)
        noised = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        prediction = pipeline.unet(
            noised, timesteps, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
        ).sample
        return (prediction - noise).square().mean()
    s = t / 1000
    noised = (1 - s) * latents + s * noise
    if kind == "sd3":
        tokens, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
        prediction = pipeline.transformer(noised, tokens, pooled, timesteps).sample
    else:
        words = {"max_sequence_length": 256} if kind == "flux-schnell" else {}
        tokens, pooled, places = pipeline.encode_prompt(prompts, prompts, **words)
        size = noised.shape
        prediction = pipeline.transformer(
            pipeline._pack_latents(noised, *size),
            tokens,
            pooled,
            timesteps / 1000,
            pipeline._prepare_latent_image_ids(len(prompts), size[2] // 2, size[3] // 2, "cpu", torch.float32),
            places,
            None if kind == "flux-schnell" else torch.ones(len(prompts)),
        ).sample
        prediction = pipeline._unpack_latents(prediction, 32, 16, 2)
    return (prediction - (noise - latents)).square().mean()


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl", "sd3", "flux", "flux-schnell"])
def test_ten_steps_of_the_published_loss(pipelines, kind, mode):
    """All weights of the network, or its LoRA: the same losses, and the same weights at the end."""
    pipeline, folder = type(pipelines(kind)[0]).from_pretrained(pipelines(kind)[1]), pipelines(kind)[1]
    network = pipeline.unet if kind in UNETS else pipeline.transformer
    model = opened(folder, mode=mode)
    if mode == "lora":
        (name,) = model.unet.peft_config
        network.requires_grad_(False).add_adapter(model.unet.peft_config[name], adapter_name=name)
        network.load_state_dict(model.unet.state_dict())
    network.train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(trained) == len(model.trained_weights())
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2, 3, 4, 16, 8, generator=generator).abs().unbind()
    batches = Batches((source, ["a sks person"] * 3, None), (torch.randn(2, 4, 16, 8), "a person"), size=2, seed=5)
    ours = torch.optim.SGD(model.trained_weights(), lr=0.05)
    theirs = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(10):
        inputs, rows, _ = batches.draw(model)
        loss = script.denoising_errors(model.denoiser, model.schedule, *inputs, batches.encoded(rows, model)).mean()
        loss.backward()
        ours.step()
        ours.zero_grad()
        wanted = reference_loss(kind, pipeline, *inputs, [batches.texts[row] for row in rows])
        wanted.backward()
        theirs.step()
        theirs.zero_grad()
        losses.append((loss.item(), wanted.item()))
    apart = max(abs(left - right) / right for left, right in losses)
    weights = zip(model.trained_weights(), trained, strict=True)
    moved = max(float((left - right).detach().abs().max()) for left, right in weights)
    first, last = losses[0][0], losses[-1][0]
    print(f"{kind}, {mode}: losses {apart:.1e}, weights {moved:.1e}, first loss {first:.3f}, last {last:.3f}")
    assert apart < 1e-5 and moved < 1e-5
    assert model.schedule.num_steps == 1000


def test_timesteps_of_flow_matching():
    """Logit-normal or uniform places, shifted as the scheduler says, from a generator."""
    config = {"num_train_timesteps": 1000, "shift": 3.0}
    for density, share in (("logit_normal", 0.5), ("uniform", 0.5)):
        schedule = FlowSchedule(config, density)
        drawn = schedule.draw(20000, torch.Generator().manual_seed(0))
        again = schedule.draw(20000, torch.Generator().manual_seed(0))
        assert torch.equal(drawn, again) and drawn.min() > 0 and drawn.max() <= 1000
        # A shift of 3 moves the middle, 0.5, to 3 / 4.
        assert (drawn > 750).double().mean() == pytest.approx(share, abs=0.02)
        middle = torch.tensor([0.25, 0.75]) * 3 / (1 + 2 * torch.tensor([0.25, 0.75])) * 1000
        inside = ((drawn > middle[0]) & (drawn < middle[1])).double().mean()
        assert inside == pytest.approx(0.728 if density == "logit_normal" else 0.5, abs=0.02)
    x, noise = torch.randn(2, 3, 4, 2, 2)
    timesteps = torch.tensor([100.0, 500.0, 900.0])
    noised = schedule.add_noise(x, noise, timesteps)
    assert torch.allclose(schedule.denoised(noised, schedule.target(x, noise, timesteps), timesteps), x, atol=1e-5)


GIVEN = {
    "identity_token": "<iir-{pid}>", "solver": "ddim", "guidance_scale": 3.0, "snr_gamma": None,
    "train_text_encoder": False, "fast_lora": None, "enable_xformers_memory_efficient_attention": False,
    "mixed_precision": "no",
}  # fmt: skip
# The transformer of Flux dev.
DEV = {"guidance_embeds": True}


def test_defaults_follow_the_family():
    changed, lines = fitted(sd3, {}, GIVEN, set())
    assert changed == {"identity_token": "sks", "solver": "flow-euler"} and len(lines) == 2
    assert fitted(sdxl, {}, GIVEN, {"solver", "negative_prompt", "guidance_share"})[0] == {"identity_token": "sks"}
    assert "--mixed_precision bf16" in fitted(sd3, {}, GIVEN | {"mixed_precision": "fp16"}, set())[1][-1]
    changed, lines = fitted(flux, DEV, GIVEN, set())
    assert changed["guidance_scale"] == 3.5 and any("--guidance_scale 3.5" in line for line in lines)
    assert "guidance_scale" not in fitted(flux, DEV, GIVEN, {"guidance_scale"})[0]
    # Schnell has no guidance and few steps.
    changed, lines = fitted(flux, {"guidance_embeds": False}, GIVEN, set())
    assert (changed["guidance_scale"], changed["num_inference_steps"]) == (1.0, 4)
    assert any("distilled to few steps: --guidance_scale 1.0, --num_inference_steps 4" in line for line in lines)
    assert "num_inference_steps" not in fitted(flux, {}, GIVEN, {"num_inference_steps"})[0]
    with pytest.raises(ValueError, match="--guidance_scale: This Flux is distilled .* has no guidance; leave it out"):
        fitted(flux, {"guidance_embeds": False}, GIVEN, {"guidance_scale"})
    refusals = {
        "text encoders, and a new token": (sdxl, {}, {"identity_token"}),
        "--solver ddim does not fit Flux; it takes flow-euler": (flux, {}, {"solver"}),
        "--train_text_encoder trains the one": (sdxl, {"train_text_encoder": True}, set()),
        "--snr_gamma weighs steps": (sd3, {"snr_gamma": 5.0}, set()),
        "--fast_lora is a LoRA of a U-Net": (flux, {"fast_lora": "x"}, set()),
        "--negative_prompt is of predictions with and without": (flux, {}, {"negative_prompt"}),
        "--guidance_share is of predictions with and without": (flux, {}, {"guidance_share"}),
        "--token_learning_rate is that of a new token": (sdxl, {}, {"token_learning_rate"}),
        "does not fit Flux, whose queries": (flux, {"enable_xformers_memory_efficient_attention": True}, set()),
    }
    for message, (family, values, given) in refusals.items():
        with pytest.raises(ValueError, match=message):
            fitted(family, DEV, GIVEN | values, given)


def test_a_word_of_several_tokens_is_said(pipelines):
    tokenizer = CLIPTokenizer.from_pretrained(pipelines("sdxl")[1], subfolder="tokenizer")
    assert said_of_word("person", [tokenizer]) is None
    assert "xqzzy is" in said_of_word("xqzzy", [tokenizer])


BROKEN = {
    "sdxl": ("text_encoder_2/config.json", "projection_dim", 8, "pooled vectors and sizes of width"),
    "sd3": ("transformer/config.json", "pooled_projection_dim", 24, "pooled vectors of width 32"),
    "flux": ("text_encoder_2/config.json", "d_model", 24, "tokens of width 24, its network takes 48"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_parts_that_do_not_fit_are_named(pipelines, kind, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(pipelines(kind)[1], folder)
    file, name, value, message = BROKEN[kind]
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=message):
        FILES[kind].check(str(folder))
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="is no whole checkpoint of .*no vae/config.json"):
        FILES[kind].check(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_from_captions_to_more_images(pipelines, kind, tmp_path, monkeypatch):
    """The script with prior preservation, captions of images and adapters; then more images from the adapters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = f"--pretrained_model_name_or_path {pipelines(kind)[1]} --max_train_steps 2 --num_inference_steps 2"
    words += " --source synthetic:domain=a,num_ids=2,images_per_id=4 --num_reference_images 2 --train_batch_size 1"
    words += " --resolution 32 16 --save_resolution 64 32 --image_captions --caption_dropout 0.2 --save_adapters"
    words += f" --clip_model_name_or_path none --output_dir {tmp_path / 'out'}"
    for more, count in (("--num_images 2", 2), ("--num_images 3 --redraw", 3)):
        assert script.main(script.parse_args([*words.split(), *more.split()])) == {}
        rows = parquet.read_table(tmp_path / "out" / "metadata.parquet").to_pylist()
        assert [row["pid"] for row in rows] == sorted([0, 2] * count)
        assert all("sks person" in row["prompt"] for row in rows)
    adapter = next((tmp_path / "out" / "adapters").rglob("*.safetensors"))
    assert set(load_file(adapter)) and next(iter(load_file(adapter))).startswith(FILES[kind].PART)


@pytest.mark.parametrize("kind, bits", [("flux", 4), ("sdxl", 8), ("sd3", 4)])
def test_frozen_weights_of_few_bits(pipelines, kind, bits):
    """Images stay near those of whole weights, LoRA trains beside them, and its gradient is near the whole one's."""
    whole = opened(pipelines(kind)[1])
    model = TextToImage(pipelines(kind)[1], whole.tokenizer, mode="lora", bits=bits)
    layers = [layer for layer in model.unet.modules() if type(layer).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert layers and all(layer.weight.dtype in (torch.uint8, torch.int8) for layer in layers)
    assert model.digest != whole.digest and len(model.trained_weights()) == len(whole.trained_weights())
    latents, noise = torch.randn(2, 2, 4, 16, 8, generator=torch.Generator().manual_seed(1))
    timesteps, errors = torch.tensor([300, 600]), []
    settings = {"solver": FILES[kind].SOLVERS[0], "resolution": (32, 16), "steps": 2, "guidance": 2.0}
    drawn = [one.decode(one.sample(one.encode_all(PROMPTS), [1, 2], **settings)).int() for one in (whole, model)]
    assert (drawn[0] - drawn[1]).abs().float().mean() < 5
    for one in (whole, model):
        one.unet.train()
        for weight in one.trained_weights():
            weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
        condition = one.encode_all(PROMPTS)
        errors.append(script.denoising_errors(one.denoiser, one.schedule, latents, noise, timesteps, condition))
        errors[-1].mean().backward()
    gradients = [torch.cat([weight.grad.flatten() for weight in one.trained_weights()]) for one in (whole, model)]
    near = torch.cosine_similarity(*gradients, dim=0)
    apart = float((errors[0] - errors[1]).abs().max())
    print(f"{kind}, {bits} bits: error {errors[0][0]:.4f}, apart by {apart:.4f}, cosine of gradients {near:.4f}")
    assert 0 < apart < 0.1 and near > 0.9


def test_no_token_of_its_own_with_several_encoders(pipelines):
    model = opened(pipelines("sd3")[1])
    assert Tunable.of(model, None, with_token=False).token is None and len(model.texts) == 3


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_texts_are_encoded_in_their_own_types(pipelines, kind, monkeypatch):
    """What T5 keeps in float32 stays so under autocast; all encoders visit the device once for many prompts."""
    folder = pipelines(kind)[1]
    model = TextToImage(folder, load_tokenizer(folder), mode="lora", dtype=torch.bfloat16, autocast=half_precision)
    encoders = [text.encoder for text in model.texts]
    inside = []
    for encoder in encoders:
        encoder.register_forward_pre_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    rests = [weight.data_ptr() for encoder in encoders for weight in encoder.parameters()]
    moved, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *words, **more: moved.append(1) or to(self, *words, **more))
    conditions = model.encode_all([f"a photo of a person, {number}" for number in range(20)])
    monkeypatch.undo()
    assert inside == [False] * 3 * len(encoders) and conditions.dtype == torch.bfloat16 and len(conditions) == 20
    assert conditions.device.type == "cpu"
    tensors = sum(len([*encoder.parameters(), *encoder.buffers()]) for encoder in encoders)
    assert tensors <= len(moved) < 2 * tensors
    assert [weight.data_ptr() for encoder in encoders for weight in encoder.parameters()] == rests
    if FILES[kind].GUIDED:
        inside.clear()
        first, again = model.without_prompt("x"), model.without_prompt("x")
        assert first is again and inside == [False] * len(encoders)


def half_precision():
    return torch.autocast("cpu", torch.bfloat16)
