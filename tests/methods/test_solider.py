"""SOLIDER: controller, plain Swins of a weight, parts and losses against references in float64, whole runs."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from sklearn.cluster import KMeans
from transformers import AutoModel

import finetune_reid
import pretrain_backbone
from methods.dino import SelfDistillation
from methods.solider import Solider, drawn, semantic_parts
from pretrain_backbone import cosine_to, parse_args
from tests import runs
from tests.methods.reference import close, same_steps
from tests.runs import calls_of, launch, log_of, same_weights, weights_of
from utils.launch import start_training
from utils.modeling.backbones import Backbone, load_backbone
from utils.modeling.names import open_backbone
from utils.modeling.networks.semantic_swin import FILE, SemanticSwinBackbone, folded, set_semantic_weight

SIZE = (64, 32)
RUN = [
    *("--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--resolution", "64", "32"),
    *("--objective", "solider"),
    *("--train_batch_size", "8", "--num_train_epochs", "2", "--checkpointing_steps", "2", "--eval_every", "9"),
    *("--local_crops", "1", "--prototypes", "16", "--head_width", "32", "--semantic_weight", "0.3"),
]  # fmt: skip
train, refused = (functools.partial(one, pretrain_backbone) for one in (runs.run, runs.refused))


def a_swin(weight=0.3, seed=0, trained=True):
    torch.manual_seed(seed)
    backbone = SemanticSwinBackbone.on(open_backbone("swin-mini", SIZE, from_scratch=True), "nowhere", weight)
    if trained:
        # Values at which every part of the controller shows.
        with torch.no_grad():
            for name, tensor in backbone.named_parameters():
                if name.startswith("controller") or tensor.dim() == 1:
                    tensor.add_(0.3 * torch.randn_like(tensor))
    return backbone.eval()


def people(count, size=SIZE, seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


# The controller


def expected_map(backbone, images, weights):
    """The formula with `transformers`' own stages in float64."""
    model, controller = copy.deepcopy(backbone.model).double(), copy.deepcopy(backbone.controller).double()
    tokens, grid = model.embeddings(images.double())
    for number, stage in enumerate(model.encoder.layers):
        tokens = stage(tokens, grid, always_partition=True)[0]
        if number < 2:
            rows = []
            for row, weight in zip(tokens, weights.double().tolist(), strict=True):
                pair = torch.tensor([weight, 1 - weight], dtype=torch.float64)
                scale = controller.scales[number].weight @ pair + controller.scales[number].bias
                shift = controller.shifts[number].weight @ pair + controller.shifts[number].bias
                rows.append(row * (1 + scale.exp()).log() + shift)
            tokens, grid = torch.stack(rows), (grid[0] // 2, grid[1] // 2)
    return model.layernorm(tokens).transpose(1, 2).unflatten(2, grid)


def test_each_image_has_its_weight():
    backbone, images, weights = a_swin(), people(4), torch.tensor([0.0, 1.0, 0.3, 0.7])
    with torch.no_grad():
        wanted = expected_map(backbone, images, weights)
        close("SOLIDER map", backbone.feature_map(images, weights), wanted)
        close("SOLIDER features", backbone(images, weights), wanted.mean((2, 3)))
        torch.testing.assert_close(backbone(images)[2:3], backbone(images, weights)[2:3], rtol=1e-4, atol=1e-5)
        assert (backbone(images, 1 - weights) - backbone(images, weights)).abs().max() > 0.1
    assert backbone.feature_map(images).shape == (4, 128, 8, 4)


def test_the_saved_folder_is_a_plain_swin_of_its_weight(tmp_path):
    """In plain `transformers` and here, at a small and an odd size; and of any other weight that is asked for."""
    backbone, images = a_swin(weight=0.2), people(3)
    backbone.save_pretrained(tmp_path)
    plain, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "swin"
    with torch.no_grad():
        wanted = expected_map(backbone, images, torch.full((3,), 0.2))
        tokens = plain.eval()(images).last_hidden_state.transpose(1, 2).unflatten(2, (8, 4))
        torch.testing.assert_close(tokens.double(), wanted, rtol=1e-4, atol=2e-5)
        again = load_backbone(tmp_path, SIZE).eval()
        torch.testing.assert_close(again.feature_map(images).double(), wanted, rtol=1e-4, atol=2e-5)
        odd = people(2, (54, 26))
        torch.testing.assert_close(again.feature_map(odd), backbone.feature_map(odd), rtol=1e-4, atol=2e-5)
        for weight in (0.0, 0.5, 1.0):
            again = load_backbone(tmp_path, SIZE).eval()
            set_semantic_weight(again, tmp_path, weight)
            wanted = expected_map(backbone, images, torch.full((3,), weight))
            torch.testing.assert_close(again.feature_map(images).double(), wanted, rtol=1e-4, atol=2e-5)
        # A pre-training from the folder goes on with its controller.
        again = SemanticSwinBackbone.on(load_backbone(tmp_path, SIZE), tmp_path, 0.9).eval()
        torch.testing.assert_close(again(images, torch.ones(3)), backbone(images, torch.ones(3)))
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot read .*save or copy the backbone again"):
        set_semantic_weight(load_backbone(tmp_path, SIZE), tmp_path, 0.5)


def test_a_reduction_that_cannot_give_the_shift_is_named():
    backbone = a_swin()
    state = dict(backbone.model.state_dict())
    name = "encoder.layers.1.downsample.reduction.weight"
    state[name] = state[name].clone()
    state[name][3] = 0
    with pytest.raises(ValueError, match="after stage 1 has not its full rank"):
        folded(state, backbone.controller, 0.5)


# The parts


def expected_parts(feature_map):
    """As published, with scikit-learn, one image at a time; None without parts."""
    channels, height, width = feature_map.shape
    tokens = feature_map.reshape(channels, -1).T
    lengths = np.linalg.norm(tokens, axis=1, keepdims=True)
    groups = KMeans(2, random_state=0, n_init=10).fit(lengths)
    longer = groups.labels_ == groups.cluster_centers_[:, 0].argmax()
    if longer.sum() <= height * width / 2:
        return None
    found = KMeans(3, random_state=0, n_init=30).fit(tokens[longer]).labels_
    rows = np.arange(height * width)[longer] // width
    order = sorted(range(3), key=lambda part: rows[found == part].mean())
    parts = np.zeros(height * width, dtype=np.int64)
    parts[longer] = [order.index(part) + 1 for part in found]
    return parts.reshape(height, width)


def body_maps(count, noise, seed=0):
    """Maps with a short background and three bands of the body, shuffled a little."""
    rng = np.random.default_rng(seed)
    maps = np.empty((count, 6, 8, 4))
    for number in range(count):
        bands = rng.normal(size=(3, 6)) * 2
        for row in range(8):
            for column in range(4):
                of_body = rng.random() < (0.8 if number % 4 else 0.3)
                maps[number, :, row, column] = bands[min(row // 3, 2)] + 4 if of_body else 0.3
        maps[number] += noise * rng.normal(size=maps[number].shape)
    return maps


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_parts_are_those_of_scikit_learn(noise):
    maps = body_maps(24, noise)
    parts, has_parts = semantic_parts(torch.from_numpy(maps))
    wanted = [expected_parts(one) for one in maps]
    assert has_parts.tolist() == [one is not None for one in wanted] and 5 < has_parts.sum() < 24
    same = [np.array_equal(part, one) for part, one in zip(parts.numpy(), wanted, strict=True) if one is not None]
    # With noise the published random starts may end in another local best.
    assert all(same) if noise < 1 else sum(same) >= 0.8 * len(same)
    assert not parts[~has_parts].any() and {1, 2, 3} <= set(parts.unique().tolist())
    # An image has the same parts in any batch.
    for number in (1, 2, 9):
        alone, _ = semantic_parts(torch.from_numpy(maps[number : number + 1]))
        assert torch.equal(alone[0], parts[number])


def test_maps_without_parts():
    parts, has_parts = semantic_parts(torch.ones(2, 5, 4, 2))
    assert not has_parts.any() and not parts.any()
    # Two tokens are fewer than three parts.
    few = torch.zeros(1, 3, 1, 3)
    few[..., 1:] = 5.0
    assert not semantic_parts(few)[1].any()


def test_draws_belong_to_the_step_and_the_image():
    whole = drawn(3, 7, 8, slice(0, 8), "cpu")
    halves = [drawn(3, 7, 8, share, "cpu") for share in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat([half.weights for half in halves]), whole.weights)
    assert {half.blank for half in halves} == {whole.blank}
    steps = [drawn(3, step, 64, slice(0, 64), "cpu") for step in range(60)]
    assert {one.blank for one in steps} == {1, 2, 3} and set(torch.cat([s.weights for s in steps]).tolist()) == {0, 1}
    assert 0.45 < torch.cat([one.weights for one in steps]).mean() < 0.55


# A step


def a_model(seed=0):
    torch.manual_seed(seed)
    model = Solider(SelfDistillation(a_swin(seed=seed), 16, 32), 32, factor=0.7)
    # No paths are dropped.
    return model.eval()


def expected_logits(model, maps):
    hidden = maps.double().movedim(1, -1)
    layers = copy.deepcopy(model.part_head).double()
    for place in (0, 2):
        hidden = hidden @ layers[place].weight.T + layers[place].bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    code = hidden @ layers[4].weight.T + layers[4].bias
    vectors = model.part_vectors.weight.double()
    return torch.einsum(
        "nhwc,kc->nhwk", code / code.norm(dim=-1, keepdim=True), vectors / vectors.norm(dim=1)[:, None]
    )


def test_a_step_is_the_reference_s():
    student, teacher = a_model(), a_model(seed=1).eval()
    crops = {"whole": people(6).unflatten(0, (3, 2)), "parts": people(3, (32, 16), seed=2)[:, None]}
    weights, blank = torch.tensor([1.0, 0.0, 1.0]), 2
    scores, (parts, has_parts) = teacher.teach(crops["whole"], weights)
    images = crops["whole"].flatten(0, 1)
    with torch.no_grad():
        ones = expected_map(teacher.backbone, images, torch.ones(6)).numpy()
    wanted = [expected_parts(one) for one in ones]
    # The random Swin's own maps have parts in some crops; where they have none, some are made up for the loss.
    assert has_parts.tolist() == [one is not None for one in wanted]
    parts = torch.randint(0, 4, (6, 8, 4), generator=torch.Generator().manual_seed(0))
    has_parts = torch.tensor([True, False, True, True, False, True])
    parts[~has_parts] = 0
    with torch.no_grad():
        told = teacher.backbone(images, weights.repeat_interleave(2))
        code = F.normalize(teacher.distillation.head(told).double(), dim=1)
        cosines = code @ F.normalize(teacher.prototypes.weight.double(), dim=1).T
    close("SOLIDER teacher", scores, cosines.unflatten(0, (3, 2)).transpose(0, 1))

    total, tokens, of_image = 0.0, 0, weights.repeat_interleave(2).double()
    with torch.no_grad():
        for number in range(6):
            if not has_parts[number]:
                continue
            mask = (parts[number] != blank).double().repeat_interleave(8, 0).repeat_interleave(8, 1)
            for image in (images[number] * mask, images[number]):
                maps = expected_map(student.backbone, image[None], of_image[number : number + 1])
                listed = expected_logits(student, maps)[0].log_softmax(-1)
                for row in range(8):
                    for column in range(4):
                        total -= float(of_image[number] * listed[row, column, parts[number, row, column]])
                        tokens += 1
        plain, _ = student.distillation.loss_of(
            torch.cat([student.distillation.scores(crops[name], weights) for name in ("whole", "parts")]), scores, 0.04
        )
    loss, values = student(crops, scores, 0.04, weights, blank, parts, has_parts)
    close("SOLIDER loss_semantic", values["loss_semantic"], total / tokens)
    close("SOLIDER loss", loss, plain.item() + 0.7 * total / tokens)
    assert tokens == 256
    assert values["with_parts"].item() == pytest.approx(4 / 6)
    loss.backward()
    # The head of the parts is in no optimiser; what is before it learns from it.
    assert (
        not any("part_" in name for name, _ in student.named_parameters()) and len(student.part_head.state_dict()) == 6
    )
    assert student.backbone.controller.scales[0].weight.grad.abs().max() > 0
    before = student.backbone.model.layernorm.weight.grad.clone()
    student.zero_grad()
    loss, values = student(crops, scores, 0.04, weights, blank, torch.zeros_like(parts), torch.zeros(6, dtype=bool))
    assert values["loss_semantic"] == 0 and loss.item() == pytest.approx(plain.item(), rel=1e-6)
    loss.backward()
    assert not torch.allclose(before, student.backbone.model.layernorm.weight.grad)


def test_weight_0_learns_no_parts():
    student, teacher = a_model(), a_model(seed=1).eval()
    crops = {"whole": people(4).unflatten(0, (2, 2)), "parts": people(2, (32, 16), seed=2)[:, None]}
    scores, _ = teacher.teach(crops["whole"], torch.zeros(2))
    parts = torch.ones(4, 8, 4, dtype=torch.int64)
    _, values = student(crops, scores, 0.04, torch.zeros(2), 1, parts, torch.ones(4, dtype=bool))
    assert values["loss_semantic"] == 0


# Arguments


def test_published_values():
    args = parse_args(["--recipe", "solider", "--source", "x"])
    assert (args.objective, args.backbone, args.from_scratch) == ("solider", "swin-t", True)
    assert (args.num_train_epochs, args.train_batch_size, args.lr_warmup_epochs) == (100, 384, 10)
    assert (args.learning_rate, args.lr_end) == (pytest.approx(5e-4 * 384 / 256), 1e-6)
    assert (args.adam_weight_decay, args.weight_decay_end, args.max_grad_norm) == (0.04, 0.4, 3.0)
    assert (args.prototypes, args.head_width, args.teacher_temperature) == (65536, 2048, 0.04)
    assert pretrain_backbone.teacher_temperature(args, 1) == 0.04 and args.teacher_momentum == 0.996
    assert (args.whole_area, args.local_area, args.crop_aspects) == ([0.8, 1.0], [0.05, 0.8], [0.4, 0.6])
    assert (args.local_crops, args.colours, args.resolution) == (8, 1.0, [256, 128])
    assert (args.semantic_weight, args.semantic_factor) == (0.2, 1.0)
    after = parse_args(["--recipe", "solider-after-dino", "--source", "x", "--backbone", "there"])
    assert (after.num_train_epochs, after.lr_warmup_epochs, after.from_scratch) == (10, 1, False)
    assert after.learning_rate == pytest.approx(5e-5 * 384 / 256)
    assert parse_args(["--objective", "solider"]).backbone == "swin-mini" and parse_args([]).backbone == "resnet-small"
    dino = parse_args(["--recipe", "diff-person-dino", "--source", "x"])
    assert (dino.teacher_temperature, dino.lr_end, dino.crop_aspects) == (0.07, 0.0, None)


def test_the_rate_ends_where_it_should():
    factor = cosine_to(0.25, 4, 20)
    assert [factor(1, step) for step in (0, 2, 4, 12, 20)] == pytest.approx([0, 0.5, 1, 0.625, 0.25])


def test_each_tensor_is_clipped_by_itself_or_all_by_their_norm(accelerator):
    gradients = [torch.full((4,), 0.25), torch.full((9,), 2.0), torch.tensor([1.0])]
    for each, wanted in ((True, [0.5, 3.0, 1.0]), (False, [3 * norm / 37.25**0.5 for norm in (0.5, 6, 1)])):
        params = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient.clone()
        params.append(torch.nn.Parameter(torch.zeros(2)))
        norm = pretrain_backbone.clipped(accelerator, params, 3.0, each=each)
        assert float(norm) == pytest.approx(37.25**0.5) and params[-1].grad is None
        assert [float(parameter.grad.norm()) for parameter in params[:3]] == pytest.approx(wanted, rel=1e-5)


def test_first_gradients_are_clipped_unless_told_otherwise():
    clips = [pretrain_backbone.parse_args(words).max_grad_norm for words in ([], RUN, [*RUN, "--max_grad_norm", "0"])]
    assert clips == [0, 3, 0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--objective", "solider", "--ema_decay", "0.9"], "the result of solider is its teacher"),
        (["--objective", "solider", "--local_crops", "0"], "must be 1 or more with --objective solider"),
        (["--objective", "solider", "--semantic_weight", "1.5"], "--semantic_weight must be"),
        (
            ["--objective", "solider", "--crop_aspects", "0.6", "0.4"],
            "--crop_aspects must be above 0, the smaller first",
        ),
    ],
)
def test_arguments_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert words in capsys.readouterr().err


# Whole runs


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert train(*RUN, "--output_dir", folder) == 0
    return folder


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_backbone, "open_backbone", None)
    told = refused(*RUN, "--backbone", "resnet50", "--from_scratch", "--output_dir", tmp_path / "out")
    assert "--backbone resnet50 is a resnet, and SOLIDER controls a Swin" in told
    torch.manual_seed(0)
    a_swin().model.save_pretrained(tmp_path / "plain")
    told = runs.refused(
        finetune_reid, "--backbone", tmp_path / "plain", "--semantic_weight", "0.2", "--output_dir", tmp_path / "out"
    )
    assert "has no controller beside it" in told


def test_fine_tuning_asks_for_another_weight(tmp_path):
    backbone = a_swin(weight=0.9)
    backbone.save_pretrained(tmp_path)
    args = finetune_reid.parse_args(
        ["--backbone", str(tmp_path), "--resolution", "64", "32", "--semantic_weight", "0.2"]
    )
    AcceleratorState._reset_state(True)
    finetune_reid.check_start(args.backbone, args.method, args.semantic_weight)
    model = finetune_reid.build_model(args, start_training(args), 3, torch.zeros(3, dtype=torch.int64))
    AcceleratorState._reset_state(True)
    images = people(2)
    with torch.no_grad():
        wanted = backbone(images, torch.full((2,), 0.2))
        torch.testing.assert_close(model.eval().backbone(images), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    lines = log_of(finished)
    names = ["step", "epoch", "lr", "grad_norm", "loss", "teacher_entropy", "loss_semantic", "with_parts"]
    assert len(lines) == 6 and all(list(line) == names for line in lines)
    assert any(line["loss_semantic"] > 0 for line in lines)
    state = runs.load_file(finished / "checkpoint-6" / "model.safetensors")
    teacher = a_swin(trained=False)
    of_teacher = "average.module.distillation.backbone."
    teacher.load_state_dict({n.removeprefix(of_teacher): one for n, one in state.items() if n.startswith(of_teacher)})
    images = people(2)
    with torch.no_grad():
        found = load_backbone(finished / "backbone", SIZE).eval()(images)
        torch.testing.assert_close(found, teacher.eval()(images, torch.full((2,), 0.3)), rtol=1e-4, atol=2e-5)
    # The fixed head is the same at the end, in student and teacher.
    for side in ("model", "average.module"):
        first = runs.load_file(finished / "checkpoint-4" / "model.safetensors")[f"{side}.part_head.0.weight"]
        assert torch.equal(state[f"{side}.part_head.0.weight"], first)
    assert "self-distillation (SOLIDER)" in (finished / "report.html").read_text()


@pytest.mark.slow
def test_a_cut_training_goes_on_to_the_same_numbers(finished, tmp_path):
    common = [*RUN, "--output_dir", tmp_path]
    train(*common, "--max_train_steps", "3")
    train(*common, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    assert same_weights(weights_of(tmp_path, "backbone"), weights_of(finished, "backbone"))


@pytest.fixture(scope="session")
def steady(tmp_path_factory):
    """A run without dropped paths, which are drawn for each process."""
    folder = tmp_path_factory.mktemp("steady")
    torch.manual_seed(0)
    swin = open_backbone("swin-mini", SIZE, from_scratch=True)
    swin.config.drop_path_rate = 0.0
    swin.save_pretrained(folder / "swin")
    # In the four dimensions of a narrow head, rounding shows after two steps.
    common = [*RUN, "--backbone", folder / "swin", "--max_train_steps", "3", "--head_width", "1024"]
    train(*common, "--output_dir", folder / "one")
    return common, folder / "one"


@pytest.mark.slow
def test_two_processes_train_as_one(steady, tmp_path):
    common, one = steady
    launch("pretrain_backbone.py", *common, "--train_batch_size", "4", "--output_dir", tmp_path, processes=2)
    same_steps("solider, two processes", log_of(one), log_of(tmp_path))


@pytest.mark.slow
def test_precisions_and_recomputation(steady, tmp_path, monkeypatch):
    common, one = steady
    asked = calls_of(monkeypatch, Backbone, "enable_gradient_checkpointing")
    for name, more, tolerance in (
        ("bf16", ["--mixed_precision", "bf16"], 0.03),
        ("twice", ["--gradient_checkpointing"], 1e-4),
    ):
        train(*common, *more, "--output_dir", tmp_path / name)
        found = log_of(tmp_path / name)
        assert len(found) == 3 and (name == "twice" or found[0]["loss"] != log_of(one)[0]["loss"])
        assert len(asked) == (name == "twice")
        for left, right in zip(log_of(one)[:1], found[:1], strict=True):
            # With random weights the parts of some crops are others in half precision.
            dino, same = (line["loss"] - line["loss_semantic"] for line in (left, right))
            assert dino == pytest.approx(same, rel=tolerance), name
            assert 0 < right["loss_semantic"] < 2 and (
                name == "bf16" or left["loss_semantic"] == pytest.approx(right["loss_semantic"], rel=tolerance)
            )
