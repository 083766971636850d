"""The stand-ins: built in seconds, the same from the same seed, read by the real classes, small, and taught."""

import hashlib
import random
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BlipForQuestionAnswering,
    BlipProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

from benchmarks.generated import standins as benchmark
from utils import synthetic
from utils.flags import CLIP_DIR, DIFFUSION_DIR, STANDINS
from utils.generated.texts.captions import QUESTIONS
from utils.standins import build, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random stand-ins, from the command."""
    folder = tmp_path_factory.mktemp("tiny")
    build.main(["--output_dir", str(folder), "--seed", "3"])
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder / "clip")


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    start = time.process_time()
    build.build_all(tmp_path / "again", seed=3)
    assert time.process_time() - start < 30
    build.build_all(tmp_path / "other", seed=4)
    first, again, other = (digests(each) for each in (folder, tmp_path / "again", tmp_path / "other"))
    assert again == first
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")} and len(changed) == 5


def test_clip_is_read_by_the_real_classes(folder):
    model, processor = CLIPModel.from_pretrained(folder / "clip"), CLIPProcessor.from_pretrained(folder / "clip")
    inputs = processor(
        text=["a photo of a person", "a red t-shirt"],
        images=[synthetic.render("a", pid, 0, 0) for pid in range(3)],
        padding=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (3, 3, 128, 128)
    with torch.inference_mode():
        scores = model(**inputs).logits_per_image
    assert scores.shape == (3, 2) and scores.isfinite().all()


def test_tall_people_are_squeezed_and_not_cut(folder):
    """Red head and blue shoes are both still there."""
    pixels = np.zeros((128, 64, 3), dtype=np.uint8)
    pixels[:8], pixels[-8:] = (255, 0, 0), (0, 0, 255)
    processor = CLIPProcessor.from_pretrained(folder / "clip")
    seen = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert seen[0, 2].min() > 0.9 and seen[2, -3].min() > 0.9


@pytest.mark.parametrize("height, width", [(128, 64), (64, 128)])
def test_the_whole_pipeline_draws(folder, height, width):
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "stable-diffusion")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    image = pipeline("a person", height=height, width=width, num_inference_steps=2, generator=noise).images[0]
    assert image.size == (width, height) and len(np.unique(np.asarray(image))) > 8


def test_parts_of_the_pipeline_are_read_from_their_folders(folder):
    path = folder / "stable-diffusion"
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae")
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    tokens = tokenizer(["a person"], padding="max_length", return_tensors="pt").input_ids
    images = torch.zeros(1, 3, 128, 64)
    with torch.inference_mode():
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        states = encoder(tokens).last_hidden_state
        noise = unet(latents, torch.tensor([5]), states).sample
        assert vae.decode(latents).sample.shape == images.shape
    assert latents.shape == noise.shape == (1, 4, 16, 8) and states.shape == (1, 77, 128)
    assert scheduler.config.prediction_type == "epsilon" and scheduler.config.num_train_timesteps == 1000
    # Stable Diffusion 1.x: scaled-linear from 0.00085 to 0.012
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6)


def test_the_pipeline_reads_with_the_text_half_of_clip(folder):
    clip = CLIPModel.from_pretrained(folder / "clip")
    encoder = CLIPTextModel.from_pretrained(folder / "stable-diffusion", subfolder="text_encoder")
    tokens = torch.tensor([[5, 6, 7, clip.config.text_config.eos_token_id]])
    with torch.inference_mode():
        mine, its = encoder(tokens).last_hidden_state, clip.text_model(tokens).last_hidden_state
    assert torch.equal(mine, its)


def test_the_question_answerer_is_read_by_the_real_classes(folder):
    model = BlipForQuestionAnswering.from_pretrained(folder / "blip-vqa")
    processor = BlipProcessor.from_pretrained(folder / "blip-vqa")
    images = [synthetic.render("a", pid, 0, 0) for pid in range(2)]
    inputs = processor(images=images, text=["what is it?", "where is the person?"], padding=True, return_tensors="pt")
    assert len(processor.batch_decode(model.generate(**inputs, max_new_tokens=4), skip_special_tokens=True)) == 2


def test_every_text_has_a_code(tokenizer):
    """Each byte has two tokens, within a word and at its end, so no text is lost; only case and blanks change."""
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert sum(len(token) == 1 for token in vocab) == 256
    assert sum(len(token) == 5 and token.endswith("</w>") for token in vocab) == 256
    rng = random.Random(0)
    words = ["".join(chr(rng.choice((rng.randrange(33, 0x2FF), rng.randrange(0x4E00, 0x9FFF)))) for _ in range(6))]
    for text in [*words, "ein Mann mit Hut", "日本語", "naïve café", "x 7 !?", "emoji 🙂", *QUESTIONS.values()]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids[1:-1]
        shown = tokenizer.decode(ids, skip_special_tokens=True)
        assert shown.replace(" ", "") == text.lower().replace(" ", "")


def test_the_window_is_that_of_the_real_one(tokenizer):
    assert tokenizer.model_max_length == 77
    full = tokenizer("red " * 200, truncation=True).input_ids
    assert len(full) == 77 and full[-1] == tokenizer.eos_token_id
    short = tokenizer("red", padding="max_length").input_ids
    assert len(short) == 77 and short[3:] == [tokenizer.pad_token_id] * 74


def test_captions_fit_the_window(tokenizer):
    texts = [synthetic.caption(synthetic.describe(domain, pid, 0, 0)) for domain in "abcde" for pid in range(40)]
    assert max(map(len, tokenizer(texts).input_ids)) < 77


def test_both_tokenizers_know_the_words_of_the_world(folder, tokenizer):
    """Whole words are one token each, and none of them is unknown."""
    asked = AutoTokenizer.from_pretrained(folder / "blip-vqa")
    for word in (*synthetic.COLOURS, "backpack", "trousers", "jacket", "person"):
        assert len(tokenizer(word).input_ids) == 3 and len(asked(word).input_ids) == 3
    for text in QUESTIONS.values():
        assert asked.unk_token_id not in asked(text).input_ids
        assert asked.decode(asked(text).input_ids, skip_special_tokens=True).replace(" ?", "?") == text


def test_shipped_ones_are_small_and_whole():
    """Beside the code that builds them there is nothing but these four."""
    folders = [path for path in STANDINS.iterdir() if path.suffix != ".py" and path.name != "__pycache__"]
    assert {path.name for path in folders} == {"blip-vqa", "clip", "resnet", "stable-diffusion"}
    sizes = {path: path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 19 * 2**20
    assert not [path for path in sizes if path.suffix not in (".json", ".md", ".safetensors", ".txt")]


def test_shipped_ones_are_those_that_the_code_builds(folder):
    """Every tensor has the shape of the code's, and the vocabulary the same tokens."""
    for path in sorted(folder.rglob("*.safetensors")):
        built, shipped = load_file(path), load_file(STANDINS / path.relative_to(folder))
        assert {name: value.shape for name, value in built.items()} == {
            name: value.shape for name, value in shipped.items()
        }
        assert all(value.isfinite().all() for value in shipped.values())
    vocab = CLIPTokenizer.from_pretrained(folder / "clip").get_vocab()
    for place in (CLIP_DIR, f"{DIFFUSION_DIR}/tokenizer"):
        assert CLIPTokenizer.from_pretrained(place).get_vocab().keys() == vocab.keys()


