// A token for each of a few sequences through all layers of a decoder, in bf16 with weights of 16, 8 or 4 bits. One
// team of threads goes through all of it and meets after every product; a thread reads its share of each weight in two
// streams. step.py describes what it is given.
#include "vector.h"
#include "weight.c"
#include "pointwise.c"
#include "inputs.c"
#include "rows.c"
#include "product.c"
#include "attention.c"

typedef struct {
  const uint16_t *attn_norm, *q_norm, *k_norm, *mlp_norm; // of heads: none where the decoder has none
  matrix q, k, v, out, gate, up, down;
} layer;

typedef struct {
  long L, D, H, G, K; // layers, width, heads, key and value heads, head size
  float eps;
  const uint16_t *norm; // the last
  const layer *layers;
} decoder;

typedef struct {
  uint16_t *k, *v; // [L, slots, capacity, G, K]
  long slots, capacity;
} cache;

// A head [K]: normalised if there is a weight, turned by its position, in bf16.
static void turn(const float *x, const uint16_t *norm, const uint16_t *cos, const uint16_t *sin, uint16_t *y, long K,
                 float eps) {
  uint16_t plain[K];
  if (norm) normalise(x, norm, plain, K, eps);
  else store_all(plain, x, K);
  for (long i = 0; i < K; i += W) { // sin is negative in its first half
    floats across = load_bf16(plain + (i < K / 2 ? i + K / 2 : i - K / 2));
    floats turned = V(mul_ps)(load_bf16(plain + i), load_bf16(cos + i));
    store_bf16(y + i, V(fmadd_ps)(across, load_bf16(sin + i), turned));
  }
}

#define TOGETHER (W / 4) // heads whose sums of values fit the registers

// For each head, the sum of p times 32 values of every token, over its total.
INLINE void values_of(const int heads, const uint16_t *v, const uint16_t *new_v, long stride, long held, const float *p,
                      long room, const float *total, uint16_t *o, long K) {
  floats sums[TOGETHER][32 / W], of[32 / W];
  EACH(h, heads)
    EACH(i, 32 / W) sums[h][i] = V(setzero_ps)();
  for (long s = 0; s <= held; s++) {
    EACH(i, 32 / W) of[i] = load_bf16((s < held ? v + s * stride : new_v) + W * i);
    EACH(h, heads) {
      floats share = all_of(p[h * room + s]);
      EACH(i, 32 / W) sums[h][i] = V(fmadd_ps)(share, of[i], sums[h][i]);
    }
  }
  EACH(h, heads)
    EACH(i, 32 / W) store_bf16(o + h * K + W * i, V(div_ps)(sums[h][i], all_of(total[h])));
}

// Scores [heads, room] of q with the keys of `held` tokens and the new one; -inf behind.
static void scores_of(const decoder *d, const number *q, const uint16_t *k, const uint16_t *v, const uint16_t *new_k,
                      long held, long heads, float *scores, long room) {
  long K = d->K, stride = d->G * K;
  for (long s = 0; s < room; s += W) {
    for (long j = s; j < s + W; j++)
      for (long i = 0; i < K && j < held; i += 32) { // lines of 64 bytes, next to be read
        _mm_prefetch((const char *)(k + (j + W) * stride + i), _MM_HINT_T0);
        _mm_prefetch((const char *)(v + j * stride + i), _MM_HINT_T1);
      }
    for (long h = 0; h < heads; h++) {
      floats dots[W];
      for (int j = 0; j < W; j++) {
        const uint16_t *key = s + j < held ? k + (s + j) * stride : new_k;
        dots[j] = V(setzero_ps)();
        for (long i = 0; i < K; i += 2 * W) dots[j] = dot(dots[j], key + i, q + h * K + i);
      }
      V(storeu_ps)(scores + h * room + s, sums_of(dots));
    }
  }
  for (long h = 0; h < heads; h++)
    for (long s = held + 1; s < room; s++) scores[h * room + s] = -INFINITY;
}

// Heads that share keys and values: q and o [heads, K], over `held` tokens of the cache and the new one, whose key and
// value stand apart.
static void attend(const decoder *d, const number *q, const uint16_t *k, const uint16_t *v, const uint16_t *new_k,
                   const uint16_t *new_v, long held, long heads, uint16_t *o, float *scores) {
  long K = d->K, stride = d->G * K, room = up_to(held + 1, 16);
  float total[heads];
  scores_of(d, q, k, v, new_k, held, heads, scores, room);
  for (long h = 0; h < heads; h++) total[h] = exponentials(scores + h * room, room, 1 / sqrtf(K));
#define VALUES(n) values_of(n, v + i, new_v + i, stride, held, scores + h * room, room, total + h, o + h * K + i, K)
  for (long h = 0, some; h < heads; h += some) {
    some = heads - h < TOGETHER ? 1 : TOGETHER;
    for (long i = 0; i < K; i += 32) some > 1 ? VALUES(TOGETHER) : VALUES(1);
  }
}

