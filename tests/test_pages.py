"""The pages of `profile --html` and `show -o page.html`: their content, that they ask for nothing, and a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import MICRO, family_checkpoint
from tests.conftest import check_refused, noise_images
from vtexport.measure.pages.page import rendered
from vtexport.measure.pages.profile import labels, profile_page, steps
from vtexport.measure.pages.show import ABSENT, DROPPED, KEPT, MERGED, moments, show_page
from vtexport.measure.profile import STAGES, Report, Side, Stats
from vtexport.measure.show import look_at
from vtexport.models.spec import ViewChoice
from vtexport.runtime.runner import Runner

QUESTION = "what digit is red?"
#: attributes by which a browser fetches something
FETCHING = {
    "src",
    "href",
    "xlink:href",
    "srcset",
    "action",
    "formaction",
    "poster",
    "data",
    "background",
    "ping",
    "cite",
}


class Page(HTMLParser):
    """A page as elements: (tag, attributes, text inside without that of elements in it)."""

    VOID = frozenset({"meta", "link", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert [tag for tag, _, _ in self._open] == [], "an element is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element: tuple[str, dict[str, str], list[str]] = (tag, {name: value or "" for name, value in attributes}, [])
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, f"{tag} closes another element"
        if tag in ("th", "td", "tr"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text.append(data)

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and whole text of the elements `tag` that have all `attributes`."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [(a, "".join(text)) for name, a, text in self.elements if name == tag and wanted.items() <= a.items()]

    def one(self, tag: str, **attributes: str) -> str:
        ((_, text),) = self.find(tag, **attributes)
        return " ".join(text.split())


def values(text: str, section: str) -> list[float]:
    """The exact numbers in the rows with the id `section`, in order."""
    (inside,) = re.findall(rf'<tbody id="{section}".*?</tbody>', text, re.DOTALL)
    return [float(value) for value in re.findall(r'<data value="([^"]*)"', inside)]


def check_asks_for_nothing(text: str, scripts: int) -> Page:
    """No element or style of the page fetches anything, and its policy forbids that."""
    page = Page(text)
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert name not in FETCHING or value.startswith(("data:", "#")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
            assert re.findall(r"url\((?!#)", value) == [], (tag, name, value)
    (style,) = page.find("style")
    assert re.findall(r"url\((?!#)|@import|expression\(", style[1]) == []
    run = [(a, code) for a, code in page.find("script") if a.get("type") != "application/json"]
    assert len(run) == scripts
    for _, code in run:
        assert re.findall(r"fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon|innerHTML|eval\(|https?:", code) == []
    policy = page.find("meta", http_equiv="Content-Security-Policy")[0][0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src ")
    assert page.find("meta", name="viewport")[0][0]["content"] == "width=device-width, initial-scale=1"
    return page


# The report


def side(bundle: str, method: str, keep: float, per_layer: list[int], slower: float) -> Side:
    stages = {
        stage: Stats(round(median * slower, 4), round(1.1 * median * slower, 4), round(1.4 * median * slower, 4))
        for stage, median in zip(STAGES, (2.125, 4.5, 7.25, 13.875, 0.8125), strict=True)
    }
    gflops = {
        stage: flops * slower**1.5
        for stage, flops in {"vision": 0.5, "prefill": 1.25, "first_token": 1.75, "per_token": 0.006}.items()
    }
    return Side(
        bundle, method, keep, sum(per_layer) / len(per_layer), stages, {}, gflops,
        int(1_500_000 * slower), int(400_000_000 * slower), "micro-llava", "onnxruntime", "fp32",
        {"layers": "1"}, {"onnxruntime": "1.2.3"}, 144, per_layer,
    )  # fmt: skip


def report(**changes: Any) -> Report:
    this, against = side("micro", "sparsevlm", 0.25, [144] * 2 + [14] * 10, 1.0), side("d", "dense", 1, [144] * 12, 2.0)
    made = Report("A processor, 2 cores", {"vtexport": "0.1.0"}, 1, 20, 16, 2, 10, this, against, date="2026-11-26")
    made.speedup = dict.fromkeys(STAGES, 2.0)
    made.flops_speedup = dict.fromkeys(this.gflops, 2.828)
    return replace(made, **changes)


def test_the_report_has_every_stage_with_the_numbers_of_the_json() -> None:
    made = report()
    text = profile_page(made)
    check_asks_for_nothing(text, scripts=0)
    told = json.loads(json.dumps(made.to_json()))
    for stage in STAGES:
        stats = [told[name]["stages"][stage][part] for name in ("this", "against") for part in ("median", "p90", "p99")]
        assert values(text, f"time-{stage}") == [told["speedup"][stage], *stats]
    for stage in told["this"]["gflops"]:
        flops = [told[name]["gflops"][stage] for name in ("this", "against")]
        assert values(text, f"flops-{stage}") == [told["speedup"][stage], told["flops_speedup"][stage], *flops]
    for name in ("cache_bytes", "peak_memory_bytes"):
        assert values(text, f"memory-{name}") == [told["this"][name], told["against"][name]]


def test_the_report_draws_each_bar_to_scale() -> None:
    made = report()
    text = profile_page(made)
    slowest = max(stats.p99 for one in (made.this, made.against) for stats in one.stages.values())  # type: ignore[union-attr]
    (prefill,) = re.findall(r'<tbody id="time-prefill".*?</tbody>', text, re.DOTALL)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', prefill)]
    assert widths == pytest.approx([100 * 7.25 / slowest, 100 * 14.5 / slowest], abs=1e-3)


def test_the_report_draws_the_schedule_layer_by_layer() -> None:
    made = report()
    assert [(step.first, step.last, step.tokens) for step in steps(made.this)] == [(0, 1, 144), (2, 11, 14)]
    text = profile_page(made)
    lines = re.findall(r'<path class="line" d="M([^"]*)"', text)
    # The pruned side is drawn last, over the other; 13 units wide, of which one stands for the image.
    points = [tuple(map(float, point.split())) for point in lines[1].split("L")]
    corners = ((0, 144), (1, 144), (1, 144), (3, 144), (3, 14), (13, 14))
    expected = [(100 * x / 13, 100 - 100 * tokens / 144) for x, tokens in corners]
    np.testing.assert_allclose(points, expected, atol=1e-2)
    assert {float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", lines[0])} == {0.0}
    listed = Page(text).one("table", id="schedule")
    assert "before pruning 144 0 to 1 144 2 to 11 14" in listed


def test_the_report_of_one_side_compares_nothing() -> None:
    text = profile_page(report(against=None, speedup={}, flops_speedup={}))
    page = check_asks_for_nothing(text, scripts=0)
    assert "\N{MULTIPLICATION SIGN}" not in text
    assert page.one("h1") == "micro-llava: sparsevlm, keep 0.25"
    assert values(text, "time-vision") == [4.5, 4.95, 6.3]


def test_the_report_lists_what_the_gpu_and_the_layers_took() -> None:
    made = report(layers={"prefill": {"attention<1>": 3.0, "mlp": 1.0, "norm": 0.5}})
    made.this.on_device = {"vision": Stats(1.5, 1.75, 2.0)}
    text = profile_page(made, layers=2)
    page = Page(text)
    rows = [" ".join(row.split()) for _, row in page.find("tr")]
    assert "sparsevlm 0.25 1.50 1.75 2.00" in rows
    assert "attention<1> 3.00 66.7%" in rows
    assert "mlp 1.00 22.2%" in rows
    assert not [row for row in rows if row.startswith("norm")]


def test_the_report_says_under_which_conditions() -> None:
    page = Page(profile_page(report()))
    facts = " ".join(text for _, table in page.find("table", class_="facts") for text in table.split())
    for said in ("A processor, 2 cores", "Batch 1", "Text tokens 20", "New tokens 16", "Runs 10, after 2", "Dtype fp32",
                 "Target onnxruntime", "onnxruntime 1.2.3", "layers 1", "Keep 0.25", "2026-11-26", "Bundle micro",
                 "vtexport 0.1.0", "Threads"):  # fmt: skip
        assert said in facts


def test_text_in_the_report_is_no_markup() -> None:
    made = report()
    made.this.bundle = '</title></td><script>alert("1")</script>'
    made.this.model = "<b>'model'&amp;"
    made.this.method = "<i>a+b"
    page = check_asks_for_nothing(profile_page(made), scripts=0)
    assert page.one("h1") == "<b>'model'&amp;: <i>a+b, keep 0.25, against dense"
    assert page.find("i") == []
    assert ({}, made.this.bundle) in page.find("td")


def test_sides_are_told_apart() -> None:
    one = side("a/x", "fastv", 0.5, [4], 1.0)
    assert labels([one, side("b/y", "dense", 1, [4], 1.0)]) == ["fastv 0.5", "dense"]
    assert labels([one, replace(one, bundle="b/y")]) == ["x", "y"]
    assert labels([one, replace(one, bundle="b/x")]) == ["a/x", "b/x (other)"]


def test_profile_writes_a_page_beside_the_json(vtexport, micro_bundle: Path, tmp_path: Path) -> None:
    outcome = vtexport(
        "profile", micro_bundle, "--against", "dense", "--runs", "2", "--new-tokens", "3",
        "--json", "report.json", "--html", "report.html",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    text, told = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    check_asks_for_nothing(text, scripts=0)
    for stage in STAGES:
        stats = [told[name]["stages"][stage][part] for name in ("this", "against") for part in ("median", "p90", "p99")]
        assert values(text, f"time-{stage}") == [told["speedup"][stage], *stats]
    assert told["this"]["per_layer"] == [36] * 12
    assert told["against"]["per_layer"] == [144] * 12
    assert (told["this"]["target"], told["this"]["dtype"]) == ("onnxruntime", "fp32")
    assert told["this"]["model"] == str(MICRO)
    assert Page(text).one("h1") == "micro-llava: fastervlm, keep 0.25, against dense"
    assert told["this"]["versions"].items() <= told["versions"].items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", told["date"])


def test_pages_that_cannot_be_written_are_refused_before_any_work(
    vtexport, micro_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.html").mkdir()
    show = ["show", micro_bundle, "--image", photo, "-o"]
    for command, message in (
        (["profile", micro_bundle, "--html", "report.htm"], "give a --html that ends in .html"),
        (["profile", micro_bundle, "--html", "nowhere/report.html"], "is not a folder; give another --html"),
        (["profile", micro_bundle, "--html", "folder.html"], "folder.html is a folder; give another --html"),
        ([*show, "nowhere/kept.html"], "is not a folder; give another -o"),
        ([*show, "folder.html"], "folder.html is a folder; give another -o"),
    ):
        check_refused(vtexport(*command), message, tmp_path, ["folder.html"])


def test_templates_are_package_data() -> None:
    names = {file.name for file in files("vtexport.measure.pages").iterdir()}
    assert {"base.html.jinja", "profile.html.jinja", "show.html.jinja", "style.css", "show.js"} <= names


# What a bundle keeps


def cells(path: str) -> set[tuple[int, int]]:
    """The (row, column) of the patches that a path of the page covers."""
    return {
        (int(row), int(column) + i)
        for column, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path)
        for i in range(int(length))
    }


def drawn(text: str, view: int = 0) -> list[dict[str, set[tuple[int, int]]]]:
    """The patches of a view by their class, for every position of the slider."""
    (svg,) = re.findall(rf'<svg class="view" data-view="{view}".*?</svg>', text, re.DOTALL)
    groups = re.findall(r'<g class="moment[^"]*" data-moment="\d+">(.*?)</g>', svg, re.DOTALL)
    return [{kind: cells(path) for kind, path in re.findall(r'class="(\w+)" d="([^"]*)"', group)} for group in groups]


@pytest.fixture(scope="module")
def debug_bundle(build_bundle) -> Path:
    """Two decoder stages with merging behind a vision stage; gives out scores, clusters and raters."""
    return build_bundle(MICRO, 0.2, "fastervlm+sparsevlm", debug=True, method_options={"layers": "2,6"})


def data_of(page: Page) -> Any:
    (found,) = page.find("script", type="application/json")
    return json.loads(found[1])


def test_the_page_shows_the_stages_that_run_reports(vtexport, build_bundle, photo: Path, tmp_path: Path) -> None:
    bundle = build_bundle(MICRO, 0.2, "fastervlm+sparsevlm", method_options={"layers": "2,6"})
    asked = (bundle, "--image", photo, "--prompt", QUESTION)
    shown = vtexport("show", *asked, "-o", "kept.html")
    assert (shown.code, shown.out) == (0, "kept.html\n"), shown.err
    told = json.loads(vtexport("run", *asked, "--json").out)
    text = (tmp_path / "kept.html").read_text()
    page = check_asks_for_nothing(text, scripts=1)
    groups = drawn(text)
    assert len(groups) == 1 + len(told["stages"]) == 4
    every = {(row, column) for row in range(12) for column in range(12)}
    for group, stage in zip(groups[1:], told["stages"], strict=True):
        kept = {tuple(cell) for cell in stage["grid"] if cell is not None}
        assert group["kept"] == kept
        # Without a debug build, nobody knows which patches a merged token is made of.
        assert group["merged"] == set()
        assert group["dropped"] == every - kept
    names = ["before pruning", "vision stage", "after decoder layer 2", "after decoder layer 6"]
    listed = page.one("table", id="stages")
    for name, stage in zip(names[1:], told["stages"], strict=True):
        counts = [stage["in"], stage["kept"], stage["recycled"] or ""]
        assert " ".join(f"{name.removeprefix('after decoder ')} {' '.join(map(str, counts))}".split()) in listed
    # Without its script, the page shows the last stage.
    assert re.findall(r'<g class="moment on" data-moment="(\d)"', text) == ["3"]
    assert page.one("p", id="now").startswith("After decoder layer 6 ")
    assert page.one("p", id="answer") == told["text"]
    assert page.one("h1") == QUESTION
    assert "add --debug to vtexport build" in page.one("p", id="scores")
    assert data_of(page)["views"][0]["scores"] == [None] * 4


def test_a_debug_build_shows_scores_raters_and_what_was_merged(debug_bundle: Path, photo: Path) -> None:
    runner = Runner.open(debug_bundle)
    image = Image.open(photo).convert("RGB")
    shown = look_at(runner, image, QUESTION)
    text = show_page(runner, shown)
    page = check_asks_for_nothing(text, scripts=1)
    data, stages = data_of(page), shown.stages
    assert [stage.where.partition(".")[0] for stage in stages] == ["vision", *["decoder"] * (len(stages) - 1)]
    (view,) = data["views"]
    entering: list[Any] = [divmod(i, 12) for i in range(144)]
    for number, stage in enumerate(stages, start=1):
        score = np.asarray(shown.debug[f"score.{stage.where}"], dtype=float)
        assert len(score) == len(entering)
        assert data["moments"][number]["rated"] == [len(entering)]
        order = list(np.argsort(-score, kind="stable"))
        for place, cell in enumerate(entering):
            if cell is None:
                continue
            patch = cell[0] * 12 + cell[1]
            assert view["scores"][number][patch] == pytest.approx(score[place], rel=1e-3)
            assert view["ranks"][number][patch] == order.index(place) + 1
            # What stays is what ranks first.
            assert (view["states"][number][patch] == KEPT) == (view["ranks"][number][patch] <= stage.kept)
        entering = stage.grid
    # The patches of a merged token are those that its cluster lists.
    first = next(stage for stage in stages if stage.recycled)
    number = stages.index(first) + 1
    cluster = shown.debug[f"cluster.{first.where}"]
    joined = {stages[number - 2].grid[place] for place in np.flatnonzero(cluster >= 0)}
    assert len(joined) >= first.recycled > 0
    assert drawn(text)[number]["merged"] == joined
    groups = moments(shown)[number].groups
    assert len(groups) == first.recycled
    assert {cell[1:] for group in groups for cell in group} == joined
    assert len(set(re.findall(r'class="group" fill="(hsl[^"]*)"', text))) >= first.recycled
    assert "lives on in a merged token" in text
    # Raters: those of the prompt's tokens behind the image that the engine gave.
    prompt = runner.prompter.prompt(QUESTION)
    pieces = runner.prompter.pieces(prompt)
    assert len(pieces) == len(prompt.token_ids)
    raters = [pieces[place] for place in np.flatnonzero(shown.debug["raters"])]
    assert raters
    assert [mark for _, mark in page.find("mark")] == [rater.lstrip() for rater in raters]
    assert QUESTION in page.find("p", id="words")[0][1]
    assert not page.find("p", id="scores")


def test_merged_tokens_are_followed_through_later_stages(debug_bundle: Path, photo: Path) -> None:
    runner = Runner.open(debug_bundle)
    found = moments(look_at(runner, Image.open(photo).convert("RGB"), QUESTION))
    assert len(found) >= 3
    for before, after in pairwise(found):
        assert set(after.own) <= set(before.own)
        assert set(after.merged) <= set(before.own) | set(before.merged)
        assert not set(after.own) & set(after.merged)
        assert after.entering == before.tokens


def test_tiles_lie_as_in_the_image_each_with_its_own_patches(build_bundle, tmp_path_factory) -> None:
    checkpoint = family_checkpoint(tmp_path_factory.mktemp("tiles"), "llava_next-vicuna")
    bundle = build_bundle(
        checkpoint, 0.4, "fastervlm+sparsevlm", views=ViewChoice(grid="2x2"), debug=True, self_check=False
    )
    runner = Runner.open(bundle)
    # Wider than its two by two tiles: the rows above and below it are padding.
    shown = look_at(runner, noise_images(1, (80, 62))[0], QUESTION)
    text = show_page(runner, shown)
    page = check_asks_for_nothing(text, scripts=1)
    lines = [re.findall(r'data-view="(\d)"', line) for line in text.split('<div class="line">')[1:]]
    assert lines == [["0"], ["1", "2"], ["3", "4"]]
    data = data_of(page)
    for view in range(5):
        groups, states = drawn(text, view), data["views"][view]["states"]
        for number, stage in enumerate(shown.stages, start=1):
            kept = {cell[1:] for cell in stage.grid if cell is not None and cell[0] == view}
            assert groups[number]["kept"] == kept
            assert {divmod(i, 5) for i, state in enumerate(states[number]) if state == KEPT} == kept
        # Padding is rated nowhere, and is never there; the base view has none.
        absent = {i for i, state in enumerate(states[0]) if state == ABSENT}
        assert bool(absent) == (view > 0)
        assert {i for i, score in enumerate(data["views"][view]["scores"][1]) if score is None} == absent
        assert all({i for i, state in enumerate(row) if state == ABSENT} == absent for row in states)
        # Every view is pruned by itself: the ranks of its patches, padding aside, start at 1, and the first ones stay.
        ranks = [rank for rank in data["views"][view]["ranks"][1] if rank is not None]
        assert sorted(ranks) == list(range(1, data["moments"][1]["rated"][view] + 1))
        kept = [state == KEPT for state in states[1]]
        best = [rank is not None and rank <= sum(kept) for rank in data["views"][view]["ranks"][1]]
        assert kept == best
    # Newlines are tokens without a patch.
    assert data["moments"][0]["tokens"] > sum(view["states"][0].count(KEPT) for view in data["views"])


def test_a_method_without_scores_does_not_promise_any(build_bundle, photo: Path) -> None:
    image = Image.open(photo).convert("RGB")
    for method, keep, said in (("random", 0.25, "Method random gives no scores."), ("dense", 1.0, None)):
        runner = Runner.open(build_bundle(MICRO, keep, method))
        text = show_page(runner, look_at(runner, image))
        page = check_asks_for_nothing(text, scripts=1)
        assert [text for _, text in page.find("p", id="scores")] == ([] if said is None else [said])
        assert page.one("h1") == f"What {method} keeps of an image"
        assert not page.find("p", id="answer")
        assert len(drawn(text)) == (1 if said is None else 2)


def test_what_merges_every_patch_keeps_none(build_bundle, photo: Path) -> None:
    runner = Runner.open(build_bundle(MICRO, 0.15, "pool"))
    text = show_page(runner, look_at(runner, Image.open(photo).convert("RGB")))
    assert drawn(text)[1]["kept"] == set()
    assert len(drawn(text)[1]["dropped"]) == 144
    assert Page(text).one("table", id="stages").endswith("before pruning 144 vision stage 144 0 20")


def test_a_question_and_an_answer_are_no_markup(vtexport, debug_bundle: Path, photo: Path, tmp_path: Path) -> None:
    question = """</script><script>alert("1 & 'one'")</script> what digit is red?"""
    outcome = vtexport("show", debug_bundle, "--image", photo, "--prompt", question, "-o", "kept.html")
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "kept.html").read_text()
    page = check_asks_for_nothing(text, scripts=1)
    assert page.one("h1") == question
    assert question in page.find("p", id="words")[0][1]
    assert "<script>alert" not in text
    # The answer and names of bundles come out of files that others may have written.
    shown = replace(
        look_at(Runner.open(debug_bundle), Image.open(photo).convert("RGB"), QUESTION), answer="<img src=x>"
    )
    page = check_asks_for_nothing(show_page(Runner.open(debug_bundle), shown), scripts=1)
    assert page.one("p", id="answer") == "<img src=x>"


def test_values_that_a_template_names_must_be_there() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        rendered("profile.html.jinja", {"report": report()})


# Colours


def colours(dark: bool) -> dict[str, tuple[float, ...]]:
    style = files("vtexport.measure.pages").joinpath("style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    found: dict[str, tuple[float, ...]] = {}
    for block in blocks if dark else blocks[:1]:
        for name, value in re.findall(r"--(\w+): #(\w{6});", block):
            found[name] = tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return found


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_far_enough_apart(dark: bool) -> None:
    found = colours(dark)
    assert {"ground", "ink", "soft", "rule", "wash", "this", "other"} <= set(found)
    for name, least in (("ink", 7), ("soft", 4.5), ("this", 4.5), ("other", 3)):
        assert contrast(found[name], found["ground"]) >= least, name
    assert contrast(found["ink"], found["wash"]) >= 7


# A browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, of Playwright's or the system's; tests that need it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright, and Chromium")
    with playwright.sync_playwright() as running:
        own = Path(running.chromium.executable_path)
        system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not own.is_file() and system is None:
            pytest.skip("needs Chromium: playwright install chromium, or the system's package")
        opened = running.chromium.launch(executable_path=None if own.is_file() else system, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page in the browser, and what it asked for and complained about."""

    def __init__(self, browser: Any, path: Path, width: int, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def leave(self, path: Path) -> None:
        """Close the page, which asked for itself alone and complained about nothing."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith("data:")] == [path.as_uri()]
        self.page.close()

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, debug_bundle: Path) -> dict[str, Path]:
    """A page of each kind, with names as long as they come."""
    folder = tmp_path_factory.mktemp("written")
    made, runner = (
        report(layers={"prefill": {"/model/layers.10/self_attn/attention_with_a_long_name": 2.0}}),
        Runner.open(debug_bundle),
    )
    made.this.bundle = "/srv/models/" + "a-long-folder-name-without-any-space/" * 3
    made.this.model = "llava-hf/llava-v1.6-mistral-7b-hf"
    shown = look_at(runner, noise_images(1)[0], "what digit is red, and which digits stand to the left of it?")
    pages = {"report": profile_page(made, 3), "kept": show_page(runner, shown)}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["report", "kept"])
def test_a_browser_shows_the_page(browser, written: dict[str, Path], name: str, width: int, scheme: str) -> None:
    visit = Visit(browser, written[name], width, color_scheme=scheme)
    assert visit.overflow() <= 0
    ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    expected = tuple(round(255 * part) for part in colours(scheme == "dark")["ground"])
    assert ground == f"rgb{expected}"
    if name == "report":
        visit.page.get_by_text("The schedule in numbers").click()
        assert visit.page.locator("#schedule").is_visible()
        assert visit.overflow() <= 0
    visit.leave(written[name])


def test_the_slider_changes_the_kept_patches(browser, written: dict[str, Path]) -> None:
    visit = Visit(browser, written["kept"], 360, has_touch=True)
    page, slider = visit.page, visit.page.locator("#stage")

    def seen() -> tuple[str, str, str]:
        group = page.locator(".moment.on")
        assert group.count() == 1
        path = group.locator(".dropped").get_attribute("d")
        return path, page.locator("#now").inner_text(), page.locator("[aria-current] th").inner_text()

    last = int(slider.get_attribute("max"))
    dropped = [seen()]
    for _ in range(last):
        slider.press("ArrowLeft")
        dropped.append(seen())
    assert [len(cells(path)) for path, _, _ in dropped] == sorted((len(cells(p)) for p, _, _ in dropped), reverse=True)
    assert len({path for path, _, _ in dropped}) == last + 1
    assert dropped[-1][0] == ""
    for _, now, row in dropped:
        assert now.splitlines()[0].lower().endswith(row)
    assert slider.get_attribute("aria-valuetext").startswith("Before pruning 144 of 144")
    visit.leave(written["kept"])


def test_patches_tell_their_score_by_pointer_tap_and_key(browser, written: dict[str, Path]) -> None:
    visit = Visit(browser, written["kept"], 360, has_touch=True)
    page, data = visit.page, data_of(Page(written["kept"].read_text(encoding="utf-8")))
    svg = page.locator("svg.view")
    page.locator("#stage").fill("1")
    assert page.locator("#fate tbody td").all_inner_texts() == [""] * 3 * (len(data["moments"]) - 1)

    def check(row: int, column: int) -> None:
        assert page.locator("#where").inner_text() == f"Row {row + 1}, column {column + 1}"
        score, rank = data["views"][0]["scores"][1][row * 12 + column], data["views"][0]["ranks"][1][row * 12 + column]
        first = page.locator("#fate tbody tr").first.locator("td").all_inner_texts()
        state = {KEPT: "kept", DROPPED: "dropped"}[data["views"][0]["states"][1][row * 12 + column]]
        assert first[1:] == [f"{rank} of 144", state]
        assert float(first[0]) == pytest.approx(score, rel=5e-3)
        # The slider stands at the first stage.
        told = f"Row {row + 1}, column {column + 1}: {state}, score {first[0]}, rank {rank} of 144"
        assert page.locator("#patch").inner_text() == told

    box = svg.bounding_box()
    place = lambda row, column: {"x": box["width"] * (column + 0.5) / 12, "y": box["height"] * (row + 0.5) / 12}  # noqa: E731
    svg.hover(position=place(2, 5))
    check(2, 5)
    svg.tap(position=place(7, 1))
    check(7, 1)
    svg.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowDown"):
        svg.press(key)
    check(8, 2)
    svg.press("End")
    svg.press("ArrowRight")
    check(8, 11)
    assert MERGED in "".join(data["views"][0]["states"])
    assert ABSENT not in "".join(data["views"][0]["states"])
    visit.leave(written["kept"])


def test_patches_are_shaded_by_rank(browser, written: dict[str, Path]) -> None:
    visit = Visit(browser, written["kept"], 1280)
    page, data = visit.page, data_of(Page(written["kept"].read_text(encoding="utf-8")))
    assert page.locator(".heat rect").count() == 0
    page.locator("#shade").check()
    for moment in range(len(data["moments"])):
        page.locator("#stage").fill(str(moment))
        ranks = [rank for rank in (data["views"][0]["ranks"][moment] or []) if rank is not None]
        rects = page.locator(".heat rect")
        shades = rects.evaluate_all("all => all.map(rect => Number(rect.getAttribute('fill-opacity')))")
        assert len(shades) == len(ranks)
        # The better the rank, the stronger the shade.
        ordered = [shade for _, shade in sorted(zip(ranks, shades, strict=True))]
        assert ordered == sorted(shades, reverse=True)
    page.locator("#shade").uncheck()
    assert page.locator(".heat rect").count() == 0
    visit.leave(written["kept"])


def test_without_javascript_the_last_stage_is_there(browser, written: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 360, "height": 800})
    page = context.new_page()
    page.goto(written["kept"].as_uri())
    assert not page.locator("#stage").is_visible()
    assert page.locator(".moment.on .kept").get_attribute("d")
    assert "shows the last stage" in page.locator("noscript").inner_text()
    context.close()
