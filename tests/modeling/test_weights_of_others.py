"""Weights of other projects: features equal to those of the original networks, and files that are refused."""

import argparse
import os
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from tests.modeling import references
from tests.runs import ROOT
from utils.modeling import convert
from utils.modeling.backbones import load_backbone
from utils.modeling.importers.layouts import LAYOUTS, table
from utils.modeling.reid_model import ReIDModel

PEERS = os.environ.get("DIFFREID_PEERS_PYTHON")
HOW = (
    "python -m venv peers && peers/bin/pip install torch torchvision timm open_clip_torch torchreid gdown tensorboard "
    "scipy opencv-python-headless && peers/bin/pip install --no-deps fastreid yacs termcolor tabulate && "
    "DIFFREID_PEERS_PYTHON=$PWD/peers/bin/python pytest -m slow tests/modeling/test_weights_of_others.py"
)
PEER_MODELS = (
    "torchreid:resnet50", "torchreid:resnet50_fc512", "torchreid:osnet_x1_0", "torchreid:osnet_x0_25",
    "torchreid:osnet_ibn_x1_0", "torchreid:osnet_ain_x1_0", "fastreid:bot", "fastreid:agw", "fastreid:agw_ibn",
    "fastreid:sbs", "fastreid:sbs_ibn", "fastreid:mgn", "fastreid:mgn_ibn", "timm:resnet50",
    "timm:swin_tiny_patch4_window7_224", "timm:vit_small_patch16_224", "timm:vit_small_patch14_dinov2",
    "open_clip:ViT-B-32", "open_clip:ViT-B-32-quickgelu",
)  # fmt: skip


def saved(state, path):
    torch.save(state, path)
    return path


def assert_same_features(model, images, want):
    """Unit features equal within 1e-5, and far closer than the features of two images are."""
    with torch.no_grad():
        features = model(images)
    want = F.normalize(want.detach().float(), dim=1)
    difference, apart = float((features - want).abs().max()), float((want[0] - want[1]).abs().max())
    assert features.shape == want.shape
    assert difference < min(1e-5, 0.01 * apart), (difference, apart)
    return difference


def assert_same_after_saving(model, images, folder):
    """A folder of ours gives the same features."""
    model.save_pretrained(folder / "model")
    again = ReIDModel.from_pretrained(folder / "model")
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=1e-6)


def assert_cameras_are_seen(model, images, net, table):
    """Three cameras, given and not known; `table` is the network's parameter of them."""
    seen = torch.tensor([2, 0])
    with model.backbone.seen_by(seen):
        assert_same_features(model, images, net(images, seen))
    with torch.no_grad():
        table.copy_(table.mean(0, keepdim=True).expand_as(table))
    # Unknown cameras: the mean of all.
    assert_same_features(model, images, net(images, seen))
    with pytest.raises(ValueError, match="knows 0 to 2"), model.backbone.seen_by(torch.tensor([3])):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not PEERS, reason=f"needs the original libraries in an environment of their own: {HOW}")
@pytest.mark.parametrize("name", PEER_MODELS)
def test_features_of_the_original_library(tmp_path, name):
    """Each layout as its library builds and saves it, at full size."""
    script = ROOT / "tests" / "modeling" / "peers.py"
    subprocess.run([PEERS, str(script), name, str(tmp_path)], cwd=tmp_path, check=True, capture_output=True, text=True)
    want = torch.load(tmp_path / "want.pth", weights_only=True)
    images = want["images"]
    options = {"activation": "quick_gelu"} if "quickgelu" in name else {}
    size = None if name.startswith("fastreid") else tuple(images.shape[2:])
    model = ReIDModel.from_weights(tmp_path / "weights.pth", size, **options)
    if name.startswith("fastreid"):
        # These images are RGB in 0..255; the preprocessing of the model must be the library's own.
        assert model.image_size == tuple(images.shape[2:]) and model.resample == "bicubic"
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image_mean, model.image_std))
        images = (images / 255 - mean) / std
    difference = assert_same_features(model, images, want["features"].flatten(1))
    print(f"{name}: {difference:.1e}")
    # The same after a folder of ours.
    assert_same_after_saving(model, images, tmp_path)


