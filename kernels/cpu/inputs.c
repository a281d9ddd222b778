// What inputs of products are prepared as: fp32, of each 2 W the even ones first; bf16; bytes.

#define MOST 4  // rows that product.c takes; rows.c those of more
#define SPAN 64 // inputs that are rounded to bytes together
enum form { FLOATS, WORDS, SPANS };

typedef struct { // of a thread
  uint16_t *half; // [M, K] in bf16
  char *prepared; // the same in a form, rows `next` bytes apart
  float *scales;  // of two outputs, where they are nested
  long next;
} inputs;

// Bytes of a prepared row at most, and some, so that rows do not share the cache's sets.
static long prepared_room(long K) { return up_to(K, 128) * 4 + 3 * 64; }
static long padded(long M) { return M > 8 ? 16 : M > 4 ? 8 : M == 3 ? 4 : M; } // rows that are computed

static enum form form_of(const matrix *w, int fp32) {
  if (!fp32 && (w->kind == BYTES || w->kind == ROUNDED)) return SPANS;
  return sizeof(number) == 2 && !fp32 && w->kind == HALVES ? WORDS : FLOATS;
}

// x [SPAN] as bytes of their largest magnitude, the odd ones SIZE behind the even ones; returns what a byte is worth,
// which is no number if one of x is none.
INLINE float round_span(const float *x, int8_t *to) {
  int8_t plain[SPAN];
  float top = magnitude(x, SPAN), inverse = top > 1e-30f ? 127 / top : 0;
  for (int i = 0; i < SPAN; i++) {
    float shifted = x[i] * inverse + 12582912.f; // 1.5 * 2^23: the integer is in its low bits
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    plain[i] = bits;
  }
  for (int i = 0; i < SPAN / 2; i++) to[i] = plain[2 * i], to[SIZE + i] = plain[2 * i + 1];
  return top / 127;
}

// A group of a row of bytes: two registers of inputs, the even ones and the odd ones of what are codes and else one
// behind the other; W factors, one for each 8 inputs; what OFFSET has added in sums of those.
#define GROUP (4 * SIZE)

static void round_row(int codes, const uint16_t *x, int8_t *to, long K) {
  for (long k = 0; k < K; k += 2 * SIZE, to += GROUP) {
    float some[2 * SIZE] = {0}, span[SPAN], *factors = (float *)(to + 2 * SIZE);
    load_all(some, x + k, K - k < 2 * SIZE ? K - k : 2 * SIZE);
    for (int s = 0; s < SIZE; s += SPAN / 2) {
      for (int i = 0; i < SPAN; i++) span[i] = some[codes ? 2 * s + i : s + i / 2 + i % 2 * SIZE];
      float factor = round_span(span, to + s);
      for (int i = 0; i < SPAN / 8; i++) factors[s / 4 + i] = factor;
    }
    store(to + 3 * SIZE, offset_of(to, 2, SIZE));
  }
}
