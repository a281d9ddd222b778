// What a linear layer's weight may be, and its values: bf16, bytes with a scale for each output, or 4-bit codes
// (nf4_dequantize.py has the format).

typedef struct {
  const uint8_t *codes;
  const void *absmax; // fp32, or bytes where there are nested [2, groups] and dynamic [256]
  const float *nested, *dynamic, *values;
  long groups;
  int shift; // log2 of the block size
} weight;

enum kind { HALVES, BYTES, CODES, ROUNDED }; // ROUNDED: codes as bytes; inputs of these and of BYTES are bytes too

typedef struct {
  long N, K;
  const uint16_t *bias; // in bf16, or none
  const void *values;   // of HALVES and BYTES
  const float *scales;  // of BYTES: what 127 is worth
  weight codes;
  int kind;
} matrix;

static long up_to(long n, long size) { return (n + size - 1) / size * size; }

static inline float scale(const weight *w, long e) {
  long block = e >> w->shift, group = block >> 8;
  if (!w->nested) return ((const float *)w->absmax)[block];
  return w->dynamic[((const uint8_t *)w->absmax)[block]] * w->nested[group] + w->nested[w->groups + group];
}

// Scales of blocks `first` to `last`: where they are, or decoded to `room`.
static const float *scales_of(const weight *w, long first, long last, float *room) {
  if (!w->nested) return (const float *)w->absmax + first;
  for (long b = first, end; b <= last; b = end) {
    float factor = w->nested[b >> 8], offset = w->nested[w->groups + (b >> 8)];
    end = (b | 255) < last ? (b | 255) + 1 : last + 1;
    for (long i = b; i < end; i++) room[i - first] = w->dynamic[((const uint8_t *)w->absmax)[i]] * factor + offset;
  }
  return room;
}

// 2 W values from e on; of codes and bytes without their scale.
INLINE pair values_at(const enum kind kind, const matrix *w, table t, long e) {
  if (kind == HALVES) return halves(load((const uint16_t *)w->values + e));
  if (kind == BYTES) {
    ints two = words_of_halves((const int8_t *)w->values + e), even = V(srai_epi32)(V(slli_epi32)(two, 24), 24);
    return (pair){V(cvtepi32_ps)(even), V(cvtepi32_ps)(V(srai_epi32)(two, 8))};
  }
  ints two = words_of_bytes(w->codes.codes + e / 2);
  return (pair){look_up(t, V(srli_epi32)(two, 4)), look_up(t, two)};
}

static table table_of(const matrix *w) { return load_table(w->codes.values ? w->codes.values : (float[16]){0}); }

// The values of 4-bit weights, in whole 32s, in bf16 or else fp32.
void nf4_values(const weight *codes, void *out, long count, int bf16, int threads) {
  matrix w = {.codes = *codes};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long at = 0; at < count; at += 2 * W) {
    floats of = all_of(scale(codes, at));
    pair found = values_at(CODES, &w, table_of(&w), at);
    found = (pair){V(mul_ps)(found.even, of), V(mul_ps)(found.odd, of)};
    if (bf16) store((uint16_t *)out + at, joined(found));
    else {
      float a[W], b[W], *to = (float *)out + at;
      V(storeu_ps)(a, found.even);
      V(storeu_ps)(b, found.odd);
      for (int i = 0; i < W; i++) to[2 * i] = a[i], to[2 * i + 1] = b[i];
    }
  }
}

// x [blocks, size] in bf16 or fp32 to codes, and each block's largest magnitude, as `quantize` in quantize.py, to the
// bit. `bounds` are the 15 between the ascending values, `order` their codes.
void nf4_codes(const void *x, int bf16, const float *bounds, const uint8_t *order, float *absmax, uint8_t *packed,
               long blocks, long size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long b = 0; b < blocks; b++) {
    float values[size];
    floats most = V(setzero_ps)(), none = V(setzero_ps)();
    for (long i = 0; i < size; i += W) {
      floats of = bf16 ? load_bf16((const uint16_t *)x + b * size + i) : V(loadu_ps)((const float *)x + b * size + i);
      V(storeu_ps)(values + i, of);
      most = V(max_ps)(most, V(max_ps)(of, V(sub_ps)(V(setzero_ps)(), of)));
      none = V(fmadd_ps)(of, V(setzero_ps)(), none); // no number if one of x is none
    }
    float top = largest(most), inverse = 1 / fmaxf(top, 1e-38f);
    absmax[b] = top + sum(none);
    for (long i = 0; i < size; i += W) {
      int found[W];
      floats v = V(mul_ps)(V(loadu_ps)(values + i), all_of(inverse));
      ints n = BITS(setzero)();
      for (int j = 0; j < 15; j++) n = count_above(n, v, bounds[j]);
      store(found, n);
      for (int j = 0; j < W; j += 2) packed[(b * size + i + j) / 2] = order[found[j]] << 4 | order[found[j + 1]];
    }
  }
}

// The 16 values of codes as bytes, twice a register, with OFFSET; their scale is 127 times less.
static ints rounded_table(const matrix *w) {
  uint8_t values[16];
  for (int i = 0; i < 16; i++) values[i] = (int)nearbyintf(w->codes.values[i] * 127) + OFFSET;
  return bytes16(values);
}

typedef struct { ints even, odd; } two;
INLINE two rounded_codes(ints table, const uint8_t *codes) { // 2 SIZE weights of a register of codes
  ints of = load(codes), low = V(set1_epi8)(15);
  ints first = BITS(and)(V(srli_epi16)(of, 4), low), second = BITS(and)(of, low);
  return (two){V(shuffle_epi8)(table, first), V(shuffle_epi8)(table, second)};
}
INLINE ints signed_bytes(const void *p) { // with OFFSET
  return OFFSET ? BITS(xor)(load(p), V(set1_epi8)((char)OFFSET)) : load(p);
}
