"""Scale rules and rounding against what other libraries wrote.

The fixture holds rows of real outputs of torchao, microxcaling, NVIDIA's ModelOpt, MLX and
compressed-tensors; its `origins` name versions and functions. Where a library differs, the test
says how.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lowbit as lb
from lowbit.formats import reference, scaling
from lowbit.formats.codes import decode


class Peers:
    """The committed outputs; make_peer_scales.py in the same folder tells how they came about."""

    def __init__(self):
        with np.load(Path(__file__).with_name("fixtures") / "peer_scales.npz") as held:
            index, data = json.loads(str(held["index"])), held["data"]
        self.origins = index["origins"]
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        for name, (dtype, shape, offset) in index["arrays"].items():
            count = math.prod(shape)
            array = np.frombuffer(data, dtype, count, offset).reshape(shape)
            if name.endswith("/x") and dtype == "<u2":
                array = array.view(ml_dtypes.bfloat16)
            case, part = name.split("/")
            self.arrays.setdefault(case, {})[part] = array

    def __getitem__(self, case):
        return self.arrays[case]


PEERS = Peers()


def nibbles(octets):
    return np.stack([octets & 15, octets >> 4], -1).reshape(*octets.shape[:-1], -1)


def codes_of(w):
    return reference.element_codes(w._rows())


def bytes_of(scales):
    return np.ascontiguousarray(scales).view(np.uint8)


def test_the_fixture_names_its_origins():
    peers = {origin["peer"] for origin in PEERS.origins.values()}
    assert peers == {"torchao", "microxcaling", "nvidia-modelopt", "mlx", "compressed-tensors"}
    assert set(PEERS.origins) == set(PEERS.arrays)


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4"])
def test_torchao_chooses_and_rounds_alike(name, rule):
    peer = PEERS[f"torchao_{name}"]
    w = lb.quantize(peer["x"], name, method=rule)
    np.testing.assert_array_equal(bytes_of(w.scales), peer[f"{rule}_scales"])
    codes = peer[f"{rule}_codes"]  # it keeps fp6 one a byte
    np.testing.assert_array_equal(codes_of(w), nibbles(codes) if name == "mxfp4" else codes)


@pytest.mark.parametrize("name", ["mxint8", "mxfp4", "mxfp8"])
def test_microxcaling_means_the_same_by_floor(name):
    """OCP's own emulation, with its rounding set to nearest-even."""
    peer = PEERS[f"microxcaling_{name}"]
    w = lb.quantize(peer["x"], name, method="floor")
    np.testing.assert_array_equal(bytes_of(w.scales) - 127.0, peer["exponents"])
    np.testing.assert_array_equal(w.dequantize(), peer["values"])


@pytest.mark.parametrize("case", ["modelopt_mxfp4", "modelopt_mxfp8", "mlx_mxfp4", "mlx_mxfp8"])
def test_nvidia_and_mlx_choose_rceil(case):
    peer = PEERS[case]
    w = lb.quantize(peer["x"], case.rpartition("_")[2])
    np.testing.assert_array_equal(bytes_of(w.scales), peer["scales"])
    if case.endswith("mxfp8"):
        np.testing.assert_array_equal(codes_of(w), bytes_of(peer["codes"]))
        return
    # Both break ties to the smaller magnitude. ModelOpt stores zero as 0x8 and MLX -0 as +0; we
    # keep the sign of zero. All other codes are equal.
    theirs, ours = nibbles(bytes_of(peer["codes"])), codes_of(w)
    scales = np.repeat(scaling.decode_scales(w.format, w.scales), 32, -1)
    y = np.abs(peer["x"]) / scales
    table = np.array(w.format.element.values[:8])
    tie = np.isin(y, (table[1:] + table[:-1]) / 2)
    zero = table[ours & 7] == 0
    np.testing.assert_array_equal(theirs[~tie & ~zero], ours[~tie & ~zero])
    assert (theirs[zero & ~tie] & 7 == 0).all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6"])
def test_compressed_tensors_chooses_even(name):
    peer = PEERS[f"ct_{name}"]
    w = lb.quantize(peer["x"], name, method="even")
    np.testing.assert_array_equal(bytes_of(w.scales), peer["scales"])
    np.testing.assert_array_equal(w.codes, peer["codes"])  # fp6 as a bit stream, like ours


