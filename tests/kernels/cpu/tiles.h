// AMX tiles in plain C, so that code for them runs on every CPU that multiplies bf16: tile registers of a thread, and
// the instructions as Intel's manual has them.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static __thread float emulated[8][16][16];
static void emulated_load(int t, const void *from, long stride) {
  for (int r = 0; r < 16; r++) memcpy(emulated[t][r], (const char *)from + r * stride, 64);
}
static void emulated_store(int t, void *to, long stride) {
  for (int r = 0; r < 16; r++) memcpy((char *)to + r * stride, emulated[t][r], 64);
}
static void emulated_product(int c, int a, int b) { // of pairs of bf16
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 2; j++) {
          uint32_t x = (uint32_t)((uint16_t *)emulated[a][r])[2 * k + j] << 16;
          uint32_t y = (uint32_t)((uint16_t *)emulated[b][k])[2 * i + j] << 16;
          float of[2];
          memcpy(of, &x, 4), memcpy(of + 1, &y, 4);
          emulated[c][r][i] += of[0] * of[1];
        }
}
#define _tile_loadconfig(shape) ((void)(shape))
#define _tile_release() ((void)0)
#define _tile_zero(t) memset(emulated[t], 0, sizeof emulated[t])
#define _tile_loadd(t, from, stride) emulated_load(t, from, stride)
#define _tile_stored(t, to, stride) emulated_store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated_product(c, a, b)
