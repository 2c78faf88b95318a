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
// Where the codes of a few latents alone are wanted, those are scored first, and the bounds of all others are only
// counted: how many surely come before each, and how many perhaps. Images for which that does not tell are searched
// as above.
#include <algorithm>
#include <cstring>
#include <functional>

#include "batch.h"

namespace {

using namespace revelio;

enum Status : int { FINE = 0, INPUT_NOT_FINITE = 1, SCORE_IS_NAN = 2, STALE = 3 };

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
                const __m256 sum = batch.floats ? _mm256_castsi256_ps(raw) : _mm256_cvtepi32_ps(raw);
                const auto times = [&](float of, const std::vector<float> &part) {
                    return _mm256_mul_ps(_mm256_set1_ps(of), _mm256_loadu_ps(part.data() + at + from));
                };
                const __m256 scaled = _mm256_mul_ps(sum, _mm256_set1_ps(row.scale));
                const __m256 product = _mm256_mul_ps(scaled, _mm256_loadu_ps(batch.scale.data() + at + from));
                const __m256 guess = _mm256_add_ps(product, _mm256_set1_ps(row.bias));
                const __m256 both = _mm256_add_ps(times(row.by_norm, batch.norm), times(row.by_rest, batch.rest));
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
            if (wanted) {
                this->count(own, rows, count, at);
                continue;
            }
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

// The k best of what was found of an image, and zeros after them.
void place(std::vector<Scored> &found, int64_t k, float *values, int64_t *indices) {
    const int64_t kept = std::min<int64_t>(k, found.size());
    std::partial_sort(found.begin(), found.begin() + kept, found.end(), before);
    for (int64_t c = 0; c < k; c++) {
        values[c] = c < kept ? found[c].value : 0.0f;
        indices[c] = c < kept ? found[c].latent : 0;
    }
}

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
    place(found, k, values, indices);
    return FINE;
}

// What is asked of a batch, and where the results go.
struct Request {
    const Latents &latents;
    Product product;
    Judge judge;
    int64_t k, k_among;
    const uint8_t *only;
    int threads;
    float *values;
    int64_t *indices;
    float *other_values;
    int64_t *other_indices;
    int64_t scored = 0;
};

// All latents against a batch, each block of them by one thread.
std::vector<Search> searched(const Batch &batch, const Request &asked, const Wanted *wanted) {
    const size_t counts = wanted ? wanted->scores.size() : 0;
    std::vector<Search> searches(
        asked.threads, Search{batch, asked.latents, Floor(asked.k, batch.padded), Floor(asked.k_among, batch.padded),
                              std::vector<std::vector<Nominee>>(wanted ? 0 : batch.b), wanted,
                              std::vector<int32_t>(counts), std::vector<int32_t>(counts)});
    const int64_t n = asked.latents.n, size = asked.product.block;
    share((n + size - 1) / size, asked.threads, [&](int64_t block, int thread) {
        searches[thread].block(asked.product, asked.judge, block * size, std::min(n, (block + 1) * size));
    });
    return searches;
}

Status search(const Batch &batch, Request &asked) {
    std::vector<Search> searches = searched(batch, asked, nullptr);
    std::atomic<int> status{FINE};
    std::vector<int64_t> counts(asked.threads, 0);
    share(batch.b, asked.threads, [&](int64_t i, int thread) {
        const int64_t k = asked.k, k_among = asked.k_among;
        Finalists best(searches, &Search::best, false, i);
        Status own = settle(best, k, asked.only, asked.values + i * k, asked.indices + i * k);
        counts[thread] += best.scored;
        if (own == FINE && k_among) {
            Finalists others(searches, &Search::others, true, i);
            own = settle(others, k_among, nullptr, asked.other_values + i * k_among,
                         asked.other_indices + i * k_among);
            counts[thread] += others.scored;
        }
        if (own != FINE) status = own;
    });
    for (int64_t count : counts) asked.scored += count;
    return Status(status.load());
}

// The codes of a few latents by counting; an image for which the counts do not tell is searched.
Status search_few(const Batch &batch, const Wanted &wanted, Request &asked) {
    const std::vector<Search> searches = searched(batch, asked, &wanted);
    const int64_t k = asked.k, d = batch.d;
    std::vector<int64_t> open;
    std::vector<float> rows;
    for (int64_t i = 0; i < batch.b; i++) {
        std::vector<Scored> found;
        bool told = true;
        for (size_t w = 0; w < wanted.latents.size(); w++) {
            const int64_t at = w * batch.padded + i;
            if (std::isinf(wanted.scores[at])) continue;
            int64_t surely = 0, perhaps = -1;
            for (const Search &one : searches) surely += one.surely[at], perhaps += one.perhaps[at];
            if (perhaps < k) found.push_back({wanted.scores[at], wanted.latents[w]});
            else if (surely < k) told = false;
        }
        if (!told) open.push_back(i), rows.insert(rows.end(), batch.x + i * d, batch.x + (i + 1) * d);
        place(found, k, asked.values + i * k, asked.indices + i * k);
        asked.scored += wanted.latents.size();
    }
    if (open.empty()) return FINE;
    std::vector<float> values(open.size() * k);
    std::vector<int64_t> indices(open.size() * k);
    Batch part{int64_t(open.size()), 0, d, batch.width, batch.floats, rows.data(), {}, {}, {}, {}};
    if (!pack(part)) return INPUT_NOT_FINITE;
    Request rest = asked;
    rest.values = values.data(), rest.indices = indices.data(), rest.scored = 0;
    if (Status status = search(part, rest)) return status;
    for (size_t i = 0; i < open.size(); i++) {
        std::memcpy(asked.values + open[i] * k, values.data() + i * k, k * sizeof(float));
        std::memcpy(asked.indices + open[i] * k, indices.data() + i * k, k * sizeof(int64_t));
    }
    asked.scored += rest.scored;
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

// The k best latents of each of b images, and the k_among best of those with among[latent] != 0; with `only`, of the k
// best those with only[latent] != 0, where what is not above `least` may be missing.
int revelio_encode(const float *x, int64_t b, int64_t d, const float *W, const float *bias, int64_t n,
                   const int16_t *q, int64_t width, const float *rows, int64_t k, const uint8_t *among,
                   int64_t k_among, const uint8_t *only, float least, float *values, int64_t *indices,
                   float *other_values, int64_t *other_indices, int64_t *scored, int instructions, int threads) {
    const Product product = product_of(Instructions(instructions));
    Batch batch{b, 0, d, width, product.floats, x, {}, {}, {}, {}};
    if (!pack(batch)) return INPUT_NOT_FINITE;
    const Latents latents{n, W, bias, q, reinterpret_cast<const Quantised *>(rows), among};
    Request asked{latents, product, judge_of(Instructions(instructions)), k, k_among, only, threads,
                  values, indices, other_values, other_indices};
    const Wanted wanted = wanted_of(batch, latents, only, least, threads);
    const Status status = wanted.latents.empty() ? search(batch, asked) : search_few(batch, wanted, asked);
    *scored = asked.scored;
    return status;
}
}
