# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Whatever goes wrong with compiled kernels ends in one warning and the right result by the next best way."""

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from lrcssm_hf import LrcParameters, backends, lrc_scan, prefix_scan
from problems import cast, definition, outputs_and_gradients, random_problem, relative_error


numba = pytest.importorskip("numba")
cpu_kernels = pytest.importorskip("lrcssm_hf.cpu_kernels")


@pytest.fixture
def warnings(caplog):
    """What was logged, whenever it is asked for."""
    caplog.set_level("WARNING")
    return lambda: caplog.messages


@pytest.fixture
def not_loaded(monkeypatch):
    """As in a process in which no kernel was called yet."""
    monkeypatch.setattr(backends, "loaded", {})
    for name in ("cpu_kernels", "mixing_cpu", "recurrence_cpu"):
        monkeypatch.delitem(sys.modules, f"lrcssm_hf.{name}", raising=False)


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(backends, "loaded", dict(backends.loaded))
    monkeypatch.setattr(cpu_kernels, "_warned", set())


def assert_right(shape=(2, 40, 3), **options):
    """States and gradients of both scans, for several calls."""
    problem = random_problem(*shape, full=True, scale=0.5)
    cotangent = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = outputs_and_gradients(definition, problem, cotangent)

    def scan(*arguments, **keywords):
        return lrc_scan(*arguments, **keywords, **options)

    for _ in range(2):
        states, gradients = outputs_and_gradients(scan, cast(problem, torch.float32), cotangent)
        assert relative_error(states, expected) < 2e-5
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient, expected_gradient) < 2e-5
        assert_linear_scan_right()


def assert_linear_scan_right():
    generator = torch.Generator().manual_seed(0)
    decay, inputs = (torch.randn(2, 20, 3, generator=generator) for _ in range(2))
    state, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for step in range(20):
        state = decay[:, step] * state + inputs[:, step]
        expected.append(state)
    assert relative_error(prefix_scan(decay, inputs), torch.stack(expected, 1)) < 1e-5


# --- Importing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'numba'", name="numba"),
        ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.4."),
        ImportError("cannot import name 'SOLVERS'", name="lrcssm_hf.recurrence"),
        AttributeError("module 'numpy' has no attribute 'trapz'"),
        OSError("libllvmlite.so: cannot open shared object file"),
        SystemError("initialization failed"),
    ],
    ids=repr,
)
def test_a_numba_that_cannot_be_imported(error, not_loaded, monkeypatch, warnings):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "numba":
                raise error

    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    backends.load_cpu_kernels()
    assert_right()
    (warning,) = warnings()
    assert "plain PyTorch on the CPU" in warning and str(error) in warning
    with pytest.raises(ValueError, match="backend 'cpu' cannot be used") as caught:
        assert_right(backend="cpu")
    assert str(error) in str(caught.value)


def test_a_numba_that_is_told_not_to_compile(not_loaded, monkeypatch, warnings):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert_right()
    (warning,) = warnings()
    assert "plain PyTorch on the CPU" in warning and "NUMBA_DISABLE_JIT" in warning


# --- Compiling and running ------------------------------------------------------------------------------------------


def fail_after_writing_garbage(kernels):
    """The same kernels, which raise when they have filled what they return."""

    def failing(kernel):
        def fail(*arguments):
            for result in kernel(*arguments):
                for tensor in result if isinstance(result, list) else [result]:
                    if tensor is not None:
                        tensor.fill_(float("nan"))
            raise SystemError("no machine code for this machine")

        return fail

    operators = ("cell_scan", "cell_scan_backward", "prefix_scan")
    return kernels._replace(**{name: failing(getattr(kernels, name)) for name in operators})


def test_kernels_that_fail_give_way_to_pytorch(nothing_said, warnings):
    backends.loaded["cpu"] = fail_after_writing_garbage(backends.kernels_of("cpu"))
    assert_right()
    (warning,) = warnings()
    assert "plain PyTorch on the CPU" in warning and "no machine code" in warning


