"""What the engine did or will do, as a table for people: which call gets which rule, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from pfungst.lrp.tokens import OutlierTokens


@dataclass
class Step:
    """One call of the model.

    name      module path for calls with parameters ("layer1.0.conv1"), else the function; ":2" for a second call
    kind      convolution, dense, batch_norm, or "" for functions that need no rule of a preset
    rule      the rule with its parameters, and whether it is at the input
    where     file and line of the model's code
    """

    name: str
    function: str
    kind: str = ""
    rule: str = ""
    note: str = ""
    where: str = ""


@dataclass(frozen=True)
class Plan:
    """Result of ``LRP.plan``: printable.

    ``absorbed`` maps a node to the share of the explained output that its bias and stabiliser absorbed (mean over
    samples of absorbed / f); ``total`` is their sum, so that Σ relevance = (1 - total) f.
    ``class_cosine``: cosine between the maps of the two greatest outputs, mean over samples; near 1 the preset
    hardly tells classes apart on this model.
    ``tokens``: of a transformer, the tokens that enter its last layer norm (without the first), with the outliers.
    """

    preset: str
    steps: tuple[Step, ...]
    absorbed: dict[str, float] = field(default_factory=dict)
    class_cosine: float | None = None
    tokens: tuple[str, OutlierTokens] | None = None

    @property
    def total(self) -> float:
        return sum(self.absorbed.values())

    def __str__(self) -> str:
        head = ("node", "function", "rule", "absorbs", "called at", "note")
        rows = [
            (s.name, s.function, s.rule or "-", f"{self.absorbed.get(s.name, 0):+.1%}", s.where, s.note)
            for s in self.steps
            if s.rule or s.note or abs(self.absorbed.get(s.name, 0)) > 5e-4
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.insert(0, f"preset {self.preset}")
        lines.append(f"relevance of the input: {1 - self.total:.1%} of the output; {self.total:.1%} absorbed as listed")
        if self.class_cosine is not None:
            warning = "  (high: these maps hardly depend on the class)" if self.class_cosine > 0.9 else ""
            lines.append(f"cosine of the maps of the two greatest classes: {self.class_cosine:.2f}{warning}")
        if self.tokens is not None and self.tokens[1].share:
            name, found = self.tokens
            lines.append(f"tokens entering {name!r}: {found} (maps point at such patches whatever is on them)")
        return "\n".join(lines)
