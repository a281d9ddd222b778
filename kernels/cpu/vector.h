// What differs between AVX2, AVX-512 and what came after: registers, bf16, products of bytes. All other C code is
// written once over these and compiled for the CPU at hand (library.py).
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++) // n known where it is compiled
#define AHEAD 4096 // bytes of weights fetched before they are read (bench/LOG.md)

#ifdef __AVX512F__
#define W 16 // floats of a register
#define SIZE 64 // its bytes
#define V(op) _mm512_##op
#define BITS(op) _mm512_##op##_si512
typedef __m512 floats;
typedef __m512i ints;
typedef __m512d doubles;
INLINE ints words_of_bytes(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE ints words_of_halves(const void *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE void store_halves(void *p, ints words) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(words)); }
INLINE float sum(floats v) { return _mm512_reduce_add_ps(v); }
INLINE float largest(floats v) { return _mm512_reduce_max_ps(v); }
INLINE floats half_each(float a, float b) { return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b)); }
typedef struct { floats low, high; } table; // of 16 floats: all in the first register, or half
INLINE floats look_up(table t, ints i) { return _mm512_permutexvar_ps(i, t.low); } // by the low four bits
INLINE ints bytes8(const void *p) { return _mm512_set1_epi64(*(const long long *)p); }
INLINE ints bytes16(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(p)); }
INLINE void store_spans(char *p, ints a, ints b) { // 32 bytes of each, and again
  _mm512_storeu_si512(p, _mm512_shuffle_i64x2(a, b, 0x44));
  _mm512_storeu_si512(p + 64, _mm512_shuffle_i64x2(a, b, 0xee));
}

#else
#define W 8
#define SIZE 32
#define V(op) _mm256_##op
#define BITS(op) _mm256_##op##_si256
typedef __m256 floats;
typedef __m256i ints;
typedef __m256d doubles;
INLINE ints words_of_bytes(const void *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
INLINE ints words_of_halves(const void *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }
INLINE void store_halves(void *p, ints words) { // of 16 bits
  _mm_storeu_si128(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08)));
}
#define HALVED(op, v) \
  __m128 four = op(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); \
  four = op(four, _mm_movehl_ps(four, four)); \
  return _mm_cvtss_f32(op(four, _mm_movehdup_ps(four)));
