"""Generation from captions to the merged set: the method against its formulas, resuming, shards, bad input."""

import csv
import json
import shutil
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import CLIPTokenizer

import train_dreambooth_reid as script
from tests import runs
from tests.diffusion.test_fast_lora import few_step_lora
from tests.diffusion.test_person_masks import segmenter
from tests.generated.test_captions import save_git
from tests.reporting.test_reporting import needs_chromium, seen_in_chromium
from tests.runs import ROOT, launch, stopped
from tests.runs import files_of as files
from utils.batches.chunks import weights_digest
from utils.datasets.identities import chosen_identities, identities_of, open_identities
from utils.datasets.load import load_reid
from utils.diffusion.families.solvers import FLOW_EULER, WITH_NOISE, solver_of
from utils.diffusion.families.solvers import NOISE_SOLVERS as SOLVERS
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.text_to_image import TextToImage
from utils.diffusion.tuning import IdentityToken, Tunable
from utils.diffusion.unet import load_unet, save_unet
from utils.flags import CAPTIONER_DIR
from utils.generated.measures import diversity, identity_auc
from utils.generated.texts import captioning, captions
from utils.generated.texts.captioning import open_prompts
from utils.standins import build
from utils.synthetic.world import attributes

SOURCE = "synthetic:domain=a,num_ids=3,images_per_id=4"
NAMES = ["synthetic-a/0000", "synthetic-a/0002", "synthetic-a/0004"]
FEW = "--max_train_steps 3 --num_images 3 --num_reference_images 4 --num_inference_steps 2 --train_batch_size 2"
FEW += " --sample_batch_size 2 --save_resolution 64 32 --resolution 64 32"


class Quiet:
    """A progress that says nothing."""

    def stage(self, *words):
        pass


PROMPTS = {"class_prompt": script.CLASS_PROMPT, "identity_token": "<iir-{pid}>", "lists": {}, "progress": Quiet()}


@pytest.fixture(scope="module")
def models(standins):
    return standins


def arguments(models, output_dir, *more):
    places = ["--pretrained_model_name_or_path", models / "stable-diffusion", "--output_dir", output_dir]
    places += ["--clip_model_name_or_path", models / "clip", "--captioner_model_name_or_path", models / "blip-vqa"]
    return [str(one) for one in (*places, "--source", SOURCE, *FEW.split(), *more)]


def run(models, output_dir, *more):
    return runs.run(script, *arguments(models, output_dir, *more))


SCRIPT = "train_dreambooth_reid.py"


def record(folder, name, kind="images"):
    return json.loads((folder / "identities" / name / f"{kind}.json").read_text())


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An unbroken run, and what was seen on the way: hashes of all weights at the places that matter."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    seen = {"start": [], "reference": [], "tuned": [], "rows": [], "embeddings": []}
    plain = {name: getattr(script, name) for name in ("fine_tune", "reference_set")}

    def hashes(model):
        return [weights_digest(part) for part in (model.unet, model.vae, model.text_encoder)]

    def reference_set(args, model, work, prompt):
        before = hashes(model)
        result = plain["reference_set"](args, model, work, prompt)
        assert hashes(model) == before
        seen["reference"].append((*before, prompt))
        return result

    def fine_tune(args, tunable, *rest, **options):
        seen["start"].append([*hashes(tunable.model), tunable.token.row.detach().clone()])
        losses = plain["fine_tune"](args, tunable, *rest, **options)
        seen["tuned"].append(hashes(tunable.model))
        seen["rows"].append(tunable.token.row.detach().clone())
        seen["embeddings"].append(tunable.model.text_encoder.get_input_embeddings().weight.detach().clone())
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "fine_tune", fine_tune)
        patch.setattr(script, "reference_set", reference_set)
        assert run(models, folder) == {}
    return folder, seen


# The set


def test_the_set_has_everything_and_opens_in_both_ways(whole, tmp_path):
    folder, _ = whole
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "captions.parquet", "metadata.parquet", "measures.csv", "report.html", "README.md", "images",
        "identities", "references",
    }  # fmt: skip
    images = sorted(path.relative_to(folder).as_posix() for path in (folder / "images").rglob("*") if path.is_file())
    assert images == [f"images/{name}/{index:04d}.jpg" for name in NAMES for index in range(3)]
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    assert [row["path"] for row in rows] == [row["file_name"] for row in rows] == images
    assert {(row["camid"], row["domain"], row["steps"], row["guidance"], row["synthetic"]) for row in rows} == {
        (-1, "synthetic-a", 2, 3.0, True)
    }
    assert [row["pid"] for row in rows] == [0] * 3 + [2] * 3 + [4] * 3
    assert len({row["seed"] for row in rows}) == 9 and len({row["model"] for row in rows}) == 1

    opened = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))["train"]
    assert len(opened) == 9 and opened[4]["pid"] == 2 and opened[4]["image"].size == (32, 64)
    ours = load_reid(str(folder))["train"]
    assert list(ours["path"]) == images and set(ours["camid"]) == {0} and set(ours["domain"]) == {"synthetic-a"}
    for row in rows:
        with Image.open(folder / row["path"]) as image:
            mark = json.loads(image.getexif()[0x010E])
        assert mark == {"synthetic": True, **{name: row[name] for name in ("prompt", "seed", "model")}}


def test_no_file_knows_the_time_or_a_path_of_the_machine(whole, models):
    folder, _ = whole
    for name, content in files(folder).items():
        for word in (str(folder.parent), str(models), str(ROOT), time.strftime("%Y-%m"), time.strftime("%b %Y")):
            assert word.encode() not in content, (name, word)


