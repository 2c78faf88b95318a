// Which latents of a tile may be among an image's best: products.h.
#pragma once
#include <cstring>

#include "products.h"
#include "simd.h"

namespace revelio {

inline void judge(const void *sums, const RowTerms *rows, int64_t count, const ImageTerms &images,
                uint16_t *bits) {
    std::memset(bits, 0, count * sizeof(*bits));
    for (int c = 0; c < PANEL; c += 8) {
        const __m256 scale = _mm256_loadu_ps(images.scale + c), norm = _mm256_loadu_ps(images.norm + c);
        const __m256 rest = _mm256_loadu_ps(images.rest + c), limit = _mm256_loadu_ps(images.limit + c);
        const __m256 lower = _mm256_min_ps(limit, _mm256_loadu_ps(images.other_limit + c));
        const int32_t *sum = static_cast<const int32_t *>(sums) + c;
        for (int64_t r = 0; r < count; r++, sum += PANEL) {
            const RowTerms &row = rows[r];
            __m256 guess = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)sum));
            guess = _mm256_mul_ps(_mm256_mul_ps(guess, _mm256_set1_ps(row.scale)), scale);
            guess = _mm256_add_ps(guess, _mm256_set1_ps(row.bias));
            const __m256 by_norm = _mm256_mul_ps(_mm256_set1_ps(row.by_norm), norm);
            const __m256 by_rest = _mm256_mul_ps(_mm256_set1_ps(row.by_rest), rest);
            const __m256 bound = _mm256_add_ps(_mm256_add_ps(by_norm, by_rest), _mm256_set1_ps(row.fixed));
            const __m256 upper = _mm256_add_ps(guess, bound);
            bits[r] |= _mm256_movemask_ps(_mm256_cmp_ps(upper, row.among ? lower : limit, _CMP_NLT_UQ)) << c;
        }
    }
}

}  // namespace revelio
