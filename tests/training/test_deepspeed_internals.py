"""What `deepspeed_internals` relies on in DeepSpeed is as recorded here, and no other module relies on such things.

After an upgrade of DeepSpeed, a failing test names what changed and the functions to review. Compare the two versions
of the changed source, adapt the functions, then record the new signature or hash in the table below.
"""

import ast
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import pytest

import opt_ds
from opt_ds.training import deepspeed_internals

PACKAGE = Path(opt_ds.__file__).parent
MODULE = Path(deepspeed_internals.__file__)

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_SCALER = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"


class Attributes(NamedTuple):
    """Attributes that the code of a class or module assigns or defines."""

    owner: str
    names: str
    used_by: str


class Method(NamedTuple):
    """A method with its signature and, where its behaviour matters, the hash of its source."""

    owner: str
    name: str
    used_by: str
    signature: str
    source: str = ""


ATTRIBUTES = (
    Attributes(_ENGINE, "basic_optimizer optimizer device", "base_optimizer, flat_masters, take_step, discard_gradients"),
    Attributes(_BF16, "immediate_grad_update bf16_groups fp32_groups_gradients fp32_groups_has_gradients", "use_few_kernels"),
    Attributes("deepspeed.runtime.bf16_optimizer", "_hp_grad", "use_few_kernels"),  # of a parameter
    Attributes(_ZERO_12, "use_grad_accum_attribute overlap_comm cpu_offload averaged_gradients", "use_few_kernels"),
    Attributes(_ZERO_12, "_grad_acc_hooks bit16_groups gradient_accumulation_dtype", "use_few_kernels"),
    Attributes(_ZERO_12, "loss_scaler overflow check_grad_overflow", "scaler_state, discard_gradients"),
    Attributes("deepspeed.runtime.zero.stage_1_and_2", "grad_accum", "use_few_kernels"),  # of a parameter
    Attributes(_ZERO_3, "fp32_partitioned_groups_flat loss_scaler overflow", "flat_masters, scaler_state, discard_gradients"),
    Attributes(_SCALER, "cur_scale cur_iter last_overflow_iter cur_hysteresis dynamic", "scaler_state, set_scaler_state"),
    Attributes(_SCALER, "min_scale raise_error_at_min_scale", "least_loss_scale, take_step"),
    Attributes("deepspeed.runtime.zero.partition_parameters", "ds_shape ds_numel ds_tensor", "full_shape, own_slice"),
    Attributes("deepspeed.runtime.compiler", "compile", "load_without_compiling"),
    Attributes("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", "section_models"),
    Attributes("deepspeed.runtime.precision_config", "DeepSpeedBF16Config DeepSpeedFP16Config", "section_models"),
    Attributes("deepspeed.comm.config", "CommsLoggerConfig", "section_models"),
    Attributes("deepspeed.compile.config", "CompileConfig", "section_models"),
)
METHODS = (
    Method(_ENGINE, "backward", "Stepper.take", "self, loss, retain_graph=False, scale_wrt_gas=True"),
    Method(_ENGINE, "set_gradient_accumulation_boundary", "Stepper.take", "self, is_boundary"),
    Method(_ENGINE, "get_global_grad_norm", "Stepper._update", "self"),
    Method(_ENGINE, "was_step_applied", "take_step", "self", "fe4f20e3c18d"),
    Method(_ENGINE, "zero_grad", "discard_gradients", "self"),
    Method(_ENGINE, "_take_model_step", "take_step, discard_gradients", "self, lr_kwargs", "dbc33a55964a"),
    Method(_BF16, "step", "discard_gradients, link_moments", "self, closure=None", "57799dc73e59"),
    Method(_BF16, "update_hp_grads", "use_few_kernels", "self, clear_lp_grads=False", "78000b33a3d1"),
    Method(_BF16, "_update_hp_grad", "use_few_kernels", "self, lp, group_idx, param_idx, clear_lp_grads", "fc92d20efe18"),
    Method(_BF16, "backward_prologue", "use_few_kernels", "self", "b942477a42db"),
    Method(_BF16, "backward_epilogue", "use_few_kernels", "self, update_hp_grads=True, clear_lp_grads=False, **bwd_kwargs",
           "3c27006450f5"),
    Method(_BF16, "clear_hp_grads", "discard_gradients", "self", "bf5c3ca18956"),
    Method(_BF16, "get_grads_for_norm", "discard_gradients", "self, for_clipping=False"),
    Method(_BF16, "_lazy_init_hp_params_optimizer_state", "link_moments", "self", "ce2000fd659a"),
    Method(_ZERO_12, "step", "take_step, discard_gradients", "self, closure=None", "5a006dcdd1df"),
    Method(_ZERO_12, "_update_scale", "take_step, discard_gradients", "self, has_overflow=False", "f5b5e6c650d7"),
    Method(_ZERO_12, "check_overflow", "discard_gradients", "self, partition_gradients=True", "b50b2703c7f8"),
    Method(_ZERO_12, "reset_cpu_buffers", "take_step (_drop_offloaded_sums)", "self", "db8676cfdcda"),
    Method(_ZERO_12, "has_overflow", "use_few_kernels", "self, partition_gradients=True", "5dfe45ecc7d8"),
    Method(_ZERO_12, "has_overflow_partitioned_grads_serial", "use_few_kernels", "self", "32d8936eb3ab"),
    Method(_ZERO_12, "fill_grad_accum_attribute", "use_few_kernels", "self", "5923f6e7bd20"),
    Method(_ZERO_12, "_fill_param_grad_accum_attribute", "use_few_kernels", "self, param", "3e90ee9be54f"),
    Method(_ZERO_12, "create_gradient_handling_hooks", "use_few_kernels", "self", "7cf3415662fa"),
    Method(_ZERO_12, "process_gradients", "use_few_kernels", "self, param, i", "551c5c435d17"),
    Method(_ZERO_12, "backward_epilogue", "use_few_kernels", "self, *args, **kwargs", "ad5b7ff6b780"),
    Method(_ZERO_12, "setup_buckets", "use_few_kernels", "self", "ce6cf2658e8e"),
    Method(_ZERO_12, "reduce_gradients", "use_few_kernels", "self, pipeline_parallel=False", "55159f601cfa"),
    Method(_ZERO_12, "_lazy_init_hp_params_optimizer_state", "link_moments", "self", "65c11e1fa14c"),
    Method(_ZERO_3, "step", "take_step, discard_gradients", "self, closure=None", "eddd8f4529ec"),
    Method(_ZERO_3, "_update_scale", "take_step, discard_gradients", "self, has_overflow=False", "f5b5e6c650d7"),
    Method(_ZERO_3, "_overflow_check_and_loss_scale_update", "discard_gradients", "self, update_scale=True", "02c35a1531d2"),
    Method(_ZERO_3, "_loss_scale_update_and_overflow_cleanup", "take_step, discard_gradients", "self", "cb925a8de647"),
    Method(_SCALER, "update_scale", "take_step", "self, overflow", "ee34a1791734"),
)  # fmt: skip