def test_measures_are_cosines_of_clip(whole, models):
    from transformers import CLIPModel, CLIPProcessor

    folder, _ = whole
    clip, processor = CLIPModel.from_pretrained(models / "clip"), CLIPProcessor.from_pretrained(models / "clip")
    identity = open_identities([SOURCE])[1]
    found = record(folder, identity.name)

    def features(images):
        with torch.inference_mode():
            out = clip.get_image_features(**processor(images=images, return_tensors="pt"))
        return torch.nn.functional.normalize(getattr(out, "pooler_output", out), dim=1)

    # The measured images had not been through JPEG.
    ours = features(identity.images())
    theirs = features([Image.open(folder / one["path"]) for one in found["images"]])
    assert found["measures"]["image_similarity"] == pytest.approx(float((theirs @ ours.T).mean()), abs=0.03)
    pairs = [float(1 - theirs[a] @ theirs[b]) for a in range(3) for b in range(a)]
    assert found["measures"]["diversity"] == pytest.approx(sum(pairs) / 3, abs=0.03)
    with open(folder / "measures.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["pid"] for line in lines] == ["0", "2", "4"]
    assert float(lines[1]["diversity"]) == found["measures"]["diversity"]


def test_diversity_and_auc_against_loops():
    torch.manual_seed(0)
    one = torch.nn.functional.normalize(torch.randn(7, 5), dim=1)
    pairs = [float(1 - one[a] @ one[b]) for a in range(7) for b in range(a)]
    assert diversity(one) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert diversity(one[:1]) == 0
    sources, made = torch.randn(6, 5), torch.randn(6, 5)
    made[3] = made[2]
    similar = torch.nn.functional.cosine_similarity(made[:, None], sources[None], dim=2)
    wins = [
        1.0 if similar[a, a] > similar[b, c] else 0.5 if similar[a, a] == similar[b, c] else 0.0
        for a in range(6)
        for b in range(6)
        for c in range(6)
        if b != c
    ]
    assert identity_auc(sources, made) == pytest.approx(sum(wins) / len(wins), abs=1e-6)
    assert identity_auc(sources, sources) == 1.0
    assert identity_auc(sources[:1], made[:1]) is None


def test_constants_of_the_flags_are_those_of_the_modules():
    assert captions.CLASS_PROMPT == script.CLASS_PROMPT and (*SOLVERS, FLOW_EULER) == script.SOLVERS


def test_captions_are_shown_whole(models, tmp_path):
    words = " ".join(f"word{number}" for number in range(40))
    (tmp_path / "p.csv").write_text(f"pid,prompt\n0,a person {words}\n")
    run(models, tmp_path / "out", "--prompts", tmp_path / "p.csv", "--ids", "0", "--captions_only")
    prompt = record(tmp_path / "out", NAMES[0], "captions")["prompt"]
    assert f'<th scope="row" class="words">{prompt}</th>' in (tmp_path / "out" / "report.html").read_text()


# The image sequence


def test_the_sequence_is_of_the_fullest_camera_in_file_order():
    rows = [(7, 2, "c"), (7, 2, "a"), (7, 1, "b"), (7, 1, "d"), (7, 0, "e"), (3, 5, "f")]
    table = {
        "domain": ["m"] * 6,
        "pid": [r[0] for r in rows],
        "camid": [r[1] for r in rows],
        "path": [r[2] for r in rows],
    }
    dataset = datasets.Dataset.from_dict(table)
    found = list(identities_of(dataset))
    assert [(one.name, one.camid, one.paths, one.rows) for one in found] == [
        ("m/0003", 5, ("f",), (5,)),
        ("m/0007", 1, ("b", "d"), (2, 3)),
    ]
    assert next(one for one in identities_of(dataset, 1) if one.pid == 7).paths == ("b",)


def test_ids_are_numbers_ranges_and_names():
    everyone = open_identities(["synthetic:domain=a,num_ids=4", "synthetic:domain=b,num_ids=2"])
    assert [one.name for one in chosen_identities(everyone, ["2-4", "synthetic-b/2"])] == [
        "synthetic-a/0002", "synthetic-a/0004", "synthetic-b/0002",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--ids 1: the source has no images of such an identity; it has 6 identities"):
        chosen_identities(everyone, ["1"])
    with pytest.raises(ValueError, match="neither a number, a range"):
        chosen_identities(everyone, ["two"])
    with pytest.raises(ValueError, match="two of the sources have an identity synthetic-a/0000"):
        open_identities([SOURCE, SOURCE])


# LPE and IIR


def test_the_prompt_without_identity_never_has_the_token(whole):
    folder, seen = whole
    rows = pq.read_table(folder / "captions.parquet").to_pylist()
    assert [(row["domain"], row["pid"]) for row in rows] == [("synthetic-a", pid) for pid in (0, 2, 4)]
    for row in rows:
        token = f"<iir-{row['pid']:04d}>"
        assert "iir" not in row["prompt"] and row["prompt"].startswith("a photo of a person")
        assert row["identity_prompt"] == row["prompt"].replace("a person", f"{token} person", 1)
        assert len(row["images"]) == len({image["path"] for image in row["images"]}) > 0
        for key in captions.QUESTIONS:
            said = [captions.clean(image[key], key) for image in row["images"]]
            assert row[key] == captions.majority(said)
    uppers = [captions.colour_and_kind(row["upper"]) for row in rows]
    assert [prompt for *_, prompt in seen["reference"]] == [captions.compose({"upper": upper}) for upper in uppers]
    for row in pq.read_table(folder / "metadata.parquet").to_pylist():
        assert f"of <iir-{row['pid']:04d}> person" in row["prompt"]


def test_only_the_row_of_the_token_moves(whole, models):
    _, seen = whole
    stored = load_file(models / "stable-diffusion/text_encoder/model.safetensors")
    table = next(value for name, value in stored.items() if name.endswith("token_embedding.weight"))
    tokenizer = CLIPTokenizer.from_pretrained(models / "stable-diffusion/tokenizer")
    person = table[tokenizer("person", add_special_tokens=False).input_ids[0]]
    for after, row, start in zip(seen["embeddings"], seen["rows"], seen["start"], strict=True):
        assert torch.equal(after, table)
        assert torch.equal(start[-1], person)
        assert (row != person).all()
    assert not torch.equal(seen["rows"][0], seen["rows"][1])


def test_the_token_is_one_token_and_its_row_is_what_is_read(models):
    folder = str(models / "stable-diffusion")
    identity = open_identities([SOURCE])[1]
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    first_id = len(tokenizer)
    assert open_prompts(tokenizer, [identity], **PROMPTS).first_id == first_id
    ids = tokenizer("a photo of <iir-0002> person").input_ids
    assert ids[4] == first_id and len(ids) == 7
    model = TextToImage(folder, tokenizer, mode="lora")
    before = model.encode_all(["a photo of a person"])
    noun_id = tokenizer("person", add_special_tokens=False).input_ids[0]
    token = IdentityToken(model.text_encoder, first_id, noun_id)
    assert torch.equal(model.encode_all(["a photo of a person"]), before)
    # As it starts, the token is the noun.
    assert torch.equal(model.encode_all(["a <iir-0002> tree"]), model.encode_all(["a person tree"]))
    table = model.text_encoder.get_input_embeddings().weight
    word = tokenizer("red", add_special_tokens=False).input_ids[0]
    token.row.data.copy_(table[word])
    assert torch.equal(model.encode_all(["a <iir-0002> tree"]), model.encode_all(["a red tree"]))
    model.encode(["a <iir-0002> tree"]).sum().backward()
    assert token.row.grad.abs().sum() > 0 and table.grad is None


def test_a_given_word_adds_nothing(models, tmp_path):
    out = tmp_path / "out"
    run(models, out, "--identity_token", "sks", "--ids", "2", "--clip_model_name_or_path", "none", "--num_images", "1")
    found = record(out, NAMES[1])
    assert "a photo of sks person" in found["identity_prompt"] and "sks" not in found["prompt"]
    assert found["measures"] == {} and not (out / "adapters").exists()


# DI: reference set, loss, restoring


def test_references_are_drawn_from_the_untouched_weights(whole, models):
    folder, seen = whole
    before = {tuple(one[:3]) for one in seen["reference"]}
    assert len(before) == 1 and len(seen["reference"]) == 3
    first = record(folder, NAMES[0])
    tokenizer = CLIPTokenizer.from_pretrained(models / "stable-diffusion/tokenizer")
    model = TextToImage(str(models / "stable-diffusion"), tokenizer, mode="full")
    prompt = record(folder, NAMES[0], "captions")["reference_prompt"]
    seeds = [script.seed_of(0, "reference", prompt, number) for number in range(4)]
    condition = model.encode_all([prompt] * 4)
    latents = model.sample(condition, seeds, resolution=(64, 32), steps=2, guidance=3.0, batch_size=2)
    kept = load_file(folder / f"references/{first['reference']}.safetensors")
    torch.testing.assert_close(kept["latents"].float(), latents, rtol=2e-3, atol=2e-3)
    assert (kept["preview"].int() - model.decode(latents).int()).abs().max() <= 1


def test_every_identity_starts_from_the_same_weights_and_ends_elsewhere(whole):
    _, seen = whole
    assert len({tuple(one[:3]) for one in seen["start"]}) == 1
    assert len({one[0] for one in seen["tuned"]}) == 3
    assert seen["start"][0][0] not in {one[0] for one in seen["tuned"]}
    # Of VAE and text encoder nothing trains.
    assert {tuple(one[1:]) for one in seen["tuned"]} == {tuple(seen["start"][0][1:3])}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_hundredth_identity_starts_where_the_first_did(models, tmp_path, mode):
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["--finetune", mode, "--train_text_encoder", "--max_train_steps", "1", "--learning_rate", "1e-3"]
    source = ["--source", "synthetic:domain=a,num_ids=100,images_per_id=4"]
    args = script.parse_args(arguments(models, tmp_path, *more, *source))
    identities = open_identities(args.source)
    _, tokenizer = script.check_inputs(args, identities, identities, print)
    prompts = open_prompts(tokenizer, identities, **PROMPTS)
    tunable = script.open_model(args, Accelerator(cpu=True), prompts)
    words = {"identity_prompt": f"a photo of {prompts.token_of(identities[0])} person"}
    words["reference_prompt"] = "a photo of a person"
    starts, ends = set(), set()
    for number, identity in enumerate(identities):
        # What a step leaves that ran out of memory.
        tunable.weights[0].grad = torch.ones_like(tunable.weights[0])
        tunable.restore()
        assert all(weight.grad is None for weight in tunable.weights)
        parts = (tunable.model.unet, tunable.model.text_encoder, tunable.token)
        starts.add(tuple(weights_digest(part) for part in parts))
        latents = torch.randn(3, 2, 4, 8, 4, generator=torch.Generator().manual_seed(number))
        script.fine_tune(args, tunable, identity, words, (latents[0], latents[1].abs()), latents[2], Quiet())
        ends.add(weights_digest(tunable.model.unet))
    assert len(identities) == 100 and len(starts) == 1 and len(ends) == 100


def test_few_reference_sets_serve_many_identities():
    """Of 751 people, as many as Market-1501 trains on: all prompts differ, the shared reference prompts hardly do."""
    people = [attributes("a", pid) for pid in range(0, 1502, 2)]
    records = [{"attributes": {key: one[key] for key in captions.QUESTIONS if key in one}} for one in people]
    whole, shared = ({function(one) for one in records} for function in (captions.composed, captions.reference_prompt))
    assert len(records) == 751 and len(whole) > 740 and len(shared) <= 60
    # A prompt by hand stays.
    assert captions.reference_prompt(records[0] | {"text": "a person in red"}) == "a person in red"


@pytest.mark.parametrize(
    "words, kept",
    [
        ("red coat", "red coat"),
        ("long red coat with buttons", "red coat"),
        ("black and white striped shirt", "black shirt"),
        ("black shirt and blue jeans", "black shirt"),
        ("t-shirt", "t-shirt"),
        ("", ""),
    ],
)
def test_a_garment_by_its_colour_and_kind(words, kept):
    assert captions.colour_and_kind(words) == kept


@pytest.mark.slow
@pytest.mark.parametrize("kind, sets", [("shared", 1), ("own", 2)])
def test_reference_prompts_are_shared_or_own(models, tmp_path, kind, sets):
    (tmp_path / "p.csv").write_text("pid,upper,lower\n0,long red coat,jeans\n2,red coat,shorts\n")
    flags = ["--ids", "0", "2", "--num_images", "1", "--prompts", tmp_path / "p.csv", "--reference_prompts", kind]
    run(models, tmp_path / "out", *flags)
    assert len(list((tmp_path / "out" / "references").iterdir())) == sets
    assert f"{sets} for 2 identities" in (tmp_path / "out" / "report.html").read_text()


def test_identities_of_the_same_words_share_a_reference_set(models, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('pid,prompt\n0,"a person in red"\n2,"a person in red"\n')
    out = tmp_path / "out"
    run(models, out, "--prompts", path, "--ids", "0", "2", "--num_images", "1")
    assert len(list((out / "references").iterdir())) == 1
    assert record(out, NAMES[0])["reference"] == record(out, NAMES[1])["reference"]
    assert record(out, NAMES[0])["images"] != record(out, NAMES[1])["images"]
    made = record(out, NAMES[0])["images"][0]["prompt"]
    assert made.startswith("a photo") is False and made.startswith("<iir-0000> person in red, ")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_formula(prediction_type, gamma):
    """w_t |x^ - x|^2 of the denoised image, with w_t = SNR or min(SNR, gamma), on diffusers' own schedule."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler.from_config(build.build_scheduler().config, prediction_type=prediction_type)
    schedule = NoiseSchedule(scheduler)
    latents, noise, answer = torch.randn(3, 4, 4, 8, 4).double()
    timesteps = torch.tensor([0, 300, 700, 999])

    def unet(noised, times, encoder_hidden_states):
        want = scheduler.add_noise(latents.float(), noise.float(), timesteps)
        torch.testing.assert_close(noised.float(), want, rtol=1e-5, atol=1e-5)
        return type("Output", (), {"sample": answer.float()})

    condition = torch.zeros(4, 1, 1)
    errors = script.denoising_errors(unet, schedule, latents.float(), noise.float(), timesteps, condition, gamma)
    cumulated = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    signal, strength = cumulated.sqrt(), (1 - cumulated).sqrt()
    noised = signal * latents + strength * noise
    if prediction_type == "epsilon":
        denoised = (noised - strength * answer) / signal
    else:
        denoised = signal * noised - strength * answer
    snr = (signal / strength).square()
    weight = snr if gamma is None else snr.clamp(max=gamma)
    if prediction_type == "v_prediction" and gamma is None:
        # The plain loss on v weighs the denoised image by SNR + 1.
        weight = snr + 1
    wanted = (weight * (denoised - latents).square()).mean((1, 2, 3))
    torch.testing.assert_close(errors.double(), wanted, rtol=2e-4, atol=1e-6)


def test_a_step_adds_both_halves_with_lambda(models, monkeypatch):
    """One step of SGD moves LoRA by the gradient of own + lambda x reference loss, computed apart."""
    folder = str(models / "stable-diffusion")
    args = script.parse_args(["--pretrained_model_name_or_path", folder, *FEW.split(), "--max_train_steps", "1"])
    args.prior_loss_weight, args.max_grad_norm, args.identity_token = 0.3, 1e9, "sks"
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    model = TextToImage(folder, tokenizer, mode="lora")
    tunable = Tunable.of(model, IdentityToken(model.text_encoder, len(tokenizer), 0), with_token=False)
    for weight in tunable.weights:
        # The second matrices start at zero, and with them the gradient of the first.
        weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    identity = open_identities([SOURCE])[0]
    torch.manual_seed(0)
    source, reference = (torch.randn(3, 4, 8, 4), torch.rand(3, 4, 8, 4)), torch.randn(4, 4, 8, 4)
    words = {"identity_prompt": "a photo of sks person", "reference_prompt": "a photo of a person"}

    def tuned(weight, reference):
        args.prior_loss_weight = weight
        rates = {"lr": 1.0}
        monkeypatch.setattr(
            script, "build_optimizer", lambda groups, *_, **__: torch.optim.SGD(tunable.weights, **rates)
        )
        before = [one.detach().clone() for one in tunable.weights]
        losses = script.fine_tune(args, tunable, identity, words, source, reference, Quiet())
        moved = [new.detach() - old for new, old in zip(tunable.weights, before, strict=True)]
        for one, old in zip(tunable.weights, before, strict=True):
            one.data.copy_(old)
        return losses, moved

    losses, both = tuned(0.3, reference)
    again, more = tuned(1.3, reference)
    own_losses, own = tuned(0.0, reference)
    assert losses.shape == (1, 2) and torch.equal(losses, again)
    for together, with_one_more, alone in zip(both, more, own, strict=True):
        torch.testing.assert_close(with_one_more - together, (together - alone) / 0.3, rtol=2e-3, atol=1e-5)
    assert sum(float((one - other).abs().sum()) for one, other in zip(both, own, strict=True)) > 1e-4
    assert sum(float(one.abs().sum()) for one in own) > 1e-4
    apart, _ = tuned(0.0, None)
    assert apart.shape == (1, 1) and apart[0, 0] != pytest.approx(0)


class Halves:
    """Records what the loss of each step is computed from."""

    def __init__(self, monkeypatch):
        self.steps, plain = [], script.denoising_errors

        def errors(unet, schedule, latents, noise, timesteps, condition, snr_gamma=None, weights=None):
            self.steps.append((latents.clone(), timesteps.clone(), condition.detach().clone()))
            return plain(unet, schedule, latents, noise, timesteps, condition, snr_gamma, weights)

        monkeypatch.setattr(script, "denoising_errors", errors)


@pytest.mark.parametrize("token", ["sks", "<iir-{pid}>"])
def test_each_half_has_its_own_prompt_and_each_image_its_own_time(models, monkeypatch, token):
    """Own images under P_E, reference images under theirs, and a timestep drawn for each image of both halves."""
    folder, size = str(models / "stable-diffusion"), 3
    flags = f"{FEW} --max_train_steps 4 --train_batch_size {size} --identity_token {token}"
    args = script.parse_args(["--pretrained_model_name_or_path", folder, *flags.split()])
    identity = open_identities([SOURCE])[1]
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    prompts = open_prompts(tokenizer, [identity], **PROMPTS | {"identity_token": token})
    tunable = script.open_model(args, Accelerator(cpu=True), prompts)
    name = prompts.token_of(identity)
    words = {"identity_prompt": f"a photo of {name} person, in red", "reference_prompt": "a photo of a person in blue"}
    own, others = tunable.model.encode_all(list(words.values()))
    assert not torch.allclose(own, others, atol=1e-2)
    torch.manual_seed(0)
    # The latents tell the halves apart: own images lie near 9 / the VAE's factor, reference images near -9.
    source = (torch.full((5, 4, 8, 4), 9.0), torch.full((5, 4, 8, 4), 1e-3))
    halves = Halves(monkeypatch)
    script.fine_tune(args, tunable, identity, words, source, torch.full((5, 4, 8, 4), -9.0), Quiet())
    latents, timesteps, conditions = halves.steps[0]
    assert (latents[:size] > 0).all() and (latents[size:] < 0).all()
    for row in range(size):
        torch.testing.assert_close(conditions[row], own)
        torch.testing.assert_close(conditions[size + row], others)
    times = torch.stack([step[1] for step in halves.steps])
    assert times.shape == (4, 2 * size)
    assert not (times[:, :size] == times[:, size:]).all(1).any() and len(times.unique()) > 3 * size


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_of_a_last_step_without_signal(prediction_type):
    """Terminal SNR 0: the weights of diffusers' training scripts, 0 for v-prediction, and never NaN."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    schedule, timesteps = NoiseSchedule(scheduler), torch.tensor([0, 500, 999])
    latents, noise, answer = torch.randn(3, 3, 4, 8, 4, generator=torch.Generator().manual_seed(0))

    def unet(noised, times, encoder_hidden_states):
        return type("Output", (), {"sample": answer})

    inputs = (unet, schedule, latents, noise, timesteps, torch.zeros(3, 1, 1))
    plain, weighted = script.denoising_errors(*inputs), script.denoising_errors(*inputs, 5.0)
    snr = compute_snr(scheduler, timesteps)
    assert snr[-1] == 0
    weight = snr.clamp(max=5.0)
    weight = weight / (snr + 1) if prediction_type == "v_prediction" else torch.where(snr > 0, weight / snr, 1.0)
    torch.testing.assert_close(weighted, plain * weight)


def test_lora_of_the_text_encoder_needs_peft_alone(models, monkeypatch):
    """transformers' own add_adapter may ask for a peft that is not out yet."""
    from transformers.integrations.peft import PeftAdapterMixin

    monkeypatch.setattr(PeftAdapterMixin, "add_adapter", lambda *_, **__: pytest.fail("it may ask for a newer peft"))
    folder = models / "stable-diffusion"
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    alone = TextToImage(str(folder), tokenizer, mode="lora")
    model = TextToImage(str(folder), tokenizer, mode="lora", train_text_encoder=True)
    layers = model.text_encoder.config.num_hidden_layers
    assert len(model.trained_weights()) - len(alone.trained_weights()) == 2 * 4 * layers
    words = ["a photo of a person"]
    # LoRA starts as no change.
    assert torch.equal(model.encode_all(words), alone.encode_all(words))
    model.encode(words).sum().backward()
    trained = {name for name, weight in model.text_encoder.named_parameters() if weight.grad is not None}
    assert len(trained) == 2 * 4 * layers and all(".lora_" in name for name in trained)


def test_the_paper_recipe_keeps_its_activations():
    assert not script.parse_args(["--recipe", "paper"]).gradient_checkpointing
    assert script.parse_args(["--recipe", "paper", "--gradient_checkpointing"]).gradient_checkpointing


def test_better_pictures_by_flags(models, tmp_path, monkeypatch, capsys):
    """Each image under the answers about it, the person weighed more, some captions dropped; other images come out."""
    segmenter(tmp_path / "mask", ["wall", "person"], "wall")
    seen, plain = {}, script.fine_tune

    def fine_tune(args, tunable, identity, record, *rest, **options):
        seen[identity.name] = record, options
        return plain(args, tunable, identity, record, *rest, **options)

    monkeypatch.setattr(script, "fine_tune", fine_tune)
    more = ["--image_captions", "--caption_dropout", "0.5", "--noise_offset", "0.05", "--negative_prompt", "a dog"]
    assert run(models, tmp_path / "out", "--ids", "2", *more, "--mask_model", tmp_path / "mask") == {}
    words, options = seen[NAMES[1]]
    count = len(words["images"])
    assert f"--mask_model finds nobody in {count} source images of 1 identities: they" in capsys.readouterr().out
    assert record(tmp_path / "out", NAMES[1])["nobody"] == count
    assert "Source images in which --mask_model finds nobody" in (tmp_path / "out" / "report.html").read_text()
    assert options["alone"] == "a photo of <iir-0002> person"
    assert options["weights"].shape == (count, 1, 8, 4) and (options["weights"] == 1).all()
    assert len(options["texts"]) == count and all("<iir-0002> person" in text for text in options["texts"])
    for text, image in zip(options["texts"], words["images"], strict=True):
        alone = captions.merged([{"caption": "", **image["answers"]}])["attributes"]
        assert text == captions.compose(alone).replace("a person", "<iir-0002> person", 1)


@pytest.mark.parametrize("way", ["flag", "table"])
def test_what_is_corrected_by_hand_holds_for_every_image(models, tmp_path, monkeypatch, way):
    """By --prompts, and in captions.parquet: one garment is another, one is taken away."""
    seen, plain = {}, script.fine_tune

    def fine_tune(args, tunable, identity, record, *rest, **options):
        seen[identity.name] = record, options["texts"]
        return plain(args, tunable, identity, record, *rest, **options)

    monkeypatch.setattr(script, "fine_tune", fine_tune)
    out, flags = tmp_path / "out", ["--ids", "2", "--num_images", "1", "--max_train_steps", "1", "--image_captions"]
    flags += ["--captioner_model_name_or_path", CAPTIONER_DIR]
    run(models, out, *flags, "--captions_only")
    said = record(out, NAMES[1], "captions")
    keys = [key for key in ("lower", "shoes", "hair") if said["attributes"].get(key)]
    assert "upper" in said["attributes"] and keys
    change_captions(out, 0, upper="violet poncho", **{keys[0]: ""})
    table = out / "captions.parquet"
    more = []
    if way == "flag":
        shutil.move(table, tmp_path / "edited.parquet")
        more = ["--prompts", tmp_path / "edited.parquet"]
    assert run(models, out, *flags, *more) == {}
    written, texts = seen[NAMES[1]]
    assert "violet poncho" in written["identity_prompt"] and len(texts) == len(said["images"])
    for text, image in zip(texts, said["images"], strict=True):
        own = captions.merged([{"caption": "", **image["answers"]}])["attributes"]
        own = {key: words for key, words in (own | {"upper": "violet poncho"}).items() if key != keys[0]}
        assert text == captions.compose(own).replace("a person", "<iir-0002> person", 1)


def test_flags_of_better_pictures_reach_the_batches_and_the_sampler(models, tmp_path, monkeypatch):
    segmenter(tmp_path / "mask", ["wall", "person"])
    made, drawn = [], []
    batches, sample = script.Batches, TextToImage.sample
    monkeypatch.setattr(
        script, "Batches", lambda *given, **more: made.append((given, more)) or batches(*given, **more)
    )
    monkeypatch.setattr(TextToImage, "sample", lambda *given, **more: drawn.append(more) or sample(*given, **more))
    more = ["--caption_dropout", "0.5", "--noise_offset", "0.05", "--mask_background", "0.25", "--mask_model"]
    more += [tmp_path / "mask", "--negative_prompt", "a dog", "--guidance_share", "0.5", "--fast_lora"]
    lora = tmp_path / "lcm.safetensors"
    save_unet(load_unet(models / "stable-diffusion", "lora"), "lora", tmp_path)
    (tmp_path / "unet_lora" / "pytorch_lora_weights.safetensors").rename(lora)
    assert run(models, tmp_path / "out", "--ids", "2", *more, lora, "--guidance_scale", "2") == {}
    ((own, _), options), *rest = made
    _, _, weights = own
    assert not rest and options["dropped"] == (0.5, "a photo of <iir-0002> person") and options["noise_offset"] == 0.05
    # What is no person weighs a quarter.
    assert weights.min() >= 0.25 and weights.max() <= 1 and weights.std() > 0.01
    of_references, of_images = drawn[0], drawn[-1]
    assert of_references["negative"] == of_images["negative"] == "a dog" and of_images["guidance_share"] == 0.5
    assert (of_images["solver"], of_images["guidance"], of_images["fast"]) == ("lcm", 2.0, True)
    # References as without the few-step LoRA.
    assert of_references["solver"] == "dpmsolver++" and not of_references.get("fast")


# Drawing


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_are_those_of_diffusers_own_pipeline(models, solver):
    folder = models / "stable-diffusion"
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    model = TextToImage(str(folder), tokenizer, mode="full")
    prompts, seeds = ["a photo of a person", "a red coat", "a dog"], [1, 2, 3]
    settings = {"resolution": (64, 32), "steps": 4, "guidance": 2.5}
    latents = model.sample(model.encode_all(prompts), seeds, solver=solver, batch_size=2, **settings)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = solver_of(solver, pipeline.scheduler.config)
    sizes = {"height": 64, "width": 32, "num_inference_steps": 4, "guidance_scale": 2.5}

    def theirs_as(kind):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(4, 8, 4, generator=generator) for generator in generators])
        # The pipeline's own eta is 0, which takes TCD's noise away.
        more = {"generator": generators, "eta": 0.3} if solver in WITH_NOISE else {}
        return pipeline(prompts, latents=noise, output_type=kind, **sizes, **more).images

    torch.testing.assert_close(latents, theirs_as("latent"), rtol=1e-3, atol=1e-3)
    pixels = model.decode(latents, batch_size=2)
    theirs = theirs_as("pt")
    assert (pixels.float() - theirs * 255).abs().max() <= 1.01
    picture = pil_to_tensor(model.pictures(latents)[1])
    assert (picture.int() - pixels[1].int()).abs().max() <= 1  # other batches may round another way


def test_what_is_not_finite_is_no_picture(models):
    tokenizer = CLIPTokenizer.from_pretrained(models / "stable-diffusion/tokenizer")
    model = TextToImage(models / "stable-diffusion", tokenizer, mode="lora")
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="draws is not finite; use --mixed_precision bf16"):
        model.sample(model.encode_all(["a person"]), [1], resolution=(64, 32), steps=1, guidance=1)
    with pytest.raises(ValueError, match="draws is not finite"):
        model.decode(torch.full((1, 4, 8, 4), torch.nan))


