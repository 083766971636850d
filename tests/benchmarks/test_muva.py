"""The arms of benchmarks.quality.muva and the table of its runs."""

import json

import pytest

import train_dcac
from benchmarks.quality import muva


def test_every_arm_is_a_training():
    jobs = muva.jobs()
    assert len({job.name for job in jobs}) == len(jobs) == len(muva.ARMS) * len(muva.SEEDS)
    for words in muva.ARMS.values():
        args = train_dcac.parse_args(["--source", muva.SOURCE, *muva.EPOCHS, *map(str, words)])
        # The condition's captions are of the demo alone.
        assert args.prompt_init == "random"


def test_gains_are_of_the_same_seed(tmp_path, capsys):
    def run(arm, seed, value, dice=None):
        after = {domain: {"mAP": value, "rank1": value} for domain in "bcd"}
        return {"arm": arm, "seed": seed, "after": after, "dice": dice, "feedback": []}

    runs = [run("baseline", 10, 0.5), run("baseline", 11, 0.2), run("muva", 10, 0.6, 0.7), run("muva", 11, 0.4, 0.9)]
    runs.append(run("muva + A", 11, 0.5, 0.8))
    rows = {row[0]: row for row in muva.rows_of(runs)}
    # 10 and 20 points; Student's factor for two values is 12.7.
    assert rows["muva"][1:] == ["50.0", "50.0", "+15.0 ± 63.5", "+15.0 ± 63.5", "-", "0.800", 2, 4]
    assert rows["muva + A"][3] == "+30.0" and rows["muva + A"][5] == "+10.0"
    assert rows["baseline"][3] == "-" and rows["baseline"][6] == "-"
    file = tmp_path / "muva.json"
    file.write_text(json.dumps({"raw": {"runs": runs}}))
    muva.main(["--table", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "79 of 84 runs are missing" in printed and muva.gains({}, "muva", "baseline", "mAP") == []
    assert pytest.approx(100 * 0.5) == muva.mean_of(runs[0], "mAP")
