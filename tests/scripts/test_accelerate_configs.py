"""accelerate_configs/: accelerate reads every file, and each is used, on the processor, as it is shipped."""

import argparse
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.runs import ROOT, environment, free_port, log_of
from utils.sharding import set_up_deepspeed

FOLDER = ROOT / "accelerate_configs"
# (launcher, processes, machines, precision, ZeRO stage, where the optimiser's state lies)
MEANT = {
    "cpu": ("NO", 1, 1, "no", None, None),
    "deepspeed_zero2": ("DEEPSPEED", 4, 1, "bf16", 2, "none"),
    "deepspeed_zero2_offload": ("DEEPSPEED", 1, 1, "bf16", 2, "cpu"),
    "deepspeed_zero3": ("DEEPSPEED", 4, 1, "bf16", 3, "none"),
    "fsdp2": ("FSDP", 4, 1, "bf16", None, None),
    "fsdp2_offload": ("FSDP", 1, 1, "bf16", None, None),
    "multi_gpu": ("MULTI_GPU", 4, 1, "bf16", None, None),
    "multi_host": ("MULTI_GPU", 8, 2, "bf16", None, None),
    "single_gpu": ("NO", 1, 1, "bf16", None, None),
}
TRAINING = [
    "train_dcac.py", "--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--target",
    "synthetic:domain=b,num_ids=3", "--learning_rate", "3e-4", "--lr_warmup_epochs", "2", "--validation_ids", "2",
    "--diffusion_resolution", "64", "64", "--num_train_epochs", "9", "--eval_every", "9",
]  # fmt: skip
# What a process says of itself once a script's own start-up is through.
ASKED = """
import argparse, sys, torch
from utils.launch import prepare, start_training
names = dict(mixed_precision=None, report_to=[], output_dir=sys.argv[1], push_to_hub=False, train_batch_size=4)
args = argparse.Namespace(**names, max_grad_norm=0, allow_tf32=False)
accelerator = start_training(args, max_zero_stage=3, fsdp=True)
model = torch.nn.Linear(8, 4)
model, optimizer = prepare(accelerator, model, [], lambda: torch.optim.SGD(model.parameters(), lr=0.1))
# FSDP2 leaves weights outside of blocks whole between the forward and the backward pass.
weight = accelerator.unwrap_model(model).weight
share = [weight.device.type, *weight.to_local().shape] if hasattr(weight, "to_local") else []
with accelerator.autocast():
    computed = model(torch.ones(4, 8)).dtype
model = accelerator.unwrap_model(model)
said = [accelerator.distributed_type.value, accelerator.num_processes, str(computed), str(model.weight.dtype)]
said += share
with open(f"{sys.argv[1]}/{accelerator.process_index}", "w") as file:
    file.write(" ".join(map(str, said)))
accelerator.end_training()
"""


