// AMX tiles: eight of 16 rows of 64 bytes for each thread; products of up to four blocks of 16 rows with 4-bit weights.
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

#define BLOCK(i, ...) if (blocks > i) { __VA_ARGS__; }

// y [N, 16 blocks] = W x^T with values in bf16, up to four blocks of 16 rows; N in whole 16s, K in whole 64s with one
// scale each. x is [K / 2, 16 blocks, 2], and of every 64 inputs it has 4 i + 1 first, then 4 i, 4 i + 3, 4 i + 2: a
// 16-bit word holds four codes, and its low bits look up the values, times the scale, of 16 words at once.
void nf4_tiles(const uint16_t *x, const matrix *w, float *y, long blocks, int threads) {
  long N = w->N, K = w->K;
#pragma omp parallel num_threads(threads)
  {
    take_tiles();
    floats values = V(loadu_ps)(w->table);
    ints eight = V(set1_epi16)(8), places = _mm512_inserti64x4(V(setzero_si512)(), _mm256_set1_epi16(4), 1);
    ints some[2][16];
#pragma omp for schedule(static)
    for (long n = 0; n < N; n += 16) {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); // statements, not expressions
      for (long k = 0; k < K; k += 64) {
        for (int r = 0; r < 16; r++) {
          long e = (n + r) * K + k;
          __m256i halves = (__m256i)_mm512_cvtneps_pbh(V(mul_ps)(values, all_of(scale(w, n + r, e))));
          ints table = _mm512_broadcast_i64x4(halves);
          ints words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)address(CODES, w, e)));
          some[0][r] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, places), table);
          some[1][r] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, _mm512_add_epi16(places, eight)), table);
          if (k % 128 == 0) _mm_prefetch((const char *)address(CODES, w, e + 16 * K), _MM_HINT_T1);
        }
        TILES_READ_AND_WRITE;
        for (int i = 0; i < 2; i++) {
          const uint16_t *of = x + (k + 32 * i) * blocks * 16;
          _tile_loadd(4, some[i], 64);
          BLOCK(0, _tile_loadd(5, of, 64 * blocks); _tile_dpbf16ps(0, 4, 5))
          BLOCK(1, _tile_loadd(5, of + 32, 64 * blocks); _tile_dpbf16ps(1, 4, 5))
          BLOCK(2, _tile_loadd(5, of + 64, 64 * blocks); _tile_dpbf16ps(2, 4, 5))
          BLOCK(3, _tile_loadd(5, of + 96, 64 * blocks); _tile_dpbf16ps(3, 4, 5))
        }
      }
      BLOCK(0, _tile_stored(0, y + n * 16 * blocks, 64 * blocks))
      BLOCK(1, _tile_stored(1, y + n * 16 * blocks + 16, 64 * blocks))
      BLOCK(2, _tile_stored(2, y + n * 16 * blocks + 32, 64 * blocks))
      BLOCK(3, _tile_stored(3, y + n * 16 * blocks + 48, 64 * blocks))
    }
    _tile_release();
  }
}
#else
#define take_tiles()
#define _tile_release()
#endif
