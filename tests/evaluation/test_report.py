from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from evaluation_example import UNKNOWN, estimate, example, many_models, run
from hatchling.builders.wheel import WheelBuilder

from kd_recipes.evaluation.report import write_report
from kd_recipes.evaluation.report.markdown import escape, to_markdown
from kd_recipes.evaluation.report.page import to_html
from kd_recipes.evaluation.report.pareto import front
from kd_recipes.evaluation.report.verdict import verdict
from kd_recipes.evaluation.results import Evaluation, ModelResult, Sample

_ALL = {"size", "models", "tasks", "diversity", "training", "alerts", "calibration", "samples", "made"}
_VOID = {"meta", "br", "link", "img", "input", "hr"}
_NASTY = (
    "<script>alert(1)</script>",
    "</svg><img src=x onerror=alert(1)>",
    "a|b\n| c | d |",
    "![p](http://example.com/p.png) [l](http://example.com) <http://example.com>",
    "$x$ **bold** `code` __init__ &lt;",
    "\x1b[31m\x00\ud800 é 模型 🙂",
    "' onload='alert(1)' \" onload=\"alert(1)",
    "{{ 7 * 7 }} {% raw %}",
)


@cache
def html_of(evaluation: Callable[[], Evaluation] = example) -> str:
    """Its page, made once: pictures take a second."""
    return to_html(evaluation())


