"""``edgeexit doctor``: shows hardware and packages, and how to install missing ones."""

from __future__ import annotations

import click

from edgeexit.cli.common import print_json, print_table, size
from edgeexit.cli.options import json_option, verbosity_options


@click.command("doctor")
@json_option
@verbosity_options
def command(as_json: bool, verbose: int, quiet: bool) -> None:
    """Show hardware and packages, and how to install missing ones.

    Exit code 1 if an installed package cannot work.

    Examples:

    \b
    edgeexit doctor
    edgeexit doctor --json
    """
    from edgeexit.measure.doctor import diagnose

    found = diagnose()
    machine = found.machine
    if as_json:
        print_json(
            {
                "machine": machine,
                "packages": found.packages,
                "onnxruntime_providers": found.providers,
                "extras": found.extras,
                "problems": found.problems,
            }
        )
    elif not quiet:
        click.echo(
            f"edgeexit {machine['edgeexit']}, Python {machine['python']}, {machine['system']} "
            f"({machine['architecture']})"
        )
        limits = [f"{machine['cores_usable']} of {machine['cores']} cores usable"]
        if machine["cgroup_cores"] is not None:
            limits.append(f"container limit {machine['cgroup_cores']:g} cores")
        if machine["cgroup_memory_bytes"] is not None:
            limits.append(f"container limit {size(machine['cgroup_memory_bytes'])} memory")
        click.echo(f"{machine['processor']}; {', '.join(limits)}")
        gpus = [f"{g['name']} ({g['memory']}, driver {g['driver']})" for g in machine["gpus"]]
        click.echo(f"GPU: {', '.join(gpus) or 'none found'}")
        if machine["jetson"]:
            click.echo(f"Jetson: {machine['jetson']}")
        click.echo(f"ONNX Runtime providers: {', '.join(found.providers) or 'none'}")
        click.echo("")
        print_table(
            "",
            ("package", "version"),
            [(name, version or "-") for name, version in found.packages.items()],
        )
        click.echo("")
        print_table(
            "",
            ("extra", "adds", "state", "command"),
            [
                (
                    name,
                    extra["adds"],
                    "installed" if extra["complete"] else f"missing {', '.join(extra['missing'])}",
                    "" if extra["complete"] else extra["command"],
                )
                for name, extra in found.extras.items()
            ],
        )
    for problem in found.problems:
        click.echo(f"problem: {problem['what']}\n    fix: {problem['fix']}", err=True)
    if found.problems:
        click.get_current_context().exit(1)
