"""The package's version and folder. Modules take them from here: `opt_ds` itself stands above all of them."""

from pathlib import Path

__version__ = "0.1.0"

PACKAGE_FOLDER = Path(__file__).parent
