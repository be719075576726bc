"""Release: known from the package, and from a checkout that nobody installed."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from common import release as module
from common.release import release


def test_a_checkout_that_is_not_installed_knows_its_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = version("diffpo")

    def lost(name: str) -> str:
        raise PackageNotFoundError(name)

    assert release() == installed
    monkeypatch.setattr(module, "version", lost)
    release.cache_clear()
    assert release() == installed
    release.cache_clear()
