// TopK of W x + b by certified nomination: cheap products bound every score, only nominees are scored.
//
// Let w = s q + r and x = s' q' + r' (rows.h). Then w.x - s s' q.q' = r.x + s q.r', and since |s q| <= |w| + |r|,
// |w.x - s s' q.q'| <= |r| |x| + (|w| + |r|) |r'| (Cauchy-Schwarz). `rest` is a bound of |r|, taken from r itself.
//
// q.q' is exact in int32 for int16. AMX adds products of bfloat16 in float: a product has 16 bits and is exact,
// and whatever the order, each passes through at most m = width roundings, of at most 2^-23 relative (it rounds to
// nearest: 2^-24), so the sum is off by at most g sum |q_i q'_i| <= g |q| |q'|, g = m 2^-23 / (1 - m 2^-23).
// |s q| |s' q'| <= (1 + 2^-8)^2 |w| |x| (rounding to 8 bits), so 1.1 m 2^-23 |w| |x| bounds it for m < 2^19. What AMX
// flushes to zero is below 2^-126 of |w| |x| a term, as rows are packed in units of their largest number; the 20
// units below leave room for it. `tiny` is for guesses and scores that are denormal themselves.
//
// The float score in the fixed order is off by at most (d / 32 + 5) 2^-24 |w| |x|, the guess by some 2^-24 of
// itself, the bias's sum by 2^-24 of both; (d / 32 + 20) 2^-24 |w| |x| + 2^-20 |b| covers all, and the factor 1.00001
// the rounding of the bound's own terms.
//
// A latent whose upper bound is below the k-th best lower bound found so far cannot be among the k best; all
// others are scored in float, in the fixed order, and the k best are kept: larger first, then the lower index. So
// the result is the same, bit for bit, whatever multiplied.
//
// Where the codes of a few latents alone are wanted, those are scored first. A latent that cannot come before the
// least of their scores above `least` cannot change their codes, and is not nominated.
#include <algorithm>
#include <cstring>
#include <functional>

#include "products.h"
#include "rows.h"

namespace {

using namespace revelio;

enum Status : int { FINE = 0, INPUT_NOT_FINITE = 1, SCORE_IS_NAN = 2, STALE = 3 };

// Latents that are wanted are few if there are so many times as many in all.
constexpr int64_t FEW = 64;

struct Scored {
    float value;
    int64_t latent;
};

// Whether a comes before b: the larger value, then the lower latent.
bool before(const Scored &a, const Scored &b) {
    return a.value > b.value || (a.value == b.value && a.latent < b.latent);
}

// The k largest lower bounds so far of every image, as heaps with the least on top, which is the threshold unless
// a larger one was given.
struct Floor {
    int64_t k;
    std::vector<float> heaps, thresholds;
    std::vector<int64_t> sizes;

    Floor(int64_t k, const std::vector<float> &thresholds)
        : k(k), heaps(k * thresholds.size()), thresholds(thresholds), sizes(thresholds.size(), 0) {}

