"""What pre-training is made of: mixed images, groups of parameters, the schedule, shared statistics, augmentation."""

import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from pretrain_backbone import Classification, build_optimizer, build_rates, parse_args
from utils.batches.augmentation import MultiCrop, RandAugmentTransform, to_picture
from utils.batches.mixing import Mix, Mixing, cut, mix_images, mixed_loss, neighbours
from utils.batches.shuffled import ShuffleSampler
from utils.batches.transforms import TrainTransform, to_tensor
from utils.modeling.backbones import backbone_from_config
from utils.modeling.names import NAMED, check_backbone, named_config, open_backbone
from utils.modeling.norms import GlobalBatchNorm, add_batch_instance_norms
from utils.modeling.reid_model import ReIDModel
from utils.training.parameter_groups import decays, depths, parameter_groups

PUBLISHED = ["--recipe", "diff-person", "--source", "somewhere"]


# Mixing


def pair(size=(16, 8)):
    """In a batch of two, torchvision's neighbour and ours are the same image."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, *size, generator=generator), torch.tensor([0, 2])


def test_mixup_is_torchvisions():
    images, labels = pair()
    torch.manual_seed(1)
    wanted, soft = v2.MixUp(alpha=1.0, num_classes=3)(images, labels)
    share = soft[0, 0].item()
    assert 0.05 < share < 0.95
    torch.testing.assert_close(mix_images(images, Mix(share)), wanted)


def test_cutmix_is_torchvisions():
    images, labels = pair()
    for seed in range(20):
        torch.manual_seed(seed)
        wanted, soft = v2.CutMix(alpha=1.0, num_classes=3)(images, labels)
        rows, columns = ((wanted != images).any(dim=0).any(dim=0).any(dim=dim).nonzero().flatten() for dim in (1, 0))
        if not len(rows):
            continue
        box = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        share = soft[0, 0].item()
        assert share == pytest.approx(1 - (box[1] - box[0]) * (box[3] - box[2]) / (16 * 8))
        found = mix_images(images, Mix(share, box))
        assert torch.equal(found, wanted) and not torch.equal(images, found)


def test_a_drawn_box_covers_what_its_labels_say():
    rng = random.Random(0)
    for _ in range(50):
        asked = rng.random()
        mix = cut(asked, (32, 16), rng)
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 16
        ones = mix_images(torch.stack([torch.ones(1, 32, 16), torch.zeros(1, 32, 16)]), mix)
        assert ones[0].mean().item() == pytest.approx(mix.share)
        # Only what the border cuts off, and whole pixels, may be missing from the box.
        assert mix.share >= asked - 1e-6


def test_labels_are_mixed_like_images():
    torch.manual_seed(0)
    logits, labels, mix = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0]), Mix(0.7)
    soft = 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(labels[[1, 0, 3, 2, 5, 4]], 5)
    smooth = 0.9 * soft + 0.1 / 5
    wanted = -(smooth * logits.log_softmax(1)).sum(1).mean()

    def loss(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    torch.testing.assert_close(mixed_loss(loss, logits, labels, mix), wanted)
    torch.testing.assert_close(mixed_loss(loss, logits, labels, Mix()), loss(logits, labels))


def test_draws_belong_to_seed_and_step():
    mixing = Mixing(0.8, 1.0, seed=3)
    drawn = [mixing.draw(step, (64, 32)) for step in range(400)]
    assert drawn == [Mixing(0.8, 1.0, seed=3).draw(step, (64, 32)) for step in range(400)]
    assert drawn != [Mixing(0.8, 1.0, seed=4).draw(step, (64, 32)) for step in range(400)]
    boxes = sum(mix.box is not None for mix in drawn)
    assert 150 < boxes < 250
    shares = torch.tensor([mix.share for mix in drawn if mix.box is None])
    # Beta(0.8, 0.8) has mean 1/2 and variance 1 / (4 * 2.6).
    assert abs(shares.mean() - 0.5) < 0.08 and abs(shares.var() - 1 / (4 * 2.6)) < 0.025
    assert all(mix.box is None for mix in (Mixing(mixup=0.8).draw(step, (64, 32)) for step in range(20)))
    assert all(mix.box is not None for mix in (Mixing(cutmix=1.0).draw(step, (64, 32)) for step in range(20)))
    assert Mixing().draw(0, (64, 32)) == Mix(1.0, None)


def test_a_batch_cut_at_even_places_is_mixed_alike():
    images = torch.rand(8, 3, 8, 4)
    for mix in (Mix(0.3), Mix(0.75, (0, 4, 2, 4))):
        whole = mix_images(images, mix)
        assert torch.equal(torch.cat([mix_images(part, mix) for part in images.split(2)]), whole)
    assert neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


# Groups of parameters, and the schedule


@pytest.fixture(scope="module")
def real():
    """The real backbones, without memory, in a model with a classifier."""
    models = {}
    for name in ("resnet50", "swin-t", "clip-b16"):
        with torch.device("meta"):
            models[name] = Classification(backbone_from_config(named_config(name), (256, 128)), 10)
    return models


@pytest.mark.parametrize("name", ["resnet50", "swin-t", "clip-b16"])
def test_norms_biases_and_positions_do_not_decay(real, name):
    """Told by the kind of the layer, not by the shape or name that the function looks at."""
    model = real[name]
    weights = {
        f"{place}.weight"
        for place, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) or type(module).__name__.endswith("Embedding")
    } - {"backbone.model.vision_model.embeddings.position_embedding.weight"}
    names = {parameter: key for key, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.05)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.05]
    free, decaying = ({names[parameter] for parameter in group["params"]} for group in groups)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert decaying == weights & trained and free == trained - weights
    assert all(re.search(r"bias|norm|position_embedding|class_embedding", key) for key in free)
    assert {"classifier.weight"} <= decaying and {"classifier.bias"} <= free
    kinds = Counter(key.rpartition(".")[2] for key in free)
    assert kinds["bias"] > 0 and (name != "swin-t" or kinds["relative_position_bias_table"] == 12)


def test_layer_decay_multiplies_the_rate_from_block_to_block(real):
    wanted = {
        "resnet50": {
            "classifier.weight": 0,
            "backbone.model.encoder.stages.3.layers.2.layer.0.convolution.weight": 1,
            "backbone.model.encoder.stages.3.layers.0.layer.0.convolution.weight": 3,
            "backbone.model.encoder.stages.0.layers.0.layer.0.convolution.weight": 16,
            "backbone.model.embedder.embedder.convolution.weight": 17,
        },
        "swin-t": {
            "backbone.model.layernorm.weight": 0,
            "backbone.model.encoder.layers.3.blocks.1.attention.q_proj.weight": 1,
            "backbone.model.encoder.layers.2.downsample.reduction.weight": 3,
            "backbone.model.encoder.layers.0.blocks.0.attention.q_proj.weight": 12,
            "backbone.model.embeddings.norm.weight": 13,
        },
        "clip-b16": {
            "backbone.model.visual_projection.weight": 0,
            "backbone.model.vision_model.encoder.layers.11.self_attn.q_proj.weight": 1,
            "backbone.model.vision_model.encoder.layers.0.self_attn.q_proj.bias": 12,
            "backbone.model.vision_model.embeddings.class_embedding": 13,
        },
    }
    for name, powers in wanted.items():
        model = real[name]
        groups = parameter_groups(model, learning_rate=2.0, weight_decay=0.05, layer_decay=0.5)
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        named = dict(model.named_parameters())
        attention = [key for key in powers if key not in named]
        assert not attention, [key for key in named if "q_proj" in key or "downsample" in key][:3]
        for key, power in powers.items():
            assert rates[id(named[key])] == pytest.approx(2.0 * 0.5**power), key
        counted = sum(len(group["params"]) for group in groups)
        assert counted == sum(parameter.requires_grad for parameter in named.values())


def test_published_schedule_and_decay():
    """Rates at the first and last step of epochs 1, 20, 21, 150 and 300, at the paper's 777,130 images."""
    args = parse_args(PUBLISHED)
    model = Classification(backbone_from_config(named_config("resnet-small"), (64, 32)), 4)
    optimizer = build_optimizer(args, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    steps = 777_130 // 512
    rates = build_rates(args, optimizer, steps)
    found = {
        epoch: [rates.set(epoch, step) for step in ((epoch - 1) * steps, epoch * steps - 1)]
        for epoch in (1, 20, 21, 150, 300)
    }
    assert found[1] == pytest.approx([0.0, 4e-3 * (steps - 1) / (20 * steps)])
    assert found[20] == pytest.approx([4e-3 * 19 / 20, 4e-3 * (1 - 1 / (20 * steps))])

    def half_cosine(epochs):
        return 4e-3 * 0.5 * (1 + math.cos(math.pi * (epochs - 20) / 280))

    assert found[21] == pytest.approx([4e-3, half_cosine(21 - 1 / steps)], rel=1e-9)
    assert found[150] == pytest.approx([half_cosine(149), half_cosine(150 - 1 / steps)], rel=1e-9)
    assert found[150][0] == pytest.approx(0.002246, abs=1e-6)
    assert found[300] == pytest.approx([half_cosine(299), half_cosine(300 - 1 / steps)], rel=1e-6)
    assert found[300][0] == pytest.approx(1.2587e-7, rel=1e-3) and 0 < found[300][1] < 1e-12
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] == found[300][1] and group["initial_lr"] == 4e-3
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), names[parameter]


