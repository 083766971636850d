"""Masks of people by segmentation models: the share of each cell, models of garments, and images of nobody."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from utils.diffusion.person_masks import PersonMasks, check_mask_model


def segmenter(folder, labels, wanted=None):
    """A tiny SegFormer of random weights; with `wanted` it sees this label everywhere."""
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 1], sr_ratios=[2, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
        id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    if wanted is not None:
        model.decode_head.classifier.bias.data[labels.index(wanted)] = 1000.0
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model.eval()


def noise(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 32, 3), dtype=np.uint8)
    return Image.fromarray(np.repeat(np.repeat(pixels[::8, ::8], 8, 0), 8, 1))


def test_a_mask_is_the_share_of_each_cell(tmp_path):
    model = segmenter(tmp_path, ["wall", "person", "tree"])
    images = [noise(1), noise(2)]
    masks, empty = PersonMasks(str(tmp_path)).of(images, (8, 4))
    processor = SegformerImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    logits = torch.nn.functional.interpolate(logits, (64, 32), mode="bilinear", align_corners=False)
    wanted = (logits.argmax(1, keepdim=True) == 1).float()
    assert 0.02 < wanted.mean() < 0.98 and empty == 0
    torch.testing.assert_close(masks, torch.nn.functional.avg_pool2d(wanted, 8), rtol=0, atol=1e-6)


def test_an_image_of_nobody_counts_whole(tmp_path):
    segmenter(tmp_path, ["wall", "person"], "wall")
    masks, empty = PersonMasks(str(tmp_path)).of([noise(1), noise(2)], (8, 4))
    assert empty == 2 and torch.equal(masks, torch.ones(2, 1, 8, 4))


@pytest.mark.parametrize(
    "labels, people",
    [
        (["Background", "Hat", "Upper-clothes"], ["Hat", "Upper-clothes"]),
        (["wall", "person", "car"], ["person"]),
        (["wall", "person, individual, someone", "tree;plant"], ["person, individual, someone"]),
        (["traffic sign", "pedestrian", "rider"], ["pedestrian"]),
    ],
)
def test_which_labels_are_people(labels, people, tmp_path):
    segmenter(tmp_path, labels)
    is_person = check_mask_model(str(tmp_path))
    assert [label for label in labels if is_person(label)] == people


def test_a_model_without_people_is_refused(tmp_path):
    segmenter(tmp_path, ["cat", "dog"])
    with pytest.raises(ValueError, match="knows no person and no background, only cat, dog; choose another"):
        check_mask_model(str(tmp_path))
    # A head for masks on the network of another task would have random weights.
    segmenter(tmp_path / "classes", ["wall", "person"])
    config = json.loads((tmp_path / "classes" / "config.json").read_text())
    config["architectures"] = ["SegformerForImageClassification"]
    (tmp_path / "classes" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is no segmentation model but a SegformerForImageClassification"):
        check_mask_model(str(tmp_path / "classes"))
    with pytest.raises(ValueError, match="--mask_model .*nothing: its configuration cannot be read"):
        check_mask_model(str(tmp_path / "nothing"))
