// Products of many rows. Lanes of a register are rows of x, which lies in memory in that order; weights are decoded for
// some outputs at a time and broadcast one by one: in fp32, or four bytes at a time where the CPU adds their products
// up in one instruction.

#define ROWS_AT_ONCE (2 * W)
#ifdef __AVX512F__
#define TILE 8 // outputs in registers
#else
#define TILE 6
#endif
#define DECODED 48 // outputs decoded together
#define DEPTH 512  // inputs of them
#define SPAN_OF_MANY 64

// 4 n bytes of each of ROWS_AT_ONCE rows to [n, ROWS_AT_ONCE], 4 bytes at a time.
INLINE void turned(const void *rows, const int n, char *to) {
  ints lanes = lanes_times(n);
  for (int j = 0; j < n; j++)
    EACH(v, 2) store(to + (j * 2 + v) * SIZE, (ints)(gather((const float *)rows + v * W * n + j, lanes)));
}

// Rows g * ROWS_AT_ONCE and on, `next` numbers apart, as fp32 [K, ROWS_AT_ONCE], K filled up to whole 32s.
static void rows_of_floats(const uint16_t *x, long next, long M, long K, long g, char *to) {
  for (long k = 0; k < K; k += 32, to += ROWS_AT_ONCE * 32 * 4) {
    float some[ROWS_AT_ONCE][32] = {0};
    for (long r = 0; r < ROWS_AT_ONCE && g * ROWS_AT_ONCE + r < M; r++)
      load_all(some[r], x + (g * ROWS_AT_ONCE + r) * next + k, K - k < 32 ? K - k : 32);
    turned(some, 32, to);
  }
}

#define OF_BYTES (ROWS_AT_ONCE * (SPAN_OF_MANY + 4 + 4)) // a span of inputs: bytes, factors, what OFFSET adds

// The same as bytes, by spans [16, ROWS_AT_ONCE, 4].
static void rows_of_bytes(const uint16_t *x, int even_first, long M, long K, long g, char *to) {
  int8_t some[ROWS_AT_ONCE][SPAN_OF_MANY] = {0};
  for (long k = 0; k < K; k += SPAN_OF_MANY, to += OF_BYTES) {
    float *factors = (float *)(to + ROWS_AT_ONCE * SPAN_OF_MANY), values[SPAN_OF_MANY] = {0};
    for (long r = 0; r < ROWS_AT_ONCE && g * ROWS_AT_ONCE + r < M; r++) {
      load_all(values, x + (g * ROWS_AT_ONCE + r) * K + k, K - k < SPAN_OF_MANY ? K - k : SPAN_OF_MANY);
      factors[r] = round_span(values, some[r], SPAN_OF_MANY, even_first ? SPAN_OF_MANY / 2 : 0);
    }
    turned(some, SPAN_OF_MANY / 4, to);
    EACH(v, 2) store(factors + ROWS_AT_ONCE + v * W, offset_of(to + v * SIZE, SPAN_OF_MANY / 4, 2 * SIZE));
  }
}

// y [TILE, next] += x [K, ROWS_AT_ONCE]^T w^T in fp32, or as bytes; w's rows are `apart`, `scales` [TILE, DEPTH / SPAN_OF_MANY]
// those of the weight; a span's products are summed apart: less rounding.
INLINE void tile(const int bytes, const char *x, const char *w, long apart, const float *scales, long K, float *y,
                 long next) {
  const int each = bytes ? 4 : 1; // inputs in four bytes
  for (long k = 0; k < K; k += SPAN_OF_MANY, w += SPAN_OF_MANY / each * 4, scales++) {
    const char *factors = x + ROWS_AT_ONCE * SPAN_OF_MANY;
    ints sums[TILE][2];
    EACH(n, TILE)
      EACH(v, 2) sums[n][v] = bytes ? load(factors + (2 + v) * SIZE) : BITS(setzero)();
    for (int q = 0; q < (bytes || K - k >= SPAN_OF_MANY ? SPAN_OF_MANY : K - k) / each; q++, x += 2 * SIZE) {
      ints x0 = load(x), x1 = load(x + SIZE);
      EACH(n, TILE) {
        ints of = (ints)all_of(*(const float *)(w + n * apart + 4 * q));
        sums[n][0] = bytes ? dot_bytes(sums[n][0], of, x0) : add_product(sums[n][0], of, x0);
        sums[n][1] = bytes ? dot_bytes(sums[n][1], of, x1) : add_product(sums[n][1], of, x1);
      }
    }
    EACH(n, TILE)
      EACH(v, 2) {
        float *at = y + n * next + v * W;
        floats by = all_of(scales[n * (DEPTH / SPAN_OF_MANY)]), found = (floats)sums[n][v];
        if (bytes) found = V(cvtepi32_ps)(sums[n][v]) * V(loadu_ps)((float *)factors + v * W);
        V(storeu_ps)(at, bytes ? V(fmadd_ps)(found, by, V(loadu_ps)(at)) : V(add_ps)(found, V(loadu_ps)(at)));
      }
    if (bytes) x = factors + 4 * SIZE;
  }
}

