"""--recipe protocol-2: all images of four sets, the means of ten splits of four small ones, in their own layouts."""

import json

import pytest
import torch
from transformers import ResNetModel

import finetune_reid
from finetune_reid import METHODS, parse_args
from methods.generalisation import PROTOCOL_2
from tests import runs
from tests.modeling.test_heads import TINY
from tests.runs import log_of
from utils.datasets.load import load_reid


def test_the_recipe_is_of_every_method():
    for method in METHODS:
        args = parse_args(["--recipe", "protocol-2", "--method", method, "--target", "viper"])
        usual = parse_args(["--recipe", "published", "--method", method])
        assert (args.setting, args.source, args.target) == ("generalisation", PROTOCOL_2["source"], ["viper"])
        for name in ("learning_rate", "num_train_epochs", "optimizer", "resolution", "train_batch_size"):
            assert getattr(args, name) == getattr(usual, name), (method, name)
    names = [spec.partition(":")[0] for spec in PROTOCOL_2["source"]]
    assert names == ["market1501", "cuhk02", "cuhk03np", "cuhksysu"]
    assert all(spec.endswith(":all_for_training=true") for spec in PROTOCOL_2["source"])
    assert PROTOCOL_2["target"] == ["prid", "grid", "viper", "ilids"]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """The eight sets with a few people each, under their own names; every image is a drawn one."""
    root = tmp_path_factory.mktemp("benchmarks")
    pictures = [
        row["image"].resize((16, 32)) for row in load_reid("synthetic:domain=a,num_ids=8,images_per_id=4")["train"]
    ]
    made = 0

    def add(path):
        nonlocal made
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pictures[made % len(pictures)].save(root / path)
        made += 1

    for pid in range(1, 5):
        for camera in (1, 2):
            folder = "bounding_box_train" if pid < 3 else "bounding_box_test"
            add(f"market1501/{folder}/{pid:04d}_c{camera}s1_000001_01.jpg")
            add(f"cuhk03/detected/{folder}/{pid:04d}_c{camera}_1.png")
        if pid > 2:
            add(f"market1501/query/{pid:04d}_c3s1_000001_00.jpg")
            add(f"cuhk03/detected/query/{pid:04d}_c1_2.png")
        for index in (1, 2):
            add(f"cuhksysu/cropped_images/p{pid}_s{index}_{index}.jpg")
    # Junk and background are no people; one person of CUHK-SYSU has a single image.
    add("market1501/bounding_box_test/-1_c1s1_000001_02.jpg")
    add("market1501/bounding_box_test/0000_c1s1_000001_03.jpg")
    add("cuhksysu/cropped_images/p9_s1_1.jpg")
    for pair in range(1, 6):
        for camera in (1, 2):
            add(f"cuhk02/P{pair}/cam{camera}/001_1.png")
    for pid in range(12):
        add(f"viper/cam_a/{pid:03d}_0.bmp")
        add(f"viper/cam_b/{pid:03d}_90.bmp")
        add(f"grid/probe/{pid + 1:04d}_1_{pid:05d}_107_32_106_221.jpeg")
        add(f"grid/gallery/{pid + 1:04d}_2_{pid:05d}_17_3_10_22.jpeg")
        add(f"prid/single_shot/cam_a/person_{pid + 1:04d}.png")
        add(f"prid/single_shot/cam_b/person_{pid + 1:04d}.png")
        add(f"ilids/Persons/{pid + 1:04d}001.jpg")
        add(f"ilids/Persons/{pid + 1:04d}002.jpg")
    for number in range(3):
        add(f"grid/gallery/0000_1_{number:05d}_1_2_3_4.jpeg")
        add(f"prid/single_shot/cam_b/person_{400 + number:04d}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("method", ["meta", "metabin", "bot"])
def test_one_command(benchmarks, method, tmp_path, capsys):
    torch.manual_seed(0)
    ResNetModel(TINY["resnet"]).save_pretrained(tmp_path / "resnet")
    small = [
        "--resolution",
        "64",
        "32",
        "--train_batch_size",
        "8",
        "--dataloader_num_workers",
        "0",
        "--log_every",
        "1",
    ]
    small += ["--images_per_id", "2", "--backbone", tmp_path / "resnet", "--max_train_steps", "1"]
    words = ["--recipe", "protocol-2", "--method", method, "--data_root", benchmarks, *small]
    assert runs.run(finetune_reid, *words, "--output_dir", tmp_path / "out") == 0
    # 10 of Market-1501, 10 of CUHK02 and of CUHK03, 9 of CUHK-SYSU; 4, 5, 4 and 5 people.
    assert "39 of 39 images, 18 identities" in capsys.readouterr().out
    assert len(log_of(tmp_path / "out")) == 1
    targets = json.loads((tmp_path / "out" / "metrics.json").read_text())["targets"]
    assert list(targets) == ["prid", "grid", "viper", "ilids"]
    for name, found in targets.items():
        assert len(found["splits"]) == 10 and set(found["std"]) >= {"mAP", "rank1"}, name
        assert found["rank1"] == pytest.approx(sum(split["rank1"] for split in found["splits"]) / 10)
    assert {name: found["splits"][0]["num_valid"] for name, found in targets.items()} == {
        "prid": 6, "grid": 6, "viper": 6, "ilids": 6,
    }  # fmt: skip
