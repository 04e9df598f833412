"""A few words for writing LLVM IR as text: typed names, splats, loops.

One vector has 16 lanes on every instruction set, one for each column of a panel; LLVM cuts it into
the registers that the target has. So a kernel is written once.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from lowbit.kernels.cpu.isa import Isa

LANES = 16
VECTOR = 4 * LANES  # bytes
FLOAT, INT, DOUBLE, LONG = (f"<16 x {t}>" for t in ("float", "i32", "double", "i64"))


class Value(NamedTuple):
    """A name or constant with its type."""

    type: str
    name: str

    def __str__(self) -> str:
        return f"{self.type} {self.name}"


def scalar(vector: str) -> str:
    """Type of one lane; a scalar type is its own."""
    return vector.split(" x ")[1][:-1] if vector.startswith("<") else vector


def constant(kind: str, number: float) -> Value:
    """The number in every lane; floats exactly, float32 rounded once."""
    lane = scalar(kind)
    if lane in ("float", "double"):
        single = struct.unpack("f", struct.pack("f", number))[0] if lane == "float" else number
        text = f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"
    else:
        text = str(int(number))
    return Value(kind, text if lane == kind else f"splat ({lane} {text})")


class Loop:
    """`index` and `carried` are this turn's; assign `carried` before the body ends.

    Behind the loop `results` are the last turn's.
    """

    def __init__(self, index: Value, carried: list[Value]) -> None:
        self.index = index
        self.carried = carried
        self.results = list(carried)


class Module:
    """Functions, tables and declarations that become one object."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        machine = isa.triple.split("-")[0] or platform.machine()
        self.x86 = machine in ("x86_64", "AMD64")
        self.arm = machine in ("aarch64", "arm64")
        # The instruction is part of every aarch64, but not of the first x86-64.
        self.fused = self.arm or "fma" in isa.needs
        self._functions: list[Function] = []
        self._heads: dict[str, str] = {}

    def function(self, name: str, parameters: dict[str, str], linkage: str = "") -> Function:
        """Begin `void name(parameters)`; linkage "external" lets it be called from outside."""
        made = Function(self, name, parameters, linkage)
        self._functions.append(made)
        return made

    def declare(self, name: str, text: str) -> None:
        """Add an intrinsic's declaration or a constant, once."""
        self._heads.setdefault(name, text)

    def table(self, name: str, values: Sequence[float]) -> Value:
        """A constant array of float32."""
        words = ", ".join(str(constant("float", v)) for v in values)
        size = len(values)
        self.declare(name, f"@{name} = private constant [{size} x float] [{words}], align 64")
        return Value("ptr", f"@{name}")

    def text(self) -> str:
        """Everything, for LLVM's parser."""
        return "\n".join([*self._heads.values(), *(f.text() for f in self._functions), ""])


