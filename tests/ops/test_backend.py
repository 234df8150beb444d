"""The choice of kernels, and the seeding of dropout."""

import importlib
import types
from collections.abc import Iterator

import pytest
import torch

from opt_ds.errors import UserError
from opt_ds.ops import backend, compiled
from opt_ds.ops.attention import attention
from opt_ds.ops.dropout import dropout
from opt_ds.ops.layer_norm import add_layer_norm
from opt_ds.ops.sequences import Sequences


@pytest.fixture(autouse=True)
def choose_again() -> Iterator[None]:
    yield
    backend.choose("auto", "cpu")


def test_auto_chooses_for_every_operator() -> None:
    chosen = backend.choose("auto")
    assert set(chosen) == set(backend.OPERATORS) and set(chosen.values()) <= set(backend.BACKENDS)
    assert backend.describe() == chosen


def test_on_the_cpu_auto_is_pytorch() -> None:
    assert set(backend.choose("auto", "cpu").values()) == {"torch"} and backend.reasons() == []


@pytest.mark.parametrize("name", ["torch", "fused", "emulator"])
def test_a_backend_can_be_asked_for(name: str) -> None:
    assert set(backend.choose(name, "cpu").values()) == {name}


def test_operators_can_differ() -> None:
    assert backend.choose("layer_norm=fused, attention=torch", "cpu") == {
        "layer_norm": "fused", "attention": "torch", "dropout": "torch",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torhc", r'ops.backend "torhc" is unknown \(did you mean "torch"\?\): use auto, torch, fused, apex or emulator'),
        ("atention=torch", r'names no operator "atention" \(did you mean "attention"\?\)'),
        ("attention=fusd", r'"fusd" is unknown \(did you mean "fused"\?\)'),
        ("apex", "cannot run layer_norm here: "),
    ],
)
def test_a_wrong_name_is_one_line_with_the_remedy(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        backend.choose(name, "cpu")
    assert "\n" not in str(error.value)


def test_the_package_on_pypi_that_is_called_apex_is_not_taken_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def impostor(name: str, *arguments):
        return types.ModuleType("apex") if name == "apex" else real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", impostor)
    backend.apex_missing.cache_clear()
    try:
        assert "not NVIDIA's" in backend.apex_missing()
    finally:
        backend.apex_missing.cache_clear()


def test_a_gpu_that_the_build_does_not_know_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(backend, "apex_missing", lambda: "apex is not installed")
    for record, reason in (
        ({"cuda": "no nvcc on PATH", "architectures": []}, "no nvcc on PATH"),
        ({"cuda": "built", "architectures": ["75", "80"]}, "built for sm_75, sm_80, this GPU is sm_70: install again with "
                                                           "OPT_DS_CUDA_ARCHITECTURES=70"),
    ):  # fmt: skip
        monkeypatch.setattr(compiled, "build_record", lambda record=record: {"cpu": "built", "emulator": "built", **record})
        assert set(backend.choose("auto", gpu).values()) == {"torch"}
        assert backend.reasons()[0] == f"layer_norm: our kernel is not used: {reason}"
        with pytest.raises(UserError, match="cannot run layer_norm here"):
            backend.choose("fused", gpu)
    monkeypatch.setattr(compiled, "build_record", lambda: {"cpu": "built", "cuda": "built", "architectures": ["70"]})
    assert set(backend.choose("auto", gpu).values()) == {"fused"}


@pytest.mark.parametrize(
    ("architecture", "runs_on", "not_on"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("80+PTX", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("90a+PTX", [(9, 0)], [(10, 0)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_which_gpus_run_what_was_built(
    monkeypatch: pytest.MonkeyPatch, architecture: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(compiled, "load", lambda library="opt_ds": "")
    monkeypatch.setattr(compiled, "build_record", lambda: {"cuda": "built", "architectures": [architecture]})
    for capability in runs_on + not_on:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, capability=capability: capability)
        assert (compiled.missing_on(torch.device("cuda")) == "") == (capability in runs_on), capability


def test_a_build_against_another_torch_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its C++ interface may differ between minor versions: a library that loads may still crash."""
    here = torch.__version__
    record = {"cpu": "built", "cuda": "none", "emulator": "built", "architectures": []}
    for version, loads in ((here, True), (None, True), ("1.9.0", False)):
        monkeypatch.setattr(compiled, "build_record", lambda version=version: record | {"torch": version})
        reason = compiled.load.__wrapped__("opt_ds") if not loads else compiled.load()
        assert (reason == "") == loads
    assert reason.startswith(f"built against torch 1.9.0, but torch here is {here}: install opt_ds again (pip install ")


def test_a_build_of_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update of a checkout without a build."""
    wanted = {name: (*operators, "of_tomorrow") for name, operators in compiled._OPERATORS.items()}
    monkeypatch.setattr(compiled, "_OPERATORS", wanted)
    reason = compiled.load.__wrapped__("opt_ds")
    assert "is of an older version, without of_tomorrow: install opt_ds again" in reason


def test_a_missing_build_says_how_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(compiled, "_PACKAGE", tmp_path)
    for function in (compiled.build_record, compiled.load):
        function.cache_clear()
    try:
        with pytest.raises(UserError, match="was not built: run pip install --no-build-isolation"):
            backend.choose("fused", "cpu")
        assert set(backend.choose("auto", "cpu").values()) == {"torch"}, "nothing is lost on the CPU"
    finally:
        for function in (compiled.build_record, compiled.load):
            function.cache_clear()


@pytest.mark.parametrize("name", ["fused", "emulator"])
def test_the_public_functions_are_the_same_on_every_backend(name: str) -> None:
    """Without dropout, and the shapes that a kernel could stumble over: views, no rows, no sequences."""
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.from_lengths([3, 0, 40])
    fused = torch.randn(43, 3, 2, 32, generator=generator)
    x, weight, bias = torch.randn(43, 64, generator=generator), torch.ones(64), torch.zeros(64)
    none = Sequences.from_lengths([])

    def outputs() -> list[torch.Tensor]:
        rows = attention(*fused.unbind(1), sequences, sequences, causal=True)
        nothing = torch.zeros(0, 2, 32)
        return [rows, *add_layer_norm(x, rows.flatten(1), weight, bias, 1e-5, rows=sequences),
                attention(nothing, nothing, nothing, none, none), dropout(x, 0.0, None),
                add_layer_norm(x[:0], x[:0], weight, bias, 1e-5)[0]]  # fmt: skip

    backend.choose("torch", "cpu")
    expected = outputs()
    backend.choose(name, "cpu")
    for own, true in zip(outputs(), expected, strict=True):
        assert own.shape == true.shape and torch.allclose(own, true, atol=2e-6)


def test_dropout_is_a_function_of_seed_step_rank_and_micro_batch() -> None:
    def draw(*keys: int) -> list[float]:
        backend.seed_dropout(*keys)
        return torch.rand(4).tolist()

    first = draw(1, 2, 3, 4)
    assert draw(1, 2, 3, 4) == first
    others = [draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5), draw(1, 2, 4, 3)]
    assert len({tuple(x) for x in [first, *others]}) == 6


def test_our_dropout_is_a_function_of_seed_and_step_alone() -> None:
    backend.choose("fused", "cpu")
    rows = Sequences.from_lengths([4, 3], sample_index=[8, 2])

    def draw(*keys: int) -> torch.Tensor:
        backend.seed_dropout(*keys)
        return dropout(torch.ones(7, 64), 0.5, rows)

    first = draw(1, 2, 3, 4)
    assert torch.equal(draw(1, 2, 0, 0), first)
    assert not torch.equal(draw(2, 2, 3, 4), first) and not torch.equal(draw(1, 3, 3, 4), first)
    backend.seed_dropout(1, 2, 0, 0)
    elsewhere = dropout(torch.ones(9, 64), 0.5, Sequences.from_lengths([2, 3, 4], sample_index=[5, 2, 8]))
    assert torch.equal(elsewhere[5:], first[:4]) and torch.equal(elsewhere[2:5], first[4:]), (
        "a sample keeps its bits wherever it lies"
    )
