// One thread's part of a search: products of tiles, thresholds, nominees. encode.cpp says why that is enough.
#pragma once
#include <algorithm>
#include <functional>

#include "batch.h"

namespace revelio {

// The k largest lower bounds so far of every image, as heaps with the least on top, which is the threshold; until
// there are k, it is a guess, and only what is above it is kept.
struct Floor {
    int64_t k;
    std::vector<float> heaps, thresholds;
    std::vector<int64_t> sizes;

    Floor(int64_t k, int64_t padded, float guess = -INFINITY)
        : k(k), heaps(k * padded), thresholds(padded, k ? guess : INFINITY), sizes(padded, 0) {}

    void offer(int64_t image, float lower) {
        float *heap = heaps.data() + image * k;
        int64_t &size = sizes[image];
        if (!(lower > thresholds[image])) return;
        if (size == k) std::pop_heap(heap, heap + size--, std::greater<float>());
        heap[size++] = lower;
        std::push_heap(heap, heap + size, std::greater<float>());
        if (size == k) thresholds[image] = heap[0];
    }

    void offer_all(const Floor &other, int64_t image) {
        for (int64_t c = 0; c < other.sizes[image]; c++) offer(image, other.heaps[image * k + c]);
    }
};

struct Nominee {
    float guess, bound;
    int64_t latent;
};

// One thread's search: thresholds and nominees are its own; of wanted latents, the counts.
struct Search {
    const Batch &batch;
    const Latents &latents;
    Floor best, others;
    std::vector<std::vector<Nominee>> nominees;
    const Wanted *wanted;
    std::vector<int32_t> surely, perhaps;  // as wanted's scores; a latent perhaps comes before itself

    // Of some latents, how they rank beside the wanted ones, for the images of a panel.
    void count(const int32_t *sums, const RowTerms *rows, int64_t count, int64_t at) {
        for (int64_t r = 0; r < count; r++)
            for (int64_t from = 0; from < PANEL; from += 8) {
                const RowTerms &row = rows[r];
                const __m256i raw = _mm256_loadu_si256((const __m256i *)(sums + r * PANEL + from));
                const __m256 sum = batch.bfloat16() ? _mm256_castsi256_ps(raw) : _mm256_cvtepi32_ps(raw);
                const auto times = [&](float of, const std::vector<float> &part) {
                    return _mm256_mul_ps(_mm256_set1_ps(of), _mm256_loadu_ps(part.data() + at + from));
                };
                const __m256 scaled = _mm256_mul_ps(sum, _mm256_set1_ps(row.scale));
                const __m256 product = _mm256_mul_ps(scaled, _mm256_loadu_ps(batch.sizes.scale.data() + at + from));
                const __m256 guess = _mm256_add_ps(product, _mm256_set1_ps(row.bias));
                const __m256 by_rest = times(row.by_rest, batch.sizes.rest);
                const __m256 both = _mm256_add_ps(times(row.by_norm, batch.sizes.norm), by_rest);
                const __m256 bound = _mm256_add_ps(both, _mm256_set1_ps(row.fixed));
                const __m256 lower = _mm256_sub_ps(guess, bound), upper = _mm256_add_ps(guess, bound);
                for (size_t w = 0; w < wanted->latents.size(); w++) {
                    const int64_t place = w * batch.padded + at + from;
                    const __m256 score = _mm256_loadu_ps(wanted->scores.data() + place);
                    add(surely.data() + place, _mm256_cmp_ps(lower, score, _CMP_GT_OQ));
                    add(perhaps.data() + place, _mm256_cmp_ps(upper, score, _CMP_NLT_UQ));
                }
            }
    }

    static void add(int32_t *counts, __m256 which) {
        const __m256i before = _mm256_loadu_si256((const __m256i *)counts);
        _mm256_storeu_si256((__m256i *)counts, _mm256_sub_epi32(before, _mm256_castps_si256(which)));
    }

    bool out(const Nominee &one, int64_t image, bool among) const {
        const float limit = best.thresholds[image];
        return one.guess + one.bound < (among ? std::min(limit, others.thresholds[image]) : limit);
    }

