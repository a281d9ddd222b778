// Attention of packed sequences in bf16 for inference, in fp32 where that is not multiplied: see attention.py.
// Scores of some queries and all their keys lie in the cache: no running maximum, nothing is scaled twice.

#define WIDEST 128 // numbers of a head
#define QUERIES (4 * TILE(ROWS_AT_ONCE))
#define CELLS (sizeof(number) == 2 ? WORDS : FLOATS)
#define COLUMNS ROWS_AT_ONCE
#define PAIR (4 / (int)sizeof(number)) // of a lane

#ifdef __AMX_BF16__ // tiles: eight of 16 rows of 64 bytes for each thread
#include <sys/syscall.h>
#include <unistd.h>

#define TILES_READ_AND_WRITE __asm__ volatile("" ::: "memory") // which gcc does not know

// Whether the system lets this process use them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static void take_tiles(void) {
  struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape = {.palette = 1};
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
  _tile_loadconfig(&shape);
}
#else
#define TILES_READ_AND_WRITE
#define take_tiles()
#define _tile_release()
#endif

typedef struct {
  const uint16_t *q, *k, *v;               // [T, H, K], [T, G, K] twice, heads end to end
  uint16_t *o;                             // [T, H, K]
  number *room;                            // [G, 2 K] for each token, tokens and K in whole 32s
  const long *starts;                      // [B + 1]
  long B, H, G, K, q_next, k_next, v_next; // numbers from a token to the next
  float scale;
  int causal;
} queries;

static void put_numbers(number *to, const uint16_t *x, long n) {
  if (sizeof(number) == 2) memcpy(to, x, n * 2);
  else load_all((float *)to, x, n);
}

// Keys of a head, by COLUMNS tokens [K / PAIR, COLUMNS, PAIR].
static void put_keys(const queries *a, const uint16_t *k, long S, number *to) {
  for (long s = 0; s < up_to(S, 32); s += COLUMNS, to += COLUMNS * up_to(a->K, 32))
    in_lanes(COLUMNS, CELLS, 0, k + s * a->k_next, 0, a->k_next, S - s < COLUMNS ? S - s : COLUMNS, a->K, (char *)to);
}

// Values of a head, by COLUMNS outputs [S / PAIR, COLUMNS, PAIR].
static void put_values(const queries *a, const uint16_t *v, long S, number *to) {
  for (long i = 0; i < up_to(a->K, 32); i += COLUMNS, to += COLUMNS * up_to(S, 32))
    for (long s = 0; s < up_to(S, 32); s++) {
      number row[COLUMNS] = {0};
      if (s < S && i < a->K) put_numbers(row, v + s * a->v_next + i, a->K - i < COLUMNS ? a->K - i : COLUMNS);
      for (long j = 0; j < COLUMNS; j++) to[(s / PAIR * COLUMNS + j) * PAIR + s % PAIR] = row[j];
    }
}

// c [QUERIES, COLUMNS] = a [QUERIES, depth] b.
static void square(const number *a, long a_next, const number *b, long depth, float *c, long c_next) {
#ifdef __AMX_BF16__
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (long i = 0; i < depth; i += 32, b += 1024) {
    _tile_loadd(4, a + i, 2 * a_next);
    _tile_loadd(5, a + i + 16 * a_next, 2 * a_next);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 32, 128);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * c_next);
  _tile_stored(1, c + 16, 4 * c_next);
  _tile_stored(2, c + 16 * c_next, 4 * c_next);
  _tile_stored(3, c + 16 * c_next + 16, 4 * c_next);
#else
  for (long r = 0; r < QUERIES; r++) memset(c + r * c_next, 0, COLUMNS * sizeof *c);
  for (long r = 0; r < QUERIES; r += TILE(COLUMNS)) {
    const char *rows = (const char *)(a + r * a_next);
    tile(COLUMNS, CELLS, (char *)b, rows, a_next * sizeof *a, c, depth, c + r * c_next, c_next, 0, 0, 0);
  }
