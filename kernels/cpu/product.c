// Products of a few rows: each weight is read once, and how fast it is read is all that counts.

#ifdef __AVX512F__
#define MOST 8 // rows that share what is read in registers
#else
#define MOST 4
#endif
#define SPAN 32 // inputs that are rounded to bytes together

// What inputs are prepared as: fp32, of each 2 W the even ones first; bf16; bytes.
enum form { FLOATS, WORDS, SPANS };

typedef struct { // of a thread
  uint16_t *half; // [M, K] in bf16
  char *prepared; // the same in a form, rows `next` bytes apart
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

static enum form form_of(const matrix *w, int fp32) {
  if (!fp32 && (w->kind == BYTES || w->kind == ROUNDED)) return SPANS;
  return sizeof(number) == 2 && !fp32 && w->kind == HALVES ? WORDS : FLOATS;
}

// x [n] as bytes of their largest magnitude, with `apart` the odd ones so far behind the even ones; returns what a byte
// is worth, which is no number if one of x is none.
INLINE float round_span(const float *x, int8_t *to, const int n, const int apart) {
  int8_t plain[64];
  float top = magnitude(x, n), inverse = top > 1e-30f ? 127 / top : 0;
  for (int i = 0; i < n; i++) {
    float shifted = x[i] * inverse + 12582912.f; // 1.5 * 2^23: the integer is in its low bits
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    plain[i] = bits;
  }
  for (int i = 0; i < n / 2 && apart; i++) to[i] = plain[2 * i], to[apart + i] = plain[2 * i + 1];
  if (!apart) memcpy(to, plain, n);
  return top / 127;
}

// A group of a row of bytes: two registers of inputs, the even ones and the odd ones of what are codes and else one
// behind the other; W factors, one for each 8 inputs, that of 4 lanes for a SPAN; what OFFSET has added in sums of those.
#define GROUP (4 * SIZE)

static void round_row(int codes, const uint16_t *x, int8_t *to, long K) {
  for (long k = 0; k < K; k += 2 * SIZE, to += GROUP) {
    float some[2 * SIZE] = {0}, span[SPAN], *factors = (float *)(to + 2 * SIZE);
    load_all(some, x + k, K - k < 2 * SIZE ? K - k : 2 * SIZE);
    for (int s = 0; s < SIZE; s += SPAN / 2) {
      for (int i = 0; i < SPAN; i++) span[i] = some[codes ? 2 * s + i : s + i / 2 + i % 2 * SIZE];
      float factor = round_span(span, to + s, SPAN, SIZE);
      for (int i = 0; i < SPAN / 8; i++) factors[s / 4 + i] = factor;
    }
    store(to + 3 * SIZE, offset_of(to, 2, SIZE));
  }
}

// What products with `w` want of M rows: in bf16, or of x in fp32, for products in fp32.
static void prepare(const matrix *w, inputs *in, const float *x, long M) {
  long K = w->K;
  enum form form = form_of(w, x != 0);
  in->next = prepared_room(K);
  memset(in->prepared + M * in->next, 0, (padded(M) - M) * in->next);
  for (long m = 0; m < M; m++) {
    void *to = in->prepared + m * in->next;
    const uint16_t *row = x ? 0 : in->half + m * K;
    if (x)
      for (long i = 0; i < K; i++) ((float *)to)[i / (2 * W) * 2 * W + i % 2 * W + i % (2 * W) / 2] = x[m * K + i];
    else if (form == SPANS) round_row(w->kind == ROUNDED, row, to, K);
    else if (form == FLOATS) evens_first(row, to, K);
    else memcpy(to, row, K * 2), memset((uint16_t *)to + K, 0, 64);
  }
}

typedef struct {
  table floats; // the 16 values
  ints bytes;   // the same, twice
  ints spread;  // of a group's scales to the lanes of 8 inputs each
  __m128i mask; // of that many scales
} lookup;

static lookup lookup_for(const matrix *w) {
  int lanes[W], mask[4];
  if (w->kind < CODES) return (lookup){0};
  for (int i = 0; i < W; i++) lanes[i] = (8 * i) >> w->shift;
  for (int i = 0; i < 4; i++) mask[i] = -(i <= lanes[W - 1]);
  return (lookup){table_of(w), rounded_table(w), load(lanes), _mm_loadu_si128((__m128i *)mask)};
}

// ---- what a step of inputs adds to sums [M, 2] of an output, whose weights and scales for it are at `at` and `by` ----

#define ADDS const int M, const enum kind kind, const lookup *t, const uint8_t *at, const float *by, const char *x, \
             long next, floats (*sums)[2]
#define CHAINS (M > MOST / 2 ? 1 : 2) // sums of a few rows, as they have to wait for each otherwise

INLINE void add_floats(ADDS) { // 2 W inputs
  pair of = values_at(kind, t->floats, at);
  EACH(m, M) {
    floats x0 = V(loadu_ps)((float *)(x + m * next)), x1 = V(loadu_ps)((float *)(x + m * next) + W), *sum = sums[m];
    if (kind < CODES) {
      sum[0] = V(fmadd_ps)(of.even, x0, sum[0]);
      sum[CHAINS - 1] = V(fmadd_ps)(of.odd, x1, sum[CHAINS - 1]);
    } else sum[0] = V(fmadd_ps)(V(fmadd_ps)(of.odd, x1, V(mul_ps)(of.even, x0)), all_of(*by), sum[0]);
  }
}

INLINE void add_bytes(ADDS) { // a GROUP
  two of;
  floats all = V(setzero_ps)();
  if (kind == ROUNDED) of = rounded_codes(t->bytes, at), all = pick(_mm_maskload_ps(by, t->mask), t->spread);
  else of = (two){signed_bytes(at), signed_bytes(at + SIZE)};
  EACH(m, M) {
    const char *row = x + m * next;
    ints dot = dot_bytes(OFFSET ? load(row + 3 * SIZE) : BITS(setzero)(), of.even, load(row));
    dot = dot_bytes(dot, of.odd, load(row + SIZE));
    floats factor = V(loadu_ps)((const float *)(row + 2 * SIZE));
    if (kind == ROUNDED) factor = V(mul_ps)(factor, all);
    sums[m][0] = V(fmadd_ps)(V(cvtepi32_ps)(dot), factor, sums[m][0]);
  }
}

#ifdef __AVX512BF16__
INLINE void add_words(ADDS) { // 64 inputs in bf16
  EACH(i, 2)
    EACH(m, M)
      sums[m][i % CHAINS] = dot(sums[m][i % CHAINS], (uint16_t *)at + 32 * i, (number *)(x + m * next) + 32 * i);
}
#else
#define add_words add_floats
#endif

// Outputs n and n + apart of M rows: y [2, M].
INLINE void two_outputs(const int M, const enum kind kind, const enum form form, const matrix *w, const inputs *in,
                        const lookup *t, long n, long apart, float *y) {
  const int step = form == FLOATS ? 2 * W : form == WORDS ? 64 : 2 * SIZE;
  const int wide = form == SPANS ? GROUP : step * (form == WORDS ? 2 : 4); // bytes of a step's inputs
  long K = w->K, shift = w->shift, at[2] = {n * K, (n + apart) * K};
  const float *scales[2] = {0};
  floats sums[2][MOST][2];
  EACH(r, 2) {
    if (kind >= CODES) scales[r] = scales_of(w, n + r * apart, in->scales + r * (K / 32 + 2));
    EACH(m, M) sums[r][m][0] = sums[r][m][1] = V(setzero_ps)();
  }
  const char *x = in->prepared;
  for (long k = 0; k < K; k += step, x += wide)
    EACH(r, 2) {
      const uint8_t *some = address(kind, w, at[r] + k);
      const float *by = kind < CODES ? 0 : scales[r] + ((at[r] + k) >> shift);
      uint8_t rest[128];
      float few[4] = {0};
      if (form != FLOATS && K - k < step) { // a row's end, and maybe the memory's
        memset(rest, 0, sizeof rest);
        memcpy(rest, some, address(kind, w, K - k) - address(kind, w, 0));
        for (long i = 0; kind >= CODES && i <= (K - k - 1) >> shift; i++) few[i] = by[i];
        some = rest, by = few;
      } else
        for (int i = 0; i < address(kind, w, step) - address(kind, w, 0); i += 64)
          _mm_prefetch((const char *)some + i + AHEAD, _MM_HINT_T0);
      if (form == FLOATS) add_floats(M, kind, t, some, by, x, in->next, sums[r]);
      else if (form == WORDS) add_words(M, kind, t, some, by, x, in->next, sums[r]);
      else add_bytes(M, kind, t, some, by, x, in->next, sums[r]);
    }
  EACH(r, 2)
    EACH(m, M) {
      float by = kind == BYTES ? scale(w, n + r * apart, 0) : form == SPANS ? 1.f / 127 : 1;
      y[r * M + m] = sum(V(add_ps)(sums[r][m][0], sums[r][m][1])) * by;
    }
}

// The same for whatever the weight is.
INLINE void two_of(const int M, int fp32, const matrix *w, const inputs *in, const lookup *t, long n, long apart,
                   float *y) {
#define AS(kind, form) two_outputs(M, kind, form, w, in, t, n, apart, y)
  enum form form = form_of(w, fp32);
  if (form == SPANS) w->kind == ROUNDED ? AS(ROUNDED, SPANS) : AS(BYTES, SPANS);
  else if (form == WORDS) AS(HALVES, WORDS);
  else if (w->kind == HALVES) AS(HALVES, FLOATS);
  else w->kind == BYTES ? AS(BYTES, FLOATS) : AS(CODES, FLOATS);
}

// Outputs `from` to `to` of M prepared rows: y [M, step] is set to them, or has them added. `fp32`: prepared so.
// Two outputs at a time, far apart, are read faster than one or two neighbours (bench/LOG.md).
static void product(long M, const matrix *w, const inputs *in, int fp32, long from, long to, float *y, long step,
                    int add) {
  long apart = (to - from) / 2;
  lookup t = lookup_for(w);
  for (long n = from; n < to - apart; n++) {
    int both = n < from + apart; // of an odd number one is left
    long first = both ? n : n + apart, far = both ? apart : 0;
    for (long at = 0, some; at < M; at += some) {
      inputs rows = {0, in->prepared + at * in->next, in->scales, in->next};
      float sums[2 * MOST];
      some = M - at < MOST ? M - at : MOST;
      int as = padded(some);
      if (as == 1) two_of(1, fp32, w, &rows, &t, first, far, sums);
      else if (as == 2) two_of(2, fp32, w, &rows, &t, first, far, sums);
      else if (as == 4) two_of(4, fp32, w, &rows, &t, first, far, sums);
      else two_of(MOST, fp32, w, &rows, &t, first, far, sums);
      for (long r = 0; r < 1 + both; r++)
        for (long m = 0; m < some; m++) {
          long n = first + r * far;
          float value = sums[r * as + m] + (w->bias ? whole(w->bias[n]) : 0), *of = y + (at + m) * step + n;
          *of = add ? *of + value : value;
        }
    }
  }
}

// y [M, N] = x [M, K] W^T + bias in bf16, or all in fp32, the bias apart; K in whole 32s, of codes as bytes also in
// whole blocks or 128s.
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
