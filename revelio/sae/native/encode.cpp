// TopK of W x + b by certified nomination: int16 products bound every score, only nominees are scored.
//
// With w = s q + r and x = s' q' + r' (rows.h), |w.x - s s' q.q'| <= |r| |x| + (|w| + |r|) |r'|, and q.q' is exact
// in int32. A latent whose upper bound is below the k-th best score found so far cannot be among the k best; all
// others are scored in float, in the fixed order, and the k best are kept: larger first, then the lower index.
#include <algorithm>
#include <cstring>
#include <functional>

#include "rows.h"

namespace {

using namespace revelio;

constexpr int TILE = 6, PANEL = 16, BLOCK = 96;  // latents a tile, images a panel, latents a block (in L2)
enum Status : int { FINE = 0, INPUT_NOT_FINITE = 1, SCORE_IS_NAN = 2, STALE = 3 };

// 6 latents times 16 images. Twelve sums, two pieces of x and two temporaries are all 16 registers: compilers
// spill some and lose 40 %, hence by hand. x: [width / 2][16 images][2].
void products(const int16_t *w, int64_t width, const int16_t *x, int32_t *sums) {
    const int16_t *lower = w + 3 * width;
    int64_t stride = 2 * width, pairs = width / 2;
#define REVELIO_ROW(address, one, two)                                     \
    "vpbroadcastd " address ",%%ymm14\n\tvpmaddwd %%ymm12,%%ymm14,%%ymm15\n\t" \
    "vpaddd %%ymm15,%%ymm" one ",%%ymm" one "\n\t"                         \
    "vpmaddwd %%ymm13,%%ymm14,%%ymm14\n\tvpaddd %%ymm14,%%ymm" two ",%%ymm" two "\n\t"
#define REVELIO_CLEAR(i) "vpxor %%ymm" i ",%%ymm" i ",%%ymm" i "\n\t"
#define REVELIO_STORE(i, place) "vmovdqu %%ymm" i "," place "(%[o])\n\t"
    asm volatile(
        REVELIO_CLEAR("0") REVELIO_CLEAR("1") REVELIO_CLEAR("2") REVELIO_CLEAR("3") REVELIO_CLEAR("4")
        REVELIO_CLEAR("5") REVELIO_CLEAR("6") REVELIO_CLEAR("7") REVELIO_CLEAR("8") REVELIO_CLEAR("9")
        REVELIO_CLEAR("10") REVELIO_CLEAR("11")
        ".p2align 5\n1:\n\tvmovdqu (%[x]),%%ymm12\n\tvmovdqu 32(%[x]),%%ymm13\n\t"
        REVELIO_ROW("(%[w])", "0", "1") REVELIO_ROW("(%[w],%[s])", "2", "3")
        REVELIO_ROW("(%[w],%[s],2)", "4", "5") REVELIO_ROW("(%[v])", "6", "7")
        REVELIO_ROW("(%[v],%[s])", "8", "9") REVELIO_ROW("(%[v],%[s],2)", "10", "11")
        "add $4,%[w]\n\tadd $4,%[v]\n\tadd $64,%[x]\n\tdec %[p]\n\tjnz 1b\n\t"
        REVELIO_STORE("0", "0") REVELIO_STORE("1", "32") REVELIO_STORE("2", "64") REVELIO_STORE("3", "96")
        REVELIO_STORE("4", "128") REVELIO_STORE("5", "160") REVELIO_STORE("6", "192")
        REVELIO_STORE("7", "224") REVELIO_STORE("8", "256") REVELIO_STORE("9", "288")
        REVELIO_STORE("10", "320") REVELIO_STORE("11", "352")
        : [w] "+r"(w), [v] "+r"(lower), [x] "+r"(x), [p] "+r"(pairs)
        : [s] "r"(stride), [o] "r"(sums)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

struct Scored {
    float value;
    int64_t latent;
};

// Whether a comes before b: the larger value, then the lower latent.
bool before(const Scored &a, const Scored &b) {
    return a.value > b.value || (a.value == b.value && a.latent < b.latent);
}

// The k largest lower bounds so far of every image, as heaps with the least on top, which is the threshold.
struct Floor {
    int64_t k;
    std::vector<float> heaps, thresholds;
    std::vector<int64_t> sizes;

    Floor(int64_t k, int64_t padded)
        : k(k), heaps(k * padded), thresholds(padded, k ? -INFINITY : INFINITY), sizes(padded, 0) {}

    void offer(int64_t image, float lower) {
        float *heap = heaps.data() + image * k;
        int64_t &size = sizes[image];
        if (size == k) {
            if (!(lower > heap[0])) return;
            std::pop_heap(heap, heap + size--, std::greater<float>());
        }
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

struct Batch {
    int64_t b, padded, d, width;
    const float *x;
    std::vector<int16_t> panels;
    std::vector<float> scale, norm, rest;
};

bool pack(Batch &batch) {
    const int64_t b = batch.b, width = batch.width;
    batch.padded = (b + PANEL - 1) / PANEL * PANEL;
    batch.panels.assign(batch.padded * width, 0);
    for (auto *part : {&batch.scale, &batch.norm, &batch.rest}) part->assign(batch.padded, 0.0f);
    std::vector<int16_t> row(width);
    for (int64_t i = 0; i < b; i++) {
        Quantised found;
        if (!quantise(batch.x + i * batch.d, batch.d, width, row.data(), found)) return false;
        batch.scale[i] = found.scale, batch.norm[i] = found.norm, batch.rest[i] = found.rest;
        int16_t *panel = batch.panels.data() + i / PANEL * PANEL * width + i % PANEL * 2;
        for (int64_t p = 0; p < width / 2; p++) std::memcpy(panel + p * PANEL * 2, row.data() + 2 * p, 4);
    }
    return true;
}

struct Latents {
    int64_t n;
    const float *W, *bias;
    const int16_t *q;
    const Quantised *rows;
    const uint8_t *among;
};

// One thread's search: thresholds and nominees are its own.
struct Search {
    const Batch &batch;
    const Latents &latents;
    Floor best, others;
    std::vector<std::vector<Nominee>> nominees;

    void nominate(int64_t latent, int64_t image, float guess, float bound) {
        nominees[image].push_back({guess, bound, latent});
        // What the bound cannot judge (a number overflowed) is scored, and bounds nothing.
        const float lower = guess - bound == guess - bound ? guess - bound : -INFINITY;
        best.offer(image, lower);
        if (others.k && latents.among[latent]) others.offer(image, lower);
    }

    void tile(int64_t first, int64_t panel) {
        alignas(32) int32_t sums[TILE * PANEL];
        products(latents.q + first * batch.width, batch.width, batch.panels.data() + panel * batch.width, sums);
        // Rounding of a score taken in the fixed order, and of the guess, relative to |w| |x| and |b|.
        const float rounding = float((batch.d / LANES + 20) * 0x1p-24);
        const float tiny = float(batch.d) * 4e-38f;
        for (int64_t r = 0; r < TILE && first + r < latents.n; r++) {
            const int64_t latent = first + r;
            const Quantised &row = latents.rows[latent];
            const float bias = latents.bias[latent];
            const bool both = others.k && latents.among[latent];
            const float *limits = best.thresholds.data() + panel;
            const float *other_limits = (both ? others : best).thresholds.data() + panel;
            const __m256 by_norm = _mm256_set1_ps((row.rest + rounding * row.norm) * 1.00001f);
            const __m256 by_rest = _mm256_set1_ps((row.norm + row.rest) * 1.00001f);
            const __m256 fixed = _mm256_set1_ps(0x1p-20f * std::fabs(bias) + tiny);
            for (int64_t c = 0; c < PANEL; c += 8) {
                const float *scale = batch.scale.data() + panel + c;
                __m256 guess = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(sums + r * PANEL + c)));
                guess = _mm256_mul_ps(_mm256_mul_ps(guess, _mm256_set1_ps(row.scale)), _mm256_loadu_ps(scale));
                guess = _mm256_add_ps(guess, _mm256_set1_ps(bias));
                __m256 bound = _mm256_mul_ps(by_norm, _mm256_loadu_ps(batch.norm.data() + panel + c));
                bound = _mm256_add_ps(bound, _mm256_mul_ps(by_rest, _mm256_loadu_ps(batch.rest.data() + panel + c)));
                bound = _mm256_add_ps(bound, fixed);
                // "Not below" is true of NaN too.
                __m256 limit = _mm256_min_ps(_mm256_loadu_ps(limits + c), _mm256_loadu_ps(other_limits + c));
                __m256 kept = _mm256_cmp_ps(_mm256_add_ps(guess, bound), limit, _CMP_NLT_UQ);
                for (int left = _mm256_movemask_ps(kept); left; left &= left - 1) {
                    const int at = __builtin_ctz(left);
                    const int64_t image = panel + c + at;
                    if (image < batch.b) nominate(latent, image, guess[at], bound[at]);
                }
            }
        }
    }
};

// The k best of an image by their float scores, among all threads' nominees that are not below the threshold.
Status settle(std::vector<Search> &searches, Floor Search::*floor, bool masked, int64_t image, float *values,
              int64_t *indices, int64_t &scored) {
    const Batch &batch = searches[0].batch;
    const Latents &latents = searches[0].latents;
    Floor &merged = searches[0].*floor;
    for (size_t s = 1; s < searches.size(); s++) merged.offer_all(searches[s].*floor, image);
    const float threshold = merged.thresholds[image];
    const float *x = batch.x + image * batch.d;
    std::vector<Scored> found;
    for (const Search &search : searches)
        for (const Nominee &nominee : search.nominees[image]) {
            if (nominee.guess + nominee.bound < threshold) continue;
            if (masked && !latents.among[nominee.latent]) continue;
            const float bias = latents.bias[nominee.latent];
            const float score = dot(latents.W + nominee.latent * batch.d, x, batch.d) + bias;
            if (score != score) return SCORE_IS_NAN;
            // The bound holds for the rows that were quantised: elsewhere someone else has changed W.
            if (std::fabs(score - nominee.guess) > nominee.bound * 1.001f) return STALE;
            found.push_back({score, nominee.latent});
        }
    scored += found.size();
    std::partial_sort(found.begin(), found.begin() + merged.k, found.end(), before);
    for (int64_t c = 0; c < merged.k; c++) values[c] = found[c].value, indices[c] = found[c].latent;
    return FINE;
}

}  // namespace

extern "C" {

// Quantise all rows of W (n d) into q (n rounded up to whole tiles, width); rows: (scale, norm, rest) of each.
int revelio_quantise(const float *W, int64_t n, int64_t d, int64_t width, int16_t *q, float *rows, int threads) {
    std::atomic<int> bad{0};
    revelio::share((n + 255) / 256, threads, [&](int64_t block, int) {
        for (int64_t j = block * 256; j < std::min(n, block * 256 + 256); j++)
            if (!revelio::quantise(W + j * d, d, width, q + j * width, reinterpret_cast<Quantised *>(rows)[j]))
                bad = 1;
    });
    return bad;
}

// The k best latents of each of b images, and the k_among best of those with among[latent] != 0.
int revelio_encode(const float *x, int64_t b, int64_t d, const float *W, const float *bias, int64_t n,
                   const int16_t *q, int64_t width, const float *rows, int64_t k, const uint8_t *among,
                   int64_t k_among, float *values, int64_t *indices, float *other_values,
                   int64_t *other_indices, int64_t *scored, int threads) {
    Batch batch{b, 0, d, width, x, {}, {}, {}, {}};
    if (!pack(batch)) return INPUT_NOT_FINITE;
    const Latents latents{n, W, bias, q, reinterpret_cast<const Quantised *>(rows), among};
    std::vector<Search> searches(threads, Search{batch, latents, Floor(k, batch.padded),
                                                 Floor(k_among, batch.padded),
                                                 std::vector<std::vector<Nominee>>(b)});
    revelio::share((n + BLOCK - 1) / BLOCK, threads, [&](int64_t block, int thread) {
        const int64_t first = block * BLOCK, last = std::min(n, first + BLOCK);
        for (int64_t panel = 0; panel < batch.padded; panel += PANEL)
            for (int64_t row = first; row < last; row += TILE) searches[thread].tile(row, panel);
    });
    std::atomic<int> status{FINE};
    std::vector<int64_t> counts(threads, 0);
    revelio::share(b, threads, [&](int64_t i, int thread) {
        Status own = settle(searches, &Search::best, false, i, values + i * k, indices + i * k, counts[thread]);
        if (own == FINE && k_among)
            own = settle(searches, &Search::others, true, i, other_values + i * k_among,
                         other_indices + i * k_among, counts[thread]);
        if (own != FINE) status = own;
    });
    if (status != FINE) return status;
    *scored = 0;
    for (int64_t count : counts) *scored += count;
    return FINE;
}
}