def test_torchvision_resnet(tmp_path):
    torch.manual_seed(0)
    theirs = references.shaken(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], 7))
    path = saved(theirs.state_dict(), tmp_path / "resnet.pth")
    for convolution in (theirs.layer4[0].conv2, theirs.layer4[0].downsample[0]):
        convolution.stride = (1, 1)
    theirs.fc = torch.nn.Identity()
    images = references.images_of(64, 32)
    model = ReIDModel.from_weights(path, (64, 32))
    assert_same_features(model, images, theirs(images))
    assert any("classifier of 7" in note for note in model.notes)
    assert (model.image_mean, model.resample) == ((0.485, 0.456, 0.406), "bilinear")
    # MoCo keeps the same network under other names, beside its key encoder and its queue.
    state = {f"module.encoder_q.{name}": value for name, value in theirs.state_dict().items()}
    state |= {f"module.encoder_q.fc.{n}.{kind}": torch.zeros(8, 8) for n in (0, 2) for kind in ("weight", "bias")}
    state |= {"module.encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7), "module.queue": torch.zeros(8, 9)}
    path = saved({"epoch": 3, "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "lup_moco.pth")
    moco = ReIDModel.from_weights(path, (64, 32))
    assert_same_features(moco, images, theirs(images))
    assert "4 tensors of its projection are left out" in moco.notes[1]


@pytest.mark.parametrize("relu", [None, True])
def test_reid_strong_baseline(tmp_path, relu):
    """Its ResNet has torchvision's names; there is no ReLU after the first norm, unless a project put it back."""
    torch.manual_seed(0)
    base = references.shaken(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], 7))
    neck = references.shaken(torch.nn.BatchNorm1d(2048), seed=1)
    state = {f"base.{name}": value for name, value in base.state_dict().items() if not name.startswith("fc.")}
    state |= {f"bottleneck.{name}": value for name, value in neck.state_dict().items()}
    path = saved(state | {"classifier.weight": torch.zeros(751, 2048)}, tmp_path / "resnet50_model_120.pth")
    for convolution in (base.layer4[0].conv2, base.layer4[0].downsample[0]):
        convolution.stride = (1, 1)
    base.fc = torch.nn.Identity()
    if not relu:
        base.relu = torch.nn.Identity()
    images = references.images_of(64, 32)
    model = ReIDModel.from_weights(path, (64, 32), **({} if relu is None else {"stem_relu": relu}))
    assert_same_features(model, images, neck(base(images)))
    assert any("no ReLU after the first norm" in note for note in model.notes) == (relu is None)
    assert_same_after_saving(model, images, tmp_path)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("stride", [None, 1])
def test_person_reid_baseline_pytorch(tmp_path, linear, stride):
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], 7)
    net.classifier = torch.nn.Module()
    layers = [torch.nn.Linear(2048, 32)] if linear else []
    layers += [torch.nn.BatchNorm1d(32 if linear else 2048), torch.nn.Dropout()]
    net.classifier.add_block = torch.nn.Sequential(*layers)
    net.classifier.classifier = torch.nn.Sequential(torch.nn.Linear(layers[-2].num_features, 751))
    references.shaken(net)
    path = saved({f"_orig_mod.{name}": value for name, value in net.state_dict().items()}, tmp_path / "net_last.pth")
    if stride == 1:
        for convolution in (net.model.layer4[0].conv2, net.model.layer4[0].downsample[0]):
            convolution.stride = (1, 1)
    net.model.fc = torch.nn.Identity()
    images = references.images_of(128, 64)
    model = ReIDModel.from_weights(path, (128, 64), **({} if stride is None else {"last_stride": stride}))
    assert_same_features(model, images, net.classifier.add_block(net.model(images)))
    assert any("--last_stride 1" in note for note in model.notes) == (stride is None)
    assert model.num_features == (32 if linear else 2048) and model.resample == "bicubic"
    assert_same_after_saving(model, images, tmp_path)


