"""Images a second of pre-training, and the share of the device's peak, beside plain training in the same run.

    python -m benchmarks.speed.pretraining --json PRETRAINING.json            # on a GPU: 256x128, batch 512, bf16
    python -m benchmarks.speed.pretraining --size tiny --mixed_precision no   # on a CPU: checks that it runs
    python -m benchmarks.speed.pretraining --recipe                           # the published rates and weight decay

ours: the modules and optimiser of `pretrain_backbone.py`. compiled: the same with --torch_compile. augmented: ours of
images that come as bytes from the CPU and are augmented on the device, as with --augment_on device. plain: the usual
training loop, with torchvision's model in its default memory layout, torchvision's Mixup and CutMix, and the loss read
in every step. All have the same layers (the last stage of a ResNet does not downsample), and but for `augmented` train
on images that are on the device already: `benchmarks.speed.loading` measures loading.
"""

# isort: off
# First, so that bitsandbytes is quiet about our package of kernels.
import utils  # noqa: F401

# isort: on
import argparse
import gc
import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from benchmarks.common import GIB, cell, command_line, step_numbers, step_text, wait, write_result
from pretrain_backbone import Classification, build_optimizer, build_rates
from pretrain_backbone import parse_args as training_args
from utils.batches.device_augmentation import BatchAugmentation
from utils.batches.mixing import Mixing
from utils.modeling.names import open_backbone
from utils.reporting.report import text_table

# (height, width), images a batch, identities of the published set.
SIZES = {"paper": ((256, 128), 512, 5183), "tiny": ((64, 32), 4, 10)}
TORCHVISION = {"resnet50": "resnet50", "swin-t": "swin_t", "swin-s": "swin_s", "swin-b": "swin_b"}
# Dense bfloat16 with float32 sums, TFLOPS, from the makers' data sheets.
DATA_SHEETS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "RTX 4090": 165.2}
WAYS = ("ours", "compiled", "augmented", "plain")
# Column: key of a way's numbers.
COLUMNS = {
    "images/s": "images_per_second",
    "x plain": "times_plain",
    "TFLOPS": "tflops",
    "of a product": "share_of_product",
    "of the data sheet": "share_of_data_sheet",
    "peak GiB": "peak_gib",
}
# Images of the published set, and epochs of its recipe to show.
PUBLISHED_IMAGES, EPOCHS = 777_130, (1, 20, 21, 150, 300)


def arguments(name):
    return training_args(["--recipe", "diff-person", "--source", "none", "--backbone", name])


def plain_model(name, num_ids):
    model = getattr(torchvision.models, TORCHVISION[name])(weights=None, num_classes=num_ids)
    if name == "resnet50":
        for layer in (model.layer4[0].conv2, model.layer4[0].downsample[0]):
            layer.stride = (1, 1)
    return model


def our_model(name, size, num_ids):
    return Classification(open_backbone(name, size, from_scratch=True), num_ids, label_smoothing=0.1)


