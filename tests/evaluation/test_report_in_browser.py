from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_example import example

from kd_recipes.evaluation.report.page import to_html
from kd_recipes.evaluation.results import Sample

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PROBE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(it => !it.closest(".scroll, svg, pre"))
  .filter(it => it.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(it => it.tagName);
const root = document.documentElement, tables = [...document.querySelectorAll(".scroll")];
const paint = getComputedStyle(document.querySelector("svg text"));
parent.postMessage(JSON.stringify({
  scroll: root.scrollWidth, client: root.clientWidth, wide,
  scrolling: tables.filter(it => it.scrollWidth > it.clientWidth && getComputedStyle(it).overflowX === "auto").length,
  ink: getComputedStyle(document.body).color, page: getComputedStyle(document.body).backgroundColor,
  text: paint.fill, family: paint.fontFamily, shown: [...document.querySelectorAll(".wide, .narrow")]
    .filter(it => it.offsetParent).map(it => it.className), bad: document.querySelectorAll("script").length - 1}), "*");
</script></body>"""


# In a frame, as a window of the browser is no narrower than 500 pixels.
_FRAME = """<!DOCTYPE html><meta charset="utf-8"><title></title>
<script>addEventListener("message", it => {{ document.title = it.data; }});</script>
<iframe src="page.html" style="border: 0" width="{width}" height="800"></iframe>"""


def _probe(html: str, directory: Path, width: int, scheme: str) -> dict[str, Any]:
    """What a browser says of the page; the policy that forbids scripts is taken out of the copy."""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(html)
    page, frame = directory / "page.html", directory / "frame.html"
    page.write_text(policy.sub("", html).replace("</body>", _PROBE), encoding="utf-8")
    frame.write_text(_FRAME.format(width=width), encoding="utf-8")
    command = [
        *(str(_CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"),
        f"--user-data-dir={directory / 'profile'}",
        f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}",
        *("--window-size=1400,900", "--virtual-time-budget=2000"),
        frame.as_uri(),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", found.stdout, re.DOTALL)
    assert title, found.stderr
    return dict(json.loads(title[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")))


@pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(width: int, scheme: str, tmp_path: Path) -> None:
    evaluation = example()
    long = Sample("x" * 300, "y" * 900 + "\n" + "<script>" * 9, "z " * 300)
    models = [replace(m, samples=[long, *m.samples], description="d" * 90) for m in evaluation.models]
    found = _probe(to_html(replace(evaluation, models=models)), tmp_path, width, scheme)
    assert found["client"] == width
    assert found["scroll"] <= found["client"], found["wide"]
    assert found["wide"] == []
    assert found["bad"] == 0
    assert found["shown"] == ["narrow" if width == 360 else "wide"]
    if width == 360:
        assert found["scrolling"] >= 2, "tables scroll within themselves"
    brightness = {name: sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("ink", "page", "text")}
    if scheme == "dark":
        assert brightness["page"] < 120 < 400 < min(brightness["ink"], brightness["text"])
    else:
        assert brightness["page"] > 650 > 350 > max(brightness["ink"], brightness["text"])
    assert "system-ui" in found["family"]
