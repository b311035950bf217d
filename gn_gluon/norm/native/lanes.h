// Lanes: one vector register of floats, as wide as the instruction set of this compilation has it, and how the three
// storage types are read into it and written from it. GCC's vector types, so that one source serves all.
//
// No template of the standard library here or in kernels.cc: its instances are merged by the linker over all objects,
// and a processor without AVX-512 could meet the copy that was compiled for it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline Lanes broadcast(float value) { return value - Lanes{}; }
inline Lanes positive(Lanes value, Lanes sign) { return sign > 0.f ? value : Lanes{}; }
inline Lanes relu(Lanes value) { return value < 0.f ? Lanes{} : value; }  // NaN stays NaN

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline void store(float* to, Lanes value) { *reinterpret_cast<Lanes*>(to) = value; }

inline Lanes load(const bfloat16* from) {
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
}

inline void store(bfloat16* to, Lanes value) {
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  const Bits nan = bits >> 16 | 0x40u;                              // rounding could make infinity of NaN
  const Bits result = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(result, Halves);
}

#if defined(__AVX512F__)
inline Lanes load(const float16* from) {
  return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(float16* to, Lanes value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline Lanes load(const float16* from) {
  return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(float16* to, Lanes value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// By arithmetic: multiplying by 2^112 moves a half's exponent, subnormal or not, to where a float has it.
inline Lanes load(const float16* from) {
  const Bits half = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits);
  const Lanes scaled = (Lanes)((half & 0x7fffu) << 13) * 0x1p112f;
  const Bits finite = (Bits)scaled, special = (half & 0x7fffu) << 13 | 0x7f800000u;
  return (Lanes)(((half & 0x7c00u) == 0x7c00u ? special : finite) | (half & 0x8000u) << 16);
}
inline uint16_t to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                        // subnormal: a float addition rounds it
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return sign | (bits - 0x3f000000u);
  }
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}
inline void store(float16* to, Lanes value) {
  for (int lane = 0; lane < kLanes; ++lane) to[lane].bits = to_half(value[lane]);
}
#endif

// The first `count` lanes, the others zero, touching no memory beyond.
template <typename T>
inline Lanes load(const T* from, int count) {
  T buffer[kLanes] = {};
  memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <typename T>
inline void store(T* to, Lanes value, int count) {
  T buffer[kLanes];
  store(buffer, value);
  memcpy(to, buffer, count * sizeof(T));
}

#if defined(__AVX512F__)
template <>
inline Lanes load<float>(const float* from, int count) {
  return (Lanes)_mm512_maskz_loadu_ps((1u << count) - 1, from);
}
template <>
inline void store<float>(float* to, Lanes value, int count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)value);
}
#endif

}  // namespace
