/* The matrix unit of CPUs that have one (AMX): products of tiles, 16 rows of 64 bytes each. */
#pragma once
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

static int can_have_tiles, has_tiles; /* the CPU has them, and the system lets us; in use */

__attribute__((constructor)) static void ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    has_tiles = can_have_tiles = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* Tiles 0 to 4 get so many rows, 5 to 7 all 16. */
static void shape_tiles(int64_t rows) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 64;
        shape.rows[i] = i < 5 ? rows : 16;
    }
    _tile_loadconfig(&shape);
}
