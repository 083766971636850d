"""Every file in benchmarks/results has the five parts, and its table is that of its raw numbers."""

import importlib.util
import json
import shlex

import pytest

from benchmarks.common import RESULTS
from benchmarks.evaluation import coverage, grouping, real_people, thresholds
from benchmarks.generated import drawing_ways, filter_truth, standins
from benchmarks.memory import cards, dcac_overhead
from benchmarks.quality import (
    dcac_curves,
    dcac_feedback,
    dcac_synthetic,
    generalisation,
    generated_starts,
    methods,
    pretraining_objectives,
    starts,
)
from benchmarks.robustness import chain
from benchmarks.speed import (
    clustering,
    dcac_step,
    end_to_end,
    filtering,
    generation,
    gpu_retrieval,
    kernel_builds,
    labels,
    loading,
    pretraining,
    retrieval,
    ring,
    ring_threads,
)

FILES = {
    path.relative_to(RESULTS).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(RESULTS.rglob("*.json"))
}


def start_rows(raw):
    return starts.rows_of(raw["runs"], raw["settings"], [starts.SCRATCH, starts.PRETRAINED])


# Name: (columns, rows) of the raw numbers.
TABLES = {
    "chain": lambda raw: (chain.COLUMNS, chain.rows_of(raw["chains"])),
    "chain_small": lambda raw: (chain.COLUMNS, chain.rows_of(raw["chains"])),
    "clustering": lambda raw: clustering.table_of(raw["rows"]),
    "coverage": lambda raw: (coverage.COLUMNS, coverage.rows_of(raw["worlds"])),
    "dcac_curves": lambda raw: dcac_curves.table_of(raw["largest"]),
    "dcac_feedback": lambda raw: (dcac_feedback.COLUMNS, dcac_feedback.rows_of(raw["runs"])),
    "dcac_memory": lambda raw: cards.training_cards(raw["counted"]),
    "dcac_step_cpu_block": lambda raw: dcac_step.table_of(raw["batches"]),
    "dcac_step_cpu_tiny": lambda raw: dcac_step.table_of(raw["batches"]),
    "dcac_step_flops": lambda raw: (dcac_overhead.STEP_COLUMNS, dcac_overhead.step_rows(raw["steps"])),
    "dcac_synthetic": lambda raw: (dcac_synthetic.COLUMNS, dcac_synthetic.rows_of(raw["runs"])),
    "dcac_table": lambda raw: (dcac_overhead.TABLE_COLUMNS, dcac_overhead.table_rows(raw)),
    "drawing_ways": lambda raw: (drawing_ways.COLUMNS, drawing_ways.rows_of(raw["runs"])),
    "filter_truth": lambda raw: filter_truth.table_of(raw["cameras"]),
    "filtering": lambda raw: filtering.table_of(raw["rows"]),
    "generated_starts": lambda raw: (generated_starts.COLUMNS, generated_starts.rows_of(raw["runs"])),
    "generation": lambda raw: generation.table_of(raw["parts"]),
    "generalisation": lambda raw: (generalisation.COLUMNS, generalisation.rows_of(raw["runs"])),
    "gpu/dcac_step": lambda raw: dcac_step.table_of(raw["batches"]),
    "gpu/generation": lambda raw: generation.table_of(raw["parts"]),
    "gpu/pretraining": lambda raw: pretraining.table_of(raw["models"]),
    "gpu/retrieval": lambda raw: (gpu_retrieval.COLUMNS, gpu_retrieval.table_of(raw["rows"])),
    "family_memory": lambda raw: cards.family_cards(raw["counted"]),
    "generation_cost": lambda raw: cards.identity_costs(raw["identities"]),
    "generation_memory": lambda raw: cards.identity_cards(raw["counted"]),
    "grouping": lambda raw: (grouping.COLUMNS, grouping.rows_of(raw["runs"])),
    "kernel_builds": lambda raw: kernel_builds.table_of(raw["rows"]),
    "labels": lambda raw: (labels.COLUMNS, labels.rows_of(raw)),
    "loading": lambda raw: loading.table_of(raw["rows"]),
    "loading_augmentation": lambda raw: loading.augmentation_table(raw["rows"]),
    "methods": lambda raw: (methods.COLUMNS, methods.rows_of(raw["runs"])),
    "pretraining_objectives": lambda raw: (
        pretraining_objectives.COLUMNS,
        pretraining_objectives.rows_of(raw["runs"], dict.fromkeys(run["start"] for run in raw["runs"])),
    ),
    "real_people": lambda raw: (real_people.COLUMNS, real_people.rows_of(raw)),
    "real_people_gt": lambda raw: (real_people.COLUMNS, real_people.rows_of(raw)),
    "end_to_end": lambda raw: (end_to_end.COLUMNS, end_to_end.rows_of(raw)),
    "retrieval": lambda raw: (retrieval.COLUMNS, retrieval.rows_of(raw["rows"])),
    "ring": lambda raw: ring.table_of(raw),
    "ring_threads": ring_threads.table_of,
    "standins": lambda raw: standins.table_of(raw["question_answerer"]),
    "thresholds": lambda raw: (thresholds.COLUMNS, thresholds.rows_of(raw["runs"])),
    "scales": lambda raw: (starts.SCALE_COLUMNS, starts.scale_rows(raw["runs"], raw["settings"], raw["scales"])),
    "starts": lambda raw: (["setting", "number", starts.SCRATCH, starts.PRETRAINED, "gain"], start_rows(raw)),
}
TABLES["starts_high_rate"] = TABLES["starts_by_epoch"] = TABLES["starts"]
# Their rows are what happened.
MEASURED = {"faults", "mutants"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_five_parts(name):
    found = FILES[name]
    assert list(found) == ["environment", "command", "columns", "table", "raw"]
    assert found["table"] and all(len(row) == len(found["columns"]) for row in found["table"])
    words = shlex.split(found["command"])
    assert words[:2] == ["python", "-m"] and importlib.util.find_spec(words[2]), found["command"]
    assert not any(word.startswith("/") for word in words)
    assert {"machine", "python", "torch", "numpy", "revision"} <= set(found["environment"])


@pytest.mark.parametrize("name", sorted(set(FILES) - MEASURED))
def test_a_table_is_that_of_its_raw_numbers(name):
    found = FILES[name]
    columns, rows = TABLES[name](found["raw"])
    assert (found["columns"], found["table"]) == (list(columns), rows)


def test_the_counts_are_readable_as_promised():
    """`--table --json` writes the modes alone; the file of results holds the same under `raw`."""
    assert list(FILES["dcac_table"]["raw"]) == list(dcac_overhead.PAPER)
    for row in FILES["dcac_table"]["raw"].values():
        assert set(row) == {"ours", "paper"} and set(row["ours"]) == set(row["paper"]) == {"params_m", "tflops"}