    // `product`: of the row in units of its scale, and the image.
    void nominate(int64_t latent, int64_t image, float product, const RowTerms &row) {
        const Sizes &sizes = batch.int8() ? batch.finer_sizes : batch.sizes;
        const float guess = product * row.scale + row.bias;
        const float bound = row.by_norm * sizes.norm[image] + row.by_rest * sizes.rest[image] + row.fixed;
        const Nominee own{guess, bound, latent};
        if (out(own, image, row.among)) return;
        std::vector<Nominee> &kept = nominees[image];
        // Thresholds have risen: before a list grows, what they leave out by now is dropped, so that lists stay short.
        if (kept.size() == kept.capacity()) {
            const auto gone = [&](const Nominee &one) {
                return out(one, image, others.k && latents.among[one.latent]);
            };
            kept.erase(std::remove_if(kept.begin(), kept.end(), gone), kept.end());
            kept.reserve(std::max<size_t>(2 * kept.size(), 64));
        }
        kept.push_back(own);
        // What the bound cannot judge (a number overflowed) is scored, and bounds nothing.
        const float lower = guess - bound == guess - bound ? guess - bound : -INFINITY;
        best.offer(image, lower);
        if (row.among) others.offer(image, lower);
    }

    RowTerms terms(int64_t latent) const {
        const Quantised &row = latents.copy.rows[latent];
        // Relative to |w| |x|: the rounding of a score taken in the fixed order, of the guess, and of AMX's sum.
        float rounding = float((batch.d / LANES + 30) * 0x1p-24);
        if (batch.bfloat16()) rounding += float(batch.width * 1.1 * 0x1p-23);
        const float bias = latents.bias[latent], tiny = float(batch.d) * 4e-38f;
        return {row.scale,
                bias,
                (row.rest + rounding * row.norm) * 1.00001f,
                (row.norm + row.rest) * 1.00001f,
                0x1p-20f * std::fabs(bias) + tiny,
                others.k && latents.among[latent]};
    }

    // What nominates: the product of the tile, made finer if it can be.
    float product_of(const Product &product, int64_t latent, int64_t image, const int32_t *of_tile) const {
        float sum = float(*of_tile);
        if (batch.bfloat16()) std::memcpy(&sum, of_tile, sizeof(sum));
        sum *= batch.sizes.scale[image];
        if (!batch.int8()) return sum;
        const uint8_t *w = static_cast<const uint8_t *>(latents.copy.row(latent));
        const int8_t *l = batch.finer.data() + image * batch.width;
        return sum + float(product.finer(w, l, batch.width, batch.starts[image])) * batch.finer_sizes.scale[image];
    }

    // A tile of the product: latents from `first` on, images from `image` on.
    void tile(const Product &product, Judge judge, int64_t first, int64_t image, const RowTerms *rows, bool fetch) {
        alignas(64) int32_t sums[MOST];
        uint16_t bits[TALLEST];
        const void *ahead = fetch ? latents.copy.row(first + product.latents) : nullptr;
        product.multiply(latents.copy.row(first), batch.width, batch.panel(image), ahead, sums);
        const int64_t count = std::min<int64_t>(product.latents, latents.n - first);
        for (int p = 0; p < product.panels; p++) {
            const int64_t at = image + p * PANEL;
            const ImageTerms images{batch.sizes.scale.data() + at, batch.sizes.norm.data() + at,
                                    batch.sizes.rest.data() + at, best.thresholds.data() + at,
                                    others.thresholds.data() + at};
            const int32_t *own = sums + p * product.latents * PANEL;
            if (wanted) {
                this->count(own, rows, count, at);
                continue;
            }
            judge(own, rows, count, images, bits);
            for (int64_t r = 0; r < count; r++)
                for (unsigned left = bits[r]; left; left &= left - 1) {
                    const int bit = __builtin_ctz(left);
                    if (at + bit >= batch.b) break;
                    const int32_t *sum = own + r * PANEL + bit;
                    nominate(first + r, at + bit, product_of(product, first + r, at + bit, sum), rows[r]);
                }
        }
    }

    // The latents from `first` to `last`, a block that stays in the cache, with all images.
    void block(const Product &product, Judge judge, int64_t first, int64_t last) {
        const Tiles tiles(batch.bfloat16());
        RowTerms rows[BLOCK];
        for (int64_t latent = first; latent < last; latent++) rows[latent - first] = terms(latent);
        for (int64_t image = 0; image < batch.b; image += product.panels * PANEL)
            for (int64_t row = first; row < last; row += product.latents)
                tile(product, judge, row, image, rows + (row - first), image == 0 && row + product.latents < last);
    }
};

}  // namespace revelio