def test_the_shipped_pipeline_draws():
    pipeline = StableDiffusionPipeline.from_pretrained(DIFFUSION_DIR, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    image = pipeline("a person", height=128, width=64, num_inference_steps=4, generator=noise).images[0]
    assert image.size == (64, 128) and np.asarray(image).std() > 10


def test_the_shipped_clip_finds_captions():
    """Of 32 captions of people it never saw, an image's own is nearest far oftener than by chance."""
    model, processor = CLIPModel.from_pretrained(CLIP_DIR), CLIPProcessor.from_pretrained(CLIP_DIR)
    images, words = zip(*benchmark.pictures("f", 32, 3000)[::2], strict=True)
    texts = [synthetic.caption(one) for one in words]
    with torch.inference_mode():
        inputs = processor(text=texts, images=list(images), padding=True, return_tensors="pt")
        scores = model.float()(**inputs).logits_per_image
    assert (scores.argmax(1) == torch.arange(32)).float().mean() > 0.3


def test_the_shipped_question_answerer_sees():
    """On domain a, of which it learned nothing, it does better than the commonest answer."""
    keys = ("upper", "lower", "shoes", "hair", "carried", "hat")
    found = benchmark.accuracies(*benchmark.load_answerer(), benchmark.pictures("a", 24), keys=keys)
    for name in (*keys, "upper_colour", "upper_kind", "lower_colour"):
        assert found[name]["accuracy"] > found[name]["commonest"] + 0.1


def test_wanderers_are_the_same_people_elsewhere():
    """Clothes and place are drawn apart, and the words say what the pictures show."""
    people, wanderers = train.People(12), train.Wanderers(12)
    assert wanderers.rows == people.rows and not torch.equal(wanderers.pixels, people.pixels)
    places = {}
    for number, (domain, *_) in enumerate(wanderers.rows):
        home, away = people.words(number), wanderers.words(number)
        assert {key for key in home if home[key] != away[key]} <= {"place", "scene"}
        scenes = {None: None, "in an indoor hall": "indoors"}
        assert away["scene"] == scenes.get(away["place"], "outdoors")
        places.setdefault(domain, set()).add(away["place"])
    assert all(len(seen) == 4 for seen in places.values())
    # A bright hall, dark rain: the picture is of the place that the words name.
    light = wanderers.pixels[:, :, :8].float().mean(dim=(1, 2, 3))
    names = [wanderers.words(number)["place"] or "" for number in range(len(light))]
    rain, snow = (torch.tensor([name.endswith(one) for name in names]) for one in ("rain", "snow"))
    assert light[rain].mean() < light[snow].mean() - 20


def test_every_part_of_a_person_is_a_lesson():
    words = synthetic.describe("f", 3, 0, 0) | {"hair": "long red hair", "carried": "nothing", "hat": "blue cap"}
    alone = ("upper_colour", "pattern", "upper_kind", "lower_colour", "lower_kind", "shoes", "action", "view", "scene")
    wanted = [words[key] for key in alone] + ["long", "red hair", "nothing", "", "blue", "cap"]
    assert train.parts_of(words) == wanted


def test_the_question_answerer_learns_and_goes_on(tmp_path):
    people = train.Wanderers(2)
    random = build.build_captioner()[0].state_dict()
    settings = {"batch": 4, "questions_each": 2}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, _ = train.train_captioner(people, 2, 2, tmp_path / "whole", **settings)
    train.train_captioner(people, 2, 1, tmp_path / "parts", **settings)
    parts, _ = train.train_captioner(people, 2, 2, tmp_path / "parts", **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
        if value.is_floating_point() and name != "text_decoder.cls.predictions.bias":
            assert not torch.equal(value, random[name]), name


def test_pictures_are_moved_and_lit_within_bounds():
    images = torch.rand(6, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    first, again = (train.seen_anyhow(images, (128, 128), torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (6, 3, 128, 128) and torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 1
    still = torch.nn.functional.interpolate(images, (128, 128), mode="bilinear")
    assert (first - still).abs().mean() > 0.05
