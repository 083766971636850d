"""benchmarks.speed.pretraining: the two ways train the same network, FLOPs against published counts, one small run."""

import json
import math

import pytest
import torch
import torchvision

from benchmarks.speed import pretraining
from benchmarks.speed.pretraining import add_shares, counted, flops, plain_model


def test_forward_and_backward_are_three_forwards():
    """torchvision publishes 4.089 billion multiply-adds of a forward pass at 224 x 224."""
    with torch.device("meta"):
        resnet = torchvision.models.resnet50(weights=None)
    # The gradient of the images is not needed.
    first = 2 * 3 * 64 * 7 * 7 * 112 * 112
    assert flops(resnet, (224, 224)) == pytest.approx(3 * 2 * 4.089e9 - first, rel=1e-3)


@pytest.mark.parametrize("name", ["resnet50", "swin-t"])
def test_both_ways_are_one_network(name):
    work = counted(name, (256, 128), 100)
    assert work["ours"] == pytest.approx(work["plain"], rel=0.02)
    with torch.device("meta"):
        assert work["parameters"] == sum(p.numel() for p in plain_model(name, 100).parameters())


def test_shares():
    found = {
        "m": {
            "ways": {
                "ours": {"images_per_second": 30.0, "tflops": 3.0},
                "plain": {"images_per_second": 20.0, "tflops": 2.0},
            }
        }
    }
    add_shares(found, 6.0, 12.0)
    assert found["m"]["ways"]["ours"] == {
        "images_per_second": 30.0,
        "tflops": 3.0,
        "share_of_product": 0.5,
        "share_of_data_sheet": 0.25,
        "times_plain": 1.5,
    }


def test_the_recipe_as_a_table(capsys):
    """Rates by the formula; every tensor of a real network in one of two rows."""
    pretraining.main(["--recipe", "--models", "swin-t"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rates = {int(line[0]): [float(word) for word in line[1:]] for line in lines if line and line[0].isdigit()}
    steps = 777_130 // 512
    for epoch, ends in rates.items():
        for step, rate in zip(((epoch - 1) * steps, epoch * steps - 1), ends, strict=True):
            done = step / steps
            cosine = (1 + math.cos(math.pi * (done - 20) / 280)) / 2
            assert rate == pytest.approx(4e-3 * (done / 20 if done < 20 else cosine), rel=2e-3, abs=1e-12)
    assert list(rates) == [1, 20, 21, 150, 300]
    rows = {line[1]: line for line in lines if line and line[0] == "swin-t"}
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in plain_model("swin-t", 5183).parameters()) / 1e6
    assert float(rows["0.0"][3]) + float(rows["0.05"][3]) == pytest.approx(wanted, abs=2e-3)
    free, decaying = (" ".join(rows[decay]) for decay in ("0.0", "0.05"))
    assert "29 LayerNorm.weight" in free and "12 SwinRelativePositionBias" in free
    assert decaying.endswith("1 Conv2d.weight, 76 Linear.weight")


def test_a_small_run(tmp_path, capsys):
    pretraining.main(
        [
            *("--size", "tiny", "--models", "swin-t", "--rounds", "1", "--steps", "2", "--warmup", "0"),
            *("--mixed_precision", "no", "--json", str(tmp_path / "found.json")),
        ]
    )
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["raw"]["models"]["swin-t"]["ways"]
    assert set(rows) == {"ours", "augmented", "plain"}
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(1000 * 4 / row["ms"], rel=1e-2)
        assert row["tflops"] == pytest.approx(row["images_per_second"] * row["gflops_an_image"] / 1000)
        assert row["share_of_product"] > 0 and 0 < row["loss"] < 10
    assert "images/s" in capsys.readouterr().out and found["environment"]["revision"]
