"""Generated text becomes the code it says, and the object cache never runs anything else."""

import ctypes
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lowbit.kernels import objects
from lowbit.kernels.cpu import isa, native

TRIPLE = """
define i64 @triple(i64 %x) {
  %y = mul i64 %x, 3
  ret i64 %y
}
"""
FLOATS = """
declare float @llvm.fma.f32(float, float, float)
define float @rounded_twice(float %a, float %b, float %c) {
  %product = fmul float %a, %b
  %sum = fadd float %product, %c
  ret float %sum
}
define float @rounded_once(float %a, float %b, float %c) {
  %sum = call float @llvm.fma.f32(float %a, float %b, float %c)
  ret float %sum
}
"""
SQUARES = """
define void @squares(ptr %in, ptr %out) {
  %x = load <16 x float>, ptr %in, align 4
  %y = fmul <16 x float> %x, %x
  store <16 x float> %y, ptr %out, align 4
  ret void
}
"""
SCALAR_LOOP = """
define void @increment(ptr %p) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i1, %loop]
  %at = getelementptr i32, ptr %p, i64 %i
  %x = load i32, ptr %at
  %y = add i32 %x, 1
  store i32 %y, ptr %at
  %i1 = add i64 %i, 1
  %more = icmp slt i64 %i1, 4096
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty object cache, and a process that has loaded nothing yet."""
    place = tmp_path / "cache"
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(place))
    monkeypatch.setattr(native, "_loaded", {})
    return place


def triple(module, value=14):
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(module.address("triple"))(value)


def load_again(monkeypatch, record):
    """Load as another process would; give the answer and the number of compilations."""
    compiled = []
    parsed = native._parsed

    def counted(ir, record):
        compiled.append(ir)
        return parsed(ir, record)

    with monkeypatch.context() as patch:
        patch.setattr(native, "_loaded", {})
        patch.setattr(native, "_parsed", counted)
        answer = triple(native.load(TRIPLE, record))
    return answer, len(compiled)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("record", isa.runnable(), ids=lambda record: record.name)
def test_code_does_what_the_text_says_and_rounds_as_written(record, folder):
    assert triple(native.load(TRIPLE, record)) == 42
    module = native.load(FLOATS, record)
    kind = ctypes.CFUNCTYPE(ctypes.c_float, *[ctypes.c_float] * 3)
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24, whose last term a float32 product loses.
    a, c = 1 + 2**-12, -1 - 2**-11
    assert kind(module.address("rounded_twice"))(a, a, c) == 0.0
    assert kind(module.address("rounded_once"))(a, a, c) == 2**-24
    x, y = np.arange(16, dtype=np.float32), np.empty(16, np.float32)
    squares = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    squares(native.load(SQUARES, record).address("squares"))(x.ctypes.data, y.ctypes.data)
    np.testing.assert_array_equal(y, x * x)


@pytest.mark.parametrize("record", isa.RECORDS, ids=lambda record: record.name)
def test_every_record_makes_assembly_here(record):
    text = native.assembly(SQUARES, record)
    assert "squares:" in text
    register = {"avx512vnni": "%zmm", "avx2": "%ymm"}.get(record.name)
    if register:
        assert register in text
    # A loop written one element at a time stays as it was written.
    loop = native.assembly(SCALAR_LOOP, record)
    assert not any(vector in loop for vector in ("xmm", "ymm", "zmm", ".4s"))
    assert native.assembly(FLOATS, record).count("fmadd") <= 1


def test_libc_is_reached(folder):
    text = """
    declare ptr @memcpy(ptr, ptr, i64)
    define void @copy(ptr %to, ptr %from, i64 %size) {
      %same = call ptr @memcpy(ptr %to, ptr %from, i64 %size)
      ret void
    }
    """
    copy = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)
    target = ctypes.create_string_buffer(8)
    copy(native.load(text, isa.host()).address("copy"))(ctypes.addressof(target), b"lowbit", 6)
    assert target.value == b"lowbit"


