"""The tuner: who wins, what is written, and that `pick()` reads it as it was meant."""

from __future__ import annotations

import runpy

import pytest
import torch

from benchmarks import tune
from mmrlhf.kernels.triton import configs
from mmrlhf.kernels.triton.configs import GemmConfig, Problem

SMALL = GemmConfig(4, 4, 64, 128, 64, loads="descriptor")
LARGE = GemmConfig(8, 3, 128, 256, 64, loads="descriptor")
SPECIAL = GemmConfig(4, 3, 128, 256, 64, loads="device_descriptor", warp_specialize=True)


def test_a_winner_is_faster_than_the_noise_on_every_head():
    times = {
        64: {tune.PICKED: {"a": 1.10, "b": 1.20}, "special": {"a": 1.00, "b": 1.10}},
        256: {tune.PICKED: {"a": 1.10, "b": 1.20}, "special": {"a": 1.09, "b": 1.19}},  # 1 %: noise
        1024: {tune.PICKED: {"a": 1.10, "b": 1.20}, "special": {"a": 0.90}},  # its gate was red on head b
    }
    assert tune.winners(times) == {64: "special", 256: tune.PICKED, 1024: tune.PICKED}


def test_what_is_written_is_what_is_picked(tmp_path, monkeypatch):
    names = {tune.PICKED: LARGE, "special": SPECIAL, "small": SMALL}
    found = {64: "small", 256: "special", 1024: "special", 2048: tune.PICKED}
    rows = tune.table(found, dict.fromkeys(found, names), 90)
    assert [row["max_rows"] for row in rows] == [64, 1024, None]
    path = tmp_path / "tuned.py"
    path.write_text(tune.render(rows, "a device, its versions"))
    written = runpy.run_path(str(path))["ROWS"]
    assert written == tuple(rows)
    assert path.read_text().startswith('"""Launch configurations that a measurement found faster')
    monkeypatch.setattr(configs, "TUNED", configs.rules(written))
    picked = [configs.pick(Problem(90, n, 4096, 151936)) for n in (1, 64, 65, 1024, 1025, 1 << 20)]
    assert picked == [SMALL, SMALL, SPECIAL, SPECIAL, LARGE, LARGE]
    heavy, other = Problem(90, 64, 4096, 151936, softcap=True), Problem(80, 64, 4096, 151936)
    plain = [rule.config for rule in configs.GEMM_RULES]
    assert configs.pick(heavy) in plain  # not measured, so not changed
    assert configs.pick(other) in plain


def test_nothing_better_writes_an_empty_table():
    assert "ROWS: tuple[dict[str, Any], ...] = ()\n" in tune.render([], "x")


def test_harness_without_a_device(capsys):
    pytest.importorskip("triton", reason="the configurations are Triton's")
    times, configurations = tune.measure(torch.device("cpu"), seconds=0, rows=[8], heads=["tiny"])
    assert set(times[8]) == {tune.PICKED, "triton epilogue"}
    assert set(configurations[8]) == {tune.PICKED, "triton epilogue"}
    assert all(units > 0 for by_head in times[8].values() for units in by_head.values())
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
        assert "--device cpu" in capsys.readouterr().err