# ---- comparing DeepSpeed with the table


def found(owner: str) -> Any:
    """The class or module of "module:Class" or "module"."""
    module, _, name = owner.partition(":")
    thing = importlib.import_module(module)
    return getattr(thing, name) if name else thing


def source_of(module: str) -> str:
    """The source of a module, without importing it."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""


@functools.cache
def trees(thing: Any) -> list[ast.AST]:
    """Syntax trees of a module, or of a class and its bases."""
    parts = [cls for cls in thing.__mro__ if cls is not object] if isinstance(thing, type) else [thing]
    own = [part for part in parts if not isinstance(part, type) or part.__module__ not in ("torch.nn.modules.module", "builtins")]
    return [ast.parse(textwrap.dedent(inspect.getsource(part))) for part in own]


def assigned_names(thing: Any) -> set[str]:
    """Names that a class (with its bases) or a module defines, and attributes that its code assigns to any object."""
    nodes = [node for tree in trees(thing) for node in ast.walk(tree)]
    return set(dir(thing)) | {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def method_of(cls: type, name: str) -> ast.FunctionDef | None:
    """A method's definition, below any decorators that hide its parameters."""
    nodes = (node for tree in trees(cls) for part in ast.iter_child_nodes(tree) for node in ast.iter_child_nodes(part))
    return next((node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name), None)


def canonical(node: Any) -> Any:
    """A syntax tree without docstrings, annotations, layout and what differs between versions of Python."""
    if isinstance(node, ast.AST):
        left_out = ["ctx", "kind", "type_comment", "type_params", "annotation", "returns"]
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in left_out and value not in (None, [])]
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
        return [type(node).__name__, *([name, canonical(value)] for name, value in fields)]
    return [canonical(item) for item in node] if isinstance(node, list) else repr(node)


