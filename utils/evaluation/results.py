"""The results of evaluate.py: its files, and its lines."""

from pathlib import Path

from utils.evaluation.calibration import CALIBRATION, calibration_lines
from utils.evaluation.decisions import COLUMNS, DECISIONS, csv_rows, limits, text_lines
from utils.evaluation.lists import ranking_rows
from utils.evaluation.metrics import RANKS
from utils.files import to_json, write_csv, write_together
from utils.reporting.report import percent

RANKINGS, RERANKED = "rankings.csv", "rankings_reranked.csv"


def write_results(folder, metrics, findings, report, record):
    """Write metrics, ranked lists, calibration or decisions, the report, and `record`, the run's arguments."""
    with write_together(folder) as part:
        part("metrics.json").write_text(to_json(metrics))
        part("args.json").write_text(to_json(record))
        for name, ranked in ((RANKINGS, findings.lists), (RERANKED, findings.reranked_lists)):
            if ranked is not None:
                rows = ranking_rows(findings.queries, findings.gallery, *ranked)
                write_csv(part(name), ("query", "rank", "gallery", "distance", "match"), rows)
        if findings.calibration:
            part(CALIBRATION).write_text(to_json(findings.calibration))
        if findings.decisions:
            write_csv(part(DECISIONS), COLUMNS, csv_rows(findings.decisions, findings.queries, findings.gallery))
        report.write(part("report.html"))
    # A file of an earlier run would not belong to these metrics.
    if findings.reranked_lists is None:
        (Path(folder) / RERANKED).unlink(missing_ok=True)
    if not findings.decisions:
        (Path(folder) / DECISIONS).unlink(missing_ok=True)


def answer_lines(findings, calibration, accepted):
    """What these thresholds are, or, in a search with a `calibration`, the answers at the accepted rate of alarms."""
    if findings.calibration:
        return calibration_lines(findings.calibration)
    if not calibration:
        return []
    lines = text_lines(findings.decisions, findings.queries, findings.gallery, findings.protocol)
    return list(filter(None, [*lines, limits(calibration, len(findings.gallery), accepted)]))


def summary_lines(metrics, folder):
    """The numbers in percent, and where the results are."""
    lines = []
    for name, numbers in (("", metrics), ("re-ranked: ", metrics.get("reranked"))):
        if numbers and numbers["mAP"] is not None:
            shown = {"mAP": numbers["mAP"], "mINP": numbers["mINP"]}
            shown |= {f"Rank-{k}": numbers[f"rank{k}"] for k in RANKS}
            lines.append(name + ", ".join(f"{key} {percent(value)}" for key, value in shown.items()))
    if metrics["mAP"] is None:
        lines.append("No query has a label that the gallery has too: ranked lists, no metrics")
    return [*lines, f"Results: {folder}; open {Path(folder) / 'report.html'}"]


def last_words(line):
    """What is said of a file, with no folders but its own: a report may be passed on."""
    path, colon, reason = line.partition(": ")
    return "/".join(Path(path).parts[-2:]) + colon + reason
