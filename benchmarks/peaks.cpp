// What a thread can do at best, for benchmarks/peaks.py: products in registers, and reading. Compiled for AVX-512 with
// VNNI or for AVX2, as the flags say.
#include <immintrin.h>

#include <cstdint>

namespace {

#if defined(__AVX512VNNI__)
using Floats = __m512;
using Integers = __m512i;
Floats float32(Floats sum, Floats a) { return _mm512_fmadd_ps(a, a, sum); }
Integers int16(Integers sum, Integers a) { return _mm512_dpwssd_epi32(sum, a, a); }
Integers int8(Integers sum, Integers a) { return _mm512_dpbusd_epi32(sum, a, a); }
#else
using Floats = __m256;
using Integers = __m256i;
Floats float32(Floats sum, Floats a) { return _mm256_fmadd_ps(a, a, sum); }
Integers int16(Integers sum, Integers a) { return _mm256_add_epi32(_mm256_madd_epi16(a, a), sum); }
Integers int8(Integers sum, Integers a) { return _mm256_add_epi16(_mm256_maddubs_epi16(a, a), sum); }
#endif

// Latency times units, and no more than the registers hold beside products: compilers spill early.
constexpr int SUMS = sizeof(Floats) == 64 ? 12 : 8;

// Steps of sums that wait for none but their own; gives how many numbers were multiplied.
template <class Vector, Vector (*step)(Vector, Vector)>
int64_t multiply(int64_t rounds, int64_t numbers) {
    Vector sums[SUMS] = {}, factor = {};
    for (Vector &sum : sums) asm volatile("" : "+x"(sum));  // unknown, so that no two are the same
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) {
            asm volatile("" : "+x"(factor));  // new every time, so that no product is taken twice
            sums[i] = step(sums[i], factor);
        }
    for (Vector &sum : sums) asm volatile("" : : "x"(sum));
    return rounds * SUMS * numbers;
}

}  // namespace

extern "C" {

int64_t multiply_float32(int64_t rounds) { return multiply<Floats, float32>(rounds, sizeof(Floats) / 4); }
int64_t multiply_int16(int64_t rounds) { return multiply<Integers, int16>(rounds, sizeof(Integers) / 2); }
int64_t multiply_int8(int64_t rounds) { return multiply<Integers, int8>(rounds, sizeof(Integers)); }

// Reads so many bytes, a multiple of 256.
void read_all(const uint8_t *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 256)
        for (int64_t part = 0; part < 256; part += sizeof(Integers)) {
            Integers held;
            __builtin_memcpy(&held, from + i + part, sizeof(held));
            asm volatile("" : : "x"(held));
        }
}
}
