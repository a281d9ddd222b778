// What a linear layer's weight may be, and its values: bf16, bytes with a scale for each output, or 4-bit codes
// (nf4_dequantize.py has the format).

enum kind { HALVES, BYTES, CODES, ROUNDED }; // ROUNDED: codes as bytes, see product.py; inputs as of BYTES

typedef struct {
  long N, K;
  const uint16_t *bias; // in bf16, or none
  const void *values;
  const void *scales; // of BYTES: what 127 is worth; of codes one a block: bytes where they are nested, else fp32
  const float *nested, *dynamic, *table; // [2, groups], [256], and what 16 codes are
  long groups;
  int shift, kind; // log2 of the block size
} matrix;

static long up_to(long n, long size) { return (n + size - 1) / size * size; }

// Where value e is. Of codes two are a byte.
INLINE const uint8_t *address(const enum kind kind, const matrix *w, long e) {
  return (const uint8_t *)w->values + (kind == HALVES ? 2 * e : kind == BYTES ? e : e / 2);
}

// What a value e of output n is worth.
static inline float scale(const matrix *w, long n, long e) {
  long block = e >> w->shift, group = block >> 8;
  if (w->kind == HALVES) return 1;
  if (w->kind == BYTES) return ((const float *)w->scales)[n] / 127;
  if (!w->nested) return ((const float *)w->scales)[block];
  return w->dynamic[((const uint8_t *)w->scales)[block]] * w->nested[group] + w->nested[w->groups + group];
}

// Scales of the blocks that output n is in, as if block 0 of the weight were there: where they are, or in `room`.
static const float *scales_of(const matrix *w, long n, float *room) {
  long first = n * w->K >> w->shift, last = ((n + 1) * w->K - 1) >> w->shift, size = w->nested ? 1 : 4;
  for (long b = first; b <= last; b += 64 / size) // of blocks of 64 as far ahead as their codes
    _mm_prefetch((const char *)w->scales + size * (b + AHEAD / 32), _MM_HINT_T0);
  if (!w->nested) return w->scales;
  for (long b = first, end; b <= last; b = end) {
    float factor = w->nested[b >> 8], offset = w->nested[w->groups + (b >> 8)];
    end = (b | 255) < last ? (b | 255) + 1 : last + 1;
    for (long i = b; i < end; i++) room[i - first] = w->dynamic[((const uint8_t *)w->scales)[i]] * factor + offset;
  }
  return room - first;
}

// 2 W values; of codes and bytes without their scale.
INLINE pair values_at(const enum kind kind, table t, const uint8_t *at) {
  if (kind == HALVES) return halves(load(at));
  if (kind == BYTES) {
    ints two = words_of_halves(at), even = V(srai_epi32)(V(slli_epi32)(two, 24), 24);
    return (pair){V(cvtepi32_ps)(even), V(cvtepi32_ps)(V(srai_epi32)(V(slli_epi32)(two, 16), 24))};
  }
  ints two = words_of_bytes(at);
  return (pair){look_up(t, V(srli_epi32)(two, 4)), look_up(t, two)};
}

static table table_of(const matrix *w) {
  const float none[16] = {0}, *of = w->table ? w->table : none;
  return (table){V(loadu_ps)(of), V(loadu_ps)(of + 16 - W)};
}

// Values of output n from input k on, in bf16 or fp32, or of 2 W the even ones first; `count` and k in whole 32s.
enum order { BF16, FP32, EVENS_FIRST };
static void decode(const matrix *w, long n, long k, long count, enum order order, void *to) {
  table t = table_of(w);
  for (long i = 0, e = n * w->K + k; i < count; i += 2 * W, e += 2 * W) {
    floats by = all_of(scale(w, n, e));
    pair of = values_at(w->kind, t, address(w->kind, w, e));
    of = (pair){V(mul_ps)(of.even, by), V(mul_ps)(of.odd, by)};
    if (order == BF16) store((uint16_t *)to + i, joined(of));
    else if (order == FP32) store_pair((float *)to + i, of);
    else store((float *)to + i, (ints)of.even), store((float *)to + i + W, (ints)of.odd);
  }
}

// All values [N, K] of a weight, K in whole 32s.
void weight_values(const matrix *w, void *out, int bf16, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long n = 0; n < w->N; n++) decode(w, n, 0, w->K, bf16 ? BF16 : FP32, (char *)out + n * w->K * (bf16 ? 2 : 4));
}

// x [blocks, size] in bf16 or fp32 to codes, and each block's largest magnitude, as `quantize` in quantize.py, to the
// bit. `bounds` are the 15 between the ascending values, `order` their codes.
void nf4_codes(const void *x, int bf16, const float *bounds, const uint8_t *order, float *absmax, uint8_t *packed,
               long blocks, long size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long b = 0; b < blocks; b++) {
    float values[size];
    if (bf16) load_all(values, (const uint16_t *)x + b * size, size);
    else memcpy(values, (const float *)x + b * size, sizeof values);
    absmax[b] = magnitude(values, size);
    float inverse = 1 / fmaxf(absmax[b], 1e-38f);
    for (long i = 0; i < size; i += W) {
      int found[W];
      floats v = V(mul_ps)(V(loadu_ps)(values + i), all_of(inverse));
      ints n = BITS(setzero)();
      for (int j = 0; j < 15; j++) n = V(sub_epi32)(n, (ints)(v > all_of(bounds[j])));
      store(found, n);
      for (int j = 0; j < W; j += 2) packed[(b * size + i + j) / 2] = order[found[j]] << 4 | order[found[j + 1]];
    }
  }
}

// The 16 values of codes as bytes, twice a register, with OFFSET; their scale is 127 times less.
static ints rounded_table(const matrix *w) {
  uint8_t values[16];
  for (int i = 0; i < 16; i++) values[i] = (int)nearbyintf(w->table[i] * 127) + OFFSET;
  return bytes16(values);
}

typedef struct { ints even, odd; } two;
INLINE two rounded_codes(ints values, const uint8_t *codes) { // 2 SIZE weights of a register of codes
  ints of = load(codes), low = V(set1_epi8)(15);
  ints first = BITS(and)(V(srli_epi16)(of, 4), low), second = BITS(and)(of, low);
  return (two){V(shuffle_epi8)(values, first), V(shuffle_epi8)(values, second)};
}
INLINE ints signed_bytes(const void *p) { // with OFFSET
  return OFFSET ? BITS(xor)(load(p), V(set1_epi8)((char)OFFSET)) : load(p);
}
