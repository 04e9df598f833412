"""The floating-point mode as LLVM IR: tiles round to nearest and keep subnormals on every thread.

A library built with -ffast-math, or torch.set_flush_denormal, changes the mode of a thread, and a
new thread inherits it: bits would depend on who made the workers and which thread took a tile.
"""

from __future__ import annotations

_DECLARE = {
    "x86_64": """
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
""",
    "aarch64": """
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
""",
}
_DEFINE = {
    # Bits 0 to 5 are flags that any instruction may set; the others are the mode.
    "x86_64": """
define internal i64 @standard_mode() {
  %word = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %word)
  %mode = load i32, ptr %word
  %control = and i32 %mode, -64
  %standard = icmp eq i32 %control, 8064
  br i1 %standard, label %out, label %set
set:
  store i32 8064, ptr %word
  call void @llvm.x86.sse.ldmxcsr(ptr %word)
  br label %out
out:
  %wide = zext i32 %mode to i64
  ret i64 %wide
}

define internal void @restore_mode(i64 %wide) {
  %mode = trunc i64 %wide to i32
  %control = and i32 %mode, -64
  %standard = icmp eq i32 %control, 8064
  br i1 %standard, label %out, label %set
set:
  %word = alloca i32
  store i32 %mode, ptr %word
  call void @llvm.x86.sse.ldmxcsr(ptr %word)
  br label %out
out:
  ret void
}
""",
    "aarch64": """
define internal i64 @standard_mode() {
  %mode = call i64 @llvm.aarch64.get.fpcr()
  call void @llvm.aarch64.set.fpcr(i64 0)
  ret i64 %mode
}

define internal void @restore_mode(i64 %mode) {
  call void @llvm.aarch64.set.fpcr(i64 %mode)
  ret void
}
""",
    "": """
define internal i64 @standard_mode() {
  ret i64 0
}

define internal void @restore_mode(i64 %mode) {
  ret void
}
""",
}


def text(machine: str) -> str:
    """Return `i64 @standard_mode()`, which gives the old mode, and `void @restore_mode(i64)`."""
    return _DECLARE.get(machine, "") + _DEFINE.get(machine, _DEFINE[""])
