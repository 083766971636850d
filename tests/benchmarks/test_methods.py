"""The table of all methods: every run once, a collapse is a result, used time adds up over stops."""

import json

import pytest

import adapt_reid
from benchmarks.common import Run
from benchmarks.quality import methods
from benchmarks.quality.methods import AUTHORS


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the script, which has tests of its own: writes what it leaves, and lists the calls."""
    made = []

    def run_once(script, folder, words, done):
        if (folder / done).exists():
            return None
        args = adapt_reid.parse_args(words)
        made.append((args.method, args.seed))
        folder.mkdir(parents=True, exist_ok=True)
        lost = args.method == "ice" and args.seed == 1
        epochs = [0] if lost else [0, 10]
        history = [{"epoch": epoch, "mAP": 0.2 + 0.01 * epoch, "rank1": 0.5, "rank5": 1} for epoch in epochs]
        (folder / "metrics.json").write_text(json.dumps({"history": history}))
        if lost:
            return Run(1, "", "adapt_reid.py: before epoch 1: the clusters collapsed: all", 1.0, 5.0, 0.5)
        records = [{"epoch": epoch, "clusters": 9, "noise": 0.1, "ari": 0.04 * epoch} for epoch in range(11)]
        (folder / "clusters.json").write_text(json.dumps(records))
        if made.count(made[-1]) == 1 and args.method == "pplr":
            return Run(143, "", "stopped", 1.0, 7.0, 0.25)
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").touch()
        return Run(0, "", "", 1.0, 20.0, 0.5)

    monkeypatch.setattr(methods, "run_once", run_once)
    monkeypatch.setattr(methods, "stored", lambda folder, domain: f"stored/{domain}")
    monkeypatch.setattr(methods, "start_of", lambda folder, start, seed: f"{start} {seed}")
    return made


def test_table_of_methods(calls, tmp_path):
    arguments = [
        "--seeds",
        "0",
        "1",
        "--starts",
        "pre-trained",
        "--runs",
        "HHCL",
        "PPLR",
        "ICE",
        "IDM + XBM, a's labels",
    ]
    arguments += ["--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "methods.json")]
    for _ in range(2):
        with pytest.raises(ValueError, match="adapt_reid.py stopped: stopped; the same command continues"):
            methods.main(arguments)
    methods.main(arguments)
    assert calls == [("hhcl", 0), ("pplr", 0), ("pplr", 0), ("ice", 0), ("idm", 0), ("hhcl", 1), ("pplr", 1),
                     ("pplr", 1), ("ice", 1), ("idm", 1)]  # fmt: skip
    rows = {row[1]: row[2:] for row in json.loads((tmp_path / "methods.json").read_text())["table"]}
    assert rows["HHCL"] == ["20.0 ± 0.0", "30.0 ± 0.0", "50.0 ± 0.0", AUTHORS, "-", "40.0 ± 0.0", "2.0", "0.50", "10"]
    assert rows["PPLR"][6] == "2.7" and rows["PPLR"][7] == "0.50"
    lost = rows["ICE (1 of 2 collapsed)"]
    assert lost[1] == "25.0 ± 7.1" and lost[5] == "40.0" and lost[8] == "0, 10"
    raw = json.loads((tmp_path / "methods.json").read_text())["raw"]["runs"]
    assert [one["collapsed"] for one in raw if one["method"] == "ICE"][1].endswith("the clusters collapsed: all")
    before = len(calls)
    methods.main(arguments)
    assert len(calls) == before


def test_gains_are_of_the_same_seed_start_and_distance():
    def run(method, seed, mAP, start="scratch"):
        rest = {"clusters": [], "collapsed": None, "cpu": 1.0, "gib": 1.0, "epochs": 1}
        return {"start": start, "method": method, "seed": seed, "history": [{"mAP": mAP, "rank1": 0.5}]} | rest

    runs = [run(AUTHORS, 0, 0.2), run(AUTHORS, 1, 0.5), run(AUTHORS, 0, 0.9, "other"), run("cluster contrast", 0, 0.8)]
    runs += [run("ICE", 0, 0.3), run("ICE", 1, 0.7), run("ICE", 2, 0.9)]
    rows = {row[1]: row for row in methods.rows_of(runs) if row[0] == "scratch"}
    # 10 and 20 points; Student's factor for two values is 12.7.
    assert rows["ICE"][5:7] == [AUTHORS, "+15.0 ± 63.5"] and rows[AUTHORS][5:7] == ["cluster contrast", "-60.0"]
    assert rows["cluster contrast"][5:7] == ["-", "-"]
    for name, base in methods.BASES.items():
        own, other = methods.RUNS[name], methods.RUNS[base]
        same = [("--jaccard faiss" in words, "--setting" in words) for words in (own, other)]
        assert same[0][1] == same[1][1] and (same[0] == same[1] or name == AUTHORS or same[0][1])


def test_every_run_can_be_parsed():
    for words in methods.RUNS.values():
        args = adapt_reid.parse_args(f"{methods.WORDS} {words}".split())
        given = words.split()
        assert "--method" not in given or args.method == given[given.index("--method") + 1]


@pytest.mark.slow
def test_clusters_that_collapse_are_a_result(tmp_path, capsys):
    """A run of its own that ends with the script's one line; anything else that goes wrong stops the whole."""
    target = ["--target", "synthetic:domain=b,num_ids=4,images_per_id=4", "--cluster_k1", "6", "--eps", "0.001"]
    small = ["--resolution", "32", "16", "--train_batch_size", "4", "--images_per_id", "2", "--min_samples", "6"]
    for _ in range(2):
        methods.run(tmp_path / "x", [*target, *small])
    said = (tmp_path / "x" / "collapsed.txt").read_text()
    assert "are in no cluster" in said and capsys.readouterr().out.count("adapt_reid.py x") == 1
    found = methods.found_in(tmp_path / "x", "pre-trained", "b, SpCL", 0)
    assert found["collapsed"] == said and len(found["history"]) == 1
    with pytest.raises(
        ValueError, match="adapt_reid.py stopped: .*cannot be clustered by their --cluster_k1 16 nearest"
    ):
        methods.run(tmp_path / "y", [*target, *small, "--cluster_k1", "16"])
