// What g++'s UndefinedBehaviorSanitizer calls from kernels: the launch fails where the kernel's text says.
#include "core.h"

namespace {
struct Place {  // what all of the sanitizer's records begin with
    const char* file;
    emu::u32 line, column;
};
[[noreturn]] void fail(const void* record, const char* what) {
    const Place* place = static_cast<const Place*>(record);
    emu::fail_at({place->file, int(place->line)}, "%s", what);
}
}  // namespace

extern "C" {
[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(void* record, void*) { fail(record, "misaligned access"); }
[[noreturn]] void __ubsan_handle_out_of_bounds_abort(void* record, void*) { fail(record, "index outside of an array"); }
[[noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(void* record, void*, void*) { fail(record, "shift too far"); }
[[noreturn]] void __ubsan_handle_add_overflow_abort(void* record, void*, void*) { fail(record, "sum beyond its type"); }
[[noreturn]] void __ubsan_handle_sub_overflow_abort(void* record, void*, void*) { fail(record, "difference beyond its type"); }
[[noreturn]] void __ubsan_handle_mul_overflow_abort(void* record, void*, void*) { fail(record, "product beyond its type"); }
[[noreturn]] void __ubsan_handle_negate_overflow_abort(void* record, void*) { fail(record, "negative beyond its type"); }
[[noreturn]] void __ubsan_handle_divrem_overflow_abort(void* record, void*, void*) { fail(record, "quotient beyond its type"); }
[[noreturn]] void __ubsan_handle_missing_return(void* record) { fail(record, "no value returned"); }
}