// Attention of all sequences, by thread `t` of `threads`: whole groups of heads where there are enough, else heads.
static void attention(const decoder *d, const layer *w, const cache *c, long l, const float *qkv, const uint16_t *cos,
                      const uint16_t *sin, const long *lengths, long M, uint16_t *o, float *scores, int t,
                      int threads) {
  long H = d->H, G = d->G, K = d->K, each = H / G, part = M * G < threads ? 1 : each, width = (H + 2 * G) * K;
  for (long task = t; task < M * H / part; task += threads) {
    long m = task * part / H, h = task * part % H, g = h / each, held = lengths[m];
    const float *q = qkv + m * width + h * K, *k = qkv + m * width + (H + g) * K, *v = k + G * K;
    uint16_t query[K], key[K], value[K];
    number asked[part][K];
    for (long i = 0; i < part; i++) {
      turn(q + i * K, w->q_norm, cos + m * K, sin + m * K, query, K, d->eps);
      prepare_numbers(query, asked[i], K);
    }
    turn(k, w->k_norm, cos + m * K, sin + m * K, key, K, d->eps);
    store_all(value, v, K);
    long at = ((l * c->slots + m) * c->capacity * G + g) * K;
    if (h == g * each) {
      memcpy(c->k + at + held * G * K, key, sizeof key);
      memcpy(c->v + at + held * G * K, value, sizeof value);
    }
    attend(d, asked[0], c->k + at, c->v + at, key, value, held, part, o + (m * H + h) * K, scores);
  }
}

// x [M, D] in bf16 becomes what leaves the last norm. cos and sin [M, K] are those of the new tokens' positions,
// `lengths` [M] the tokens held before; the new keys and values are put behind them.
void decoder_step(const decoder *d, const cache *c, uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                  const long *lengths, long M, int threads) {
  long D = d->D, I = d->layers->down.K, most = 0, longest = 0, heads = (d->H + 2 * d->G) * d->K;
  for (long m = 0; m < M; m++) longest = lengths[m] > longest ? lengths[m] : longest;
  for (const matrix *w = &d->layers->q; w <= &d->layers->down; w++) most = w->K > most ? w->K : most;
  long prepared = padded(M) * prepared_room(most), rows = up_to(longest + 1, 16);
  float *stream = malloc(M * (D + heads) * sizeof(float)), *qkv = stream + M * D;
  uint16_t *seen = malloc(M * (d->H * d->K + I) * 2), *inner = seen + M * d->H * d->K;
  load_all(stream, x, M * D);
#pragma omp parallel num_threads(threads)
  {
    int t = omp_get_thread_num(), of = omp_get_num_threads();
    long halves = up_to(M * most * 2, 64), scales = scales_room(most, M), scores = d->H / d->G * rows;
    char *memory = aligned_alloc(64, up_to(halves + prepared + (scales + scores + 2 * M * (I / of + 32)) * 4, 64));
    inputs in = {(uint16_t *)memory, memory + halves, (float *)(memory + halves + prepared), 0};
    float *mine = in.scales + scales, *gates = mine + scores;
#define SHARE(n) (n) * t / of, (n) * (t + 1) / of
    for (long l = 0; l < d->L; l++) {
      const layer *w = d->layers + l;
      for (long m = 0; m < M; m++) normalise(stream + m * D, w->attn_norm, in.half + m * D, D, d->eps);
      for (const matrix *p = &w->q, *last = 0; p <= &w->v; last = p++) {
        float *to = qkv + (p > &w->q ? w->q.N : 0) + (p > &w->k ? w->k.N : 0);
        if (!last || last->kind != p->kind) prepare(p, &in, 0, M);
        product(M, p, &in, 0, SHARE(p->N), to, heads, 0);
      }
#pragma omp barrier
      attention(d, w, c, l, qkv, cos, sin, lengths, M, seen, mine, t, of);
#pragma omp barrier
      memcpy(in.half, seen, M * d->H * d->K * 2);
      prepare(&w->out, &in, 0, M);
      product(M, &w->out, &in, 0, SHARE(D), stream, D, 1);
#pragma omp barrier
      for (long m = 0; m < M; m++) normalise(stream + m * D, w->mlp_norm, in.half + m * D, D, d->eps);
      long from = I / 16 * t / of * 16, to = t + 1 == of ? I : I / 16 * (t + 1) / of * 16, share = to - from;
      float *gate = gates - from, *up = gate + M * share;
      prepare(&w->gate, &in, 0, M);
      product(M, &w->gate, &in, 0, from, to, gate, share, 0);
      if (w->up.kind != w->gate.kind) prepare(&w->up, &in, 0, M);
      product(M, &w->up, &in, 0, from, to, up, share, 0);
      for (long m = 0; m < M; m++)
        for (long i = from; i < to; i += W) {
          floats g = V(loadu_ps)(gate + m * share + i), u = V(loadu_ps)(up + m * share + i);
          store_bf16(inner + m * I + i, V(mul_ps)(times_sigmoid(g, g), u));
        }
#pragma omp barrier
      memcpy(in.half, inner, M * I * 2);
      prepare(&w->down, &in, 0, M);
      product(M, &w->down, &in, 0, SHARE(D), stream, D, 1);
#pragma omp barrier
    }
    free(memory);
  }
  for (long m = 0; m < M; m++) normalise(stream + m * D, d->norm, x + m * D, D, d->eps);
  free(stream);
  free(seen);
}
