"""The state of a device, from file trees."""

from __future__ import annotations

from pathlib import Path

from edgeexit.measure.device_state import read_state, throttled


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_what_is_there_is_read(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu"
    root = write(
        tmp_path,
        {
            f"{cpu}/cpu0/cpufreq/scaling_cur_freq": "1200000",
            f"{cpu}/cpu1/cpufreq/scaling_cur_freq": "1728000",
            f"{cpu}/cpu0/cpufreq/scaling_max_freq": "1728000",
            f"{cpu}/cpu0/thermal_throttle/core_throttle_count": "3",
            f"{cpu}/cpu1/thermal_throttle/core_throttle_count": "4",
            "sys/class/devfreq/17000000.gpu/cur_freq": "306000000",
            "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": "47500",
            "sys/class/thermal/thermal_zone1/type": "off",
            "sys/class/hwmon/hwmon2/oc1_event_cnt": "1",
        },
    )
    state = read_state(root)
    assert state["cpu_mhz"] == {"now": [1200, 1728], "most": 1728}
    assert state["gpu_mhz"] == {"now": 306, "most": 1020}
    assert state["temperatures_c"] == {"cpu-thermal": 47.5}
    assert state["throttle_events"] == {"core thermal": 7, "over-current oc1": 1}
    assert {*state["unknown"]} <= {"power_mode"}
    write(root, {"sys/class/hwmon/hwmon2/oc1_event_cnt": "5"})
    assert throttled(state, read_state(root)) == {"over-current oc1": 4}
    assert throttled(state, state) == {}


def test_what_is_not_there_is_unknown_with_its_reason(tmp_path: Path) -> None:
    state = read_state(tmp_path)
    for name in ("cpu_mhz", "gpu_mhz", "temperatures_c", "throttle_events"):
        assert state[name] is None and state["unknown"][name]
    assert throttled(state, state) == {}