INLINE float sum(floats v) { HALVED(_mm_add_ps, v) }
INLINE float largest(floats v) { HALVED(_mm_max_ps, v) }
#define half_each(a, b) _mm256_set1_ps(a)
typedef struct { floats low, high; } table;
INLINE floats look_up(table t, ints i) { // by the low three bits, and bit 3 shifted to where the sign is
  floats low = _mm256_permutevar8x32_ps(t.low, i), high = _mm256_permutevar8x32_ps(t.high, i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
INLINE ints bytes8(const void *p) { return _mm256_set1_epi64x(*(const long long *)p); }
INLINE ints bytes16(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(p)); }
INLINE void store_spans(char *p, ints a, ints b) {
  _mm256_storeu_si256((ints *)p, a);
  _mm256_storeu_si256((ints *)(p + 32), b);
}
#endif

// Lane i: the sum of register i of W. Halves are added until a register holds one number of each.
INLINE floats sums_of(const floats *v) {
  floats two[W / 2], four[W / 4];
  for (int i = 0; i < W / 2; i++)
    two[i] = V(add_ps)(V(unpacklo_ps)(v[2 * i], v[2 * i + 1]), V(unpackhi_ps)(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < W / 4; i++) {
    doubles a = (doubles)two[2 * i], b = (doubles)two[2 * i + 1];
    four[i] = V(add_ps)((floats)V(unpacklo_pd)(a, b), (floats)V(unpackhi_pd)(a, b));
  }
#ifdef __AVX512F__
#define EVEN_ODD(a, b) V(add_ps)(V(shuffle_f32x4)(a, b, 0x88), V(shuffle_f32x4)(a, b, 0xdd))
  return EVEN_ODD(EVEN_ODD(four[0], four[1]), EVEN_ODD(four[2], four[3]));
#else
  return V(add_ps)(V(permute2f128_ps)(four[0], four[1], 0x20), V(permute2f128_ps)(four[0], four[1], 0x31));
#endif
}

INLINE ints load(const void *p) {
  ints v;
  memcpy(&v, p, SIZE);
  return v;
}
INLINE void store(void *p, ints v) { memcpy(p, &v, SIZE); }
INLINE floats all_of(float value) { return V(set1_ps)(value); }

// ---- bf16: what is in memory; numbers are what it is multiplied by ----

INLINE float whole(uint16_t half) { return _mm_cvtss_f32((__m128)_mm_cvtsi32_si128((int)((uint32_t)half << 16))); }

typedef struct { floats even, odd; } pair; // 2 W neighbours
INLINE pair halves(ints v) { // of 2 W numbers in bf16
  return (pair){(floats)(V(slli_epi32)(v, 16)), (floats)(BITS(and)(v, V(set1_epi32)((int)0xffff0000)))};
}
INLINE ints rounded(floats v) { // to bf16 in the upper half: to the nearest, ties to even
  ints odd = BITS(and)(V(srli_epi32)((ints)(v), 16), V(set1_epi32)(1));
  return V(add_epi32)((ints)(v), V(add_epi32)(odd, V(set1_epi32)(0x7fff)));
}
INLINE ints joined(pair v) { // to bf16, in their order
  ints odd = BITS(and)(rounded(v.odd), V(set1_epi32)((int)0xffff0000));
  return BITS(or)(V(srli_epi32)(rounded(v.even), 16), odd);
}

INLINE floats load_bf16(const uint16_t *p) { return (floats)(V(slli_epi32)(words_of_halves(p), 16)); }
INLINE void store_bf16(uint16_t *p, floats v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
  store_halves(p, V(srli_epi32)(rounded(v), 16));
#endif
}
INLINE uint16_t half(float value) {
  uint16_t of[W];
  store_bf16(of, all_of(value));
  return of[0];
}

INLINE void store_pair(float *y, pair v) { // in their order
  floats low = V(unpacklo_ps)(v.even, v.odd), high = V(unpackhi_ps)(v.even, v.odd); // of each 128 bits
  EACH(i, W / 4) {
    _mm_storeu_ps(y + 8 * i, ((__m128 *)&low)[i]);
    _mm_storeu_ps(y + 8 * i + 4, ((__m128 *)&high)[i]);
  }
}

static inline void load_all(float *y, const uint16_t *x, long n) {
  for (; n >= W; n -= W, x += W, y += W) V(storeu_ps)(y, load_bf16(x));
  for (; n > 0; n--) *y++ = whole(*x++);
}
static inline void store_all(uint16_t *y, const float *x, long n) {
  for (; n >= W; n -= W, x += W, y += W) store_bf16(y, V(loadu_ps)(x));
  for (; n > 0; n--) *y++ = half(*x++);
}

static void evens_first(const uint16_t *x, float *y, long n) { // in fp32, of 2 W the even ones first; whole 2 Ws
  for (long i = 0; i < n; i += 2 * W) {
    pair of = halves(load(x + i));
    V(storeu_ps)(y + i, of.even);
    V(storeu_ps)(y + i + W, of.odd);
  }
}
static void even_floats(const float *x, float *y, long n) { // the same order
  for (long i = 0; i < n; i++) y[i / (2 * W) * 2 * W + i % 2 * W + i % (2 * W) / 2] = x[i];
}
#ifdef __AVX512BF16__
typedef uint16_t number; // as it is
INLINE floats dot(floats acc, const uint16_t *a, const number *x) { // of 2 W
  return _mm512_dpbf16_ps(acc, (__m512bh)load(a), (__m512bh)load(x));
}
static void prepare_numbers(const uint16_t *x, number *y, long n) { memcpy(y, x, n * 2); }
#else
typedef float number;
INLINE floats dot(floats acc, const uint16_t *a, const number *x) {
  pair of = halves(load(a));
  return V(fmadd_ps)(of.odd, V(loadu_ps)(x + W), V(fmadd_ps)(of.even, V(loadu_ps)(x), acc));
}
#define prepare_numbers evens_first
#endif

// ---- products of bytes: weights have OFFSET added where the instruction wants one side without sign ----

// acc += w x by an instruction: in assembler, as gcc copies sums beside its own intrinsics or where they change types.
#define SUMMED(instruction) __asm__(instruction " %2, %1, %0" : "+v"(acc) : "v"(w), "vm"(x)); return acc;
INLINE ints add_product(ints acc, ints w, ints x) { SUMMED("vfmadd231ps") } // in fp32

#ifdef __AVX512BF16__
INLINE ints dot_words(ints acc, ints w, ints x) { SUMMED("vdpbf16ps") } // of pairs in bf16, in fp32
#else
#define dot_words add_product // where no inputs are in pairs
#endif

#ifdef __AVX512VNNI__
#define OFFSET 128
INLINE ints dot_bytes(ints acc, ints w, ints x) { SUMMED("vpdpbusd") }
#elif defined __AVXVNNI__
#define OFFSET 128
INLINE ints dot_bytes(ints acc, ints w, ints x) { SUMMED("%{vex%} vpdpbusd") }
#else
#define OFFSET 0 // both in -127 to 127, so that two products fit 16 bits
INLINE ints dot_bytes(ints acc, ints w, ints x) {
  ints two, size = V(abs_epi8)(x), ones = V(set1_epi16)(1); // of x, which is multiplied by many w
#ifdef __AVX512F__
  w = _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), BITS(setzero)(), w);
#else
  w = _mm256_sign_epi8(w, x);
#endif
  __asm__("vpmaddubsw %3, %2, %1\n vpmaddwd %4, %1, %1\n vpaddd %1, %0, %0"
          : "+v"(acc), "=&v"(two) : "v"(size), "v"(w), "vm"(ones));
  return acc;
}
#endif
INLINE ints dot_shorts(ints acc, ints w, ints x) { // of pairs in 16 bits
  ints two;
  __asm__("vpmaddwd %3, %2, %1\n vpaddd %1, %0, %0" : "+v"(acc), "=&v"(two) : "v"(w), "vm"(x));
  return acc;
}
// What OFFSET adds in sums of n registers of x, less than nothing.
INLINE ints offset_of(const void *x, int n, long apart) {
  ints all = BITS(setzero)();
  for (int i = 0; i < n && OFFSET; i++)
    all = V(sub_epi32)(all, dot_bytes(BITS(setzero)(), V(set1_epi8)((char)OFFSET), load((const char *)x + i * apart)));
  return all;
}