@pytest.mark.parametrize("jigsaw", [False, True])
@pytest.mark.parametrize("cameras", [0, 3])
def test_transreid_against_a_reference(tmp_path, jigsaw, cameras):
    net = references.shaken(references.TransReID(cameras=cameras, jigsaw=jigsaw))
    path = saved(net.state_dict(), tmp_path / "transreid.pth")
    images = references.images_of(256, 128)
    model = ReIDModel.from_weights(path)
    assert model.image_size == (256, 128) and model.image_mean == (0.5, 0.5, 0.5)
    if not cameras:
        assert_same_features(model, images, net(images))
        with pytest.raises(ValueError, match="no camera embedding"), model.backbone.seen_by(torch.tensor([0, 1])):
            pass
    else:
        assert_cameras_are_seen(model, images, net, net.base.sie_embed)
    assert "BNNeck" in model.notes[1]
    assert_same_after_saving(model, images, tmp_path)


@pytest.mark.parametrize("layout", ["fine-tuned", "pre-trained", "pre-training"])
def test_transreid_ssl_against_a_reference(tmp_path, layout):
    """The stem of convolutions and an upright table of positions: fine-tuned, converted, and as DINO saves it."""
    torch.manual_seed(0)
    net = references.shaken(references.TransReID(stem=True))
    state = net.state_dict()
    if layout != "fine-tuned":
        state = {name.removeprefix("base."): value for name, value in state.items() if name.startswith("base.")}
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if layout == "pre-training":
        teacher = {f"module.backbone.{name}": value for name, value in state.items()}
        teacher["module.head.mlp.0.weight"] = torch.zeros(8, 8)
        state = {"student": {"module.backbone.cls_token": torch.zeros(3)}, "teacher": teacher, "epoch": 99}
    path = saved(state, tmp_path / "vit_small_ics_cfs_lup.pth")
    images = references.images_of(256, 128)
    model = ReIDModel.from_weights(path, (256, 128))
    assert_same_features(model, images, net(images))
    assert model.image_mean == (0.5, 0.5, 0.5)
    assert_same_after_saving(model, images, tmp_path)
    if layout != "fine-tuned":
        # Its positions are resized to images of another shape.
        assert ReIDModel.from_weights(path, (384, 128))(images.repeat(1, 1, 2, 1)[:, :, :384]).shape == (2, 128)


@pytest.mark.parametrize("stride", [16, 12])
@pytest.mark.parametrize("cameras", [0, 3])
def test_clip_reid_against_a_reference(tmp_path, stride, cameras):
    torch.manual_seed(0)
    net = references.shaken(references.ClipReID(cameras=cameras, stride=stride, prompts=stride == 16))
    path = saved(net.state_dict(), tmp_path / "ViT-B-16_60.pth")
    images = references.images_of(256, 128)
    model = ReIDModel.from_weights(path)
    assert model.image_size == (256, 128) and model.num_features == 128 + 48
    assert (model.image_mean, model.resample) == ((0.5, 0.5, 0.5), "bilinear")
    left_out = "3 tensors of the text encoder and the prompts are left out"
    assert any(left_out in note for note in model.notes) == (stride == 16)
    if not cameras:
        assert_same_features(model, images, net(images))
        with pytest.raises(ValueError, match="no camera embedding"), model.backbone.seen_by(torch.tensor([0, 1])):
            pass
    else:
        assert_cameras_are_seen(model, images, net, net.cv_embed)
    assert_same_after_saving(model, images, tmp_path)
    # A plain backbone, as training leaves one, keeps stride, cameras and positions.
    model.backbone.save_pretrained(tmp_path / "backbone")
    backbone = load_backbone(tmp_path / "backbone", (256, 128)).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), model.backbone(images), rtol=0, atol=1e-5)
        # At another size its positions are resized.
        assert load_backbone(tmp_path / "backbone", (128, 64)).eval()(images[..., :128, :64]).shape == (2, 176)


