// Calls a function for every tile of one job on aarch64 Linux, without a C library.
//
// Standard input is a file that is the memory from BASE on. It is mapped, not read: what `job`
// writes is in the file afterwards. Between the pieces nothing is mapped, so a step outside of an
// operand ends the program.
//
//     BASE    tiles, argument, scratch, number of pieces
//     + 32    address, on a page's edge, and bytes of each piece

        .equ    BASE, 0x1000000000
        .equ    HEAD, 65536
        .equ    EXIT, 93
        .equ    MMAP, 222
        .equ    READ_WRITE, 3
        .equ    SHARED_FIXED, 0x11

        .globl  _start
_start: ldr     x19, =BASE
        mov     x0, x19
        mov     x1, #HEAD
        bl      map
        ldr     x20, [x19, #24]
        add     x21, x19, #32
1:      cbz     x20, 2f
        ldp     x0, x1, [x21], #16
        bl      map
        sub     x20, x20, #1
        b       1b
2:      mov     x20, #0
3:      ldr     x0, [x19]
        cmp     x20, x0
        b.ge    4f
        ldr     x0, [x19, #8]
        mov     x1, x20
        ldr     x2, [x19, #16]
        bl      job
        add     x20, x20, #1
        b       3b
4:      mov     x0, #0
        b       exit

// x0: address, x1: bytes
map:    sub     x5, x0, x19
        mov     x2, #READ_WRITE
        mov     x3, #SHARED_FIXED
        mov     x4, #0
        mov     x8, #MMAP
        svc     #0
        cmn     x0, #4095               // -4095 to -1 are errors
        b.hs    5f
        ret
5:      neg     x0, x0
exit:   mov     x8, #EXIT
        svc     #0

// What LLVM calls for large copies.

        .globl  memset
memset: add     x3, x0, x2
1:      cmp     x3, x0
        b.eq    2f
        strb    w1, [x3, #-1]!
        b       1b
2:      ret

        .globl  memcpy, memmove
memcpy:
memmove:
        cmp     x0, x1
        b.hi    3f
        mov     x3, x0
1:      cbz     x2, 2f
        ldrb    w4, [x1], #1
        strb    w4, [x3], #1
        sub     x2, x2, #1
        b       1b
2:      ret
3:      cbz     x2, 2b                  // the end first, lest an overlap is lost
        sub     x2, x2, #1
        ldrb    w4, [x1, x2]
        strb    w4, [x0, x2]
        b       3b
