#pragma once

// Vectors of float for the kernels of this folder. Every source here is compiled once per instruction set, with
// BASED_ISA naming the namespace; so nothing here may have external linkage outside that namespace: no standard
// library inline functions, or the linker might keep a copy that the machine cannot run.

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "io/half.h"

#ifndef BASED_ISA
#error "BASED_ISA names the instruction set: see CMakeLists.txt"
#endif

#define BASED_INLINE static inline __attribute__((always_inline))

namespace based::cpu::BASED_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using f32v = float __attribute__((vector_size(kLanes * 4)));
using i32v = std::int32_t __attribute__((vector_size(kLanes * 4)));
using u16v = std::uint16_t __attribute__((vector_size(kLanes * 2)));

BASED_INLINE f32v splat(float x) { return x - f32v{}; }

BASED_INLINE f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

BASED_INLINE void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }

/// The first n lanes, zeros behind; n ≤ kLanes.
BASED_INLINE f32v load_n(const float* p, std::int64_t n) {
  f32v v{};
  __builtin_memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(float));
  return v;
}

BASED_INLINE void store_n(float* p, f32v v, std::int64_t n) {
  __builtin_memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(float));
}

BASED_INLINE float hsum(f32v v) {
  // Pairwise: the same order for every caller.
  float a[kLanes];
  __builtin_memcpy(a, &v, sizeof v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) a[i] += a[i + w];
  return a[0];
}

BASED_INLINE float hmax(f32v v) {
  float a[kLanes];
  __builtin_memcpy(a, &v, sizeof v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) a[i] = a[i] > a[i + w] ? a[i] : a[i + w];
  return a[0];
}

// Sums of products are written with these: a * b + c is two roundings, since contraction is off (CMakeLists.txt). So
// what a compiler makes of one inlined copy of a function cannot differ from what it makes of another.

/// a · b + c, rounded once where the instruction set can.
BASED_INLINE f32v fmadd(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

/// c − a · b, likewise.
BASED_INLINE f32v fnmadd(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32v)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return c - a * b;
#endif
}

/// The same for numbers.
BASED_INLINE float fmadd(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

BASED_INLINE float fnmadd(float a, float b, float c) { return fmadd(-a, b, c); }

BASED_INLINE f32v vmax(f32v a, f32v b) { return a > b ? a : b; }
BASED_INLINE f32v vmin(f32v a, f32v b) { return a < b ? a : b; }

/// kLanes floats from bfloat16.
BASED_INLINE f32v load_bf16(const std::uint16_t* p) {
  u16v h;
  __builtin_memcpy(&h, p, sizeof h);
  using u32v = std::uint32_t __attribute__((vector_size(kLanes * 4)));
  const u32v w = __builtin_convertvector(h, u32v) << 16;
  f32v f;
  __builtin_memcpy(&f, &w, sizeof f);
  return f;
}

BASED_INLINE void store_bf16(std::uint16_t* p, f32v v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof h);
#else
  // io::bf16_from_float on all lanes: written out lane by lane, it is most of what a kernel takes to compile.
  using u32v = std::uint32_t __attribute__((vector_size(kLanes * 4)));
  u32v u;
  __builtin_memcpy(&u, &v, sizeof u);
  const u32v rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const u16v h = __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40u, u16v);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

/// The first n lanes.
BASED_INLINE void store_bf16_n(std::uint16_t* p, f32v v, std::int64_t n) {
  std::uint16_t h[kLanes];
  store_bf16(h, v);
  __builtin_memcpy(p, h, static_cast<std::size_t>(n) * sizeof(std::uint16_t));
}

/// Writes the first n lanes at element `index` of an array of float, or of bfloat16.
BASED_INLINE void store_as(void* out, std::int64_t index, f32v v, std::int64_t n, bool bf16) {
  if (bf16) {
    std::uint16_t* p = static_cast<std::uint16_t*>(out) + index;
    n == kLanes ? store_bf16(p, v) : store_bf16_n(p, v, n);
  } else {
    float* p = static_cast<float*>(out) + index;
    n == kLanes ? store(p, v) : store_n(p, v, n);
  }
}

/// p · 2^n for whole n from −126 to 127.
BASED_INLINE f32v scale_by_power(f32v p, f32v n) {
#if defined(__AVX512F__)
  return (f32v)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)n);
#else
  const i32v bits = (__builtin_convertvector(n, i32v) + 127) << 23;
  f32v scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale;
#endif
}

/// e^x to about 2 ulp; 0 below −87.3, and clamped at 88.37 (2.4e38). NaN stays NaN.
BASED_INLINE f32v vexp(f32v x) {
  // e^x = 2^n e^r, n = round(x / ln 2), |r| ≤ ln 2 / 2; e^r by its Taylor polynomial of degree 7.
  const f32v lo = splat(-87.33654f), hi = splat(88.37626f);
  const f32v z = vmin(hi, vmax(lo, x));   // of two numbers, one NaN, these give the second
  const f32v shift = splat(12582912.0f);  // 1.5 · 2²³: adding it rounds to an integer
  const f32v n = fmadd(z, splat(1.44269504f), shift) - shift;
  f32v r = fnmadd(n, splat(0.693359375f), z);
  r = fnmadd(n, splat(-2.12194440e-4f), r);
  f32v p = splat(1.0f / 5040);
  p = fmadd(p, r, splat(1.0f / 720));
  p = fmadd(p, r, splat(1.0f / 120));
  p = fmadd(p, r, splat(1.0f / 24));
  p = fmadd(p, r, splat(1.0f / 6));
  p = fmadd(p, r, splat(0.5f));
  p = fmadd(p, r, splat(1.0f));
  p = fmadd(p, r, splat(1.0f));
  const f32v y = scale_by_power(p, n);
  return x < lo ? f32v{} : y;
}

BASED_INLINE f32v sigmoid(f32v x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }
BASED_INLINE f32v silu(f32v x) { return x * sigmoid(x); }

/// log(1 + e^v) to about 4 ulp; v itself from v = 20 on, as there e^−v is below half an ulp of v. NaN stays NaN.
BASED_INLINE f32v softplus(f32v v) {
  // max(v, 0) + log(1 + w), w = e^−|v| ≤ 1; log(1 + w) = 2 artanh(s), s = w / (2 + w) ≤ 1/3, by its Taylor series.
  const f32v zero{};
  const f32v w = vexp(v < zero ? v : -v);
  const f32v s = w / (splat(2.0f) + w), s2 = s * s;
  f32v p = splat(1.0f / 17);
  p = fmadd(p, s2, splat(1.0f / 15));
  p = fmadd(p, s2, splat(1.0f / 13));
  p = fmadd(p, s2, splat(1.0f / 11));
  p = fmadd(p, s2, splat(1.0f / 9));
  p = fmadd(p, s2, splat(1.0f / 7));
  p = fmadd(p, s2, splat(1.0f / 5));
  p = fmadd(p, s2, splat(1.0f / 3));
  const f32v twice = s + s;
  const f32v log = fmadd(twice * s2, p, twice);
  return vmax(zero, v) + log;  // of two numbers, one NaN, vmax gives the second
}

}  // namespace based::cpu::BASED_ISA