@pytest.mark.parametrize(
    "prefix, semantic, reduced", [("base.", True, False), ("", True, False), ("base.", False, True)]
)
def test_solider_against_a_reference(tmp_path, prefix, semantic, reduced):
    net = references.shaken(references.Solider(semantic=semantic, reduced=reduced))
    state = {f"{prefix}{name}": value for name, value in net.state_dict().items() if not name.startswith("fcneck")}
    if prefix:
        state |= {f"bottleneck.{name}": torch.ones(64) for name in ("weight", "bias", "running_mean", "running_var")}
        state["classifier.weight"] = torch.zeros(9, 64)
        state |= {name: value for name, value in net.state_dict().items() if name.startswith("fcneck")}
    path = saved({"teacher": state} if not prefix else state, tmp_path / "solider.pth")
    # The last map is smaller than a window and is shifted nevertheless.
    images = references.images_of(128, 64)
    model = ReIDModel.from_weights(path, (128, 64))
    assert_same_features(model, images, net(images, 0.2))
    if semantic:
        assert_same_features(ReIDModel.from_weights(path, (128, 64), semantic_weight=0.9), images, net(images, 0.9))
        with pytest.raises(ValueError, match="within 0 and 1"):
            ReIDModel.from_weights(path, semantic_weight=2.0)
    assert_same_after_saving(model, images, tmp_path)


@pytest.mark.parametrize("kind", ["plain", "ibn", "ain"])
@pytest.mark.parametrize("embedding", [0, 24])
def test_osnet_against_a_reference(tmp_path, kind, embedding):
    torch.manual_seed(0)
    net = references.shaken(references.OSNet(kind, embedding))
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    images = references.images_of(64, 32)
    model = ReIDModel.from_weights(saved({"state_dict": state, "epoch": 3}, tmp_path / "osnet.pth.tar"), (64, 32))
    assert_same_features(model, images, net(images))
    assert (model.image_mean, model.resample) == ((0.485, 0.456, 0.406), "bilinear")
    assert any("classifier of 9" in note for note in model.notes)
    assert_same_after_saving(model, images, tmp_path)


@pytest.mark.parametrize("kind", ["bot", "agw", "sbs", "mgn"])
def test_fast_reid_against_a_reference(tmp_path, kind):
    ibn = kind in ("agw", "mgn")
    net = references.shaken(references.FastReid(kind, ibn=ibn))
    state = net.state_dict()
    if kind == "bot":
        state |= {"pixel_mean": torch.full((1, 3, 1, 1), 100.0), "pixel_std": torch.full((1, 3, 1, 1), 50.0)}
    path = saved({"model": state, "iteration": 7}, tmp_path / "market.pth")
    size = (96, 32) if kind == "mgn" else (64, 32)
    images = references.images_of(*size)
    model = ReIDModel.from_weights(path, size)
    assert_same_features(model, images, net(images))
    assert kind.upper() in model.notes[1].upper() and ("IBN-a" in model.notes[1]) == ibn
    mean = (100 / 255,) * 3 if kind == "bot" else (0.485, 0.456, 0.406)
    assert model.image_mean == pytest.approx(mean) and model.resample == "bicubic"
    assert ReIDModel.from_weights(path).image_size == ((384, 128) if kind in ("sbs", "mgn") else (256, 128))
    assert_same_after_saving(model, images, tmp_path)
    # Training starts from the backbone with a head of ours; BoT's BNNeck stays.
    training = ReIDModel.for_training(str(path), num_ids=4, image_size=size, method="bot").train()
    assert training(images).logits.shape == (2, 4)
    assert torch.equal(training.bnneck.weight, net.heads.bottleneck[0].weight) if kind == "bot" else training.notes
    if kind == "agw":
        started = ReIDModel.for_training(str(tmp_path / "model"), num_ids=4, image_size=size, method="agw")
        assert sum(name.endswith("theta.weight") for name in started.state_dict()) == 2


# Files that are refused


def resnet_state():
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 7).state_dict()


