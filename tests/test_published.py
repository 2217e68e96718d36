"""What is published beside the code: the README on an index page, the workflows, the forms, the citation."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import signstep

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}

_spec = importlib.util.spec_from_file_location("published", ROOT / "release/published.py")
assert _spec is not None
assert _spec.loader is not None
published = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_for_the_forge_are_what_it_reads(schema: str) -> None:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema")
    files = sorted(ROOT.glob(SCHEMAS[schema]))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_actionlint_finds_nothing_in_the_workflows() -> None:
    actionlint = shutil.which("actionlint")
    if actionlint is None:
        pytest.skip("actionlint is not on the PATH")
    ran = subprocess.run([actionlint], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda path: path.stem)
def test_a_workflow_may_do_no_more_than_it_needs(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            assert "secrets." not in str(step), name
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False, name


def test_the_readme_on_an_index_page_has_no_relative_link() -> None:
    metadata = published.dynamic_metadata({}, {"version": "1.2.3"})
    text, repository = metadata["readme"]["text"], metadata["urls"]["Repository"]
    source = (ROOT / "README.md").read_text("utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    relative = [target for target in re.findall(r"\]\(([^)\s]+)\)", source) if not re.match(r"[a-z]+:|#", target)]
    assert len(relative) > 5
    assert all(re.match(r"https://|#", target) for target in targets)
    for target in relative:
        assert (ROOT / target.partition("#")[0]).exists()
        assert {f"{repository}/blob/v1.2.3/{target}", f"{repository}/raw/v1.2.3/{target}"} & set(targets)
    assert re.sub(r"\]\([^)]*\)", "", text) == re.sub(r"\]\([^)]*\)", "", source)


@given(st.text(alphabet="[]()!#ab/:. \n", max_size=40))
def test_links_that_are_absolute_stay_as_they_are(text: str) -> None:
    once = published.absolute(text, "https://forge.example/us/it", "v1")
    assert published.absolute(once, "https://forge.example/us/it", "v1") == once
    assert once.count("](") == text.count("](")


def test_the_installed_metadata_is_complete() -> None:
    metadata = importlib.metadata.metadata("signstep")
    assert metadata["Version"] == signstep.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_changelog_has_the_version() -> None:
    assert f"\n## {signstep.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
