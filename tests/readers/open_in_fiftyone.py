"""Import an export into FiftyOne, in a Python that has it and mongomock, and print what it says of it, as JSON.

    FIFTYONE'S_PYTHON tests/readers/open_in_fiftyone.py FOLDER

FiftyOne keeps data sets in MongoDB; mongomock stands in for that, so that no server is needed.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["FIFTYONE_DO_NOT_TRACK"] = "1"

import fiftyone as fo
import fiftyone.core.odm.database as database
import mongoengine
import mongomock
import mongomock.gridfs

mongomock.gridfs.enable_gridfs_integration()
STORE = mongomock.store.ServerStore()


class Client(mongomock.MongoClient):
    """All connections see the same data."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(_store=STORE)


def connect(config: Any) -> None:
    if database._client is None:
        database._client = Client()
        mongoengine.connect("fiftyone", mongo_client_class=Client)


def main(folder: str) -> None:
    database.establish_db_conn = connect
    connect(None)
    dataset = fo.Dataset.from_dir(folder, dataset_type=fo.types.FiftyOneDataset, progress=False)
    maps = dataset.values("relevance.map")
    told = {
        "fields": sorted(dataset.get_field_schema()),
        "findings": dataset.count_values("findings.classifications.label"),
        "tags": dataset.count_sample_tags(),
        "sums": [None if one is None else float(one.sum()) for one in maps],
        "shapes": [None if one is None else list(one.shape) for one in maps],
        "info": dataset.info,
    }
    for name in ("filepath", "ground_truth.label", "prediction.label", "prediction.confidence", "relevance.range"):
        told[name] = dataset.values(name)
    for name in ("score", "x", "cluster"):
        told[name] = dataset.values(name)
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
