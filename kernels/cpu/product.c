// Products of a few rows: each weight is read once, and how fast it is read is all that counts.

#ifdef __AVX512F__
#define MOST 8 // rows that share what is read in registers
#else
#define MOST 4
#endif
#define SPAN 32 // inputs that are rounded to bytes together

typedef struct { // of a thread
  uint16_t *half; // [M, K] in bf16
  char *prepared; // the same as a product wants it, rows `next` bytes apart
  float *scales;  // of two outputs, where they are nested
  long next;
} inputs;

static long scales_room(long K) { return 2 * (K / 32 + 2); }
// Bytes of a prepared row at most, and some, so that rows do not share the cache's sets.
static long prepared_room(long K) { return up_to(K, 128) * 4 + 3 * 64; }
static long padded(long M) { // rows that are computed: groups of MOST, and 1, 2, 4 or MOST
  long rest = M % MOST;
  return M - rest + (rest > 4 ? MOST : rest == 3 ? 4 : rest);
}

// A group of a row of bytes: G registers of inputs, of codes first the even ones; W factors, one for each 4 G inputs;
// what OFFSET has added in sums of those.
#define GROUP(G) (((G) + 2) * SIZE)

// x [n] as bytes of their largest magnitude; returns what a byte is worth, which is no number if one of x is none.
INLINE float round_span(const float *x, int8_t *to, const int n) {
  floats most = V(setzero_ps)(), none = V(setzero_ps)();
  for (int i = 0; i < n; i += W) {
    floats of = V(loadu_ps)(x + i);
    most = V(max_ps)(most, V(max_ps)(of, V(sub_ps)(V(setzero_ps)(), of)));
    none = V(fmadd_ps)(of, V(setzero_ps)(), none);
  }
  float top = largest(most), inverse = top > 1e-30f ? 127 / top : 0;
  for (int i = 0; i < n; i++) {
    float shifted = x[i] * inverse + 12582912.f; // 1.5 * 2^23: the integer is in its low bits
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    to[i] = bits;
  }
  return top / 127 + sum(none);
}

// G * SIZE inputs by SPANs.
static void round_group(const int G, const float *x, int8_t *to) {
  int8_t plain[2 * SIZE];
  float *factors = (float *)(to + G * SIZE);
  for (int s = 0; s < G * SIZE; s += SPAN) {
    float factor = round_span(x + s, plain + s, SPAN);
    for (int i = 0; i < SPAN / (4 * G); i++) factors[s / (4 * G) + i] = factor;
  }
  if (G == 1) memcpy(to, plain, SIZE);
  else
    for (int i = 0; i < SIZE; i++) to[i] = plain[2 * i], to[SIZE + i] = plain[2 * i + 1];
  ints offset = BITS(setzero)(), each = V(set1_epi8)((char)OFFSET);
  for (int i = 0; i < G && OFFSET; i++)
    offset = V(sub_epi32)(offset, dot_bytes(BITS(setzero)(), each, load(to + i * SIZE)));
  store(to + (G + 1) * SIZE, offset);
}

static void round_row(const int G, const uint16_t *x, int8_t *to, long K) {
  for (long k = 0; k < K; k += G * SIZE, to += GROUP(G)) {
    float some[2 * SIZE] = {0};
    for (long i = k; i < K && i < k + G * SIZE; i += W) V(storeu_ps)(some + i - k, load_bf16(x + i));
    round_group(G, some, to);
  }
}

typedef struct {
  ints table;   // the 16 values: of ROUNDED as bytes, of CODES in bf16, twice
  ints spread;  // of a group's scales to the lanes of 8 inputs each
  __m128i mask; // of that many scales
} lookup;

static lookup lookup_for(const matrix *w) {
  int lanes[W], mask[4];
  uint16_t values[SIZE / 2] = {0};
  if (w->kind < CODES) return (lookup){0};
  for (int i = 0; i < W; i++) lanes[i] = (8 * i) >> w->codes.shift;
  for (int i = 0; i < 4; i++) mask[i] = -(i <= lanes[W - 1]);
  for (int i = 0; i < SIZE / 2; i++) values[i] = half(w->codes.values[i % 16]);
  return (lookup){w->kind == ROUNDED ? rounded_table(w) : load(values), load(lanes), _mm_loadu_si128((__m128i *)mask)};
}