class Function:
    """One function's instructions, in order."""

    def __init__(self, module: Module, name: str, parameters: dict[str, str], linkage: str) -> None:
        self.module = module
        self.name = name
        self.parameters = [Value(kind, f"%{each}") for each, kind in parameters.items()]
        self._linkage = linkage
        self._lines: list[str] = []
        self._count = 0
        self._block = "entry"

    def text(self) -> str:
        """The definition."""
        linkage = "" if self._linkage == "external" else "internal "
        apart = " noinline" if self._linkage == "apart" else ""
        head = f"define {linkage}void @{self.name}({', '.join(map(str, self.parameters))})"
        return "\n".join([f"{head} nounwind{apart} {{", "entry:", *self._lines, "  ret void", "}"])

    def do(self, text: str) -> None:
        """Append an instruction without a result."""
        self._lines.append(f"  {text}")

    def let(self, kind: str, text: str) -> Value:
        """Append an instruction and name its result."""
        self._count += 1
        value = Value(kind, f"%v{self._count}")
        self._lines.append(f"  {value.name} = {text}")
        return value

    # Arithmetic: numbers stand for constants of the other operand's type.

    def op(self, opcode: str, a: Value, b: Value | float) -> Value:
        """Any instruction of two operands of one type."""
        right = b if isinstance(b, Value) else constant(a.type, b)
        return self.let(a.type, f"{opcode} {a}, {right.name}")

    def add(self, a: Value, b: Value | int) -> Value:
        """a + b for integers."""
        return a if isinstance(b, int) and b == 0 else self.op("add", a, b)

    def mul(self, a: Value, b: Value | int) -> Value:
        """a * b for integers."""
        return a if isinstance(b, int) and b == 1 else self.op("mul", a, b)

    def compare(self, predicate: str, a: Value, b: Value | float) -> Value:
        """One i1 a lane; the predicate is LLVM's."""
        right = b if isinstance(b, Value) else constant(a.type, b)
        opcode = "fcmp" if scalar(a.type) in ("float", "double") else "icmp"
        lanes = a.type.split(" x ")[0]
        kind = f"{lanes} x i1>" if a.type.startswith("<") else "i1"
        return self.let(kind, f"{opcode} {predicate} {a}, {right.name}")

    def select(self, condition: Value, a: Value, b: Value | float) -> Value:
        """A or b, lane by lane."""
        right = b if isinstance(b, Value) else constant(a.type, b)
        return self.let(a.type, f"select {condition}, {a}, {right}")

    def least(self, a: Value, b: Value | int) -> Value:
        """Signed minimum."""
        right = b if isinstance(b, Value) else constant(a.type, b)
        return self.select(self.compare("slt", a, right), a, right)

    def greatest(self, a: Value, b: Value | int) -> Value:
        """Signed maximum."""
        right = b if isinstance(b, Value) else constant(a.type, b)
        return self.select(self.compare("sgt", a, right), a, right)

    def over(self, a: Value, b: Value | int) -> Value:
        """a / b rounded up, for a >= 0."""
        return self.op("udiv", self.op("sub", self.add(a, b), 1), b)

    def cast(self, opcode: str, a: Value, kind: str) -> Value:
        """A conversion; none where the type is right already."""
        return a if a.type == kind else self.let(kind, f"{opcode} {a} to {kind}")

    def bits(self, a: Value, kind: str) -> Value:
        """The same bits as another type."""
        return self.cast("bitcast", a, kind)

    def call(self, name: str, kind: str, *operands: Value) -> Value:
        """Call an intrinsic, declared by its operands' types."""
        types = ", ".join(each.type for each in operands)
        self.module.declare(name, f"declare {kind} @{name}({types})")
        text = f"call {kind} @{name}({', '.join(map(str, operands))})"
        if kind == "void":
            self.do(text)
            return Value("void", "")
        return self.let(kind, text)

    def tile(self, name: str, *operands: int | Value) -> None:
        """An instruction of AMX; tile registers are given by number."""
        texts = [str(each) if isinstance(each, Value) else f"i8 {each}" for each in operands]
        types = ", ".join(text.split()[0] for text in texts)
        self.module.declare(name, f"declare void @llvm.x86.{name}({types})")
        self.do(f"call void @llvm.x86.{name}({', '.join(texts)})")

    def run(self, function: Function, *operands: Value) -> None:
        """Call a function of this module."""
        self.do(f"call void @{function.name}({', '.join(map(str, operands))})")

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c with one rounding, on every instruction set."""
        if self.module.fused:
            return self.call("llvm.fma.v16f32", FLOAT, a, b, c)
        return self._soft_fma(a, b, c)

    def _soft_fma(self, a: Value, b: Value, c: Value) -> Value:
        # The product of two float32 is exact in float64. Their sum is rounded to odd there, with
        # the error that Knuth's two-sum gives, so that the rounding to float32 is the only one
        # (Boldo and Melquiond, 2008: 53 >= 24 + 2 bits).
        wide_a, wide_b, wide_c = (self.cast("fpext", v, DOUBLE) for v in (a, b, c))
        product = self.op("fmul", wide_a, wide_b)
        total = self.op("fadd", product, wide_c)
        part = self.op("fsub", total, product)
        lost = self.op(
            "fadd",
            self.op("fsub", product, self.op("fsub", total, part)),
            self.op("fsub", wide_c, part),
        )
        pattern, error = self.bits(total, LONG), self.bits(lost, LONG)
        # +1 where the error points away from zero, else -1.
        signs = self.op("ashr", self.op("xor", pattern, error), 63)
        moved = self.add(pattern, self.op("or", signs, 1))
        even = self.compare("eq", self.op("and", pattern, 1), 0)
        inexact = self.compare("one", lost, 0.0)
        odd = self.select(self.op("and", even, inexact), moved, pattern)
        return self.cast("fptrunc", self.bits(odd, DOUBLE), FLOAT)

    # Memory: addresses are `ptr`, offsets are bytes in 64 bits.

    def at(self, base: Value, offset: Value | int) -> Value:
        """The address `offset` bytes behind another one."""
        if isinstance(offset, int) and offset == 0:
            return base
        return self.let("ptr", f"getelementptr i8, {base}, {_value(offset)}")

    def load(self, kind: str, address: Value, align: int) -> Value:
        """Read a value."""
        return self.let(kind, f"load {kind}, {address}, align {align}")

    def store(self, value: Value, address: Value, align: int) -> None:
        """Write a value."""
        self.do(f"store {value}, {address}, align {align}")

    def prefetch(self, address: Value) -> None:
        """Ask for a cache line; the address need not exist."""
        where = Value("i32", "0"), Value("i32", "2"), Value("i32", "1")
        self.call("llvm.prefetch.p0", "void", address, *where)

    def apart(self) -> None:
        """Keep LLVM from mixing what stands before and behind. It is not an instruction."""
        self.do('fence syncscope("singlethread") seq_cst')

    # Lanes.

    def splat(self, value: Value) -> Value:
        """The scalar in all 16 lanes."""
        kind = f"<16 x {value.type}>"
        one = self.let(kind, f"insertelement {kind} poison, {value}, i64 0")
        return self.shuffle(one, one, [0] * LANES)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """Lanes of a, then b, counted through."""
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        kind = f"<{len(lanes)} x {scalar(a.type)}>"
        return self.let(kind, f"shufflevector {a}, {b}, <{len(lanes)} x i32> <{mask}>")

    def lane_numbers(self) -> Value:
        """0, 1, ... 15."""
        return Value(INT, f"<{', '.join(f'i32 {lane}' for lane in range(LANES))}>")

    # Control.

    @contextmanager
    def loop(
        self,
        start: Value | int,
        stop: Value | int,
        step: Value | int = 1,
        carried: Sequence[Value] = (),
    ) -> Iterator[Loop]:
        """`for index in range(start, stop, step)`."""
        number = self._next()
        head, body, done = (f"{word}{number}" for word in ("head", "body", "done"))
        before = self._block
        self._jump(head)
        place = len(self._lines)
        turn = Loop(self.let("i64", "phi"), [self.let(each.type, "phi") for each in carried])
        phis = [turn.index, *turn.carried]
        more = self.compare("slt", turn.index, _value(stop))
        self.do(f"br {more}, label %{body}, label %{done}")
        self._label(body)
        yield turn
        after = [self.add(turn.index, _value(step)), *turn.carried]
        latch = self._block
        self.do(f"br label %{head}")
        for i, (phi, first, last) in enumerate(
            zip(phis, [_value(start), *carried], after, strict=True)
        ):
            self._lines[place + i] = (
                f"  {phi.name} = phi {phi.type} [{first.name}, %{before}], [{last.name}, %{latch}]"
            )
        self._label(done)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """`if condition:`."""
        number = self._next()
        self.do(f"br {condition}, label %then{number}, label %end{number}")
        self._label(f"then{number}")
        yield
        self._jump(f"end{number}")

    def either(
        self,
        condition: Value,
        yes: Callable[[], Sequence[Value]],
        no: Callable[[], Sequence[Value]],
    ) -> list[Value]:
        """Results of one of two branches."""
        number = self._next()
        self.do(f"br {condition}, label %yes{number}, label %no{number}")
        self._label(f"yes{number}")
        first, first_block = list(yes()), self._block
        self.do(f"br label %end{number}")
        self._label(f"no{number}")
        second, second_block = list(no()), self._block
        self._jump(f"end{number}")
        pairs = zip(first, second, strict=True)
        return [
            self.let(
                a.type, f"phi {a.type} [{a.name}, %{first_block}], [{b.name}, %{second_block}]"
            )
            for a, b in pairs
        ]

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _label(self, name: str) -> None:
        self._lines.append(f"{name}:")
        self._block = name

    def _jump(self, name: str) -> None:
        self.do(f"br label %{name}")
        self._label(name)


def _value(number: Value | int) -> Value:
    return number if isinstance(number, Value) else constant("i64", number)
