"""Every package that a set-up installs is pinned in constraints.txt, at a version that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(found.values()), "each line pins one version"
    return found


def asked_for() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tables = [project["project"]["dependencies"], project["build-system"]["requires"]]
    tables += project["project"]["optional-dependencies"].values()
    found = [Requirement(line) for table in tables for line in table]
    return [requirement for requirement in found if requirement.name != "quintet"]


def test_each_dependency_is_pinned_at_a_version_that_is_allowed() -> None:
    versions = pinned()
    for requirement in asked_for():
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name}: not in constraints.txt, run `make upgrade`"
        assert requirement.specifier.contains(versions[name]), f"{requirement}, but {versions[name]} is pinned"


def test_every_make_target_that_installs_uses_the_constraints() -> None:
    installs = re.findall(r"^.*pip install.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert installs == ["INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(VERSIONS)"]
