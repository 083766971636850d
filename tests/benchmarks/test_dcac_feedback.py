"""benchmarks.quality.dcac_feedback: what is run, what is chosen, how gains are paired; the changed feedback."""

import json
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from benchmarks.quality import dcac_feedback as feedback
from benchmarks.quality.feedback_variants import Shuffled, TimestepWeights


def run_of(job, gain=0.0, gain_on_e=0.0):
    """A row whose baseline grows with the seed."""
    after = {domain: {"mAP": 0.4 + 0.01 * job.seed + gain, "rank1": 0.5} for domain in ("b", "c", "d")}
    after["e"] = {"mAP": 0.3 + 0.02 * job.seed + gain_on_e, "rank1": 0.5}
    rest = {"gradient_ratio": 0.1, "gradient_cosine": 0.0, "effective_rank": 9.0, "entropy": 1.0, "top": 0.5}
    rest["another_worse_std"] = 1e-4
    noted = [{"own": own, "another_worse": 0.001 * job.seed, "zero": 0.3} | rest for own in (0.25, 0.2)]
    return job._asdict() | {"after": after, "feedback": noted if job.arm != "baseline" else []}


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
    assert len(rows) == len(feedback.SIFTED) * len(feedback.STRENGTHS), "not of the baseline"
    for row in rows:
        said = dict(zip(columns, row, strict=True))
        assert said["another's more, per mille"] == "2 -> 2.5" and said["noise loss, own"] == "0.25 -> 0.2"
        assert said["zero's more, per mille"] == "200 -> 500" and said["spread over noise"] == "0.4 -> 0.5"
        assert said["seeds"] == 2


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
    with pytest.raises(ValueError, match="stopped"):
        feedback.main(arguments)
    feedback.main([*arguments, "--table"])
    assert "sifting: 6 runs are missing" in capsys.readouterr().out
    first = tmp_path / "out" / "runs" / f"{feedback.jobs_of('sifting')[2].name}.lock"
    with feedback.locked(first) as mine:
        assert mine
        feedback.main(arguments)
    done = [feedback.job_of(run) for run in json.loads((tmp_path / "rows.json").read_text())["raw"]["runs"]]
    jobs = feedback.jobs_of("sifting")
    assert set(jobs) - set(done) == {jobs[2]}, "another process has it"
    assert len(done) == len(set(done)) and trained.count(jobs[0]) == 1


def test_runs_of_several_revisions_are_said():
    assert feedback.mixed([{"commit": "aa"}, {"commit": "aa"}]) == []
    assert feedback.mixed([{"commit": "bb"}, {"commit": "aa"}, {"commit": None}]) == [
        "The runs are of 3 revisions, None, aa, bb."
    ]


def test_permuted_captions_leave_none_in_place():
    rows = [{"prompt": str(number)} for number in range(50)]
    first, second = (feedback.permuted(rows, seed) for seed in (0, 1))
    for prompts in (first, second):
        assert sorted(prompts, key=int) == [row["prompt"] for row in rows]
        assert not any(prompt == row["prompt"] for prompt, row in zip(prompts, rows, strict=True))
    assert first != second and first == feedback.permuted(rows, 0)


def test_shuffled_feedback_arrives_at_another_identity():
    features = torch.randn(12, 3, requires_grad=True)
    way = torch.randn(12, 3)
    for balance in (None, lambda given: given * 2):
        features.grad = None
        model = SimpleNamespace(balance=balance, neck_again=lambda given: given, IMAGES_PER_ID=4)
        given = Shuffled.condition_inputs(model, features, None, None, warmup=False)
        (given * way).sum().backward()
        assert torch.equal(given, features if balance is None else 2 * features)
        assert torch.equal(features.grad, (1 if balance is None else 2) * way[[*range(8, 12), *range(8)]])


def test_timesteps_weigh_as_much_as_the_condition_matters_there():
    weights = TimestepWeights(1000)
    every = torch.arange(0, 1000, 100)
    assert torch.equal(weights(every), torch.ones(10))
    weights.update(torch.tensor([50, 60, 950, 999, 500]), torch.tensor([1.0, 3.0, 6.0, 6.0, -9.0]))
    torch.testing.assert_close(weights(every), 0.5 + torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0, 0, 6.0]) / 1.6)
    weights.update(torch.tensor([50]), torch.tensor([5.0]))
    first = (4 * 0.95 + 5) / (2 * 0.95 + 1)
    torch.testing.assert_close(weights(torch.tensor([0])), 0.5 + torch.tensor([first]) / ((first + 6) / 5))
