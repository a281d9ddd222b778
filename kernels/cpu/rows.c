// Products of more rows. Lanes of a register are rows of x, which lies in memory in that order: of R rows at once each
// has a lane, or two where that fills a register. Weights are decoded for some outputs at a time and broadcast, four
// bytes to a lane: one in fp32, two in bf16, or bytes: four, or two in 16 bits where that takes an instruction less
// (no VNNI) and pays for decoding them (more than 8 rows).

#ifdef __AVX512F__
#define SUMS 16 // registers of sums
#else
#define SUMS 12
#endif
#define ROWS_AT_ONCE (2 * W) // of many
#define LANES(R) ((R) > W ? (R) : W)
#define TILE(R) (SUMS * W / LANES(R)) // outputs in registers
#define DECODED 48                    // outputs decoded together
#define DEPTH 512                     // inputs of them
#define ROOM(lanes) (DECODED * ((lanes) + DEPTH / SPAN + DEPTH)) // floats for sums, scales and weights
#define SHORTS(R) (!OFFSET && (R) > 8)
#define EACH_OF(form, R) ((form) == SPANS && !SHORTS(R) ? 4 : (form) == FLOATS ? 1 : 2) // inputs in four bytes
#define INPUTS(form, R) (SPAN * (R) * 4 / EACH_OF(form, R)) // bytes of a span of R rows; behind them SPANS have
#define SPAN_BYTES(form, R) (INPUTS(form, R) + ((form) == SPANS ? 8 * LANES(R) : 0)) // factors, what OFFSET adds

// Four bytes at a time of row r, of R, to its lanes.
INLINE void to_lanes(const int R, const void *row, long words, long r, char *to) {
  const int each = LANES(R) / R;
  for (long i = 0; i < words; i += each) memcpy(to + (i * R + r * each) * 4, (const char *)row + 4 * i, 4 * each);
}

INLINE void put_bytes(const int shorts, const int8_t *from, int n, char *to) {
  for (int i = 0; i < n; i++)
    if (shorts) ((int16_t *)to)[i] = from[i];
    else to[i] = from[i];
}

// Rows of bytes, a GROUP, to their spans.
INLINE void group_to_lanes(const int R, const int8_t *row, long r, char *to) {
  for (int s = 0; s < SIZE; s += SPAN / 2, to += SPAN_BYTES(SPANS, R)) {
    float *factors = (float *)(to + INPUTS(SPANS, R));
    char span[2 * SPAN];
    EACH(i, 2) put_bytes(SHORTS(R), row + i * SIZE + s, SPAN / 2, span + i * (SHORTS(R) ? SPAN : SPAN / 2));
    to_lanes(R, span, SPAN / EACH_OF(SPANS, R), r, to);
    EACH(i, LANES(R) / R) factors[r * LANES(R) / R + i] = ((float *)(row + 2 * SIZE))[s / 4] / 127;
  }
}

// M rows of x, at most R and `next` numbers apart, in bf16 or fp32, in the order of w's decoded values or without w as
// they are.
INLINE void in_lanes(const int R, const enum form form, const matrix *w, const uint16_t *half, const float *x,
                     long next, long M, long K, char *to) {
  const long size = SPAN_BYTES(form, R), step = form == SPANS ? 2 * SIZE : 32;
  for (long k = 0; k < K; k += step, to += size * step / SPAN) {
    long some = K - k < step ? K - k : step;
    if (M < R || some < step) memset(to, 0, size * step / SPAN);
    for (long r = 0; r < M; r++) {
      int8_t group[GROUP];
      if (form == WORDS) to_lanes(R, half + r * next + k, some / 2, r, to);
      else if (form == SPANS) {
        round_row(w->kind == ROUNDED, half + r * next + k, group, some);
        group_to_lanes(R, group, r, to);
      } else {
        float values[SPAN];
        if (x) even_floats(x + r * next + k, values, some);
        else if (w) evens_first(half + r * next + k, values, some);
        else load_all(values, half + r * next + k, some);
        to_lanes(R, values, some, r, to);
      }
    }
    for (long s = 0; form == SPANS && s < step; s += SPAN)
      EACH(v, LANES(R) / W) {
        char *of = to + s / SPAN * size;
        ints added = offset_of(of + v * SIZE, SPAN * R / 4 / LANES(R), 4 * LANES(R));
        store(of + INPUTS(SPANS, R) + 4 * LANES(R) + v * SIZE, added);
      }
  }
}

INLINE ints times(const int R, const enum form form, ints acc, ints w, ints x) {
  if (form == SPANS) return SHORTS(R) ? dot_shorts(acc, w, x) : dot_bytes(acc, w, x);
  return form == WORDS ? dot_words(acc, w, x) : add_product(acc, w, x);
}

