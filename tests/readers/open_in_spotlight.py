"""Serve an export with Spotlight, in a Python that has it, and print what its server says of it, as JSON.

SPOTLIGHT'S_PYTHON tests/readers/open_in_spotlight.py FOLDER
"""

from __future__ import annotations

import json
import runpy
import sys
from urllib.request import urlopen

from renumics import spotlight


def main(folder: str) -> None:
    script = runpy.run_path(f"{folder}/show.py", run_name="exported")
    viewer = spotlight.show(
        script["samples"], dtype=script["dtype"], issues=script["issues"], analyze=False, no_browser=True, wait=False
    )

    def get(url: str) -> object:
        with urlopen(f"{viewer.url}api/{url}") as answer:
            return json.load(answer)

    told = {"table": get("table"), "issues": [issue.__dict__ for issue in script["issues"]]}
    viewer.close()
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
