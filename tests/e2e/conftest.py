"""The command line as a user has it: a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toys import make_inputs

TORCH_MODEL = '''
"""A model of the user's own: three segments of one Linear each."""
import torch
from torch import nn

from edgeexit.bundle.manifest import Chain, Exit, Run, Tensor
from edgeexit.export import Component, Form, SplitModel

WIDTH, CLASSES = 192, 3

class Part(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.last = last

    def forward(self, state):
        state = torch.tanh(self.layer(state))
        return (self.head(state),) if self.last else (state, self.head(state))

class Unsplit(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, state):
        for part in self.parts[:-1]:
            state = part(state)[0]
        return self.parts[-1](state)

def make():
    torch.manual_seed(0)
    parts = [Part(number == 2).eval() for number in range(3)]
    x = Tensor(name="x", dtype="float32", axes=["batch", WIDTH])
    answer = Tensor(name="logits", dtype="float32", axes=["batch", CLASSES])
    components, exits, state = [], [], x
    for number, part in enumerate(parts):
        name = f"part_{number}"
        logits = Tensor(name=f"logits_{number}", dtype="float32", axes=["batch", CLASSES])
        made = Tensor(name=f"h_{number}", dtype="float32", axes=["batch", WIDTH])
        outputs = (logits,) if part.last else (made, logits)
        components.append(Component(name, (state,), outputs, (Form(part),)))
        exits.append(Exit(name=f"exit_{number}", behind=name, outputs={"logits": logits.name}))
        state = made
    chain = Chain(
        components=[component.name for component in components],
        outputs=[answer],
        exits=exits,
        unsplit=["unsplit"],
    )
    unsplit = Component("unsplit", (x,), (answer,), (Form(Unsplit(parts).eval()),))
    return SplitModel(
        name="user",
        task="classification",
        inputs=(x,),
        components=[*components, unsplit],
        chains={"main": chain},
        steps=[Run(chain="main")],
        example=lambda rows: {"x": torch.randn(rows, WIDTH)},
    )

def broken():
    return make()["no such thing"]

def another():
    return 3
'''


@dataclass
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON object and nothing else."""
        return json.loads(self.out)


class Cli:
    """Runs ``python -m edgeexit`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The package is found by its place, not by the folder that a command runs in.
        self.environment = os.environ | {"PYTHONWARNINGS": "default"}

    def arguments(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "edgeexit", *map(str, arguments)]

    def __call__(self, *arguments: object, **options: Any) -> Ran:
        done = subprocess.run(
            self.arguments(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            **options,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Starts it as a terminal does: Ctrl-C reaches it, also where the tests run in the
        background of a shell, which makes their children ignore it."""
        options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        return subprocess.Popen(
            self.arguments(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The command line, run in an empty folder."""
    return Cli(tmp_path)


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The command line in this process, which has torch already; importing it takes seconds."""
    from edgeexit.cli import main

    def run(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Ran(int(ended.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def torch_model(tmp_path: Path) -> str:
    """A user's own torch model in that folder, as module:function."""
    (tmp_path / "user_model.py").write_text(TORCH_MODEL)
    return "user_model:make"


@pytest.fixture
def toy_data(tmp_path: Path) -> Path:
    """Forty labelled rows for the toy bundle."""
    path = tmp_path / "data.npz"
    np.savez(path, **make_inputs(40), label=np.arange(40) % 3)
    return path