// y [TILE, next] += x [K, LANES]^T w^T; w's rows are `apart`, `scales` [TILE, DEPTH / SPAN] those of the weight; a
// span's products are summed apart: less rounding. Meanwhile TILE rows of `each` bytes, `far` apart, are fetched.
INLINE void tile(const int R, const enum form form, const char *x, const char *w, long apart, const float *scales,
                 long K, float *y, long next, const char *fetched, long each, long far) {
  const int words = SPAN / EACH_OF(form, R), both = LANES(R) > R, T = TILE(R), registers = LANES(R) / W;
  for (long k = 0; k < K; k += SPAN, w += words * 4, scales++) {
    const char *factors = x + INPUTS(form, R);
    ints sums[SUMS], of[2];
    EACH(i, SUMS) sums[i] = form == SPANS ? load(factors + (registers + i % registers) * SIZE) : BITS(setzero)();
    int some = form == SPANS || K - k >= SPAN ? words : words / 2;
    for (int q = 0; q < some; q += 1 + both, x += 4 * LANES(R)) {
      EACH(v, registers) of[v] = load(x + v * SIZE);
      EACH(n, T) {
        const char *at = w + n * apart + 4 * q;
        ints all = both ? bytes8(at) : (ints)all_of(*(const float *)at);
        EACH(v, registers) sums[n * registers + v] = times(R, form, sums[n * registers + v], all, of[v]);
      }
    }
    EACH(i, SUMS) {
      int n = i / registers, v = i % registers;
      float *at = y + n * next + v * W;
      floats found = (floats)sums[i], by = all_of(scales[n * (DEPTH / SPAN)]);
      if (form == SPANS) found = V(cvtepi32_ps)(sums[i]) * V(loadu_ps)((float *)factors + v * W) * by;
      V(storeu_ps)(at, V(add_ps)(found, V(loadu_ps)(at)));
    }
    if (form == SPANS) x = factors + 8 * LANES(R);
    for (long i = 0; i < each; i += 64)
      EACH(n, T) _mm_prefetch(fetched + n * far + i, _MM_HINT_T0);
    fetched += each;
  }
}

// Inputs k to k + depth of output n as bytes in the order of `round_row`, with a scale for each span.
INLINE void decode_bytes(const enum kind kind, const int shorts, const matrix *w, ints values, long n, long k,
                         long depth, char *to, float *scales) {
  const float *of = w->scales;
  long e = n * w->K + k;
  for (long i = 0; i < up_to(depth, 2 * SIZE); i += SPAN, scales++)
    if (kind == BYTES) *scales = of[n];
    else *scales = i >= depth ? 0 : w->nested ? scale(w, n, e + i) : of[(e + i) >> w->shift];
  for (long i = 0; i < depth; i += 2 * SIZE, to += 2 * SIZE * (shorts ? 2 : 1)) {
    uint8_t rest[2 * SIZE] = {0};
    const uint8_t *at = address(kind, w, e + i);
    if (depth - i < 2 * SIZE) at = memcpy(rest, at, address(kind, w, e + depth) - at); // the row's end
    two is = kind == ROUNDED ? rounded_codes(values, at) : (two){signed_bytes(at), signed_bytes(at + SIZE)};
    int8_t plain[2 * SIZE];
    store_spans(shorts ? (char *)plain : to, is.even, is.odd);
    if (shorts) put_bytes(1, plain, 2 * SIZE, to);
  }
}

// Sums [some, next] of outputs of w from n on with `groups` of R rows in lanes, `each` bytes apart. `room` is for
// decoded weights and scales. As many outputs behind them are fetched.
INLINE void outputs_of(const int R, const enum form form, const matrix *w, long n, long some, const char *x,
                       long groups, long each, float *sums, long next, char *room) {
  const long apart = DEPTH * 4 / EACH_OF(form, R), bytes = address(w->kind, w, SPAN) - address(w->kind, w, 0);
  float *scales = (float *)(room + DECODED * apart);
  ints values = w->kind == ROUNDED ? rounded_table(w) : BITS(setzero)();
  memset(sums, 0, up_to(some, TILE(R)) * next * 4);
  for (long k = 0; k < w->K; k += DEPTH, x += DEPTH / SPAN * SPAN_BYTES(form, R)) {
    long depth = w->K - k < DEPTH ? w->K - k : DEPTH, all = form == SPANS ? up_to(depth, 2 * SIZE) : depth;
    for (long i = 0; i < some; i++) {
      long e = (n + i) * w->K + k;
      long block = (e + some * w->K) >> w->shift;
      if (w->kind >= CODES) _mm_prefetch((const char *)w->scales + block * (w->nested ? 1 : 4), _MM_HINT_T0);
#define BYTES_OF(kind) \
  decode_bytes(kind, SHORTS(R), w, values, n + i, k, depth, room + i * apart, scales + i * (DEPTH / SPAN))
      if (form == SPANS) w->kind == ROUNDED ? BYTES_OF(ROUNDED) : BYTES_OF(BYTES);
      else if (form == WORDS) memcpy(room + i * apart, address(HALVES, w, e), 2 * depth);
      else decode(w, n + i, k, depth, EVENS_FIRST, room + i * apart);
    }
    for (long g = 0; g < groups; g++)
      for (long i = 0; i < some; i += TILE(R)) {
        const char *fetched = (const char *)address(w->kind, w, (n + some + i) * w->K + k);
        tile(R, form, x + g * each, room + i * apart, apart, scales + i * (DEPTH / SPAN), all,
             sums + i * next + g * LANES(R), next, fetched, g ? 0 : bytes, w->K * bytes / SPAN);
      }
  }
}

