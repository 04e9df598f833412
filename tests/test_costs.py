"""Prices of products: the work that they are made of, and the choices that follow."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit.kernels import Problem, choose, judge
from lowbit.kernels.cpu import costs, machine
from lowbit.kernels.cpu.isa import RECORDS, host
from lowbit.kernels.cpu.machine import Rates, Tuning

NAMES = tuple(each.name for each in fields(Rates))
METHODS = {
    "fma": ("direct", "decoded"),
    "bf16": ("direct", "decoded", "tiles", "single"),
    "dot": ("direct", "decoded", "tiles", "single"),
}


@pytest.fixture(autouse=True)
def _estimated(monkeypatch):
    """Nominal rates, whatever this machine's user has measured."""
    monkeypatch.setenv("LOWBIT_TUNING", "off")
    before = machine.use(())
    yield
    machine.use(before)


def problem(**changes):
    stated = Problem(64, 4096, 4096, "float32", lb.format("int4_g128"), layout="words16")
    return replace(stated, device="cpu:avx512vnni", threads=16, **changes)


def tuned(rates=None, **changes):
    isa = changes.get("isa", host().name)
    here = Tuning(
        isa, machine.processor(), 2, machine.version(), "a day", rates or machine.nominal(isa)
    )
    return replace(here, **changes)


def price(stated, kernel):
    return next(v.seconds for v in judge(stated) if v.kernel.name == kernel)


# Amounts of work


@st.composite
def _priced(draw):
    inner = draw(st.sampled_from(list(METHODS)))
    method = draw(st.sampled_from(METHODS[inner]))
    weight = draw(st.sampled_from(["int4_g32", "int8_row", "fp8_128x128", "int3_g96", "nvfp4"]))
    stated = problem(
        m=draw(st.integers(1, 2000)),
        n=draw(st.integers(1, 9000)),
        k=draw(st.integers(1, 9000)),
        x=draw(st.sampled_from(["float32", "bfloat16", lb.format("int8_g128")])),
        w=lb.format(weight),
        activation=draw(st.sampled_from([None, "relu", "gelu"])),
        layout=draw(st.sampled_from(["rows", "words16"])),
    )
    stated = replace(stated, threads=draw(st.sampled_from([1, 2, 16, 192])))
    isa = "amx" if method in ("tiles", "single") else draw(st.sampled_from(RECORDS)).name
    return replace(stated, device=f"cpu:{isa}"), inner, method, draw(st.sampled_from([16, 128]))


@given(
    case=_priced(),
    axis=st.sampled_from(["m", "n", "k"]),
    more=st.one_of(st.integers(1, 20), st.integers(1, 10000)),
)
def test_more_never_costs_less(case, axis, more):
    stated, inner, method, segment = case
    larger = replace(stated, **{axis: getattr(stated, axis) + more})
    before = costs.seconds(stated, inner, method, segment)
    assert 0 < before <= costs.seconds(larger, inner, method, segment) * (1 + 1e-12)


def beside(*work):
    """Of which nothing is hidden but by the longest."""
    return sum(each**4 for each in work) ** 0.25


def test_a_price_is_the_work_over_the_rates():
    """By hand: 64 rows and 512 columns of int4_g128 on one thread."""
    stated = replace(problem(n=512), threads=1)
    rates = machine.nominal("avx512bf16")
    moving = 1 / (rates.read_one**-4 + rates.read_all**-4) ** -0.25
    results, numbers, scales = 64 * 512, 64 * 4096, 64 * 32 / rates.scale
    kinds = {
        "fma": (("float32",), rates.fma, rates.float_narrow, 1, 0),
        "bf16": (("bfloat16",), rates.bf16, rates.bfloat_narrow, 2, 2),
        "dot": ((lb.format("int8_row"),), rates.dot, rates.byte_narrow, 3, 1),
    }
    for kind, ((x,), products, codes, calls, size) in kinds.items():
        asked = replace(stated, x=x, device="cpu:avx512bf16")
        computing = 512 * (4096 / codes + numbers / products + scales)
        expected = beside(asked.bytes * moving, computing) + results / rates.finish
        expected += calls * rates.call + size * numbers / rates.arrange
        assert price(asked, f"matmul.cpu.{kind}") == pytest.approx(expected, rel=1e-9), kind


