"""Weights split by FSDP2 over two processes on the CPU: the same training as DDP, with a part of the weights each."""

import itertools
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.runs import ROOT, launch, log_of, same_weights, weights_of
from utils.flags import RESNET_DIR

# What `accelerate launch` sets of accelerate_configs/fsdp2.yaml.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
OFFLOAD = FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}
DATA = ["--source", "synthetic:domain=a,num_ids=8,images_per_id=4", "--target", "synthetic:domain=b,num_ids=3"]
FINETUNE = ["finetune_reid.py", *DATA, "--resolution", "64", "32", "--train_batch_size", "4", "--images_per_id", "2"]
FINETUNE += ["--num_train_epochs", "2", "--eval_every", "2", "--mixed_precision", "no"]
DCAC = ["train_dcac.py", *DATA, "--resolution", "64", "32", "--diffusion_resolution", "64", "64"]
DCAC += ["--train_batch_size", "4", "--learning_rate", "3e-4", "--num_train_epochs", "9", "--max_train_steps", "4"]
DCAC += ["--eval_every", "9", "--validation_ids", "2", "--mixed_precision", "no"]


def watched(script, *arguments):
    """A run of a script that writes what each process has of the model: beside weights, whole and own, its units."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    import utils.diffusion.unet
    from utils import launch
    from utils.modeling.reid_model import ReIDModel
    from utils.training.loop import Training

    launch.check_login = lambda: None
    ReIDModel.push_to_hub = lambda model, name, card: model.save_pretrained(name)
    begin, load = Training.begin, utils.diffusion.unet.load_diffusion

    def looked_at(training, model, *rest, **options):
        begin(training, model, *rest, **options)
        parameters = list(model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        held = {id(parameter) for group in rest[0].param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in parameters if parameter.requires_grad}
        share = {"whole": sum(parameter.numel() for parameter in parameters)}
        share["own"] = sum(parameter.to_local().numel() for parameter in parameters)
        share["units"] = sum(isinstance(module, FSDPModule) for module in model.modules())
        # The main process may come later.
        folder = Path(training.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"share-{training.accelerator.process_index}.json").write_text(json.dumps(share))

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        Training.begin = looked_at
    # Sums of convolutions in channels_last, which FSDP does not split, have another order.
    utils.diffusion.unet.load_diffusion = lambda *names, **options: load(*names, **options | {"channels_last": False})
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def train(folder, command, *more, processes=2, **env):
    launch(watched, *command, *more, "--output_dir", folder, processes=processes, **env)
    return log_of(folder)


def check_shares(folder, units):
    shares = [json.loads((folder / f"share-{number}.json").read_text()) for number in range(2)]
    assert sum(share["own"] for share in shares) == shares[0]["whole"]
    assert all(0.45 < share["own"] / share["whole"] < 0.55 and share["units"] == units for share in shares)


def check_same(lines, others, rel):
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=rel)


def check_weights(folder, other, atol, rtol=0):
    one, two = weights_of(folder), weights_of(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=rtol, atol=atol, msg=name)


def steps_of(checkpoint):
    """The optimizer's tensors in a checkpoint, whole."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    return {(number, name): value for number, values in saved.items() for name, value in values.items()}


def test_a_resnet_trains_bit_for_bit_as_by_ddp(tmp_path):
    """BatchNorm over both processes, centres, the optimizer's state, and what is saved and uploaded."""
    command = [*FINETUNE, "--backbone", RESNET_DIR, "--max_train_steps", "3"]
    plain = train(tmp_path / "plain", command)
    upload = ["--push_to_hub", "--hub_model_id", tmp_path / "uploaded"]
    whole = train(tmp_path / "whole", command, *upload, **FSDP)
    check_shares(tmp_path / "whole", units=5)
    # The norm alone is summed in another order.
    check_same(whole, plain, rel=1e-6)
    check_weights(tmp_path / "whole", tmp_path / "plain", atol=0)
    assert same_weights(load_file(tmp_path / "uploaded" / "model.safetensors"), weights_of(tmp_path / "whole"))
    checkpoints = [tmp_path / name / "checkpoint-3" for name in ("whole", "plain")]
    assert same_weights(*(steps_of(checkpoint) for checkpoint in checkpoints))
    assert same_weights(*(load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints))


