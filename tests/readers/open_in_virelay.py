"""Open a project in ViRelAy, in a Python that has it, and print what its workspace and its server say of it, as JSON.

VIRELAY'S_PYTHON tests/readers/open_in_virelay.py PROJECT.yaml CATEGORY,... SAMPLE,...
"""

from __future__ import annotations

import json
import sys

from virelay.model import Workspace
from virelay.server import Server


def main(path: str, categories: list[str], samples: list[int]) -> None:
    workspace = Workspace()
    workspace.add_project(path)
    client = Server(workspace, True).app.test_client()

    def get(url: str) -> object:
        response = client.get(f"/api/projects/0{url}")
        assert response.status_code == 200, f"{url}: {response.status_code} {response.get_data(as_text=True)[:300]}"
        return response.get_json() if response.is_json else len(response.get_data())

    told = {"project": get("")}
    told["analyses"] = {
        f"{category}/{clustering}/{embedding}": get(
            f"/analyses/spectral_analysis?category={category}&clustering={clustering}&embedding={embedding}"
        )
        for category in categories
        for clustering in ("findings", "spectral")
        for embedding in ("tsne", "spectral")
    }
    told["samples"] = {
        index: [
            get(f"/dataset/{index}"),
            get(f"/dataset/{index}/image"),
            get(f"/attributions/{index}?imageMode=overlay"),
            get(f"/attributions/{index}/heatmap?colorMap=blue-white-red&superimpose=true"),
            get(f"/attributions/{index}/heatmap?colorMap=gray-red"),
        ]
        for index in samples
    }
    (attributions,) = workspace.get_project(told["project"]["name"]).attributions
    told["relevance"] = {index: attributions.get_attribution(index).data.sum(-1).tolist() for index in samples}
    told["prediction"] = {index: attributions.get_attribution(index).prediction.tolist() for index in samples}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), [int(part) for part in sys.argv[3].split(",")])
