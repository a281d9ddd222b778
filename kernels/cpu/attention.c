// Attention of packed sequences in bf16 for inference, by AMX tiles or in fp32; attention.py has the definition.
// Scores of some queries and all their keys lie in the cache: no running maximum, nothing is scaled twice.

#define WIDEST 128 // numbers of a head
#define QUERIES (4 * TILE)

#ifdef __AMX_BF16__
typedef uint16_t cell;
#define COLUMNS 32
#else
typedef float cell;
#define COLUMNS ROWS_AT_ONCE
#define TILES_READ_AND_WRITE
#endif

typedef struct {
  const uint16_t *q, *k, *v;               // [T, H, K], [T, G, K] twice, heads end to end
  uint16_t *o;                             // [T, H, K]
  cell *room;                              // [G, 2 K] for each token, tokens and K in whole 32s
  const long *starts;                      // [B + 1]
  long B, H, G, K, q_next, k_next, v_next; // numbers from a token to the next
  float scale;
  int causal;
} queries;

#ifdef __AMX_BF16__
static __mmask16 some_of(long n) { return n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0; } // lanes

// Keys of a head, by 32 tokens and 32 inputs: two tiles [16, 16, 2] of pairs of inputs, one below the other, of 16 keys.
static void put_keys(const queries *a, const uint16_t *k, long S, cell *to) {
  ints next = lanes_times(a->k_next * 2);
  for (long s = 0; s < up_to(S, 32); s += 32)
    for (long i = 0; i < up_to(a->K, 32); i += 32)
      for (long t = s; t < s + 32; t += 16)
        for (long j = i; j < i + 32; j += 2, to += 32)
          store(to, _mm512_mask_i32gather_epi32(BITS(setzero)(), j < a->K ? some_of(S - t) : 0, next,
                                                k + t * a->k_next + j, 1));
}

// Values of a head, by 32 outputs and 32 tokens: two tiles of pairs of tokens, one below the other, of 16 outputs.
static void put_values(const queries *a, const uint16_t *v, long S, cell *to) {
  for (long o = 0; o < up_to(a->K, 32); o += 32)
    for (long s = 0; s < up_to(S, 32); s += 32)
      for (long i = o; i < o + 32; i += 16)
        for (long j = s; j < s + 32; j += 2, to += 32) {
          const uint16_t *at = v + j * a->v_next + i;
          ints even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(j < S ? some_of(a->K - i) : 0, at));
          ints odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(j + 1 < S ? some_of(a->K - i) : 0, at + a->v_next));
          store(to, BITS(or)(even, V(slli_epi32)(odd, 16)));
        }
}

// c [QUERIES, COLUMNS] = a [QUERIES, depth] b.
static void square(const cell *a, long a_next, const cell *b, long depth, float *c, long c_next) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (long i = 0; i < depth; i += 32, b += 1024) {
    _tile_loadd(4, a + i, 2 * a_next);
    _tile_loadd(5, a + i + 16 * a_next, 2 * a_next);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 512, 64);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * c_next);
  _tile_stored(1, c + 16, 4 * c_next);
  _tile_stored(2, c + 16 * c_next, 4 * c_next);
  _tile_stored(3, c + 16 * c_next + 16, 4 * c_next);
}

static void put_cells(cell *to, const uint16_t *x, long n) { memcpy(to, x, n * 2); }
INLINE void put_shares(cell *to, floats v) { store_bf16(to, v); }
#else
static void put_keys(const queries *a, const uint16_t *k, long S, cell *to) { // by COLUMNS tokens [K, COLUMNS]
  for (long s = 0; s < up_to(S, 32); s += COLUMNS, to += COLUMNS * up_to(a->K, 32))
    rows_of_floats(k, a->k_next, S, a->K, s / COLUMNS, (char *)to);
}

static void put_values(const queries *a, const uint16_t *v, long S, cell *to) { // by COLUMNS outputs [S, COLUMNS]
  for (long i = 0; i < up_to(a->K, 32); i += COLUMNS)
    for (long s = 0; s < up_to(S, 32); s++, to += COLUMNS) {
      memset(to, 0, COLUMNS * sizeof *to);
      if (s < S && i < a->K) load_all(to, v + s * a->v_next + i, a->K - i < COLUMNS ? a->K - i : COLUMNS);
    }
}

static void square(const cell *a, long a_next, const cell *b, long depth, float *c, long c_next) {
  for (long r = 0; r < QUERIES; r++) memset(c + r * c_next, 0, COLUMNS * sizeof *c);
  for (long r = 0; r < QUERIES; r += TILE)
    tile(0, (char *)b, (char *)(a + r * a_next), a_next * 4, c, depth, c + r * c_next, c_next);
}

