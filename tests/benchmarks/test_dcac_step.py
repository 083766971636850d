"""The benchmark of a training step: it runs what training runs, and counts memory as it is."""

import json

import pytest
import torch
from torch import nn

from benchmarks.memory.alive import Alive
from benchmarks.memory.dcac_overhead import Parts, counted_memory, training_loss
from benchmarks.models import Step, sizes
from benchmarks.quality import dcac_curves
from benchmarks.speed import dcac_step

SIZES = sizes()


def test_alive_bytes_are_counted_once_and_let_go():
    with Alive() as alive:
        one = torch.ones(10)
        view = one.view(2, 5)
        assert alive.now == 40
        two = view + 1
        assert alive.now == 80
        del one
        assert alive.now == 80, "the view still holds it"
        del view, two
        assert alive.now == 0
    assert alive.peak == 80


def test_what_the_backward_pass_keeps_is_counted():
    layer = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))
    weights = sum(parameter.numel() for parameter in layer.parameters())
    images = torch.randn(5, 8)
    with Alive() as alive:
        alive.add(*layer.parameters())
        loss = layer(images).sum()
        # The sigmoid keeps what it puts out, not what goes in.
        assert alive.now == 4 * (weights + 5 * 16 + 1)
        loss.backward()
        del loss
        assert alive.now == 4 * 2 * weights


@pytest.mark.parametrize("way", ["ours", "paper"])
def test_a_step_is_the_loss_that_flops_are_counted_of(way):
    step = Step(SIZES["tiny"], "lora", way, batch=4)
    step.prepare()
    model, batch = step.model, step.batch
    if step.vae is not None:
        posterior = step.vae.encode(batch["pictures"]).latent_dist
        batch["means"], batch["stds"] = posterior.mean, posterior.std
    latents = (batch["means"] + batch["stds"] * batch["drawn"]) * 0.18215
    parts = Parts(
        model.encoder, model.condition.prompts, model.memory.prototypes, step.vae, model.unet, model.schedule
    )
    with torch.no_grad():
        counted = training_loss(parts, batch | {"latents": latents}, "ours")
    before = model.memory.prototypes.clone()
    torch.testing.assert_close(step.run(), counted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, model.memory.prototypes)
    assert all(parameter.grad is None for parameter in step.params), "the step ends with clean gradients"


@pytest.mark.slow
def test_memory_falls_as_more_is_computed_twice():
    gib = {way: counted_memory(SIZES["tiny"], "lora", way, batch=64) for way in ("ours", "outer", "all")}
    baseline = counted_memory(SIZES["tiny"], "baseline", "ours", batch=64)
    assert gib["all"] < baseline < gib["outer"] < gib["ours"]
    assert counted_memory(SIZES["tiny"], "full", "ours", batch=64) > gib["ours"]
    # Twice the images: twice the activations, the weights stay.
    smaller = counted_memory(SIZES["tiny"], "lora", "ours", batch=32)
    assert 1.5 * smaller < gib["ours"] < 2 * smaller


@pytest.mark.slow
def test_timing_writes_ratios_to_the_baseline_and_to_the_papers_way(tmp_path, capsys):
    file = tmp_path / "step.json"
    words = "--size tiny --modes frozen --batches 4 --rounds 2 --steps 1 --warmup 0"
    dcac_step.main([*words.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    rows = found["raw"]["batches"]["4"]
    assert set(rows) == {"baseline", "frozen"} and set(rows["frozen"]) == set(dcac_step.TIMED)
    ours, paper = rows["frozen"]["ours"], rows["frozen"]["paper"]
    assert ours["times_paper"] == pytest.approx(ours["ms"] / paper["ms"], abs=1e-3)
    assert ours["times_baseline"] == pytest.approx(ours["ms"] / rows["baseline"]["ours"]["ms"], abs=1e-3)
    assert ours["images_per_second"] == pytest.approx(4000 / ours["ms"], rel=1e-2) and ours["steps"] == 2
    assert "frozen" in capsys.readouterr().out and found["environment"]["torch"] == torch.__version__


def test_captions_and_balance_are_measured_with_the_gradients(tmp_path):
    file = tmp_path / "step.json"
    words = "--size tiny --modes lora-captions --ways ours --batches 4 --rounds 1 --steps 2 --warmup 1"
    dcac_step.main([*words.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    row = found["raw"]["batches"]["4"]["lora-captions"]["ours"]
    assert found["columns"][-1] == "gradient ratio" and set(found["raw"]["batches"]["4"]) == {
        "baseline",
        "lora-captions",
    }
    step = Step(SIZES["tiny"], "lora-captions", "ours", batch=4)
    assert step.model.condition.prompts.shape == (SIZES["tiny"].num_ids, 77, SIZES["tiny"].unet["cross_attention_dim"])
    before, after = row["gradients_before"], row["gradients_after"]
    assert before == pytest.approx(step.gradients(), rel=1e-4)
    # The factor follows the ratio: from the second step on the share is the one that was asked for.
    assert row["feedback_ratio"] == pytest.approx(0.1, rel=0.5) and after["gradient_ratio"] > 0
    assert row["feedback_scale"] == pytest.approx(0.1 / after["gradient_ratio"], rel=0.5)


def test_the_largest_difference_of_two_curves_and_its_step():
    wanted = [{"step": step, "lr": 1.0, "loss": 2.0 * step, "loss_id": 1.0} for step in (1, 2, 3)]
    found = [dict(line) for line in wanted]
    found[1]["loss"] += 1.0
    found[2]["loss"] -= 0.5
    rows = dcac_curves.largest_differences(wanted, found)
    assert rows == {
        "loss": {"absolute": 1.0, "relative": 0.25, "step": 2},
        "loss_id": {"absolute": 0.0, "relative": 0.0, "step": 1},
    }
    with pytest.raises(ValueError):
        dcac_curves.largest_differences(wanted, found[:2])


@pytest.mark.slow
def test_the_same_training_twice_and_with_the_vae_in_every_step(tmp_path):
    file = tmp_path / "curves.json"
    words = "--steps 3 --source synthetic:domain=a,num_ids=16 --json"
    dcac_curves.main([*words.split(), str(file), "--variants", "again", "vae in every step"])
    found = json.loads(file.read_text())
    found = found["raw"]
    assert found["steps"] == len(found["plain"]) == 3
    assert found["largest"]["again"]["loss"]["absolute"] == 0
    assert 0 < found["largest"]["vae in every step"]["loss"]["relative"] < 0.05