def test_an_unknown_external_raises_and_the_next_module_loads(folder):
    text = """
    declare void @lowbit_nobody_has_this()
    define void @f() {
      call void @lowbit_nobody_has_this()
      ret void
    }
    """
    with pytest.raises(RuntimeError, match="Failed to materialize"):
        native.load(text, isa.host())
    assert triple(native.load(TRIPLE, isa.host())) == 42


def test_errors_name_what_there_is(folder):
    with pytest.raises(KeyError, match=r"no function 'double'.*defines triple"):
        native.load(TRIPLE, isa.host()).address("double")
    foreign = [record for record in isa.RECORDS if record not in isa.runnable()]
    with pytest.raises(ValueError, match=f"{foreign[0].name} does not run.*generic do"):
        native.load(TRIPLE, foreign[0])
    with pytest.raises(RuntimeError, match="parsing error"):
        native.load("define void @f( {", isa.host())


def test_a_text_is_loaded_once(folder):
    assert native.load(TRIPLE, isa.host()) is native.load(TRIPLE, isa.host())
    assert native.load(TRIPLE, isa.host()) is not native.load(TRIPLE, isa.RECORDS[-1])
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(native.load(FLOATS, isa.host())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(module) for module in seen}) == 1


def test_another_process_takes_the_cached_object(folder, monkeypatch):
    native.load(TRIPLE, isa.host())
    assert load_again(monkeypatch, isa.host()) == (42, 0)
    assert folder.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o077 == 0
    for record in isa.runnable():
        assert triple(native.load(TRIPLE, record)) == 42
    assert len(list(folder.iterdir())) == len(isa.runnable()), "one object for each record"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not an object",
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data + b"\0",
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: data.replace(b"lowbit object", b"lowbit OBJECT"),
    ],
    ids=["empty", "text", "one byte short", "header cut", "one byte more", "bit flip", "schema"],
)
def test_a_damaged_entry_is_compiled_anew_and_replaced(folder, monkeypatch, damage):
    native.load(TRIPLE, isa.host())
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert load_again(monkeypatch, isa.host()) == (42, 1)
    assert entry.read_bytes() == whole
    assert load_again(monkeypatch, isa.host()) == (42, 0)


def test_an_entry_under_another_name_is_not_trusted(folder, monkeypatch):
    native.load(TRIPLE, isa.host())
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    native.load(TRIPLE.replace("3", "5"), isa.host())
    (other,) = set(folder.iterdir()) - {entry}
    entry.write_bytes(other.read_bytes())
    assert load_again(monkeypatch, isa.host()) == (42, 1)
    assert entry.read_bytes() == whole


def test_an_entry_that_others_may_write_is_not_trusted(folder, monkeypatch):
    native.load(TRIPLE, isa.host())
    (entry,) = folder.iterdir()
    entry.chmod(0o666)
    assert load_again(monkeypatch, isa.host()) == (42, 1)
    assert entry.stat().st_mode & 0o077 == 0


def test_a_folder_that_others_may_write_is_refused(folder, monkeypatch):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"writable by others \(mode 777\).*LOWBIT_CACHE_DIR"):
        assert triple(native.load(TRIPLE, isa.host())) == 42
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no numbered owner here")
def test_a_folder_of_somebody_else_is_refused(folder, monkeypatch):
    native.load(TRIPLE, isa.host())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(RuntimeWarning, match=f"owned by user {os.getuid()}"):
        assert load_again(monkeypatch, isa.host()) == (42, 1)


def test_without_a_writable_folder_everything_stays_in_memory(folder, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(file / "cache"))
    assert triple(native.load(TRIPLE, isa.host())) == 42
    place, why = objects.directory()
    assert place is None
    assert "cannot be made" in why
    # A folder that is there and takes no files; mode bits would not stop root.
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path / "full"))
    assert load_again(monkeypatch, isa.host()) == (42, 1)
    assert list((tmp_path / "full").iterdir()) == []


def refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_these_tests_leave_the_users_own_folder_alone():
    place, _ = objects.directory()
    assert place == Path(__file__).resolve().parents[1] / "build" / "objects"


