// Shared by the native k-SAE kernel: sums in one fixed order, quantised rows, threads over disjoint work.
//
// Every float sum that reaches a result is taken over 32 lanes (element i goes to lane i % 32, in ascending
// order, product and sum rounded one after the other), and the lanes are folded in halves. Compiled with
// -ffp-contract=off, so a plain loop in any language gives the same bits, whatever the number of threads.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace revelio {

constexpr int LANES = 32;

inline float fold(float *lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float dot(const float *a, const float *b, int64_t d) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES)
        for (int q = 0; q < 4; q++) {
            __m256 product = _mm256_mul_ps(_mm256_loadu_ps(a + i + 8 * q), _mm256_loadu_ps(b + i + 8 * q));
            sum[q] = _mm256_add_ps(sum[q], product);
        }
    alignas(32) float lanes[LANES];
    for (int q = 0; q < 4; q++) _mm256_store_ps(lanes + 8 * q, sum[q]);
    for (int lane = 0; i < d; i++, lane++) lanes[lane] += a[i] * b[i];
    return fold(lanes);
}

inline void add_scaled(float *sum, const float *row, float factor, int64_t d) {
    for (int64_t i = 0; i < d; i++) sum[i] += factor * row[i];
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

// A float row w as scale * q + rest with q in int16, for products that are exact in int32.
//
// The scale is chosen so that |q| <= 46,000 (its Euclidean norm): by Cauchy-Schwarz no sum of products of two
// such rows leaves int32. `norm` and `rest` are upper bounds of |w| and |w - scale q|.
struct Quantised {
    float scale, norm, rest;
};

constexpr double NORM_OF_INTEGERS = 46000.0;
constexpr float SMALLEST = 1e-25f;  // a row of smaller numbers, or of larger than the inverse, is all rest

// The largest magnitude (0 for no number but NaN).
inline float largest_of(const float *w, int64_t d) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= d; i += 8) most = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(w + i)), most);
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    float largest = 0;
    for (; i < d; i++) largest = std::fmax(largest, std::fabs(w[i]));
    for (float lane : lanes) largest = std::fmax(largest, lane);
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

// Writes q (width values, zeros from d on). False where a value is NaN or infinite.
inline bool quantise(const float *w, int64_t d, int64_t width, int16_t *q, Quantised &found) {
    const float largest = largest_of(w, d);
    for (int64_t i = d; i < width; i++) q[i] = 0;
    if (largest < SMALLEST || largest > 1 / SMALLEST) {
        for (int64_t i = 0; i < d; i++) {
            if (!std::isfinite(w[i])) return false;
            q[i] = 0;
        }
        const float most = float(std::sqrt(double(d)) * largest * 1.001);
        found = {0.0f, most, most};
        return true;
    }
    const double norm = norm_of(w, d, largest);
    if (!std::isfinite(norm)) return false;
    const double goal = NORM_OF_INTEGERS - 0.5 * std::sqrt(double(d)) - 1;
    const double scale = std::fmax(1.001 * norm / goal, double(largest) / 32767);
    const float step = float(scale), inverse = float(1 / scale);
    float rest[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t i = 0;
    const __m256 steps = _mm256_set1_ps(step), inverses = _mm256_set1_ps(inverse);
    __m256 square = _mm256_setzero_ps();
    for (; i + 8 <= d; i += 8) {
        __m256 value = _mm256_loadu_ps(w + i);
        __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverses));
        __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(q + i), narrow);
        // In units of the scale, so that squares neither vanish nor overflow.
        __m256 back = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(narrow)), steps);
        __m256 off = _mm256_mul_ps(_mm256_sub_ps(value, back), inverses);
        square = _mm256_add_ps(square, _mm256_mul_ps(off, off));
    }
    _mm256_storeu_ps(rest, square);
    for (; i < d; i++) {
        float whole = std::fmin(std::nearbyint(w[i] * inverse), 32767.0f);
        q[i] = int16_t(std::fmax(whole, -32767.0f));
        float off = (w[i] - q[i] * step) * inverse;
        rest[0] += off * off;
    }
    double sum = 0;
    for (float part : rest) sum += part;
    // 0.1 % and 2^-21 of the norm cover the rounding of this very sum and of scale * q.
    double bound = std::sqrt(sum) * scale * 1.001 + norm * 0x1p-21;
    found = {step, float(norm * 1.0001), float(bound * 1.0001)};
    return true;
}

}  // namespace revelio
