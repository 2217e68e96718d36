"""The site's pages outside docs/: README and its like, the examples, and whatever pages link in results/.

No text is copied. These files are read where they lie, and a link from one file of the repository to another, which a
forge follows as it is, leads on the site to the page or file that it names, or to the repository if the site has none.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
"""Where pages outside docs/ are on the site."""
NOTEBOOKS = ROOT / "examples" / "notebooks"

_LINK = re.compile(r'(?<=\]\()[^)\s#]+|(?<=\bsrc=")[^"#]+|(?<=\bhref=")[^"#]+|(?<=\bsrcset=")[^"#]+')
_FENCE = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_NESTED = re.compile(r"^((?:  )+)(?=(?:[-*+]|\d+\.) )", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Take the address of the repository from where it is set, [tool.signstep] in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    config.repo_url = project["tool"]["signstep"]["repository"]
    config.repo_name = "Repository"
    config.site_url = project["tool"]["signstep"]["documentation"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root and the notebooks, then what pages link in results/, then what that links."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for path in NOTEBOOKS.glob("*.ipynb"):
        files.append(File.generated(config, f"{path.stem}.md", abs_src_path=str(path)))
    unread = [Path(file.abs_src_path or "") for file in files.documentation_pages()]
    while unread:
        page = unread.pop()
        for link in _LINK.findall(page.read_text("utf-8")):
            path = (page.parent / link).resolve()
            if path.is_file() and path.is_relative_to(ROOT / "results") and _on_site(path) not in files.src_uris:
                files.append(File.generated(config, _on_site(path), abs_src_path=str(path)))
                if path.suffix == ".md":
                    unread.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links where their files are on the site, and indent nested lists by four, as Python-Markdown wants them."""
    source = Path(page.file.abs_src_path or "")
    here = PurePosixPath(page.file.src_uri).parent
    if source.suffix == ".ipynb":
        markdown = _of_notebook(markdown)
    elif source.parent.name == "examples":
        markdown += "".join(_listing(source.parent / name) for name in re.findall(r"\]\((\w+\.py)\)", markdown))

    def led(match: re.Match[str]) -> str:
        path = (source.parent / match[0]).resolve()
        if ":" in match[0] or not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        uri = _on_site(path)
        if uri in files.src_uris:
            return os.path.relpath(uri, here)
        if path.parent == source.parent and path.suffix == ".py":
            return f"#{path.stem}"
        return f"{config.repo_url}/blob/main/{path.relative_to(ROOT).as_posix()}"

    text, end = "", 0
    for fence in [*_FENCE.finditer(markdown), None]:
        prose = markdown[end : fence.start() if fence else None]
        text += _NESTED.sub(r"\1\1", _LINK.sub(led, prose))
        if fence:
            text += fence[0]
            end = fence.end()
    return text


def _listing(path: Path) -> str:
    """A program as a section of a page."""
    return f"\n## {path.name} {{ #{path.stem} }}\n\n```python\n{path.read_text('utf-8')}```\n"


def _of_notebook(text: str) -> str:
    """A notebook with its outputs as Markdown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        written = "".join(cell["source"])
        parts.append(written if cell["cell_type"] == "markdown" else f"```python\n{written}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif picture := output["data"].get("image/png"):
                parts.append(f"![What this code draws](data:image/png;base64,{''.join(picture).strip()})")
    return "\n\n".join(parts)


def _on_site(path: Path) -> str:
    """Where a file of the repository is on the site, if it is there."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if path.parent == NOTEBOOKS:
        return f"{path.stem}.md"
    if name.startswith("results/") and path.suffix == ".md":
        return name.replace("results", "measured", 1)  # in results/ its page would take the place of a report's .html
    return PAGES.get(name, name)
