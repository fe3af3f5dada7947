"""Points from results files of lm-evaluation-harness."""

import json

import pytest

from pydllm.metrics import read_points


def _results(**changes):
    facts = {"model": "m", "algorithm": "static", "tasks": {"gsm8k": {"tokens_per_forward": 2.5}}}
    scores = {"alias": "gsm8k", "exact_match,strict": 0.5, "exact_match,flexible": 0.75, "acc": 0.1}
    values = {"results": {"gsm8k": scores, "other": {"acc,none": 0.3}}, "config": {"pydllm": facts}}
    return values | changes


def _read(tmp_path, values):
    path = tmp_path / "results_1.json"
    path.write_text(json.dumps(values))
    return read_points(path)


def test_the_best_filter_of_the_first_metric_is_the_accuracy(tmp_path):
    assert _read(tmp_path, _results()) == {"m static": {"gsm8k": [(2.5, 75.0)]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"model": "hf"}}, "expected results of --model pydllm, got another model's"),
        ({"results": {"gsm8k": {"bleu": 3}}}, "gsm8k: expected one of exact_match, acc.* got bleu"),
        ({"results": {}}, "among its metrics, got none"),
        (
            {"config": {"pydllm": {"model": "m", "algorithm": "static", "tasks": {}}}},
            "expected a task with generated answers, got none",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, _results(**changes))