def source_hash(method: ast.FunctionDef) -> str:
    """Hash of a method's code, without comments, docstrings and annotations."""
    return hashlib.sha256(repr(canonical(method)).encode()).hexdigest()[:12]


def signature(method: ast.FunctionDef) -> str:
    """Names and defaults of a method's parameters."""
    arguments = copy.deepcopy(method.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def problem(entry: Attributes | Method) -> str | None:
    """What DeepSpeed changed about an entry of the table, and what to review."""
    version, review = deepspeed.__version__, f"review {entry.used_by} in training/{MODULE.name}"
    try:
        owner = found(entry.owner)
    except (ImportError, AttributeError):
        return f"DeepSpeed {version} has no {entry.owner}: {review}"
    if isinstance(entry, Attributes):
        missing = sorted(set(entry.names.split()) - assigned_names(owner))
        return f"DeepSpeed {version}: {entry.owner} no longer has {', '.join(missing)}: {review}" if missing else None
    method = method_of(owner, entry.name)
    if method is None:
        return f"DeepSpeed {version}: {entry.owner} no longer has {entry.name}: {review}"
    if signature(method) != entry.signature:
        change = f"has the parameters ({signature(method)}), recorded are ({entry.signature})"
        return f"DeepSpeed {version}: {entry.owner}.{entry.name} {change}: {review}"
    if entry.source and source_hash(method) != entry.source:
        change = f"has other code (hash {source_hash(method)}, recorded is {entry.source})"
        return f"DeepSpeed {version}: {entry.owner}.{entry.name} {change}: {review}"
    return None


@pytest.mark.parametrize("entry", [*ATTRIBUTES, *METHODS], ids=lambda entry: f"{entry.owner.split('.')[-1]}.{entry[1]}")
def test_deepspeed_is_as_recorded(entry: Attributes | Method) -> None:
    change = problem(entry)
    assert change is None, change


def test_deepspeed_has_what_is_set_before_it_is_loaded() -> None:
    assert "DS_ACCELERATOR" in source_of("deepspeed.accelerator.real_accelerator"), "review name_accelerator"
    assert "__compatible_ops__" in source_of("deepspeed.ops"), "review load_without_compiling"
    assert "deepspeed_shm_comm" in found("deepspeed.ops.op_builder.all_ops").ALL_OPS, "review load_without_compiling"
    assert "@compiler.compile()" in source_of("deepspeed.runtime.zero.muon.original_muon"), "review load_without_compiling"
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in source_of("deepspeed.runtime.engine"), "review load_without_compiling"
    for section, model in deepspeed_internals.section_models().items():
        assert model.model_fields, f"{section}: review section_models"


# ---- the comparison can fail


RECORDED = """
class Scaler:
    def __init__(self):
        self.scale = 1

    def update(self, overflow=False):
        self.scale *= 2
"""
CHANGES = {
    "a comment": (("*= 2", "*= 2  # doubled"), None),
    "a docstring": (("        self.scale *= 2", '        """Double it."""\n        self.scale *= 2'), None),
    "an annotation": (("overflow=False)", "overflow: bool = False) -> None"), None),
    "a default": (("overflow=False", "overflow=True"), "has the parameters (self, overflow=True), recorded are"),
    "a parameter": (("overflow=False", "overflow=False, *, force"), "has the parameters"),
    "the body": (("*= 2", "*= 4"), "Scaler.update has other code (hash"),
    "the method's name": (("def update", "def grow"), "no longer has update"),
    "the attribute's name": (("self.scale", "self.factor"), "no longer has scale"),
    "the class's name": (("class Scaler", "class Scale"), "has no other_version:Scaler"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_in_another_version_is_reported(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old, new), expected = CHANGES[what]
    (tmp_path / "recorded_version.py").write_text(RECORDED)
    (tmp_path / "other_version.py").write_text(RECORDED.replace(old, new))
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("recorded_version", "other_version"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    update = method_of(found("recorded_version:Scaler"), "update")
    assert update is not None
    entries = (
        Attributes("recorded_version:Scaler", "scale", "take_step"),
        Method("recorded_version:Scaler", "update", "take_step", signature(update), source_hash(update)),
    )
    assert [problem(entry) for entry in entries] == [None, None]
    problems = [text for entry in entries if (text := problem(entry._replace(owner="other_version:Scaler")))]
    if expected is None:
        assert not problems
    else:
        assert expected in problems[0] and "review take_step in training/deepspeed_internals.py" in problems[0]


# ---- no other module relies on such things

#: The engine's documented interface.
PUBLIC_ENGINE = {
    "module", "train", "eval", "backward", "step", "zero_grad", "was_step_applied", "set_gradient_accumulation_boundary",
    "get_global_grad_norm", "zero_optimization_stage",
}  # fmt: skip
PUBLIC_IMPORTS = {"deepspeed", "deepspeed.DeepSpeedEngine"}
#: Recorded names that objects of other libraries have too. The rule for the engine's attributes covers them.
COMMON = {"optimizer", "device", "step", "backward", "zero_grad", "dynamic", "overflow", "compile", "overlap_comm"}
NAMES = {name for entry in ATTRIBUTES for name in entry.names.split()} | {entry.name for entry in METHODS}
PRIVATE = NAMES - COMMON - PUBLIC_ENGINE | {"DS_ACCELERATOR", "__compatible_ops__", "ds_id", "ds_status", "ds_persist"}


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every use of DeepSpeed's private parts: attributes, their names as text, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = getattr(node.value, "attr", getattr(node.value, "id", ""))
            if node.attr in PRIVATE or (holder == "engine" and node.attr not in PUBLIC_ENGINE):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and node.value in PRIVATE:
            yield node.lineno, str(node.value)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if _is_private_import(a.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in imported if _is_private_import(name))


def _is_private_import(name: str) -> bool:
    is_deepspeed = name == "deepspeed" or name.startswith("deepspeed.")
    return is_deepspeed and name not in PUBLIC_IMPORTS and not name.startswith("deepspeed.utils.safe_")


def test_no_other_module_uses_private_parts_of_deepspeed() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != MODULE]
    assert len(files) > 100
    uses = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in files
        for line, name in private_uses(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert uses == [], f"move these behind a function of training/{MODULE.name}"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("self.engine.optimizer.step()", "optimizer"),
        ("engine.basic_optimizer.param_groups", "basic_optimizer"),
        ("getattr(parameter, 'ds_numel', 0)", "ds_numel"),
        ("parameter.ds_tensor.numel()", "ds_tensor"),
        ("scaler.cur_scale = 1", "cur_scale"),
        ("os.environ['DS_ACCELERATOR'] = 'cpu'", "DS_ACCELERATOR"),
        ("from deepspeed.runtime.engine import DeepSpeedEngine", "deepspeed.runtime.engine.DeepSpeedEngine"),
        ("import deepspeed.comm as dist", "deepspeed.comm"),
        ("from deepspeed import comm", "deepspeed.comm"),
        ("deepspeed.initialize(); self.engine.module; from_ = 'deepspeed'", None),
        ("from deepspeed import DeepSpeedEngine\nfrom deepspeed.utils import safe_get_full_fp32_param", None),
    ],
)
def test_a_private_use_is_found(code: str, name: str | None) -> None:
    assert [found for _, found in private_uses(ast.parse(code))][:1] == ([name] if name else [])


def test_the_table_has_what_the_module_uses_and_no_more() -> None:
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    holders = {"engine", "optimizer", "scaler", "parameter", "p", "compiler", "loss_scaler"}
    public = {"param_groups", "state", "grad", "shape", "numel", "basic_optimizer", *PUBLIC_ENGINE}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = getattr(node.value, "attr", getattr(node.value, "id", ""))
            if holder in holders and node.attr not in public:
                used.add(node.attr)
    assert used <= NAMES, f"without an entry in the table: {sorted(used - NAMES)}"
    words = [getattr(node, key, None) for node in ast.walk(tree) for key in ("attr", "value", "name")]
    texts = {word for word in words if isinstance(word, str)}
    for entry in ATTRIBUTES:
        assert set(entry.names.split()) <= texts, f"{entry.owner}: recorded and not used"
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for entry in (*ATTRIBUTES, *METHODS):
        named = {word.strip("(),") for word in entry.used_by.split()} - {"Stepper.take", "Stepper._update"}
        assert named <= functions, f"{entry.owner}: used by an unknown function"