def test_tall_products_are_shared_by_rows_as_well():
    tall = problem(n=64, m=1 << 14)
    alone = price(replace(tall, threads=1), "matmul.cpu.fma")
    assert price(replace(tall, threads=16), "matmul.cpu.fma") < alone / 12


def test_one_thread_arranges_what_is_little():
    rates = replace(machine.nominal("avx512vnni"), arrange=1e3)
    machine.use(tuple(tuned(rates, isa="avx512vnni", threads=t) for t in (1, 16)))
    for m, shared in ((4, False), (16, False), (64, True)):
        stated = problem(x="bfloat16", m=m)
        one, many = (price(replace(stated, threads=t), "matmul.cpu.fma") for t in (1, 16))
        assert many == pytest.approx(one / 4 if shared else one, rel=1e-3)


def test_bytes_need_no_decoding_and_half_of_them_half_of_the_rearranging():
    free = dict.fromkeys(NAMES, 1e15) | {"call": 1e-12, "repack": 1e6, "byte_narrow": 1e5}
    machine.use((tuned(Rates(**free), isa="avx512vnni", threads=1),))
    stated = replace(problem(n=1024, k=4096, x=lb.format("int8_row")), threads=1)
    for weight, layout, seconds in (
        ("int8_row", "words16", 0.0),
        ("int8_row", "rows", 1024 * 4096 / 1e6),
        ("int4_row", "words16", 1024 * 4096 / 1e5),
        ("int4_row", "rows", 1024 * 4096 * (1 / 1e5 + 1 / 2e6)),
    ):
        asked = replace(stated, w=lb.format(weight), layout=layout)
        assert price(asked, "matmul.cpu.dot") == pytest.approx(seconds, rel=1e-3, abs=1e-3)


def test_codes_are_decoded_again_for_every_four_rows_in_registers():
    stated = replace(problem(x="bfloat16", w=lb.format("fp8_row")), threads=1)
    rates = machine.nominal("avx512vnni")
    slow = replace(rates, float_table=1e8, fma=1e15, read_one=1e15, read_all=1e15)
    machine.use((tuned(slow, isa="avx512vnni"),))
    codes = stated.n * stated.k / slow.float_table
    for method, passes in (("direct", 16), ("decoded", 1)):
        found = costs.seconds(stated, "fma", method, stated.k)
        assert found == pytest.approx(passes * codes, rel=0.01)


def test_scales_that_are_multiplied_in_while_decoding_cost_a_longer_look_up():
    stated = replace(problem(m=16, w=lb.format("mxfp4"), x="bfloat16"), device="cpu:amx", threads=1)
    wide = replace(stated, w=lb.format("fp8_row"))
    rates = replace(machine.nominal("amx"), read_one=1e15, read_all=1e15)
    machine.use((tuned(rates, isa="amx"),))
    folded = costs.seconds(stated, "bf16", "tiles", stated.k, folded=True)
    assert folded == pytest.approx(costs.seconds(wide, "bf16", "tiles", stated.k))
    assert folded > 1.1 * costs.seconds(stated, "bf16", "tiles", stated.k)


@pytest.mark.parametrize(
    "more",
    [
        {"activation": "gelu"},
        {"w": lb.format("int4_g128_bias_bf16")},
        {"x": lb.format("uint8_row_asym")},
    ],
)
def test_what_comes_on_top_is_paid_for(more):
    stated = replace(problem(n=64, k=64, x=lb.format("fp8_row")), threads=1)
    assert price(replace(stated, **more), "matmul.cpu.fma") > 1.02 * price(stated, "matmul.cpu.fma")


def test_tiles_of_sixteen_rows_cost_as_much_for_one():
    stated = replace(problem(x="bfloat16"), device="cpu:amx", threads=1)
    one, sixteen, more = (
        costs.seconds(replace(stated, m=m), "bf16", "tiles", 4096) for m in (1, 16, 17)
    )
    assert sixteen < 1.1 * one
    assert more > sixteen + 16 * 4096 * 4096 / machine.nominal("amx").bf16_tiles / 1.1


def test_rows_that_are_not_prepared_cost_more():
    for weight in ("int4_g128", "int8_row", "int3_g128"):
        stated = problem(w=lb.format(weight), m=1)
        packed, plain = (
            price(replace(stated, layout=layout), "matmul.cpu.fma")
            for layout in ("words16", "rows")
        )
        assert plain > 1.002 * packed


