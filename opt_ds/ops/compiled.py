"""Load the compiled operators (csrc/) and register them with torch.compile.

There are two libraries with the same operators. `torch.ops.opt_ds` has the CUDA kernels on a GPU and their plain
reference on the CPU. `torch.ops.opt_ds_emulator` runs the CUDA kernels on the CPU, thread by thread, which is slow. The
schemas are in `csrc/binding.cpp`.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = {"opt_ds": "_C", "opt_ds_emulator": "_emulator"}
_KERNELS = ("layer_norm", "attention", "dropout")
_OPERATORS = {"opt_ds": (*_KERNELS, "keyed_hash", "permute", "distribute"), "opt_ds_emulator": _KERNELS}
_REINSTALL = "install opt_ds again (pip install --no-build-isolation --no-deps --force-reinstall, with the same path)"


@functools.cache
def build_record() -> dict[str, Any]:
    """Return the record that the build wrote.

    Its keys are `cpu`, `cuda` and `emulator` ("built" or the reason why not), `architectures`, and `torch`, the version
    that the extension was built against.
    """
    try:
        return json.loads((_PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = "the extension was not built: run pip install --no-build-isolation . (or -e .)"
        return {"cpu": reason, "cuda": reason, "emulator": reason, "architectures": []}


@functools.cache
def load(library: str = "opt_ds") -> str:
    """Load one of the two libraries; return "" or the reason why it is not available."""
    part = "cpu" if library == "opt_ds" else "emulator"
    if build_record()[part] != "built":
        return build_record()[part]
    built_for = build_record().get("torch")  # records written by older versions have no such key
    if built_for and _minor(built_for) != _minor(torch.__version__):
        return f"built against torch {built_for}, but torch here is {torch.__version__}: {_REINSTALL}"
    files = list(_PACKAGE.glob(f"{_LIBRARIES[library]}.*.so"))
    if not files:
        return f"opt_ds/{_LIBRARIES[library]}.*.so is missing: run pip install --no-build-isolation . (or -e .)"
    try:
        torch.ops.load_library(files[0])
    except OSError as error:  # built against another torch
        return f"{files[0].name} does not load ({' '.join(str(error).split())[:200]}): {_REINSTALL}"
    missing = [name for name in _OPERATORS[library] if not hasattr(getattr(torch.ops, library), name)]
    if missing:  # the sources were updated after the build
        return f"{files[0].name} is of an older version, without {', '.join(missing)}: {_REINSTALL}"
    _register(library)
    return ""


def missing_on(device: torch.device) -> str:
    """Return "" if the fused operators run on this device, else the reason why they do not."""
    reason = load()
    if reason or device.type != "cuda":
        return reason
    record = build_record()
    if record["cuda"] != "built":
        return record["cuda"]
    major, minor = torch.cuda.get_device_capability(device)
    if not any(_runs_on(architecture, major, minor) for architecture in record["architectures"]):
        built = ", ".join(f"sm_{a}" for a in record["architectures"])
        return f"built for {built}, this GPU is sm_{major}{minor}: install again with OPT_DS_CUDA_ARCHITECTURES={major}{minor}"
    return ""


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Return whether code for an architecture ("80", "90a", "80+PTX") runs on a GPU of capability major.minor."""
    number, suffix, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", architecture).groups()  # type: ignore[union-attr]
    built = divmod(int(number), 10)
    if suffix == "a":
        return built == (major, minor)  # code for "a" architectures runs on exactly this capability
    # Machine code runs on later chips of the same generation. PTX is translated for all later generations.
    return built <= (major, minor) and (built[0] == major or (ptx is not None and not suffix))


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def _statistics(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _register(library: str) -> None:
    """Register the output shapes of one library's operators for torch.compile.

    csrc/autograd.cpp has their gradients.
    """

    @torch.library.register_fake(f"{library}::layer_norm")
    def _(x, input_bias, residual, weight, bias, eps, row_keys, dropout, key, layer_id):
        has_total = input_bias is not None or residual is not None or dropout > 0
        mean = x.new_empty(x.numel() // x.shape[-1], dtype=_statistics(x))
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        return normed, torch.empty_like(normed) if has_total else x.new_empty(0), mean, torch.empty_like(mean)

    @torch.library.register_fake(f"{library}::layer_norm_backward")
    def _(d_normed, d_total, total, mean, rstd, weight, row_keys, dropout, key, layer_id, with_input_bias):
        d_residual = torch.empty_like(total, memory_format=torch.contiguous_format)
        d_x = torch.empty_like(d_residual) if dropout > 0 else total.new_empty(0)
        width = total.shape[-1]
        d_input_bias = weight.new_empty(width if with_input_bias else 0)
        return d_residual, d_x, weight.new_empty(width), weight.new_empty(width), d_input_bias

    @torch.library.register_fake(f"{library}::dropout")
    def _(x, row_keys, dropout, key, layer_id):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake(f"{library}::attention")
    def _(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, causal, sample_index, dropout, key, layer_id):
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_statistics(q))

    @torch.library.register_fake(f"{library}::attention_backward")
    def _(
        d_out, q, k, v, out, lse, cu_queries, cu_keys, max_queries, max_keys, scale, causal, sample_index, dropout, key,
        layer_id,
    ):  # fmt: skip
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
