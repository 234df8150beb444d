"""Test `import opt_ds`: it is quick, and defines only the public names."""

import subprocess
import sys

import pytest

import opt_ds


def test_the_import_loads_no_large_library() -> None:
    code = "import sys, opt_ds; print([name for name in ('torch', 'numpy', 'h5py', 'PIL', 'typer') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_public_names_are_there_and_documented() -> None:
    assert sorted(opt_ds.__all__) == ["Model", "UserError", "__version__", "load"]
    for name in opt_ds.__all__:
        assert getattr(opt_ds, name).__doc__
    public = [name for name in vars(opt_ds.Model) if not name.startswith("_")]
    assert [name for name in public if not getattr(opt_ds.Model, name).__doc__] == []
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        opt_ds.lode  # noqa: B018 - what is tested
