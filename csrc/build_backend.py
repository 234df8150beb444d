"""setuptools' build backend (PEP 517), with two additions.

torch becomes a build requirement where the environment that opt_ds is installed into has none. Where it has one, the kernels are
compiled against that one, and nothing is downloaded. And without build isolation, a setuptools that cannot make wheels is named.
"""

import importlib.util

import setuptools
from build_torch import REQUIREMENT, find_torch, kernels_are_wanted
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Packages that building a wheel needs."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Packages that an editable installation needs."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    """What pip reads before it builds."""
    _check_makes_wheels()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict | None = None) -> str:
    """The same for an editable installation."""
    _check_makes_wheels()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def _check_makes_wheels() -> None:
    """setuptools does it by itself from 70.1 on, before by the package wheel; Python 3.11's own environments have neither."""
    if importlib.util.find_spec("setuptools.command.bdist_wheel") is None and importlib.util.find_spec("wheel") is None:
        raise SystemExit(
            f"error: setuptools {setuptools.__version__} in this environment cannot make wheels: python -m pip install --upgrade "
            "setuptools, then install opt_ds again; or leave out --no-build-isolation"
        )


def _torch_requirement() -> list[str]:
    return [REQUIREMENT] if kernels_are_wanted() and find_torch() is None else []
