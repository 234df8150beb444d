"""setuptools' build backend (PEP 517), with one addition: torch becomes a build requirement where the environment that opt_ds is
installed into has none. Where it has one, the kernels are compiled against that one, and nothing is downloaded."""

from build_torch import REQUIREMENT, find_torch, kernels_are_wanted
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Packages that building a wheel needs."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Packages that an editable installation needs."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def _torch_requirement() -> list[str]:
    return [REQUIREMENT] if kernels_are_wanted() and find_torch() is None else []
