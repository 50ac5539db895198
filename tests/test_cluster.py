"""Workers on Ray: the rows of one process, in its order, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support import TEST, X, Y, digits_network, smooth
from test_runs import CONFIG, rows

from art_rs_plugins.benchmark import cluster
from art_rs_plugins.benchmark.cluster import AHEAD, QUEUE, RayWorkers
from art_rs_plugins.benchmark.runs import certify
from art_rs_plugins.benchmark.streams import certify_batches
from art_rs_plugins.cli import main

ray = pytest.importorskip("ray", reason="Ray (extra `ray`) is not installed")


@pytest.fixture(scope="module")
def two() -> Iterator[RayWorkers]:
    """Two workers of one core each, which find the functions of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield from _two()


def _two() -> Iterator[RayWorkers]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with RayWorkers(gpu=False) as workers:
        yield workers
    assert ray.is_initialized()   # who has not begun it does not end it
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run.tsv"
    certify(CONFIG, path)
    return path


# ---------------------------------------------------------------------------------------------- the same rows


def test_two_workers_write_the_rows_of_one_process(two: RayWorkers, whole: Path, tmp_path: Path) -> None:
    certify(CONFIG, tmp_path / "run.tsv", workers=two)
    assert rows(tmp_path / "run.tsv") == rows(whole)
    assert len(two._workers) == 2
    lines = (tmp_path / "run.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "run.tsv").write_text("".join(lines[:20]) + lines[20][:5])
    certify(CONFIG, tmp_path / "run.tsv")   # begun there, it goes on here
    assert rows(tmp_path / "run.tsv") == rows(whole)


def test_streams_go_to_workers_as_well(two: RayWorkers, whole: Path, tmp_path: Path) -> None:
    batches = [(X[TEST][:30], Y[TEST][:30]), (X[TEST][30:48], Y[TEST][30:48])]
    estimator = smooth(digits_network())
    settings: dict[str, Any] = {"n": 300, "n0": 20}
    here = certify_batches(estimator, batches, tmp_path / "here.tsv", **settings)
    there = certify_batches(estimator, batches, tmp_path / "there.tsv", workers=two, **settings)
    assert rows(there.path) == rows(here.path)


def wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_answers_come_in_the_order_of_the_items(two: RayWorkers) -> None:
    items = (0.05 * np.random.default_rng([1, 2]).random(40)).tolist()
    assert list(two(wait, items)) == items


def test_items_are_taken_as_there_is_room_for_them(two: RayWorkers, tmp_path: Path) -> None:
    """While the first item is not done, only so many others are begun."""
    taken = []

    def items() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield str(tmp_path / "go") if not number else ""

    def block(path: str) -> None:
        while path and not os.path.exists(path):
            time.sleep(0.01)

    found = two(block, items())
    opened = threading.Thread(target=lambda: (time.sleep(1.0), (tmp_path / "go").touch()))
    opened.start()
    next(found)
    before = len(taken)
    assert QUEUE * 2 <= before <= AHEAD * 2 + 1
    assert len(list(found)) == 99
    assert len(taken) == 100
    opened.join()


def fails(number: int) -> int:
    if number == 5:
        raise ValueError("item must not be 5")
    return number


def test_an_error_of_a_task_is_that_error(two: RayWorkers) -> None:
    with pytest.raises(ValueError, match=r"^item must not be 5$"):
        list(two(fails, range(9)))
    assert list(two(fails, range(3))) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- who dies


def own_pid(_: Any) -> int:
    return os.getpid()


def kill_now_and_then(pauses: list[float], killed: list[int]) -> None:
    """After each pause, kill one of the workers below this process that was not killed before."""
    for number, seconds in enumerate(pauses):
        time.sleep(seconds)
        victims: list[int] = []
        while not victims:
            below = psutil.Process().children(recursive=True)
            victims = [each.pid for each in below if "_Worker" in " ".join(each.cmdline()) and each.pid not in killed]
        os.kill(victims[number % len(victims)], signal.SIGKILL)
        killed.append(victims[number % len(victims)])


@pytest.mark.slow
def test_workers_killed_in_mid_run_cost_no_row(two: RayWorkers, tmp_path: Path) -> None:
    config = replace(CONFIG, n=10_000, examples=":160")
    certify(config, tmp_path / "here.tsv")
    assert len(set(two(own_pid, range(20)))) == 2
    killed: list[int] = []
    seconds = np.random.default_rng([3, 4]).random(3).tolist()
    killer = threading.Thread(target=kill_now_and_then, args=(seconds, killed))
    killer.start()
    certify(config, tmp_path / "there.tsv", workers=two)
    killer.join()
    assert len(set(killed)) == 3
    assert rows(tmp_path / "there.tsv") == rows(tmp_path / "here.tsv")


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_an_item_that_kills_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch, two: RayWorkers) -> None:
    two.__exit__(None, None, None)   # lets go of the two cores
    monkeypatch.setattr(cluster, "RETRIES", 1)
    message = r"workers died 2 times at the same inputs .*what is recorded stays"
    with RayWorkers(gpu=False) as others, pytest.raises(ConnectionError, match=message):
        list(others(die, [0]))


DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_runs import CONFIG
from art_rs_plugins.benchmark.cluster import RayWorkers
from art_rs_plugins.benchmark.runs import certify

with RayWorkers(sys.argv[1], gpu=False) as workers:
    certify(replace(CONFIG, n=20_000), Path(sys.argv[2]), workers=workers)
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_where_it_stopped(two: RayWorkers, tmp_path: Path) -> None:
    config, path = replace(CONFIG, n=20_000), tmp_path / "run.tsv"
    certify(config, tmp_path / "here.tsv")
    run = [sys.executable, "-W", "ignore", "-c", DRIVER, "local", str(path), str(Path(__file__).parent)]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 2):
            time.sleep(0.01)
        driver.kill()
        driver.wait()
    kept = path.read_bytes().count(b"\n") - 1
    assert 0 < kept < 48
    certify(config, path, workers=two)
    assert rows(path) == rows(tmp_path / "here.tsv")


# ---------------------------------------------------------------------------------------------- who is not there


def test_without_ray_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["art-rs", "certify", "--output", "none.tsv", "--ray", "local"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --ray needs Ray: pip install 'art-rs-plugins[ray]'\n"


@pytest.mark.slow
def test_an_address_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that listens and says nothing: Ray itself would wait for minutes."""
    assert cluster.PATIENCE < 30
    monkeypatch.setattr(cluster, "PATIENCE", 8.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        message = rf"no Ray cluster at {address} \(no answer within 8 seconds\); start one with"
        with pytest.raises(ConnectionError, match=message):
            cluster._knock(address)


@pytest.mark.slow
def test_no_cluster_on_this_machine_is_said() -> None:
    with pytest.raises(ConnectionError, match=r"no Ray cluster at nonsense .*take --ray local"):
        cluster._knock("nonsense")