// Outputs n and n + apart of M rows as bytes: y [2, M].
INLINE void by_bytes(const int M, const int rounded, const matrix *w, const inputs *in, const lookup *t, long n,
                     long apart, float *y) {
  const int G = 1 + rounded, shift = w->codes.shift;
  long K = w->K;
  const uint8_t *at[2], *base = rounded ? w->codes.codes : w->values;
  const float *scales[2];
  floats sums[2][MOST];
  EACH(r, 2) {
    long from = (n + r * apart) * K, first = from >> shift;
    at[r] = base + (rounded ? from / 2 : from);
    float *room = in->scales + r * (K / 32 + 2);
    if (rounded) scales[r] = scales_of(&w->codes, first, (from + K - 1) >> shift, room) - first;
    EACH(m, M) sums[r][m] = V(setzero_ps)();
  }
  const int8_t *x = (int8_t *)in->prepared;
  for (long k = 0; k < K; k += G * SIZE, x += GROUP(G))
    EACH(r, 2) {
      const uint8_t *codes = at[r] + k / G;
      const float *some = rounded ? scales[r] + (((n + r * apart) * K + k) >> shift) : 0;
      uint8_t rest[SIZE];
      float few[4] = {0};
      if (K - k < G * SIZE) { // a row's end, and maybe the memory's
        memset(rest, 0, SIZE);
        memcpy(rest, codes, (K - k) / G);
        for (long i = 0; rounded && i <= (K - k - 1) >> shift; i++) few[i] = some[i];
        codes = rest, some = few;
      } else _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
      two of;
      floats by;
      if (rounded) {
        of = rounded_codes(t->table, codes);
        by = pick(_mm_maskload_ps(some, t->mask), t->spread);
      } else of.even = signed_bytes(codes);
      EACH(m, M) {
        const int8_t *row = x + m * in->next;
        ints dot = dot_bytes(OFFSET ? load(row + (G + 1) * SIZE) : BITS(setzero)(), of.even, load(row));
        if (rounded) dot = dot_bytes(dot, of.odd, load(row + SIZE));
        floats factor = V(loadu_ps)((const float *)(row + G * SIZE));
        if (rounded) factor = V(mul_ps)(factor, by);
        sums[r][m] = V(fmadd_ps)(V(cvtepi32_ps)(dot), factor, sums[r][m]);
      }
    }
  EACH(r, 2)
    EACH(m, M) y[r * M + m] = sum(sums[r][m]) * (rounded ? 1 : w->scales[n + r * apart]) / 127;
}

// The same in fp32, of inputs that have the even ones of each 2 W first.
INLINE void by_pairs(const int M, const enum kind kind, const matrix *w, const inputs *in, long n, long apart,
                     float *y) {
  long K = w->K, next = in->next / 4;
  const float *x = (float *)in->prepared;
  table t = table_of(w);
  floats sums[2][MOST];
  EACH(r, 2)
    EACH(m, M) sums[r][m] = V(setzero_ps)();
  for (long k = 0; k < K; k += 2 * W)
    EACH(r, 2) {
      long e = (n + r * apart) * K + k;
      pair of = values_at(kind, w, t, e);
      floats by = kind == CODES ? all_of(scale(&w->codes, e)) : all_of(1);
      if (kind == HALVES) _mm_prefetch((const char *)w->values + 2 * e + AHEAD, _MM_HINT_T0);
      if (kind == CODES) _mm_prefetch((const char *)w->codes.codes + e / 2 + AHEAD, _MM_HINT_T0);
      EACH(m, M) {
        floats x0 = V(loadu_ps)(x + m * next + k), x1 = V(loadu_ps)(x + m * next + k + W);
        if (kind == CODES) sums[r][m] = V(fmadd_ps)(V(fmadd_ps)(of.odd, x1, V(mul_ps)(of.even, x0)), by, sums[r][m]);
        else sums[r][m] = V(fmadd_ps)(of.odd, x1, V(fmadd_ps)(of.even, x0, sums[r][m]));
      }
    }
  EACH(r, 2)
    EACH(m, M) y[r * M + m] = sum(sums[r][m]) * (kind == BYTES ? w->scales[n + r * apart] / 127 : 1);
}