// The largest magnitude of x [n], whole Ws; no number if one of x is none.
INLINE float magnitude(const float *x, long n) {
  floats most = V(setzero_ps)(), none = V(setzero_ps)();
  for (long i = 0; i < n; i += W) {
    floats of = V(loadu_ps)(x + i);
    most = V(max_ps)(most, V(max_ps)(of, V(sub_ps)(V(setzero_ps)(), of)));
    none = V(fmadd_ps)(of, V(setzero_ps)(), none);
  }
  return largest(most) + sum(none);
}

// ---- e^x ----

// e^x to 2e-7 of itself, 0 below -88 and infinite above 88.7: 2^n times a polynomial of what is left.
INLINE floats exponential(floats x) {
  x = V(min_ps)(all_of(88.8f), V(max_ps)(all_of(-88.f), x)); // of two, what is no number is kept where it is second
  ints power = V(cvtps_epi32)(V(mul_ps)(x, all_of(1.44269504f))); // the nearest
  floats n = V(cvtepi32_ps)(power);
  floats r = V(fnmadd_ps)(n, all_of(1.42860677e-6f), V(fnmadd_ps)(n, all_of(0.693145752f), x));
  floats p = all_of(1.f / 720);
  const float more[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1, 1};
  EACH(i, 6) p = V(fmadd_ps)(p, r, all_of(more[i]));
  return V(mul_ps)(p, (floats)V(slli_epi32)(V(add_epi32)(power, V(set1_epi32)(127)), 23));
}

// Numbers x [n] become e^(scale x), each as a share of the largest; returns their sum. n in whole Ws.
static float exponentials(float *x, long n, float scale) {
  floats most = all_of(-INFINITY), sums = V(setzero_ps)(), by = all_of(scale);
  for (long i = 0; i < n; i += W) most = V(max_ps)(most, V(loadu_ps)(x + i));
  most = V(mul_ps)(all_of(largest(most)), by);
  for (long i = 0; i < n; i += W) {
    floats some = exponential(V(fmsub_ps)(V(loadu_ps)(x + i), by, most));
    V(storeu_ps)(x + i, some);
    sums = V(add_ps)(sums, some);
  }
  return sum(sums);
}

// x / (1 + e^-by).
INLINE floats times_sigmoid(floats x, floats by) {
  return V(div_ps)(x, V(add_ps)(all_of(1), exponential(V(sub_ps)(V(setzero_ps)(), by))));
}
