"""Pictures are whole, say what is on their axes, and show the figures that they were given."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.bench import command as bench_command
from edgeexit.cli.calibrate import command as calibrate_command
from edgeexit.errors import MeasurementError, OutputExistsError, UsageError
from edgeexit.measure.bench.bench import Options, bench
from edgeexit.measure.calibrate import calibrate, figures
from edgeexit.measure.plots import check_plot, plot_bench, plot_calibration
from edgeexit.measure.trace_file import write_trace
from edgeexit.runtime import Policy, Rule, write_policy
from tests.decoder_toys import VOCABULARY, make_decoder_toy, write_decoder_toy
from tests.measure.test_calibrate import make_trace
from tests.toys import make_inputs


def words(path: Path) -> list[str]:
    """The texts of an SVG file, in order."""
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(one.itertext()) for one in found]


def draw_calibration(path: Path, **options: Any) -> Any:
    """Draws the calibration of a random trace; returns the policy's record of itself."""
    trace = make_trace(rows=200, exits=4)
    policy, curve, chosen = calibrate(trace, max_risk=0.1, score="max_prob", **options)
    exits = figures(trace, "max_prob")
    plot_calibration(path, curve, chosen, exits, policy.calibration, score="max_prob")
    return policy.calibration, float(curve.thresholds[chosen])


def test_calibration_names_its_axes_and_shows_the_chosen_point(tmp_path: Path) -> None:
    about, threshold = draw_calibration(tmp_path / "plot.svg")
    said = words(tmp_path / "plot.svg")
    assert "threshold for max_prob, from strict to loose" in said
    assert "mean depth (segments per row)" in said
    assert said.count("risk (%)") == 2
    assert said.count("share of rows (%)") == 2
    assert said.count("exit_3") == 2
    assert "allowed 10 %" in said
    risk = f"(risk {100 * about['measured_risk']:.2f} %)"
    assert f"chosen: threshold {threshold:.4g} {risk}" in said
    assert f"chosen: depth {about['mean_depth']:.4g} {risk}" in said


def test_calibration_with_a_threshold_per_exit_shows_that_point_too(tmp_path: Path) -> None:
    about, _ = draw_calibration(tmp_path / "plot.svg", per_exit=True, risk="performance")
    [point] = [said for said in words(tmp_path / "plot.svg") if said.startswith("threshold per")]
    assert f"depth {about['mean_depth']:.4g}" in point


@pytest.mark.filterwarnings("error")
def test_calibration_without_any_risk_is_drawn(tmp_path: Path) -> None:
    trace = make_trace(rows=20, exits=2)
    trace = dataclasses.replace(trace, predictions=trace.predictions[[1, 1]], labels=None)
    policy, curve, chosen = calibrate(trace, max_risk=0.0, score="max_prob")
    exits = figures(trace, "max_prob")
    plot = tmp_path / "plot.svg"
    plot_calibration(plot, curve, chosen, exits, policy.calibration, score="max_prob")
    assert "right prediction" not in words(plot)  # there are no labels


def test_names_are_shown_as_they_are_unless_they_are_long(tmp_path: Path) -> None:
    trace = make_trace(rows=200, exits=3)
    trace = dataclasses.replace(trace, exits=["$a$ and $b$", "x" * 40, "last"])
    policy, curve, chosen = calibrate(trace, max_risk=0.1, score="max_prob")
    exits = figures(trace, "max_prob")
    plot = tmp_path / "plot.svg"
    plot_calibration(plot, curve, chosen, exits, policy.calibration, score="max_prob")
    assert {"$a$ and $b$", "x" * 19 + "…", "last"} <= set(words(plot))


def test_png_is_an_image_with_something_on_it(tmp_path: Path) -> None:
    draw_calibration(tmp_path / "plot.PNG")
    with Image.open(tmp_path / "plot.PNG") as image:
        assert image.format == "PNG"
        assert image.size == (1500, 1050)
        assert np.asarray(image.convert("L")).std() > 5


