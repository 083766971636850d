"""Model and data set cards."""

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from utils.reporting.templating import environment


def model_card(title, *, text, command=None, metrics=None, details=None, **metadata):
    """Markdown of a model card. `metrics` is {data set: {"mAP": 0..1, ...}}, `details` a dict shown as a table,
    `command` what made the model where that is known.

    `metadata` goes to `huggingface_hub.ModelCardData`: license, base_model, tags, datasets, library_name,
    pipeline_tag.
    """
    metrics = {data: dict(plain_numbers(values)) for data, values in (metrics or {}).items()}
    results = [
        EvalResult(
            "image-feature-extraction", dataset_type=data, dataset_name=data, metric_type=name, metric_value=value
        )
        for data, values in metrics.items()
        for name, value in values.items()
        if isinstance(value, float)
    ]
    names = {"model_name": title, "eval_results": results} if results else {}
    header = ModelCardData(**metadata, **names).to_yaml()
    return _card(header, title=title, text=text, command=command, metrics=metrics, details=details or {})


def plain_numbers(values):
    """(name, number) of a measurement; of re-ranking and deviations under two names, of each split not."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name} {key}", one) for key, one in value.items() if not isinstance(one, dict))
        elif not isinstance(value, list):
            yield name, value


def data_card(title, *, text, command, details=None, **metadata):
    """Markdown of a data card; `metadata` goes to huggingface_hub's `DatasetCardData`: license, tags and others."""
    header = DatasetCardData(**metadata).to_yaml()
    return _card(header, title=title, text=text, command=command, metrics={}, details=details or {})


def _card(header, **content):
    return environment(autoescape=False).get_template("card.md.j2").render(header=header, **content)
