"""train_dcac.py: the method against its definition, the loop against interruptions, bad input against clear words."""

import copy
import functools
import importlib.util
import json
import math
import re
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextModel

import train_dcac
import train_dreambooth_reid
from tests import runs
from tests.runs import (
    ROOT,
    calls_of,
    launch,
    lines_written,
    log_of,
    same_weights,
    start,
    stopped,
    torchrun,
    weights_of,
)
from train_dcac import DCAC, Condition, parse_args
from utils.datasets.load import load_reid, open_source
from utils.diffusion.feedback import GradientBalance, effective_rank, examined, middle_of
from utils.diffusion.latents import draw_noise, encode, sample_latents
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.unet import load_unet, load_vae
from utils.flags import CAPTIONER_DIR
from utils.launch import introduce
from utils.modeling.memories import PrototypeMemory
from utils.modeling.names import open_backbone
from utils.modeling.reid_model import ReIDModel
from utils.standins import build
from utils.synthetic.world import attributes, caption

SCRIPT = "train_dcac.py"

NUM_IDS, BATCH = 6, 8
DATA = ["--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--target", "synthetic:domain=b,num_ids=3"]
SMALL = [
    "--train_batch_size",
    "8",
    "--learning_rate",
    "3e-4",
    "--lr_warmup_epochs",
    "2",
    "--diffusion_resolution",
    "64",
    "64",
    "--validation_ids",
    "2",
    "--eval_every",
    "9",
]


train, refused = (functools.partial(one, train_dcac) for one in (runs.run, runs.refused))


@pytest.fixture(scope="session")
def small(standins):
    return [*DATA, *SMALL, "--pretrained_model_name_or_path", str(standins / "stable-diffusion")]


def method(
    standins, *, kind="correlation", probabilities="classifier", bottleneck="none", mode="lora", pass_size=BATCH,
    num_tokens=1, frozen=False, share=None,
):  # fmt: skip
    """A DCAC module of stand-ins with a classifier that is not at its start, and one batch for it."""
    torch.manual_seed(0)
    encoder = ReIDModel.from_backbone(standins / "clip", num_ids=NUM_IDS, image_size=(128, 64)).train()
    torch.nn.init.normal_(encoder.classifier.weight, std=0.3)
    memory = PrototypeMemory(torch.randn(NUM_IDS, encoder.num_features), 0.05)
    name = standins / "stable-diffusion"
    condition = Condition(
        kind,
        probabilities,
        bottleneck,
        num_ids=NUM_IDS,
        num_features=encoder.num_features,
        width=build.TEXT_WIDTH,
        tau=0.6,
        num_tokens=num_tokens,
        frozen=frozen,
    )
    unet = load_unet(name, mode, rank=2)
    # What starts at 0 lets no gradient through yet: LoRA's second matrices, the last layers of `scratch`.
    for weight_name, weight in unet.named_parameters():
        if weight_name.endswith("weight") and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    model = DCAC(
        encoder,
        memory,
        condition,
        unet,
        NoiseSchedule.from_pretrained(name),
        ldm_weight=0.7,
        label_smoothing=0.1,
        pass_size=pass_size,
        balance=share and GradientBalance(share),
    ).train()
    batch = {
        "images": torch.randn(BATCH, 3, 128, 64),
        "labels": torch.arange(BATCH) // 2,
        "latents": torch.randn(BATCH, 4, 8, 8),
        "noise": torch.randn(BATCH, 4, 8, 8),
        "timesteps": torch.randint(1000, (BATCH,)),
    }
    return model, batch


# The method


@pytest.mark.parametrize("probabilities", ["classifier", "prototype", "mean"])
def test_loss_is_the_one_that_is_written_down(standins, probabilities):
    model, batch = method(standins, probabilities=probabilities)
    loss, values, bn_features, labels = model(**batch)
    with torch.no_grad():
        feature = model.encoder.backbone(batch["images"]).double()
        centred = feature - feature.mean(0)
        bn = centred / (feature.var(0, correction=0) + model.encoder.bnneck.eps).sqrt() * model.encoder.bnneck.weight
        logits = bn @ model.encoder.classifier.weight.double().t()
        target = torch.full((BATCH, NUM_IDS), 0.1 / NUM_IDS, dtype=torch.double)
        target[range(BATCH), batch["labels"]] += 0.9
        loss_id = -(target * logits.log_softmax(1)).sum(1).mean()
        unit = bn / bn.norm(dim=1, keepdim=True)
        similar = unit @ model.memory.prototypes.double().t() / 0.05
        loss_pcl = -similar.log_softmax(1)[range(BATCH), batch["labels"]].mean()
        by_classifier, by_prototype = (logits / 0.6).softmax(1), similar.softmax(1)
        p = {"classifier": by_classifier, "prototype": by_prototype, "mean": (by_classifier + by_prototype) / 2}
        tokens = (p[probabilities] @ model.condition.prompts.double()).float()[:, None]
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.double) ** 2
        signal_share = (1 - betas).cumprod(0)[batch["timesteps"]].view(-1, 1, 1, 1)
        noised = signal_share.sqrt() * batch["latents"] + (1 - signal_share).sqrt() * batch["noise"]
        guess = model.unet(noised.float(), batch["timesteps"], encoder_hidden_states=tokens).sample
        loss_ldm = (guess - batch["noise"]).square().mean()
    for name, wanted in (("loss_id", loss_id), ("loss_pcl", loss_pcl), ("loss_ldm", loss_ldm)):
        assert values[name].item() == pytest.approx(wanted.item(), rel=2e-4), name
    assert loss.item() == pytest.approx((loss_id + loss_pcl + 0.7 * loss_ldm).item(), rel=2e-4)
    assert not bn_features.requires_grad
    torch.testing.assert_close(bn_features.double(), bn, rtol=1e-3, atol=1e-4)


