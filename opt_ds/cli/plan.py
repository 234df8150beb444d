"""`opt-ds plan`: estimate the requirements of a run before it starts."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import ConfigOptions
from opt_ds.cli.program import output_file
from opt_ds.errors import UserError
from opt_ds.log import ON_STDERR

if TYPE_CHECKING:
    from opt_ds.training.hardware import Gpu

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlanConfigOptions(ConfigOptions):
    """The configuration of the planned run."""

    config: Annotated[str, typer.Option(help="A preset's name, or a YAML file.")] = "opt-base"


@dataclass(frozen=True, kw_only=True)
class SampleSizeOptions:
    """The samples of a store that is not there yet."""

    text: Annotated[int, typer.Option(help="Without --store: mean WordPieces a sample.", min=1)] = 40
    regions: Annotated[int, typer.Option(help="Without --store: mean regions a sample.", min=1)] = 36
    frames: Annotated[int, typer.Option(help="Without --store: mean stored speech frames a sample.", min=1)] = 65


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The GPUs' kind and number, and what connects them."""

    gpu: Annotated[
        str, typer.Option(help="V100-16GB, V100-32GB, A100-40GB, A100-80GB, H100-80GB, H200-141GB, cpu, custom.")
    ] = "V100-16GB"
    num_gpus: Annotated[int, typer.Option(help="GPUs of the whole run.", min=1)] = 4
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that share fast links.", min=1)] = 8
    network_gbit: Annotated[float, typer.Option(help="A node's network, Gbit/s, where there are several.")] = 100.0
    utilisation: Annotated[
        float, typer.Option(help="Share of the data sheet's peak that is assumed to be reached.")
    ] = 0.35
    memory_gib: Annotated[float | None, typer.Option(help="--gpu custom: memory of one GPU.")] = None
    tflops: Annotated[
        float | None, typer.Option(help="--gpu custom: peak of its half-precision matrix products.")
    ] = None
    link_gbyte: Annotated[float, typer.Option(help="--gpu custom: one direction of its link, GB/s.")] = 16.0
    capability: Annotated[str, typer.Option(help="--gpu custom: compute capability.")] = "8.0"


@with_option_groups
def plan(
    *,
    config: PlanConfigOptions,
    cluster: ClusterOptions,
    sizes: SampleSizeOptions,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there; - for stdout.", callback=output_file)
    ] = None,
) -> None:
    """Say what a run will need: memory a GPU, the largest micro-batch, accumulation, operations, traffic, reading, time.

    Nothing is computed on a GPU: the model runs on tensors without content. Times assume --utilisation.
    """
    import json

    from opt_ds.data.truncation import truncation_lines
    from opt_ds.store.verify import open_store
    from opt_ds.tools.assumed_store import AssumedStore
    from opt_ds.tools.plan import Cluster, parse_cluster, plan_run, plan_text
    from opt_ds.training.preflight import check_store, settle

    resolved, _, taken = settle(config.config, config.changes, config.stores)
    stores = [open_store(path) for path in resolved.data.stores]
    for opened in stores:
        check_store(resolved, opened)
    for line in (*([taken] if taken else []), *truncation_lines(resolved.model, stores)):
        _LOG.info(f"note: {line}", extra=ON_STDERR)
    network_bytes = cluster.network_gbit * 1e9 / 8
    parsed = parse_cluster(
        Cluster(_gpu(cluster), cluster.num_gpus, cluster.gpus_per_node, network_bytes, cluster.utilisation)
    )
    result = plan_run(resolved, parsed, stores or AssumedStore(resolved.model, sizes.text, sizes.regions, sizes.frames))
    if json_file is not None and str(json_file) != "-":
        from opt_ds.store.files import write_json

        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, result.as_dict())
    typer.echo(json.dumps(result.as_dict(), indent=1) if str(json_file) == "-" else plan_text(result))


def _gpu(given: ClusterOptions) -> "Gpu":
    from opt_ds.training.hardware import Gpu, find_gpu, this_machine

    if given.gpu == "cpu":
        return this_machine()
    if given.gpu != "custom":
        return find_gpu(given.gpu)
    memory_gib, tflops, link_gbyte = given.memory_gib, given.tflops, given.link_gbyte
    if memory_gib is None or tflops is None:
        raise UserError("--gpu custom: give --memory-gib and --tflops")
    for option, value in {"--memory-gib": memory_gib, "--tflops": tflops, "--link-gbyte": link_gbyte}.items():
        if not 0 < value < math.inf:
            raise UserError(f"{option} {value:g}: a number above 0")
    try:
        major, minor = (int(part) for part in given.capability.split("."))
    except ValueError:
        raise UserError(f'--capability "{given.capability}": expected two numbers such as 8.0') from None
    return Gpu("custom", memory_gib, (major, minor), tflops * 1e12, tflops * 1e12 / 8, 0.0, link_gbyte * 1e9)
