"""ViT, DINOv2, DINOv3 and SigLIP of transformers as backbones: features of the original model, folders, training."""

import json

import pytest
import torch
import transformers

from tests.modeling.references import images_of, shaken
from utils.modeling import networks
from utils.modeling.attention import attention_maps
from utils.modeling.backbones import load_backbone
from utils.modeling.folder import model_kind
from utils.modeling.names import open_backbone
from utils.modeling.reid_model import ReIDModel

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SIZES | {"image_size": 32, "patch_size": 8}
WITHOUT_MLP = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**WITHOUT_MLP)),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**WITHOUT_MLP, num_register_tokens=3)
    ),
    "dinov3_vit": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=2)),
    "siglip_vision_model": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config=transformers.SiglipVisionConfig(**SMALL).to_dict(),
            text_config=transformers.SiglipTextConfig(**SIZES, vocab_size=50).to_dict(),
        )
    ),
}


def want_of(kind, model, images):
    with torch.no_grad():
        if kind == "siglip":
            model = model.vision_model
        if kind.startswith("siglip"):
            return model(pixel_values=images, interpolate_pos_encoding=True).pooler_output
        if kind == "vit":
            return model.vit(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return model(images).last_hidden_state[:, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_features_equal_transformers(tmp_path, kind):
    theirs = shaken(MODELS[kind]())
    theirs.save_pretrained(tmp_path / "theirs")
    images = images_of(48, 24)
    ours = ReIDModel.from_backbone(tmp_path / "theirs", image_size=(48, 24), num_ids=4)
    with torch.no_grad():
        torch.testing.assert_close(ours.backbone(images), want_of(kind, theirs, images), rtol=0, atol=1e-5)
        feature_map = ours.backbone.feature_map(images)
    assert feature_map.shape == (2, 64, 6, 3)
    # The same through our own folder and through a plain one.
    ours.save_pretrained(tmp_path / "reid")
    again = ReIDModel.from_pretrained(tmp_path / "reid")
    ours.backbone.save_pretrained(tmp_path / "plain")
    plain = load_backbone(tmp_path / "plain", (48, 24))
    with torch.no_grad():
        assert torch.equal(again(images), ours(images))
        torch.testing.assert_close(plain(images), ours.backbone(images))
    logits = ours.train()(images).logits
    logits.sum().backward()
    assert [name for name, p in ours.named_parameters() if p.requires_grad and p.grad is None] == []
    assert attention_maps(ours.eval(), images).shape == (2, 6, 3)


def test_images_are_prepared_as_the_folder_says(tmp_path):
    MODELS["dinov2"]().save_pretrained(tmp_path)
    assert ReIDModel.from_backbone(tmp_path).image_mean == (0.485, 0.456, 0.406)
    entries = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    model = ReIDModel.from_backbone(tmp_path, image_size=(28, 14))
    assert (model.image_mean, model.image_std, model.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")


def test_a_short_name_is_a_hub_id_everywhere(tmp_path, monkeypatch):
    MODELS["dinov2"]().save_pretrained(tmp_path / "here")
    monkeypatch.setitem(networks.SHORT_NAMES, "dinov2-b", str(tmp_path / "here"))
    assert model_kind("dinov2-b") == "backbone"
    assert ReIDModel.open("dinov2-b", (28, 14)).num_features == 64
    assert ReIDModel.for_training("dinov2-b", num_ids=2, image_size=(28, 14)).classifier.out_features == 2
    assert open_backbone("dinov2-b", (28, 14)).num_features == 64
    # A folder of that name is the folder.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip-b16").mkdir()
    with pytest.raises(ValueError, match="clip-b16 is no model folder"):
        model_kind("clip-b16")
    with pytest.raises(ValueError, match="nothing-here does not exist.*dinov2-b"):
        model_kind("nothing-here")
