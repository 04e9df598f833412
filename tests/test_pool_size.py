"""How many threads a job may use: the caller, the environment, processors, control groups."""

import os

import numpy as np
import pytest

from lowbit.kernels.cpu import pool


@pytest.fixture(autouse=True)
def automatic_threads():
    yield
    pool.set_num_threads(None)


@pytest.mark.parametrize("value", [1.5, "2", True, np.float32(2), [2]])
def test_set_num_threads_wants_an_integer(value):
    with pytest.raises(TypeError, match="give an int from 1 up, or None for auto"):
        pool.set_num_threads(value)


@pytest.mark.parametrize("value", [0, -1])
def test_set_num_threads_wants_one_or_more(value):
    with pytest.raises(ValueError, match=f"set_num_threads: n is {value}; give an int from 1"):
        pool.set_num_threads(value)


def test_the_number_of_threads_comes_from_the_environment(monkeypatch):
    def automatic(own=None, openmp=None):
        for name, value in (("LOWBIT_NUM_THREADS", own), ("OMP_NUM_THREADS", openmp)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        pool.set_num_threads(None)
        return pool.get_num_threads()

    found = automatic()
    assert 1 <= found <= (os.cpu_count() or 1)
    assert automatic(own="5") == 5
    assert automatic(openmp="6") == 6
    assert automatic(openmp="4,2") == 4
    assert automatic(own="5", openmp="6") == 5
    assert automatic(own="", openmp="auto") == found
    for wrong in ("0", "-2", "all", "1.5"):
        with pytest.raises(ValueError, match=f"LOWBIT_NUM_THREADS: '{wrong}'; give a whole"):
            automatic(own=wrong)
    monkeypatch.delenv("LOWBIT_NUM_THREADS")
    pool.set_num_threads(np.int64(3))
    assert pool.get_num_threads() == 3


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def quotas(tmp_path, membership):
    write(tmp_path / "cgroup", membership)
    return list(pool._quotas(tmp_path / "cgroup", tmp_path / "root"))


def test_control_group_v2_grants_the_least_of_all_levels(tmp_path):
    write(tmp_path / "root/a/b/cpu.max", "150000 100000\n")
    write(tmp_path / "root/a/cpu.max", "400000 100000\n")
    write(tmp_path / "root/cpu.max", "max 100000\n")
    write(tmp_path / "cpu.max", "1 100000\n")  # above the root: not ours
    assert quotas(tmp_path, "0::/a/b\n") == [1.5, 4.0]
    # In a container the path is the host's, the file stands at the root.
    write(tmp_path / "root/cpu.max", "200000 100000\n")
    assert quotas(tmp_path, "0::/host/name\n") == [2.0]


def test_control_group_v1_grants(tmp_path):
    write(tmp_path / "root/cpu/a/cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "root/cpu/a/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "root/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "root/cpu/cpu.cfs_period_us", "100000\n")
    assert quotas(tmp_path, "5:memory:/a\n4:cpu,cpuacct:/a\n3:cpuset:/a\n0::/\n") == [0.5]
    assert quotas(tmp_path, "nothing") == []


@pytest.mark.parametrize(("granted", "threads"), [([], 8), ([1.5, 4.0], 2), ([0.2], 1), ([99], 8)])
def test_a_quota_limits_the_processors(monkeypatch, granted, threads):
    monkeypatch.delenv("LOWBIT_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(pool, "_quotas", lambda *_: iter(granted))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert pool._find_num_threads() == threads
