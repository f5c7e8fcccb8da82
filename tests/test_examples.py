"""The pictures of an evaluation, given as tensors: in which forms labels may come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pfungst.errors import DataError
from pfungst.examples import open_tensors

X = torch.rand(8, 3, 6, 5)
LABELS = [0, 1, 2, 0, 1, 2, 0, 5]


@pytest.mark.parametrize("labels", [LABELS, tuple(LABELS), np.array(LABELS), torch.tensor(LABELS)])
@pytest.mark.parametrize("as_loader", [False, True])
def test_labels_may_be_a_list_an_array_or_a_tensor(labels: Any, as_loader: bool) -> None:
    given = [(X[:5], labels[:5]), (X[5:], labels[5:])] if as_loader else (X, labels)
    batches = list(open_tensors(given).batches(4))
    assert torch.cat([batch.labels for batch in batches]).tolist() == LABELS
    assert torch.equal(torch.cat([batch.x for batch in batches]), X)


def test_what_is_no_list_of_labels_is_refused_and_says_what_is() -> None:
    with pytest.raises(DataError, match="8 pictures, 3 labels"):
        open_tensors((X, [0, 1, 2]))
    with pytest.raises(DataError) as raised:
        open_tensors((X[0], LABELS))
    assert "labels are indices in a tensor, an array or a list" in raised.value.remedy