def test_kernels_that_fail_going_back_only(nothing_said, warnings):
    broken = fail_after_writing_garbage(backends.kernels_of("cpu")).cell_scan_backward
    backends.loaded["cpu"] = backends.kernels_of("cpu")._replace(cell_scan_backward=broken)
    assert_right()
    assert len(warnings()) == 1


def test_kernels_that_were_asked_for_and_fail_say_so(nothing_said, warnings):
    backends.loaded["cpu"] = fail_after_writing_garbage(backends.kernels_of("cpu"))
    with pytest.raises(RuntimeError, match="backend 'cpu' has failed.*'auto'.*no machine code"):
        assert_right(backend="cpu")
    assert not warnings()


def allocate_too_much_by_numpy(*arguments):
    raise MemoryError("Unable to allocate 1 TiB")


def allocate_too_much_by_torch(*arguments):
    return torch.empty(2**45)


@pytest.mark.parametrize("allocate", [allocate_too_much_by_numpy, allocate_too_much_by_torch])
def test_memory_that_is_not_there_stays_an_error(allocate, nothing_said, warnings):
    kernels = backends.kernels_of("cpu")
    backends.loaded["cpu"] = kernels._replace(cell_scan=allocate)
    with pytest.raises((MemoryError, RuntimeError), match="allocate"):
        assert_right()
    backends.loaded["cpu"] = kernels
    assert_right()
    assert not warnings()


def test_what_does_not_compile_at_all_is_not_the_fault_of_the_cache(nothing_said, warnings):
    def wrong(number):
        return number.no_such_attribute

    with pytest.raises(Exception, match="no_such_attribute"):
        cpu_kernels.compiled(wrong)(1.0)
    assert not warnings()


def test_triton_that_cannot_compile_gives_way_to_pytorch(nothing_said, monkeypatch, warnings):
    recurrence_triton = pytest.importorskip("lrcssm_hf.recurrence_triton")
    monkeypatch.setitem(backends._BACKEND_OF_DEVICE, "cpu", "triton")
    monkeypatch.setattr(recurrence_triton.triton.knobs.runtime, "interpret", True)

    class Uncompilable:
        def __getitem__(self, grid):
            raise FileNotFoundError("Failed to find C compiler")

    kernels = SimpleNamespace(sweep=Uncompilable(), adjoint=Uncompilable())
    monkeypatch.setattr(recurrence_triton, "_cell_kernels", lambda key: kernels)
    monkeypatch.setattr(recurrence_triton, "_linear_kernel", Uncompilable())
    with pytest.raises(RuntimeError, match="backend 'triton' has failed.*C compiler"):
        assert_right(backend="triton")
    assert_right()
    (warning,) = warnings()
    assert "plain PyTorch on the GPU" in warning and "C compiler" in warning


