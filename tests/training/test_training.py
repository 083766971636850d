"""Arguments with recipes, optimisers, learning rates, the log of steps, SIGTERM."""

import argparse
import json
import math
import os
import platform
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers.optimization import SchedulerType, get_scheduler

from tests import runs
from utils import flags, ranges
from utils.flags import STEP_SCHEDULES, describe_origin, parse_with_recipes
from utils.launch import check_trackers, global_batch_size, precision_here, start_training
from utils.training.log import StepLog, StopSignal
from utils.training.optimizer import LearningRate, build_optimizer

RECIPES = {"small": {"rank": 4, "rate": 0.5, "source": ["a", "b"], "deep": True}, "large": {"rank": 32}}


def parse(*arguments, recipes=RECIPES):
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", choices=recipes)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--source", nargs="+")
    parser.add_argument("--milestones", type=int, nargs="*", default=[9])
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--name", default="x")
    return parse_with_recipes(parser, recipes, list(arguments))


# Arguments


def test_without_recipe_defaults_hold():
    args, origin = parse()
    assert vars(args) == {
        "recipe": None, "rank": 8, "rate": 0.1, "source": None, "milestones": [9], "deep": False, "name": "x",
    }  # fmt: skip
    assert set(origin.values()) == {"default"} and set(origin) == set(vars(args))
    assert describe_origin(args, origin) == []


def test_a_recipe_replaces_defaults():
    args, origin = parse("--recipe", "small")
    assert (args.rank, args.rate, args.source, args.deep) == (4, 0.5, ["a", "b"], True)
    assert [name for name, where in origin.items() if where == "recipe"] == ["rank", "rate", "source", "deep"]
    assert origin["name"] == "default" and args.name == "x"
    assert parse("--recipe", "large")[0].source is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_flag_wins_over_the_recipe_wherever_it_stands(order):
    parts = [["--rank", "16"], ["--recipe", "small"]][::order]
    args, origin = parse(*parts[0], *parts[1])
    assert args.rank == 16 and origin["rank"] == "flag" and args.rate == 0.5


def test_a_flag_that_repeats_the_default_wins_too():
    args, origin = parse("--recipe=small", "--rank", "8", "--rate=0.1")
    assert (args.rank, args.rate) == (8, 0.1) and origin["rank"] == origin["rate"] == "flag"


def test_flags_without_and_with_several_values():
    args, origin = parse("--recipe", "large", "--deep", "--milestones", "--source", "c")
    assert args.deep is True and args.milestones == [] and args.source == ["c"]
    assert origin["deep"] == origin["milestones"] == origin["source"] == "flag"
    assert parse("--milestones", "3", "5")[0].milestones == [3, 5]


def test_recipes_stay_as_they_are():
    first, _ = parse("--recipe", "small")
    assert first == parse("--recipe", "small")[0] and parse()[0].rank == 8


def test_what_came_from_where_is_told():
    args, origin = parse("--recipe", "small", "--rank", "16", "--milestones", "3", "5", "--deep")
    assert describe_origin(args, origin) == [
        "From --recipe small: rate 0.5, source a b",
        "From the command line: rank 16, milestones 3 5, deep True",
    ]
    assert describe_origin(*parse("--recipe", "large")) == ["From --recipe large: rank 32"]
    args.rank, args.milestones = {None: 0.5}, {"a": 0.1, "b": 0.2}
    assert describe_origin(args, origin)[1] == "From the command line: rank 0.5, milestones a=0.1 b=0.2, deep True"


def test_unknown_recipes_and_bad_values_are_errors(capsys):
    for arguments in (["--recipe", "medium"], ["--rank", "many"], ["--recipe", "small", "--rank", "1.5"]):
        with pytest.raises(SystemExit) as stop:
            parse(*arguments)
        assert stop.value.code == 2
    assert "invalid int value: '1.5'" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="rnak"):
        parse("--recipe", "wrong", recipes={"wrong": {"rnak": 3}})


