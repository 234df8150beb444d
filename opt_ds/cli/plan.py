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
    """The configuration of the estimated run."""

    config: Annotated[str, typer.Option(help="Name of a preset, or a YAML file.")] = "opt-base"


@dataclass(frozen=True, kw_only=True)
class SampleSizeOptions:
    """Sizes of assumed samples, if there is no store."""

    text: Annotated[int, typer.Option(help="Without --store: mean number of WordPieces per sample.", min=1)] = 40
    regions: Annotated[int, typer.Option(help="Without --store: mean number of regions per sample.", min=1)] = 36
    frames: Annotated[
        int, typer.Option(help="Without --store: mean number of stored audio frames per sample.", min=1)
    ] = 65


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The GPUs' kind and number, and what connects them."""

    gpu: Annotated[
        str, typer.Option(help="GPU: V100-16GB, V100-32GB, A100-40GB, A100-80GB, H100-80GB, H200-141GB, cpu or custom.")
    ] = "V100-16GB"
    num_gpus: Annotated[int, typer.Option(help="Number of GPUs of the run.", min=1)] = 4
    gpus_per_node: Annotated[int, typer.Option(help="Number of GPUs per node.", min=1)] = 8
    network_gbit: Annotated[
        float, typer.Option(help="Network bandwidth per node, in Gbit/s. Used with several nodes.")
    ] = 100.0
    utilisation: Annotated[float, typer.Option(help="Assumed utilisation: fraction of the data sheet's peak.")] = 0.35
    memory_gib: Annotated[float | None, typer.Option(help="--gpu custom: memory per GPU, in GiB.")] = None
    tflops: Annotated[
        float | None, typer.Option(help="--gpu custom: peak of half-precision matrix products, in TFLOP/s.")
    ] = None
    link_gbyte: Annotated[
        float, typer.Option(help="--gpu custom: bandwidth of the link in one direction, in GB/s.")
    ] = 16.0
    capability: Annotated[str, typer.Option(help="--gpu custom: compute capability.")] = "8.0"


@with_option_groups
def plan(
    *,
    config: PlanConfigOptions,
    cluster: ClusterOptions,
    sizes: SampleSizeOptions,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file for all figures. -: standard output.", callback=output_file)
    ] = None,
) -> None:
    """Estimate a run: memory per GPU, largest micro-batch, accumulation, operations, traffic, reading rate, time.

    No GPU is used: the model runs on tensors without content. Times assume --utilisation.
    """
    import json

    from opt_ds.data.truncation import truncation_lines
    from opt_ds.store.verify import open_store
    from opt_ds.tools.assumed_store import AssumedStore
    from opt_ds.tools.plan import Cluster, estimate_run, estimate_text, parse_cluster
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
    result = estimate_run(
        resolved, parsed, stores or AssumedStore(resolved.model, sizes.text, sizes.regions, sizes.frames)
    )
    if json_file is not None and str(json_file) != "-":
        from opt_ds.store.files import write_json

        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, result.as_dict())
    typer.echo(json.dumps(result.as_dict(), indent=1) if str(json_file) == "-" else estimate_text(result))


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