def test_without_guidance_the_prompt_alone_counts(models):
    folder = models / "stable-diffusion"
    model = TextToImage(str(folder), CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), mode="full")
    condition = model.encode_all(["a red coat"] * 2)
    settings = {"resolution": (64, 32), "steps": 3}
    plain = model.sample(condition, [1, 2], guidance=1.0, **settings)
    guided = model.sample(condition, [1, 2], guidance=1.0001, **settings)
    torch.testing.assert_close(plain, guided, rtol=1e-3, atol=1e-2)
    assert not torch.equal(plain, model.sample(condition, [1, 3], guidance=1.0, **settings))


def test_guidance_on_a_share_of_the_steps(models):
    folder = models / "stable-diffusion"
    model = TextToImage(str(folder), CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), mode="full")
    condition, settings = model.encode_all(["a red coat"] * 2), {"resolution": (64, 32), "steps": 3, "solver": "ddim"}
    passed = []
    model.unet.register_forward_hook(lambda unet, inputs, output: passed.append(len(inputs[0])))
    half = model.sample(condition, [1, 2], guidance=3.0, guidance_share=0.5, **settings)
    assert passed == [4, 4, 2]
    whole = model.sample(condition, [1, 2], guidance=3.0, **settings)
    none = model.sample(condition, [1, 2], guidance=1.0, **settings)
    assert not torch.equal(half, whole) and not torch.equal(half, none)


