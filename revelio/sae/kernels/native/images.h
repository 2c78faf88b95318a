// An image in int8: x = scale m q + fine l + rest. A search multiplies q, and l as well where that leaves a latent in.
//
// m is 1, but in pieces (rows.h) every half of a piece has its own, with which q is about as large as its sums allow:
// the rounding of a half is relative to that half, so large numbers make only those beside them coarse. vpmaddwd
// multiplies by m where it widens the sums.
#pragma once
#include "products.h"
#include "rows.h"

namespace revelio {

// The largest l: vpmaddubsw adds two of its products with raised numbers.
constexpr int LARGEST_REST = 63;
static_assert(2 * 255 * LARGEST_REST < 32768);

// The largest m: all sums of the halves, each times its m, must fit into int32.
inline int largest_factor(int64_t width) { return int(std::min<int64_t>(1024, 32767 / pieces_of(width))); }

struct Image {
    std::vector<int8_t> q, l;      // (whole pieces), zeros behind the last number
    std::vector<int16_t> factors;  // m of both halves of every piece
    Quantised coarse, fine;        // without l and with it: their norms and rests

    explicit Image(int64_t width) : q(pieces_of(width) * PIECE), l(q), factors(2 * pieces_of(width)) {}

    // False where a number is NaN or infinite.
    bool take(const float *x, int64_t d, bool pieces) {
        const float largest = largest_of(x, d);
        std::fill(factors.begin(), factors.end(), 1);
        if (largest < SMALLEST || largest > 1 / SMALLEST) {
            std::fill(q.begin(), q.end(), 0);
            std::fill(l.begin(), l.end(), 0);
            const bool finite = all_rest(x, d, largest, q.data(), coarse);
            fine = coarse;
            return finite;
        }
        const double norm = norm_of(x, d, largest);
        if (!std::isfinite(norm)) return false;
        round(x, d, norm, pieces ? scale_by_halves(x, d, largest) : largest / 127);
        return true;
    }

   private:
    // The scale, and the least factors for which all sums fit. Of two numbers side by side vpmaddubsw adds the products
    // with raised ones, so they must be 128 at most, 1 of it by rounding.
    float scale_by_halves(const float *x, int64_t d, float largest) {
        const double most = IMAGE_OF_PIECES - ROUNDING_OF_PIECES;
        const __m256 inverse = _mm256_set1_ps(1 / largest);
        std::vector<double> least(factors.size(), 0);
        float room[PIECE];
        for (int64_t c = 0; c < d; c += PIECE) {
            const float *piece = piece_of(x + c, d - c, room);
            alignas(16) float square[4], pair[4];
            _mm_store_ps(square, squares_of(piece, inverse));
            _mm_store_ps(pair, pairs_of(piece, inverse));
            for (int half = 0; half < 2; half++)
                least[2 * c / PIECE + half] =
                    1.0001 * largest * std::fmax(std::sqrt(square[2 * half]) / most, pair[2 * half] / 127);
        }
        const int highest = largest_factor(q.size());
        const float scale = float(*std::max_element(least.begin(), least.end()) / highest);
        for (size_t half = 0; half < least.size(); half++)
            factors[half] = int16_t(std::fmin(std::fmax(std::ceil(least[half] / scale), 1), highest));
        return scale;
    }

    // The largest |a| + |b| of two numbers side by side, times `inverse`; lanes as in squares_of.
    static __m128 pairs_of(const float *piece, __m256 inverse) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        __m256 most = _mm256_setzero_ps();
        for (int i = 0; i < PIECE; i += 8) {
            const __m256 size = _mm256_andnot_ps(sign, _mm256_mul_ps(_mm256_loadu_ps(piece + i), inverse));
            most = _mm256_max_ps(most, _mm256_add_ps(size, _mm256_permute_ps(size, 0xb1)));
        }
        return _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    }

    void round(const float *x, int64_t d, double norm, float scale) {
        const float step = scale * *std::max_element(factors.begin(), factors.end());
        const float fine_step = step * (0.5005f / LARGEST_REST);
        const __m256 unit = _mm256_set1_ps(1 / step), fine_steps = _mm256_set1_ps(fine_step);
        const __m256 fine_inverses = _mm256_set1_ps(1 / fine_step);
        __m256 square = _mm256_setzero_ps(), fine_square = square;
        float room[PIECE];
        for (int64_t c = 0; c < d; c += PIECE) {
            const float *piece = piece_of(x + c, d - c, room);
            const float a = scale * factors[2 * c / PIECE], b = scale * factors[2 * c / PIECE + 1];
            const __m256 steps = _mm256_setr_ps(a, a, b, b, a, a, b, b);
            const __m256 inverses = _mm256_div_ps(_mm256_set1_ps(1), steps);
            for (int i = 0; i < PIECE; i += 8) {
                const __m256 value = _mm256_loadu_ps(piece + i);
                const __m256 back = _mm256_mul_ps(whole(_mm256_mul_ps(value, inverses), 127, q.data() + c + i), steps);
                const __m256 off = _mm256_sub_ps(value, back);
                const __m256 rest = whole(_mm256_mul_ps(off, fine_inverses), LARGEST_REST, l.data() + c + i);
                const __m256 fine_off = _mm256_sub_ps(off, _mm256_mul_ps(rest, fine_steps));
                // In units of the largest step, so that squares neither vanish nor overflow.
                const __m256 part = _mm256_mul_ps(off, unit), fine_part = _mm256_mul_ps(fine_off, unit);
                square = _mm256_add_ps(square, _mm256_mul_ps(part, part));
                fine_square = _mm256_add_ps(fine_square, _mm256_mul_ps(fine_part, fine_part));
            }
        }
        coarse = bounded(scale, step, square, norm, d), fine = bounded(fine_step, step, fine_square, norm, d);
    }

    // Numbers as integers of `most` at most, stored as int8.
    static __m256 whole(__m256 numbers, int most, int8_t *place) {
        __m256i near = _mm256_cvtps_epi32(numbers);
        near = _mm256_max_epi32(_mm256_min_epi32(near, _mm256_set1_epi32(most)), _mm256_set1_epi32(-most));
        store(place, near);
        return _mm256_cvtepi32_ps(near);
    }
};

}  // namespace revelio
