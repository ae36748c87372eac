"""``edgeexit doctor``: shows hardware and packages, and how to install missing ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.common import print_json, print_table, size
from edgeexit.cli.options import json_option, verbosity_options

if TYPE_CHECKING:
    from edgeexit.measure.doctor import Diagnosis


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
    if as_json:
        print_json(
            {
                "machine": found.machine,
                "packages": found.packages,
                "onnxruntime_providers": found.providers,
                "extras": found.extras,
                "problems": found.problems,
                "energy": found.energy,
                "state": found.state,
            }
        )
    elif not quiet:
        _print(found, why=verbose > 0)
    for problem in found.problems:
        click.echo(f"problem: {problem['what']}\n    fix: {problem['fix']}", err=True)
    if found.problems:
        click.get_current_context().exit(1)


def _print(found: Diagnosis, *, why: bool) -> None:
    """Everything but problems; `why`: also why something is not known."""
    machine = found.machine
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
    board = f"board {machine['board']}; " if machine["board"] else ""
    free = machine["memory_available_bytes"]
    available = "" if free is None else f" ({size(free)} available)"
    click.echo(
        f"{board}memory {size(machine['memory_bytes'])}{available}; "
        f"{size(machine['disk_free_bytes'])} free here"
    )
    gpus = [f"{g['name']} ({g['memory']}, driver {g['driver']})" for g in machine["gpus"]]
    click.echo(f"GPU: {', '.join(gpus) or 'none found'}")
    if machine["jetson"]:
        click.echo(f"Jetson: {machine['jetson']}")
    for line in [*_energy(found.energy, why=why), *_state(found.state, why=why)]:
        click.echo(line)
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


def _energy(found: dict[str, Any], *, why: bool) -> list[str]:
    """The sensor of ``bench --energy``, or why there is none."""
    if found["sensor"] is None and not why:
        return ["energy: no sensor (-v says why)"]
    if found["sensor"] is None:
        return ["energy: no sensor"] + [
            f"  {name}: {why}" for name, why in found["reasons"].items()
        ]
    watts = "" if found["watts"] is None else f", {found['watts']:.2f} W now"
    return [f"energy: {found['sensor']} ({' + '.join(found['parts'])}){watts}"]


def _state(found: dict[str, Any], *, why: bool) -> list[str]:
    """Power mode, clocks, temperature and throttling, as far as they are known."""
    said = []
    if found["power_mode"] is not None:
        said.append(f"power mode {found['power_mode']}")
    for name in ("cpu_mhz", "gpu_mhz"):
        if (clock := found[name]) is not None:
            now = clock["now"] if isinstance(clock["now"], int) else max(clock["now"])
            most = f" of {clock['most']}" if clock["most"] else ""
            said.append(f"{name[:3].upper()} {now}{most} MHz")
    if found["temperatures_c"]:
        hottest = max(found["temperatures_c"], key=found["temperatures_c"].__getitem__)
        said.append(f"{hottest} {found['temperatures_c'][hottest]:.0f} °C")
    if found["throttle_events"]:
        events = sum(found["throttle_events"].values())
        said.append(f"throttled {events} times since it began")
    unknown = [f"  {name} not known: {reason}" for name, reason in found["unknown"].items()]
    hint = " (-v says why)" if unknown and not said and not why else ""
    return [f"state: {', '.join(said) or 'not known'}{hint}", *(unknown if why else [])]
