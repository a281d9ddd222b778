// Products of up to four rows: how fast weights are read is all that counts.

// Floats that a product needs for itself.
static long scales_room(long K, long M) { return M > MOST ? ROOM(16 > W ? 16 : W) : 2 * (K / 32 + 2); }

// What products with `w` want of M rows: in bf16, or of x in fp32, for products in fp32.
static void prepare(const matrix *w, inputs *in, const float *x, long M) {
  long K = w->K;
  enum form form = form_of(w, x != 0);
  if (M > MOST) return prepare_lanes(w, in, x, M);
  in->next = prepared_room(K);
  memset(in->prepared + M * in->next, 0, (padded(M) - M) * in->next);
  for (long m = 0; m < M; m++) {
    void *to = in->prepared + m * in->next;
    const uint16_t *row = x ? 0 : in->half + m * K;
    if (x) even_floats(x + m * K, to, K);
    else if (form == SPANS) round_row(w->kind == ROUNDED, row, to, K);
    else if (form == FLOATS) evens_first(row, to, K);
    else memcpy(to, row, K * 2), memset((uint16_t *)to + K, 0, 64);
  }
}

typedef struct { table floats; ints bytes; } lookup; // of the 16 values

// ---- what a step of inputs adds to sums [M, 2] of an output, whose weights and scales for it are at `at` and `by` --

#define ADDS const int M, const enum kind kind, const lookup *t, const uint8_t *at, const float *by, long shift, \
             const char *x, long next, floats (*sums)[2]

INLINE void add_floats(ADDS) { // 2 W inputs
  pair of = values_at(kind, t->floats, at);
  if (kind >= CODES) of = (pair){V(mul_ps)(of.even, all_of(*by)), V(mul_ps)(of.odd, all_of(*by))};
  EACH(m, M) {
    floats x0 = V(loadu_ps)((float *)(x + m * next)), x1 = V(loadu_ps)((float *)(x + m * next) + W), *sum = sums[m];
    sum[0] = V(fmadd_ps)(of.even, x0, sum[0]);
    sum[1] = V(fmadd_ps)(of.odd, x1, sum[1]);
  }
}

INLINE void add_bytes(ADDS) { // a GROUP
  two of;
  floats all = V(setzero_ps)();
  if (kind == ROUNDED) of = rounded_codes(t->bytes, at), all = half_each(*by, by[SPAN >> shift]);
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

INLINE void add_words(ADDS) { // 64 inputs in bf16
  EACH(i, 2)
    EACH(m, M)
      sums[m][i] = (floats)dot_words((ints)sums[m][i], load(at + 64 * i), load(x + m * next + 64 * i));
}

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
#define BY(r) kind < CODES ? 0 : scales[r] + ((at[r] + k) >> shift)
#define ADD(some, by) \
  if (form == FLOATS) add_floats(M, kind, t, some, by, shift, x, in->next, sums[r]); \
  else if (form == WORDS) add_words(M, kind, t, some, by, shift, x, in->next, sums[r]); \
  else add_bytes(M, kind, t, some, by, shift, x, in->next, sums[r]);
  long k = 0, bytes = address(kind, w, step) - address(kind, w, 0);
  for (; k + step <= K; k += step, x += wide)
    EACH(r, 2) {
      const uint8_t *some = address(kind, w, at[r] + k);
      for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)some + i + AHEAD, _MM_HINT_T0);
      ADD(some, BY(r))
    }
  EACH(r, 2)
    if (k < K) { // a row's end, and maybe the memory's
      uint8_t rest[128] = {0};
      float few[2] = {kind < CODES ? 0 : *(BY(r))};
      memcpy(rest, address(kind, w, at[r] + k), address(kind, w, K - k) - address(kind, w, 0));
      ADD(rest, few)
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

// A function each: side by side in one, gcc keeps their sums in memory.
#define FOR_ROWS(M) \
  __attribute__((noinline)) static void two_of_##M(int fp32, const matrix *w, const inputs *in, const lookup *t, \
                                                   long n, long apart, float *y) { \
    two_of(M, fp32, w, in, t, n, apart, y); \
  }
FOR_ROWS(1) FOR_ROWS(2) FOR_ROWS(4)

// Outputs `from` to `to` of M prepared rows: y [M, step] is set to them, or has them added. `fp32`: prepared so.
// Two outputs at a time, far apart, are read faster than one or two neighbours (bench/LOG.md).
static void product(long M, const matrix *w, const inputs *in, int fp32, long from, long to, float *y, long step,
                    int add) {
  if (M > MOST) return product_in_lanes(M, w, in, fp32, from, to, y, step, add);
  long apart = (to - from) / 2, as = padded(M);
  lookup t = w->kind < CODES ? (lookup){0} : (lookup){table_of(w), rounded_table(w)};
  for (long n = from; n < to - apart; n++) {
    int both = n < from + apart; // of an odd number one is left
    long first = both ? n : n + apart, far = both ? apart : 0;
    float sums[2 * MOST];
    if (M == 1) two_of_1(fp32, w, in, &t, first, far, sums);
    else if (M == 2) two_of_2(fp32, w, in, &t, first, far, sums);
    else two_of_4(fp32, w, in, &t, first, far, sums);
    for (long r = 0; r < 1 + both; r++) put(w, sums + r * as, first + r * far, M, y, step, add);
  }
}

// y [M, N] = x [M, K] W^T + bias in bf16, or all in fp32, the bias apart; K in whole 32s.
void few_rows(const void *x, const matrix *w, void *y, long M, int fp32, int threads) {
  long N = w->N, K = w->K, size = padded(M) * prepared_room(K);
  float *sums = fp32 ? y : malloc(M * N * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    long t = omp_get_thread_num(), of = omp_get_num_threads(), from = N * t / of, to = N * (t + 1) / of;
    char *memory = aligned_alloc(64, up_to(size + scales_room(K, M) * 4, 64));
    inputs in = {fp32 ? 0 : (uint16_t *)x, memory, (float *)(memory + size), 0};
    prepare(w, &in, fp32 ? x : 0, M);
    product(M, w, &in, fp32, from, to, sums, N, 0);
    for (long m = 0; m < M && !fp32; m++) store_all((uint16_t *)y + m * N + from, sums + m * N + from, to - from);
    free(memory);
  }
  if (!fp32) free(sums);
}