@pytest.mark.parametrize(
    "kind, good, bad, words",
    [
        (ranges.at_least(1), ["1", "7"], ["0", "-1"], "1 or more"),
        (ranges.at_least(0), ["0", "7"], ["-1"], "0 or more"),
        (ranges.above_zero, ["1e-9", "3"], ["0.0", "-0.5", "nan", "inf"], "above 0"),
        (ranges.not_negative, ["0", "0.0", "3"], ["-1.0", "nan", "inf"], "0 or more"),
        (ranges.fraction, ["0", "0.5", "1"], ["-0.1", "1.1", "nan"], "between 0 and 1"),
        (ranges.share, ["0.5", "1"], ["0.0", "1.1", "nan"], "above 0 and at most 1"),
        (ranges.below_one, ["0", "0.999"], ["1.0", "-0.1"], "between 0 and 1, and below 1"),
        (ranges.seed, ["0", "4294967295"], ["4294967296", "-1"], "0 or more, and below 2^32"),
        (ranges.pixels, ["8", "256"], ["7"], "at least 8 pixels"),
    ],
)
def test_ranges(kind, good, bad, words, capsys):
    parser = flags.Parser("x")
    parser.add("--recipe")
    parser.group("numbers").add("--tau", type=kind)
    assert parser.parse([]).tau is None
    for value in good:
        assert parser.parse(["--tau", value]).tau == float(value)
    for value in bad:
        with pytest.raises(SystemExit) as stop:
            parser.parse([f"--tau={value}"])
        assert stop.value.code == 2 and f"--tau must be {words}, got {value};" in capsys.readouterr().err
    for value in ("many", ""):
        with pytest.raises(SystemExit):
            parser.parse([f"--tau={value}"])
        assert "--tau must be a" in capsys.readouterr().err


