// A token for each of up to four sequences through all layers of a decoder, in bf16 with 16-bit or 4-bit weights, on
// x86 CPUs that multiply bf16. One team of threads goes through all of it and meets after every product; a thread
// reads its share of each weight in two streams. step_cpu.py describes what it is given.
#include "nf4_cpu.c"
#include "pointwise_cpu.c"
#include "attention_cpu.c"
#include "product_cpu.c"

#ifdef FOR_BF16
typedef struct {
  const uint16_t *attn_norm, *q_norm, *k_norm, *mlp_norm; // of heads: none where the decoder has none
  matrix qkv, out, gate_up, down;
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

typedef struct { // of a thread
  inputs in;
  float *scores, *gate;
} scratch;

// A head [K]: normalised if there is a weight, turned by its position, in bf16.
FOR_BF16 static void turn(const float *x, const uint16_t *norm, const uint16_t *cos, const uint16_t *sin, uint16_t *y,
                          long K, float eps) {
  uint16_t plain[K];
  if (norm) normalise(x, norm, plain, K, eps);
  else
    for (long i = 0; i < K; i += 16) store_bf16(plain + i, V(loadu_ps)(x + i));
  for (long i = 0; i < K; i += 16) { // sin is negative in its first half
    floats across = load_bf16(plain + (i < K / 2 ? i + K / 2 : i - K / 2));
    floats turned = V(mul_ps)(load_bf16(plain + i), load_bf16(cos + i));
    store_bf16(y + i, V(fmadd_ps)(across, load_bf16(sin + i), turned));
  }
}

// The 16 sums of 16 registers: halves are added until a register holds one number of each.
FOR_BF16 INLINE floats sums_of(const floats *v) {
  floats two[8], four[4];
  for (int i = 0; i < 8; i++)
    two[i] = V(add_ps)(V(unpacklo_ps)(v[2 * i], v[2 * i + 1]), V(unpackhi_ps)(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    __m512d a = (__m512d)two[2 * i], b = (__m512d)two[2 * i + 1];
    four[i] = V(add_ps)((floats)V(unpacklo_pd)(a, b), (floats)V(unpackhi_pd)(a, b));
  }
#define EVEN_ODD(a, b) V(add_ps)(V(shuffle_f32x4)(a, b, 0x88), V(shuffle_f32x4)(a, b, 0xdd))
  return EVEN_ODD(EVEN_ODD(four[0], four[1]), EVEN_ODD(four[2], four[3]));
}

// For each head, the sum of p times the first 16 * parts values of every token, over its total.
FOR_BF16 INLINE void values_of(const int heads, const int parts, const uint16_t *v, const uint16_t *new_v, long stride,
                               long held, const float *p, long room, const float *total, uint16_t *o, long K) {
  floats sums[4][4];
  for (int h = 0; h < heads; h++)
    for (int i = 0; i < parts; i++) sums[h][i] = V(setzero_ps)();
  for (long s = 0; s <= held; s++) {
    const uint16_t *at = s < held ? v + s * stride : new_v;
    floats of[4];
#pragma GCC unroll 4
    for (int i = 0; i < parts; i++) of[i] = load_bf16(at + 16 * i);
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
      floats share = V(set1_ps)(p[h * room + s]);
#pragma GCC unroll 4
      for (int i = 0; i < parts; i++) sums[h][i] = V(fmadd_ps)(share, of[i], sums[h][i]);
    }
  }
  for (int h = 0; h < heads; h++)
    for (int i = 0; i < parts; i++) store_bf16(o + h * K + 16 * i, V(div_ps)(sums[h][i], V(set1_ps)(total[h])));
}

// Heads that share keys and values: q and o [heads, K] in bf16, over `held` tokens of the cache and the new one, whose
// key and value stand apart.
FOR_BF16 static void attend(const decoder *d, const uint16_t *q, const uint16_t *k, const uint16_t *v,
                            const uint16_t *new_k, const uint16_t *new_v, long held, long heads, uint16_t *o,
                            float *scores) {
  long K = d->K, stride = d->G * K, room = (held + 16) / 16 * 16;
  floats scale = V(set1_ps)(1 / sqrtf(K)), none = V(set1_ps)(-INFINITY);
  float total[heads];
  for (long s = 0; s < room; s += 16) {
    for (long j = s; j < s + 16; j++)
      for (long i = 0; i < K && j < held; i += 32) { // lines of 64 bytes, next to be read
        _mm_prefetch((const char *)(k + (j + 16) * stride + i), _MM_HINT_T0);
        _mm_prefetch((const char *)(v + j * stride + i), _MM_HINT_T1);
      }
    for (long h = 0; h < heads; h++) {
      floats dots[16];
      for (int j = 0; j < 16; j++) {
        const uint16_t *key = s + j < held ? k + (s + j) * stride : new_k;
        dots[j] = V(setzero_ps)();
        for (long i = 0; i < K; i += 32) {
          __m512bh of = (__m512bh)_mm512_loadu_si512(q + h * K + i);
          dots[j] = _mm512_dpbf16_ps(dots[j], (__m512bh)_mm512_loadu_si512(key + i), of);
        }
      }
      __mmask16 there = held - s < 15 ? (1 << (held - s + 1)) - 1 : 0xffff;
      V(storeu_ps)(scores + h * room + s, V(mask_mul_ps)(none, there, sums_of(dots), scale));
    }
  }
  for (long h = 0; h < heads; h++) {
    float *p = scores + h * room;
    floats most = none, sums = V(setzero_ps)();
    for (long s = 0; s < room; s += 16) most = V(max_ps)(most, V(loadu_ps)(p + s));
    most = V(set1_ps)(V(reduce_max_ps)(most));
    for (long s = 0; s < room; s += 16) {
      floats some = exponential(V(sub_ps)(V(loadu_ps)(p + s), most));
      V(storeu_ps)(p + s, some);
      sums = V(add_ps)(sums, some);
    }
    total[h] = sum(sums);
  }
#define VALUES(heads, parts) \
  values_of(heads, parts, v + i, new_v + i, stride, held, p, room, total + h, o + h * K + i, K)
  for (long h = 0, some; h < heads; h += some) {
    const float *p = scores + h * room;
    some = heads - h < 4 ? 1 : 4;
    for (long i = 0; i < K; i += 64) {
      if (K - i < 64) { if (some == 4) VALUES(4, 2); else VALUES(1, 2); }
      else if (some == 4) VALUES(4, 4);
      else VALUES(1, 4);
    }
  }
}

// Attention of all sequences, by thread `t` of `threads`: whole groups of heads where there are enough, else heads.
FOR_BF16 static void attention(const decoder *d, const layer *w, const cache *c, long number, const float *qkv,
                               const uint16_t *cos, const uint16_t *sin, const long *lengths, long M, uint16_t *o,
                               float *scores, int t, int threads) {
  long H = d->H, G = d->G, K = d->K, each = H / G, part = M * G < threads ? 1 : each, width = (H + 2 * G) * K;
  for (long task = t; task < M * H / part; task += threads) {
    long m = task * part / H, h = task * part % H, g = h / each, held = lengths[m];
    const float *q = qkv + m * width + h * K, *k = qkv + m * width + (H + g) * K, *v = k + G * K;
    uint16_t queries[part][K], key[K], value[K];
    for (long i = 0; i < part; i++) turn(q + i * K, w->q_norm, cos + m * K, sin + m * K, queries[i], K, d->eps);
    turn(k, w->k_norm, cos + m * K, sin + m * K, key, K, d->eps);
    for (long i = 0; i < K; i += 16) store_bf16(value + i, V(loadu_ps)(v + i));
    long at = ((number * c->slots + m) * c->capacity * G + g) * K;
    if (h == g * each) {
      __builtin_memcpy(c->k + at + held * G * K, key, sizeof key);
      __builtin_memcpy(c->v + at + held * G * K, value, sizeof value);
    }
    attend(d, queries[0], c->k + at, c->v + at, key, value, held, part, o + (m * H + h) * K, scores);
  }
}

// x [M, D] in bf16 becomes what leaves the last norm. cos and sin [M, K] are those of the new tokens' positions,
// `lengths` [M] the tokens held before; the new keys and values are put behind them.
FOR_BF16 void decoder_step(const decoder *d, const cache *c, uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                          const long *lengths, long M, int threads) {
  long D = d->D, I = d->layers->down.K, most = 0, longest = 0, heads = (d->H + 2 * d->G) * d->K;
  for (long m = 0; m < M; m++) longest = lengths[m] > longest ? lengths[m] : longest;
  for (const matrix *w = &d->layers->qkv; w <= &d->layers->down; w++) most = w->K > most ? w->K : most;
  long padded = (most + 127) / 128 * 128, rows = (longest + 16) / 16 * 16;
  float *stream = malloc(M * (D + heads) * sizeof(float)), *qkv = stream + M * D;
  uint16_t *seen = malloc(M * (d->H * d->K + I) * 2), *inner = seen + M * d->H * d->K;
  for (long i = 0; i < M * D; i++) stream[i] = whole(x[i]);
#pragma omp parallel num_threads(threads)
  {
    int t = omp_get_thread_num(), of = omp_get_num_threads();
    long room = scales_room(padded), floats_ = room + d->H / d->G * rows + 2 * M * (I / of + 32);
    char *memory = aligned_alloc(64, (2 * M * padded * 2 + floats_ * 4 + 63) / 64 * 64);
    scratch s = {.in = {.ordered = (uint16_t *)memory, .half = (uint16_t *)memory + M * padded}};
    s.in.scales = (float *)(memory + 2 * M * padded * 2);
    s.scores = s.in.scales + room;
    s.gate = s.scores + d->H / d->G * rows;
#define SHARE(n) (n) * t / of, (n) * (t + 1) / of
    for (long l = 0; l < d->L; l++) {
      const layer *w = d->layers + l;
      for (long m = 0; m < M; m++) normalise(stream + m * D, w->attn_norm, s.in.half + m * D, D, d->eps);
      product(M, &w->qkv, &s.in, SHARE(heads), qkv, heads, 0);
#pragma omp barrier
      attention(d, w, c, l, qkv, cos, sin, lengths, M, seen, s.scores, t, of);
#pragma omp barrier
      __builtin_memcpy(s.in.half, seen, M * d->H * d->K * 2);
      product(M, &w->out, &s.in, SHARE(D), stream, D, 1);
#pragma omp barrier
      for (long m = 0; m < M; m++) normalise(stream + m * D, w->mlp_norm, s.in.half + m * D, D, d->eps);
      long from = I / 16 * t / of * 16, to = t + 1 == of ? I : I / 16 * (t + 1) / of * 16, mine = to - from;
      float *gate = s.gate - from, *up = gate + M * mine;
      product(M, &w->gate_up, &s.in, from, to, gate, mine, 0);
      product(M, &w->gate_up, &s.in, I + from, I + to, up - I, mine, 0);
      for (long m = 0; m < M; m++)
        for (long i = from; i < to; i += 16) {
          floats g = V(loadu_ps)(gate + m * mine + i), u = V(loadu_ps)(up + m * mine + i);
          store_bf16(inner + m * I + i, V(mul_ps)(times_sigmoid(g, g), u));
        }
#pragma omp barrier
      __builtin_memcpy(s.in.half, inner, M * I * 2);
      product(M, &w->down, &s.in, SHARE(D), stream, D, 1);
#pragma omp barrier
    }
    free(memory);
  }
  for (long m = 0; m < M; m++) normalise(stream + m * D, d->norm, x + m * D, D, d->eps);
  free(stream);
  free(seen);
}
#endif
