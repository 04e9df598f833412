#include "fiber.h"

#include <sys/mman.h>

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
void* emu::first_frame(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 2;  // as after a call: 8 bytes off a multiple of 16
    *sp = reinterpret_cast<void*>(entry);
    return sp - 6;
}
#else  // any other processor, at the price of two system calls a switch
#include <ucontext.h>
void emu_switch(void** save, void* load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(load));
}
void* emu::first_frame(char* top, void (*entry)()) {
    constexpr size_t room = (sizeof(ucontext_t) + 63) / 64 * 64;
    ucontext_t* context = reinterpret_cast<ucontext_t*>(top - room);
    getcontext(context);
    context->uc_stack.ss_sp = top - stack_bytes;
    context->uc_stack.ss_size = stack_bytes - room;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

char* emu::map_between_guards(size_t bytes) {
    bytes = (bytes + page - 1) / page * page;
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char* p = static_cast<char*>(mmap(nullptr, bytes + 2 * page, PROT_NONE, flags, -1, 0));
    mprotect(p + page, bytes, PROT_READ | PROT_WRITE);
    return p + page;
}
void emu::unmap_between_guards(char* start, size_t bytes) {
    munmap(start - page, (bytes + page - 1) / page * page + 2 * page);
}
