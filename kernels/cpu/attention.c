// Attention of packed sequences in bf16 with AMX tiles, for inference; attention.py has the definition.
// Scores of 16 queries and all their keys lie in the cache: no running maximum, nothing is scaled twice.
#ifdef __AMX_BF16__

#define WIDEST 128 // numbers of a head

typedef struct {
  const uint16_t *q, *k, *v;               // [T, H, K], [T, G, K] twice, heads end to end
  uint16_t *o, *room;                      // [T, H, K]; [G, 2 K] for each token, tokens and K in whole 32s
  const long *starts;                      // [B + 1]
  long B, H, G, K, q_next, k_next, v_next; // numbers from a token to the next
  float scale;
  int causal;
} queries;

static __mmask16 some_of(long n) { return n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0; } // lanes

// Keys of a head: a tile [16, 16, 2] holds pairs of inputs, one below the other, of 16 keys.
static void put_keys(const queries *a, const uint16_t *k, long S, uint16_t *to) {
  ints next = lanes_times(a->k_next * 2);
  for (long s = 0; s < up_to(S, 32); s += 16) {
    __mmask16 there = some_of(S - s);
    for (long i = 0; i < up_to(a->K, 32); i += 2, to += 32)
      _mm512_storeu_si512(to, _mm512_mask_i32gather_epi32(V(setzero_si512)(), i < a->K ? there : 0, next,
                                                          k + s * a->k_next + i, 1));
  }
}

// Values of a head: a tile [16, 16, 2] holds pairs of tokens, one below the other, of 16 outputs.
static void put_values(const queries *a, const uint16_t *v, long S, uint16_t *to) {
  for (long s = 0; s < up_to(S, 32); s += 32)
    for (long i = 0; i < up_to(a->K, 32); i += 16)
      for (long j = s; j < s + 32; j += 2, to += 32) {
        __mmask16 there = some_of(a->K - i);
        const uint16_t *at = v + j * a->v_next + i;
        ints even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(j < S ? there : 0, at));
        ints odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(j + 1 < S ? there : 0, at + a->v_next));
        _mm512_storeu_si512(to, BITS(or)(even, V(slli_epi32)(odd, 16)));
      }
}

// c [32, 32] = a [32, 32 * number] b, whose tiles for 16 columns are at b0, for the others at b1, `step` between them.
static inline void square(const uint16_t *a, long a_next, const uint16_t *b0, const uint16_t *b1, long step,
                          long number, float *c, long c_next) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (long i = 0; i < number; i++) {
    _tile_loadd(4, a + 32 * i, 2 * a_next);
    _tile_loadd(5, a + 32 * i + 16 * a_next, 2 * a_next);
    _tile_loadd(6, b0 + i * step, 64);
    _tile_loadd(7, b1 + i * step, 64);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * c_next);
  _tile_stored(1, c + 16, 4 * c_next);
  _tile_stored(2, c + 16 * c_next, 4 * c_next);
  _tile_stored(3, c + 16 * c_next + 16, 4 * c_next);
}

// e^x as near as bf16 shows, for x up to 0.
INLINE floats probability(floats x) {
  x = V(mul_ps)(x, V(set1_ps)(1.44269504f));
  floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = V(sub_ps)(x, n);
  floats p = V(fmadd_ps)(V(set1_ps)(0.0096181291f), r, V(set1_ps)(0.0555041087f)); // of 2^r
  p = V(fmadd_ps)(p, r, V(set1_ps)(0.2402265070f));
  p = V(fmadd_ps)(p, r, V(set1_ps)(0.6931471806f));
  return _mm512_scalef_ps(V(fmadd_ps)(p, r, V(set1_ps)(1)), n);
}

// Scores [rows, keys] to probabilities in bf16 that are not yet divided by their sums; the first query sees `seen`
// keys, each next one `more`.
static void probabilities(const float *scores, uint16_t *p, long keys, long rows, long seen, long more, float scale,
                          float *sums) {
  floats by = V(set1_ps)(scale), none = V(set1_ps)(-INFINITY);
  for (long r = 0; r < rows; r++, scores += keys, p += keys, seen += more) {
    floats most = none, total = V(setzero_ps)();
    for (long s = 0; s < seen; s += 16) most = V(max_ps)(most, V(mask_loadu_ps)(none, some_of(seen - s), scores + s));
    most = V(mul_ps)(all_of(largest(most)), by);
    for (long s = 0; s < keys; s += 16) {
      floats some = probability(V(fmsub_ps)(V(loadu_ps)(scores + s), by, most));
      some = V(maskz_mov_ps)(some_of(seen - s), some);
      total = V(add_ps)(total, some);
      store_bf16(p + s, some);
    }
    sums[r] = sum(total);
  }
}

