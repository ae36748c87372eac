"""The command line: one verb per module, each imported only when it is used.

`main` runs a verb and turns what comes out of it into what a shell understands: exit code 0 (done),
1 (failed), 2 (wrong usage) or 3 (a check did not hold), and one line on stderr. Errors raised on
purpose show no traceback; bugs always do. ``edgeexit --help`` imports neither torch nor an engine.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from edgeexit import __version__
from edgeexit.errors import EdgeExitError

VERBS = {
    "export": "Split a checkpoint, torch model or ONNX file at its exits into a bundle.",
    "inspect": "Show what is in a bundle, and the bytes that cross each boundary.",
    "check": "Verify a bundle on this device against its reference samples.",
    "build": "Build TensorRT engines of a bundle, for this device or ahead of time.",
    "trace": "Record every exit's scores and predictions for a data set.",
    "calibrate": "Choose thresholds from a trace, for the largest risk that you accept.",
    "run": "Answer inputs, and show which exit answered.",
    "bench": "Measure latency and throughput against the same model unsplit.",
    "doctor": "Show what this machine has, and the command that installs what is missing.",
}
"""Every verb and its one-line help, in the order in which a user meets them."""

INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are the modules ``edgeexit.cli.<verb>``, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of `VERBS`."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Imports the verb's module and returns its ``command``."""
        if name not in VERBS:
            return None
        command = importlib.import_module(f"edgeexit.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgeexit")
def cli() -> None:
    """Early exits that save real time on real devices.

    A model with exits becomes a bundle on the workstation (export); the device checks it,
    calibrates when to stop, runs it, and measures what that gained.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Libraries may turn it into an error of theirs, and log that.
        interrupted.append(number)
        logging.disable(logging.CRITICAL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, interrupt)
    try:
        code = _run(arguments)
    except Exception:
        if not interrupted:
            raise
        code = INTERRUPTED
    if interrupted and code:  # where something swallowed it, the verb has come to its end
        _say("interrupted")
        code = INTERRUPTED
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Runs the command line. Returns its exit code, having said what went wrong."""
    try:
        code = cli.main(args=arguments, prog_name="edgeexit", standalone_mode=False)
        if sys.stdout is not None:  # None: it was closed before Python started
            sys.stdout.flush()
    except click.Abort:
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except EdgeExitError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = 1
        if error.filename is not None:
            _say(f"error: {error.filename}: {error.strerror}. Check the path and its permissions.")
        elif error.errno == errno.ENOSPC:
            _say("error: standard output cannot be written: the disk is full")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            raise
    return code if isinstance(code, int) else 0


def _say(line: str) -> None:
    click.echo(line, err=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leaves as after an error, so that nothing half-written stays behind."""
    sys.exit(128 + number)


__all__ = ["cli", "main"]
