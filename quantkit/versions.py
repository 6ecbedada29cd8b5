"""Versions of installed packages, for manifests, metadata and reports."""

from __future__ import annotations

DISTRIBUTION = "quantkit-llm"


def package_versions(*names: str) -> dict[str, str]:
    """Version of quantkit and of those of ``names`` that are installed, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in (DISTRIBUTION, *names):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