def test_compressed_tensors_takes_the_mantissa_of_fp4_for_mxfp8():
    """Known difference: it rounds amax to one fraction bit where E4M3 has three."""
    peer = PEERS["ct_mxfp8"]
    as_fp4 = lb.quantize(peer["x"], "mxfp4", method="even")
    np.testing.assert_array_equal(bytes_of(as_fp4.scales) - 6, peer["scales"])  # emax 8, not 2
    ours = bytes_of(lb.quantize(peer["x"], "mxfp8", method="even").scales)
    assert set((peer["scales"] - ours).ravel()) <= {0, 1}


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_torchao_differs_in_blocks_of_zeros_and_subnormals(name, rule):
    """Known differences: its zero block has byte 0 and ours scale 1; it divides by 2**-126 where
    byte 0 means 2**-127, so such blocks lose a factor of two with it and not with us."""
    peer = PEERS[f"torchao_{name}_special"]
    x = peer["x"]
    w = lb.quantize(x, name, method=rule)
    zero = (x.reshape(len(x), -1, 32) == 0).all(-1)
    assert zero.any()
    np.testing.assert_array_equal(bytes_of(w.scales)[zero], 127)
    np.testing.assert_array_equal(peer[f"{rule}_scales"][zero], 0)
    np.testing.assert_array_equal(bytes_of(w.scales)[~zero], peer[f"{rule}_scales"][~zero])
    codes = peer[f"{rule}_codes"]
    codes = nibbles(codes) if name == "mxfp4" else codes
    same = np.repeat(bytes_of(w.scales) > 0, 32, -1)
    np.testing.assert_array_equal(codes_of(w)[same], codes[same])


@pytest.mark.parametrize("case", ["modelopt_nvfp4", "modelopt_nvfp4_bf16", "torchao_nvfp4"])
def test_nvfp4_is_that_of_modelopt_and_torchao(case):
    peer = PEERS[case]
    w = lb.quantize(peer["x"], "nvfp4")
    assert w.tensor_scale == peer["tensor_scale"]
    zero = (peer["x"].reshape(len(w.scales), -1, 16) == 0).all(-1)
    np.testing.assert_array_equal(bytes_of(w.scales)[~zero], bytes_of(peer["scales"])[~zero])
    # ModelOpt makes +0 of an exact -0.
    ours, theirs = codes_of(w), nibbles(peer["codes"])
    minus = np.signbit(peer["x"].astype(np.float32)) & (peer["x"] == 0)
    np.testing.assert_array_equal(ours[~minus], theirs[~minus])
    np.testing.assert_array_equal(ours[minus] & 7, theirs[minus] & 7)


def test_nvfp4_of_compressed_tensors_divides_by_its_global_scale():
    peer = PEERS["ct_nvfp4"]
    w = lb.quantize(peer["x"], "nvfp4")
    assert w.tensor_scale is not None
    # Two roundings on either side, each at most 2**-24 of the number.
    np.testing.assert_allclose(1 / w.tensor_scale, peer["tensor_scale"][0], rtol=2**-22)
    zero = (peer["x"].reshape(len(w.scales), -1, 16) == 0).all(-1)
    np.testing.assert_array_equal(bytes_of(w.scales)[~zero], bytes_of(peer["scales"])[~zero])
    ours, theirs = codes_of(w), nibbles(peer["codes"])
    np.testing.assert_array_equal(ours[ours != 8], theirs[ours != 8])


def test_nvfp4_of_mlx_differs_in_zeros_only():
    """Its global scale is amax itself, a block of zeros has scale 0, and -0 becomes +0."""
    peer = PEERS["mlx_nvfp4"]
    w = lb.quantize(peer["x"], "nvfp4")
    assert w.tensor_scale == np.float32(peer["tensor_scale"]) / np.float32(448 * 6)
    zero = (peer["x"].reshape(len(w.scales), -1, 16) == 0).all(-1)
    np.testing.assert_array_equal(bytes_of(w.scales)[~zero], peer["scales"][~zero])
    np.testing.assert_array_equal(peer["scales"][zero], 0)
    np.testing.assert_array_equal(decode(lb.format("fp8").element, bytes_of(w.scales)[zero]), 1)


@pytest.mark.parametrize("case", ["torchao_int8_row_asym", "ct_int8_row_asym"])
def test_asymmetric_int8_is_that_of_torchao_and_compressed_tensors(case):
    peer = PEERS[case]
    w = lb.quantize(peer["x"], "int8_row_asym")
    np.testing.assert_array_equal(w.scales, peer["scales"])
    np.testing.assert_array_equal(w.zeros, peer["zeros"])
    np.testing.assert_array_equal(w.codes, peer["codes"])


def test_fp8_rows_are_those_of_compressed_tensors():
    peer = PEERS["ct_float8_e4m3fn_row"]
    w = lb.quantize(peer["x"], "float8_e4m3fn_row")
    np.testing.assert_array_equal(w.scales, peer["scales"])
    np.testing.assert_array_equal(bytes_of(w.codes), peer["codes"])


def test_symmetric_integers_differ_from_libraries_that_divide_by_half_a_step_more():
    """Known difference: torchao and compressed-tensors take amax / 7.5 for int4 and amax / 127.5
    for int8, where design and ONNX Runtime take amax / 7 and amax / 127."""
    x = np.array([[7.5, -1.0, 0.0]], np.float32)
    assert lb.quantize(x, "int4_g32").scales == np.float32(7.5) / np.float32(7)
    assert lb.quantize(x, "int8_row").scales == np.float32(7.5) / np.float32(127)
