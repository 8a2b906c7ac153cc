"""What the TPU's own compiler makes of the network, without a TPU: `python -m benchmarks.tpu_compile`.

Needs libtpu, in an environment of its own: `pip install -e ".[tpu,finetune]" -c constraints.txt`. For each operation of
the compiled program the larger of its scheduled bundles and its traffic with HBM counts, and their sum is the figure
(see docs/performance.md). Beside it stands the sum of `estimated_cycles`, a heuristic of the compiler's search, about
twice too high and no ranking.
"""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.report import print_setting
from benchmarks.tpu.compile import Compiled, Form, compile_for, dump_folder, inference, mesh_of, training
from benchmarks.tpu.cycles import CHIPS, Cost, costs, read_schedules, transferred
from benchmarks.tpu.program import Program
from dpn_jax.fast.grouped import Merged
from dpn_jax.fast.plan import PLANS
from dpn_jax.pretrained import get_config

Task = Literal["inference", "training", "remat"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    models: tuple[str, ...] = ("dpn92",)
    """Variants."""
    topologies: tuple[str, ...] = ("v5e:2x2",)
    """TPU topologies: v5e:2x2, v5e:4x4, v6e:2x2."""
    batches: tuple[int, ...] = (128,)
    """Images a chip."""
    chips: tuple[int, ...] = (1,)
    """Chips of the topology to use, data-parallel."""
    tasks: tuple[Task, ...] = ("inference",)
    """A classifier's program; a training step; one that recomputes activations (`remat`)."""
    forms: tuple[Form, ...] = ("fast", "plain")
    """The fast formulation, the plain one."""
    merge_widths: tuple[int, ...] = ()
    """Try these for the plan's fewest channels of a merged group, in the fast form of inference."""
    vmem_kib: tuple[int, ...] = ()
    """Try these for the compiler's limit of scoped VMEM, KiB, likewise."""
    size: int = 224
    """Side of the images, pixels."""
    operations: int = 0
    """Print so many of the costliest operations."""
    keep: Path | None = None
    """Keep each program's text and schedules in this folder."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints a row for each program."""
    if (options.merge_widths or options.vmem_kib) and (options.tasks, options.forms) != (("inference",), ("fast",)):
        raise SystemExit("--merge-widths and --vmem-kib are for --tasks inference --forms fast")
    dump_folder()  # before the compiler is loaded
    report = {"setting": print_setting("benchmarks.tpu_compile"), "rows": []}
    print(f"bfloat16, {options.size} pixels; M cycles a batch, GB and MB a chip\n")
    print(
        f"{'model':<8}{'task':<10}{'topology':<9}{'chips':>6}{'batch':>7}  {'form':<6}{'merge':>6}{'VMEM KiB':>9}"
        f"{'cycles':>8}{'compute':>9}"
        f"{'GB':>7}{'async GB':>9}{'heuristic':>10}{'memory MB':>10}{'compile s':>10}"
    )
    choices = (options.models, options.tasks, options.topologies, options.chips, options.batches, options.forms)
    tried = (options.merge_widths or (None,), options.vmem_kib or (None,))
    names = ("model", "task", "topology", "chips", "batch", "form", "merge", "vmem_kib")
    for choice in itertools.product(*choices, *tried):
        row = dict(zip(names, choice, strict=True))
        row |= measure(row, options)
        report["rows"].append(row)
        print(
            f"{row['model']:<8}{row['task']:<10}{row['topology']:<9}{row['chips']:>6}{row['batch']:>7}  "
            f"{row['form']:<6}{row['merge'] or '-':>6}{row['vmem_kib'] or '-':>9}"
            f"{row['cycles'] / 1e6:>8.1f}{row['compute'] / 1e6:>9.1f}{row['bytes'] / 1e9:>7.1f}"
            f"{row['async_bytes'] / 1e9:>9.1f}{row['heuristic'] / 1e6:>10.1f}{row['memory'] / 1e6:>10.0f}"
            f"{row['compile_s']:>10.0f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def measure(row: dict[str, object], options: Options) -> dict[str, float]:
    """Compiles the program of a row, and reads what the compiler wrote."""
    config, mesh = get_config(row["model"]), mesh_of(row["topology"], row["chips"])
    shape = {"batch": row["batch"], "size": options.size, "form": row["form"]}
    plan = PLANS["tpu"]
    if row["merge"]:
        plan = dataclasses.replace(plan, grouped=((32, Merged(width=row["merge"])),))
    if row["vmem_kib"]:
        limit = ("xla_tpu_scoped_vmem_limit_kib", str(row["vmem_kib"]))
        plan = dataclasses.replace(plan, compiler_options=(*plan.compiler_options, limit))
    if row["task"] == "inference":
        lowered = inference(config, mesh, **shape, plan=plan)
    else:
        lowered = training(config, mesh, **shape, remat=row["task"] == "remat")
    for path in dump_folder().iterdir():
        path.unlink()
    compiled = compile_for(lowered, dict(plan.compiler_options) if row["form"] == "fast" else {})
    if options.keep:
        _keep(compiled, options.keep / "-".join(str(value) for value in row.values() if value).replace(":", "_"))
    program = Program.parse(compiled.text)
    found = costs(program, read_schedules(dump_folder()), CHIPS[row["topology"].partition(":")[0]])
    for cost in sorted(found, key=lambda cost: -cost.cycles)[: options.operations]:
        _print_cost(cost)
    return {
        "cycles": sum(cost.cycles for cost in found),
        "compute": sum(cost.compute for cost in found),
        "bytes": sum(cost.bytes for cost in found),
        "async_bytes": transferred(program),
        "heuristic": sum(int(cycles) for cycles in re.findall(r'"estimated_cycles":"(\d+)"', compiled.text)),
        "memory": compiled.memory,
        "temporary": compiled.temporary,
        "compile_s": compiled.seconds,
    }


def _keep(compiled: Compiled, folder: Path) -> None:
    shutil.copytree(dump_folder(), folder, dirs_exist_ok=True)
    (folder / "program.hlo").write_text(compiled.text)


def _print_cost(cost: Cost) -> None:
    shapes = ", ".join(array.text.partition("{")[0] for array in cost.operation.outputs)
    unknown = f", {cost.unknown} loops of unknown length" if cost.unknown else ""
    print(f"  {cost.compute:>12,.0f} {cost.traffic:>12,.0f}  {cost.operation.name:<40} {shapes}{unknown}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