def test_equal_figures_give_equal_files_and_leave_the_users_style_alone(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 40, "svg.fonttype": "path"}):
        draw_calibration(tmp_path / "first.svg")
        assert matplotlib.rcParams["font.size"] == 40
    draw_calibration(tmp_path / "second.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


@pytest.mark.parametrize("name", ["plot.gif", "plot", "plot.json"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"suffix .*\.png or \.svg"):
        check_plot(tmp_path / name)


def test_a_file_that_is_written_or_read_beside_it_is_refused(tmp_path: Path) -> None:
    plot = tmp_path / "same.svg"
    with pytest.raises(UsageError, match="same file"):
        check_plot(plot, None, tmp_path / "elsewhere" / ".." / "same.svg")
    plot.write_text("read")
    with pytest.raises(UsageError, match="both input and output"):
        check_plot(plot, plot)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        check_plot(tmp_path / "folder.png")


def test_without_matplotlib_the_command_that_installs_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MeasurementError, match=r'matplotlib.*pip install "edgeexit\[plot\]"'):
        check_plot(tmp_path / "plot.png")


def test_calibrate_replaces_a_picture_and_writes_nothing_when_it_is_refused(tmp_path: Path) -> None:
    write_trace(make_trace(rows=200), tmp_path / "trace.npz")
    (tmp_path / "plot.svg").write_text("old")
    given = [str(tmp_path / "trace.npz"), "--max-risk", "10%", "-o", str(tmp_path / "policy.json")]
    refused = CliRunner().invoke(calibrate_command, [*given, "--plot", str(tmp_path / "plot.pdf")])
    assert isinstance(refused.exception, UsageError)
    assert not (tmp_path / "policy.json").exists()
    given += ["--plot", str(tmp_path / "plot.svg")]
    refused = CliRunner().invoke(calibrate_command, given)
    assert isinstance(refused.exception, OutputExistsError)
    assert not (tmp_path / "policy.json").exists()
    done = CliRunner().invoke(calibrate_command, [*given, "--overwrite"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "policy.json").exists()
    assert "risk (%)" in words(tmp_path / "plot.svg")


@pytest.fixture(scope="module")
def rows(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options for a short measurement of the toy with natural exits."""
    folder = tmp_path_factory.mktemp("rows")
    np.savez(folder / "rows.npz", **make_inputs(50), label=np.arange(50) % 3)
    write_policy(Policy(rules={"forward": Rule(thresholds=0.8)}), folder / "policy.json")
    return {"data": str(folder / "rows.npz"), "policy": str(folder / "policy.json")}


def test_bench_draws_the_time_of_every_path(
    toy_bundle: Bundle, rows: dict[str, str], tmp_path: Path
) -> None:
    plot = tmp_path / "plot.svg"
    given = [str(toy_bundle.path), "--data", rows["data"], "--policy", rows["policy"]]
    given += ["--time", "200ms", "--threads", "blocking", "--plot", str(plot)]
    done = CliRunner().invoke(bench_command, given)
    assert done.exit_code == 0, done.output
    said = words(plot)
    assert "time per row (ms); dot: median, line: to the 90th percentile" in said
    assert said.count("exit_1") == 2  # its time, and the share of rows
    assert "natural exits" in said
    printed = dict(re.findall(r"^(\w+) +([0-9.]+)", done.output, re.MULTILINE))
    labels = [re.sub(", .*", "", one) for one in said if " ms" in one]
    assert f"{float(printed['unsplit']):.3f} ms" in labels
    assert f"{float(printed['exit_2']):.3f} ms" in labels


def test_bench_draws_throughput_with_and_without_real_rows(
    toy_bundle: Bundle, rows: dict[str, str], tmp_path: Path
) -> None:
    short: dict[str, Any] = {"mode": "throughput", "batch": 8, "seconds": 0.2, "threads": 1}
    for name, options in (("real", Options(**rows, **short)), ("samples", Options(**short))):
        result = bench(toy_bundle, options)
        plot_bench(tmp_path / f"{name}.svg", result)
        said = words(tmp_path / f"{name}.svg")
        assert "rows per second, batches of 8 rows" in said
        assert f"{result['unsplit']['rows_per_s']:.0f}" in said
        assert ("natural exits" in said) == (name == "real")


def test_bench_draws_the_speed_of_every_mode_of_a_language_model(tmp_path: Path) -> None:
    bundle = write_decoder_toy(make_decoder_toy(), tmp_path / "$writer$")
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (4, 6))
    np.savez(tmp_path / "prompts.npz", tokens=prompts)
    options = Options(data=tmp_path / "prompts.npz", new_tokens=8, seconds=0.2, threads=1)
    result = bench(bundle, options)
    plot_bench(tmp_path / "plot.svg", result)
    said = words(tmp_path / "plot.svg")
    assert said.count("exact") == 2
    assert "time to the first token (ms)" in said
    exact = result["modes"]["exact"]
    ratio = exact["time_against_unsplit"]["decode"]
    assert f"{exact['tokens_per_s']:.0f}, time {ratio:.2f} x unsplit" in said