def test_a_mistyped_flag_is_told_its_neighbours(capsys):
    parser = flags.Parser("x")
    flags.add_optimizer(parser, learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--learnig_rate", "3"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "unrecognized arguments: --learnig_rate 3; did you mean --learning_rate?" in said


def test_flags_without_effect_are_named_once_they_are_given():
    def notes(*words):
        parser = flags.Parser("x")
        parser.add("--recipe")
        flags.add_optimizer(parser, learning_rate=0.1, weight_decay=0.0)
        flags.add_schedule(parser, milestones=[3])
        flags.add_evaluation(parser, every=1)
        args = parser.parse(list(words))
        assert "eval_batch_size" in args.free_on_resume and "learning_rate" not in args.free_on_resume
        return [line for line in parser.notes(args) if line.startswith("Without effect")]

    assert notes() == notes("--lr_gamma", "0.5") == notes("--rerank", "--k1", "9") == []
    assert notes("--k1", "9") == ["Without effect: --k1 (no --rerank)"]
    assert notes("--optimizer", "sgd", "--adam_beta2", "0.9") == ["Without effect: --adam_beta2 (--optimizer sgd)"]
    assert notes("--lr_scheduler", "cosine", "--lr_gamma", "0.5", "--lr_warmup_steps", "3") == [
        "Without effect: --lr_gamma (--lr_scheduler cosine)"
    ]


def test_schedules_are_those_of_diffusers():
    names = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    assert sorted(STEP_SCHEDULES) == sorted(names)


def test_trackers():
    assert check_trackers(None) == check_trackers(["none"]) == []
    with pytest.raises(ValueError, match="tensorbord is unknown; known: none, aim, .*tensorboard"):
        check_trackers(["none", "tensorbord"])
    ready = {str(one.value) for one in get_available_trackers()}
    for name in LOGGER_TYPE_TO_CLASS:
        if name in ready:
            assert check_trackers(["none", name]) == [name]
        else:
            with pytest.raises(ValueError, match=f"--report_to {name} needs a package that is not installed"):
                check_trackers([name])


def start(tmp_path, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"mixed_precision": "no", "report_to": ["none"], "push_to_hub": False, "allow_tf32": False}
    return start_training(SimpleNamespace(**settings | changes, output_dir=str(tmp_path)))


def test_apples_gpus_are_not_computed_on(tmp_path, monkeypatch, capsys):
    """They do not know float64; and a CPU has no loss scale."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    accelerator = start(tmp_path, mixed_precision="fp16")
    assert accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    assert "fp16 needs a GPU" in capsys.readouterr().out
    assert precision_here("bf16") == "bf16" and precision_here(None) is None


def test_a_card_without_bf16_computes_in_fp16(monkeypatch):
    """As RTX 20: torch would emulate it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision_here("bf16") == precision_here("fp16") == "fp16" and precision_here("no") == "no"
    # A GPU that is not wanted, as by accelerate_configs/cpu.yaml.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision_here("bf16") == "bf16" and precision_here("fp16") == "no"


def test_lines_reach_a_pipe_when_they_are_printed(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(reader) as told, os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        start(tmp_path).print("epoch 0")
        os.set_blocking(reader, False)
        assert [told.readline() for _ in "12"] == ["No GPU found, running on the CPU\n", "epoch 0\n"]


def test_the_accelerator_of_one_process(tmp_path, monkeypatch):
    accelerator = start(tmp_path, mixed_precision="bf16")
    assert accelerator.num_processes == 1 and accelerator.mixed_precision == "bf16"
    args = SimpleNamespace(train_batch_size=8, gradient_accumulation_steps=3)
    assert global_batch_size(args, accelerator) == 24
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(ValueError, match="--push_to_hub needs a login that works: .* `hf auth login`"):
        start(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="--report_to nobody is unknown"):
        start(tmp_path, report_to=["nobody"])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to")
def test_freed_memory_is_used_again_on_the_cpu(tmp_path):
    start(tmp_path)
    block, new_pages = 2**26, []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(block, dtype=torch.uint8)
        new_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # Something small may lie where a block was; then the next one is new.
    assert sum(pages < block // resource.getpagesize() // 2 for pages in new_pages) > 10, new_pages


# Optimisers


def by_hand(name, value, gradients, rate, decay, betas, epsilon):
    """Adam with L2, AdamW, or SGD with momentum on one number."""
    mean = square = 0.0
    for step, gradient in enumerate(gradients, 1):
        if name == "adamw":
            value *= 1 - rate * decay
        else:
            gradient = gradient + decay * value
        if name == "sgd":
            mean = gradient if step == 1 else betas[0] * mean + gradient
            value -= rate * mean
            continue
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        corrected = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
        value -= rate * corrected[0] / (math.sqrt(corrected[1]) + epsilon)
    return value


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimisers_follow_their_formulas(name):
    options = {"weight_decay": 0.3, "betas": (0.8, 0.95), "epsilon": 1e-3}
    first, second = (torch.nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (2.0, -1.0))
    groups = [{"params": [first]}, {"params": [second], "lr": 0.01}]
    optimizer = build_optimizer(groups, name, learning_rate=0.1, **options)
    gradients = [0.5, -1.0, 2.0, 0.1]
    for gradient in gradients:
        first.grad = second.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    for parameter, start, rate in ((first, 2.0, 0.1), (second, -1.0, 0.01)):
        want = by_hand(name, start, gradients, rate, 0.3, (0.8, 0.95), 1e-3)
        assert parameter.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_8_bit_steps_like_adamw_and_keeps_bytes(name):
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    options = {"learning_rate": 1e-2, "weight_decay": 0.1}
    small = build_optimizer([weights[0]], name, use_8bit=True, **options)
    exact = build_optimizer([weights[1]], "adamw", **options)
    for step in range(5):
        gradient = torch.randn(64, 128, generator=torch.Generator().manual_seed(step + 1))
        for weight, optimizer in zip(weights, (small, exact), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = (weights[1] - start).norm()
    assert (weights[0] - weights[1]).norm() < 0.1 * moved
    assert small.state[weights[0]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_8_bit_of_torchao_steps_like_torch_at_the_rates_of_a_schedule(name):
    pytest.importorskip("torchao", reason="pip install torchao, and a C++ compiler")
    # The bias is too small for blocks of 256.
    starts = [torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((64, 128), (128,))]
    sets = [[torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2)]
    options = {"learning_rate": 1e-2, "weight_decay": 0.1}
    optimizers = [
        build_optimizer([{"params": [weight]}, {"params": [bias], "lr": 1e-3}], name, use_8bit=use_8bit, **options)
        for (weight, bias), use_8bit in zip(sets, ("torchao", False), strict=True)
    ]
    rates = [LearningRate(optimizer, milestones=[3], gamma=0.1) for optimizer in optimizers]
    for step in range(5):
        wanted = 1e-2 if step < 3 else 1e-3
        # torchao's are float32.
        assert [rate.set(step, step) for rate in rates] == pytest.approx([wanted] * 2, rel=1e-6)
        for parameters, optimizer in zip(sets, optimizers, strict=True):
            for parameter in parameters:
                generator = torch.Generator().manual_seed(step + 1)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for start, ours, exact in zip(starts, *sets, strict=True):
        assert (ours - exact).norm() < 0.1 * (exact - start).norm()
    torch.testing.assert_close(sets[0][1], sets[1][1], rtol=1e-5, atol=1e-6)
    first, second = (optimizers[0].state[parameter]["exp_avg"] for parameter in sets[0])
    assert first.codes.dtype == torch.uint8 and type(second) is torch.Tensor


def test_8_bit_optimizers_that_are_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="--use_8bit_adam torchao needs torchao .*; pip install torchao"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], learning_rate=0.1, use_8bit="torchao")


def test_8_bit_sgd_is_refused():
    with pytest.raises(ValueError, match="--use_8bit_adam goes with --optimizer adam or adamw, not sgd"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], "sgd", learning_rate=0.1, use_8bit=True)


# Learning rates


def optimizer_of(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return build_optimizer(groups, learning_rate=rates[0])


PUBLISHED = {"warmup_epochs": 10, "warmup_factor": 0.1, "milestones": [30, 50], "gamma": 0.1}


def test_the_rates_of_sixty_epochs():
    optimizer = optimizer_of(5e-6, 5e-5)
    rates = LearningRate(optimizer, **PUBLISHED)
    warm_up = [9.5e-7, 1.4e-6, 1.85e-6, 2.3e-6, 2.75e-6, 3.2e-6, 3.65e-6, 4.1e-6, 4.55e-6]
    want = [*warm_up, *[5e-6] * 20, *[5e-7] * 20, *[5e-8] * 11]
    got = [rates.set(epoch, step=100 * epoch) for epoch in range(1, 61)]
    assert got == pytest.approx(want, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == got[-1]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * got[-1])


def test_without_warm_up_or_milestones_the_rate_stays():
    rates = LearningRate(optimizer_of(0.3))
    assert [rates.set(epoch, 0) for epoch in (1, 2, 500)] == [0.3] * 3


@pytest.mark.parametrize("name", STEP_SCHEDULES)
@pytest.mark.parametrize("rate", [1.0, 5e-6])
def test_diffusers_schedules_are_diffusers_own(name, rate):
    optimizer, theirs = optimizer_of(rate, 3 * rate), optimizer_of(rate, 3 * rate)
    rates = LearningRate(optimizer, name, warmup_steps=4, num_steps=20)
    schedule = get_scheduler(name, theirs, num_warmup_steps=4, num_training_steps=20)
    for step in range(23):
        first = rates.set(epoch=1 + step // 5, step=step)
        assert [group["lr"] for group in optimizer.param_groups] == schedule.get_last_lr()
        assert first == schedule.get_last_lr()[0]
        theirs.step()
        schedule.step()


def test_rates_reach_an_optimiser_whose_state_was_loaded():
    before, after = optimizer_of(0.1, 0.2), optimizer_of(0.1, 0.2)
    LearningRate(before, **PUBLISHED).set(40, 0)
    rates = LearningRate(after, **PUBLISHED)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["lr"] == pytest.approx(0.01)
    for epoch, factor in ((41, 0.1), (50, 0.01), (20, 1.0)):
        assert rates.set(epoch, 0) == pytest.approx(0.1 * factor)
        assert [group["lr"] for group in after.param_groups] == pytest.approx([0.1 * factor, 0.2 * factor])
    # One made after loading starts from the same rates, not from those of the checkpoint's epoch.
    assert LearningRate(after, **PUBLISHED).set(20, 0) == pytest.approx(0.1)


def test_rates_reach_a_prepared_optimiser(accelerator):
    optimizer = accelerator.prepare(optimizer_of(0.1))
    rates = LearningRate(optimizer, "cosine", num_steps=10)
    optimizer.load_state_dict(optimizer.state_dict())
    rates.set(1, 5)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


# The log


def values(step, **changes):
    numbers = {"loss": 1.0 / step, "loss_id": 0.5, "grad_norm": 2.0} | changes
    return {name: torch.tensor(value, requires_grad=name == "loss") for name, value in numbers.items()}


def read(path):
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_whole_and_wait_for_their_number(tmp_path, accelerator):
    log = StepLog(tmp_path / "out" / "log.jsonl", accelerator, every=3)
    log.cut(0)
    written = [log.add(step, 1 + step // 5, 0.1 * step, values(step)) for step in range(1, 8)]
    assert written == [False, False, True, False, False, True, False]
    lines = read(log.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and log.last == lines[-1]
    log.flush()
    log.flush()
    lines = read(log.path)
    assert list(lines[6]) == ["step", "epoch", "lr", "loss", "loss_id", "grad_norm"]
    third = float(torch.tensor(1 / 3))
    assert lines[2] == {"step": 3, "epoch": 1, "lr": 0.1 * 3, "loss": third, "loss_id": 0.5, "grad_norm": 2.0}
    assert len(lines) == 7


@pytest.mark.parametrize("name, value", [("loss", math.nan), ("loss_id", math.inf), ("grad_norm", math.nan)])
def test_a_value_that_is_not_finite_stops_with_step_and_files(tmp_path, accelerator, name, value):
    log = StepLog(tmp_path / "log.jsonl", accelerator, every=4, describe=lambda rows: f"Images: {rows}. ")
    log.cut(0)
    for step in range(1, 4):
        log.add(step, 1, 0.1, values(step, **({name: value} if step == 3 else {})), rows=[f"{step}.jpg"])
    with pytest.raises(ValueError, match=rf"not finite at step 3: {name} {value}\. Images: \['3.jpg'\]\. Lower"):
        log.add(4, 1, 0.1, values(4), rows=["4.jpg"])
    assert [line["step"] for line in read(log.path)] == [1, 2] and log.last["step"] == 2
    assert log.waiting == []


def test_with_a_loss_scale_only_the_norm_may_overflow(tmp_path, accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu")
    log = StepLog(tmp_path / "log.jsonl", accelerator)
    log.cut(0)
    assert log.add(1, 1, 0.1, values(1, grad_norm=math.inf)) and log.add(2, 1, 0.1, values(2))
    assert [line["grad_norm"] for line in read(log.path)] == [None, 2.0]
    with pytest.raises(ValueError, match="step 3: loss nan"):
        log.add(3, 1, 0.1, values(3, loss=math.nan, grad_norm=math.inf))


def test_a_log_is_cut_to_the_checkpoint_s_step(tmp_path, accelerator, capsys):
    log = StepLog(tmp_path / "log.jsonl", accelerator)
    for step in range(1, 7):
        log.add(step, 1, 0.1, values(step))
    before = log.path.read_text().splitlines(keepends=True)
    # A killed run may leave a part of a line.
    with open(log.path, "a") as file:
        file.write('{"step": 7, "epo')
    log.cut(6)
    assert log.path.read_text() == "".join(before)
    # Without its end a line is not whole, whatever stands in it: the next would be glued to it.
    log.path.write_text("".join(before)[:-1])
    log.cut(6)
    assert "has 5 of the 6 lines before the checkpoint: curves have a gap" in capsys.readouterr().out
    assert log.path.read_text() == "".join(before[:5])
    log.cut(4)
    assert log.path.read_text() == "".join(before[:4])
    log.add(5, 1, 0.1, values(5))
    assert log.path.read_text() == "".join(before[:5])
    log.cut(0)
    assert log.path.read_text() == "" and [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_the_log_of_the_run_a_checkpoint_is_of_goes_on_in_another_folder(tmp_path, accelerator):
    first, second = (StepLog(tmp_path / name / "log.jsonl", accelerator) for name in ("one", "two"))
    first.cut(0)
    for step in range(1, 5):
        first.add(step, 1, 0.1, values(step))
    before = first.path.read_text()
    for _ in range(2):
        second.cut(3, beside=first.path)
        assert second.path.read_text() == "".join(before.splitlines(keepends=True)[:3])
        # That folder had another training before.
        second.path.write_text(before.replace("0.1", "0.2"))
    assert first.path.read_text() == before
    second.cut(4, beside=tmp_path / "moved" / "log.jsonl")
    assert "0.2" in second.path.read_text()


@pytest.mark.parametrize("content", ["", "nonsense\n", '["step"]\n', '{"epoch": 1}\n'])
def test_a_log_without_the_checkpoint_s_steps_is_said(tmp_path, accelerator, content, capsys):
    """The checkpoint is whole without it: a folder may have been moved, or a log emptied by mistake."""
    (tmp_path / "log.jsonl").write_text(content)
    log = StepLog(tmp_path / "log.jsonl", accelerator)
    for _ in range(2):
        log.cut(1)
        assert "has 0 of the 1 lines before the checkpoint" in capsys.readouterr().out
        assert log.path.read_text() == ""
        log.path.unlink()


# Stopping


def test_ctrl_c_is_noted_once_and_stops_at_once_the_second_time(accelerator):
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked(accelerator) and stop.number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    stop.close()


WAITING = """
import os, signal, time
from accelerate import Accelerator
from utils.training.log import StopSignal

accelerator, stop = Accelerator(cpu=True), StopSignal()
assert not stop.asked(accelerator)
print("ready", flush=True)
until = time.monotonic() + 60
while not stop.asked(accelerator) and time.monotonic() < until:
    time.sleep(0.005)
print("asked", stop.asked(accelerator), flush=True)
stop.close()
os.kill(os.getpid(), signal.SIGTERM)
print("still there")
"""
TWO = """
import os, signal, sys
import torch
from pathlib import Path
from accelerate import Accelerator
from utils.training.checkpoints import load_checkpoint, read_state, save_checkpoint
from utils.training.log import StepLog, StopSignal; from utils.training.optimizer import build_optimizer

def main():
    accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    log = StepLog(folder / "log.jsonl", accelerator, every=2)
    log.cut(0)
    log.add(1, 1, 0.1, {"loss": torch.tensor(1.0 + rank), "loss_id": torch.tensor(3.0)})
    log.add(2, 1, 0.1, {"loss": torch.tensor(5.0 * rank), "loss_id": torch.tensor(-1.0)})

    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, build_optimizer(model.parameters(), learning_rate=0.1))
    torch.manual_seed(rank)
    path = save_checkpoint(folder, 2, {"script": "two.py"}, model, optimizer, accelerator=accelerator)
    drawn = torch.rand(3)
    torch.manual_seed(99)
    read_state(path, "two.py")
    load_checkpoint(path, model, optimizer, accelerator=accelerator)
    assert torch.equal(torch.rand(3), drawn)

    stop = StopSignal()
    assert not stop.asked(accelerator)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked(accelerator) and (stop.received is not None) == (rank == 1)
    stop.close()
    try:
        log.add(3, 1, 0.1, {"loss": torch.tensor(float("nan") if rank else 1.0), "loss_id": torch.tensor(0.0)})
        log.flush()
    except ValueError as error:
        (folder / f"stopped-{rank}").write_text(str(error))
    accelerator.end_training()


main()
# All is written. Threads of gloo that outlive the interpreter's objects abort the process, once in many runs.
os._exit(0)
"""


def test_sigterm_is_noticed_between_steps_and_given_back(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    waiting = runs.start(tmp_path / "waiting.py")
    ended = runs.stopped(waiting, lambda: "ready\n" in waiting.printed("stdout"), signal.SIGTERM)
    assert ended.stdout == "ready\nasked True\n" and ended.returncode == -signal.SIGTERM


def test_two_processes_log_means_stop_together_and_keep_their_own_random_states(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    runs.torchrun(tmp_path / "two.py", tmp_path)
    assert read(tmp_path / "log.jsonl") == [
        {"step": 1, "epoch": 1, "lr": 0.1, "loss": 1.5, "loss_id": 3.0},
        {"step": 2, "epoch": 1, "lr": 0.1, "loss": 2.5, "loss_id": -1.0},
    ]
    for rank in range(2):
        assert "not finite at step 3: loss nan" in (tmp_path / f"stopped-{rank}").read_text()
        assert (tmp_path / "checkpoint-2" / f"rng-{rank}.pt").is_file()
