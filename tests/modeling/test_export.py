"""ONNX: every architecture and head in onnxruntime, at any batch size; the exporter's refusals in words."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

from tests.modeling.test_heads import TINY
from utils.modeling import export, networks
from utils.modeling.backbones import backbone_from_config, load_backbone
from utils.modeling.folder import training_card
from utils.modeling.heads import METHODS
from utils.modeling.names import check_start, open_backbone
from utils.modeling.reid_model import ReIDModel
from utils.training.parameter_groups import depths
from utils.training.teacher import teacher_of

SIZE = (64, 32)
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
VIT = LAYERS | {"intermediate_size": 48, "image_size": 32}
WITHOUT_MLP = LAYERS | {"image_size": 32}


def ours(kind, **sizes):
    return lambda: networks.classes(kind)[0](**sizes)


# {model type: configuration}
FAMILIES = {
    "clip_vision_model": lambda: copy.deepcopy(TINY["clip"]),
    "resnet": lambda: copy.deepcopy(TINY["resnet"]),
    "swin": lambda: copy.deepcopy(TINY["swin"]),
    "resnet_variant": ours("resnet_variant", embedding_size=8, hidden_sizes=[16, 24, 32], depths=[1, 2, 2]),
    "osnet": ours("osnet"),
    "solider_swin": ours(
        "solider_swin", image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4
    ),
    # TransReID's, with overlapping patches and cameras.
    "plain_vit": ours("plain_vit", **VIT | {"image_size": list(SIZE), "stride": 6, "num_cameras": 3}),
    # CLIP-ReID's, likewise.
    "clip_reid": ours("clip_reid", **VIT, projection_dim=20, grid=[10, 5], stride=6, num_cameras=3),
    # MUVA's, which predicts its masks.
    "part_token_clip": ours("part_token_clip", **VIT, projection_dim=20, grid=[8, 4]),
    "vit": lambda: transformers.ViTConfig(**VIT),
    "dinov2": lambda: transformers.Dinov2Config(**WITHOUT_MLP),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(**WITHOUT_MLP, num_register_tokens=3),
    "dinov3_vit": lambda: transformers.DINOv3ViTConfig(**VIT, num_register_tokens=2),
    "siglip_vision_model": lambda: transformers.SiglipVisionConfig(**VIT),
}
# TransReID-SSL's, with convolutions before the patches.
STEM = {"plain_vit with a stem": ours("plain_vit", **VIT | {"image_size": list(SIZE), "stride": 8, "stem": True})}
HEADS = [(family, method) for method in METHODS[1:] for family in ("resnet", "swin", "clip_vision_model")]
HEADS += [("resnet", "embedding"), ("resnet", "granular"), ("plain_vit", "jigsaw"), ("resnet", "meta")]
HEADS += [(family, "bot") for family in STEM]


def model_of(family, method="bot"):
    torch.manual_seed(0)
    options = {"domains": [2, 2], "gate": "learned"} if method == "meta" else {}
    backbone = backbone_from_config((FAMILIES | STEM)[family](), SIZE)
    return ReIDModel(backbone, num_ids=4, method=method, head_options=options).eval()


def test_a_backbone_of_ours_keeps_how_images_are_prepared(tmp_path):
    """Also CLIP's, whose own folders do not count; and the backbone of a whole model has that of the model."""
    for family in ("clip_vision_model", "resnet"):
        backbone = model_of(family).backbone
        values = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6), "resample": "bicubic"}
        model = ReIDModel(backbone, **values)
        folder = tmp_path / family
        export.write_backbone_folder(backbone, folder, model.preprocessing(), "")
        assert load_backbone(folder, SIZE).preprocessing == values
        (folder / "preprocessor_config.json").write_text(json.dumps(model.preprocessing()))
        assert load_backbone(folder, SIZE).preprocessing is None
        model.save_pretrained(tmp_path / f"{family}-model")
        assert open_backbone(str(tmp_path / f"{family}-model"), SIZE).preprocessing == values


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip_vision_model"])
def test_a_teacher_has_buffers_alone(family):
    model, images = model_of(family), torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(teacher_of(model)(images), model(images))


def test_part_tokens_start_no_method_that_parts_the_map(tmp_path):
    model_of("part_token_clip").save_pretrained(tmp_path / "model")
    for method in ("mgn", "bdb"):
        with pytest.raises(ValueError, match="has part tokens"):
            check_start(str(tmp_path / "model"), method)
    assert check_start(str(tmp_path / "model"), "bot") == "part_token_clip"


@pytest.mark.parametrize("family, part", [("siglip_vision_model", ".head."), ("osnet", ".last.")])
def test_layers_after_all_blocks_have_the_whole_rate(family, part):
    found, last = depths(model_of(family).backbone)
    after = {name: depth for name, depth in found.items() if part in f".{name}"}
    assert after and {*after.values()} == {last}


def test_targets_of_one_name_stay_apart_on_a_card(tmp_path):
    numbers = {"mAP": 0.5, "rank1": 0.6}
    for place in ("site1/test", "site2/test"):
        (tmp_path / place).mkdir(parents=True)
    metrics = {f"{tmp_path}/site{number}/test": numbers for number in (1, 2)} | {"market1501": numbers}
    card = training_card("t", "x", "train.py", {}, metrics=metrics, details={})
    assert "test (1)" in card and "test (2)" in card and "market1501 (" not in card


def test_every_architecture_is_tried():
    assert FAMILIES.keys() == {"clip_vision_model", "resnet", "swin", *networks.KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("family, method", [*((family, "bot") for family in FAMILIES), *HEADS])
def test_onnxruntime_gives_the_same_features(tmp_path, family, method):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    model = model_of(family, method)
    if family == "resnet":
        # A folder may hold half of the digits.
        model = model.to(torch.bfloat16)
        export.export_onnx(model, tmp_path / "half.onnx")
        assert next(model.parameters()).dtype == torch.bfloat16
        model = model.float()
    export.export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        images = torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4)


def test_a_file_for_one_size_of_batches_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    model = model_of("clip_vision_model")
    plain = type(model.backbone).forward

    def fixed(backbone, images):
        features = plain(backbone, images)
        # For the exporter `len` of a tensor is a plain number.
        return features.expand(len(features), -1)

    monkeypatch.setattr(type(model.backbone), "forward", fixed)
    with pytest.raises(ValueError, match="torch's exporter fixed the batch at 3 images; nothing was written"):
        export.export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir()) and model.backbone.config._attn_implementation != "eager"