class Page(HTMLParser):
    """What a browser makes of the page's structure."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def sections(self) -> set[str]:
        return {attributes.get("aria-labelledby", "made") for tag, attributes in self.tags if tag == "section"}


def with_names(evaluation: Evaluation, names: list[str]) -> Evaluation:
    """The same with other names."""
    new = dict(zip((model.name for model in evaluation.models), names, strict=True))
    return replace(
        evaluation,
        models=[replace(model, name=new[model.name]) for model in evaluation.models],
        reference=new[evaluation.reference],
        runs={new[name]: recorded for name, recorded in evaluation.runs.items()},
    )


# Files


def test_files(tmp_path: Path) -> None:
    evaluation = example()
    files = write_report(evaluation, tmp_path / "new" / "report")
    assert [file.name for file in files] == ["evaluation.json", "evaluation.md", "report.html"]
    read = json.loads(files[0].read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(evaluation.to_json()))
    assert ModelResult.from_json(read["models"][2]).text.bits_per_byte == evaluation.models[2].text.bits_per_byte


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    evaluation = example()
    figures = replace(evaluation.models[1].text, kl=UNKNOWN, kl_p99=math.inf, entropy=-math.inf)
    evaluation = replace(evaluation, models=[evaluation.models[0], replace(evaluation.models[1], text=figures)])

    def fail(name: str) -> None:
        raise AssertionError(name)

    file = write_report(evaluation, tmp_path)[0]
    read = json.loads(file.read_text(encoding="utf-8"), parse_constant=fail)["models"][1]["text"]
    assert (read["kl"]["mean"], read["kl_p99"], read["entropy"]) == (None, None, None)
    assert read["kl_median"] == figures.kl_median


def test_the_same_bytes_whatever_the_users_matplotlib(tmp_path: Path) -> None:
    first = [file.read_bytes() for file in write_report(example(), tmp_path / "first")]
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path", "lines.marker": "x"}):
        settings = dict(matplotlib.rcParams)
        second = [file.read_bytes() for file in write_report(example(), tmp_path / "second")]
        assert dict(matplotlib.rcParams) == settings
    assert first == second


def test_a_wheel_has_the_template_and_its_style() -> None:
    builder = WheelBuilder(str(Path(__file__).parents[2]))
    files = {file.distribution_path for file in builder.recurse_included_files()}
    assert {f"kd_recipes/evaluation/report/{name}" for name in ("report.html.jinja", "report.css")} <= files


# Page


def test_the_page_needs_nothing_else() -> None:
    html = html_of()
    page = Page(html)
    assert all(link.startswith("#") for name in ("href", "xlink:href") for link in page.values(name))
    assert not page.values("src")
    assert not page.values("srcset")
    assert all(found.startswith("#") for found in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    assert "@import" not in html
    assert "//" not in html.replace("runs//", "")
    tags = Counter(tag for tag, _ in page.tags)
    assert not tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert len(html) < 200_000


@pytest.mark.parametrize("evaluation", [example, partial(many_models, 20)], ids=["5 models", "20 models"])
def test_every_identifier_is_of_one_thing_and_every_reference_to_one(evaluation: Callable[[], Evaluation]) -> None:
    html = html_of(evaluation)
    page = Page(html)
    ids = Counter(page.values("id"))
    assert set(ids.values()) == {1}
    wanted = [link.removeprefix("#") for link in page.values("href")] + re.findall(r"url\(#([^)]*)\)", html)
    wanted += page.values("aria-labelledby")
    assert wanted
    assert not set(wanted) - ids.keys()


def test_pictures_are_described_and_in_the_pages_colours() -> None:
    html = html_of()
    page = Page(html)
    pictures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) == 9  # size and quality twice, two tasks, two curves of two runs, calibration
    assert all(len(picture["aria-label"]) > 40 for picture in pictures)
    assert "distilled: 198\xa0MB, 1.083\xa0±\xa0" in html
    drawn = re.findall(r"(?:stroke|fill): ([^;\"]+)", html[html.index("</style>") :])
    assert {colour.strip() for colour in drawn if not colour.startswith("var(--")} <= {"none"}
    css = html[: html.index("</style>")]
    defined = [set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)]
    assert len(defined) == 2
    assert defined[0] == defined[1], "light and dark have the same colours"
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--dot"} <= defined[0]


def test_all_sections() -> None:
    page = Page(html_of())
    assert page.sections == _ALL
    for part in ("2 alerts", "kl_gap", "learns its text by heart", "the best by bits per byte", "SHA-256", "1 more"):
        assert part in page.said, part


def _without(**changes: Any) -> Callable[[Evaluation], Evaluation]:
    return lambda evaluation: replace(evaluation, models=[replace(model, **changes) for model in evaluation.models])


def _without_kl(evaluation: Evaluation) -> Evaluation:
    unknown = {"kl": UNKNOWN, "kl_median": math.nan, "kl_p99": math.nan, "agreement": UNKNOWN}
    return replace(evaluation, models=[replace(m, text=replace(m.text, **unknown)) for m in evaluation.models])


@pytest.mark.parametrize(
    ("change_it", "gone", "unsaid"),
    [
        (_without(tasks={}), {"tasks"}, "McNemar"),
        (_without(samples=(), diversity=None), {"samples", "diversity"}, "distinct-2"),
        (lambda it: replace(it, runs={}), {"training", "alerts"}, "labels alone"),
        (lambda it: replace(it, made_by={}, runs={}), {"training", "alerts", "made"}, "What made it"),
        (_without_kl, set(), "Distance from"),
        (lambda it: replace(it, models=it.models[:1], runs={}), {"size", "training", "alerts"}, "Distance from"),
        (
            lambda it: replace(it, models=[replace(m, text=replace(m.text, reliability=())) for m in it.models]),
            {"calibration"},
            "as it thinks",
        ),
    ],
    ids=["tasks", "prompts", "runs", "provenance", "kl", "one model", "bins"],
)
def test_what_was_not_measured_has_no_section(
    change_it: Callable[[Evaluation], Evaluation], gone: set[str], unsaid: str
) -> None:
    assert unsaid in Page(html_of()).said
    page = Page(to_html(change_it(example())))
    assert page.sections == _ALL - gone
    assert unsaid not in page.said
    assert "nan" not in page.said.split()


def test_injections_are_text(tmp_path: Path) -> None:
    evaluation = with_names(example(), list(_NASTY[:5]))
    nasty = _NASTY
    models = [
        replace(
            model,
            description=nasty[5],
            samples=[Sample(prompt, nasty[index], nasty[index - 1]) for index, prompt in enumerate(nasty)],
            tasks={nasty[7]: model.tasks["social_iqa"], nasty[0]: model.tasks["step_inference"]},
        )
        for model in evaluation.models
    ]
    evaluation = replace(evaluation, models=models, made_by={nasty[0]: {nasty[1]: nasty[6]}, nasty[6]: nasty[0]})
    _, markdown, html = (file.read_text(encoding="utf-8") for file in write_report(evaluation, tmp_path))
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.said.count("<script>alert(1)</script>") > 10
    assert "{{ 7 * 7 }}" in page.said
    assert "$x$ **bold** `code` __init__ &lt;" in page.said
    assert re.search(r"<text[^>]*>\$x\$ \*\*bold", html), "no mathematics in a picture"
    _check_markdown(markdown)
    assert not re.search(r"(?<!\\)<(script|img|http)", markdown)
    assert not re.search(r"(?<!\\)!\[", markdown)
    assert not re.search(r"(?<!\\)\]\(", markdown)


def _check_markdown(markdown: str) -> None:
    """Tables have as many cells in every row, and nothing else begins with a bar."""
    tables = [block.split("\n") for block in markdown.split("\n\n") if block.startswith("|")]
    assert tables
    for lines in tables:
        bars = {len(re.sub(r"\\.", "", line).split("|")) for line in lines}
        assert len(bars) == 1, lines
        assert re.fullmatch(r"(\| :?-+:? )+\|", lines[1])
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert sum(line.startswith("|") for line in markdown.split("\n")) == sum(map(len, tables))


def test_markdown_escapes_only_what_means_something() -> None:
    assert escape("labels_only, a < b, 50% & more - 1. x") == "labels_only, a < b, 50% & more - 1. x"
    assert escape("_a_ <b> &amp; |") == r"\_a\_ \<b> \&amp; \|"
    assert escape("one\ntwo\t\x1b") == "one two �"


def test_markdown_says_the_same() -> None:
    evaluation = example()
    markdown = to_markdown(evaluation)
    _check_markdown(markdown)
    assert markdown.startswith(f"**{escape(verdict(evaluation)[0])}**\n")
    assert "| int4 " in markdown
    for part in (
        "−0.019 ± 0.004 (better)",
        "+0.561 ± ",
        "198 MB (74%)",
        "< 0.001 (worse)",
        "**distilled, step 25, kl_gap**",
    ):
        assert part in markdown, part
    assert "Prompt: A bicycle has two wheels," in markdown


# Pictures


def test_front() -> None:
    models = example().models
    assert [model.name for model in front(models)] == ["int4"]
    assert [model.name for model in front([m for m in models if m.name != "int4"])] == ["distilled", "teacher"]


def test_training_is_drawn_only_where_it_measured_the_same() -> None:
    evaluation = example()
    hot = {**evaluation.runs["distilled"], "config": {"kd_ratio": 0.5, "temperature": 2.0}}
    labels = [
        next(a["aria-label"] for _, a in Page(to_html(replace(evaluation, runs={"distilled": it}))).tags if _is_kl(a))
        for it in (evaluation.runs["distilled"], hot)
    ]
    assert "training from" in labels[0]
    assert "training from" not in labels[1]
    assert all("held-out from 2.028 to 1.0" in label and "alerts at steps 25, 30" in label for label in labels)


def _is_kl(attributes: dict[str, str]) -> bool:
    return "KL to the teacher" in attributes.get("aria-label", "")


def test_a_run_that_left_two_models_is_drawn_once() -> None:
    evaluation = example()
    recorded = evaluation.runs["distilled"]
    page = Page(to_html(replace(evaluation, runs={"distilled": recorded, "labels_only": dict(recorded)})))
    assert "distilled, labels_only" in page.said
    assert sum(_is_kl(attributes) for _, attributes in page.tags) == 1
    assert "2 alerts fired" in page.said


def test_a_long_run_does_not_make_a_heavy_page() -> None:
    evaluation = example()
    steps = range(1, 20_001)
    train = [[step, {"loss/cross_entropy": 3 + 1 / step, "kd/forward_kl": None}] for step in steps]
    html = to_html(
        replace(evaluation, runs={"distilled": {"train": train, "held_out": [], "alerts": [], "config": {}}})
    )
    assert "training from 4.000 to 3.000" in html
    assert len(html) < 200_000


# Anything


def _drawn(seed: int) -> Evaluation:
    """An evaluation with whatever can be missing, missing now and then."""
    rng = random.Random(seed)

    def maybe(value: Any, other: Any = math.nan) -> Any:
        return value if rng.random() < 0.7 else other

    evaluation = many_models(rng.randint(1, 9))
    models = []
    for index, model in enumerate(evaluation.models):
        figures = model.text
        unknown = {
            name: maybe(getattr(figures, name), UNKNOWN) for name in ("bits_per_byte", "accuracy", "kl", "agreement")
        }
        no_interval = estimate(rng.random(), math.nan)
        models.append(
            replace(
                model,
                text=replace(
                    figures,
                    **unknown,
                    cross_entropy=maybe(figures.cross_entropy, estimate(1e4, 0.0)),
                    kl_p99=maybe(figures.kl_p99, math.inf),
                    change=None if index == 0 else maybe(figures.change, no_interval),
                    reliability=maybe(figures.reliability, [(0, math.nan, math.nan)]),
                    by_sequence=maybe(figures.by_sequence, {}),
                ),
                cost=replace(
                    model.cost,
                    peak_memory_bytes=maybe(model.cost.peak_memory_bytes, None),
                    decode_tokens_per_second=maybe(model.cost.decode_tokens_per_second),
                    num_bytes=maybe(model.cost.num_bytes, 0),
                ),
                tasks=maybe(model.tasks, {"other": replace(model.tasks["social_iqa"], metrics={"f1": no_interval})}),
                samples=maybe(model.samples, ()),
                diversity=maybe(model.diversity and replace(model.diversity, self_bleu=math.nan), None),
            )
        )
    recorded = run(maybe(0.5, 0), (4.0, 3.0), (2.0, 1.0))
    odd = {
        "train": maybe(recorded["train"], []),
        "held_out": maybe(recorded["held_out"], []),
        "alerts": [],
        "config": {},
    }
    runs = {model.name: maybe(recorded, odd) for model in models[1:3]}
    names = [rng.choice(_NASTY) + str(index) for index in range(len(models))]
    return with_names(replace(evaluation, models=models, runs=runs, made_by=maybe(evaluation.made_by, {})), names)


@pytest.mark.parametrize("seed", range(6))
def test_anything_that_is_missing(seed: int, tmp_path: Path) -> None:
    files = write_report(_drawn(seed), tmp_path)
    content, markdown, html = (file.read_text(encoding="utf-8") for file in files)
    json.loads(content, parse_constant=pytest.fail)
    _check_markdown(markdown)
    page = Page(html)
    assert set(Counter(page.values("id")).values()) <= {1}
    assert {"models"} <= page.sections
    for written in (markdown, page.said):
        assert not {"nan", "inf", "None"} & set(re.findall(r"\w+", written.replace("{% raw %}", "")))
