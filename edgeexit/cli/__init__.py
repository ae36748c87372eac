"""The command line: one module per command, imported only when it runs.

`main` runs a command and returns exit code 0 (done), 1 (failed), 2 (wrong usage) or 3 (a check
failed), with one line on stderr for an error. An `EdgeExitError` shows no traceback; bugs always
do. ``edgeexit --help`` imports neither torch nor an engine.
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
    "calibrate": "Choose thresholds from a trace for a maximum risk.",
    "run": "Run inputs and show which exit answered.",
    "bench": "Measure latency and throughput against the same model unsplit.",
    "serve": "Answer requests over HTTP, in OpenAI's form for text.",
    "doctor": "Show hardware and packages, and how to install missing ones.",
}
"""Every command and its one-line help, in the order of a typical workflow."""

INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are the modules ``edgeexit.cli.<verb>``, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of `VERBS`."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Imports the command's module and returns its ``command``."""
        if name not in VERBS:
            return None
        command = importlib.import_module(f"edgeexit.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgeexit")
def cli() -> None:
    """Early exits that save real time on real devices.

    The workstation exports a model with exits as a bundle. The device checks the bundle, calibrates
    when to stop, runs it, and measures the speedup.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Libraries may turn the interrupt into an error of their own and log it.
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
    if interrupted and code:  # code 0: a library swallowed the interrupt and the command finished
        _say("interrupted")
        code = INTERRUPTED
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Runs the command line. Prints errors and returns the exit code."""
    try:
        code = cli.main(args=arguments, prog_name="edgeexit", standalone_mode=False)
        if sys.stdout is not None:  # None: closed before Python started
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
        # The reader closed the pipe (`| head`). Python would report it again at exit.
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
    """Exits as after an error, so that no partial files remain."""
    sys.exit(128 + number)


__all__ = ["cli", "main"]
