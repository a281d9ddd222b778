// Norms and activations in bf16, each number read and written once.

// x / rms(x), rounded, and then times the weight.
static void normalise(const float *x, const uint16_t *w, uint16_t *y, long n, float eps) {
  floats squares = V(setzero_ps)();
  for (long i = 0; i < n; i += W) squares = V(fmadd_ps)(V(loadu_ps)(x + i), V(loadu_ps)(x + i), squares);
  floats scale = all_of(1 / sqrtf(sum(squares) / n + eps));
  for (long i = 0; i < n; i += W) {
    store_bf16(y + i, V(mul_ps)(V(loadu_ps)(x + i), scale));
    store_bf16(y + i, V(mul_ps)(load_bf16(y + i), load_bf16(w + i)));
  }
}

// y [N, D] = x / rms(x) * w in bf16; D in whole 16s.
void rms_norm(const uint16_t *x, const uint16_t *w, uint16_t *y, long N, long D, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long n = 0; n < N; n++) {
    float row[D];
    load_all(row, x + n * D, D);
    normalise(row, w, y + n * D, D, eps);
  }
}

// y [N, D] = silu(gate) * up in bf16, where rows of gate and up are `stride` apart; D in whole 16s.
void swiglu(const uint16_t *gate, const uint16_t *up, uint16_t *y, long N, long D, long stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long n = 0; n < N; n++)
    for (long i = 0; i < D; i += W) {
      floats g = load_bf16(gate + n * stride + i);
      store_bf16(y + n * D + i, V(mul_ps)(times_sigmoid(g, g), load_bf16(up + n * stride + i)));
    }
}

// y [N] = x / (1 + e^-1.702x) in bf16; N in whole 16s.
void quick_gelu(const uint16_t *x, uint16_t *y, long N, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < N; i += W) {
    floats of = load_bf16(x + i);
    store_bf16(y + i, times_sigmoid(of, V(mul_ps)(of, all_of(1.702f))));
  }
}