// Inputs k to k + depth of output n as bytes, with a scale for each span.
static void decode_bytes(const matrix *w, ints table, long n, long k, long depth, char *to, float *scales) {
  for (long i = 0; i < depth; i += SPAN_OF_MANY, to += SPAN_OF_MANY, scales++) {
    long e = n * w->K + k + i;
    uint8_t some[SPAN_OF_MANY + SIZE] = {0}; // a row may end in half a span
    *scales = scale(w, n, e);
    if (w->kind == BYTES) {
      memcpy(some, address(BYTES, w, e), depth - i < SPAN_OF_MANY ? depth - i : SPAN_OF_MANY);
      for (int j = 0; j < SPAN_OF_MANY; j += SIZE) store(to + j, signed_bytes(some + j));
    } else {
      memcpy(some, address(ROUNDED, w, e), SPAN_OF_MANY / 2);
      two of = rounded_codes(table, some);
      memcpy(to, &of.even, SPAN_OF_MANY / 2);
      memcpy(to + SPAN_OF_MANY / 2, &of.odd, SPAN_OF_MANY / 2);
      *scales /= 127;
    }
  }
}

// Sums [DECODED, next] of some outputs to rows of y, from output n on, with the bias.
static void put_rows(const matrix *w, const float *sums, long next, long n, long M, uint16_t *y) {
  long some = w->N - n < DECODED ? w->N - n : DECODED;
  ints lanes = lanes_times(next);
  for (long m = 0; m < M; m++) {
    float row[DECODED];
    for (long i = 0; i < DECODED; i += W) V(storeu_ps)(row + i, gather(sums + i * next + m, lanes));
    for (long i = 0; i < some && w->bias; i++) row[i] += whole(w->bias[n + i]);
    store_all(y + m * w->N + n, row, some);
  }
}

// y [M, N] = x [M, K] W^T + bias in bf16; K in whole 32s. `room`: 4 K bytes for each of M rows, M in whole 32s.
void many_rows(const uint16_t *x, const matrix *w, uint16_t *y, char *room, long M, int threads) {
  long N = w->N, K = w->K, groups = up_to(M, ROWS_AT_ONCE) / ROWS_AT_ONCE, next = groups * ROWS_AT_ONCE + W;
  long each = ROWS_AT_ONCE * K * 4, spans = DEPTH / SPAN_OF_MANY;
  int by_spans = w->kind == BYTES || (w->kind == ROUNDED && w->shift >= 6 && w->K % 64 == 0);
  int bytes = OFFSET && by_spans, apart = bytes ? DEPTH : DEPTH * 4;
#pragma omp parallel num_threads(threads)
  {
    float *sums = aligned_alloc(64, DECODED * (next + spans + DEPTH) * 4), *scales = sums + DECODED * next;
    char *decoded = (char *)(scales + DECODED * spans);
    ints table = w->kind == ROUNDED ? rounded_table(w) : BITS(setzero)();
#pragma omp for schedule(dynamic)
    for (long g = 0; g < groups; g++) {
      if (bytes) rows_of_bytes(x, w->kind == ROUNDED, M, K, g, room + g * each);
      else rows_of_floats(x, K, M, K, g, room + g * each);
    }
#pragma omp for schedule(dynamic)
    for (long n = 0; n < N; n += DECODED) {
      memset(sums, 0, DECODED * next * 4);
      for (long k = 0; k < K; k += DEPTH) {
        long depth = K - k < DEPTH ? K - k : DEPTH, some = N - n < DECODED ? N - n : DECODED;
        for (long i = 0; i < some; i++) {
          if (bytes) decode_bytes(w, table, n + i, k, depth, decoded + i * apart, scales + i * spans);
          else decode(w, n + i, k, depth, 0, decoded + i * apart);
        }
        for (long g = 0; g < groups; g++)
          for (long i = 0; i < some; i += TILE) {
            const char *rows = room + g * each + (bytes ? k / SPAN_OF_MANY * OF_BYTES : k * ROWS_AT_ONCE * 4);
            float *to = sums + i * next + g * ROWS_AT_ONCE;
            if (bytes) tile(1, rows, decoded + i * apart, DEPTH, scales + i * spans, depth, to, next);
            else tile(0, rows, decoded + i * apart, DEPTH * 4, scales, depth, to, next);
          }
      }
      put_rows(w, sums, next, n, M, y);
    }
    free(sums);
  }
}
