// What the shared code writes in AVX2, on Arm: eight numbers are two NEON registers. Each operation rounds as AVX2's,
// so all sums are the same bits.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace revelio {

struct __m128i {
    int32x4_t v;
};
struct __m128 {
    float32x4_t v;
};
struct __m256 {
    float32x4_t low, high;
};
struct __m256i {
    int32x4_t low, high;
};

inline uint32x4_t as_bits(float32x4_t v) { return vreinterpretq_u32_f32(v); }
inline float32x4_t as_floats(uint32x4_t v) { return vreinterpretq_f32_u32(v); }

// One operation on both halves.
#define REVELIO_BOTH(type, name, of_halves) \
    inline type name(type a, type b) { return {of_halves(a.low, b.low), of_halves(a.high, b.high)}; }
// The second where a number is NaN, as AVX2's.
inline float32x4_t larger_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float32x4_t smaller_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline float32x4_t without(float32x4_t a, float32x4_t b) { return as_floats(vbicq_u32(as_bits(b), as_bits(a))); }
REVELIO_BOTH(__m256, _mm256_add_ps, vaddq_f32)
REVELIO_BOTH(__m256, _mm256_sub_ps, vsubq_f32)
REVELIO_BOTH(__m256, _mm256_mul_ps, vmulq_f32)
REVELIO_BOTH(__m256, _mm256_div_ps, vdivq_f32)
REVELIO_BOTH(__m256, _mm256_max_ps, larger_of)
REVELIO_BOTH(__m256, _mm256_min_ps, smaller_of)
REVELIO_BOTH(__m256, _mm256_andnot_ps, without)
REVELIO_BOTH(__m256i, _mm256_add_epi32, vaddq_s32)
REVELIO_BOTH(__m256i, _mm256_sub_epi32, vsubq_s32)
REVELIO_BOTH(__m256i, _mm256_max_epi32, vmaxq_s32)
REVELIO_BOTH(__m256i, _mm256_min_epi32, vminq_s32)
REVELIO_BOTH(__m256i, _mm256_and_si256, vandq_s32)
#undef REVELIO_BOTH

inline __m256 _mm256_setzero_ps() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
inline __m256 _mm256_set1_ps(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
inline __m256i _mm256_set1_epi32(int32_t value) { return {vdupq_n_s32(value), vdupq_n_s32(value)}; }
inline __m256 _mm256_loadu_ps(const float *from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
inline void _mm256_storeu_ps(float *to, __m256 v) { vst1q_f32(to, v.low), vst1q_f32(to + 4, v.high); }
inline void _mm256_store_ps(float *to, __m256 v) { _mm256_storeu_ps(to, v); }
inline __m256i _mm256_loadu_si256(const __m256i *from) {
    const int32_t *numbers = reinterpret_cast<const int32_t *>(from);
    return {vld1q_s32(numbers), vld1q_s32(numbers + 4)};
}
inline void _mm256_storeu_si256(__m256i *to, __m256i v) {
    int32_t *numbers = reinterpret_cast<int32_t *>(to);
    vst1q_s32(numbers, v.low), vst1q_s32(numbers + 4, v.high);
}
inline void _mm_storeu_si128(__m128i *to, __m128i v) { vst1q_s32(reinterpret_cast<int32_t *>(to), v.v); }
inline void _mm_storel_epi64(__m128i *to, __m128i v) { vst1_s32(reinterpret_cast<int32_t *>(to), vget_low_s32(v.v)); }

inline __m128 _mm_setzero_ps() { return {vdupq_n_f32(0)}; }
inline __m128 _mm_add_ps(__m128 a, __m128 b) { return {vaddq_f32(a.v, b.v)}; }
inline __m128 _mm_max_ps(__m128 a, __m128 b) { return {larger_of(a.v, b.v)}; }
inline void _mm_store_ps(float *to, __m128 v) { vst1q_f32(to, v.v); }
inline __m128 _mm256_castps256_ps128(__m256 v) { return {v.low}; }
inline __m128 _mm256_extractf128_ps(__m256 v, int half) { return {half ? v.high : v.low}; }
inline __m256 _mm256_setr_ps(float a, float b, float c, float d, float e, float f, float g, float h) {
    const float numbers[8] = {a, b, c, d, e, f, g, h};
    return _mm256_loadu_ps(numbers);
}

inline __m256 _mm256_castsi256_ps(__m256i v) {
    return {vreinterpretq_f32_s32(v.low), vreinterpretq_f32_s32(v.high)};
}
inline __m256i _mm256_castps_si256(__m256 v) {
    return {vreinterpretq_s32_f32(v.low), vreinterpretq_s32_f32(v.high)};
}
inline __m128i _mm256_castsi256_si128(__m256i v) { return {v.low}; }
inline __m128i _mm256_extracti128_si256(__m256i v, int half) { return {half ? v.high : v.low}; }

// To the nearest, ties to even.
inline __m256i _mm256_cvtps_epi32(__m256 v) { return {vcvtnq_s32_f32(v.low), vcvtnq_s32_f32(v.high)}; }
inline __m256 _mm256_cvtepi32_ps(__m256i v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }
inline __m256i _mm256_srli_epi32(__m256i v, int) {  // by 16
    const auto half = [](int32x4_t v) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), 16)); };
    return {half(v.low), half(v.high)};
}

