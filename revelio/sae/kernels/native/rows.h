// Shared by the native k-SAE kernel: sums in one fixed order, quantised rows, threads over disjoint work.
//
// Every float sum that reaches a result is taken over 32 lanes (element i goes to lane i % 32, in ascending
// order, product and sum rounded one after the other), and the lanes are folded in halves. Compiled with
// -ffp-contract=off, so a plain loop in any language gives the same bits, whatever the number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace revelio {

constexpr int LANES = 32;

inline float fold(float *lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Ask for a row before it is needed: rows are short, so the hardware's own prefetch hardly gets going.
inline void fetch(const float *row, int64_t d) {
    for (int64_t i = 0; i < d; i += 16) _mm_prefetch(row + i, _MM_HINT_T0);
}

// Ask for the row after the next: where its pages are, and the hardware's own prefetch begins.
inline void announce(const float *row, int64_t d) {
    for (int64_t i = 0; row && i < d; i += 256) _mm_prefetch(row + i, _MM_HINT_T0);
}

// `next`: the row that comes next, or null; it is fetched bit by bit, as all at once would hold up loads.
inline float dot(const float *a, const float *b, int64_t d, const float *next = nullptr) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        if (next) fetch(next + i, LANES);
        for (int q = 0; q < 4; q++) {
            __m256 product = _mm256_mul_ps(_mm256_loadu_ps(a + i + 8 * q), _mm256_loadu_ps(b + i + 8 * q));
            sum[q] = _mm256_add_ps(sum[q], product);
        }
    }
    alignas(32) float lanes[LANES];
    for (int q = 0; q < 4; q++) _mm256_store_ps(lanes + 8 * q, sum[q]);
    for (int lane = 0; i < d; i++, lane++) lanes[lane] += a[i] * b[i];
    return fold(lanes);
}

inline void add_scaled(float *sum, const float *row, float factor, int64_t d, const float *next = nullptr) {
    int64_t i = 0;
    const __m256 factors = _mm256_set1_ps(factor);
    for (; i + LANES <= d; i += LANES) {
        if (next) fetch(next + i, LANES);
        for (int q = 0; q < LANES; q += 8) {
            const __m256 product = _mm256_mul_ps(factors, _mm256_loadu_ps(row + i + q));
            _mm256_storeu_ps(sum + i + q, _mm256_add_ps(_mm256_loadu_ps(sum + i + q), product));
        }
    }
    for (; i < d; i++) sum[i] += factor * row[i];
}

// Run work(item) for items 0..count-1 on some threads. Which thread takes which item must not matter.
template <class Work>
void share(int64_t count, int threads, const Work &work) {
    std::atomic<int64_t> next{0};
    auto loop = [&](int thread) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item, thread);
    };
    std::vector<std::thread> others;
    if (threads > count) threads = count > 0 ? int(count) : 1;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(loop, thread);
    loop(0);
    for (auto &other : others) other.join();
}

// A float row w as scale * q + rest, where products of two q can be summed almost or wholly exactly: q in int16
// or int8 (exact in int32) or q in bfloat16 (float sums, scale a power of two). `norm` and `rest` are upper bounds of
// |w| and |w - scale q|.
struct Quantised {
    float scale, norm, rest;
};

// The int16 scale is chosen so that |q| <= 46,000 (its Euclidean norm): by Cauchy-Schwarz no sum of products of
// two such rows leaves int32.
constexpr double NORM_OF_INTEGERS = 46000.0;
constexpr float SMALLEST = 1e-25f;  // a row of smaller numbers, or of larger than the inverse, is all rest

// A row's int8 are written raised, so that they have no sign: vpdpbusd multiplies such with signed ones.
constexpr int RAISED = 128;
template <class Integer>
constexpr int zero_of = std::is_same<Integer, uint8_t>::value ? RAISED : 0;

// The largest magnitude (0 for no number but NaN).
inline float largest_of(const float *w, int64_t d) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= d; i += 8) most = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(w + i)), most);
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    float largest = 0;
    // Not std::fmax, of which GCC 12 for Arm makes no reduction and fails.
    for (; i < d; i++) largest = std::fabs(w[i]) > largest ? std::fabs(w[i]) : largest;
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
}

// |w| within 0.01 %; not finite where a number is not. In units of the largest, so that squares neither vanish
// nor overflow.
inline double norm_of(const float *w, int64_t d, float largest) {
    const float inverse = 1 / largest;
    const __m256 inverses = _mm256_set1_ps(inverse);
    __m256 squares = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= d; i += 8) {
        const __m256 part = _mm256_mul_ps(_mm256_loadu_ps(w + i), inverses);
        squares = _mm256_add_ps(squares, _mm256_mul_ps(part, part));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, squares);
    double sum = 0;
    for (; i < d; i++) sum += double(w[i] * inverse) * (w[i] * inverse);
    for (float lane : lanes) sum += lane;
    return std::sqrt(sum) * largest;
}