# A few-step LoRA


def test_a_few_step_lora_changes_the_images_alone(whole, models, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "lcm-lora-4steps.safetensors"
    unet = UNet2DConditionModel.from_pretrained(models / "stable-diffusion", subfolder="unet")
    few_step_lora(unet, file)
    assert run(models, out, "--fast_lora", file, "--ids", "0", "2") == {}
    told = "For --fast_lora: --solver lcm, --guidance_scale 1.0; reference images are drawn without it"
    assert told in capsys.readouterr().out
    # Steps that a flag gives are those of the few-step LoRA: references take as many as without flags.
    run(models, tmp_path / "plain", "--num_inference_steps", "12", "--ids", "0", "2", "--num_images", "1")
    for name in NAMES[:2]:
        ours, before = record(out, name), record(tmp_path / "plain", name)
        # Tuning and the reference set are those of a run without it.
        assert ours["loss"] == before["loss"] and ours["reference"] == before["reference"]
        assert (ours["steps"], ours["guidance"]) == (2, 1.0) and len(ours["fast_lora"]) == 16
    assert files(out)[f"images/{NAMES[0]}/0000.jpg"] != files(whole[0])[f"images/{NAMES[0]}/0000.jpg"]
    columns = pq.read_table(out / "metadata.parquet").column("fast_lora").to_pylist()
    assert set(columns) == {record(out, NAMES[0])["fast_lora"]}


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("latent-consistency/lcm-lora-sdv1-5", ("lcm", 4, 1.0)),
        ("ByteDance/Hyper-SD/Hyper-SD15-8steps-lora.safetensors", ("ddim-trailing", 8, 1.0)),
        ("ByteDance/Hyper-SD/Hyper-SD15-12steps-CFG-lora.safetensors", ("ddim-trailing", 12, 7.5)),
        ("h1t/TCD-SD15-LoRA", ("tcd", 4, 1.0)),
        ("ByteDance/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors", ("ddim-trailing", 8, 1.0)),
        ("/data/hyper-cfg/models/lcm-lora", ("lcm", 4, 1.0)),
        ("Hyper-SD15-8steps-lora/pytorch_lora_weights.safetensors", ("ddim-trailing", 8, 1.0)),
    ],
)
def test_a_published_few_step_lora_sets_solver_steps_and_guidance(name, wanted):
    args = script.parse_args(["--recipe", "lora", "--source", "x", "--fast_lora", name])
    assert (args.solver, args.num_inference_steps, args.guidance_scale) == wanted
    references = script.sampling(args, of_references=True)
    assert (references["solver"], references["steps"], references["guidance"]) == ("dpmsolver++", 20, 7.5)


