"""What mkdocs adds to the pages of docs/: those that are made from code, and those that lie above docs/.

Keys of a recipe, a shipped config and docstrings have one source, the code; the pages are made from it at each build.
Links in the pages are those that also work where the files are read as they are: `../configs/quickstart.yaml`.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# page -> what its docstrings are taken from
API = {
    "losses": ["kd_recipes.losses"],
    "signals": ["kd_recipes.signals", "kd_recipes.batch"],
    "teachers": ["kd_recipes.teachers"],
    "students": ["kd_recipes.students"],
    "models": ["kd_recipes.models", "kd_recipes.layers"],
    "tokenizers": ["kd_recipes.tokenizers", "kd_recipes.chat_template"],
    "compression": ["kd_recipes.compression", "kd_recipes.lattices"],
    "monitoring": ["kd_recipes.monitoring", "kd_recipes.history"],
    "evaluation": [
        "kd_recipes.evaluation",
        "kd_recipes.evaluation.measure",
        "kd_recipes.evaluation.results",
        "kd_recipes.evaluation.uncertainty",
        "kd_recipes.evaluation.calibration",
        "kd_recipes.evaluation.diversity",
        "kd_recipes.evaluation.exposure",
        "kd_recipes.evaluation.generation",
        "kd_recipes.evaluation.cost",
    ],
    "files": ["kd_recipes.exporting.formats", "kd_recipes.importing.gguf", "kd_recipes.storage"],
    "configs": ["kd_recipes.config", "kd_recipes.parts", "kd_recipes.trust", "kd_recipes.errors"],
}
# page -> the file above docs/ that it is
FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


# ----------------------------------------------------------------------------------------------------- what is made
def generated() -> dict[str, str]:
    """Every page that is made: its path under docs/, and its Markdown."""
    from kd_recipes.config import shipped_configs
    from kd_recipes.entry import RECIPES

    pages = {f"reference/{name}_keys.md": _keys(name) for name in RECIPES}
    pages["reference/configs.md"] = _list_of_configs(shipped_configs())
    pages |= {f"reference/configs/{name}.md": _config(path) for name, path in shipped_configs().items()}
    pages |= {f"reference/api/{page}.md": _api(page, modules) for page, modules in API.items()}
    return pages | {page: (ROOT / file).read_text(encoding="utf-8") for page, file in FILES.items()}


def nav() -> list[dict[str, Any]]:
    """Where the pages that are made stand in the nav: after those that mkdocs.yml names."""
    pages = generated()
    configs = [page for page in pages if page.startswith("reference/configs/")]
    return [
        {
            "Reference": [
                {"Keys of a recipe": [page for page in pages if page.endswith("_keys.md")]},
                {"Configs": ["reference/configs.md", *configs]},
                {"Python": [page for page in pages if page.startswith("reference/api/")]},
            ]
        },
        {"Project": list(FILES)},
    ]


def _keys(recipe: str) -> str:
    module = importlib.import_module(f"kd_recipes.{recipe}")
    about = "A section has a `_component_`, and the arguments of what that names."
    rows = []
    for key in module.KEYS:
        default = "required" if key.required else "" if key.default is None else f"`{_short(key.default)}`"
        rows.append(f"| `{key.name}` | {default} | {_cell(key.all_wanted)} |")
    return "\n".join(
        [
            f"# `{recipe}`",
            "",
            f"    tune run kd_recipes.{recipe} --config FILE [key=value …] [--trust-config]",
            "",
            (module.__doc__ or "").strip(),
            "",
            f"What its config may say at the top; `--help` after the config prints the same. {about}",
            "",
            "| key | default | value |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _short(default: Any) -> str:
    return str(default["_component_"]) if isinstance(default, dict) else str(default)


def _cell(text: str) -> str:
    """A text in a table: names of code as such, and no bars."""
    return re.sub(r"\bkd_recipes(\.\w+)+|\b_component_\b", r"`\g<0>`", text).replace("|", r"\|")


def _first_comment(path: Path) -> str:
    first, *_ = path.read_text(encoding="utf-8").split("\n#\n")
    return " ".join(line.lstrip("# ") for line in first.splitlines() if line.startswith("#"))


def _list_of_configs(configs: dict[str, Path]) -> str:
    rows = [f"| [{name}](configs/{name}.md) | {_first_comment(path)} |" for name, path in configs.items()]
    head = ["# Configs that come with the package", "", "`kd-recipes cp NAME my.yaml` copies one, to be changed.", ""]
    return "\n".join([*head, "| name | |", "|---|---|", *rows, ""])


def _config(path: Path) -> str:
    head = [f"# {path.stem}", "", f"    kd-recipes cp {path.stem} my.yaml", ""]
    return "\n".join([*head, "```yaml", path.read_text(encoding="utf-8").rstrip(), "```", ""])


def _api(page: str, modules: list[str]) -> str:
    parts = [f"## `{module}`\n\n::: {module}\n    options:\n      heading_level: 3\n" for module in modules]
    return "\n".join([f"# {page.capitalize()}\n", *parts])


# --------------------------------------------------------------------------------------------------- what is changed
def section(markdown: str, heading: str) -> str:
    """What stands under a heading of the second level.

    Raises:
        ValueError: there is no such heading.
    """
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", markdown, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no heading '## {heading}'")
    return found.group(1).strip()


def with_readme(markdown: str) -> str:
    """A page in which `<!-- README: HEADING -->` has been replaced by what README.md says under that heading."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(
        r"<!-- README: (.+?) -->",
        lambda match: re.sub(r"\]\((?=[\w.])(?!https?:)", "](../", section(readme, match[1])),
        markdown,
    )


def to_pages(markdown: str, page: str) -> str:
    """Links to files above docs/, and of those to each other, lead to the pages that show them."""
    here = posixpath.dirname(page)
    above = {file: name for name, file in FILES.items()} | {"README.md": "index.md"}
    folder = "." if page in FILES else posixpath.normpath(posixpath.join("docs", here))  # where the text itself lies

    def lead(match: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, match[1]))
        if config := re.fullmatch(r"configs/(\w+)\.yaml", file):
            file = f"docs/reference/configs/{config[1]}.md"
        file = f"docs/{above[file]}" if file in above else file
        if not file.startswith("docs/"):
            return match[0]
        return f"]({posixpath.relpath(file, posixpath.join('docs', here))}{match[2] or ''})"

    return re.sub(r"\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)", lead, markdown)


# ------------------------------------------------------------------------------------------------- what mkdocs calls
def on_config(config: Any) -> Any:
    """Complete the nav."""
    config.nav = [*config.nav, *nav()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for page, markdown in generated().items():
        files.append(File.generated(config, page, content=markdown))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """See :func:`with_readme` and :func:`to_pages`; what has no use for a column beside it gets its width."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]
    elif re.match(r"reference/(configs|\w+_keys)", page.file.src_uri):
        page.meta["hide"] = ["toc"]
    return to_pages(with_readme(markdown), page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name code with roles (:class:`X`), which Markdown does not know."""
    return re.sub(r":(?:class|func|meth|attr|data|mod):(?=<code>)", "", html)