// A row whose numbers are too small or too large to be taken apart: q = 0. False where one is not finite.
template <class Integer>
bool all_rest(const float *w, int64_t d, float largest, Integer *q, Quantised &found) {
    for (int64_t i = 0; i < d; i++) {
        if (!std::isfinite(w[i])) return false;
        q[i] = zero_of<Integer>;
    }
    // What is added covers what terms of denormal numbers lose, here and in the bounds.
    const float most = largest > 0 ? float(std::sqrt(double(d)) * largest * 1.001) + 1e-43f : 0.0f;
    found = {0.0f, most, most};
    return true;
}

// What bounds must be raised by for the rounding of float sums of d squares over 8 lanes, with room to spare.
inline double raised(int64_t d) { return 1.0001 + double(d) * 0x1p-26; }

inline __m128i narrow(__m256i whole) {
    return _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}

inline void store(int16_t *q, __m256i whole) { _mm_storeu_si128(reinterpret_cast<__m128i *>(q), narrow(whole)); }

inline void store(int8_t *q, __m256i whole) {
    const __m128i half = narrow(whole);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(q), _mm_packs_epi16(half, half));
}

// Raised by RAISED.
inline void store(uint8_t *q, __m256i whole) {
    const __m128i half = narrow(whole), raised = _mm_set1_epi8(int8_t(RAISED));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(q), _mm_xor_si128(_mm_packs_epi16(half, half), raised));
}

// What is known of a row whose rests, in units of `unit`, have these squares.
inline Quantised bounded(float scale, float unit, __m256 squares, double norm, int64_t d) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, squares);
    double sum = 0;
    for (float part : lanes) sum += part;
    // 0.1 % and 2^-21 of the norm cover the rounding of this very sum and of scale * q.
    const double bound = std::sqrt(sum) * unit * 1.001 + norm * 0x1p-21;
    return {scale, float(norm * raised(d)), float(bound * raised(d))};
}

// w as scale * q + rest with q of at most `most`; written raised.
template <class Integer>
void round_to(const float *w, int64_t d, double norm, double scale, int most, Integer *q, Quantised &found) {
    constexpr int zero = zero_of<Integer>;
    const float step = float(scale), inverse = float(1 / scale);
    float rest[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t i = 0;
    const __m256 steps = _mm256_set1_ps(step), inverses = _mm256_set1_ps(inverse);
    const __m256i highest = _mm256_set1_epi32(most), lowest = _mm256_set1_epi32(-most);
    __m256 square = _mm256_setzero_ps();
    for (; i + 8 <= d; i += 8) {
        __m256 value = _mm256_loadu_ps(w + i);
        __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverses));
        whole = _mm256_max_epi32(_mm256_min_epi32(whole, highest), lowest);
        store(q + i, whole);
        // In units of the scale, so that squares neither vanish nor overflow.
        __m256 back = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), steps);
        __m256 off = _mm256_mul_ps(_mm256_sub_ps(value, back), inverses);
        square = _mm256_add_ps(square, _mm256_mul_ps(off, off));
    }
    _mm256_storeu_ps(rest, square);
    for (; i < d; i++) {
        const int whole = int(std::fmax(std::fmin(std::nearbyint(w[i] * inverse), float(most)), float(-most)));
        q[i] = Integer(whole + zero);
        float off = (w[i] - whole * step) * inverse;
        rest[0] += off * off;
    }
    found = bounded(step, step, _mm256_loadu_ps(rest), norm, d);
}

// AVX2 adds products of int8 in int16, PIECE columns at a time (the last piece may be shorter), those with c % 4 < 2
// and the others by themselves. The sums of such halves fit, by Cauchy-Schwarz, if their |q| are at most these for rows
// and for images: of what was measured the fastest, as longer pieces are widened less often, closer rows leave fewer to
// be scored, and closer images fewer to be multiplied again.
constexpr int PIECE = 64;
constexpr double ROW_OF_PIECES = 340, IMAGE_OF_PIECES = 96;
static_assert(ROW_OF_PIECES * IMAGE_OF_PIECES < 32768);
constexpr int64_t pieces_of(int64_t width) { return (width + PIECE - 1) / PIECE; }
// What rounding the numbers of a half adds to its |q| at most.
constexpr double ROUNDING_OF_PIECES = 3;
static_assert(4 * ROUNDING_OF_PIECES * ROUNDING_OF_PIECES >= PIECE / 2);

// A piece's numbers where they stand or, if fewer are left, in `room`, zeros behind them.
inline const float *piece_of(const float *w, int64_t left, float *room) {
    if (left >= PIECE) return w;
    std::fill(std::copy(w, w + left, room), room + PIECE, 0.0f);
    return room;
}