FACTOR = 40.0
STEPS = [
    ("correlation", "classifier", 1, None), ("correlation", "classifier", 5, None),
    ("correlation", "classifier", 5, 0.1), ("correlation", "prototype", 1, 0.1), ("correlation", "mean", 2, 0.1),
    ("class", "classifier", 1, None), ("class", "classifier", 5, None),
    ("instance", "classifier", 1, None), ("instance", "classifier", 5, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("kind, probabilities, num_tokens, share", STEPS)
def test_a_step_in_float64(standins, kind, probabilities, num_tokens, share):
    """Losses and gradients of all parts, beside formulas of their own in float64."""
    model, batch = method(standins, kind=kind, probabilities=probabilities, num_tokens=num_tokens, share=share)
    exact, alone = copy.deepcopy(model).double(), copy.deepcopy(model)
    if share:
        model.balance.log_ratio.fill_(math.log(FACTOR / share))
        model.balance.count.fill_(8)
    loss, values, *_ = model(**batch)
    loss.backward()

    gamma, weight, prompts = (
        tensor.detach().clone().requires_grad_()
        for tensor in (exact.encoder.bnneck.weight, exact.encoder.classifier.weight, exact.condition.prompts)
    )
    feature = exact.encoder.backbone(batch["images"].double())
    centred = feature - feature.mean(0)
    bn = centred / (feature.var(0, correction=0) + exact.encoder.bnneck.eps).sqrt() * gamma
    logits, unit = bn @ weight.t(), bn / bn.norm(dim=1, keepdim=True)
    targets = torch.full((BATCH, NUM_IDS), 0.1 / NUM_IDS, dtype=torch.double)
    targets[range(BATCH), batch["labels"]] += 0.9
    similar = unit @ exact.memory.prototypes.double().t() / 0.05
    loss_id = -(targets * logits.log_softmax(1)).sum(1).mean()
    loss_pcl = -similar.log_softmax(1)[range(BATCH), batch["labels"]].mean()
    by_classifier, by_prototype = (logits / 0.6).softmax(1), similar.softmax(1)
    shares = {
        "class": F.one_hot(batch["labels"], NUM_IDS).double(),
        "instance": unit,
        "classifier": by_classifier,
        "prototype": by_prototype,
        "mean": (by_classifier + by_prototype) / 2,
    }[probabilities if kind == "correlation" else kind]
    condition = torch.einsum("bn,ntw->btw", shares, prompts.view(len(prompts), num_tokens, -1))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.double) ** 2
    clean = (1 - betas).cumprod(0)[batch["timesteps"]].view(-1, 1, 1, 1)
    noised = clean.sqrt() * batch["latents"] + (1 - clean).sqrt() * batch["noise"]
    guess = exact.unet(noised, batch["timesteps"], encoder_hidden_states=condition).sample
    loss_ldm = (guess - batch["noise"]).square().mean()
    lora = {name: value for name, value in exact.unet.named_parameters() if value.requires_grad}
    head = [feature, gamma, weight]
    of_ids = torch.autograd.grad(loss_id + loss_pcl, head, retain_graph=True)
    of_ldm = torch.autograd.grad(loss_ldm, [*head, prompts, *lora.values()], retain_graph=True, materialize_grads=True)
    factor = 0.7 * (FACTOR if share else 1)
    trained = [value for value in exact.encoder.backbone.parameters() if value.requires_grad]
    through = torch.autograd.grad(feature, trained, factor * of_ldm[0], retain_graph=True)
    torch.autograd.backward(feature, of_ids[0] + factor * of_ldm[0])

    exact_backbone = dict(exact.encoder.backbone.named_parameters())
    found = dict(model.unet.named_parameters())
    groups = {
        "losses": [(values[name], loss) for name, loss in zip(
            ("loss_id", "loss_pcl", "loss_ldm"), (loss_id, loss_pcl, loss_ldm), strict=True
        )],
        "encoder": [
            (value.grad, exact_backbone[name].grad)
            for name, value in model.encoder.backbone.named_parameters()
            if value.requires_grad
        ],
        "neck": [(model.encoder.bnneck.weight.grad, of_ids[1] + 0.7 * of_ldm[1])],
        "classifier": [(model.encoder.classifier.weight.grad, of_ids[2] + 0.7 * of_ldm[2])],
        "prompts": [(model.condition.prompts.grad, 0.7 * of_ldm[3].view_as(model.condition.prompts))],
        "lora": [(found[name].grad, 0.7 * grad) for name, grad in zip(lora, of_ldm[4:], strict=True)],
    }  # fmt: skip
    for name, pairs in groups.items():
        got, wanted = (torch.cat([one[side].detach().double().flatten() for one in pairs]) for side in (0, 1))
        apart = float((got - wanted).norm() / wanted.norm())
        print(f"{kind} {probabilities}, tokens {num_tokens}, balance {share}: {name} {apart:.1e}")
        assert apart < 1e-4, name
    # L_ldm's part alone, which is small beside the rest: what a step without it does not have.
    alone(batch["images"], batch["labels"])[0].backward()
    own = {name: value.grad for name, value in alone.encoder.backbone.named_parameters()}
    part = [
        (value.grad - own[name]).double().flatten()
        for name, value in model.encoder.backbone.named_parameters()
        if value.requires_grad
    ]
    wanted = torch.cat([value.flatten() for value in through])
    if kind == "class":
        assert not wanted.any() and not torch.cat(part).any()
    else:
        apart = float((torch.cat(part) - wanted).norm() / wanted.norm())
        print(f"{kind} {probabilities}, tokens {num_tokens}, balance {share}: L_ldm at the encoder {apart:.1e}")
        assert apart < 1e-2
    if kind != "class":
        # Without L_ldm, or with another factor, the encoder's gradient would be seen to differ.
        assert (FACTOR if share else 1) * float(of_ldm[0].norm() / of_ids[0].norm()) > 2e-4
    if share:
        told = model.balance.update(lambda gradients: gradients)
        ratio = 0.7 * of_ldm[0].norm() / of_ids[0].norm()
        assert float(told["feedback_scale"]) == pytest.approx(FACTOR, rel=1e-5)
        assert float(told["feedback_ratio"]) == pytest.approx(float(FACTOR * ratio), rel=1e-3)
        # The measurement of this step, and eight before.
        smoothed = 8 / 9 * math.log(FACTOR / share) + math.log(1 / ratio) / 9
        assert float(model.balance.log_ratio) == pytest.approx(smoothed, rel=1e-4)


def test_the_balance_keeps_what_overflows_out_and_starts_with_a_measurement():
    features = torch.randn(4, 3, requires_grad=True) * 1
    balance = GradientBalance(0.25)
    for strength, factor in ((2.0, 0.0), (2.0, 0.25 / 2.0), (torch.inf, 0.25 / 2.0), (2.0, 0.25 / 2.0)):
        features = (features.detach().requires_grad_() * 1).requires_grad_()
        (features.sum() + strength * balance(features).sum()).backward()
        told = balance.update(lambda gradients: gradients)
        assert float(told["feedback_scale"]) == pytest.approx(factor)
        assert float(told["feedback_ratio"]) == pytest.approx(0.0 if strength == torch.inf else factor * strength)
    assert all(float(value) == 0 for value in balance.update(None).values()), "nothing was measured in this step"


def test_the_balance_follows_the_mean_of_the_first_steps_and_scales_no_rounding_up():
    balance = GradientBalance(0.5)

    def step(strength):
        features = torch.ones(4, 3, requires_grad=True) * 1
        (features.sum() + strength * balance(features).sum()).backward()
        return balance.update(lambda gradients: gradients)

    # Equal prompts: what arrives is rounding.
    for _ in range(3):
        assert float(step(1e-8)["feedback_scale"]) == 0
    assert float(step(1e-8)["feedback_ratio"]) == 0 and balance.count == 0
    logs = []
    for strength in (0.25, 0.5, 1.0):
        step(strength)
        logs.append(math.log(1 / strength))
        assert float(balance.log_ratio) == pytest.approx(sum(logs) / len(logs), abs=1e-4)
    for _ in range(30):
        step(1.0)
    before = float(balance.log_ratio)
    step(2.0)
    assert float(balance.log_ratio) == pytest.approx(0.9 * before + 0.1 * math.log(0.5), abs=1e-4)


def test_the_condition_is_looked_at_on_the_middle_image_of_each_identity():
    """The first is of the first camera; in a world of shortcuts most of the others are at home."""
    labels = load_reid("synthetic:domain=a,num_ids=6,images_per_id=8,shortcut=0.9")["train"]
    pids, places = torch.tensor(labels["pid"][:]), labels["camid"][:]
    rows = [middle_of(pids == pid) for pid in pids.unique()]
    assert len(set(pids[rows].tolist())) == 6
    assert all(
        places[row] == Counter(places[one] for one in (pids == pids[row]).nonzero().flatten()).most_common(1)[0][0]
        for row in rows
    )


def test_where_the_gradient_arrives_in_the_warmup_and_with_frozen_prompts(standins):
    """In the warm-up L_ldm adds nothing to the encoder, the neck and the classifier; U-Net and prompts learn."""
    grads = {}
    for name, part in (("alone", {}), ("warmup", {"warmup": True}), ("later", {})):
        model, batch = method(standins, num_tokens=3)
        batch = batch if name != "alone" else {key: batch[key] for key in ("images", "labels")}
        model(**batch, **part)[0].backward()
        grads[name] = {key: value.grad for key, value in model.named_parameters() if key.startswith("encoder.")}
        found = reached(model)
        assert found["prompts"] == found["lora"] == (name != "alone")
    for key, grad in grads["alone"].items():
        assert grad is None or torch.equal(grads["warmup"][key], grad), key
    assert any(not torch.equal(grads["later"][key], grad) for key, grad in grads["alone"].items() if grad is not None)
    model, batch = method(standins, num_tokens=3, frozen=True, share=0.1)
    model(**batch)[0].backward()
    assert isinstance(model.condition.prompts, torch.Tensor) and not model.condition.prompts.requires_grad
    assert "condition.prompts" in dict(model.named_buffers()), "a checkpoint holds buffers, not frozen weights"
    assert reached(model)["lora"] and reached(model)["encoder"]


def test_what_a_condition_says(standins):
    model, batch = method(standins, num_tokens=2)
    features = model.encoder.backbone(batch["images"]).detach()
    draws = [(batch["latents"], torch.randn(BATCH, 4, 8, 8), torch.randint(1000, (BATCH,))) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    condition, numbers = examined(model, features, batch["labels"], draws)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    centred = features - features.mean(0)
    bn = centred / (features.var(0, correction=0) + 1e-5).sqrt() * model.encoder.bnneck.weight
    p = (bn @ model.encoder.classifier.weight.t() / 0.6).softmax(1).detach()
    torch.testing.assert_close(
        condition, torch.einsum("bn,ntw->btw", p, model.condition.prompts), rtol=1e-3, atol=1e-4
    )
    assert numbers["entropy"] == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-4)
    assert numbers["top"] == pytest.approx(float(p.amax(1).mean()), rel=1e-4)
    wanted = {"own": condition, "another": condition[[*range(-1, BATCH - 1)]], "zero": 0 * condition}
    losses = {name: [model.denoise(*draw, one).item() for draw in draws] for name, one in wanted.items()}
    for name, two in losses.items():
        assert numbers[name] == pytest.approx(sum(two) / 2, rel=1e-5)
    worse = [other - own for own, other in zip(losses["own"], losses["another"], strict=True)]
    assert numbers["another_worse"] == pytest.approx(sum(worse) / 2, abs=1e-6)
    parts = {}
    for latents, noise, timesteps in draws:
        for row, time in enumerate(timesteps.tolist()):
            one = slice(row, row + 1)
            of = [
                model.denoise(latents[one], noise[one], timesteps[one], wanted[name][one])
                for name in ("another", "own")
            ]
            parts.setdefault(time // 125, []).append((of[0] - of[1]).item())
    means = {part: sum(found) / len(found) for part, found in parts.items()}
    assert numbers["matters_at"] == int((max(means, key=means.get) + 0.5) * 125)
    assert numbers["another_worse_std"] == pytest.approx(abs(worse[0] - worse[1]) / 2**0.5, abs=1e-6)
    leaf = features.clone().requires_grad_()
    bn_features, logits = model.encoder.neck(leaf)
    others = F.cross_entropy(logits, batch["labels"], label_smoothing=0.1) + model.memory(bn_features, batch["labels"])
    (of_others,) = torch.autograd.grad(others, leaf, retain_graph=True)
    noise_loss = model.denoise(*draws[0], model.condition(logits, bn_features, batch["labels"], model.memory))
    (of_ldm,) = torch.autograd.grad(noise_loss.mean(), leaf)
    assert numbers["gradient_ratio"] == pytest.approx(float(of_ldm.norm() / of_others.norm()), rel=1e-3)
    cosine = F.cosine_similarity(of_ldm.flatten(), of_others.flatten(), 0)
    assert numbers["gradient_cosine"] == pytest.approx(float(cosine), rel=1e-2, abs=1e-4)
    values = torch.linalg.svdvals(model.condition.prompts.detach().flatten(1).double())
    q = values / values.sum()
    assert numbers["effective_rank"] == pytest.approx(float((-(q * q.log()).sum()).exp()), rel=1e-6)
    assert effective_rank(torch.ones(5, 3, 7)) == pytest.approx(1, abs=1e-3)


def reached(model):
    """Which parts have a gradient that is not zero."""

    def any_gradient(parameters):
        return any(parameter.grad is not None and bool(parameter.grad.abs().max() > 0) for parameter in parameters)

    named = dict(model.unet.named_parameters())
    return {
        "encoder": any_gradient(model.encoder.backbone.parameters()),
        "neck": any_gradient(model.encoder.bnneck.parameters()),
        "classifier": any_gradient(model.encoder.classifier.parameters()),
        "prompts": any_gradient([model.condition.prompts]),
        "lora": any_gradient(value for name, value in named.items() if ".lora_" in name),
        "unet": any_gradient(value for name, value in named.items() if ".lora_" not in name),
        "prototypes": model.memory.prototypes.requires_grad,
    }


@pytest.mark.parametrize("mode", ["lora", "frozen", "partial-1", "partial-2", "full", "scratch"])
@pytest.mark.parametrize("kind", ["correlation", "class", "instance"])
def test_where_the_gradient_of_the_noise_loss_arrives(standins, kind, mode):
    model, batch = method(standins, kind=kind, mode=mode)
    vae = load_vae(standins / "stable-diffusion")
    mean, std = encode(vae, torch.randn(BATCH, 3, 64, 64).clamp(-1, 1))
    batch["latents"] = sample_latents(mean, std, torch.randn_like(mean), 0.18215)
    # From the loss of the noise alone: the two others are left out of the sum.
    features = model.encoder.backbone(batch["images"])
    bn_features, logits = model.encoder.neck(features)
    condition = model.condition(logits, bn_features, batch["labels"], model.memory)
    model.denoise(batch["latents"], batch["noise"], batch["timesteps"], condition).backward()
    found = reached(model)
    print(f"{kind:11}  {mode:9}  reaches {', '.join(name for name, arrived in found.items() if arrived)}")
    through = kind != "class"
    assert found == {
        "encoder": through,
        "neck": through,
        # Under `instance` the feature weighs the prompts, and the classifier has no part in it.
        "classifier": kind == "correlation",
        "prompts": True,
        "lora": mode == "lora",
        "unet": mode not in ("lora", "frozen"),
        "prototypes": False,
    }
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vae.parameters())
    patches = model.encoder.backbone.tower.embeddings.patch_embedding
    assert patches.weight.grad is None


@pytest.mark.parametrize("bottleneck", ["silu", "bn", "bn-silu", "condition-net"])
def test_bottlenecks(bottleneck):
    torch.manual_seed(0)
    width = 32
    condition = Condition("class", "classifier", bottleneck, num_ids=5, num_features=8, width=width, tau=1.0).double()
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    found = condition(None, None, labels, None)
    tokens = condition.prompts[labels]

    def normal(values):
        return (values - values.mean(0)) / (values.var(0, correction=0) + 1e-5).sqrt()

    if bottleneck == "condition-net":
        first, second = (layer.weight for layer in condition.bottleneck if isinstance(layer, torch.nn.Linear))
        assert first.shape == (width // 8, width) and 0.8 < first.std() < 1.2
        wanted = F.silu(normal(F.silu(normal(tokens)) @ first.t())) @ second.t()
    else:
        wanted = normal(tokens) if "bn" in bottleneck else tokens
        wanted = F.silu(wanted) if "silu" in bottleneck else wanted
    torch.testing.assert_close(found, wanted[:, None])


def test_passes_give_the_losses_and_gradients_of_one_batch(standins):
    results = []
    for pass_size in (BATCH, 2):
        model, batch = method(standins, bottleneck="condition-net", pass_size=pass_size)
        loss, values, *_ = model(**batch)
        loss.backward()
        results.append((values, {name: value.grad for name, value in model.named_parameters() if value.requires_grad}))
    (whole, whole_grads), (parts, part_grads) = results
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)
    assert len(whole_grads) > 50
    for name, grad in whole_grads.items():
        # What BatchNorm takes out again leaves only rounding in some gradients.
        assert (part_grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-4, name


def test_noise_belongs_to_seed_and_step():
    first = draw_noise(3, 7, (8, 4, 2, 2), 1000)
    again = draw_noise(3, 7, (8, 4, 2, 2), 1000)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for other in (draw_noise(3, 8, (8, 4, 2, 2), 1000), draw_noise(4, 7, (8, 4, 2, 2), 1000)):
        assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    posterior, noise, timesteps = draw_noise(0, 0, (4096, 1, 4, 4), 1000)
    assert not torch.equal(posterior, noise)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert 0 <= timesteps.min() < 10 and 990 < timesteps.max() < 1000


# Arguments


def test_recipes_set_the_published_values_and_flags_win():
    args = parse_args(["--recipe", "ms-ma", "--data_root", "/data", "--rank", "8"])
    assert (args.source, args.target, args.rank, args.tau) == (["msmt17"], ["market1501"], 8, 1.0)
    assert (args.train_batch_size, args.images_per_id, args.num_train_epochs) == (64, 4, 60)
    assert (args.learning_rate, args.lr_warmup_epochs, args.lr_milestones) == (5e-6, 10, [30, 50])
    assert (args.resolution, args.diffusion_resolution) == ([256, 128], [128, 128])
    assert args.origin["rank"] == "flag" and args.origin["tau"] == "recipe" and args.origin["seed"] == "default"
    published = {"ma-ms": (8, 0.6), "d-ma": (8, 0.6), "ms-ma": (32, 1.0), "c3-ma": (8, 0.1), "multi": (32, 1.0)}
    published |= {"supervised": (8, 0.6), "supervised-ms": (32, 1.0)}
    for name, (rank, tau) in published.items():
        args = parse_args(["--recipe", name])
        assert (args.rank, args.tau, args.adam_weight_decay, args.ldm_weight) == (rank, tau, 1e-4, 1.0)
        assert (args.variant, args.single_image_ids) == ("non_ema", "repeat")
        # Nothing of what goes beyond the paper.
        assert (args.prompt_init, args.prompt_tokens, args.freeze_prompts) == ("random", "end", False)
        assert (args.ldm_balance, args.ldm_warmup_epochs, args.ldm_start_epoch) == (None, 0, 1)


def test_the_demo_has_a_condition_that_says_something():
    def found(*flags):
        args = parse_args([*flags])
        return args.prompt_init, args.prompt_tokens, args.tau, args.ldm_balance

    random = ("random", "end", 0.6, None)
    assert found() == found("--seed", "3") == ("captions", "all", 0.1, 0.1)
    assert found("--ldm_weight", "2") == found("--ldm_warmup_epochs", "9", "--num_train_epochs", "10", "--tau", "0.6")
    assert (
        found("--prompt_init", "random") == found("--condition", "instance") == found("--diffusion", "none") == random
    )
    assert found("--source", "synthetic:domain=a") == found("--recipe", "ma-ms") == random


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_multiplier_is_of_lora_and_prompts(standins, mode):
    model, _ = method(standins, mode=mode, bottleneck="condition-net")
    args = SimpleNamespace(lr_multiplier=3.0, learning_rate=0.5)
    groups = {group["lr"]: group["params"] for group in train_dcac.parameter_groups(args, model)}
    faster = [model.condition.prompts]
    faster += [value for name, value in model.unet.named_parameters() if ".lora_" in name]
    assert {id(value) for value in groups[1.5]} == {id(value) for value in faster}
    everything = [value for value in model.parameters() if value.requires_grad]
    assert len(groups[1.5]) + len(groups[0.5]) == len(everything)


def test_erasing_is_as_wide_as_it_is_tall():
    args = parse_args(["--source", "synthetic:domain=a"])
    encoder = SimpleNamespace(image_size=(128, 64), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    train = load_reid("synthetic", domain="a", num_ids=2)["train"]
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    loader = train_dcac.build_loader(args, accelerator, encoder, train, torch.zeros(len(train)), [[0]], None)
    least, most = loader.dataset.images.transform.erasing_aspect
    assert least == 0.3 and least * most == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tau", "0"], "--tau must be above 0"),
        (["--condition", "class", "--probabilities", "mean"], "--condition correlation"),
        (["--use_8bit_adam", "--optimizer", "sgd"], "not sgd"),
        (["--resolution", "4", "4"], "at least 8"),
        (["--rank", "0"], "--rank must be 1 or more"),
        (["--ldm_start_epoch", "9", "--num_train_epochs", "8"], "comes after the last of 8 epochs"),
        (["--validation_ids", "1"], "give 0, or 2 and more"),
        (["--ldm_balance", "0"], "--ldm_balance must be above 0"),
        (["--ldm_balance", "0.1", "--condition", "class"], "nothing of L_ldm reaches the encoder"),
        (["--ldm_balance", "0.1", "--ldm_weight", "1"], "both set the strength of L_ldm"),
        (["--ldm_warmup_epochs", "1", "--condition", "class"], "--ldm_warmup_epochs: under --condition class"),
        (["--ldm_warmup_epochs", "8", "--num_train_epochs", "8"], "epoch 9, where L_ldm first reaches the encoder"),
        (["--ldm_start_epoch", "4", "--ldm_warmup_epochs", "5", "--num_train_epochs", "8"], "epoch 9"),
        (["--prompt_init", "captions", "--condition", "instance"], "prompts belong to no identity"),
        (["--prompt_tokens", "some"], "--prompt_tokens must be a whole number, got 'some'"),
        (["--prompt_tokens", "0"], "--prompt_tokens must be 1 or more, got 0"),
        (["--freeze_prompts", "--unet_mode", "frozen", "--condition", "class"], "nothing that learns from L_ldm"),
        (["--unet_mode", "half"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_flags_that_change_nothing_and_standins_are_told(capsys):
    def told(*arguments):
        args = parse_args(["--source", "synthetic:domain=a", *arguments])
        introduce(args, Accelerator(cpu=True), demo=train_dcac.DEMO, stand_ins=train_dcac.stand_ins_of(args))
        return capsys.readouterr().out.splitlines()

    schedule = ["--lr_scheduler", "cosine", "--lr_milestones", "3", "--lr_warmup_steps", "2"]
    assert told(*schedule, "--unet_mode", "full", "--rank", "4", "--k1", "9")[-1] == (
        "Without effect: --rank (--unet_mode full), --lr_milestones (--lr_scheduler cosine), --k1 (no --rerank)"
    )
    baseline = told("--diffusion", "none", "--tau", "1", "--gradient_checkpointing", "outer", "--lr_warmup_steps", "2")
    assert baseline[-1].count("(--diffusion none)") == 2 and "--lr_warmup_steps (--lr_scheduler warm" in baseline[-1]
    assert not any("Without effect" in line for line in told("--rank", "4", "--tau", "1", "--rerank", "--k1", "9"))
    # A real encoder beside the stand-in diffusion model would be easy to overlook.
    assert "--backbone and --pretrained_model_name_or_path. Using the shipped" in told()[0]
    half = told("--backbone", "openai/clip-vit-base-patch16")[0]
    assert "Not given: --pretrained_model_name_or_path. Using the shipped stand-ins" in half
    assert "stand-in" not in told("--backbone", "a/b", "--diffusion", "none")[0]


# Whole runs


def test_two_passes_train_as_one(small, tmp_path):
    """The same effective batch: log files agree, whatever the number of passes."""
    steps = ["--max_train_steps", "3", "--bottleneck", "bn"]
    logs = []
    for name, passes in (("one", []), ("two", ["--train_batch_size", "4", "--gradient_accumulation_steps", "2"])):
        train(*small, *steps, *passes, "--output_dir", tmp_path / name, "--cache_dir", tmp_path / "cache")
        logs.append(log_of(tmp_path / name))
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


def plain(small, cache):
    return [*small, "--max_train_steps", "2", "--validation_ids", "0", "--cache_dir", cache]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_recomputation_and_an_absent_cache_change_no_number(small, cache, tmp_path, monkeypatch):
    variants = {"plain": [], "recomputed": ["--gradient_checkpointing"], "uncached": ["--cache_dir", "none"]}
    asked = [
        calls_of(monkeypatch, ReIDModel, "enable_gradient_checkpointing"),
        calls_of(monkeypatch, train_dcac, "recompute_activations"),
    ]
    for name, more in variants.items():
        train(*plain(small, cache), *more, "--output_dir", tmp_path / name)
        assert [len(calls) for calls in asked] == [name != "plain"] * 2
    wanted = log_of(tmp_path / "plain")
    for line, other in zip(wanted, log_of(tmp_path / "recomputed"), strict=True):
        assert other == pytest.approx(line, rel=1e-5)
    for line, other in zip(wanted, log_of(tmp_path / "uncached"), strict=True):
        # The cache keeps posteriors in half precision.
        assert other == pytest.approx(line, rel=5e-3)
        assert other["loss_id"] == pytest.approx(line["loss_id"], rel=1e-4)


@pytest.mark.slow
def test_precisions_and_optimisers(small, cache, tmp_path):
    train(*plain(small, cache), "--output_dir", tmp_path / "plain")
    wanted, then = log_of(tmp_path / "plain")
    for name, more, tolerance in (
        ("bf16", ["--mixed_precision", "bf16"], 0.05),
        ("8bit", ["--use_8bit_adam"], 1e-5),
        ("adamw", ["--optimizer", "adamw", "--lr_scheduler", "cosine", "--lr_warmup_steps", "4"], 1e-5),
    ):
        train(*plain(small, cache), *more, "--output_dir", tmp_path / name)
        first, second = log_of(tmp_path / name)
        for key in ("loss_id", "loss_pcl", "loss_ldm"):
            # The first losses come before any step.
            assert first[key] == pytest.approx(wanted[key], rel=tolerance), (name, key)
        assert first["loss"] != second["loss"] and second["loss"] != then["loss"], name
        assert (first["loss"] == wanted["loss"]) == (name != "bf16"), name
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
    assert [line["lr"] for line in log_of(tmp_path / "adamw")] == pytest.approx([0, 3e-4 / 4])


def test_baseline_and_late_diffusion(small, cache, tmp_path):
    train(*plain(small, cache), "--diffusion", "none", "--output_dir", tmp_path / "none")
    assert all(line["loss_ldm"] == 0 for line in log_of(tmp_path / "none"))
    assert not (tmp_path / "none" / "prompts.safetensors").exists()
    late = ["--ldm_start_epoch", "2", "--max_train_steps", "9", "--num_train_epochs", "2"]
    train(*plain(small, cache), *late, "--output_dir", tmp_path / "late")
    lines = log_of(tmp_path / "late")
    assert {line["epoch"] for line in lines} == {1, 2}
    assert all((line["loss_ldm"] > 0) == (line["epoch"] == 2) for line in lines)
    # Until then the two are the same training.
    baseline = log_of(tmp_path / "none")[0]
    assert lines[0]["loss_id"] == baseline["loss_id"] and lines[0]["grad_norm"] == baseline["grad_norm"]


def test_several_sources_and_targets(small, cache, tmp_path):
    sources = ["synthetic:domain=a,num_ids=3,images_per_id=4", "synthetic:domain=c,num_ids=3,images_per_id=4"]
    targets = ["synthetic:domain=b,num_ids=3", "synthetic:domain=d,num_ids=3"]
    more = ["--source", *sources, "--target", *targets, "--output_dir", tmp_path, "--unet_mode", "full"]
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "samples" / "epoch-0000.png")
    train(*plain(small, cache), *more)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["targets"]) == targets
    assert ReIDModel.from_pretrained(tmp_path / "model").num_ids == 6
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    # An earlier run's pictures are not this one's.
    assert "Samples" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_deepspeed_trains_and_goes_on(small, cache, tmp_path, offload):
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    env["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = offload
    common = [*small, "--unet_mode", "full", "--validation_ids", "0", "--cache_dir", cache, "--num_train_epochs", "9"]
    half = [*common, "--train_batch_size", "4"]
    torchrun(SCRIPT, *half, "--max_train_steps", "4", "--output_dir", tmp_path / "whole", **env)
    torchrun(SCRIPT, *half, "--max_train_steps", "2", "--output_dir", tmp_path / "cut", **env)
    more = ["--resume_from_checkpoint", "latest"]
    torchrun(SCRIPT, *half, "--max_train_steps", "4", "--output_dir", tmp_path / "cut", *more, **env)
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert any((tmp_path / "cut" / "checkpoint-4" / "deepspeed").rglob("*optim_states.pt"))
    train(*common, "--max_train_steps", "4", "--output_dir", tmp_path / "one")
    assert log_of(tmp_path / "whole")[0] == pytest.approx(log_of(tmp_path / "one")[0], rel=1e-3)


@pytest.mark.slow
def test_compiled_trains_alike(small, cache, tmp_path):
    train(*plain(small, cache), "--output_dir", tmp_path / "plain")
    train(*plain(small, cache), "--torch_compile", "--output_dir", tmp_path / "compiled")
    for line, other in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "compiled"), strict=True):
        assert other == pytest.approx(line, rel=1e-3)


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A whole small run: its folder."""
    folder = tmp_path_factory.mktemp("finished")
    run = launch(
        SCRIPT, *small, "--num_train_epochs", "2", "--checkpointing_steps", "2", "--rerank",
        "--output_dir", folder / "out", "--cache_dir", folder / "cache",
    )  # fmt: skip
    (folder / "printed").write_text(run.stdout)
    return folder


def test_what_a_run_leaves(finished):
    out = finished / "out"
    lines = log_of(out)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    keys = ["step", "epoch", "lr", "grad_norm", "loss", "loss_id", "loss_pcl", "loss_ldm"]
    assert all(list(line) == keys for line in lines)
    assert all(line["loss_ldm"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert lines[0]["lr"] == pytest.approx(3e-4 * (0.1 + 0.9 / 2)) and lines[-1]["lr"] == pytest.approx(3e-4)
    metrics = json.loads((out / "metrics.json").read_text())
    spec = "synthetic:domain=b,num_ids=3"
    assert [(one["epoch"], one["target"]) for one in metrics["history"]] == [(0, spec), (2, spec)]
    assert 0 < metrics["targets"][spec]["mAP"] <= 1 and 0 < metrics["targets"][spec]["reranked"]["rank1"] <= 1
    model = ReIDModel.from_pretrained(out / "model")
    assert model.num_ids == 6
    prompts = load_file(out / "prompts.safetensors")["prompts"]
    assert prompts.shape == (6, build.TEXT_WIDTH)
    assert (out / "unet_lora" / "pytorch_lora_weights.safetensors").is_file()
    page = (out / "report.html").read_text()
    assert "Before and after" in page and "Rank-1" in page and "data:image/jpeg" in page
    assert f"epoch 2, timestep {metrics['feedback'][-1]['matters_at']}" in page
    printed = (finished / "printed").read_text()
    assert "before" in printed and "Rank-1" in printed
    assert json.loads((out / "args.json").read_text())["arguments"]["seed"] == 0
    assert not list(out.glob("**/*.part")) and not list(out.glob(".checkpoint*"))
    card = (out / "model" / "README.md").read_text()
    assert "accelerate launch train_dcac.py --source" in card and "| reranked mAP |" in card
    assert str(finished) not in card and str(ROOT) not in card and "origin" not in card
    # What it says about loading runs, and gives the numbers that were measured on.
    for row, name in zip(load_reid("synthetic", domain="b", num_ids=3)["query"], ("person", "another"), strict=False):
        row["image"].save(finished / f"{name}.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {}
    code = code.replace("this folder or repository", str(out / "model"))
    exec(re.sub(r"(person|another)\.jpg", rf"{finished}/\1.jpg", code), names)
    assert names["features"].shape == (2, model.num_features)
    torch.testing.assert_close(names["features"].norm(dim=1), torch.ones(2))


def test_lora_file_opens_in_a_pipeline(finished, standins):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(standins / "stable-diffusion")
    pipeline.load_lora_weights(finished / "out" / "unet_lora")
    assert any(".lora_" in name for name, _ in pipeline.unet.named_parameters())


def test_a_cut_training_goes_on_to_the_same_numbers(small, finished, tmp_path, capsys):
    """Cut in the middle of an epoch, and gone on with: the log is that of the run in one piece, to the last digit."""
    common = [*small, "--num_train_epochs", "2", "--checkpointing_steps", "2", "--rerank", "--output_dir", tmp_path]
    common += ["--cache_dir", finished / "cache"]
    train(*common, "--max_train_steps", "1")
    first = log_of(tmp_path)
    train(*common, "--resume_from_checkpoint", "latest")
    assert "Resuming from" in capsys.readouterr().out
    whole = (finished / "out" / "log.jsonl").read_text()
    assert len(first) == 1 and (tmp_path / "log.jsonl").read_text() == whole
    assert same_weights(weights_of(tmp_path), weights_of(finished / "out"))
    metrics, one_piece = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, finished / "out"))
    assert metrics["targets"] == one_piece["targets"]
    # And once more, after its end.
    assert train(*common, "--resume_from_checkpoint", "latest") == 0
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_kill_and_go_on(small, finished, tmp_path):
    """SIGKILL after some step, then continue: the log file is the unbroken run's, byte by byte."""
    common = [*small, "--num_train_epochs", "2", "--checkpointing_steps", "1", "--rerank", "--output_dir", tmp_path]
    common += ["--cache_dir", finished / "cache"]
    killed = stopped(start(SCRIPT, *common), lambda: lines_written(tmp_path) >= 2)
    assert killed.returncode == -signal.SIGKILL
    launch(SCRIPT, *common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_text() == (finished / "out" / "log.jsonl").read_text()


def test_sigterm_writes_a_checkpoint(small, finished, tmp_path):
    common = [*small, "--num_train_epochs", "50", "--output_dir", tmp_path, "--cache_dir", finished / "cache"]
    ended = stopped(start(SCRIPT, *common), lambda: lines_written(tmp_path) >= 1, signal.SIGTERM)
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 128 + signal.SIGTERM, printed[-2000:]
    assert "SIGTERM" in printed and "--resume_from_checkpoint latest" in printed
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "state.json").read_text())["step"] == lines_written(tmp_path)


def test_two_processes_train_as_one(small, tmp_path):
    """The same global batch on two processes: BatchNorm of neck and condition, memory, sampler, noise and losses."""
    steps = ["--max_train_steps", "12", "--bottleneck", "condition-net", "--mixed_precision", "no"]
    steps += ["--num_train_epochs", "30", "--eval_every", "30", "--cache_dir", tmp_path / "cache"]
    train(*small, *steps, "--output_dir", tmp_path / "one")
    launch(SCRIPT, *small, *steps, "--train_batch_size", "4", "--output_dir", tmp_path / "two", processes=2)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 12
    for name in one[0]:
        apart = max(abs(left[name] - right[name]) for left, right in zip(one, two, strict=True))
        largest = max(abs(left[name]) for left in one)
        print(f"{name}: largest difference {apart:.1e} of {largest:.4g}")
        assert apart <= (5e-4 if name == "grad_norm" else 1e-4) * max(1, largest), name
    first, second = (weights_of(tmp_path / name) for name in ("one", "two"))
    apart = max(float((first[name].float() - second[name].float()).abs().max()) for name in first)
    print(f"weights at the end: largest difference {apart:.1e}")
    assert apart < 1e-3


@pytest.mark.slow
def test_two_processes_train_a_resnet_as_one(small, tmp_path):
    """The BatchNorm inside the backbone too."""
    open_backbone("resnet-small", (64, 32), from_scratch=True).save_pretrained(tmp_path / "start")
    common = [*small, "--diffusion", "none", "--backbone", tmp_path / "start", "--resolution", "64", "32"]
    common += ["--max_train_steps", "3", "--mixed_precision", "no"]
    train(*common, "--output_dir", tmp_path / "one")
    launch(SCRIPT, *common, "--train_batch_size", "4", "--output_dir", tmp_path / "two", processes=2)
    for left, right in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-3)


