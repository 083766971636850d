"""Parameters and FLOPs of DCAC at the real sizes: the published table, closed forms, and the ratios of a step."""

import json

import pytest
import torch

from benchmarks.memory import dcac_overhead
from benchmarks.memory.dcac_overhead import PAPER, build_batch, build_parts, count_parameters, forward_flops
from benchmarks.models import BATCH, MODES

# Published, in millions.
PARAMETERS = {
    "inference": "85.55",
    "baseline": "85.94",
    "frozen": "86.51",
    "lora": "89.01",
    "partial-1": "599.37",
    "partial-2": "696.41",
    "full": "946.03",
}
TOKENS, CLIP_WIDTH, FEATURES, NUM_IDS = 129, 768, 512, 751
# Multiply-adds of the image encoder, an image: patches, the blocks' linear layers, attention, projection, classifier.
PATCHES = (TOKENS - 1) * 3 * 16 * 16 * CLIP_WIDTH
BLOCKS = 12 * TOKENS * 12 * CLIP_WIDTH**2
ATTENTION = 12 * 2 * TOKENS**2 * CLIP_WIDTH
HEADS = CLIP_WIDTH * FEATURES + FEATURES * NUM_IDS
PROTOTYPES = FEATURES * NUM_IDS


def tera(multiply_adds):
    return 2 * BATCH * multiply_adds / 1e12


@pytest.fixture(scope="module")
def parts():
    return {mode: build_parts(mode) for mode in PAPER}


@pytest.mark.parametrize("mode", PARAMETERS)
def test_trainable_parameters_are_the_published_ones(parts, mode):
    assert f"{count_parameters(mode, parts[mode]) / 1e6:.2f}" == PARAMETERS[mode] == f"{PAPER[mode][0]:.2f}"


def test_parameters_that_train_get_gradient(parts):
    """What is counted as trained is what a backward pass reaches."""
    lora = parts["lora"]
    lora.encoder.train()
    dcac_overhead.training_loss(lora, build_batch(), "ours").backward()
    modules = (lora.encoder, lora.unet, lora.vae)
    reached = [p for module in modules for p in module.parameters() if p.grad is not None] + [lora.prompts]
    assert lora.prompts.grad is not None
    assert sum(parameter.numel() for parameter in reached) == count_parameters("lora", lora)


def test_forward_flops(parts):
    batch = build_batch()
    encoder = PATCHES + BLOCKS + ATTENTION + HEADS
    assert forward_flops("inference", parts["inference"], batch) == pytest.approx(
        tera(encoder - FEATURES * NUM_IDS), rel=1e-9
    )
    baseline = forward_flops("baseline", parts["baseline"], batch)
    assert baseline == pytest.approx(tera(encoder + PROTOTYPES), rel=1e-9)
    frozen, lora = (forward_flops(mode, parts[mode], batch) for mode in ("frozen", "lora"))
    # U-Net at 16 x 16 latents 2.734, VAE encoder at 128 x 128 4.338.
    assert frozen - baseline == pytest.approx(2.734 + 4.338, abs=2e-3)
    assert (round(frozen, 2), round(lora, 2)) == (8.52, 8.54)


def test_flops_of_a_step(parts):
    batch = build_batch()
    baseline = dcac_overhead.step_flops(parts["baseline"], batch, "ours")
    # A backward pass does each product twice; frozen patches do neither, prototypes take no gradient.
    want = PATCHES + 3 * (BLOCKS + ATTENTION + HEADS) + 2 * PROTOTYPES
    assert baseline == pytest.approx(tera(want), rel=1e-9)
    ours, paper = (dcac_overhead.step_flops(parts["lora"], batch, way) for way in ("ours", "paper"))
    assert ours / baseline <= 2.3
    # The VAE makes the difference: the released code keeps activations too.
    assert paper - ours == pytest.approx(4.338, abs=2e-3)
    assert f"{ours / baseline:.2f} {paper / baseline:.2f}" == "2.26 3.26"


@pytest.mark.slow
def test_files(tmp_path, capsys):
    file, names = tmp_path / "table.json", ("dcac_table", "dcac_step_flops")
    dcac_overhead.main(["--table", "--json", str(file), "--results_dir", str(tmp_path)])
    table = json.loads(file.read_text())
    stored, steps = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    assert stored["raw"] == table
    assert list(table) == list(PARAMETERS)
    for mode, row in table.items():
        assert f"{row['ours']['params_m']:.2f}" == PARAMETERS[mode]
        assert row["paper"] == dict(zip(("params_m", "tflops"), PAPER[mode], strict=True))
        assert row["ours"]["tflops"] == pytest.approx(row["paper"]["tflops"], abs=0.025)
    assert steps["environment"]["torch"] == torch.__version__ and steps["environment"]["diffusers"]
    ratios = {mode: {way: step["ratio"] for way, step in row.items()} for mode, row in steps["raw"]["steps"].items()}
    assert ratios["baseline"] == {"ours": 1.0} and list(ratios) == ["baseline", *MODES]
    for mode in MODES:
        assert ratios[mode]["ours"] < ratios[mode]["paper"]
    printed = capsys.readouterr().out
    assert "599.37" in printed and "(2.26x)" in printed and "(3.26x)" in printed


def test_nothing_asked_for(capsys):
    with pytest.raises(SystemExit) as raised:
        dcac_overhead.main([])
    assert raised.value.code == 2 and "--table" in capsys.readouterr().err