    void offer(int64_t image, float lower) {
        float *heap = heaps.data() + image * k;
        int64_t &size = sizes[image];
        if (size == k) {
            if (!(lower > heap[0])) return;
            std::pop_heap(heap, heap + size--, std::greater<float>());
        }
        heap[size++] = lower;
        std::push_heap(heap, heap + size, std::greater<float>());
        if (size == k) thresholds[image] = std::max(thresholds[image], heap[0]);
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
    bool floats;
    const float *x;
    std::vector<int16_t> panels;
    std::vector<float> scale, norm, rest;
};

bool pack(Batch &batch) {
    const int64_t b = batch.b, width = batch.width;
    batch.padded = (b + 2 * PANEL - 1) / (2 * PANEL) * (2 * PANEL);
    batch.panels.assign(batch.padded * width, 0);
    for (auto *part : {&batch.scale, &batch.norm, &batch.rest}) part->assign(batch.padded, 0.0f);
    std::vector<int16_t> row(width);
    for (int64_t i = 0; i < b; i++) {
        Quantised found;
        if (!quantise(batch.x + i * batch.d, batch.d, width, batch.floats, row.data(), found)) return false;
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

// Of each image the least score above `least` of the latents in `only`, if they are few; else what rules out none.
std::vector<float> least_wanted(const Batch &batch, const Latents &latents, const uint8_t *only, float least,
                                int threads) {
    std::vector<int64_t> wanted;
    for (int64_t j = 0; only && j < latents.n; j++)
        if (only[j]) wanted.push_back(j);
    const bool few = only && int64_t(wanted.size()) * FEW <= latents.n;
    std::vector<float> found(batch.padded, few ? INFINITY : -INFINITY);
    if (!few) return found;
    share(batch.b, threads, [&](int64_t i, int) {
        for (int64_t j : wanted) {
            const float score = dot(latents.W + j * batch.d, batch.x + i * batch.d, batch.d) + latents.bias[j];
            // What is not a number rules out none, and is reported when it is scored.
            if (!(score <= least) && !(score >= found[i])) found[i] = score;
        }
    });
    return found;
}

// One thread's search: thresholds and nominees are its own.
struct Search {
    const Batch &batch;
    const Latents &latents;
    Floor best, others;
    std::vector<std::vector<Nominee>> nominees;

    void nominate(int64_t latent, int64_t image, float sum, const RowTerms &row) {
        const float guess = sum * row.scale * batch.scale[image] + row.bias;
        const float bound = row.by_norm * batch.norm[image] + row.by_rest * batch.rest[image] + row.fixed;
        const float limit = best.thresholds[image];
        if (guess + bound < (row.among ? std::min(limit, others.thresholds[image]) : limit)) return;
        nominees[image].push_back({guess, bound, latent});
        // What the bound cannot judge (a number overflowed) is scored, and bounds nothing.
        const float lower = guess - bound == guess - bound ? guess - bound : -INFINITY;
        best.offer(image, lower);
        if (row.among) others.offer(image, lower);
    }

    RowTerms terms(int64_t latent) const {
        const Quantised &row = latents.rows[latent];
        // Relative to |w| |x|: the rounding of a score taken in the fixed order, of the guess, and of AMX's sum.
        float rounding = float((batch.d / LANES + 20) * 0x1p-24);
        if (batch.floats) rounding += float(batch.width * 1.1 * 0x1p-23);
        const float bias = latents.bias[latent], tiny = float(batch.d) * 4e-38f;
        return {row.scale,
                bias,
                (row.rest + rounding * row.norm) * 1.00001f,
                (row.norm + row.rest) * 1.00001f,
                0x1p-20f * std::fabs(bias) + tiny,
                others.k && latents.among[latent]};
    }

    // A tile of the product: latents from `first` on, images from `image` on.
    void tile(const Product &product, Judge judge, int64_t first, int64_t image, const RowTerms *rows, bool fetch) {
        alignas(64) int32_t sums[MOST];
        uint16_t bits[TALLEST];
        const int16_t *w = latents.q + first * batch.width;
        const int16_t *ahead = fetch ? w + product.latents * batch.width : nullptr;
        product.multiply(w, batch.width, batch.panels.data() + image * batch.width, ahead, sums);
        const int64_t count = std::min<int64_t>(product.latents, latents.n - first);
        for (int p = 0; p < product.panels; p++) {
            const int64_t at = image + p * PANEL;
            const float *limit = best.thresholds.data() + at, *other = others.thresholds.data() + at;
            const int32_t *own = sums + p * product.latents * PANEL;
            judge(own, rows, count,
                  {batch.scale.data() + at, batch.norm.data() + at, batch.rest.data() + at, limit, other}, bits);
            for (int64_t r = 0; r < count; r++)
                for (unsigned left = bits[r]; left; left &= left - 1) {
                    const int bit = __builtin_ctz(left);
                    if (at + bit >= batch.b) break;
                    float sum = float(own[r * PANEL + bit]);
                    if (batch.floats) std::memcpy(&sum, own + r * PANEL + bit, sizeof(sum));
                    nominate(first + r, at + bit, sum, rows[r]);
                }
        }
    }

    // The latents from `first` to `last`, a block that stays in the cache, with all images.
    void block(const Product &product, Judge judge, int64_t first, int64_t last) {
        const Tiles tiles(product.floats);
        RowTerms rows[BLOCK];
        for (int64_t latent = first; latent < last; latent++) rows[latent - first] = terms(latent);
        for (int64_t image = 0; image < batch.b; image += product.panels * PANEL)
            for (int64_t row = first; row < last; row += product.latents)
                tile(product, judge, row, image, rows + (row - first), image == 0 && row + product.latents < last);
    }
};

// What is left of an image's nominees, all threads', once none below the threshold is; scored when asked for.
struct Finalists {
    const Batch &batch;
    const Latents &latents;
    const int64_t image;
    std::vector<Nominee> nominees;
    std::vector<float> scores;
    std::vector<uint8_t> known;
    int64_t scored = 0;

    Finalists(std::vector<Search> &searches, Floor Search::*floor, bool masked, int64_t image)
        : batch(searches[0].batch), latents(searches[0].latents), image(image) {
        Floor &merged = searches[0].*floor;
        for (size_t s = 1; s < searches.size(); s++) merged.offer_all(searches[s].*floor, image);
        for (const Search &search : searches)
            for (const Nominee &one : search.nominees[image])
                if (!(one.guess + one.bound < merged.thresholds[image]) && (!masked || latents.among[one.latent]))
                    nominees.push_back(one);
        scores.resize(nominees.size()), known.resize(nominees.size());
    }

    Status score(size_t c) {
        if (known[c]) return FINE;
        const Nominee &one = nominees[c];
        scores[c] = dot(latents.W + one.latent * batch.d, batch.x + image * batch.d, batch.d) + latents.bias[one.latent];
        if (scores[c] != scores[c]) return SCORE_IS_NAN;
        // The bound holds for the rows that were quantised: elsewhere someone else has changed W.
        if (std::fabs(scores[c] - one.guess) > one.bound * 1.001f) return STALE;
        known[c] = 1, scored++;
        return FINE;
    }

    // Whether fewer than k come before one that is scored: bounds mostly tell, the rest is scored.
    Status among_best(size_t c, int64_t k, bool &yes) {
        const Scored own{scores[c], nominees[c].latent};
        std::vector<size_t> open;
        int64_t surely = 0;
        for (size_t o = 0; o < nominees.size(); o++) {
            const Nominee &other = nominees[o];
            if (other.guess - other.bound > own.value) surely++;
            else if (o != c && !(other.guess + other.bound < own.value)) open.push_back(o);
        }
        if (surely < k && surely + int64_t(open.size()) >= k)
            for (size_t o : open) {
                if (Status status = score(o)) return status;
                surely += before({scores[o], nominees[o].latent}, own);
            }
        yes = surely < k;
        return FINE;
    }
};

// The k best of an image by their float scores; of them those in `only`, if that is given, and zeros after them.
Status settle(Finalists &left, int64_t k, const uint8_t *only, float *values, int64_t *indices) {
    std::vector<Scored> found;
    for (size_t c = 0; c < left.nominees.size(); c++) {
        const int64_t latent = left.nominees[c].latent;
        bool best = true;
        if (only && !only[latent]) continue;
        if (Status status = left.score(c)) return status;
        if (Status status = only ? left.among_best(c, k, best) : FINE) return status;
        if (best) found.push_back({left.scores[c], latent});
    }
    const int64_t kept = std::min<int64_t>(k, found.size());
    std::partial_sort(found.begin(), found.begin() + kept, found.end(), before);
    for (int64_t c = 0; c < k; c++) {
        values[c] = c < kept ? found[c].value : 0.0f;
        indices[c] = c < kept ? found[c].latent : 0;
    }
    return FINE;
}

}  // namespace

extern "C" {

// What this processor can do: see products.h.
int revelio_instructions() { return revelio::best_instructions(); }

// Quantise all rows of W (n d) into q (n rounded up to a multiple of WHOLE, width); rows: (scale, norm, rest) of each.
int revelio_quantise(const float *W, int64_t n, int64_t d, int64_t width, int16_t *q, float *rows,
                     int instructions, int threads) {
    const bool floats = revelio::product_of(Instructions(instructions)).floats;
    std::atomic<int> bad{0};
    revelio::share((n + 255) / 256, threads, [&](int64_t block, int) {
        for (int64_t j = block * 256; j < std::min(n, block * 256 + 256); j++)
            if (!revelio::quantise(W + j * d, d, width, floats, q + j * width, reinterpret_cast<Quantised *>(rows)[j]))
                bad = 1;
    });
    return bad;
}

// The k best latents of each of b images, and the k_among best of those with among[latent] != 0.
int revelio_encode(const float *x, int64_t b, int64_t d, const float *W, const float *bias, int64_t n,
                   const int16_t *q, int64_t width, const float *rows, int64_t k, const uint8_t *among,
                   int64_t k_among, const uint8_t *only, float least, float *values, int64_t *indices, float *other_values,
                   int64_t *other_indices, int64_t *scored, int instructions, int threads) {
    const Product product = product_of(Instructions(instructions));
    const Judge judge = judge_of(Instructions(instructions));
    Batch batch{b, 0, d, width, product.floats, x, {}, {}, {}, {}};
    if (!pack(batch)) return INPUT_NOT_FINITE;
    const Latents latents{n, W, bias, q, reinterpret_cast<const Quantised *>(rows), among};
    const std::vector<float> wanted = least_wanted(batch, latents, only, least, threads);
    const std::vector<float> others(batch.padded, k_among ? -INFINITY : INFINITY);
    std::vector<Search> searches(threads, Search{batch, latents, Floor(k, wanted), Floor(k_among, others),
                                                 std::vector<std::vector<Nominee>>(b)});
    revelio::share((n + product.block - 1) / product.block, threads, [&](int64_t block, int thread) {
        const int64_t first = block * product.block;
        searches[thread].block(product, judge, first, std::min(n, first + product.block));
    });
    std::atomic<int> status{FINE};
    std::vector<int64_t> counts(threads, 0);
    revelio::share(b, threads, [&](int64_t i, int thread) {
        Finalists best(searches, &Search::best, false, i);
        Status own = settle(best, k, only, values + i * k, indices + i * k);
        counts[thread] += best.scored;
        if (own == FINE && k_among) {
            Finalists others(searches, &Search::others, true, i);
            own = settle(others, k_among, nullptr, other_values + i * k_among, other_indices + i * k_among);
            counts[thread] += others.scored;
        }
        if (own != FINE) status = own;
    });
    if (status != FINE) return status;
    *scored = 0;
    for (int64_t count : counts) *scored += count;
    return FINE;
}
}
