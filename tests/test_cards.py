"""What notebooks show: self-contained, escaped, legible, and never an error."""

from __future__ import annotations

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pfungst
from pfungst import cards, heatmaps
from pfungst.charts import COLOURS
from pfungst.confirmations import Confirmation
from pfungst.evidence import Evidence, Verdict, describe_verdict
from pfungst.facts import tell_views
from pfungst.lrp import Relevance
from pfungst.pipeline import Audit, Finding
from pfungst.regions import Region
from pfungst.store import Run

EVIL = '<script>alert("x")</script>'
VERDICT = Verdict(
    "confirmed", 0.0012, 5.0, Region("fixed", "pixels", 0.1),
    (Evidence("cut:colour", 30, -3.0, -0.5, -2.5, (-3.0, -2.0), 0.0002, -0.4, 0.5, 0.1),), f"all {EVIL} work",
)  # fmt: skip


class Page(HTMLParser):
    """The text, the tags that were opened and closed, and the attributes of a card."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == [], "every tag is closed"
        assert "script" not in self.tags
        for image in self.images:
            assert image["alt"]
            assert str(image["src"]).startswith("data:image/png;base64,")
        assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import", content), "nothing comes from elsewhere"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def picture(self, number: int) -> np.ndarray:
        content = base64.b64decode(str(self.images[number]["src"]).partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content)))


def explain(**how: Any) -> Relevance:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()
    return pfungst.LRP(net, "epsilon")(torch.rand(how.pop("n", 2), 3, 10, 12), **how)


def test_relevance_shows_maps_and_the_balance() -> None:
    result = explain(target=[2, 1])
    page = Page(result._repr_html_())
    maps = result.scores.sum(1).numpy()
    scale = heatmaps.common_scale(maps, 0.995)
    for i in range(2):
        assert np.array_equal(page.picture(i)[::1], heatmaps.enlarge(heatmaps.color(maps[i], scale), size=160))
    assert len(page.images) == 3, "two maps and the colour bar"
    assert "the same scale in all pictures" in page.text
    cells = re.findall(r"<tr>(.*?)</tr>", result._repr_html_())[1:]
    for i, row in enumerate(cells):
        values = re.findall(r"<td[^>]*>(.*?)</td>", row)
        assert values[:2] == [str(i), str([2, 1][i])]
        explained, total, absorbed = map(float, values[2:])
        assert explained == pytest.approx(total + absorbed, rel=2e-3)


def test_only_the_first_samples_are_shown() -> None:
    page = Page(explain(n=20)._repr_html_())
    assert len(page.images) == 5
    assert "and 12 more" in page.text


def test_relevance_that_is_no_picture_or_not_finite_is_told_in_words() -> None:
    result = explain()
    one = torch.zeros(2)
    parts = {f"word{EVIL}": torch.ones(2, 5), "image": result.scores, "mask": None}
    several = Page(Relevance(parts, result.output, None, one, one, {})._repr_html_())
    assert f"relevance of word{EVIL}: 2 x 5" in several.text
    assert len(several.images) == 3
    pair = Page(Relevance((torch.ones(2, 5), None), result.output, EVIL, one, one, {})._repr_html_())
    assert "input 0: 2 x 5" in pair.text
    assert "Σ relevance" in Page(Relevance({"mask": None}, result.output, None, one, one, {})._repr_html_()).text
    broken = Page(Relevance(result.scores * float("nan"), result.output, one, one, one, {})._repr_html_())
    assert "no map: " in broken.text
    assert "nan" in broken.text
    half = Page(Relevance(result.scores.bfloat16(), result.output, one, one, one, {})._repr_html_())
    assert len(half.images) == 3


def test_verdicts_and_confirmations_show_their_evidence() -> None:
    page = Page(VERDICT._repr_html_())
    assert f"all {EVIL} work" in page.text
    assert "confirmed" in page.text
    assert "-3.00 to -2.00" in page.text
    assert "svg" in page.tags
    first = {**describe_verdict(VERDICT), "verdict": "open"}
    model = {"name": EVIL, "digest": "0", "same": False}
    again = Confirmation(
        **vars(VERDICT), finding="f001", seed=7, samples=40, first=first, model=model, same_pictures=None
    )
    told = Page(again._repr_html_()).text
    assert "f001 tested again, seed 7" in told
    assert f"Another model than the run's was asked: {EVIL}." in told
    bare = Verdict("open", 1.0, 0.0, Region("whole", "tint", 1.0), (), "")
    assert "no experiment" in Page(bare._repr_html_()).text


def test_audits_and_findings_show_what_the_run_folder_holds(finished: Path) -> None:
    audit = Audit(Run(finished), None)  # type: ignore[arg-type]
    page = Page(audit._repr_html_())
    for finding in audit.findings:
        assert finding.id in page.text
        assert finding.where["place"] in page.text
    finding = audit.findings[0]
    page = Page(finding._repr_html_())
    assert finding.summary in page.text
    stored = np.asarray(Image.open(finished / finding.exemplars[0]["input"]))
    assert any(np.array_equal(page.picture(i), stored) for i in range(len(page.images)))
    spoiled = {**finding.record, "summary": EVIL, "class": EVIL, "verdict": EVIL, "exemplars": [],
               "judgements": [{"answer": "cheat", "by": EVIL, "note": EVIL, "at": "", "about": ""}]}  # fmt: skip
    assert Page(Finding(spoiled, audit)._repr_html_()).text.count(EVIL) == 6
    assert audit.run.path.name in Page(audit._repr_html_()).text


def test_marks_stand_out_from_light_and_dark_grounds() -> None:
    """WCAG's contrasts: 4.5 for what is written in colour, 3 for marks."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))]  # fmt: skip
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for ground, against in (("light", "#ffffff"), ("dark", "#1c2024")):
        for name, colour in COLOURS[ground].items():
            high, low = sorted((luminance(colour), luminance(against)), reverse=True)
            least = {"rest": 1.5, "accent": 3}.get(name, 4.5)
            assert (high + 0.05) / (low + 0.05) >= least, (ground, name)


# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB: no protan, deutan and tritan cones.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
OKLAB = (
    np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]),
    np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]),
)


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("ground", ["light", "dark"])
def test_groups_are_told_apart_by_the_colour_blind(ground: str, blindness: str) -> None:
    seen = []
    for name in ("g0", "g1", "g2", "g3", "g4", "g5", "rest"):
        colour = np.array([int(COLOURS[ground][name][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        seen.append(OKLAB[1] @ np.cbrt(OKLAB[0] @ np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, None)))
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 0.09, "of 1 between black and white"


def test_words_are_not_broken_where_there_is_no_room(browser: Any, finished: Path) -> None:
    """As wide as a cell of a notebook on a small screen, with names of classes that a column was broken for."""
    run = Run(finished)
    record = run.read_findings()["findings"][0]
    names = ("nucleus", "platelet", "tissue")
    records = [
        {**record, "id": f"f{i:03d}", "class": name, "judgements": [{"answer": "legitimate", "by": "a", "note": ""}]}
        for i, name in enumerate(names)
    ]
    page = browser.new_page(viewport={"width": 460, "height": 600})
    page.set_content(f"<body style='margin:0'>{cards.show_audit(run.describe(), records, run.path)}")
    broken = page.evaluate("""() => {
        const walk = document.createTreeWalker(document.querySelector("table"), NodeFilter.SHOW_TEXT), found = [];
        for (let text = walk.nextNode(); text; text = walk.nextNode())
          for (const word of text.data.matchAll(/\\w+/g)) {
            const range = document.createRange();
            range.setStart(text, word.index);
            range.setEnd(text, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map((one) => one.top)).size > 1) found.push(word[0]);
          }
        return found;
    }""")
    assert broken == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 460, "the table is scrolled, not the page"
    page.close()


def test_views_are_told_in_words() -> None:
    views = ("strongest:features.7", "where", "what:features.7", "what:features.4", "property:blockiness")
    assert tell_views(views) == "place, the channels of features.7 and features.4, blockiness"
    layers = [f"what:layer{i}" for i in range(5)]
    assert tell_views(layers) == "the channels of layer0 and layer1 and layer2 and 2 more layers"
    assert tell_views(["property:colour"]) == "colour"
