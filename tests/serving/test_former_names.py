"""Import paths of earlier versions, which the cards of exported models name."""

import importlib
import sys

import pytest

from opt_ds.serving.pretrained import OPTModel


def test_the_former_name_of_the_package_warns_and_works() -> None:
    for name in ("opt_ds.serve.pretrained", "opt_ds.serve"):
        sys.modules.pop(name, None)
    with pytest.warns(FutureWarning, match="is opt_ds.serving.pretrained now"):
        former = importlib.import_module("opt_ds.serve.pretrained")
    assert former.OPTModel is OPTModel