def test_decay_moves_what_has_no_gradient_but_for_norms_and_biases():
    """One step of the optimiser on gradients of zero: only decay is left."""
    args = parse_args([*PUBLISHED, "--learning_rate", "0.1"])
    model = Classification(backbone_from_config(named_config("resnet-small"), (64, 32)), 4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(args, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.05 if decays(name, parameter) else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


# Batches


def test_every_image_once_an_epoch_in_a_new_order():
    sampler = ShuffleSampler(23, 5, seed=1)
    epochs = [list(sampler.global_batches(epoch)) for epoch in (1, 2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [5, 5, 5, 5]
        assert len({image for batch in batches for image in batch}) == 20
    assert epochs[0] != epochs[1] and epochs[0] == list(ShuffleSampler(23, 5, seed=1).global_batches(1))
    assert epochs[0] != list(ShuffleSampler(23, 5, seed=2).global_batches(1))


def test_processes_share_the_batches_of_one():
    one = ShuffleSampler(30, 8, seed=1)
    shares = [ShuffleSampler(30, 8, seed=1, rank=rank, num_processes=2) for rank in (0, 1)]
    for sampler in (one, *shares):
        sampler.set_epoch(4)
    assert [left + right for left, right in zip(*shares, strict=True)] == list(one)
    whole = list(one)
    one.set_epoch(4, done=2)
    assert list(one) == whole[2:] and len(one) == 1


def test_batches_that_cannot_be():
    with pytest.raises(ValueError, match="a batch of 8 images cannot be made of 7"):
        ShuffleSampler(7, 8)
    with pytest.raises(ValueError, match="a batch of 9 cannot be shared evenly by 2"):
        ShuffleSampler(70, 9, num_processes=2)


# Augmentation


def picture():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 8, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((32, 64))


@pytest.mark.parametrize(
    "transform",
    [
        RandAugmentTransform((64, 32), padding=2, erasing=0.5),
        MultiCrop((64, 32), (32, 16), num_parts=3),
        MultiCrop((64, 32), (32, 16), num_parts=1, colours=0.2, hidden=1.0),
    ],
    ids=["randaugment", "crops", "hidden"],
)
def test_draws_of_torchvision_belong_to_the_key(transform):
    def told(key):
        found = transform(picture(), random.Random(key))
        return torch.cat([part.flatten() for part in (found.values() if isinstance(found, dict) else [found])])

    torch.manual_seed(5)
    first = told("1/2/3")
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(6)
    assert torch.equal(told("1/2/3"), first)
    assert len({told(f"1/2/{key}").sum().item() for key in range(8)}) == 8


def test_randaugment_is_off_without_operations():
    usual = TrainTransform((64, 32), padding=2, erasing=0.5)
    plain = RandAugmentTransform((64, 32), num_ops=0, padding=2, erasing=0.5)
    strong = RandAugmentTransform((64, 32), num_ops=2, padding=2, erasing=0.5)
    same = [
        torch.equal(plain(picture(), random.Random(key)), usual(picture(), random.Random(key))) for key in range(5)
    ]
    assert all(same)
    assert not torch.equal(strong(picture(), random.Random(0)), usual(picture(), random.Random(0)))


def test_crops_of_an_image():
    crops = MultiCrop((64, 32), (32, 16), num_parts=3)(picture(), random.Random(0))
    assert {name: tuple(crop.shape) for name, crop in crops.items()} == {
        "whole": (2, 3, 64, 32),
        "parts": (3, 3, 32, 16),
    }
    assert not torch.equal(crops["whole"][0], crops["whole"][1])
    assert all(crop.min() >= -1 and crop.max() <= 1 and crop.std() > 0.05 for crop in crops.values())


def test_noise_hides_what_is_beside_a_person():
    """Left and right by 10 to 35 % of the width, anew each time; the middle stays as it is."""
    before = torch.from_numpy(np.array(picture()))
    widths = set()
    for key in range(40):
        crops = MultiCrop((64, 32), (32, 16), hidden=0.5)
        image = crops.with_hidden_sides(picture(), random.Random(key))
        changed = (torch.from_numpy(np.array(image)) != before).any(dim=(0, 2))
        assert not changed[12:20].any()
        left, right = changed[:16].sum().item(), changed[16:].sum().item()
        assert torch.equal(changed, torch.cat([torch.arange(16) < left, torch.arange(16) >= 16 - right]))
        assert (left, right) == (0, 0) or (3 <= left <= 11 and 3 <= right <= 11)
        widths.add((left, right))
    assert (0, 0) in widths and len(widths) > 10


def test_fewer_colours_change_less():
    """The hue of a red picture, over many crops; brightness changes as before."""
    red = Image.new("RGB", (32, 64), (200, 40, 40))

    def spread(colours):
        crops = MultiCrop((64, 32), (32, 16), num_parts=1, colours=colours)
        seen = torch.stack([crops(red, random.Random(key))["whole"][1].mean(dim=(1, 2)) for key in range(25)])
        return (seen[:, 1] - seen[:, 2]).std(), seen.mean(dim=1).std()

    (hue, _), (less, light) = spread(1.0), spread(0.0)
    assert less < 0.02 < hue and light > 0.05


def test_a_tensor_is_the_picture_again():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert to_picture(to_tensor(picture(), mean, std), mean, std).tobytes() == picture().tobytes()


# BatchNorm of all processes


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "kind, size, affine",
    [(nn.BatchNorm2d, (4, 3), True), (nn.BatchNorm1d, (), True), (nn.BatchNorm1d, (), False)],
    ids=["2d", "1d", "plain"],
)
def test_shared_batch_norm_is_torchs(one_process, kind, size, affine):
    torch.manual_seed(0)
    plain, shared = kind(5, affine=affine), kind(5, affine=affine)
    for norm in (plain, shared) if affine else ():
        nn.init.normal_(norm.weight, 1.0, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    shared.__class__ = GlobalBatchNorm
    for _ in range(3):
        images = torch.randn(6, 5, *size) * 3 + 7
        seen = [images.clone().requires_grad_(), images.clone().requires_grad_()]
        outputs = [norm(one) for norm, one in zip((plain, shared), seen, strict=True)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(outputs[0])
        for output in outputs:
            (output * weight).sum().backward()
        torch.testing.assert_close(seen[0].grad, seen[1].grad, rtol=1e-4, atol=1e-5)
    if affine:
        torch.testing.assert_close(plain.weight.grad, shared.weight.grad, rtol=1e-4, atol=1e-4)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[key], value, rtol=1e-5, atol=1e-5)
    images = torch.randn(2, 5, *size)
    torch.testing.assert_close(plain.eval()(images), shared.eval()(images))


# Backbones by name


@pytest.mark.parametrize("name, other", [("resnet50", "resnet50"), *((f"swin-{s}", f"swin_{s}") for s in "tsb")])
def test_short_names_mean_the_published_architectures(name, other):
    with torch.device("meta"):
        ours = backbone_from_config(named_config(name), (256, 128))
        theirs = getattr(torchvision.models, other)(weights=None)
        theirs = nn.ModuleList(part for key, part in theirs.named_children() if key not in ("fc", "head"))
        assert sum(parameter.numel() for parameter in ours.parameters()) == sum(
            parameter.numel() for parameter in theirs.parameters()
        )
        shapes = [sorted(tuple(p.shape) for p in model.parameters() if p.ndim == 4) for model in (ours, theirs)]
        assert shapes[0] == shapes[1]


def test_from_scratch_draws_from_the_seed_and_keeps_the_shape(tmp_path):
    def weights(seed, **options):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in open_backbone(**options, image_size=(64, 32)).parameters()])

    options = {"name": "resnet-small", "from_scratch": True}
    assert torch.equal(weights(0, **options), weights(0, **options))
    assert not torch.equal(weights(0, **options), weights(1, **options))
    open_backbone("resnet-small", (64, 32), from_scratch=True).save_pretrained(tmp_path)
    kept = weights(0, name=str(tmp_path), from_scratch=False)
    assert torch.equal(kept, weights(5, name=str(tmp_path), from_scratch=False))
    fresh = weights(0, name=str(tmp_path), from_scratch=True)
    assert fresh.shape == kept.shape and not torch.equal(fresh, kept)


def test_patches_of_clip_are_learned_where_nobody_has():
    with torch.device("meta"):
        scratch = open_backbone("clip-b16", (256, 128), from_scratch=True)
    assert scratch.tower.embeddings.patch_embedding.weight.requires_grad


def test_backbones_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="resnet-small has no published weights; add --from_scratch"):
        check_backbone("resnet-small", False)
    with pytest.raises(ValueError, match="resnet51.*the short names are resnet-small, swin-mini, resnet50, swin-t"):
        check_backbone("resnet51", True)
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="--backbone .*weights.pth.* cannot be opened.*damaged"):
        check_backbone(str(tmp_path / "weights.pth"), False)
    assert set(NAMED) == {"resnet-small", "swin-mini", "resnet50", "swin-t", "swin-s", "swin-b", "clip-b16"}