def test_a_tracker_gets_losses_rates_numbers_and_settings(small, cache, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(*plain(small, cache), "--report_to", "tensorboard", "--output_dir", tmp_path)
    (file,) = (path for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "diffreid-dcac")
    found = events.EventAccumulator(str(file.parent))
    found.Reload()
    lines = log_of(tmp_path)
    for name in ("loss", "loss_id", "loss_pcl", "loss_ldm", "grad_norm", "lr"):
        told = found.Scalars(name)
        assert [event.step for event in told] == [line["step"] for line in lines]
        assert [event.value for event in told] == pytest.approx([line[name] for line in lines], rel=1e-6)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (target,) = metrics["targets"]
    numbers = [tag for tag in found.Tags()["scalars"] if tag.endswith("mAP")]
    assert len(numbers) == 1 and target in numbers[0]
    assert found.Scalars(numbers[0])[-1].value == pytest.approx(metrics["targets"][target]["mAP"], rel=1e-6)


def test_trackio_gets_the_same_numbers(small, cache, tmp_path):
    """Read back from its database on this machine."""
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("pip install trackio")
    words = ["--report_to", "trackio", "--output_dir", tmp_path / "out"]
    launch(SCRIPT, *plain(small, cache), *words, TRACKIO_DIR=str(tmp_path / "trackio"))
    (file,) = (tmp_path / "trackio").glob("diffreid-dcac*.db")
    with sqlite3.connect(file) as database:
        rows = [(step, json.loads(text)) for step, text in database.execute("select step, metrics from metrics")]
        ((settings,),) = database.execute("select config from configs")
    assert json.loads(settings)["learning_rate"] == 3e-4
    told = {step: numbers for step, numbers in rows if "loss" in numbers}
    lines = log_of(tmp_path / "out")
    assert told == {line.pop("step"): {name: line[name] for name in line if name != "epoch"} for line in lines}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (target,) = metrics["targets"]
    measured = [numbers[f"{target}/mAP"] for _, numbers in rows if f"{target}/mAP" in numbers]
    assert measured == [entry["mAP"] for entry in metrics["history"]]


# Prompts from captions


def captions_file(path, *, domain="a", change=None, num_ids=6):
    """A jsonl with the true words of training identities; `change` {pid: text}, None leaves the row out."""
    texts = {pid: caption(attributes(domain, pid)) for pid in range(0, 2 * num_ids, 2)} | (change or {})
    rows = [{"domain": f"synthetic-{domain}", "pid": pid, "prompt": text} for pid, text in texts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"] is not None))
    return path


def prompts_of(standins, file, num_tokens, specs=("synthetic:domain=a,num_ids=6,images_per_id=4",), **options):
    from utils.generated.texts.identity_texts import CaptionPrompts

    train, labels, _ = open_source(list(specs))
    name = str(standins / "stable-diffusion")
    prompts = CaptionPrompts(str(file), num_tokens, build.TEXT_WIDTH, name, **options)
    return prompts.make(list(specs), train, labels, Accelerator(cpu=True), None)


def test_captions_of_other_people_of_the_same_names(standins, tmp_path):
    """A file that names its images is of those images."""
    made = tmp_path / "made"
    runs.run(train_dreambooth_reid, "--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--captions_only",
             "--captioner_model_name_or_path", standins / "blip-vqa", "--output_dir", made,
             "--pretrained_model_name_or_path", standins / "stable-diffusion")  # fmt: skip
    file = made / "captions.parquet"
    assert prompts_of(standins, file, "end").shape[0] == 6
    others = ["synthetic:domain=a,num_ids=6,images_per_id=4,seed=1"]
    with pytest.raises(ValueError, match="has captions of other images, such as .*s0.* of synthetic-a/0000, of which"):
        prompts_of(standins, file, "end", specs=others)


def test_prompts_are_the_text_encoders_states_of_each_identity(standins, tmp_path, capsys):
    long = caption(attributes("a", 4)) + " and nothing but long words in a long row" * 9
    file = captions_file(tmp_path / "captions.jsonl", change={4: long})
    texts = [caption(attributes("a", pid)) for pid in (0, 2, 4, 6, 8, 10)]
    tokenizer = AutoTokenizer.from_pretrained(standins / "stable-diffusion", subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(standins / "stable-diffusion", subfolder="text_encoder")
    found = prompts_of(standins, file, "all")
    assert (
        found.shape == (6, 77, build.TEXT_WIDTH) and "1 captions have more than 77 tokens" in capsys.readouterr().out
    )
    others = [0, 1, 3, 4, 5]
    tokens = tokenizer([texts[row] for row in others], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = encoder(tokens)
    torch.testing.assert_close(found[others], wanted.last_hidden_state)
    end = prompts_of(standins, file, "end")
    torch.testing.assert_close(end[others], wanted.pooler_output)
    # Cut at a word, and closed: as a text that was so short.
    few = prompts_of(standins, file, 8)
    text = texts[0]
    while len(tokenizer(text).input_ids) > 8:
        text = text.rpartition(" ")[0]
    with torch.no_grad():
        wanted = encoder(tokenizer([text.rstrip(",")], padding="max_length", return_tensors="pt").input_ids)
    torch.testing.assert_close(few[0], wanted.last_hidden_state[0, :8])
    # Several sources number their identities anew.
    both = tmp_path / "both.jsonl"
    both.write_text(file.read_text() + captions_file(tmp_path / "b.jsonl", domain="b").read_text())
    specs = ["synthetic:domain=b,num_ids=2", "synthetic:domain=a,num_ids=3,images_per_id=4"]
    merged = prompts_of(standins, both, "end", specs)
    torch.testing.assert_close(merged[2:4], end[:2])
    with torch.no_grad():
        own = encoder(tokenizer([caption(attributes("b", 2))], padding="max_length", return_tensors="pt").input_ids)
    torch.testing.assert_close(merged[1], own.pooler_output[0])


def test_equal_captions_are_told(standins, tmp_path, capsys):
    file = captions_file(tmp_path / "captions.jsonl", change=dict.fromkeys(range(0, 12, 2), "a photo of a person"))
    prompts = prompts_of(standins, file, "end")
    assert "WARNING: all captions are equal" in capsys.readouterr().out
    assert effective_rank(prompts) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_captions_balance_and_warmup_resume_and_run_on_two_processes(small, cache, tmp_path):
    """The cut training goes on to the same numbers, to the last digit; two processes to the same but for rounding."""
    file = captions_file(tmp_path / "captions.jsonl")
    common = [*small, "--prompt_init", file, "--prompt_tokens", "all", "--ldm_balance", "0.1", "--cache_dir", cache]
    common += ["--ldm_warmup_epochs", "1", "--num_train_epochs", "3", "--mixed_precision", "no"]
    train(*common, "--output_dir", tmp_path / "one")
    whole = log_of(tmp_path / "one")
    assert len(whole) == 9
    ratios = [line["feedback_ratio"] for line in whole]
    # No gradient reaches the encoder in the warm-up, and none before the first measurement.
    assert ratios[:4] == [0] * 4 and all(0.01 < ratio < 1 for ratio in ratios[4:])
    train(*common, "--max_train_steps", "5", "--output_dir", tmp_path / "cut")
    train(*common, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "cut")
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "one" / "log.jsonl").read_text()
    assert same_weights(weights_of(tmp_path / "one"), weights_of(tmp_path / "cut"))
    notes = [json.loads((tmp_path / name / "metrics.json").read_text())["feedback"] for name in ("one", "cut")]
    assert notes[0] == [entry for entry in notes[1] if entry["epoch"] in (0, 3)]
    launch(SCRIPT, *common, "--train_batch_size", "4", "--output_dir", tmp_path / "two", processes=2)
    for left, right in zip(whole, log_of(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=2e-3, abs=1e-4)
    page = (tmp_path / "one" / "report.html").read_text()
    assert "What the condition says" in page and "another_worse" in page


def test_captions_made_on_the_spot_are_kept(small, standins, cache, tmp_path):
    common = [*plain(small, cache), "--max_train_steps", "1", "--freeze_prompts"]
    captioner = ["--captioner_model_name_or_path", standins / "blip-vqa"]
    train(*common, "--prompt_init", "captions", *captioner, "--output_dir", tmp_path / "made")
    table = tmp_path / "made" / "captions.parquet"
    assert len(pq.read_table(table)) == 6
    prompts = load_file(tmp_path / "made" / "prompts.safetensors")["prompts"]
    assert torch.equal(prompts, prompts_of(standins, table, "end")), "frozen"


# Bad input


def test_captions_that_do_not_fit_are_told_before_a_model_is_loaded(small, standins, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ReIDModel, "for_training", None)
    out = ["--output_dir", tmp_path / "out"]

    def told(file, *more):
        return refused(*small, *out, "--prompt_init", file, *more)

    good = captions_file(tmp_path / "good.jsonl")
    lacking = told(captions_file(tmp_path / "lacking.jsonl", change={2: None, 6: None}))
    assert (
        "no caption of 2 of 6 training identities, synthetic-a/0002 for one" in lacking and "captions_only" in lacking
    )
    other = told(captions_file(tmp_path / "other.jsonl", domain="b"))
    assert "no caption of 6 of 6" in other and "captions of synthetic-b" in other
    assert "identity 4 has neither a prompt" in told(captions_file(tmp_path / "empty.jsonl", change={4: " "}))
    assert "cannot be read as captions" in told(tmp_path / "nowhere.parquet")
    assert "--prompt_tokens 78: the text encoder of" in told(good, "--prompt_tokens", "78")
    assert "leaves no word between start and end" in told(good, "--prompt_tokens", "2")
    assert "has 77 tokens" in refused(*small, *out, "--prompt_tokens", "78")
    captioner = ["--captioner_model_name_or_path", tmp_path / "nowhere"]
    assert "no captioner at" in told("captions", *captioner)
    name = tmp_path / "sd"
    shutil.copytree(standins / "stable-diffusion", name)
    path = name / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 96}))
    wide = told(good, "--pretrained_model_name_or_path", name)
    assert "has width 96, its U-Net takes conditions of 128" in wide


def test_a_variant_that_is_not_there(small, standins, tmp_path, capsys, monkeypatch):
    """Asked for by a flag it is an error; of a recipe the default is taken, and said."""
    monkeypatch.setattr(train_dcac, "open_sets", lambda *_, **__: (_ for _ in ()).throw(ValueError("stop here")))
    common = [*small, "--backbone", standins / "clip", "--mixed_precision", "no", "--output_dir", tmp_path / "out"]
    assert "has no U-Net of --variant non_ema" in refused(*common, "--variant", "non_ema")
    assert "stop here" in refused(*common, "--recipe", "ma-ms")
    assert "has no U-Net of variant non_ema: training starts from the default one" in capsys.readouterr().out


def test_bad_input_is_told_in_one_line(small, standins, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ReIDModel, "for_training", None)
    out = ["--output_dir", tmp_path / "out"]
    assert "10" in (odd := refused(*small, *out, "--train_batch_size", "10")) and "multiple of 4" in odd
    assert "a batch of one" in refused(*small, *out, "--train_batch_size", "1", "--images_per_id", "1")
    many = refused(*small, *out, "--train_batch_size", "32")
    assert "8 identities" in many and "only 6" in many
    assert "no query and gallery" in refused(*small, *out, "--target", str(folder_of(tmp_path, ["train"])))
    assert "one image only" in refused(*small, *out, "--source", str(folder_of(tmp_path / "s", single=True)))
    assert "did you mean" in refused(*small, *out, "--source", "market1502")
    assert "no checkpoint 'checkpoint-7'" in refused(*small, *out, "--resume_from_checkpoint", "checkpoint-7")
    # Before the data is looked through, too.
    monkeypatch.setattr(train_dcac, "open_sets", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "nowhere does not exist" in refused(*small, *out, "--backbone", tmp_path / "nowhere")
    assert "--use_8bit_adam needs bitsandbytes" in refused(*small, *out, "--use_8bit_adam")
    (tmp_path / "file").write_text("")
    assert "file is no folder" in refused(*small, "--output_dir", tmp_path / "file" / "out")


def folder_of(root, splits=("train",), single=False):
    data = load_reid("synthetic", domain="a", num_ids=4, images_per_id=4)["train"]
    for split in splits:
        for number, row in enumerate(data):
            folder = root / split / f"{row['pid']:04d}"
            if single and row["pid"] == data[0]["pid"] and folder.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{row['pid']:04d}_c{row['camid'] + 1}_{number}.png")
    return root


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("unet", {"cross_attention_dim": 96}, "cross_attention_dim"),
        ("scheduler", {"prediction_type": "sample"}, "sample"),
        ("unet", {"in_channels": 9}, "9"),
    ],
)
def test_diffusion_checkpoints_that_do_not_fit(small, standins, tmp_path, capsys, part, change, words):
    name = tmp_path / "sd"
    shutil.copytree(standins / "stable-diffusion", name)
    path = name / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = refused(*small, "--pretrained_model_name_or_path", name, "--output_dir", tmp_path / "out")
    assert words in found