def spoilt(how):
    state = resnet_state()
    if how == "missing":
        del state["layer2.0.bn2.running_mean"]
    elif how == "missing block":
        state = {name: value for name, value in state.items() if not name.startswith("layer3.")}
    elif how == "wide":
        state["layer1.0.conv2.weight"] = torch.zeros(128, 128, 3, 3)
    elif how == "wrong shape":
        state["layer1.0.bn2.weight"] = torch.zeros(5)
    elif how == "more":
        state["extra.weight"] = torch.zeros(3)
    elif how == "se":
        state["layer1.0.se.fc.0.weight"] = torch.zeros(3)
    elif how == "unknown":
        state = {"trunk.0.w": torch.zeros(2), "trunk.0.b": torch.zeros(2)}
    elif how == "empty":
        state = {}
    elif how == "strong baseline":
        state = {f"base.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    elif how == "old fast-reid":
        state = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}
        state["heads.bnneck.weight"] = torch.zeros(3)
    elif how == "osnet":
        state = references.OSNet("ain").state_dict()
        del state["conv3.1.IN.bias"]
    elif how == "no qkv bias":
        state = references.TransReID().state_dict()
        state = {name: value for name, value in state.items() if "qkv.bias" not in name}
    elif how == "odd width":
        state = references.TransReID(width=96).state_dict()
    elif how == "odd grid":
        state = references.TransReID().state_dict()
        state["base.pos_embed"] = torch.zeros(1, 24, 128)
    elif how == "clip-reid resnet":
        state = {f"image_encoder.{name}": value for name, value in state.items()}
    elif how == "clip-reid odd grid":
        state = references.ClipReID().state_dict()
        state["image_encoder.positional_embedding"] = torch.zeros(24, 128)
    elif how == "clip resnet":
        state = {
            "visual.layer1.0.conv1.weight": torch.zeros(3),
            "visual.attnpool.positional_embedding": torch.zeros(2),
        }
    return state


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "torchvision.*layer2.0.bn2.running_mean is missing"),
        ("missing block", "stages have the blocks.*some are missing"),
        ("wide", "wide ResNet"),
        ("wrong shape", r"do not fit together.*\(5,\), expected \(64,\)"),
        ("more", "1 tensors are not part of one, such as extra.weight"),
        ("se", "squeeze-and-excitation"),
        ("unknown", "not known: its first names are trunk.0.w, trunk.0.b. Known are DCAC.*SOLIDER.*OSNet.*timm"),
        ("empty", "no tensors"),
        ("strong baseline", "reid-strong-baseline.*bottleneck.weight is missing"),
        ("old fast-reid", "fast-reid before 1.0"),
        ("osnet", "OSNet-AIN, but conv3.1.IN.bias is missing"),
        ("no qkv bias", "no qkv.bias"),
        ("odd width", "width 96 is not a multiple of 64"),
        ("odd grid", "23 positions do not fit"),
        ("clip-reid resnet", "CLIP-ReID with CLIP's ResNet"),
        ("clip-reid odd grid", "CLIP-ReID, but its 23 positions do not fit"),
        ("clip resnet", "CLIP's ResNet"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_whole_or_not_known_is_refused(tmp_path, how, message):
    path = saved(spoilt(how), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as error:
        ReIDModel.from_weights(path)
    assert "weights.pth" in str(error.value)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_files_that_are_no_plain_tensors(tmp_path):
    path, owned = tmp_path / "weights.pth", tmp_path / "owned"
    torch.save(resnet_state() | {"rank1": Harm(owned)}, path)
    with pytest.raises(ValueError, match="never unpickled; save its state dict alone"):
        ReIDModel.from_weights(path)
    assert not owned.exists()
    torch.save(resnet_state(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        ReIDModel.from_weights(path)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(ValueError, match="TorchScript archive.*(?s:.)*torch.jit.load"):
        ReIDModel.from_weights(path)
    whole = tmp_path / "weights.safetensors"
    save_file(resnet_state(), whole)
    assert ReIDModel.from_weights(whole, (32, 32)).num_features == 2048
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="no whole safetensors"):
        ReIDModel.from_weights(whole)


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"state_dict": state, "rank1": np.float32(0.9), "optimizer": {"lr": np.float64(0.1)}},
        lambda state: {"teacher": state, "args": argparse.Namespace(arch="resnet50", out_dim=3)},
        lambda state: {"model": {"state_dict": state}, "epoch": 3},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        lambda state: {f"net.module.{name}": value for name, value in state.items()},
        lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in state.items()},
    ],
    ids=["torchreid", "dino", "nested", "lightning", "prefixes", "average"],
)
def test_files_as_trainings_write_them(tmp_path, content):
    state = resnet_state()
    model = ReIDModel.from_weights(saved(content(state), tmp_path / "weights.pth"), (32, 32))
    assert torch.equal(
        model.backbone.state_dict()["model.embedder.embedder.convolution.weight"], state["conv1.weight"]
    )


