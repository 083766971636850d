"""The identity labels of --target change no training: with others every weight is the same, only numbers differ."""

import json

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from transformers import ResNetModel, SwinModel

import adapt_reid
import finetune_reid
import pretrain_backbone
import train_dcac
from tests import runs
from tests.methods import test_meta, test_metabin, test_muva, test_runs, test_solider
from tests.modeling.test_heads import TINY
from tests.runs import ROOT, same_weights
from tests.scripts import test_adapt, test_dcac, test_finetune, test_pretrain
from utils.datasets.load import load_reid
from utils.datasets.portable import save
from utils.datasets.schema import put

SWIN = ["--backbone", "swin"]
FINETUNE = [*test_finetune.SMALL, "--num_train_epochs", "2", "--backbone", "resnet"]
DCAC = [*test_dcac.DATA, *test_dcac.SMALL, "--num_train_epochs", "2"]
MUVA = [*test_muva.SMALL, "--backbone", "clip"]
PRETRAIN = test_pretrain.SMALL
CASES = {
    "dcac": (train_dcac, DCAC),
    "dcac-baseline": (train_dcac, [*DCAC, "--diffusion", "none"]),
    "dcac-captions": (train_dcac, [*DCAC, "--prompt_init", "captions", "--ldm_balance", "0.1"]),
    "dcac-muva": (train_dcac, [*MUVA, "--probabilities", "text"]),
    "dcac-muva-parts": (train_dcac, [*MUVA, "--probabilities", "parts", "--part_masks", "rows"]),
    **{f"finetune-{name}": (finetune_reid, [*FINETUNE, "--method", name]) for name in ("bot", "agw", "bdb")},
    "finetune-sbs": (finetune_reid, [*FINETUNE, "--method", "sbs", "--lr_delay_epochs", "1"]),
    "finetune-mgn": (finetune_reid, [*FINETUNE, "--method", "mgn", *SWIN]),
    "finetune-few-shot": (finetune_reid, [*FINETUNE, "--setting", "few-shot", "--fraction", "0.5"]),
    "finetune-metabin": (finetune_reid, [*test_metabin.GENERAL, "--method", "metabin", "--backbone", "resnet"]),
    "finetune-meta": (finetune_reid, [*test_meta.RUN, "--backbone", "resnet"]),
    "pretrain": (pretrain_backbone, [*PRETRAIN, *test_pretrain.MIXED, "--ema_decay", "0.3"]),
    "pretrain-dino": (pretrain_backbone, [*PRETRAIN, *test_pretrain.DINO]),
    "pretrain-solider": (pretrain_backbone, test_solider.RUN),
    **{
        f"adapt-{name}": (adapt_reid, [*test_adapt.SMALL, "--backbone", "clip", *words])
        for name, words in test_adapt.KINDS.items()
    },
    **{
        f"adapt-{name}": (
            adapt_reid,
            [*test_runs.SMALL, "--backbone", "clip", *(test_runs.SETS.get(word, word) for word in words)],
        )
        for name, words in test_runs.COMMANDS.items()
    },
}
QUICK = ("dcac-baseline", "finetune-bot", "adapt-idm")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A set as it is, and with its identity labels shuffled in each split; images and cameras stay."""
    folder, rng = tmp_path_factory.mktemp("copies"), np.random.default_rng(0)
    data = load_reid("synthetic:domain=b,num_ids=6,images_per_id=8")
    data = DatasetDict(
        {
            split: part.map(lambda row: {"image": row["image"].resize((32, 64))}, load_from_cache_file=False)
            for split, part in data.items()
        }
    )
    save(data, folder / "true" / "set")
    for split, part in data.items():
        data[split] = put(part, "pid", rng.permutation(part["pid"][:]))
    save(data, folder / "shuffled" / "set")
    return folder


@pytest.fixture(scope="module")
def starts(standins, tmp_path_factory):
    """{word of a command: folder of a model to start from}."""
    folder = tmp_path_factory.mktemp("starts")
    for name, kind in (("resnet", ResNetModel), ("swin", SwinModel)):
        torch.manual_seed(0)
        kind(TINY[name]).save_pretrained(folder / name)
    return {"clip": str(standins / "clip"), "resnet": str(folder / "resnet"), "swin": str(folder / "swin")}


def test_every_script_that_measures_a_target_is_tried(capsys):
    for path in ROOT.glob("*.py"):
        if '"--target"' in path.read_text() or "target=" in path.read_text():
            assert path.stem in {script.__name__ for script, _ in CASES.values()}, path.name
    assert {f"adapt-{name}" for name in adapt_reid.MODULES} <= CASES.keys()
    assert {f"finetune-{name}" for name in (*finetune_reid.METHODS, "metabin", "meta")} <= CASES.keys()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_training_does_not_read_them(copies, starts, standins, tmp_path, case):
    """Measured after every epoch, so that neither an epoch nor a checkpoint is chosen by these numbers."""
    script, words = CASES[case]
    words = [starts.get(word, word) for word in words]
    if script is train_dcac:
        words += ["--pretrained_model_name_or_path", standins / "stable-diffusion", "--cache_dir", tmp_path / "cache"]
    metrics = {}
    for name in ("true", "shuffled"):
        more = ["--target", copies / name / "set", "--eval_every", "1", "--output_dir", tmp_path / name]
        assert not runs.run(script, *words, *more)
        (metrics[name],) = json.loads((tmp_path / name / "metrics.json").read_text())["targets"].values()
    true, shuffled = tmp_path / "true", tmp_path / "shuffled"
    assert (true / "log.jsonl").read_bytes() == (shuffled / "log.jsonl").read_bytes()
    kept = sorted(path.relative_to(true) for path in true.rglob("*.safetensors") if "checkpoint" not in str(path))
    assert any(path.name == "model.safetensors" for path in kept)
    for path in kept:
        assert same_weights(*(runs.load_file(folder / path) for folder in (true, shuffled))), path
    # Other labels were measured all the same.
    assert metrics["true"]["mAP"] != metrics["shuffled"]["mAP"]
    if script is adapt_reid:
        one, other = (json.loads((folder / "clusters.json").read_text()) for folder in (true, shuffled))
        agreement, clusters = (
            [[[entry[name] for name in names] for entry in record] for record in (one, other)]
            for names in (("ari", "nmi"), ("epoch", "clusters", "noise"))
        )
        assert agreement[0] != agreement[1] and clusters[0] == clusters[1]


def test_the_copies_differ_in_labels_alone(copies):
    true, shuffled = (load_reid(str(copies / name / "set")) for name in ("true", "shuffled"))
    for split in true:
        one, other = true[split], shuffled[split]
        assert sorted(one["pid"][:]) == sorted(other["pid"][:]) and one["pid"][:] != other["pid"][:]
        assert one["camid"][:] == other["camid"][:] and one["path"][:] == other["path"][:]
        assert all(left.tobytes() == right.tobytes() for left, right in zip(one["image"], other["image"], strict=True))