def test_threads_share_what_there_is_to_share():
    wide = problem(n=8192)
    assert price(replace(wide, threads=2), "matmul.cpu.fma") == pytest.approx(
        price(replace(wide, threads=1), "matmul.cpu.fma") / 2, rel=0.01
    )
    narrow = problem(n=64)
    assert price(replace(narrow, threads=16), "matmul.cpu.fma") > 0.9 * price(
        replace(narrow, threads=2), "matmul.cpu.fma"
    )


# The choice, by nominal rates


@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
@pytest.mark.parametrize("weight", ["int4_g128", "int8_row", "fp8_row", "nf4_g64"])
@pytest.mark.parametrize("m", [1, 64])
def test_float32_is_multiplied_as_float32(isa, weight, m):
    stated = replace(problem(w=lb.format(weight), m=m), device=f"cpu:{isa}")
    assert choose(stated).kernel.name == "matmul.cpu.fma"


@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
@pytest.mark.parametrize("weight", ["int4_g128", "int8_row", "uint4_g64_asym"])
@pytest.mark.parametrize("m", [1, 4, 64])
def test_integers_are_multiplied_as_integers(isa, weight, m):
    stated = problem(w=lb.format(weight), m=m, x=lb.format("int8_row"))
    assert choose(replace(stated, device=f"cpu:{isa}")).kernel.name == "matmul.cpu.dot"


@pytest.mark.parametrize("weight", ["int4_g128", "int8_row", "fp8_row", "nf4_g64", "mxfp4"])
@pytest.mark.parametrize("m", [4, 16, 64, 256])
@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
def test_bfloat16_is_multiplied_where_the_machine_can(isa, weight, m):
    stated = replace(problem(w=lb.format(weight), m=m, x="bfloat16"), device=f"cpu:{isa}")
    can = next(each.bf16 for each in RECORDS if each.name == isa)
    assert choose(stated).kernel.name == ("matmul.cpu.bf16" if can else "matmul.cpu.fma")


@pytest.mark.parametrize("weight", ["int4_g128", "nf4_g64", "fp8_row"])
def test_one_row_of_bfloat16_is_no_dearer_in_bfloat16_on_zen_4(weight):
    stated = replace(problem(w=lb.format(weight), m=1, x="bfloat16"), device="cpu:avx512bf16")
    assert choose(stated).kernel.name == "matmul.cpu.bf16"


def test_slow_products_of_bfloat16_are_left_alone():
    """The choice follows the rates, not the name of the instruction set."""
    stated = replace(problem(m=1, x="bfloat16"), device="cpu:avx512bf16", threads=2)
    slow = replace(machine.nominal("avx512bf16"), bf16=1e9)
    machine.use((tuned(slow, isa="avx512bf16"),))
    assert choose(stated).kernel.name == "matmul.cpu.fma"
    machine.use(())
    assert choose(stated).kernel.name == "matmul.cpu.bf16"


@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
@pytest.mark.parametrize("x", ["float32", "bfloat16", lb.format("int8_row")])
def test_a_batch_invariant_choice_does_not_depend_on_m(isa, x):
    stated = replace(problem(x=x, batch_invariant=True), device=f"cpu:{isa}")
    assert len({choose(replace(stated, m=m)).kernel.name for m in (1, 2, 5, 64, 4096)}) == 1


@pytest.mark.parametrize("tunings", [(), (1,), (2, 64)])
@pytest.mark.parametrize("weight", ["int4_g128", "nf4_g64"])
def test_the_choice_does_not_depend_on_the_number_of_threads(weight, tunings):
    """Kernels have their own orders of sums, and bits do not depend on threads."""
    slow = replace(machine.nominal("avx512bf16"), bf16=1.5e10)
    machine.use(tuple(tuned(slow, isa="avx512bf16", threads=t) for t in tunings))
    stated = replace(problem(w=lb.format(weight), x="bfloat16"), device="cpu:avx512bf16")
    for m in range(1, 20):
        asked = [replace(stated, m=m, threads=threads) for threads in (1, 2, 8, 64)]
        assert len({choose(each).kernel.name for each in asked}) == 1
    assert len({price(each, "matmul.cpu.fma") for each in asked}) == len(asked)
