"""Kernels that are compiled at first use, on stand-ins for driver, NVRTC and a torch with CUDA.

Run by ``test_nvrtc.py``, in a process of its own that finds the stand-ins by their names.
"""

import ctypes
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from support import stub_cuda

from moe_kernels import _native, _nvrtc, backends

torch.version.cuda = "13.0"
_nvrtc._folders = list  # an NVRTC that is installed must not come first
DRIVER = stub_cuda.Driver()
NVRTC = ctypes.CDLL("libnvrtc.so.13")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Give each test a cache of its own, and no launches."""
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path / "cache"))
    DRIVER.take_launches()
    return tmp_path / "cache" / "kernels"


def combine(dtype, weights=None):
    """Sum two rows of 16 for each of three tokens."""
    rows = torch.ones(6, 16, dtype=dtype)
    weights = None if weights is None else torch.ones(3, 2, dtype=weights)
    stub_cuda.call("combine", rows, torch.arange(6), torch.tensor([6]), weights, 3)
    return rows


def compile_one(name="combine_kernel<float, float>", major=9, minor=0):
    return _nvrtc.compile_kernel("combine.cu", f"moe_kernels::cuda::{name}", major, minor)


def test_it_is_available():
    assert _nvrtc.why_not() is None
    assert _nvrtc.version() == "13.0"


def test_the_engine_is_launched_with_its_map_of_the_experts():
    left, stack = (torch.ones(size, dtype=torch.bfloat16) for size in ((8, 64), (2, 272, 64)))
    tiles = torch.tensor([[0, 1, 0], [0, 4, 0], [4, 8, 0]])
    sorted_rows = torch.arange(8), tiles, torch.tensor([0, 4, 8])
    for cluster in (1, 2):  # blocks that share 128 columns' weights for 128 rows each
        rows = 128 * cluster
        low_rank = None, None, None
        stub_cuda.call("gate_up", left, stack, None, *sorted_rows, *low_rank, rows, True, None)
        (launch,) = DRIVER.take_launches()
        own = f"cuda::Engine<__nv_bfloat16, true, true, false, {cluster}>"
        assert f"engine_kernel<moe_kernels::{own}" in launch["symbol"]
        assert launch["first"] == stack.data_ptr()
        assert [launch[name] for name in ("x", "threads", "shared", "cluster")] == [
            3 * 2 * cluster, 384, 4 * 49152 + 80, cluster,
        ]  # fmt: skip


def test_a_launch_has_what_the_kernel_takes(capfd):
    rows = combine(torch.bfloat16)
    said = capfd.readouterr().err
    assert "compiling combine_kernel<__nv_bfloat16, float> for sm_90a, at its first use" in said
    assert said.startswith("moe_kernels: ") and said.endswith(" s\n")
    modules = DRIVER.library.modules_loaded()
    (launch,) = DRIVER.take_launches()
    assert launch == {
        "symbol": "moe_kernels::cuda::combine_kernel<__nv_bfloat16, float>",
        "x": 1, "y": 1, "z": 1, "threads": 256, "shared": 0, "stream": 0x5712,
        "first": rows.data_ptr(), "device": 0, "early": 0, "cluster": 1,
    }  # fmt: skip
    combine(torch.bfloat16)
    assert capfd.readouterr().err == "" and DRIVER.library.modules_loaded() == modules
    assert len(DRIVER.take_launches()) == 1


def test_launches_keep_their_order_and_grids():
    ids = torch.randint(0, 4, (10, 2))
    stub_cuda.call("dispatch_with_maps", ids, 4, None, 0, [16], [5, 5, 1, 0, 1])
    count, place = DRIVER.take_launches()
    assert count["symbol"].endswith("count_kernel") and place["symbol"].endswith("place_kernel")
    assert (count["x"], place["x"]) == (1, 2)  # a block of the sort, and one of the map
    assert count["first"] == place["first"] == ids.data_ptr()


def test_much_shared_memory_is_asked_for():
    left, matrix = torch.ones(4, 32).half(), torch.ones(1, 1, 64, 32).half()
    tiles = torch.tensor([[0], [0], [4]])
    out = torch.empty(4, 64).half()
    asked = DRIVER.library.times_shared_was_asked()
    for _ in range(3):  # once for a kernel on a device
        stub_cuda.call(
            "shrink", out, left, matrix, torch.arange(4), tiles, None, 1, 1, 1, 1, True, True
        )
    launch, *_ = DRIVER.take_launches()
    assert launch["shared"] == DRIVER.library.shared_bytes_allowed() == 2**16
    assert DRIVER.library.times_shared_was_asked() == asked + 1


def decode(dtype):
    """Run a layer of 2 experts, 64 x 32, on one token; return its launches."""
    x, ids = torch.ones(1, 64, dtype=dtype), torch.zeros(1, 1, dtype=torch.long)
    stacks = torch.ones(2, 64, 64, dtype=dtype), torch.ones(2, 64, 32, dtype=dtype)
    weights, nothing = torch.ones(1, 1, dtype=dtype), [None] * 12
    swiglu = ("silu", True, 0.0, 0.0, 0.0, False)
    stub_cuda.call("moe_mlp_inference", x, ids, weights, *stacks, *nothing, *swiglu)
    return DRIVER.take_launches()


def test_the_second_kernel_of_decoding_starts_early_where_it_waits():
    asked = DRIVER.library.times_overlap_was_asked()
    for _ in range(3):
        up, down = decode(torch.bfloat16)
        assert "gate_up" in up["symbol"] and "down" in down["symbol"]
        assert (up["early"], down["early"]) == (0, 1)
    assert DRIVER.library.times_overlap_was_asked() == asked + 1  # once for a kernel on a device
    DRIVER.library.compile_for(80)  # there it does not wait
    try:
        assert [launch["early"] for launch in decode(torch.half)] == [0, 0]
    finally:
        DRIVER.library.compile_for(90)


@pytest.mark.parametrize(("version", "dtype"), [(12020, torch.half), (12030, torch.bfloat16)])
def test_only_drivers_that_capture_overlap_are_asked_for_it(version, dtype):
    DRIVER.torch_device.set_current_device(1)  # its kernels have not been asked about
    DRIVER.library.set_driver_version(version)
    try:
        up, down = decode(dtype)
    finally:
        DRIVER.library.set_driver_version(13000)
        DRIVER.torch_device.set_current_device(0)
    assert (up["early"], down["early"]) == (0, version >= 12030)


def test_each_device_has_its_own_kernels():
    modules = DRIVER.library.modules_loaded()
    try:
        for device in (0, 1, 0, 1):
            DRIVER.torch_device.set_current_device(device)
            combine(torch.float32, torch.half)
    finally:
        DRIVER.torch_device.set_current_device(0)
    assert [launch["device"] for launch in DRIVER.take_launches()] == [0, 1, 0, 1]
    assert DRIVER.library.modules_loaded() == modules + 2
    assert DRIVER.library.no_context_is_current()


def in_a_thread(run):
    """Run in a thread of its own, which begins without a context."""
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_another_librarys_context_is_left_as_it_was():
    modules, called = DRIVER.library.modules_loaded(), []

    def run():
        DRIVER.library.make_a_foreign_context_current(0)
        combine(torch.float32, torch.bfloat16)
        called.append(DRIVER.library.a_foreign_context_is_current(0))

    in_a_thread(run)
    combine(torch.float32, torch.bfloat16)  # fails if it was loaded into the other context
    assert called == [1] and len(DRIVER.take_launches()) == 2
    assert DRIVER.library.modules_loaded() == modules + 1


@pytest.mark.parametrize("device", [0, 1])
def test_another_librarys_context_on_another_device_is_left_as_it_was(device):
    """Torch's own guard leaves torch's context on the device that it found."""
    found = []

    def run():
        DRIVER.library.make_a_foreign_context_current(1)
        found.append(DRIVER.torch_device.device_within_a_guard(device))
        found.append(DRIVER.library.a_foreign_context_is_current(1))

    try:
        in_a_thread(run)
    finally:
        DRIVER.torch_device.set_current_device(0)
    assert found == [device, 1]


def test_changed_sources_are_refused_before_any_work(tmp_path, monkeypatch):
    folder = shutil.copytree(_nvrtc._SOURCES, tmp_path / "cuda")
    monkeypatch.setattr(_nvrtc, "_SOURCES", folder)
    for read_by_no_kernel in ("launchers.cpp", "combine.cu~"):
        (folder / read_by_no_kernel).write_text("")
    assert _nvrtc.why_not.__wrapped__() is None
    with open(folder / "combine.h", "a") as header:
        header.write("// another parameter\n")
    (folder / "new.cu").write_text("")
    message = rf"combine.h, new.cu in {folder} changed after the extension was built.*rebuild with"
    compiled = NVRTC.programs_compiled()
    with pytest.raises(RuntimeError, match=message):
        combine(torch.half, torch.float32)
    assert NVRTC.programs_compiled() == compiled and not DRIVER.take_launches()
    monkeypatch.setattr(_nvrtc, "why_not", _nvrtc.why_not.__wrapped__)
    assert "changed after the extension was built" in _native.why_no_cuda()
    with pytest.raises(RuntimeError, match=f"'cuda' is not available: {message}"):
        backends.select("cuda", torch.device("cuda"))


def test_an_error_that_a_launch_returns_has_cudas_name_and_words():
    words = DRIVER.torch_device.words_of_an_error
    words.restype = ctypes.c_char_p
    expected = "CUDA error: invalid argument (cudaErrorInvalidValue, 1) from launch_it(2)"
    assert expected in words().decode()


def test_threads_compile_a_kernel_once_and_have_a_context():
    compiled = NVRTC.programs_compiled()
    threads = [threading.Thread(target=combine, args=(torch.half, torch.half)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(DRIVER.take_launches()) == 4
    assert NVRTC.programs_compiled() == compiled + 1
    assert DRIVER.library.contexts_retained() == 2  # one for each device that had a launch


def test_a_kernel_is_kept_on_disk(folder):
    compiled = NVRTC.programs_compiled()
    image, symbol, error = compile_one()
    assert error == "" and symbol.endswith("combine_kernel<float, float>")
    assert b'#include "combine.cu"' in image and b"--gpu-architecture=sm_90a" in image
    assert compile_one() == (image, symbol, "") and NVRTC.programs_compiled() == compiled + 1
    (entry,) = folder.glob("*.bin")
    for damaged in (entry.read_bytes()[:-1], b"", b"[]\n", b"no line"):
        entry.write_bytes(damaged)
        assert compile_one() == (image, symbol, "")
    assert NVRTC.programs_compiled() == compiled + 5
    compile_one(major=8)
    compile_one("combine_kernel<float, __half>")
    assert len([*folder.glob("*.bin")]) == 3


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("__version__", "other"),
        ("version", lambda: "other"),
        ("_HEADERS", (".", "no_toolkit")),
        ("_cuda_sources", SimpleNamespace(manifest=lambda folder: "other", changed=lambda *_: [])),
    ],
)
def test_what_differs_is_compiled_again(folder, monkeypatch, what, other):
    compile_one()
    monkeypatch.setattr(_nvrtc, what, other)
    compile_one()
    assert len([*folder.glob("*.bin")]) == 2


def test_another_option_reaches_nvrtc_though_the_sources_are_the_same(monkeypatch):
    assert b"--use_fast_math" not in compile_one()[0]
    monkeypatch.setattr(_nvrtc, "_FLAGS", (*_nvrtc._FLAGS, "--use_fast_math"))
    assert b"--use_fast_math" in compile_one()[0]


def test_without_a_folder_it_compiles_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels.*MOE_KERNELS_CACHE"):
        image, _, error = compile_one()
    assert image and not error


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        (80, "sm_80"), (86, "sm_80"), (90, "sm_90a"), (100, "sm_100a"), (103, "sm_100"),
        (121, "compute_100"),
    ],
)  # fmt: skip
def test_it_compiles_for_the_device_or_what_runs_on_it(arch, target):
    assert _nvrtc._target(arch, [75, 80, 90, 100]) == target


def test_a_device_that_nvrtc_does_not_know_is_refused():
    _, _, error = compile_one(major=7, minor=5)
    assert "NVRTC 13.0 knows no GPU like sm_75, only [80, 90, 100]" in error


def test_a_source_that_does_not_compile_shows_the_log(capfd):
    image, _, error = compile_one("broken")
    assert image == b"" and "compiling broken for sm_90a, at its first use ... failed" in (
        capfd.readouterr().err
    )
    assert "the CUDA kernel moe_kernels::cuda::broken cannot be compiled: NVRTC 13.0 says" in error
    assert "kernel.cu(1): error: broken" in error


def test_a_new_kernel_in_a_capture_is_refused():
    DRIVER.library.set_capturing(1)
    try:
        with pytest.raises(RuntimeError, match="capture of a CUDA graph.*call the layer once"):
            combine(torch.float32, torch.float32)
    finally:
        DRIVER.library.set_capturing(0)
    combine(torch.float32, torch.float32)
    DRIVER.library.set_capturing(1)
    combine(torch.float32, torch.float32)
    DRIVER.library.set_capturing(0)
    assert len(DRIVER.take_launches()) == 2


def test_an_error_of_the_driver_names_the_kernel():
    DRIVER.library.fail_next_launch(700)
    message = r"could not launch .*combine_kernel.*: cuLaunchKernelEx returned "
    message += r"CUDA_ERROR_ILLEGAL_ADDRESS, an illegal memory access was encountered \(700\)"
    with pytest.raises(RuntimeError, match=message):
        combine(torch.bfloat16, torch.bfloat16)