static void put_cells(cell *to, const uint16_t *x, long n) { load_all(to, x, n); }
INLINE void put_shares(cell *to, floats v) { V(storeu_ps)(to, v); }
#endif

// Scores [rows, keys] to probabilities that are not yet divided by their sums; the first query sees `seen` keys, each
// next one `more`.
static void probabilities(float *scores, cell *p, long keys, long rows, long seen, long more, float scale, float *sums) {
  floats by = all_of(scale);
  for (long r = 0; r < rows; r++, scores += keys, p += keys, seen += more) {
    floats most = all_of(-INFINITY), total = V(setzero_ps)();
    for (long s = seen; s < keys; s++) scores[s] = -INFINITY;
    for (long s = 0; s < keys; s += W) most = V(max_ps)(most, V(loadu_ps)(scores + s));
    most = V(mul_ps)(all_of(largest(most)), by);
    for (long s = 0; s < keys; s += W) {
      floats some = exponential(V(fmsub_ps)(V(loadu_ps)(scores + s), by, most));
      total = V(add_ps)(total, some);
      put_shares(p + s, some);
    }
    sums[r] = sum(total);
  }
}

// QUERIES or fewer of a head from t on, of a sequence of S tokens.
static void some_queries(const queries *a, const uint16_t *q, uint16_t *o, const cell *keys, const cell *values, long t,
                         long S, cell *rows, float *scores, cell *p) {
  long K = a->K, wide = up_to(K, 32), number = S - t < QUERIES ? S - t : QUERIES, seen = a->causal ? t + 1 : S;
  long needed = up_to(a->causal ? t + number : S, 32);
  float sums[QUERIES], out[QUERIES][WIDEST];
  memset(rows, 0, QUERIES * wide * sizeof *rows);
  for (long r = 0; r < number; r++) put_cells(rows + r * wide, q + r * a->q_next, K);
  TILES_READ_AND_WRITE;
  for (long s = 0; s < needed; s += COLUMNS) square(rows, wide, keys + s * wide, wide, scores + s, needed);
  TILES_READ_AND_WRITE;
  probabilities(scores, p, needed, number, seen, a->causal, a->scale, sums);
  TILES_READ_AND_WRITE;
  for (long i = 0; i < wide; i += COLUMNS) square(p, needed, values + i * up_to(S, 32), needed, out[0] + i, WIDEST);
  TILES_READ_AND_WRITE;
  for (long r = 0; r < number; r++) {
    for (long i = 0; i < K; i++) out[r][i] /= sums[r];
    store_all(o + r * a->H * K, out[r], K);
  }
}

// Attention of every query to the tokens of its sequence, or with `causal` to those up to its own. K even, up to 128.
void packed_attention(const queries *a, int threads) {
  long K = a->K, wide = up_to(K, 32), each = 2 * wide, heads = a->H / a->G, longest = 0, blocks = 0;
  for (long b = 0; b < a->B; b++) {
    long S = a->starts[b + 1] - a->starts[b];
    longest = S > longest ? S : longest;
    blocks += (S + QUERIES - 1) / QUERIES;
  }
#pragma omp parallel num_threads(threads)
  {
    take_tiles();
    long keys = up_to(longest, 32);
    float *scores = aligned_alloc(64, QUERIES * (keys * (4 + sizeof(cell)) + wide * sizeof(cell)));
    cell *p = (cell *)(scores + QUERIES * keys), *rows = p + QUERIES * keys;
#pragma omp for schedule(static)
    for (long g = 0; g < a->G; g++) {
      cell *to = a->room;
      for (long b = 0; b < a->B; b++) {
        long first = a->starts[b], S = a->starts[b + 1] - first, size = up_to(S, 32);
        put_keys(a, a->k + first * a->k_next + g * K, S, to + g * size * each);
        put_values(a, a->v + first * a->v_next + g * K, S, to + g * size * each + size * wide);
        to += a->G * size * each;
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (long task = 0; task < blocks * a->H; task++) { // a head's queries together: its keys stay cached
      long left = task, b = 0, S, size, n;
      cell *of = a->room;
      for (;; b++) {
        S = a->starts[b + 1] - a->starts[b], size = up_to(S, 32), n = (S + QUERIES - 1) / QUERIES;
        if (left < n * a->H) break;
        left -= n * a->H, of += a->G * size * each;
      }
      long h = left / n, t = left % n * QUERIES, at = a->starts[b] + t;
      const cell *k = of + h / heads * size * each;
      const uint16_t *q = a->q + at * a->q_next + h * K;
      some_queries(a, q, a->o + (at * a->H + h) * K, k, k + size * wide, t, S, rows, scores, p);
    }
    free(scores);
    release_tiles();
  }
}
