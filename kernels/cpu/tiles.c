// AMX tiles: eight of 16 rows of 64 bytes for each thread.
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#define TILES_READ_AND_WRITE __asm__ volatile("" ::: "memory") // which gcc does not know

// Whether the system lets this process use them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static void take_tiles(void) {
  struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape = {.palette = 1};
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
  _tile_loadconfig(&shape);
}
#else
#define TILES_READ_AND_WRITE
#define take_tiles()
#define _tile_release()
#endif