def start(name, words, *flags, **options):
    """`accelerate launch` with a shipped file, on the processor."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    return subprocess.Popen(
        [*command, *flags, *map(str, words)],
        cwd=ROOT,
        env=environment(DS_ACCELERATOR="cpu"),
        stdout=-1,
        stderr=-1,
        text=True,
        **options,
    )


def end(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=570)
        assert process.returncode == 0, errors[-3000:]


def test_every_file_is_known_here():
    assert {path.stem for path in FOLDER.iterdir()} == set(MEANT)


@pytest.mark.parametrize("name", MEANT)
def test_accelerate_reads_what_is_meant(name, monkeypatch):
    path = FOLDER / f"{name}.yaml"
    launcher, processes, machines, precision, stage, offload = MEANT[name]
    config = load_config_from_file(str(path))
    found = config.distributed_type.value, config.num_processes, config.num_machines, config.mixed_precision
    assert found == (launcher, processes, machines, precision)
    assert config.use_cpu == (name == "cpu") and path.read_text().startswith("# ")
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config))
    assert (config.deepspeed_config or {}).get("zero_stage") == stage
    # The same through the launcher, which turns the file into flags.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    args, read, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    assert read.distributed_type == config.distributed_type and args.num_processes == processes
    assert args.use_deepspeed == (launcher == "DEEPSPEED") and args.multi_gpu == (launcher == "MULTI_GPU")
    assert args.use_fsdp == (launcher == "FSDP")
    if launcher == "FSDP":
        found = args.fsdp_version, args.fsdp_offload_params, args.fsdp_reshard_after_forward
        assert [str(value).lower() for value in found] == ["2", str("offload" in name).lower(), "true"]
    if stage:
        assert (args.zero_stage, args.offload_optimizer_device) == (stage, offload)
        # Weights split as they are loaded could not be put into a model of ours.
        assert str(args.zero3_init_flag).lower() == "false"


def test_commands_in_the_files_and_the_readme_name_files_that_are_there():
    texts = [path.read_text() for path in [*FOLDER.iterdir(), ROOT / "README.md"]]
    named = {name for text in texts for name in re.findall(r"accelerate_configs/(\w+)\.yaml", text)}
    assert "multi_host" in named and named <= set(MEANT)


def asked(name, folder, *flags, hosts=1):
    """What each process of a shipped file says, under its number."""
    script = folder / "asked.py"
    script.write_text(ASKED)
    port = ["--main_process_port", str(free_port())]
    ranks = [[] if hosts == 1 else ["--machine_rank", str(rank)] for rank in range(hosts)]
    end(*(start(name, [script, folder], *flags, *rank, *port) for rank in ranks))
    return {path.name: path.read_text() for path in folder.iterdir() if path.name.isdigit()}


def test_multi_gpu_starts_two_processes(tmp_path):
    said = asked("multi_gpu", tmp_path, "--num_processes", "2")
    assert said == dict.fromkeys("01", "MULTI_CPU 2 torch.float32 torch.float32")


@pytest.mark.slow
def test_fsdp_starts_two_processes_with_half_of_the_weights_each(tmp_path):
    said = asked("fsdp2", tmp_path, "--num_processes", "2")
    assert said == dict.fromkeys("01", "MULTI_CPU 2 torch.bfloat16 torch.float32 cpu 2 8")


@pytest.mark.slow
@pytest.mark.parametrize("name, words", [("cpu", "NO 1 torch.float32"), ("single_gpu", "NO 1 torch.float32")])
def test_one_process(tmp_path, name, words):
    assert asked(name, tmp_path) == {"0": f"{words} torch.float32"}


@pytest.mark.slow
def test_two_hosts_on_one_machine(tmp_path):
    flags = ["--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    said = asked("multi_host", tmp_path, *flags, hosts=2)
    assert said == dict.fromkeys("01", "MULTI_CPU 2 torch.float32 torch.float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero2_offload", "deepspeed_zero3"])
def test_deepspeed_computes_in_bf16_with_weights_in_float32(tmp_path, name):
    pytest.importorskip("deepspeed")
    said = asked(name, tmp_path, "--num_processes", "2")
    assert said == dict.fromkeys("01", "DEEPSPEED 2 torch.bfloat16 torch.float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deepspeed_zero2", "deepspeed_zero2_offload", "deepspeed_zero3", "fsdp2", "fsdp2_offload"]
)
def test_split_weights_train_as_two_processes_do_and_go_on(tmp_path, name):
    """The whole U-Net by a shipped file in float32: losses of plain data parallelism, and those of an unbroken run."""
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    common = [*TRAINING, "--unet_mode", "full", "--train_batch_size", "4", "--mixed_precision", "no"]
    common += ["--cache_dir", tmp_path / "cache"]

    def train(config, folder, steps, *more):
        words = [*common, "--max_train_steps", steps, "--output_dir", tmp_path / folder, *more]
        end(start(config, words, "--num_processes", "2", "--main_process_port", str(free_port())))
        return log_of(tmp_path / folder)

    plain, whole = train("multi_gpu", "plain", 4), train(name, "whole", 4)
    train(name, "cut", 2)
    assert train(name, "cut", 4, "--resume_from_checkpoint", "latest") == whole
    # Adam's first steps blow up what rounding leaves between two orders of a sum.
    for line, other, apart in zip(whole, plain, (1e-3, 0.05, 0.05, 0.05), strict=True):
        assert line == pytest.approx(other, rel=apart)
    one, other = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("whole", "plain"))
    (target,) = one["targets"]
    assert one["targets"][target]["mAP"] == pytest.approx(other["targets"][target]["mAP"], abs=0.03)


@pytest.mark.slow
def test_deepspeed_by_its_file_as_shipped(tmp_path):
    """In the file's own bf16; fp16, as the recipes have it, is refused in words."""
    pytest.importorskip("deepspeed")
    words = [*TRAINING, "--train_batch_size", "4", "--max_train_steps", "2", "--cache_dir", tmp_path / "cache"]
    flags = ["--num_processes", "2", "--main_process_port", str(free_port())]
    end(start("deepspeed_zero2", [*words, "--unet_mode", "full", "--output_dir", tmp_path / "out"], *flags))
    assert len(log_of(tmp_path / "out")) == 2
    refused = start("deepspeed_zero2", [*words, "--mixed_precision", "fp16", "--output_dir", tmp_path / "no"], *flags)
    assert "use --mixed_precision bf16 or no" in refused.communicate(timeout=570)[1] and refused.returncode


@pytest.mark.parametrize("given, wanted", [(None, 0.0), (0.0, 0.0), (2.5, 2.5)])
def test_deepspeed_clips_only_where_it_is_asked_to(given, wanted):
    """Without a number accelerate would write its own, 1."""
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"gradient_clipping": "auto"})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision="no")
    set_up_deepspeed(accelerator, argparse.Namespace(max_grad_norm=given, train_batch_size=4), 3)
    assert plugin.deepspeed_config["gradient_clipping"] == wanted
