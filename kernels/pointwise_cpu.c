// Norms and activations in bf16, each number read and written once, on x86 CPUs with AVX512_BF16.
#ifdef FOR_BF16
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

FOR_BF16 INLINE floats load_bf16(const uint16_t *p) {
  return (floats)V(slli_epi32)(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}

FOR_BF16 INLINE void store_bf16(uint16_t *p, floats v) {
  _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
}

// e^x to 2e-7 of itself, infinite above 88: 2^n times a polynomial of what is left.
FOR_BF16 INLINE floats exponential(floats x) {
  x = V(min_ps)(V(max_ps)(x, V(set1_ps)(-126)), V(set1_ps)(126));
  floats n = _mm512_roundscale_ps(V(mul_ps)(x, V(set1_ps)(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  floats r = V(fnmadd_ps)(n, V(set1_ps)(1.42860677e-6f), V(fnmadd_ps)(n, V(set1_ps)(0.693145752f), x));
  floats p = V(set1_ps)(1.f / 720);
  p = V(fmadd_ps)(p, r, V(set1_ps)(1.f / 120));
  p = V(fmadd_ps)(p, r, V(set1_ps)(1.f / 24));
  p = V(fmadd_ps)(p, r, V(set1_ps)(1.f / 6));
  p = V(fmadd_ps)(p, r, V(set1_ps)(0.5f));
  p = V(fmadd_ps)(p, r, V(set1_ps)(1));
  p = V(fmadd_ps)(p, r, V(set1_ps)(1));
  return _mm512_scalef_ps(p, n);
}

// x / (1 + e^-by).
FOR_BF16 INLINE floats times_sigmoid(floats x, floats by) {
  return V(div_ps)(x, V(add_ps)(V(set1_ps)(1), exponential(V(sub_ps)(V(setzero_ps)(), by))));
}

// x / rms(x), rounded, and then times the weight.
FOR_BF16 static void normalise(const float *x, const uint16_t *w, uint16_t *y, long n, float eps) {
  floats squares = V(setzero_ps)();
  for (long i = 0; i < n; i += 16) squares = V(fmadd_ps)(V(loadu_ps)(x + i), V(loadu_ps)(x + i), squares);
  floats scale = V(set1_ps)(1 / sqrtf(sum(squares) / n + eps));
  for (long i = 0; i < n; i += 16) {
    store_bf16(y + i, V(mul_ps)(V(loadu_ps)(x + i), scale));
    store_bf16(y + i, V(mul_ps)(load_bf16(y + i), load_bf16(w + i)));
  }
}

// y [N, D] = x / rms(x) * w in bf16; D in whole 16s.
FOR_BF16 void rms_norm(const uint16_t *x, const uint16_t *w, uint16_t *y, long N, long D, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long n = 0; n < N; n++) {
    float row[D];
    for (long i = 0; i < D; i += 16) V(storeu_ps)(row + i, load_bf16(x + n * D + i));
    normalise(row, w, y + n * D, D, eps);
  }
}

// y [N, D] = silu(gate) * up in bf16, where rows of gate and up are `stride` apart; D in whole 16s.
FOR_BF16 void swiglu(const uint16_t *gate, const uint16_t *up, uint16_t *y, long N, long D, long stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long n = 0; n < N; n++)
    for (long i = 0; i < D; i += 16) {
      floats g = load_bf16(gate + n * stride + i);
      store_bf16(y + n * D + i, V(mul_ps)(times_sigmoid(g, g), load_bf16(up + n * stride + i)));
    }
}

// y [N] = x / (1 + e^-1.702x) in bf16; N in whole 16s.
FOR_BF16 void quick_gelu(const uint16_t *x, uint16_t *y, long N, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < N; i += 16) {
    floats of = load_bf16(x + i);
    store_bf16(y + i, times_sigmoid(of, V(mul_ps)(of, V(set1_ps)(1.702f))));
  }
}
#endif