def test_going_on_with_other_arguments_names_them(small, finished, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(finished / "out", folder)
    common = [*small, "--num_train_epochs", "2", "--rerank", "--output_dir", folder, "--cache_dir", finished / "cache"]
    common += ["--resume_from_checkpoint", "latest"]
    assert "tau was 0.6, is 0.5" in refused(*common, "--tau", "0.5")
    others = "synthetic:domain=a,num_ids=7,images_per_id=4"
    assert "source was" in refused(*common, "--source", others)
    # Of accelerate's setting no argument tells.
    AcceleratorState._reset_state(True)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert "setting is bf16: give --mixed_precision no" in refused(*common)
    AcceleratorState._reset_state(True)
    newest = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = refused(*common)
    assert "model.safetensors" in damaged and "damaged" in damaged


def test_a_loss_that_is_not_finite_stops_and_names_the_images(small, tmp_path, capsys):
    found = refused(
        *small, "--learning_rate", "1e20", "--lr_warmup_epochs", "0", "--checkpointing_steps", "1",
        "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache",
    )  # fmt: skip
    assert "not finite at step" in found and "synthetic-a/s0/" in found
    steps = [line["step"] for line in log_of(tmp_path / "out")]
    assert steps and f"at step {steps[-1] + 1}" in found


def test_captions_of_other_people_are_made_anew(standins, tmp_path):
    """The same numbers, kept in the folder, may be other people by now."""
    from utils.datasets.identities import open_identities
    from utils.generated.texts.identity_texts import captioned

    name, accelerator = str(CAPTIONER_DIR), Accelerator(cpu=True)
    people = [open_identities([f"synthetic:domain=a,num_ids=2,images_per_id=3,seed={seed}"]) for seed in (0, 1)]
    for identities in people:
        texts = captioned(identities, name, tmp_path / "kept", accelerator)
        assert texts == captioned(identities, name, tmp_path / identities[0].paths[0].replace("/", "-"), accelerator)