// Narrower numbers, saturated.
inline __m128i _mm_packs_epi32(__m128i a, __m128i b) {
    return {vreinterpretq_s32_s16(vcombine_s16(vqmovn_s32(a.v), vqmovn_s32(b.v)))};
}
inline __m128i _mm_packus_epi32(__m128i a, __m128i b) {
    return {vreinterpretq_s32_u16(vcombine_u16(vqmovun_s32(a.v), vqmovun_s32(b.v)))};
}
inline __m128i _mm_packs_epi16(__m128i a, __m128i b) {
    const int8x8_t low = vqmovn_s16(vreinterpretq_s16_s32(a.v)), high = vqmovn_s16(vreinterpretq_s16_s32(b.v));
    return {vreinterpretq_s32_s8(vcombine_s8(low, high))};
}
inline __m128i _mm_set1_epi8(int8_t value) { return {vreinterpretq_s32_s8(vdupq_n_s8(value))}; }
inline __m128i _mm_xor_si128(__m128i a, __m128i b) { return {veorq_s32(a.v, b.v)}; }

// Neighbours change places: all that is asked of these two.
inline __m256 _mm256_permute_ps(__m256 v, int) { return {vrev64q_f32(v.low), vrev64q_f32(v.high)}; }
inline __m128 _mm_permute_ps(__m128 v, int) { return {vrev64q_f32(v.v)}; }

constexpr int _CMP_GT_OQ = 0, _CMP_NLT_UQ = 1;
inline __m256 _mm256_cmp_ps(__m256 a, __m256 b, int how) {
    const auto compared = [how](float32x4_t a, float32x4_t b) {
        return as_floats(how == _CMP_GT_OQ ? vcgtq_f32(a, b) : vmvnq_u32(vcltq_f32(a, b)));
    };
    return {compared(a.low, b.low), compared(a.high, b.high)};
}

// A number's sign bit each, the first the lowest.
inline int _mm256_movemask_ps(__m256 v) {
    static const int32_t places[4] = {0, 1, 2, 3};
    const auto bits = [](float32x4_t v) {
        return int(vaddvq_u32(vshlq_u32(vshrq_n_u32(as_bits(v), 31), vld1q_s32(places))));
    };
    return bits(v.low) | bits(v.high) << 4;
}

constexpr int _MM_HINT_T0 = 0;
inline void _mm_prefetch(const void *at, int) { __builtin_prefetch(at); }

}  // namespace revelio