def test_the_folder_is_the_users_own_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWBIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    place, why = objects.directory()
    assert not why
    assert place is not None
    assert place.is_relative_to(tmp_path)
    assert place.name == "lowbit"


COMPILE = f"""
import ctypes
from lowbit.kernels.cpu import isa, native
module = native.load({TRIPLE!r}, isa.host())
print(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(module.address("triple"))(14))
"""


def test_two_processes_may_compile_at_once(folder, monkeypatch):
    environment = {**os.environ, "LOWBIT_CACHE_DIR": str(folder)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", COMPILE], env=environment, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == [b"42\n"] * 2
    assert len(list(folder.iterdir())) == 1
    assert load_again(monkeypatch, isa.host()) == (42, 0)


def test_nothing_heavy_is_imported(folder):
    done = run_python(
        "import sys\n"
        "from lowbit.kernels.cpu import isa, native, pool\n"
        "isa.host()\n"
        "assert 'llvmlite' not in sys.modules, 'llvmlite at import'\n" + COMPILE + "\n"
        "import math\n"
        "pool.run(0, 0, 0)\n"
        "assert 'llvmlite' in sys.modules\n"
        "assert 'numba' not in sys.modules, 'numba'\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "42\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_during_a_compilation_leaves_a_child_that_can_compile(folder, monkeypatch):
    begun = threading.Event()
    parsed = native._parsed

    def slow(ir, record):
        begun.set()
        time.sleep(0.2)
        return parsed(ir, record)

    with monkeypatch.context() as patch:
        patch.setattr(native, "_parsed", slow)
        compiling = threading.Thread(target=native.load, args=(TRIPLE, isa.host()))
        compiling.start()
        begun.wait()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(60)
                module = native.load(TRIPLE.replace("3", "4"), isa.host())
                status = 0 if triple(module, 10) == 40 else 2
            finally:
                os._exit(status)
        compiling.join()
    _, status = os.waitpid(child, 0)
    assert status == 0


def test_the_host_record_can_be_forced(monkeypatch):
    monkeypatch.delenv("LOWBIT_ISA", raising=False)
    assert isa.host() == isa.runnable()[0]
    for record in isa.runnable():
        monkeypatch.setenv("LOWBIT_ISA", record.name)
        assert isa.host() == record
    monkeypatch.setenv("LOWBIT_ISA", "avx9000")
    with pytest.raises(ValueError, match=r"LOWBIT_ISA: 'avx9000' does not run.*generic do"):
        isa.host()


SKYLAKE = "fpu avx avx2 bmi1 bmi2 f16c fma abm movbe avx512f avx512bw avx512cd avx512dq avx512vl"
HASWELL = "fpu avx avx2 bmi1 bmi2 f16c fma abm movbe"


@pytest.mark.parametrize(
    ("machine", "flags", "names"),
    [
        ("x86_64", SKYLAKE + " avx512_vnni", ["avx512vnni", "avx2", "generic"]),
        ("AMD64", SKYLAKE + " avx512_vnni", ["avx512vnni", "avx2", "generic"]),
        ("x86_64", SKYLAKE, ["avx2", "generic"]),
        ("x86_64", HASWELL, ["avx2", "generic"]),
        ("x86_64", HASWELL.replace(" fma", ""), ["generic"]),
        ("x86_64", "", ["generic"]),
        ("aarch64", "fp asimd asimddp", ["neon", "generic"]),
        ("aarch64", "fp asimd", ["generic"]),
        ("riscv64", SKYLAKE, ["generic"]),
    ],
)
def test_records_are_chosen_by_what_a_machine_has(monkeypatch, machine, flags, names):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(isa, "_flags", lambda: frozenset(flags.split()))
    assert [record.name for record in isa.runnable.__wrapped__()] == names


def test_this_machine_is_read_from_its_own_description():
    info = Path("/proc/cpuinfo")
    if info.exists():
        assert isa._flags() <= set(info.read_text().split())
        assert isa._flags()
    names = [record.name for record in isa.RECORDS]
    assert len(set(names)) == len(names)
    assert isa.runnable()[-1].name == "generic"
