"""benchmarks.quality.dcac_feedback: what is run, what is chosen, how gains are paired; the changed feedback."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from scipy import stats
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import train_dcac
from benchmarks.common import revision
from benchmarks.quality import dcac_feedback as feedback
from benchmarks.quality import feedback_variants
from benchmarks.quality.feedback_variants import OfOthers, Shuffled, TimestepWeights
from benchmarks.quality.shortcut_probe import at_home_of, person_over_place
from tests import runs
from utils.generated.texts.captions import QUESTIONS, compose
from utils.synthetic.world import attributes


def run_of(job, gain=0.0, gain_on_e=0.0):
    """A row whose baseline grows with the seed."""
    after = {domain: {"mAP": 0.4 + 0.01 * job.seed + gain, "rank1": 0.5} for domain in ("b", "c", "d")}
    after["e"] = {"mAP": 0.3 + 0.02 * job.seed + gain_on_e, "rank1": 0.5}
    rest = {"gradient_ratio": 0.1, "gradient_cosine": 0.0, "effective_rank": 9.0, "entropy": 1.0, "top": 0.5}
    rest["another_worse_std"] = 1e-4
    noted = [{"own": own, "another_worse": 0.001 * job.seed, "zero": 0.3} | rest for own in (0.25, 0.2)]
    rest = {
        "commit": revision(),
        "looks_at": {"person": 0.75},
        "flags": job.flags,
        "applied": 0.1 if job.strength != "lambda 1" else None,
    }
    return job._asdict() | {"after": after, "feedback": noted if job.arm != "baseline" else []} | rest


def sifted(gains_on_e):
    """All rows of the sifting; other arms gain nothing on e and much elsewhere."""
    jobs = feedback.jobs_of("sifting")
    return [
        run_of(job, gain=0.1 * (job.arm != "baseline"), gain_on_e=gains_on_e.get((job.arm, job.strength), 0.0))
        for job in jobs
    ]


def test_the_choice_is_the_best_caption_arm_on_the_domain_that_is_not_reported():
    runs = sifted({("captions, end", "balance 0.03"): 0.02, ("permuted, all", "lambda 1"): 0.3})
    assert feedback.choice_of(runs) == ("captions, end", "balance 0.03")
    assert feedback.choice_of(runs[:-1]) is None, "the sifting is not complete"
    jobs = feedback.jobs_of("report", feedback.choice_of(runs))
    assert len(set(jobs)) == len(jobs) == 6 * 4 * 4
    assert {(job.arm, job.strength) for job in jobs} == {
        ("baseline", "lambda 1"), ("published", "lambda 1"), ("captions, end", "balance 0.03"),
        ("permuted, end", "balance 0.03"),
    }  # fmt: skip
    assert not {job.seed for job in jobs} & {0, 1, 2} and not feedback.jobs_of("report")


def test_gains_are_of_the_same_seed_and_what_is_missing_is_counted():
    runs = sifted({})
    base = {seed: feedback.Job("report", "a", 0, "baseline", "lambda 1", seed) for seed in (10, 11, 12)}
    extra = {10: 0.01, 11: 0.04, 13: 0.9}
    runs += [run_of(job) for job in base.values()]
    runs += [
        run_of(feedback.Job("report", "a", 0, "published", "lambda 1", seed), gain) for seed, gain in extra.items()
    ]
    rows = [dict(zip(feedback.COLUMNS, row, strict=True)) for row in feedback.rows_of(runs)]
    (row,) = (row for row in rows if row["part"] == "report" and row["arm"] == "published" and row["targets"] == "b")
    low, high = stats.t.interval(0.95, 1, loc=2.5, scale=stats.sem([1.0, 4.0]))
    assert row["gain of mAP"] == f"+2.5 ± {(high - low) / 2:.1f}" and row["gain of Rank-1"] == "+0.0 ± 0.0"
    assert (row["seeds"], row["missing"]) == (3, 3)
    assert not any(row["gain of mAP"] != "-" for row in rows if row["arm"] == "baseline")


def test_what_the_condition_says_is_a_mean_over_seeds():
    columns, rows = feedback.condition_table(sifted({}))
    # "one caption" has one strength.
    assert len(rows) == len(feedback.SIFTED) * len(feedback.STRENGTHS) - 2, "not of the baseline"
    for row in rows:
        said = dict(zip(columns, row, strict=True))
        assert said["another's more, per mille"] == "2 -> 2.5" and said["noise loss, own"] == "0.25 -> 0.2"
        assert said["zero's more, per mille"] == "200 -> 500" and said["spread over noise"] == "0.4 -> 0.5"
        assert said["seeds"] == 2
        assert said["ratio after balance"] == ("-" if said["strength"] == "lambda 1" else "0.1")


def test_what_the_features_look_at():
    """A model of colours at the middle follows the person, one of the edges the place."""
    images = [at_home_of("a", person, host, index) for index, (person, host) in enumerate(((1, 1), (1, 3), (3, 1)))]
    assert len({image.tobytes() for image in images}) == 3

    def of_pixels(box):
        def extract(images):
            return torch.stack([pil_to_tensor(image.crop(box).resize((4, 4))).flatten().float() for image in images])

        return SimpleNamespace(extract=extract, num_features=48)

    people = range(1, 61, 2)
    person, place = (person_over_place(of_pixels(box), people=people) for box in ((22, 30, 42, 100), (0, 0, 10, 128)))
    assert person["person"] > place["person"] and set(person) == {"person", "same_person", "same_place"}
    rows = [dict(zip(feedback.COLUMNS, row, strict=True)) for row in feedback.rows_of(sifted({}))]
    assert rows[0]["person over place %"] == "75"


def test_own_captions_are_held_against_permuted_ones_of_the_same_seed():
    job = feedback.Job("report", "a", 0, "captions, all", "balance 0.1", 10)
    permuted = [job._replace(arm="permuted, all", seed=seed) for seed in (10, 11)]
    runs = sifted({}) + [run_of(job, 0.05), run_of(permuted[0], 0.02), run_of(permuted[1], 0.9)]
    runs.append(run_of(job._replace(part="remedies", arm="captions, sharp", seed=0), 0.03))
    done = {feedback.job_of(run): run for run in runs}
    assert feedback.gains(done, *job[:5], ["b"], "mAP", "permuted, all") == pytest.approx([3.0])
    # The sifting has one of the pair of a remedy.
    sharp = feedback.Job("sifting", "a", 0, "captions, sharp", "balance 0.1", 0)
    done[sharp._replace(part="remedies", arm="permuted, sharp")] = run_of(sharp, 0.04)
    found = feedback.gains(done, *sharp[:5], ["b"], "mAP", "permuted, sharp")
    assert found == pytest.approx([6.0])


def test_a_row_of_other_flags_is_refused():
    job = feedback.jobs_of("sifting")[1]
    assert feedback.finished_jobs([run_of(job)]) == {job}
    with pytest.raises(ValueError, match="was trained with .*--tau.*; remove it"):
        feedback.finished_jobs([run_of(job) | {"flags": ["--tau", "1"]}])


def test_the_share_after_the_balance_is_that_of_the_last_epoch(tmp_path):
    lines = [{"epoch": epoch, "feedback_ratio": value} for epoch, value in ((1, 0.5), (2, 0.1), (2, 0.2))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert feedback.applied(tmp_path / "log.jsonl") == pytest.approx(0.15)
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "loss": 2.0}\n')
    assert feedback.applied(tmp_path / "log.jsonl") is None


def test_the_report_waits_for_what_another_command_has_of_the_sifting(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "SIFTED", ["captions, all"])
    monkeypatch.setattr(feedback, "STRENGTHS", {"lambda 1": []})
    monkeypatch.setattr(feedback, "REPORT_SEEDS", (10,))
    monkeypatch.setattr(feedback, "__spec__", SimpleNamespace(name="benchmarks.quality.dcac_feedback"), raising=False)
    trained, waited, locked = [], [], feedback.locked
    held = feedback.jobs_of("sifting")[1]

    @contextmanager
    def busy(path, wait=True):
        """Another process holds one run until somebody waits for it."""
        if path.name == f"{held.name}.lock" and not waited:
            waited.extend([path] * wait)
            if not wait:
                yield False
                return
        with locked(path, wait=wait) as mine:
            yield mine

    monkeypatch.setattr(feedback, "locked", busy)
    monkeypatch.setattr(feedback, "train", lambda job, folder: trained.append(job) or run_of(job))
    words = ["--parts", "sifting", "report", "--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "rows")]
    feedback.main(words)
    assert waited and trained.index(held) == 3 and [job.part for job in trained] == ["sifting"] * 4 + ["report"] * 16


def test_rows_are_kept_and_a_run_is_never_done_twice(tmp_path, monkeypatch, capsys):
    arguments = ["--parts", "sifting", "--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(feedback, "SIFTED", ["published"])
    monkeypatch.setattr(feedback, "__spec__", SimpleNamespace(name="benchmarks.quality.dcac_feedback"), raising=False)
    trained = []

    def train(job, folder):
        trained.append(job)
        if len(trained) == 3:
            raise ValueError("stopped")
        return run_of(job)

    monkeypatch.setattr(feedback, "train", train)
    stopped = feedback.jobs_of("sifting")[2]
    with pytest.raises(ValueError, match=f"^{stopped.name}: stopped$"):
        feedback.main(arguments)
    feedback.main([*arguments, "--table"])
    assert "sifting: 1 runs are missing" in capsys.readouterr().out
    first = tmp_path / "out" / "runs" / f"{feedback.jobs_of('sifting')[2].name}.lock"
    with feedback.locked(first) as mine:
        assert mine
        feedback.main(arguments)
    done = [feedback.job_of(run) for run in json.loads((tmp_path / "rows.json").read_text())["raw"]["runs"]]
    jobs = feedback.jobs_of("sifting")
    assert set(jobs) - set(done) == {jobs[2]}, "another process has it"
    assert len(done) == len(set(done)) and trained.count(jobs[0]) == 1


def test_runs_of_several_revisions_are_refused():
    feedback.check_code([{"commit": revision()}, {"commit": f"{revision()}-dirty"}], "rows.json")
    with pytest.raises(ValueError, match="rows.json has runs of revision None, bb, the code here is"):
        feedback.check_code([{"commit": "bb"}, {"commit": revision()}, {"commit": None}], "rows.json")


def test_permuted_captions_leave_none_in_place():
    rows = [{"prompt": str(number), "domain": "ab"[number % 2]} for number in range(50)]
    first, second = (feedback.permuted(rows, seed) for seed in (0, 1))
    for prompts in (first, second):
        assert sorted(prompts, key=int) == [row["prompt"] for row in rows]
        assert not any(prompt == row["prompt"] for prompt, row in zip(prompts, rows, strict=True))
        # Words of another domain would make a worse control.
        assert all(int(prompt) % 2 == int(row["prompt"]) % 2 for prompt, row in zip(prompts, rows, strict=True))
    assert first != second and first == feedback.permuted(rows, 0)


def test_what_the_world_says_of_a_person():
    assert feedback.truth("a", 0) == compose(
        {key: value for key, value in attributes("a", 0).items() if key in QUESTIONS}
    )
    assert len({feedback.truth("a", pid) for pid in range(50)}) > 45


def test_shuffled_feedback_arrives_at_another_identity():
    features = torch.randn(12, 3, requires_grad=True)
    way, norm, classifier = torch.randn(12, 5), nn.BatchNorm1d(3), nn.Linear(3, 5, bias=False)
    encoder = SimpleNamespace(bnneck=norm, classifier=classifier)
    for balance in (None, lambda given: given * 2):
        features.grad = None
        model = SimpleNamespace(balance=balance, encoder=encoder, IMAGES_PER_ID=4)
        logits, _ = Shuffled.condition_inputs(model, features, None, None, warmup=False)
        (logits * way).sum().backward()
        # The plain way, whose gradient is given to the identity before.
        plain = features.detach().clone().requires_grad_()
        scale = 1 if balance is None else 2
        wanted = classifier(norm.train()(scale * plain))
        (gradient,) = torch.autograd.grad((wanted * way).sum(), plain)
        torch.testing.assert_close(logits, wanted)
        torch.testing.assert_close(features.grad, gradient[[*range(8, 12), *range(8)]])
        # Neck and classifier learn nothing of it.
        assert norm.weight.grad is None and classifier.weight.grad is None


def test_a_condition_of_the_others_has_nothing_of_the_own_identity():
    sizes = {"num_ids": 4, "num_features": 3, "width": 6, "tau": 0.5}
    condition = OfOthers("correlation", "classifier", "none", **sizes)
    logits, labels = torch.randn(4, 4), torch.arange(4)
    found = condition(logits, torch.randn(4, 3), labels, None)[:, 0]
    p = (logits / 0.5).softmax(1)
    p[range(4), range(4)] = 0
    torch.testing.assert_close(found, p / p.sum(1, keepdim=True) @ condition.prompts)


def test_timesteps_weigh_as_much_as_the_condition_matters_there():
    weights = TimestepWeights(1000)
    every = torch.arange(0, 1000, 100)
    assert torch.equal(weights(every), torch.ones(10))
    weights.update(torch.tensor([50, 60, 950, 999, 500]), torch.tensor([1.0, 3.0, 6.0, 6.0, -9.0]))
    torch.testing.assert_close(weights(every), 0.5 + torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0, 0, 6.0]) / 1.6)
    weights.update(torch.tensor([50]), torch.tensor([5.0]))
    first = (4 * 0.95 + 5) / (2 * 0.95 + 1)
    torch.testing.assert_close(weights(torch.tensor([0])), 0.5 + torch.tensor([first]) / ((first + 6) / 5))


@pytest.mark.slow
@pytest.mark.parametrize("variant", feedback_variants.VARIANTS)
def test_a_variant_changes_what_its_name_says_and_nothing_else(standins, tmp_path, monkeypatch, variant):
    for name in ("DCAC", "Condition"):
        monkeypatch.setattr(train_dcac, name, getattr(train_dcac, name))
    monkeypatch.setattr(train_dcac, "run_script", train_dcac.main)
    words = ["--source", "synthetic:domain=a,num_ids=6,images_per_id=4", "--target", "synthetic:domain=b,num_ids=3"]
    words += ["--backbone", standins / "clip", "--pretrained_model_name_or_path", standins / "stable-diffusion"]
    words += ["--diffusion_resolution", "64", "64", "--train_batch_size", "8", "--max_train_steps", "1"]
    words = [*map(str, words), "--ldm_balance", "0.1", "--validation_ids", "0", "--cache_dir", str(tmp_path / "cache")]
    runs.run(train_dcac, *words, "--output_dir", tmp_path / "plain")
    AcceleratorState._reset_state(True)
    feedback_variants.main(variant, [*words, "--output_dir", str(tmp_path / "changed")])
    AcceleratorState._reset_state(True)
    (plain,), (changed,) = (runs.log_of(tmp_path / name) for name in ("plain", "changed"))
    different = {name for name in plain if plain[name] != changed[name]}
    # The shuffled gradient is of the same loss.
    losses = set() if variant == "shuffled" else {"loss", "loss_ldm"}
    assert different - {"feedback_scale", "feedback_ratio"} == {"grad_norm", *losses}


def test_a_variant_that_would_change_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(train_dcac, "DCAC", train_dcac.DCAC)
    with pytest.raises(ValueError, match="--encoder muva has a feedback of its own"):
        feedback_variants.main("shuffled", ["--encoder", "muva"])
    monkeypatch.setattr(train_dcac, "DCAC", nn.Linear)
    with pytest.raises(ValueError, match="train_dcac.DCAC is not what Shuffled changes"):
        feedback_variants.main("shuffled", [])