// The squares of a piece's numbers times `inverse`, those of a half added in either half of the sum.
inline __m128 squares_of(const float *piece, __m256 inverse) {
    __m256 squares = _mm256_setzero_ps();
    for (int i = 0; i < PIECE; i += 8) {
        const __m256 part = _mm256_mul_ps(_mm256_loadu_ps(piece + i), inverse);
        squares = _mm256_add_ps(squares, _mm256_mul_ps(part, part));
    }
    const __m128 both = _mm_add_ps(_mm256_castps256_ps128(squares), _mm256_extractf128_ps(squares, 1));
    return _mm_add_ps(both, _mm_permute_ps(both, 0xb1));
}

// The least scale for that of a row.
inline double scale_of_pieces(const float *w, int64_t d, float largest) {
    const __m256 inverse = _mm256_set1_ps(1 / largest);
    __m128 squares = _mm_setzero_ps();
    float room[PIECE];
    for (int64_t c = 0; c < d; c += PIECE)
        squares = _mm_max_ps(squares, squares_of(piece_of(w + c, d - c, room), inverse));
    alignas(16) float square[4];
    _mm_store_ps(square, squares);
    return 1.0001 * std::sqrt(std::fmax(square[0], square[2])) * largest / (ROW_OF_PIECES - ROUNDING_OF_PIECES);
}

// int16's scale is chosen by NORM_OF_INTEGERS, int8's by the largest number and, in pieces, as said above.
template <class Integer>
bool as_integers(const float *w, int64_t d, float largest, Integer *q, Quantised &found, bool pieces) {
    const double norm = norm_of(w, d, largest), most = sizeof(Integer) == 1 ? 127 : 32767;
    if (!std::isfinite(norm)) return false;
    const double goal = NORM_OF_INTEGERS - 0.5 * std::sqrt(double(d)) - 1;
    const double scale = sizeof(Integer) == 2 ? 1.001 * norm / goal : pieces ? scale_of_pieces(w, d, largest) : 0;
    round_to(w, d, norm, std::fmax(scale, double(largest) / most), int(most), q, found);
    return true;
}

// In units of the power of two below the largest number, so that nothing vanishes or overflows: v = w / scale is
// exact, q is v rounded to bfloat16 (nearest, ties to even), v - q is exact again.
inline bool as_bfloat16(const float *w, int64_t d, float largest, int16_t *q, Quantised &found) {
    const float step = std::ldexp(1.0f, std::ilogb(largest)), inverse = 1 / step;
    const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff);
    const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000));
    __m256 squares = _mm256_setzero_ps(), rests = _mm256_setzero_ps();
    for (int64_t i = 0; i < d; i += 8) {
        alignas(32) float last[8] = {0};
        const bool whole = i + 8 <= d;
        if (!whole) std::memcpy(last, w + i, (d - i) * sizeof(float));
        const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(whole ? w + i : last), _mm256_set1_ps(inverse));
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(half, even));
        const __m256 back = _mm256_castsi256_ps(_mm256_and_si256(rounded, upper));
        const __m256i high = _mm256_srli_epi32(rounded, 16);
        const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(q + i), narrow);  // width is a multiple of 8
        const __m256 off = _mm256_sub_ps(value, back);
        squares = _mm256_add_ps(squares, _mm256_mul_ps(value, value));
        rests = _mm256_add_ps(rests, _mm256_mul_ps(off, off));
    }
    alignas(32) float lanes[2][8];
    _mm256_store_ps(lanes[0], squares);
    _mm256_store_ps(lanes[1], rests);
    double square = 0, rest = 0;
    for (int lane = 0; lane < 8; lane++) square += lanes[0][lane], rest += lanes[1][lane];
    const double norm = std::sqrt(square) * step;
    if (!std::isfinite(norm)) return false;
    // 2^-21 of the norm covers numbers below 2^-126 of the largest, which AMX takes for zero.
    found = {step, float(norm * raised(d)), float((std::sqrt(rest) * step + norm * 0x1p-21) * raised(d))};
    return true;
}

// Writes q (width values, zeros from d on): raised int8, with `pieces` or not, int16 or, with `floats`, bfloat16. False
// where a value is NaN or infinite.
template <class Integer>
bool quantise(const float *w, int64_t d, int64_t width, bool floats, Integer *q, Quantised &found,
              bool pieces = false) {
    const float largest = largest_of(w, d);
    for (int64_t i = d; i < width; i++) q[i] = zero_of<Integer>;
    if (largest < SMALLEST || largest > 1 / SMALLEST) return all_rest(w, d, largest, q, found);
    if constexpr (sizeof(Integer) == 2)
        if (floats) return as_bfloat16(w, d, largest, q, found);
    return as_integers(w, d, largest, q, found, pieces);
}

}  // namespace revelio