@pytest.mark.parametrize(
    "method, words",
    [
        ("agw", "non-local blocks of agw"),
        ("sbs", "of sbs"),
        ("mgn", "stride of mgn's"),
        ("norms", "mixtures of batch"),
    ],
)
def test_a_changed_resnet_is_no_plain_start(tmp_path, method, words):
    """What comes out of a pre-training must open in plain transformers."""
    backbone = open_backbone("resnet-small", (96, 64), from_scratch=True)
    if method == "norms":
        add_batch_instance_norms(backbone)
    ReIDModel(backbone, 3, method="bot" if method == "norms" else method).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        check_backbone(str(tmp_path), False)
    # Of its configuration alone a plain one is made.
    check_backbone(str(tmp_path), True)


def test_a_model_of_bdb_has_a_plain_backbone(tmp_path):
    backbone = open_backbone("resnet-small", (96, 64), from_scratch=True)
    ReIDModel(backbone, 3, method="bdb").save_pretrained(tmp_path / "model")
    open_backbone(str(tmp_path / "model"), (96, 64)).save_pretrained(tmp_path / "backbone")
    again = open_backbone(str(tmp_path / "backbone"), (96, 64)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in backbone.state_dict().items())


def test_depths_of_a_small_backbone():
    found, last = depths(backbone_from_config(named_config("resnet-small"), (64, 32)))
    assert last == 5 and sorted(set(found.values())) == [0, 1, 2, 3, 4]