def test_flags_of_a_few_step_lora_are_not_for_the_references():
    words = ["--recipe", "lora", "--source", "x", "--fast_lora", "latent-consistency/lcm-lora-sdv1-5"]
    words += ["--solver", "lcm", "--num_inference_steps", "6", "--guidance_scale", "1", "--guidance_share", "0.5"]
    args = script.parse_args([*words, "--negative_prompt", "a dog"])
    images, references = (script.sampling(args, of_references=kind) for kind in (False, True))
    names = ("solver", "steps", "guidance", "guidance_share", "negative")
    assert [images[name] for name in names] == ["lcm", 6, 1.0, 0.5, "a dog"]
    assert [references[name] for name in names] == ["dpmsolver++", 20, 7.5, 1.0, "a dog"]
    # The share says nothing without guidance; the negative prompt holds for the references.
    assert "Without effect: --guidance_share (--guidance_scale 1)" in args.notes
    assert "For --fast_lora: all as given; reference images are drawn without it" in args.notes
    args = script.parse_args([*words[:6], "--negative_prompt", "a dog", "--num_reference_images", "0"])
    assert any("--negative_prompt (--guidance_scale 1)" in line for line in args.notes)


def test_a_pickled_few_step_lora_is_refused_at_once(models, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="a.bin is no safetensors file; pickled weights are never read"):
        run(models, tmp_path / "out", "--fast_lora", tmp_path / "a.bin")
    assert not (tmp_path / "out" / "captions.parquet").exists()


# Many identities


def test_two_shards_and_a_merge_equal_one_run(whole, models, tmp_path):
    out = tmp_path / "out"
    run(models, out, "--num_shards", "2", "--shard", "1")
    assert not (out / "metadata.parquet").exists()
    run(models, out, "--num_shards", "2", "--shard", "0")
    assert files(out) == files(whole[0])
    for name in ("metadata.parquet", "report.html", "captions.parquet", "README.md", "measures.csv"):
        (out / name).unlink()
    run(models, out, "--merge", "--guidance_scale", "9")
    assert files(out) == files(whole[0])
    with pytest.raises(ValueError, match="holds no run, as it has no args.json"):
        run(models, tmp_path / "elsewhere", "--merge")


def test_a_second_run_does_nothing_but_what_is_missing(whole, models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "identities" / NAMES[1] / "images.json").unlink()
    (out / "images" / NAMES[1] / "0001.jpg").write_bytes(b"half")
    made = []
    plain = script.make_identity
    monkeypatch.setattr(
        script,
        "make_identity",
        lambda args, identity, *rest: made.append(identity.name) or plain(args, identity, *rest),
    )
    run(models, out)
    assert made == [NAMES[1]] and files(out) == files(whole[0])
    monkeypatch.setattr(script, "open_model", lambda *_: pytest.fail("nothing is left to do"))
    run(models, out)
    assert files(out) == files(whole[0])