def test_an_exported_program_runs_where_there_are_no_kernels(nothing_said, warnings):
    class Scan(torch.nn.Module):
        def forward(self, inputs):
            return lrc_scan(inputs, inputs, parameters)[0]

    parameters = LrcParameters(*torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    inputs = torch.randn(2, 40, 3)
    with torch.no_grad():
        program = torch.export.export(Scan(), (inputs,)).module()
        expected = program(inputs)
        backends.give_up("cpu", ImportError("No module named 'numba'"))
        assert relative_error(program(inputs), expected) < 1e-5
    assert len(warnings()) == 1


# --- The cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def doubled(values, start, stop):
    for i in range(start, stop):
        values[i] *= 2


def call():
    """As a new process would, by a kernel that is quick to compile."""
    values = torch.arange(4.0).numpy()
    kernel = cpu_kernels.compiled(doubled)
    for _ in range(2):
        kernel(values, 0, 4)
    assert values.tolist() == [0, 4, 8, 12]


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "garbled": lambda path: path.write_bytes(b"\x80\x04garbage" * 100),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_cache_that_is_damaged(kind, damage, cache, nothing_said, warnings):
    call()
    (path,) = cache.rglob(f"*.{kind}")
    DAMAGES[damage](path)
    assert not warnings()
    call()
    call()
    (warning,) = warnings()
    assert "compiled anew in every process" in warning and str(cache) in warning


@pytest.mark.parametrize("what", ["_save_index", "_save_data"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written(error, what, cache, nothing_said, monkeypatch, warnings):
    def fail(*arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, what, fail)
    call()
    call()
    (warning,) = warnings()
    assert "compiled anew in every process" in warning and os.strerror(error) in warning


def test_no_folder_for_a_cache(nothing_said, monkeypatch, warnings):
    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    call()
    call()
    (warning,) = warnings()
    assert "compiled anew in every process" in warning and "no locator" in warning


def test_the_scan_with_a_damaged_cache(cache, not_loaded, warnings):
    assert_linear_scan_right()
    for path in cache.rglob("*.nb?"):
        DAMAGES["cut"](path)
    backends.loaded.clear()
    for name in ("cpu_kernels", "mixing_cpu", "recurrence_cpu"):
        del sys.modules[f"lrcssm_hf.{name}"]
    assert_linear_scan_right()
    (warning,) = warnings()
    assert "compiled anew in every process" in warning
    assert sys.modules["lrcssm_hf.cpu_kernels"] is not cpu_kernels


# --- Threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    cpu_kernels._pool.cache_clear()
    yield
    torch.set_num_threads(threads)
    cpu_kernels._pool.cache_clear()


# Large enough to be shared among threads.
SHARED = (4, 80, 128)


@pytest.mark.parametrize("started", [0, 1])
def test_threads_that_cannot_be_started(started, two_threads, nothing_said, monkeypatch, warnings):
    """None, or not all: what the others have begun is not counted twice."""
    start, count = threading.Thread.start, 0

    def fail(thread):
        nonlocal count
        count += 1
        # At every call, that is: the pool is made anew.
        if count % (started + 1) == 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    # A worker that is idle is given the next part: this one never is.
    monkeypatch.setattr(ThreadPoolExecutor, "_adjust_thread_count", _always_another(ThreadPoolExecutor))
    assert_right(SHARED, backend="cpu")
    (warning,) = warnings()
    assert "calling thread" in warning and "can't start new thread" in warning


def _always_another(executor):
    adjust = executor._adjust_thread_count

    def adjust_thread_count(self):
        self._idle_semaphore = threading.Semaphore(0)
        adjust(self)

    return adjust_thread_count


def test_a_pool_that_another_call_has_shut_down(two_threads, nothing_said, warnings):
    cpu_kernels._pool(2).shutdown()
    assert_right(SHARED, backend="cpu")
    assert len(warnings()) == 1


ALONE = """
import atexit, os, sys, threading, time
import numpy as np
import torch

from lrcssm_hf import LrcParameters, lrc_scan

torch.manual_seed(0)
inputs, parameters = torch.randn(4, 600, 32), LrcParameters(*torch.randn(8, 32).mul(0.3))
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork.
expected = lrc_scan(inputs, inputs, parameters, backend="torch")[0].numpy()
torch.set_num_threads(2)


def scan(situation):
    states = lrc_scan(inputs, inputs, parameters)[0].numpy()
    sys.stdout.write(f"{situation} {np.allclose(states, expected, atol=1e-4)}\\n")
    sys.stdout.flush()


barrier = threading.Barrier(2)
threads = [threading.Thread(target=lambda: (barrier.wait(), scan("two threads call first"))) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()

if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    scan("a forked process")
    os._exit(0)


def late():
    threading.main_thread().join()
    time.sleep(0.2)
    scan("a thread outlives the main one")


threading.Thread(target=late).start()
atexit.register(scan, "the interpreter ends")
"""


def test_in_a_process_of_its_own():
    result = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.splitlines() == [
        "two threads call first True",
        "two threads call first True",
        "a forked process True",
        "a thread outlives the main one True",
        "the interpreter ends True",
    ]
    (warning,) = [line for line in result.stderr.splitlines() if "recurrence" in line]
    assert "calling thread" in warning and "shutdown" in warning
