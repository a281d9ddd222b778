// Weights in 4-bit codes on x86 CPUs: their products with few rows, and their values; nf4_matmul.py has the format.
// A register holds the table of 16 values: one permutation (on AVX2 two and a blend) looks up W codes, or 2 W in bf16.
#include <immintrin.h>
#include <stdint.h>

#ifdef __AVX512F__
#define W 16 // bytes at a time, each two weights
#define V(op) _mm512_##op
typedef __m512 floats;
typedef __m512i ints;
typedef struct { floats all; } table;
static inline table load_table(const float *p) { return (table){_mm512_loadu_ps(p)}; }
static inline floats look_up(table t, ints i) { return _mm512_permutexvar_ps(i, t.all); } // by the low four bits
static inline ints bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline ints both(ints a, ints b) { return _mm512_and_si512(a, b); }
static inline ints either(ints a, ints b) { return _mm512_or_si512(a, b); }
static inline ints bits(floats v) { return _mm512_castps_si512(v); }
static inline float sum(floats v) { return _mm512_reduce_add_ps(v); }
#else
#define W 8
#define V(op) _mm256_##op
typedef __m256 floats;
typedef __m256i ints;
typedef struct { floats low, high; } table;
static inline table load_table(const float *p) { return (table){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline floats look_up(table t, ints i) { // by the low three bits, and bit 3 shifted to where the sign is
  floats low = _mm256_permutevar8x32_ps(t.low, i), high = _mm256_permutevar8x32_ps(t.high, i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
static inline ints bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline ints both(ints a, ints b) { return _mm256_and_si256(a, b); }
static inline ints either(ints a, ints b) { return _mm256_or_si256(a, b); }
static inline ints bits(floats v) { return _mm256_castps_si256(v); }
static inline float sum(floats v) {
  float of[W], total = 0;
  _mm256_storeu_ps(of, v);
  for (int i = 0; i < W; i++) total += of[i];
  return total;
}
#endif

typedef struct {
  const uint8_t *codes;
  const void *absmax; // fp32, or bytes where there are nested [2, groups] and dynamic [256]
  const float *nested, *dynamic, *values;
  long groups;
  int shift; // log2 of the block size
} weight;

static inline floats scale(const weight *w, long e) {
  long block = e >> w->shift, group = block >> 8;
  if (!w->nested) return V(set1_ps)(((const float *)w->absmax)[block]);
  float factor = w->nested[group], offset = w->nested[w->groups + group];
  return V(set1_ps)(w->dynamic[((const uint8_t *)w->absmax)[block]] * factor + offset);
}

// M rows of x, even inputs [M, K / 2] and odd ones, with R outputs from n on.
static inline __attribute__((always_inline)) void tile(const int M, const int R, const float *even, const float *odd,
                                                       const weight *w, float *y, long n, long N, long K) {
  table t = load_table(w->values);
  long ahead = R * K * (131072 / (R * K) + 1); // whole groups of outputs: within one, others read there
  floats acc[4][4];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = V(setzero_ps)();
  for (long k = 0; k < K; k += 2 * W)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      long e = (n + r) * K + k;
      ints pairs = bytes(w->codes + e / 2);
      if (k % (8 * W) == 0) _mm_prefetch((const char *)w->codes + (e + ahead) / 2, _MM_HINT_T1);
      floats of = scale(w, e), first = look_up(t, V(srli_epi32)(pairs, 4)), second = look_up(t, pairs);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        floats x0 = V(loadu_ps)(even + (m * K + k) / 2), x1 = V(loadu_ps)(odd + (m * K + k) / 2);
        acc[r][m] = V(fmadd_ps)(V(fmadd_ps)(second, x1, V(mul_ps)(first, x0)), of, acc[r][m]);
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) y[m * N + n + r] = sum(acc[r][m]);
}

static inline __attribute__((always_inline)) void tiles(const int R, const float *x, const weight *w, float *y, long n,
                                                        long M, long N, long K) {
  for (long m = 0; m < M; m += 4, y += 4 * N) {
    const float *even = x + m * K / 2, *odd = even + M * K / 2;
    if (M - m >= 4) tile(4, R, even, odd, w, y, n, N, K);
    else if (M - m == 3) tile(3, R, even, odd, w, y, n, N, K);
    else if (M - m == 2) tile(2, R, even, odd, w, y, n, N, K);
    else tile(1, R, even, odd, w, y, n, N, K);
  }
}

// y [M, N] = x W^T; x is its even inputs [M, K / 2], then its odd ones; K in whole 32s.
void nf4_product(const float *x, weight w, float *y, long M, long N, long K, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long n = 0; n < N; n += 4) {
    if (N - n >= 4) tiles(4, x, &w, y, n, M, N, K);
    else for (long r = n; r < N; r++) tiles(1, x, &w, y, r, M, N, K);
  }
}

static inline ints rounded(floats v) { // to bf16 in the upper half: to the nearest, ties to even
  ints odd = both(V(srli_epi32)(bits(v), 16), V(set1_epi32)(1));
  return V(add_epi32)(bits(v), V(add_epi32)(odd, V(set1_epi32)(0x7fff)));
}

// The 2 W values from e on, in bf16.
static inline ints values(const weight *w, table t, long e) {
  ints pairs = bytes(w->codes + e / 2);
  floats of = scale(w, e);
  floats first = V(mul_ps)(look_up(t, V(srli_epi32)(pairs, 4)), of), second = V(mul_ps)(look_up(t, pairs), of);
  return either(V(srli_epi32)(rounded(first), 16), both(rounded(second), V(set1_epi32)((int)0xffff0000)));
}

// The values of `count` codes, in whole 32s, in bf16 or else fp32.
void nf4_values(weight w, void *out, long count, int bf16, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long at = 0; at < count; at += 2 * W) {
    table t = load_table(w.values);
    if (bf16) {
      ints two = values(&w, t, at);
      __builtin_memcpy((uint16_t *)out + at, &two, sizeof two);
    } else {
      ints pairs = bytes(w.codes + at / 2);
      floats of = scale(&w, at);
      float a[W], b[W], *to = (float *)out + at;
      V(storeu_ps)(a, V(mul_ps)(look_up(t, V(srli_epi32)(pairs, 4)), of));
      V(storeu_ps)(b, V(mul_ps)(look_up(t, pairs), of));
      for (int i = 0; i < W; i++) to[2 * i] = a[i], to[2 * i + 1] = b[i];
    }
  }
}

#if defined __AVX512F__ && __GNUC__ > 10
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FOR_BF16 __attribute__((target("avx512bw,avx512vl,avx512bf16")))
#define AHEAD 4096 // bytes of codes fetched before they are read (bench/LOG.md)

// 1: products in bf16. 2: tiles, if the system lets this process use them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
int cpu_can(void) {
  int bf16 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
  return bf16 + (bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 2 : 0);
}

FOR_BF16 static inline uint16_t half(float value) {
  return _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0);
}
static inline float whole(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

#define FOR_TILES __attribute__((target("amx-tile,amx-bf16,avx512bw,avx512vl,avx512bf16")))

FOR_TILES static void take_tiles(void) { // eight of 16 rows of 64 bytes, for this thread
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
FOR_TILES void nf4_tiles(const uint16_t *x, weight w, float *y, long blocks, long N, long K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    take_tiles();
    floats values = V(loadu_ps)(w.values);
    ints eight = V(set1_epi16)(8), places = _mm512_inserti64x4(V(setzero_si512)(), _mm256_set1_epi16(4), 1);
    ints some[2][16];
#pragma omp for schedule(static)
    for (long n = 0; n < N; n += 16) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (long k = 0; k < K; k += 64) {
        for (int r = 0; r < 16; r++) {
          long e = (n + r) * K + k;
          __m256i halves = (__m256i)_mm512_cvtneps_pbh(V(mul_ps)(values, scale(&w, e)));
          ints table = _mm512_broadcast_i64x4(halves);
          ints words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(w.codes + e / 2)));
          some[0][r] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, places), table);
          some[1][r] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, _mm512_add_epi16(places, eight)), table);
          if (k % 128 == 0) _mm_prefetch((const char *)w.codes + (e + 16 * K) / 2, _MM_HINT_T1);
        }
        __asm__ volatile("" ::: "memory"); // gcc does not know that _tile_loadd reads memory
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
int cpu_can(void) { return 0; }
#endif
