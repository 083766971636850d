"""What a step of a chain must have left: the number that came out of it; ValueError where that is nonsense.

An outcome is a function of the chain's folder, the step's folder and whether this is the smallest run, whose models
hardly learn: it is checked for what it left, but not for how good that is.
"""

import csv
import json


def expect(condition, words):
    if not condition:
        raise ValueError(words)


def read(path):
    expect(path.is_file(), f"{path} is not there")
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path):
    import pyarrow.parquet as pq

    expect(path.is_file(), f"{path} is not there")
    return pq.read_table(path).to_pylist()


def images_in(folder):
    return [path for path in folder.rglob("*") if path.suffix in (".png", ".jpg")]


def percent(value):
    return f"{100 * value:.1f} %"


def share_of(value, what):
    """The value in percent, if it can be a share at all."""
    expect(isinstance(value, float) and 0 < value <= 1, f"{what} is {value}, not a share above 0")
    return percent(value)


# Generation


def captioned(chain, folder, small):
    captions = rows_of(folder / "captions.parquet")
    expect(captions and all(row["prompt"].strip() for row in captions), f"{folder} has identities without a caption")
    return f"{len(captions)} captions"


def drawn(chain, folder, small):
    rows = rows_of(folder / "metadata.parquet")
    found = len(images_in(folder / "images"))
    expect(rows and len(rows) == found, f"{folder} lists {len(rows)} images and holds {found}")
    return f"{found} images"


def filtered(chain, folder, small):
    rows = rows_of(folder / "scores.parquet")
    kept = sum(row["kept"] for row in rows)
    expect(0 < kept < len(rows), f"{folder}: {kept} of {len(rows)} images are kept")
    return f"{kept} of {len(rows)} images kept"


# Training and measuring


def numbers_of(folder):
    """[(metrics before, metrics after)] of each target of a training."""
    found = {}
    for entry in read(folder / "metrics.json")["history"]:
        found.setdefault(entry["target"], []).append(entry)
    expect(found, f"{folder}: nothing was measured")
    return [(entries[0], entries[-1]) for entries in found.values()]


def trained(chain, folder, small):
    """Measured before and after, whichever is better."""
    ((before, after),) = numbers_of(folder)
    return f"mAP {share_of(before['mAP'], 'mAP before')} to {share_of(after['mAP'], 'mAP after')}"


def improved(chain, folder, small):
    words = trained(chain, folder, small)
    ((before, after),) = numbers_of(folder)
    expect(small or after["mAP"] > before["mAP"], f"{folder}: the training lost, {words}")
    return words


def evaluated(chain, folder, small):
    metrics = read(folder / "metrics.json")
    again = f", re-ranked {share_of(metrics['reranked']['mAP'], 're-ranked mAP')}" if "reranked" in metrics else ""
    return f"mAP {share_of(metrics['mAP'], 'mAP')}{again}"


def as_trained(name):
    """Evaluated from the disk, a model has the numbers that its training, the step `name`, measured last."""

    def outcome(chain, folder, small):
        ((_, after),) = numbers_of(chain / name)
        metrics = read(folder / "metrics.json")
        apart = abs(metrics["mAP"] - after["mAP"])
        expect(apart < 1e-4, f"{folder}: mAP {metrics['mAP']}, but {after['mAP']} at the end of {chain / name}")
        return evaluated(chain, folder, small)

    return outcome


# Folders of one's own


def own_folders(chain, folder, small):
    counts = {part.name: len(images_in(part)) for part in sorted(folder.iterdir())}
    expect(set(counts) == {"people", "wanted", "camera2", "tracklets"}, f"{folder} holds {', '.join(counts)}")
    people = len(list((folder / "people").iterdir()))
    return f"{counts['people']} images of {people} people to train on, {counts['wanted']} wanted"


def held_out(chain, folder, small):
    """No identity is on both sides, and everybody who is looked for is there."""
    from utils.datasets.load import load_reid

    data = load_reid(str(folder))
    train, query, gallery = (set(data[split]["pid"][:]) for split in ("train", "query", "gallery"))
    expect(not train & (query | gallery), f"{folder}: {len(train & query)} identities to train on are measured too")
    expect(
        query and query <= gallery, f"{folder}: of {len(query)} held-out identities {len(query - gallery)} are lost"
    )
    expect(sum(map(len, data.values())) == len(images_in(chain / "own" / "people")), f"{folder} has lost images")
    return f"{len(train)} identities to train on, {len(gallery)} held out"


def fine_tuned(chain, folder, small):
    """Measured on those that were held out and on nobody else."""
    from utils.datasets.load import load_reid

    ((_, after),) = numbers_of(folder)
    queries = len(load_reid(str(chain / "held-out"))["query"])
    expect(after["num_valid"] == queries, f"{folder}: {after['num_valid']} queries, but {queries} were held out")
    return improved(chain, folder, small)


def calibrated(chain, folder, small):
    """Calibrated on the same people; more right pairs than wrong ones pass the threshold."""
    words = as_trained("finetune")(chain, folder, small)
    content, beside = read(folder / "calibration.json"), read(chain / "finetune" / "model" / "calibration.json")
    expect(content == beside, f"{folder}: the model has another calibration")
    limit = content["rates"]["0.1"]
    if small and limit["threshold"] is None:
        return words
    expect(-1 <= limit["threshold"] <= 1, f"{folder}: a threshold of {limit['threshold']} is no cosine")
    right = limit["right_match_rate"]
    expect(small or right > 0.2, f"{folder}: of right pairs {percent(right)} match, of wrong ones 10 %")
    return f"{words}; at 10 % false matches {percent(right)} of right pairs match"


def searched(chain, folder, small):
    """A decision for everybody who is wanted; most of those with a yes are right."""
    with open(folder / "decisions.csv", newline="", encoding="utf-8") as file:
        answers = [row["same_person"] for row in csv.DictReader(file)]
    wanted = len(images_in(chain / "own" / "wanted"))
    counts = read(folder / "metrics.json")["decisions"]
    told = {answer: answers.count(answer) for answer in ("yes", "unsure", "nobody")}
    expect(len(answers) == wanted == sum(told.values()), f"{folder}: {len(answers)} decisions for {wanted} images")
    expect(all(counts[answer] == told[answer] for answer in told), f"{folder}: decisions.csv and metrics.json differ")
    right = counts["right"]
    words = ", ".join(f"{answer} {told[answer]} ({right[answer]} right)" for answer in told)
    expect(small or (told["yes"] and right["yes"] > told["yes"] / 2), f"{folder}: {words} of {wanted} answers")
    expect(small or right["nobody"] > 0, f"{folder}: nobody who is not there was missed, {words}")
    return words


def grouped(chain, folder, small):
    """Fewer identities than tracklets, and better than by chance."""
    metrics = read(folder / "groups.json")
    items, identities, truth = metrics["num_items"], metrics["num_identities"], metrics["truth"]
    places = len(list((chain / "own" / "tracklets").iterdir()))
    expect(items == places, f"{folder}: {items} items of {places} tracklets")
    expect(0 < identities <= items, f"{folder}: {identities} identities of {items} tracklets")
    expect(small or (identities < items and truth["ari"] > 0.1), f"{folder}: ARI {truth['ari']} is that of chance")
    f1 = percent(truth["pairwise"]["f1"])
    return f"{items} tracklets of {truth['num_true_identities']} people in {identities} groups, F1 {f1}"
