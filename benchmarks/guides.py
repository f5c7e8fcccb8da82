"""Tables of benchmarks in the guides, between marks, so that a rerun replaces them."""

from __future__ import annotations


def replace_between(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the marks ``<!-- name -->`` and ``<!-- /name -->`` replaced."""
    before, first, rest = text.partition(f"<!-- {name} -->")
    _, last, after = rest.partition(f"<!-- /{name} -->")
    if not first or not last:
        raise SystemExit(f"the guide has no marks <!-- {name} --> and <!-- /{name} -->")
    return f"{before}{first}\n{content}\n{last}{after}"