@pytest.mark.slow
def test_fsdp_and_ddp_resume_each_other(tmp_path):
    command = [*FINETUNE, "--backbone", RESNET_DIR]
    whole = train(tmp_path / "whole", command, **FSDP)
    for name, env in {"split": FSDP, "plain": {}}.items():
        train(tmp_path / name, command, "--max_train_steps", "3", **env)
    for cut, env in (("split", FSDP), ("split", {}), ("plain", FSDP)):
        folder = tmp_path / f"{cut}-{len(env)}"
        lines = train(folder, command, "--resume_from_checkpoint", tmp_path / cut / "checkpoint-3", **env)
        check_same(lines, whole, rel=1e-6)
        check_weights(folder, tmp_path / "whole", atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, more, env",
    [
        ("bot", ["--max_grad_norm", "1", "--optimizer", "sgd"], FSDP),
        ("bot", ["--gradient_checkpointing", "--optimizer", "sgd"], OFFLOAD),
        ("agw", ["--backbone", RESNET_DIR], OFFLOAD),
        ("mgn", ["--backbone", RESNET_DIR], FSDP),
        ("bdb", ["--backbone", RESNET_DIR], FSDP),
        ("sbs", ["--backbone", RESNET_DIR, "--freeze_steps", "2", "--lr_delay_epochs", "0"], FSDP),
    ],
)
def test_methods_train_as_by_ddp(tmp_path, method, more, env):
    command = [*FINETUNE, "--method", method, *more]
    plain = train(tmp_path / "plain", command)
    check_same(train(tmp_path / "split", command, **env), plain, rel=1e-5)
    # MGN calls layers inside blocks: its weights are split in one piece.
    check_shares(tmp_path / "split", units=1 if method == "mgn" else 5)
    check_weights(tmp_path / "split", tmp_path / "plain", atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, env",
    [
        ([], FSDP),
        (["--unet_mode", "full", "--max_grad_norm", "1", "--gradient_checkpointing"], FSDP),
        (["--unet_mode", "frozen", "--bottleneck", "condition-net", "--lr_multiplier", "3"], OFFLOAD),
        (["--ldm_balance", "0.1", "--gradient_checkpointing", "outer"], FSDP),
        (["--diffusion", "none", "--backbone", RESNET_DIR], FSDP),
        (["--ldm_start_epoch", "2", "--train_batch_size", "2", "--gradient_accumulation_steps", "2"], FSDP),
        (["--encoder", "muva"], FSDP),
        # Frozen weights are in half precision then, LoRA beside them is not.
        (["--mixed_precision", "bf16"], FSDP),
    ],
)
def test_dcac_trains_as_by_ddp_and_goes_on(tmp_path, more, env):
    """LoRA and prompts with a rate of their own, a frozen U-Net, prototypes, clipping, recomputation, balance."""
    # Adam's first steps blow up what rounding leaves between two orders of a sum.
    command = [*DCAC, "--cache_dir", tmp_path / "cache", "--optimizer", "sgd", *more]
    plain = train(tmp_path / "plain", command)
    whole = train(tmp_path / "whole", command, **env)
    shares = json.loads((tmp_path / "whole" / "share-0.json").read_text())
    check_shares(tmp_path / "whole", units=shares["units"])
    assert shares["units"] > 4
    half = "bf16" in more
    check_same(whole, plain, rel=1e-2 if half else 1e-4)
    # The variances of features are not near 1.
    check_weights(tmp_path / "whole", tmp_path / "plain", **({"atol": 1e-3, "rtol": 1e-2} if half else {"atol": 1e-5}))
    train(tmp_path / "cut", command, "--max_train_steps", "2", **env)
    resume = ["--resume_from_checkpoint", "latest"]
    assert train(tmp_path / "cut", command, *resume, **env) == whole
    check_weights(tmp_path / "cut", tmp_path / "whole", atol=0)
    for name in ("unet_lora/pytorch_lora_weights.safetensors", "prompts.safetensors"):
        if (tmp_path / "plain" / name).exists():
            one, two = load_file(tmp_path / "cut" / name), load_file(tmp_path / "plain" / name)
            assert one.keys() == two.keys() and all(
                torch.allclose(one[key], two[key], rtol=0, atol=1e-2 if half else 1e-4) for key in one
            )
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "plain")]
    (target,) = results[0]["targets"]
    assert results[0]["targets"][target]["mAP"] == pytest.approx(results[1]["targets"][target]["mAP"], abs=0.02)


@pytest.mark.parametrize(
    "command, env, words",
    [
        ([*FINETUNE, "--mixed_precision", "fp16"], {}, "use --mixed_precision bf16 or no"),
        ([*FINETUNE, "--use_8bit_adam"], {}, "which FSDP cannot split"),
        ([*FINETUNE, "--torch_compile"], {}, "leave one of them out"),
        (FINETUNE, {"FSDP_VERSION": "1"}, "use fsdp_version 2"),
        (FINETUNE, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient_checkpointing"),
        (FINETUNE, {}, "accelerate_configs/fsdp2.yaml"),
        (["pretrain_backbone.py"], {}, "FSDP is for train_dcac.py and finetune_reid.py"),
        (["adapt_reid.py"], {}, "FSDP is for train_dcac.py and finetune_reid.py"),
    ],
)
def test_what_fsdp_cannot_do_is_said_at_once(tmp_path, monkeypatch, command, env, words):
    for name, value in (FSDP | env).items():
        monkeypatch.setenv(name, value)
    script = __import__(command[0].removesuffix(".py"))
    assert words in runs.refused(script, *itertools.islice(command, 1, None), "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