#endif
}

// QUERIES or fewer of a head from t on, of a sequence of S tokens.
static void some_queries(const queries *a, const uint16_t *q, uint16_t *o, const number *keys, const number *values,
                         long t, long S, number *rows, float *scores, number *p) {
  long K = a->K, wide = up_to(K, 32), some = S - t < QUERIES ? S - t : QUERIES, seen = a->causal ? t + 1 : S;
  long needed = up_to(a->causal ? t + some : S, 32);
  float sums[QUERIES], out[QUERIES][WIDEST];
  memset(rows, 0, QUERIES * wide * sizeof *rows);
  for (long r = 0; r < some; r++) put_numbers(rows + r * wide, q + r * a->q_next, K);
  TILES_READ_AND_WRITE;
  for (long s = 0; s < needed; s += COLUMNS) square(rows, wide, keys + s * wide, wide, scores + s, needed);
  TILES_READ_AND_WRITE;
  for (long r = 0; r < some; r++, seen += a->causal) {
    float *of = scores + r * needed;
    for (long s = seen; s < needed; s++) of[s] = -INFINITY;
    sums[r] = exponentials(of, needed, a->scale);
    if (sizeof(number) == 2) store_all((uint16_t *)p + r * needed, of, needed);
  }
  TILES_READ_AND_WRITE;
  for (long i = 0; i < wide; i += COLUMNS) square(p, needed, values + i * up_to(S, 32), needed, out[0] + i, WIDEST);
  TILES_READ_AND_WRITE;
  for (long r = 0; r < some; r++) {
    for (long i = 0; i < K; i++) out[r][i] /= sums[r];
    store_all(o + r * a->H * K, out[r], K);
  }
}

static long tokens_of(const queries *a, long b) { return a->starts[b + 1] - a->starts[b]; }
static number *room_of(const queries *a, long b, long g) { // for keys of a group's head in sequence b; then for values
  long before = g * up_to(tokens_of(a, b), 32);
  for (long i = 0; i < b; i++) before += a->G * up_to(tokens_of(a, i), 32);
  return a->room + before * 2 * up_to(a->K, 32);
}

// Attention of every query to the tokens of its sequence, or with `causal` to those up to its own. K even, up to 128.
void packed_attention(const queries *a, int threads) {
  long K = a->K, wide = up_to(K, 32), keys = 0;
  for (long b = 0; b < a->B; b++) keys = tokens_of(a, b) > keys ? up_to(tokens_of(a, b), 32) : keys;
#pragma omp parallel num_threads(threads)
  {
    take_tiles();
    float *scores = aligned_alloc(64, QUERIES * (keys * 6 + wide * 4));
    number *p = (number *)(sizeof(number) == 2 ? scores + QUERIES * keys : scores), *rows = p + QUERIES * keys;
#pragma omp for schedule(static)
    for (long task = 0; task < a->B * a->G; task++) {
      long b = task / a->G, g = task % a->G, first = a->starts[b], S = tokens_of(a, b);
      put_keys(a, a->k + first * a->k_next + g * K, S, room_of(a, b, g));
      put_values(a, a->v + first * a->v_next + g * K, S, room_of(a, b, g) + up_to(S, 32) * wide);
    }
#pragma omp for schedule(dynamic)
    for (long task = 0; task < a->B * a->H; task++) { // a head's queries together: its keys stay cached
      long b = task / a->H, h = task % a->H, S = tokens_of(a, b);
      const number *k = room_of(a, b, h * a->G / a->H);
      for (long t = 0, at = a->starts[b]; t < S; t += QUERIES, at += QUERIES) {
        const uint16_t *q = a->q + at * a->q_next + h * K;
        some_queries(a, q, a->o + (at * a->H + h) * K, k, k + up_to(S, 32) * wide, t, S, rows, scores, p);
      }
    }
    free(scores);
    _tile_release();
  }
}