#ifdef __AVX512BF16__
// A row as `by_codes` wants it, filled up with zeros to whole 128s. Of a word's codes the second comes first: its first
// byte begins with its high half.
static void in_order(const uint16_t *x, uint16_t *y, long K) {
  for (long k = 0; k < K; k += 128) {
    uint64_t four[32] = {0};
    memcpy(four, x + k, K - k < 128 ? (K - k) * 2 : 256);
    for (int j = 0; j < 32; j++) {
      y[k + j] = four[j] >> 16;
      y[k + 32 + j] = four[j];
      y[k + 64 + j] = four[j] >> 48;
      y[k + 96 + j] = four[j] >> 32;
    }
  }
}

// Outputs n and n + apart of M rows: y [2, M]. By groups of 128 inputs: a 16-bit word holds four codes, in four
// places; shifted there, its low bits look up 32 of them at once, and x has the inputs in the same order.
INLINE void by_codes(const int M, const matrix *of, const inputs *in, const lookup *t, long n, long apart,
                     float *y) {
  const weight *w = &of->codes;
  const uint16_t *x = (uint16_t *)in->prepared;
  const uint8_t *codes[2];
  const float *scales[2]; // of block 0 of the weight, if that had a place there
  long K = of->K, from[2], next = in->next / 2;
  floats sums[2][MOST];
  EACH(r, 2) {
    from[r] = (n + r * apart) * K, codes[r] = w->codes + from[r] / 2;
    long first = from[r] >> w->shift, last = (from[r] + K - 1) >> w->shift;
    scales[r] = scales_of(w, first, last, in->scales + r * (K / 32 + 2)) - first;
    EACH(m, M) sums[r][m] = V(setzero_ps)();
  }
  __mmask8 all = w->shift < 7 ? (1 << (128 >> w->shift)) - 1 : 1;
  for (long k = 0; k < K; k += 128)
    EACH(r, 2) {
      const float *at = scales[r] + ((from[r] + k) >> w->shift);
      ints words;
      floats some, dots[MOST];
      if (K - k >= 128) {
        words = load(codes[r] + k / 2);
        some = _mm512_castps128_ps512(_mm_maskz_loadu_ps(all, at));
      } else {
        words = _mm512_maskz_loadu_epi8((1ull << (K - k) / 2) - 1, codes[r] + k / 2);
        some = _mm512_castps128_ps512(_mm_maskz_loadu_ps((1 << (((K - k - 1) >> w->shift) + 1)) - 1, at));
      }
      _mm_prefetch((const char *)codes[r] + k / 2 + AHEAD, _MM_HINT_T0);
      EACH(m, M) dots[m] = V(setzero_ps)();
      EACH(i, 4) {
        __m512bh found = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), t->table);
        EACH(m, M) dots[m] = _mm512_dpbf16_ps(dots[m], found, (__m512bh)load(x + m * next + k + 32 * i));
      }
      some = _mm512_permutexvar_ps(t->spread, some);
      EACH(m, M) sums[r][m] = V(fmadd_ps)(dots[m], some, sums[r][m]);
    }
  EACH(r, 2)
    EACH(m, M) y[r * M + m] = sum(sums[r][m]);
}

// The same for a weight in bf16; up to four rows have two sums, as they have to wait for each otherwise.
INLINE void by_halves(const int M, const matrix *of, const inputs *in, long n, long apart, float *y) {
  const uint16_t *w = (const uint16_t *)of->values + n * of->K;
  const number *x = (number *)in->prepared;
  const int chains = M > 4 ? 1 : 2;
  long K = of->K, next = in->next / 2;
  floats sums[2][MOST][2];
  EACH(r, 2)
    EACH(m, M) sums[r][m][0] = sums[r][m][1] = V(setzero_ps)();
  for (long k = 0; k < K; k += 64)
    EACH(i, 2) {
      if (k + 32 * i == K) break;
      EACH(r, 2) {
        const uint16_t *at = w + r * apart * K + k + 32 * i;
        _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
        EACH(m, M) sums[r][m][i % chains] = dot(sums[r][m][i % chains], at, x + m * next + k + 32 * i);
      }
    }
  EACH(r, 2)
    EACH(m, M) y[r * M + m] = sum(V(add_ps)(sums[r][m][0], sums[r][m][1]));
}
#endif

