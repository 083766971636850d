"""The arms of benchmarks.quality.muva, what its sifting chooses, and the table of its runs."""

import json
from types import SimpleNamespace

import pytest

import train_dcac
from benchmarks.common import revision
from benchmarks.quality import muva

CHOSEN = {"texts": 15, "tau": 2, "text_tau": 0.3, "part_tau": 0.3}


def run_of(job, value, dice=None, **more):
    after = {domain: {"mAP": value, "rank1": value} for domain in ("e" if job.part == "sifting" else "bcd")}
    rest = {"dice": dice, "feedback": [], "commit": revision(), "flags": job.flags} | more
    return json.loads(json.dumps(job._asdict() | {"after": after} | rest))


def in_report(arm, seed):
    return muva.Job("report", arm, seed, muva.used(arm, CHOSEN))


def sifted(best):
    """{job: row} of the whole sifting, in which these values are the best on e."""
    runs = {}
    while (found := muva.sifting(runs))[1] is None:
        for job in found[0]:
            word, value = job.chosen[-1]
            runs.setdefault(job, run_of(job, 0.5 + 0.1 * (best[word] == value)))
    return runs


def test_every_arm_is_a_training():
    jobs = [*muva.report(CHOSEN), *sifted(CHOSEN)]
    assert len({job.name for job in jobs}) == len(jobs) == len(muva.ARMS) * len(muva.SEEDS) + 24
    for job in jobs:
        args = train_dcac.parse_args(["--source", muva.SOURCE, *muva.EPOCHS, *job.flags])
        # The condition's captions are of the demo alone.
        assert args.prompt_init == "random"
    (job,) = (job for job in muva.report(CHOSEN) if job.arm == "muva + B" and job.seed == 10)
    args = train_dcac.parse_args(["--source", muva.SOURCE, *muva.EPOCHS, *job.flags])
    assert (args.text_temperature, args.text_tau, args.tau) == (15, 0.3, 0.6)


# What differs from the arm that each is held against.
DIFFERS = {
    "dcac": {"diffusion": ("ldm", "none")},
    "plain images": {"padding": (0, 5), "erasing": (0.0, 0.5), "memory_resample": ("bilinear", "bicubic")},
    "rows": {"part_masks": (["rows"], None)},
    "muva": {"encoder": ("muva", "clip"), "text_temperature": (15.0, 50.0)},
    "muva, crop and erasing": {"padding": (5, 0), "erasing": (0.5, 0.0)},
    "muva, memory predicted": {"memory_masks": ("predicted", "given")},
    "muva, no texts": {"text_weight": (0.0, 1.0), "text_temperature": (50.0, 15.0)},
    "muva + A": {"diffusion": ("ldm", "none"), "tau": (2.0, 0.6)},
    "muva + B": {"diffusion": ("ldm", "none"), "probabilities": ("text", "classifier"), "text_tau": (0.3, 1.0)},
    "muva + C": {"diffusion": ("ldm", "none"), "probabilities": ("parts", "classifier"), "tau": (0.3, 0.6)},
    "muva + A, balance": {"ldm_balance": (0.1, None)},
    "muva + A, no texts": {"diffusion": ("ldm", "none"), "tau": (2.0, 0.6)},
    "muva + A, scratch": {"unet_mode": ("scratch", "lora")},
}


@pytest.mark.parametrize("arm", [arm for arm in muva.ARMS if arm != "baseline"])
def test_an_arm_differs_in_what_its_name_says(arm):
    base = muva.BASES.get(arm, "muva" if arm.startswith("muva") else "baseline")
    own, other = (
        vars(train_dcac.parse_args(["--source", muva.SOURCE, *muva.EPOCHS, *in_report(name, 10).flags]))
        for name in (arm, base)
    )
    found = {name: (own[name], other[name]) for name in own if own[name] != other[name]}
    assert {name: found[name] for name in found if name not in ("origin", "notes")} == DIFFERS[arm]


def test_one_word_is_chosen_after_the_other():
    wanted, chosen = muva.sifting({})
    assert {job.arm for job in wanted} == {"muva"} and len(wanted) == 6 and chosen is None
    runs = sifted(CHOSEN)
    assert muva.sifting(runs)[1] == CHOSEN and len(runs) == 24
    assert {dict(job.chosen)["texts"] for job in runs if job.arm == "muva + A"} == {15}
    last = list(runs)[-1]
    assert muva.sifting({job: run for job, run in runs.items() if job != last})[1] is None


