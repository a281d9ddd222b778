// Products of up to four rows with a weight in bf16 or in 4-bit codes, on x86 CPUs with AVX512_BF16: each weight is
// read once, and how fast it is read is all that counts.
#ifdef FOR_BF16
#include <omp.h>
#include <stdlib.h>

#define MOST 4 // rows

typedef struct {
  long N, K;
  const uint16_t *bias, *values; // values in bf16, or none: then `codes` holds them
  weight codes;
} matrix;

typedef struct { // of a thread
  uint16_t *half;    // [M, K] in bf16
  uint16_t *ordered; // the same as products with codes want it
  float *scales;     // of two outputs, where they are nested
} inputs;

// Scales of blocks `first` to `last`.
FOR_BF16 static void nested_scales(const weight *w, long first, long last, float *to) {
  for (long b = first, end; b <= last; b = end) {
    float factor = w->nested[b >> 8], offset = w->nested[w->groups + (b >> 8)];
    end = (b | 255) < last ? (b | 255) + 1 : last + 1;
    for (long i = b; i < end; i += 16) {
      __mmask16 there = end - i < 16 ? (1 << (end - i)) - 1 : 0xffff;
      ints at = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, (const uint8_t *)w->absmax + i));
      floats value = V(mul_ps)(_mm512_i32gather_ps(at, w->dynamic, 4), V(set1_ps)(factor));
      _mm512_mask_storeu_ps(to + i - first, there, V(add_ps)(value, V(set1_ps)(offset)));
    }
  }
}

static long scales_room(long K) { return 2 * (K / 32 + 2); }

typedef struct {
  ints table;  // the 16 values in bf16, twice
  ints spread; // of a group's scales to 16 lanes of 8 inputs each
} lookup;

FOR_BF16 static inline lookup lookup_for(const weight *w) {
  uint16_t values[32];
  int lanes[16];
  for (int i = 0; i < 32; i++) values[i] = half(w->values[i % 16]);
  for (int i = 0; i < 16; i++) lanes[i] = (8 * i) >> w->shift;
  return (lookup){_mm512_loadu_si512(values), _mm512_loadu_si512(lanes)};
}

// x [M, K] as `by_codes` wants it, K filled up with zeros to whole 128s. Of a word's codes the second comes first: its
// first byte begins with its high half.
FOR_BF16 static void in_order(const uint16_t *x, uint16_t *y, long M, long K) {
  long whole = K / 128 * 128, padded = (K + 127) / 128 * 128;
  for (long m = 0; m < M; m++, x += K, y += padded)
    for (long k = 0; k < padded; k += 128) {
      uint64_t four[32] = {0};
      __builtin_memcpy(four, x + k, k < whole ? 256 : (K - whole) * 2);
      for (int j = 0; j < 32; j++) {
        y[k + j] = four[j] >> 16;
        y[k + 32 + j] = four[j];
        y[k + 64 + j] = four[j] >> 48;
        y[k + 96 + j] = four[j] >> 32;
      }
    }
}

// Outputs n and, with R = 2, n + apart of M rows: y [R, M]. By groups of 128 inputs: a 16-bit word holds four codes, in
// four places; shifted there, its low bits look up 32 of them at once, and x has the inputs in the same order.
FOR_BF16 INLINE void by_codes(const int M, const int R, const inputs *in, const weight *w, const lookup *t, long n,
                              long apart, long K, float *y) {
  const __m512i *x = (const __m512i *)in->ordered;
  const uint8_t *codes[2];
  const float *scales[2]; // of block 0 of the weight, if that had a place there
  long from[2], next = (K + 127) / 128 * 4;
  floats sums[2][MOST];
  for (int r = 0; r < R; r++) {
    from[r] = (n + r * apart) * K, codes[r] = w->codes + from[r] / 2, scales[r] = w->absmax;
    if (w->nested) {
      long first = from[r] >> w->shift, last = (from[r] + K - 1) >> w->shift;
      float *room = in->scales + r * (K / 32 + 2);
      nested_scales(w, first, last, room);
      scales[r] = room - first;
    }
    for (int m = 0; m < M; m++) sums[r][m] = V(setzero_ps)();
  }
  __mmask8 all = w->shift < 7 ? (1 << (128 >> w->shift)) - 1 : 1;
  for (long k = 0; k < K; k += 128)
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      const float *of = scales[r] + ((from[r] + k) >> w->shift);
      ints words;
      floats some, dot[MOST];
      if (K - k >= 128) {
        words = _mm512_loadu_si512(codes[r] + k / 2);
        some = _mm512_castps128_ps512(_mm_maskz_loadu_ps(all, of));
      } else {
        words = _mm512_maskz_loadu_epi8((1ull << (K - k) / 2) - 1, codes[r] + k / 2);
        some = _mm512_castps128_ps512(_mm_maskz_loadu_ps((1 << (((K - k - 1) >> w->shift) + 1)) - 1, of));
      }
      _mm_prefetch((const char *)codes[r] + k / 2 + AHEAD, _MM_HINT_T0);
      for (int m = 0; m < M; m++) dot[m] = V(setzero_ps)();
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m512bh found = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), t->table);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) dot[m] = _mm512_dpbf16_ps(dot[m], found, (__m512bh)x[m * next + k / 32 + i]);
      }
      some = _mm512_permutexvar_ps(t->spread, some);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[r][m] = V(fmadd_ps)(dot[m], some, sums[r][m]);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) y[r * M + m] = sum(sums[r][m]);
}