// What products with `w` want of M rows: in bf16, or of x in fp32, for products in fp32.
static void prepare(const matrix *w, inputs *in, const float *x, long M) {
  long K = w->K;
  in->next = prepared_room(K);
  memset(in->prepared + M * in->next, 0, (padded(M) - M) * in->next);
  for (long m = 0; m < M; m++) {
    void *to = in->prepared + m * in->next;
    const uint16_t *row = x ? 0 : in->half + m * K;
    if (x)
      for (long i = 0; i < K; i++) ((float *)to)[i / (2 * W) * 2 * W + i % 2 * W + i % (2 * W) / 2] = x[m * K + i];
    else if (w->kind == ROUNDED) round_row(2, row, to, K);
    else if (w->kind == BYTES) round_row(1, row, to, K);
#ifdef __AVX512BF16__
    else if (w->kind == CODES) in_order(row, to, K);
#endif
    else prepare_numbers(row, to, K);
  }
}

// M rows by outputs n and n + apart: y [2, M].
INLINE void two_outputs(const int M, int exact, const matrix *w, const inputs *in, const lookup *t, long n, long apart,
                        float *y) {
  if (!exact && w->kind == ROUNDED) by_bytes(M, 1, w, in, t, n, apart, y);
  else if (!exact && w->kind == BYTES) by_bytes(M, 0, w, in, t, n, apart, y);
#ifdef __AVX512BF16__
  else if (!exact && w->kind == CODES) by_codes(M, w, in, t, n, apart, y);
  else if (w->kind == HALVES) by_halves(M, w, in, n, apart, y);
#else
  else if (w->kind == HALVES) by_pairs(M, HALVES, w, in, n, apart, y);
#endif
  else if (w->kind == BYTES) by_pairs(M, BYTES, w, in, n, apart, y);
  else by_pairs(M, CODES, w, in, n, apart, y);
}

// Outputs `from` to `to` of M prepared rows: y [M, step] is set to them, or has them added. `exact`: prepared in fp32.
// Two outputs at a time, far apart, are read faster than one or two neighbours (bench/LOG.md).
static void product(long M, const matrix *w, const inputs *in, int exact, long from, long to, float *y, long step,
                    int add) {
  long apart = (to - from) / 2;
  lookup t = lookup_for(w);
  for (long n = from; n < to - apart; n++) {
    int both = n < from + apart; // of an odd number one is left
    long first = both ? n : n + apart, second = both ? n + apart : first;
    for (long at = 0, some; at < M; at += some) {
      inputs rows = {0, in->prepared + at * in->next, in->scales, in->next};
      float sums[2 * MOST];
      some = M - at < MOST ? M - at : MOST;
      int as = padded(some);
      if (as == 1) two_outputs(1, exact, w, &rows, &t, first, second - first, sums);
      else if (as == 2) two_outputs(2, exact, w, &rows, &t, first, second - first, sums);
      else if (as == 4) two_outputs(4, exact, w, &rows, &t, first, second - first, sums);
      else two_outputs(MOST, exact, w, &rows, &t, first, second - first, sums);
      for (long r = 0; r < 1 + both; r++)
        for (long m = 0; m < some; m++) {
          long n = r ? second : first;
          float value = sums[r * as + m] + (w->bias ? whole(w->bias[n]) : 0), *of = y + (at + m) * step + n;
          *of = add ? *of + value : value;
        }
    }
  }
}

// y [M, N] = x [M, K] W^T + bias in bf16, or all in fp32, the bias apart; K in whole 32s, of codes in bf16 or as bytes
// also in whole blocks or 128s.
void few_rows(const void *x, const matrix *w, void *y, long M, int fp32, int threads) {
  long N = w->N, K = w->K, size = padded(M) * prepared_room(K);
  float *sums = fp32 ? y : malloc(M * N * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    long t = omp_get_thread_num(), of = omp_get_num_threads(), from = N * t / of, to = N * (t + 1) / of;
    char *memory = aligned_alloc(64, up_to(size + scales_room(K) * 4, 64));
    inputs in = {fp32 ? 0 : (uint16_t *)x, memory, (float *)(memory + size), 0};
    prepare(w, &in, fp32 ? x : 0, M);
    product(M, w, &in, fp32, from, to, sums, N, 0);
    for (long m = 0; m < M && !fp32; m++) store_all((uint16_t *)y + m * N + from, sums + m * N + from, to - from);
    free(memory);
  }
  if (!fp32) free(sums);
}