def test_gains_are_of_the_same_seed(tmp_path, capsys):
    said = [{"entropy": 4.0, "top": 0.1, "gradient_ratio": 0.3}, {"entropy": 2.0, "top": 0.5, "gradient_ratio": 0.001}]
    said = {"feedback": said}
    rows = [run_of(in_report("baseline", 10), 0.5), run_of(in_report("baseline", 11), 0.2)]
    rows += [run_of(in_report("muva", 10), 0.6, 0.7), run_of(in_report("muva", 11), 0.4, 0.9)]
    rows += [run_of(in_report("muva + A", 11), 0.5, 0.8, **said), run_of(in_report("plain images", 11), 0.3)]
    file = tmp_path / "muva.json"
    file.write_text(json.dumps({"raw": {"runs": [*sifted(CHOSEN).values(), *rows]}}))
    table = [dict(zip(muva.COLUMNS, row, strict=True)) for row in muva.rows_of(muva.rows_read(file))]
    table = {row["arm"]: row for row in table}
    # 10 and 20 points; Student's factor for two values is 12.7.
    assert table["muva"]["gain of mAP"] == table["muva"]["gain of Rank-1"] == "+15.0 ± 63.5"
    assert (table["muva"]["over"], table["muva"]["mAP over it"], table["muva"]["Dice %"]) == (
        "plain images", "+10.0", "80.0",
    )  # fmt: skip
    assert (table["muva"]["seeds"], table["muva"]["missing"]) == (2, 4)
    of_a = table["muva + A"]
    assert (of_a["over"], of_a["mAP over it"], of_a["Dice over it"]) == ("muva", "+10.0", "-10.0")
    assert (of_a["entropy of p"], of_a["top of p"]) == ("2.00", "0.50") and table["muva"]["top of p"] == "-"
    assert of_a["gradient ratio"] == "1.0e-03"
    assert table["baseline"]["gain of mAP"] == table["baseline"]["over"] == "-"
    muva.main(["--table", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "78 of 108 runs are missing" in printed and "chosen: {'texts': 15" in printed
    assert pytest.approx(100 * 0.5) == muva.mean_of(rows[0], "mAP")
    # Another choice of temperatures: these runs are of other arms.
    other = sifted(CHOSEN | {"tau": 1})
    rest = {job: run for job, run in muva.rows_read(file).items() if job.part == "report"}
    table = {row[0]: row for row in muva.rows_of(other | rest)}
    assert "muva" in table and "muva + A" not in table
    rows[0]["flags"] = ["--seed", "3"]
    file.write_text(json.dumps({"raw": {"runs": rows}}))
    with pytest.raises(ValueError, match="was trained with .*; remove it"):
        muva.rows_read(file)


def test_runs_are_done_once_and_in_their_order(tmp_path, monkeypatch, capsys):
    trained = []

    def train(job, folder):
        trained.append(job)
        return run_of(job, 0.5)

    monkeypatch.setattr(muva, "train", train)
    monkeypatch.setattr(muva, "SEEDS", (10,))
    monkeypatch.setattr(muva, "__spec__", SimpleNamespace(name="benchmarks.quality.muva"), raising=False)
    words = ["--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")]
    muva.main(words)
    assert "0 of 38 runs are missing" in capsys.readouterr().out
    assert len(trained) == len(set(trained)) == 38
    assert [job.part for job in trained] == ["sifting"] * 24 + ["report"] * 14
    muva.main(words)
    assert len(trained) == 38


def test_a_run_that_stops_ends_no_other(tmp_path, monkeypatch, capsys):
    def train(job, folder):
        if job.arm == "plain images" or (job.part, job.arm) == ("report", "muva"):
            raise ValueError("NaN")
        return run_of(job, 0.5)

    monkeypatch.setattr(muva, "train", train)
    monkeypatch.setattr(muva, "SEEDS", (10,))
    monkeypatch.setattr(muva, "__spec__", SimpleNamespace(name="benchmarks.quality.muva"), raising=False)
    words = ["--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")]
    with pytest.raises(ValueError, match="^report-plain-images--10: NaN; report-muva-texts-150-10: NaN$"):
        muva.main(words)
    assert "2 of 38 runs are missing" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows["raw"]["runs"][0]["commit"] = "aa"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="has runs of revision aa, the code here is"):
        muva.main(words)