// The same for a weight in bf16.
FOR_BF16 INLINE void by_values(const int M, const int R, const inputs *in, const uint16_t *w, long apart, long K,
                               float *y) {
  floats sums[2][MOST][2];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m][0] = sums[r][m][1] = V(setzero_ps)();
  for (long k = 0; k < K; k += 64)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      if (k + 32 * i == K) break;
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) {
        const uint16_t *at = w + r * apart * K + k + 32 * i;
        __m512bh some = (__m512bh)_mm512_loadu_si512(at);
        _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          __m512bh of = (__m512bh)_mm512_loadu_si512(in->half + m * K + k + 32 * i);
          sums[r][m][i] = _mm512_dpbf16_ps(sums[r][m][i], some, of);
        }
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) y[r * M + m] = sum(V(add_ps)(sums[r][m][0], sums[r][m][1]));
}

FOR_BF16 INLINE void outputs(const int M, const matrix *w, const inputs *in, long from, long to, float *y, long step,
                             int add) {
  long K = w->K, apart = (to - from) / 2;
  lookup t = w->values ? (lookup){} : lookup_for(&w->codes);
  for (long n = from; n < to - apart; n++) { // two halves side by side; of an odd number one is left
    float sums[2 * MOST];
    int both = n < from + apart;
    if (w->values && both) by_values(M, 2, in, w->values + n * K, apart, K, sums);
    else if (w->values) by_values(M, 1, in, w->values + (n + apart) * K, apart, K, sums);
    else if (both) by_codes(M, 2, in, &w->codes, &t, n, apart, K, sums);
    else by_codes(M, 1, in, &w->codes, &t, n + apart, apart, K, sums);
    for (long r = 0; r < 1 + both; r++)
      for (int m = 0; m < M; m++) {
        long at = both ? n + r * apart : n + apart;
        float value = sums[r * M + m] + (w->bias ? whole(w->bias[at]) : 0);
        y[m * step + at] = add ? y[m * step + at] + value : value;
      }
  }
}

// Outputs `from` to `to` of M rows: y [M, step] is set to them, or has them added. Two outputs at a time, far apart,
// are read faster than one or two neighbours (bench/LOG.md).
FOR_BF16 static void product(long M, const matrix *w, const inputs *in, long from, long to, float *y, long step,
                             int add) {
  if (!w->values) in_order(in->half, in->ordered, M, w->K);
  if (M == 1) outputs(1, w, in, from, to, y, step, add);
  else if (M == 2) outputs(2, w, in, from, to, y, step, add);
  else if (M == 3) outputs(3, w, in, from, to, y, step, add);
  else outputs(4, w, in, from, to, y, step, add);
}

// y [M, N] = x [M, K] W^T + bias in bf16; K in whole 32s, with codes in whole blocks or 128s too.
FOR_BF16 void few_rows(const uint16_t *x, const matrix *w, uint16_t *y, long M, int threads) {
  long N = w->N, K = w->K, size = M * ((K + 127) / 128 * 128) * 2;
  float *sums = malloc(M * N * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    long t = omp_get_thread_num(), of = omp_get_num_threads(), from = N * t / of, to = N * (t + 1) / of;
    char *memory = aligned_alloc(64, (size + scales_room(K) * 4 + 63) / 64 * 64);
    inputs in = {.half = (uint16_t *)x, .ordered = (uint16_t *)memory, .scales = (float *)(memory + size)};
    product(M, w, &in, from, to, sums, N, 0);
    for (long m = 0; m < M; m++)
      for (long n = from; n < to; n++) y[m * N + n] = half(sums[m * N + n]);
    free(memory);
  }
  free(sums);
}
#endif
