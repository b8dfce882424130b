"""What was taken for what, counted by hand."""

from __future__ import annotations

import json

import pytest
import torch

from pellucid.evaluate import class_report


def test_a_report_counted_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = [0, 0, 1, 1, 1, 0, 2, 1]
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 4).float()
    report = class_report(logits, labels, ["ham", "spam", "eggs", "none"])
    assert report.confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert report.accuracy == pytest.approx(5 / 8)
    assert report.precision == pytest.approx([2 / 3, 2 / 4, 1.0, 0.0])
    assert report.recall == pytest.approx([2 / 3, 1.0, 1 / 3, 0.0])
    assert report.f1 == pytest.approx([2 / 3, 2 / 3, 1 / 2, 0.0])
    assert report.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 4)
    assert (report.support, report.count) == ([3, 2, 3, 0], 8)
    written = json.loads(json.dumps(report.as_dict()))
    assert written["classes"][1]["name"] == "spam"
    assert written["classes"][1]["recall"] == 1.0
    assert written["confusion"] == report.confusion.tolist()


def test_classes_without_names_go_by_their_numbers():
    assert class_report(torch.eye(2), torch.tensor([0, 1])).names == ("0", "1")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"logits \(2, 2\), 3 labels and 2 names"):
        class_report(torch.eye(2), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="0 labels"):
        class_report(torch.empty(0, 2), torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="labels from 0 to 2: expected 0 to 1"):
        class_report(torch.eye(2), torch.tensor([0, 2]))