def test_a_failure_is_recorded_and_does_not_stop_the_others(whole, models, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    plain = script.fine_tune

    def failing(args, tunable, identity, *rest, **options):
        if identity.name == NAMES[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if identity.name == NAMES[2]:
            raise RuntimeError("a loose cable")
        return plain(args, tunable, identity, *rest, **options)

    monkeypatch.setattr(script, "fine_tune", failing)
    failures = run(models, out)
    assert set(failures) == {NAMES[0], NAMES[2]}
    assert "--gradient_checkpointing" in failures[NAMES[0]] and "--train_batch_size 1 (50 %" in failures[NAMES[0]]
    assert failures[NAMES[2]] == "RuntimeError: a loose cable"
    assert len(pq.read_table(out / "metadata.parquet")) == 3
    assert "a loose cable" in (out / "report.html").read_text()
    monkeypatch.setattr(script, "fine_tune", plain)
    assert run(models, out) == {}
    assert files(out) == files(whole[0])


def test_other_settings_in_the_same_folder_are_refused(whole, models, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    with pytest.raises(ValueError, match="other settings: --guidance_scale was 3.0 and is 5.0. Give the same"):
        run(models, out, "--guidance_scale", "5")
    with pytest.raises(ValueError, match="--seed was 0 and is 1"):
        run(models, out, "--seed", "1", "--num_shards", "3", "--shard", "2")
    shutil.rmtree(out / "identities")
    shutil.rmtree(out / "images")
    run(models, out, "--guidance_scale", "5", "--ids", "0", "--captions_only")
    assert json.loads((out / "args.json").read_text())["arguments"]["guidance_scale"] == 5


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_refused(whole, models, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "identities" / NAMES[0] / "images.json").unlink()
    other = tmp_path / "other"
    build.build_all(other, seed=1)
    for part in ("clip", "blip-vqa"):
        shutil.rmtree(other / part)
        shutil.copytree(models / part, other / part)
    with pytest.raises(ValueError, match="were made by the model [0-9a-f]{16}, this one is [0-9a-f]{16}"):
        run(other, out)


# Edited captions


def test_edited_captions_make_new_images_and_only_those(whole, models, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    table = pq.read_table(out / "captions.parquet").to_pylist()
    table[0]["upper"] = "pink coat"
    table[1]["prompt"] = "a person like a tree"
    schema = pq.read_schema(out / "captions.parquet")
    pq.write_table(pa.Table.from_pylist(table, schema=schema), out / "captions.parquet")
    before = files(out)
    run(models, out)
    after = files(out)
    changed = {name.split("/")[2] for name in after if name.startswith("images/") and after[name] != before[name]}
    assert changed == {"0000", "0002"}
    rows = pq.read_table(out / "captions.parquet").to_pylist()
    assert "wearing a pink coat" in rows[0]["prompt"] and "pink coat" in record(out, NAMES[0])["identity_prompt"]
    assert rows[1]["prompt"] == "a person like a tree"
    assert record(out, NAMES[1])["images"][0]["prompt"].startswith("<iir-0002> person like a tree, ")
    run(models, out)
    assert files(out) == after


def change_captions(out, row, **words):
    table = pq.read_table(out / "captions.parquet")
    rows = table.to_pylist()
    rows[row] |= words
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out / "captions.parquet")


def test_an_edit_outlives_a_run_that_ends_before_the_table_is_written(models, tmp_path):
    out = tmp_path / "out"
    run(models, out, "--captions_only")
    change_captions(out, 0, upper="pink coat")
    edited = (out / "captions.parquet").read_bytes()
    run(models, out, "--captions_only")
    assert "wearing a pink coat" in record(out, NAMES[0], "captions")["prompt"]
    # What another shard reads that began with the first, or the same one after a kill.
    (out / "captions.parquet").write_bytes(edited)
    run(models, out, "--captions_only")
    assert "wearing a pink coat" in record(out, NAMES[0], "captions")["prompt"]
    again = tmp_path / "again"
    (tmp_path / "edited.parquet").write_bytes(edited)
    run(models, again, "--captions_only", "--prompts", tmp_path / "edited.parquet")
    assert "wearing a pink coat" in record(again, NAMES[0], "captions")["prompt"]


def test_another_captioner_is_heard_in_the_same_folder(models, tmp_path):
    torch.manual_seed(0)
    save_git(tmp_path / "git")
    out, few = tmp_path / "out", ("--ids", "0", "2")
    run(models, out, "--captions_only", *few)
    change_captions(out, 1, prompt="a person like a tree")
    run(models, out, "--captions_only", *few)
    git = ("--captioner_model_name_or_path", tmp_path / "git", *few)
    run(models, out, "--captions_only", *git)
    heard, written = (record(out, name, "captions") for name in NAMES[:2])
    assert not heard["attributes"] and heard["prompt"] == f"a photo of a person, {heard['caption']}"
    assert written["prompt"] == "a person like a tree" and written["caption"]
    run(models, out, *git)
    for image in record(out, NAMES[1])["images"]:
        assert (
            image["prompt"].startswith("<iir-0002> person like a tree, ") and written["caption"] not in image["prompt"]
        )


def test_captions_that_failed_once_are_no_failure_for_ever(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(captioning, "caption_identity", lambda *_: 1 / 0)
        assert run(models, tmp_path / "out", "--captions_only", "--ids", "0") == {
            NAMES[0]: "ZeroDivisionError: division by zero"
        }
    assert run(models, tmp_path / "out", "--captions_only", "--ids", "0") == {}


def test_an_upload_sends_what_was_made_and_nothing_of_the_people(whole, models, tmp_path, monkeypatch):
    """The repository then opens by itself, its card says what it is, and images of an earlier upload go."""
    out, repository = tmp_path / "out", tmp_path / "repository"
    shutil.copytree(whole[0], out)
    for name in ("images/a/9/0000.jpg", "LICENSE"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(b"earlier")

    class Hub:
        def whoami(self):
            return {}

        def create_repo(self, name, **options):
            assert options == {"repo_type": "dataset", "private": True, "exist_ok": True}
            return type("Repo", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, delete_patterns):
            assert (repo_id, repo_type) == ("someone/people", "dataset")
            for name in filter_repo_objects(files(repository), allow_patterns=delete_patterns):
                (repository / name).unlink()
            for name in filter_repo_objects(files(folder_path), allow_patterns=allow_patterns):
                (repository / name).parent.mkdir(parents=True, exist_ok=True)
                (repository / name).write_bytes((folder_path / name).read_bytes())
            return "address"

    for module in ("utils.launch", "utils.datasets.portable"):
        monkeypatch.setattr(f"{module}.HfApi", Hub)
    assert run(models, out, "--push_to_hub", "--hub_dataset_id", "people") == {}
    images = {f"images/{name}/{index:04d}.jpg" for name in NAMES for index in range(3)}
    assert files(repository).keys() == {*images, "README.md", "metadata.parquet", "LICENSE"}
    assert files(out) == files(whole[0])
    card = (repository / "README.md").read_text()
    assert "- synthetic" in card and "none is a photograph" in card
    assert len(load_reid(str(repository))["train"]) == 9
    monkeypatch.setattr(Hub, "whoami", lambda hub: 1 / 0)
    with pytest.raises(ValueError, match="--push_to_hub needs a login that works: .* `hf auth login`"):
        run(models, tmp_path / "no", "--push_to_hub")
    assert not (tmp_path / "no").exists()


def test_images_that_somebody_took_away_are_made_again(whole, models, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = files(out)
    (out / "images" / NAMES[0] / "0000.jpg").unlink()
    shutil.rmtree(out / "images" / NAMES[1])
    assert run(models, out, "--merge") == {} and (out / "report.html").read_text().count("no image") == 4
    assert run(models, out) == {}
    assert files(out) == before


def test_missing_images_can_be_left_out(tmp_path):
    for name in ("1_c1_0.png", "1_c1_1.png", "2_c1_0.png"):
        (tmp_path / name[0]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 16)).save(tmp_path / name[0] / name)
    lines = ["file_name,pid,camid", "1/1_c1_0.png,1,0", "1/1_c1_1.png,1,0", "2/2_c1_0.png,2,0", "3/3_c1_0.png,3,0"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    (tmp_path / "1" / "1_c1_0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="3_c1_0.png .no such file"):
        open_identities([str(tmp_path)])
    found = open_identities([str(tmp_path)], skip_unreadable=True)
    assert [(one.pid, one.paths) for one in found] == [(1, ("1/1_c1_1.png",)), (2, ("2/2_c1_0.png",))]


def test_the_folder_of_another_script_is_left_alone(models, tmp_path):
    text = json.dumps({"command": ["filter_generated.py"], "arguments": {"source": ["market1501"]}})
    (tmp_path / "args.json").write_text(text)
    for flag in ("--captions_only", "--merge"):
        with pytest.raises(ValueError, match="holds what another script wrote; give another --output_dir"):
            run(models, tmp_path, flag)
    assert files(tmp_path) == {"args.json": text.encode()}


@pytest.mark.slow
def test_captions_only_then_the_rest_equals_one_run(whole, models, tmp_path):
    out = tmp_path / "out"
    run(models, out, "--captions_only")
    assert not (out / "images").exists() and (out / "captions.parquet").exists()
    run(models, out)
    assert files(out) == files(whole[0])
    again = tmp_path / "again"
    run(models, again, "--prompts", out / "captions.parquet", "--ids", "2")
    assert record(again, NAMES[1])["prompt"] == record(out, NAMES[1])["prompt"]
    folder = f"images/{NAMES[1]}"
    assert files(again / folder) == files(out / folder)


def test_long_captions_are_cut_and_said_once(models, tmp_path, capfd):
    long = ", ".join(f"with button number {number}" for number in range(40))
    path = tmp_path / "p.csv"
    path.write_text(f'pid,prompt\n0,"a person, {long}"\n2,"a person, {long}"\n')
    run(models, tmp_path / "out", "--prompts", path, "--ids", "0", "2", "--num_images", "1")
    out, err = capfd.readouterr()
    assert (out + err).count("are cut at a word") == 1
    tokenizer = CLIPTokenizer.from_pretrained(models / "stable-diffusion/tokenizer")
    tokenizer.add_tokens(["<iir-0000>"])
    prompt = record(tmp_path / "out", NAMES[0])["identity_prompt"]
    assert 74 <= len(tokenizer(prompt).input_ids) <= 77 and prompt.split()[-1] in long


def test_a_captioner_without_answers_gives_its_caption(models, tmp_path):
    torch.manual_seed(0)
    save_git(tmp_path / "git")
    out = tmp_path / "out"
    run(models, out, "--captioner_model_name_or_path", tmp_path / "git", "--captions_only", "--ids", "2")
    row = pq.read_table(out / "captions.parquet").to_pylist()[0]
    said = [captions.tidy(image["caption"], captions.MAX_CAPTION_WORDS) for image in row["images"]]
    assert row["caption"] == captions.majority(said)
    assert row["prompt"] == ", ".join(filter(None, ["a photo of a person", row["caption"]]))


# Clothes


def test_some_images_change_a_garment_and_say_so(models, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "p.csv").write_text("pid,upper,lower\n0,red coat,jeans\n2,red coat,jeans\n4,,\n".replace("4,,\n", ""))
    flags = ["--ids", "0", "2", "--num_images", "5", "--clothing_change", "0.4", "--prompts", tmp_path / "p.csv"]
    run(models, out, *flags, "--max_train_steps", "1")
    rows = pq.read_table(out / "metadata.parquet").to_pylist()
    assert [row["changed"] is not None for row in rows] == [False, False, True, False, True] * 2
    for row in rows:
        garments = {"upper": "red coat" in row["prompt"], "lower": "jeans" in row["prompt"].replace("e jeans", "")}
        assert row["changed"] in (None, "upper", "lower")
        if row["changed"]:
            other = "lower" if row["changed"] == "upper" else "upper"
            assert garments[other] and any(word in row["prompt"] for word in captions.CLOTHES[row["changed"]])
        else:
            assert all(garments.values())


def test_measures_of_identity_look_at_its_own_clothes_only(models):
    from utils.generated.measures import Measures

    measures = Measures.from_pretrained(str(models / "clip"))
    source = [Image.new("RGB", (32, 64), "red")] * 2
    made = [Image.new("RGB", (32, 64), colour) for colour in ("red", "blue", "green")]
    words = ["a person"] * 3
    values, means = measures.of(source, made, words, [True, False, False])
    alone, alone_means = measures.of(source, made[:1], words[:1])
    everything, _ = measures.of(source, made, words)
    assert values["image_similarity"] == alone["image_similarity"] != everything["image_similarity"]
    assert means == alone_means
    assert (
        values["diversity"] == everything["diversity"] and values["text_similarity"] == everything["text_similarity"]
    )


# More images from adapters that are kept


def test_redraw_adds_what_a_longer_run_would_have_drawn(models, tmp_path, monkeypatch):
    flags = ["--ids", "0", "2", "--save_adapters", "--image_format", "png", "--num_images"]
    out, longer = tmp_path / "out", tmp_path / "longer"
    run(models, out, *flags, "2")
    run(models, longer, *flags, "4")
    before = files(out / "images")
    monkeypatch.setattr(script, "fine_tune", lambda *_: pytest.fail("nothing is tuned again"))
    monkeypatch.setattr(script, "reference_set", lambda *_: pytest.fail("nothing is tuned again"))
    plain = script.redraw_identity

    def killed(args, identity, *rest):
        if identity.name == NAMES[1]:
            raise KeyboardInterrupt
        return plain(args, identity, *rest)

    monkeypatch.setattr(script, "redraw_identity", killed)
    with pytest.raises(KeyboardInterrupt):
        run(models, out, *flags, "4", "--redraw")
    monkeypatch.setattr(script, "redraw_identity", plain)
    assert len(record(out, NAMES[0])["images"]) == 4 and len(record(out, NAMES[1])["images"]) == 2
    assert run(models, out, *flags, "4", "--redraw") == {}
    after = files(out / "images")
    assert before.items() <= after.items() and after == files(longer / "images")
    rows, wanted = (pq.read_table(folder / "metadata.parquet").to_pylist() for folder in (out, longer))
    assert rows == wanted and len(rows) == 8
    for name in NAMES[:2]:
        for measure, value in record(longer, name)["measures"].items():
            assert record(out, name)["measures"][measure] == pytest.approx(value, abs=1e-4)
    # Nothing is left to do, and the same longer run without --redraw sees that too.
    monkeypatch.setattr(script, "open_model", lambda *_: pytest.fail("nothing is left to do"))
    run(models, out, *flags, "4", "--redraw")
    run(models, out, *flags, "4")
    assert files(out / "images") == after


def test_redraw_with_other_prompts_keeps_the_images_there(models, tmp_path):
    out = tmp_path / "out"
    flags = ["--ids", "2", "--save_adapters", "--num_images", "2"]
    run(models, out, *flags)
    before = files(out / "images")
    (tmp_path / "p.csv").write_text("pid,prompt\n2,a person like a tree\n")
    redraw = [*flags, "--redraw", "--prompts", tmp_path / "p.csv", "--num_inference_steps", "3"]
    assert run(models, out, *redraw) == {}
    assert before.items() <= files(out / "images").items()
    rows = pq.read_table(out / "metadata.parquet").to_pylist()
    assert ["like a tree" in row["prompt"] for row in rows] == [False, False, True, True]
    assert [row["steps"] for row in rows] == [2, 2, 3, 3] and len({row["seed"] for row in rows}) == 4
    made = files(out)
    assert run(models, out, *redraw) == {} and files(out) == made
    # With its first prompts again, everything is there.
    assert len(record(out, NAMES[1])["images"]) == 4


def test_images_that_a_killed_redraw_did_not_reach_are_not_tuned_over(models, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", ["--ids", "2", "--save_adapters", "--num_images", "1"]
    run(models, out, *flags)
    (tmp_path / "p.csv").write_text("pid,prompt\n2,a person like a tree\n")
    monkeypatch.setattr(script, "redraw_identity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(models, out, *flags, "--redraw", "--prompts", tmp_path / "p.csv")
    before = files(out / "images")
    with pytest.raises(ValueError, match=f"1 identities, {NAMES[1]} for one, have kept adapters and images, but not"):
        run(models, out, *flags)
    assert before and files(out / "images") == before


def test_a_run_without_redraw_does_not_tune_over_what_was_redrawn(models, tmp_path, monkeypatch):
    """The settings of a killed --redraw are in the folder, so that the flags alone do not tell."""
    out, flags = tmp_path / "out", ["--ids", "2", "--save_adapters", "--max_train_steps", "1", "--num_images"]
    run(models, out, *flags, "1")
    (tmp_path / "p.csv").write_text("pid,prompt\n2,a person like a tree\n")
    run(models, out, *flags, "1", "--redraw", "--prompts", tmp_path / "p.csv")
    more = ["2", "--num_inference_steps", "3"]
    plain = script.redraw_identity
    monkeypatch.setattr(script, "redraw_identity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(models, out, *flags, *more, "--redraw")
    before = files(out / "images")
    with pytest.raises(ValueError, match="have kept adapters and images, but not all that are asked for. --redraw"):
        run(models, out, *flags, *more)
    assert len(before) == 2 and files(out / "images") == before
    monkeypatch.setattr(script, "redraw_identity", plain)
    assert run(models, out, *flags, *more, "--redraw") == {}
    assert before.items() <= files(out / "images").items() and len(files(out / "images")) == 3
    # A file that was lost is said before a model is loaded, and nothing is drawn over.
    next((out / "images").rglob("0000.jpg")).unlink()
    monkeypatch.setattr(script, "open_model", lambda *_: pytest.fail("too late"))
    for flag, message in (["--redraw"], "0000.jpg is missing, 1 in all: put it"), ([], "have kept adapters"):
        with pytest.raises(ValueError, match=message):
            run(models, out, *flags, *more, *flag)


def test_shards_that_redraw_merge_once_all_have_drawn(models, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--ids", "0", "2", "--save_adapters", "--max_train_steps", "1", "--num_images"]
    run(models, out, *flags, "1")
    capsys.readouterr()
    redraw = [*flags, "2", "--redraw", "--num_shards", "2", "--shard"]
    run(models, out, *redraw, "0")
    assert "1 of 2 identities are still with other shards" in capsys.readouterr().out
    assert pq.read_table(out / "metadata.parquet").num_rows == 2
    run(models, out, *redraw, "1")
    assert pq.read_table(out / "metadata.parquet").num_rows == 4


def test_redraw_without_its_adapters_is_refused(models, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    monkeypatch.setattr(script, "load_captioner", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(script, "open_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="has no adapter of 3 of 3 identities, synthetic-a/0000 for one"):
        run(models, out, "--redraw", "--num_images", "4")


@pytest.mark.slow
def test_redraw_refuses_adapters_of_another_model(models, tmp_path):
    few = ["--ids", "2", "--save_adapters", "--num_images", "1"]
    out = tmp_path / "kept"
    run(models, out, *few)
    origin = out / "adapters" / NAMES[1] / "adapter.json"
    digest = json.loads(origin.read_text())["model"]
    origin.write_text('{"model": "another"}')
    with pytest.raises(
        ValueError, match=f"adapter of {NAMES[1]} was tuned from the model another, this one is {digest}"
    ):
        run(models, out, *few[:-1], "2", "--redraw")
    origin.write_text(json.dumps({"model": digest}))
    with pytest.raises(ValueError, match="other settings: --rank was 8 and is 4.*--redraw may change --num_images"):
        run(models, out, *few[:-1], "2", "--redraw", "--rank", "4")
    lora = out / "adapters" / NAMES[1] / "unet_lora" / "pytorch_lora_weights.safetensors"
    weights = load_file(lora)
    save_file(dict(list(weights.items())[1:]), lora)
    failures = run(models, out, *few[:-1], "2", "--redraw")
    assert "is the LoRA of another network or rank: 1 of its weights" in failures[NAMES[1]]
    assert len(record(out, NAMES[1])["images"]) == 1


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        "--finetune full --use_8bit_adam --gradient_checkpointing",
        pytest.param(
            "--finetune full --train_text_encoder --snr_gamma 5 --lr_scheduler cosine --lr_warmup_steps 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--train_text_encoder --num_reference_images 0 --gradient_accumulation_steps 2 --image_format png",
            marks=pytest.mark.slow,
        ),
        "--mixed_precision bf16 --save_adapters --solver ddim --guidance_scale 1 --resolution 72 40",
    ],
)
def test_flags_together(models, tmp_path, flags):
    out = tmp_path / "out"
    assert run(models, out, "--ids", "2", *flags.split()) == {}
    rows = pq.read_table(out / "metadata.parquet").to_pylist()
    assert len(rows) == 3
    with Image.open(out / rows[0]["path"]) as image:
        assert image.size == (32, 64) and json.loads(image.getexif()[0x010E])["synthetic"] is True
        assert image.format == ("PNG" if "png" in flags else "JPEG")
    assert ("prior" in record(out, NAMES[1])["loss"]) == ("--num_reference_images 0" not in flags)


def test_saved_adapters_load_in_diffusers_and_draw_the_same(models, tmp_path):
    out = tmp_path / "out"
    run(models, out, "--ids", "2", "--save_adapters", "--learning_rate", "0.05", "--image_format", "png")
    folder = out / "adapters" / NAMES[1]
    pipeline = StableDiffusionPipeline.from_pretrained(models / "stable-diffusion", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder / "unet_lora")
    pipeline.load_textual_inversion(str(folder / "learned_embeds.safetensors"), token="<iir-0002>")
    pipeline.scheduler = solver_of("dpmsolver++", pipeline.scheduler.config)
    made = record(out, NAMES[1])["images"]
    seeds = [one["seed"] for one in made]
    noise = torch.stack([torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    sizes = {"height": 64, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    pictures = pipeline([one["prompt"] for one in made], latents=noise, **sizes).images
    for one, picture in zip(made, pictures, strict=True):
        with Image.open(out / one["path"]) as image:
            saved = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
        theirs = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
        assert (saved - theirs).abs().max() <= 2


# Bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--resolution 130 64", "--resolution must be two multiples of 8, got 130 64"),
        ("--num_shards 2 --shard 2", "--shard counts from 0, so it must be below --num_shards 2, got 2"),
        ("--num_images 0", "--num_images must be 1 or more, got 0"),
        ("--finetune full --save_adapters", "--save_adapters keeps LoRA, so it needs --finetune lora"),
        ("--jpeg_quality 0", "--jpeg_quality must be 1 to 100"),
        ("--prior_loss_weight -1", "--prior_loss_weight must be 0 or more, got -1"),
        ("--snr_gamma 0", "--snr_gamma must be above 0"),
        ("--merge --captions_only", "leave out --captions_only"),
        ("--redraw --merge", "--redraw draws images, so leave out --merge"),
        ("--redraw --finetune full", "--save_adapters keeps LoRA, so it needs --finetune lora"),
        ("--base_bits 8 --gradient_checkpointing", "saves nothing; use --base_bits 4"),
        ("--clothing_change 0.5", "--clothing_change must be 0 or more, and below 0.5, got 0.5"),
        ("--class_prompt=", "--class_prompt must end in its noun"),
        ("--class_prompt person.", "a word without a full stop, got 'person.'"),
    ],
)
def test_bad_flags_end_in_one_line(capsys, flags, message):
    with pytest.raises(SystemExit):
        script.parse_args(flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ids 99", "--ids 99: the source has no images of such an identity"),
        ("--captioner_model_name_or_path {models}/clip", "is a clip model .* does not turn images into text"),
        ("--pretrained_model_name_or_path {models}/clip", "is not a whole diffusers checkpoint"),
        (
            "--identity_token <|endoftext|>",
            "asks for the new token '<|endoftext|>', which is a word of the vocabulary",
        ),
        ("--attribute_lists {models}/none.json", "cannot be read as JSON"),
        ("--prompts {models}/none.csv", "cannot be read as captions"),
        ("--reid_model {models}/clip", "--reid_model: .* is a clip model, expected diffreid"),
        ("--clip_model_name_or_path {models}/blip-vqa", "is a blip model, expected clip"),
        ("--source market1501", "market1501 needs a root"),
        ("--solver lcm --num_inference_steps 60", "--solver lcm --num_inference_steps 60: .*original_steps"),
        ("--solver ddim --num_inference_steps 1001", "--solver ddim --num_inference_steps 1001: "),
        ("--identity_token " + "-".join(["sks"] * 50), "leave no room in a prompt"),
    ],
)
def test_bad_input_is_said_before_a_model_is_loaded(models, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(script, "load_captioner", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(script, "open_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        run(models, tmp_path / "out", *(one.format(models=models) for one in flags.split()))


def test_prompts_must_fit_the_source(models, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("pid,prompt\n0,a person\n99,a person\n")
    with pytest.raises(ValueError, match="names identity 99, of which the source has no images"):
        run(models, tmp_path / "out", "--prompts", path)
    path.write_text("pid,prompt\n0,a person\n")
    with pytest.raises(ValueError, match="has no row for 2 identities, synthetic-a/0002 for one"):
        run(models, tmp_path / "out", "--prompts", path)
    path.write_text("pid,prompt\n0,a man\n")
    with pytest.raises(ValueError, match="synthetic-a/0000: the prompt 'a man' has no 'person'.*say person"):
        run(models, tmp_path / "out", "--prompts", path, "--ids", "0")
    path.write_text("pid,prompt\n0,a <iir-0000> person\n")
    with pytest.raises(ValueError, match="has the identity token '<iir-0000>' in it"):
        run(models, tmp_path / "out", "--prompts", path, "--ids", "0")
    # A word of the vocabulary is looked for as a word.
    words = ["--prompts", path, "--ids", "0", "--identity_token", "sks"]
    path.write_text('pid,prompt\n0,"a person, between two kiosks"\n')
    assert run(models, tmp_path / "word", *words, "--captions_only") == {}
    path.write_text('pid,prompt\n0,"a person, sks"\n')
    with pytest.raises(ValueError, match="has the identity token 'sks' in it"):
        run(models, tmp_path / "out", *words)


# Processes that die, several at once


@pytest.mark.slow
def test_killed_at_three_moments_the_set_is_the_same(whole, models, tmp_path):
    out = tmp_path / "out"

    # While captions are made, while the first is tuned, while images are written.
    moments = ["identities/synthetic-a/0000/captions.json", "references/*.safetensors", ".work/*/images/0001.jpg"]
    for pattern in moments:
        stopped(runs.start(SCRIPT, *arguments(models, out)), lambda pattern=pattern: any(out.glob(pattern)))
        assert not list((out / "images").rglob("*.part"))
    launch(SCRIPT, *arguments(models, out))
    assert files(out) == files(whole[0])


@pytest.mark.slow
def test_two_processes_equal_one(whole, models, tmp_path):
    out = tmp_path / "out"
    launch(SCRIPT, *arguments(models, out), processes=2, timeout=600)
    assert files(out) == files(whole[0])


@pytest.mark.slow
def test_the_command_line_ends_with_one_line(models, tmp_path):
    done = launch(SCRIPT, *arguments(models, tmp_path / "out", "--ids", "99"), check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train_dreambooth_reid.py: --ids 99: the source has no images")


@pytest.mark.slow
def test_compiled_once_for_all_identities(models, tmp_path, monkeypatch):
    """Weights go back in place, so the second and third identity meet what the first has compiled."""
    graphs, compiled = [], torch.compile

    def backend(graph, inputs):
        graphs.append(None)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend=backend))
    made, plain = [], script.make_identity

    def counted(run, *rest):
        plain(run, *rest)
        made.append(len(graphs))
        return True

    monkeypatch.setattr(script, "make_identity", counted)
    assert run(models, tmp_path / "out", "--torch_compile", "--num_images", "2") == {}
    assert made[0] > 0 and made == [made[0]] * 3


@needs_chromium
@pytest.mark.slow
def test_the_page_is_seen_in_a_browser(whole, tmp_path):
    pictures = 3 * (2 + 4 + 3)
    seen = seen_in_chromium(tmp_path, (whole[0] / "report.html").read_text(), 900)
    assert seen == f"loaded {pictures} of {pictures}, width 900"