// 32 queries or fewer of a head from t on, of a sequence of S tokens.
static void some_queries(const queries *a, const uint16_t *q, uint16_t *o, const uint16_t *keys,
                         const uint16_t *values, long t, long S, uint16_t *rows, float *scores, uint16_t *p) {
  long K = a->K, wide = up_to(K, 32), number = S - t < 32 ? S - t : 32, seen = a->causal ? t + 1 : S;
  long needed = up_to(a->causal ? t + number : S, 32);
  float sums[32], out[32][WIDEST];
  memset(rows, 0, 32 * wide * 2);
  for (long r = 0; r < number; r++) memcpy(rows + r * wide, q + r * a->q_next, K * 2);
  TILES_READ_AND_WRITE;
  for (long s = 0; s < needed; s += 32)
    square(rows, wide, keys + s * wide, keys + (s + 16) * wide, 512, wide / 32, scores + s, needed);
  TILES_READ_AND_WRITE;
  probabilities(scores, p, needed, number, seen, a->causal, a->scale, sums);
  TILES_READ_AND_WRITE;
  for (long i = 0; i < wide; i += 32)
    square(p, needed, values + i * 32, values + i * 32 + 512, 32 * wide, needed / 32, out[0] + i, WIDEST);
  TILES_READ_AND_WRITE;
  for (long r = 0; r < number; r++)
    for (long i = 0; i < K; i += 16) {
      floats some = V(mul_ps)(V(loadu_ps)(out[r] + i), V(set1_ps)(1 / sums[r]));
      _mm256_mask_storeu_epi16(o + r * a->H * K + i, some_of(K - i), (__m256i)_mm512_cvtneps_pbh(some));
    }
}

// Attention of every query to the tokens of its sequence, or with `causal` to those up to its own. K even, up to 128.
void attention_tiles(const queries *a, int threads) {
  long K = a->K, wide = up_to(K, 32), each = 2 * wide, heads = a->H / a->G, longest = 0, blocks = 0;
  for (long b = 0; b < a->B; b++) {
    long S = a->starts[b + 1] - a->starts[b];
    longest = S > longest ? S : longest;
    blocks += (S + 31) / 32;
  }
#pragma omp parallel num_threads(threads)
  {
    take_tiles();
    long keys = up_to(longest, 32);
    char *memory = aligned_alloc(64, 32 * keys * 6 + 32 * wide * 2);
    float *scores = (float *)memory;
    uint16_t *p = (uint16_t *)(memory + 32 * keys * 4), *rows = p + 32 * keys;
#pragma omp for schedule(static)
    for (long g = 0; g < a->G; g++) {
      uint16_t *to = a->room;
      for (long b = 0; b < a->B; b++) {
        long first = a->starts[b], S = a->starts[b + 1] - first, size = up_to(S, 32);
        put_keys(a, a->k + first * a->k_next + g * K, S, to + g * size * each);
        put_values(a, a->v + first * a->v_next + g * K, S, to + g * size * each + size * wide);
        to += a->G * size * each;
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (long task = 0; task < blocks * a->H; task++) { // a head's queries together: its keys stay cached
      long left = task, b = 0, S, size;
      uint16_t *of = a->room;
      for (;; b++) {
        S = a->starts[b + 1] - a->starts[b], size = up_to(S, 32);
        long some = (S + 31) / 32 * a->H;
        if (left < some) break;
        left -= some, of += a->G * size * each;
      }
      long n = (S + 31) / 32, h = left / n, t = left % n * 32, at = a->starts[b] + t;
      const uint16_t *k = of + h / heads * size * each;
      const uint16_t *q = a->q + at * a->q_next + h * K;
      some_queries(a, q, a->o + (at * a->H + h) * K, k, k + size * wide, t, S, rows, scores, p);
    }
    free(memory);
    _tile_release();
  }
}
#endif