// Sums [rows] of output n, to be set to y [M, step], or added.
INLINE void put(const matrix *w, const float *sums, long n, long M, float *y, long step, int add) {
  for (long m = 0; m < M; m++) {
    float value = sums[m] + (w->bias ? whole(w->bias[n]) : 0), *of = y + m * step + n;
    *of = add ? *of + value : value;
  }
}

// `product` of M rows, at most R, that are prepared in lanes.
INLINE void product_of(const int R, const enum form form, long M, const matrix *w, const inputs *in, long from,
                       long to, float *y, long step, int add) {
  float *sums = in->scales, row[R];
  char *room = (char *)(sums + DECODED * LANES(R));
  for (long n = from, some; n < to; n += some) {
    some = to - n < TILE(R) ? to - n : TILE(R);
    outputs_of(R, form, w, n, some, in->prepared, 1, 0, sums, LANES(R), room);
    for (long i = 0; i < some; i++) {
      const float *of = sums + i * LANES(R);
      EACH(r, R) row[r] = LANES(R) > R ? of[2 * r] + of[2 * r + 1] : of[r];
      put(w, row, n + i, M, y, step, add);
    }
  }
}

// of(R, form), both known where it is compiled, for M rows
#define BY_ROWS(of) \
  enum form form = form_of(w, fp32); \
  if (form == FLOATS) M > 8 ? of(16, FLOATS) : of(8, FLOATS); \
  else if (form == SPANS) M > 8 ? of(16, SPANS) : of(8, SPANS); \
  else M > 8 ? of(16, WORDS) : of(8, WORDS);

static void prepare_lanes(const matrix *w, const inputs *in, const float *x, long M) {
#define PREPARED(R, form) in_lanes(R, form, w, in->half, x, w->K, M, w->K, in->prepared)
  int fp32 = x != 0;
  BY_ROWS(PREPARED)
}

static void product_in_lanes(long M, const matrix *w, const inputs *in, int fp32, long from, long to, float *y,
                             long step, int add) {
#define MULTIPLIED(R, form) product_of(R, form, M, w, in, from, to, y, step, add)
  BY_ROWS(MULTIPLIED)
}

// Sums [DECODED, next] of some outputs to rows of y, from output n on, with the bias.
static void put_rows(const matrix *w, const float *sums, long next, long n, long M, uint16_t *y) {
  long some = w->N - n < DECODED ? w->N - n : DECODED;
  for (long m = 0; m < M; m++) {
    float row[DECODED];
    for (long i = 0; i < some; i++) row[i] = sums[i * next + m] + (w->bias ? whole(w->bias[n + i]) : 0);
    store_all(y + m * w->N + n, row, some);
  }
}

// y [M, N] = x [M, K] W^T + bias in bf16; K in whole 32s. `room`: [M, K] in fp32, M in whole 32s and K in whole 128s.
void many_rows(const uint16_t *x, const matrix *w, uint16_t *y, char *room, long M, int threads) {
  long N = w->N, K = w->K, groups = up_to(M, ROWS_AT_ONCE) / ROWS_AT_ONCE, next = groups * ROWS_AT_ONCE + W;
  long each = ROWS_AT_ONCE * up_to(K, 128) * 4;
  int bytes = form_of(w, 0) == SPANS;
#pragma omp parallel num_threads(threads)
  {
    float *sums = aligned_alloc(64, ROOM(next) * 4);
#pragma omp for schedule(dynamic)
    for (long g = 0; g < groups; g++) {
      long m = g * ROWS_AT_ONCE, some = M - m < ROWS_AT_ONCE ? M - m : ROWS_AT_ONCE;
#define AS_FORM(of, ...) bytes ? of(ROWS_AT_ONCE, SPANS, w, __VA_ARGS__) : of(ROWS_AT_ONCE, FLOATS, w, __VA_ARGS__)
      AS_FORM(in_lanes, x + m * K, 0, K, some, K, room + g * each);
    }
#pragma omp for schedule(dynamic)
    for (long n = 0; n < N; n += DECODED) {
      long some = N - n < DECODED ? N - n : DECODED;
      char *decoded = (char *)(sums + DECODED * next);
      AS_FORM(outputs_of, n, some, room, groups, each, sums, next, decoded);
      put_rows(w, sums, next, n, M, y);
    }
    free(sums);
  }
}