class Step:
    """One way of training one model, ready to run."""

    def __init__(self, name, way, size, batch, num_ids, dtype, device):
        args = arguments(name)
        torch.manual_seed(0)
        self.way, self.device, self.count, self.size = way, torch.device(device), 0, size
        self.autocast = torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext()
        self.images = torch.randn(batch, 3, *size, device=device)
        self.labels = torch.randint(num_ids, (batch,), device=device)
        if way == "plain":
            self.model = plain_model(name, num_ids).to(device).train()
            self.mixing = v2.RandomChoice(
                [v2.MixUp(alpha=args.mixup, num_classes=num_ids), v2.CutMix(num_classes=num_ids)]
            )
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=args.learning_rate, weight_decay=args.adam_weight_decay
            )
            return
        self.model = our_model(name, size, num_ids).train()
        on_gpu = self.device.type == "cuda"
        self.model.to(device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)
        if way == "compiled":
            self.model.backbone.compile()
        self.augment = None
        if way == "augmented":
            options = {"num_ops": args.randaugment_ops, "magnitude": args.randaugment_magnitude}
            self.augment = BatchAugmentation(size, padding=args.padding, erasing=args.erasing, **options)
            pictures = [Image.effect_noise(size[::-1], 80).convert("RGB") for _ in range(batch)]
            drawn = [self.augment.draw(picture, random.Random(number)) for number, picture in enumerate(pictures)]
            self.bytes = default_collate(drawn)
            if on_gpu:
                self.bytes = {name: tensor.pin_memory() for name, tensor in self.bytes.items()}
        self.mixing = Mixing(args.mixup, args.cutmix)
        self.optimizer = build_optimizer(args, self.model)

    def run(self):
        self.count += 1
        if self.way == "plain":
            images, labels = self.mixing(self.images, self.labels)
            with self.autocast:
                loss = F.cross_entropy(self.model(images), labels, label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.item()
        images = self.augment(self.bytes, self.device) if self.augment else self.images
        with self.autocast:
            loss, _ = self.model(images, self.labels, self.mixing.draw(self.count, self.size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def flops(model, size, batch=2):
    """Of forward and backward of one image, counted on the meta device."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(batch, 3, *size, device="meta")).sum().backward()
    return counter.get_total_flops() / batch


def counted(name, size, num_ids):
    """FLOPs of one image's training in the two ways; ValueError where they are not the same network."""
    with torch.device("meta"):
        ours, plain = our_model(name, size, num_ids), plain_model(name, num_ids)
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, plain)]
    if parameters[0] != parameters[1]:
        raise ValueError(f"{name}: {parameters[0]} parameters of ours, {parameters[1]} of torchvision's")
    # The classifier is a thousandth of the whole.
    return {"ours": flops(ours.backbone, size), "plain": flops(plain, size), "parameters": parameters[0]}


def product_rate(device, dtype, width):
    """TFLOPS of a matrix product on this device."""
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    cuda, times = torch.device(device).type == "cuda", []
    for _ in range(8):
        wait(cuda)
        start = time.perf_counter()
        left @ right
        wait(cuda)
        times.append(time.perf_counter() - start)
    return 2 * width**3 / min(times) / 1e12


def data_sheet(device):
    """The maker's figure for this GPU, None if it is not listed."""
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else ""
    return next((rate for part, rate in DATA_SHEETS.items() if part in name), None)


def measure(args, device, dtype):
    """{model: {way: numbers}}. Each round goes through all ways: other load on the machine meets all of them."""
    size, batch, num_ids = SIZES[args.size]
    batch, cuda = args.batch or batch, device == "cuda"
    found = {}
    for name in args.models:
        work = counted(name, size, num_ids)
        times, memory, last = {way: [] for way in args.ways}, {}, {}
        for number in range(args.rounds):
            for way in args.ways:
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                step = Step(name, way, size, batch, num_ids, dtype, device)
                for _ in range(args.warmup):
                    step.run()
                for _ in range(args.steps):
                    wait(cuda)
                    start = time.perf_counter()
                    loss = step.run()
                    wait(cuda)
                    times[way].append(1000 * (time.perf_counter() - start))
                last[way] = float(loss)
                if cuda:
                    memory[way] = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
                print(f"round {number + 1}/{args.rounds}, {name} {way}: {step_text(times[way])}", flush=True)
                del step
        rows = {way: step_numbers(times[way], batch, memory.get(way), last[way]) for way in args.ways}
        for way, row in rows.items():
            row["gflops_an_image"] = round(work["plain" if way == "plain" else "ours"] / 1e9, 3)
            row["tflops"] = row["images_per_second"] * row["gflops_an_image"] / 1000
        found[name] = {"parameters": work["parameters"], "batch": batch, "size": list(size), "ways": rows}
    return found


def schedule_rows():
    """Rate at the first and last step of some epochs of the recipe, from 1."""
    args = arguments("resnet-small")
    steps = PUBLISHED_IMAGES // args.train_batch_size
    rates = build_rates(args, build_optimizer(args, our_model("resnet-small", (64, 32), 2)), steps)
    ends = [[rates.set(epoch, step) for step in ((epoch - 1) * steps, epoch * steps - 1)] for epoch in EPOCHS]
    return [[epoch, *(f"{rate:.3e}" for rate in both)] for epoch, both in zip(EPOCHS, ends, strict=True)]


def decay_rows(name, size, num_ids):
    """Tensors and millions of numbers by weight decay, and what kinds of tensors they are."""
    with torch.device("meta"):
        model = our_model(name, size, num_ids)
    names = {parameter: key for key, parameter in model.named_parameters()}
    rows = []
    for group in build_optimizer(arguments(name), model).param_groups:
        kinds = Counter(kind_of(model, names[parameter]) for parameter in group["params"])
        numbers = sum(parameter.numel() for parameter in group["params"]) / 1e6
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        rows.append([name, group["weight_decay"], len(group["params"]), f"{numbers:.3f}", listed])
    return rows


def kind_of(model, name):
    """The layer's class and the tensor's name in it: `BatchNorm2d.weight`."""
    place, _, last = name.rpartition(".")
    return f"{type(model.get_submodule(place)).__name__}.{last}"


def print_recipe(args):
    size, _, num_ids = SIZES["paper"]
    print(text_table(["epoch", "first step", "last step"], schedule_rows()) + "\n")
    rows = [row for name in args.models for row in decay_rows(name, size, num_ids)]
    print(text_table(["model", "decay", "tensors", "millions", "kinds"], rows))


def add_shares(found, rate, sheet):
    for model in found.values():
        base = model["ways"].get("plain", {}).get("images_per_second")
        for row in model["ways"].values():
            row["share_of_product"] = round(row["tflops"] / rate, 4)
            if sheet:
                row["share_of_data_sheet"] = round(row["tflops"] / sheet, 4)
            if base:
                row["times_plain"] = round(row["images_per_second"] / base, 4)


def table_of(found):
    rows = [
        [name, way, *(cell(row.get(key)) for key in COLUMNS.values())]
        for name, model in found.items()
        for way, row in model["ways"].items()
    ]
    return ["model", "way", *COLUMNS], rows


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--recipe", action="store_true", help="only print the recipe's rates and decays")
    parser.add_argument("--size", choices=SIZES, default="paper", help="default paper")
    parser.add_argument("--models", nargs="+", choices=TORCHVISION, default=["resnet50", "swin-t"])
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["ours", "augmented", "plain"], help="default all but compiled"
    )
    parser.add_argument("--batch", type=int, help="images a step; default of the size")
    parser.add_argument("--mixed_precision", choices=["bf16", "no"], default="bf16", help="default bf16")
    parser.add_argument("--rounds", type=int, default=3, help="through all ways; default 3")
    parser.add_argument("--steps", type=int, default=10, help="timed in each round; default 10")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them; default 3")
    args = parser.parse_args(input_args)
    if args.rounds * args.steps < 2:
        parser.error("--rounds x --steps must be at least 2, for quartiles")
    if args.batch is not None and (args.batch < 2 or args.batch % 2):
        parser.error(f"--batch {args.batch}: images are mixed in pairs; it must be even")
    return args


def main(input_args=None):
    args = parse_args(input_args)
    if args.recipe:
        return print_recipe(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "no": torch.float32}[args.mixed_precision]
    width = 8192 if device == "cuda" else 512
    rates = [product_rate(device, dtype, width)]
    found = measure(args, device, dtype)
    # The clock of a device sinks when it is warm: the better of before and after.
    rate, sheet = max(*rates, product_rate(device, dtype, width)), data_sheet(device)
    add_shares(found, rate, sheet)
    print(f"\n{text_table(*table_of(found))}")
    print(f"\nproduct: {rate:.2f} TFLOPS of a matrix product of width {width}; sheet: {sheet or 'not known'}")
    if args.json:
        raw = {"device": device, "mixed_precision": args.mixed_precision}
        raw |= {"product_tflops": round(rate, 3), "data_sheet_tflops": sheet, "models": found}
        write_result(args.json, command_line(__spec__.name, input_args), *table_of(found), raw)


if __name__ == "__main__":
    main()