def test_a_resnet_of_timm_that_blurs_is_refused(tmp_path):
    save_file(resnet_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnetaa50"}')
    with pytest.raises(ValueError, match="is resnetaa50, a ResNet that blurs|is resnetaa50: a ResNet that blurs"):
        ReIDModel.open(str(tmp_path), (64, 32))


@pytest.mark.parametrize(
    "width, heads", [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)], ids=["B", "L", "H", "g", "bigG"]
)
def test_heads_of_open_clip(tmp_path, width, heads):
    """They are in no file: 64 wide up to ViT-L, wider in ViT-H, g and bigG. One block of each, small otherwise."""
    block = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    block |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    block |= {"mlp.c_fc.weight": (8, width), "mlp.c_fc.bias": (8,), "mlp.c_proj.weight": (width, 8)}
    block |= {"mlp.c_proj.bias": (width,)} | {f"ln_{n}.{kind}": (width,) for n in "12" for kind in ("weight", "bias")}
    shapes = {f"visual.transformer.resblocks.0.{name}": shape for name, shape in block.items()}
    shapes |= {f"visual.ln_{place}.{kind}": (width,) for place in ("pre", "post") for kind in ("weight", "bias")}
    shapes |= {"visual.conv1.weight": (width, 3, 14, 14), "visual.class_embedding": (width,)}
    shapes |= {"visual.positional_embedding": (1 + 16, width), "visual.proj": (width, 8)}
    path = saved({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "open_clip.pt")
    assert ReIDModel.from_weights(path, (56, 28)).backbone.model.config.num_attention_heads == heads


def test_a_folder_of_timm_says_how_images_are_prepared(tmp_path):
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(resnet_state(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        '{"architecture": "resnet50", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], '
        '"interpolation": "bicubic"}}'
    )
    model = ReIDModel.open(str(folder), (64, 32))
    assert (model.image_mean, model.image_std, model.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")


def test_convert_writes_a_folder(tmp_path, capsys):
    path = saved(resnet_state(), tmp_path / "resnet.pth")
    convert.main(convert.parse_args([str(path), str(tmp_path / "model"), "--resolution", "64", "32"]))
    assert "classifier of 7" in capsys.readouterr().out
    images = references.images_of(64, 32)
    with torch.no_grad():
        got = ReIDModel.from_pretrained(tmp_path / "model")(images)
        assert torch.equal(got, ReIDModel.from_weights(path, (64, 32))(images))
    with pytest.raises(ValueError, match="takes no activation"):
        convert.main(convert.parse_args([str(path), str(tmp_path / "model"), "--activation", "gelu"]))
    with pytest.raises(SystemExit):
        convert.parse_args([str(path), str(tmp_path)])
    # A folder of transformers is not ours to replace.
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(SystemExit):
        convert.parse_args([str(path), str(tmp_path / "theirs")])
    assert convert.parse_args([str(path), str(tmp_path / "model")]).folder == str(tmp_path / "model")


def test_the_readme_lists_what_loads():
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len({layout.title for layout in LAYOUTS}) == len(table().splitlines()) - 2
