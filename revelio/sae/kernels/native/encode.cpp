// TopK of W x + b by certified nomination: cheap products bound every score, only nominees are scored.
//
// Let w = s q + r and x = s' q' + r' (rows.h). Then w.x - s s' q.q' = r.x + s q.r', and since |s q| <= |w| + |r|,
// |w.x - s s' q.q'| <= |r| |x| + (|w| + |r|) |r'| (Cauchy-Schwarz). `rest` is a bound of |r|, taken from r itself.
//
// q.q' is exact in int32 for int8 and int16 (AVX2 adds int8 in int16 for as long as that is exact, and an image's q' is
// m q there: rows.h, images.h). AMX adds products of bfloat16 in float: a product has 16 bits and is exact, and
// whatever the order, each passes through at most m = width roundings, of at most 2^-23 relative (it rounds to nearest:
// 2^-24), so the sum is off by at most g sum |q_i q'_i| <= g |q| |q'|, g = m 2^-23 / (1 - m 2^-23).
// |s q| |s' q'| <= (1 + 2^-8)^2 |w| |x| (rounding to 8 bits), so 1.1 m 2^-23 |w| |x| bounds it for m < 2^19. What AMX
// flushes to zero is below 2^-126 of |w| |x| a term, as rows are packed in units of their largest number; the 30
// units below leave room for it. `tiny` is for guesses and scores that are denormal themselves.
//
// The float score in the fixed order is off by at most (d / 32 + 5) 2^-24 |w| |x|, the guess by 5 2^-24 of the one or
// two products in it, which are below |w| (|x| + |r'|) and 2 |w| |r'|, |r'| <= |x|, the bias's sum by 2^-24 of both;
// (d / 32 + 30) 2^-24 |w| |x| + 2^-20 |b| covers all, and the factor 1.00001 the rounding of the bound's own terms and
// |r| beside |w|.
//
// A latent whose upper bound is below the k-th best lower bound found so far can't be among the k best. Where int8
// leaves a latent in, its q is multiplied with what int8 left of x, rounded to int8 in its turn (images.h): of the
// bound hardly more than |r| |x| is left then, and q is at hand. All others are scored in float, in the fixed order,
// those of the largest upper bounds first, until the next one's is below the k-th best score; the k best are kept:
// larger first, then the lower index. So the result is the same, bit for bit, whatever multiplied.
//
// Until k lower bounds are found, and as long as they are lower, a guess of the k-th score takes their place: a
// multiple of |x| that hardly an image fell below in the searches before. Where k float scores lie above it, it was
// right: what it left out lies below. An image where fewer do is searched again, without one.
//
// Where the codes of a few latents alone are wanted, those are scored first, and the bounds of all others are only
// counted: how many surely come before each, and how many perhaps. Images for which that does not tell are searched
// as above.
#include <algorithm>
#include <cstring>

#include "search.h"

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

    const float *row(size_t c) const { return latents.W + nominees[c].latent * batch.d; }

    // `next`: the row that is scored next, or null.
    Status score(size_t c, const float *next = nullptr) {
        if (known[c]) return FINE;
        const Nominee &one = nominees[c];
        scores[c] = dot(row(c), batch.x + image * batch.d, batch.d, next) + latents.bias[one.latent];
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

// The k best of an image by their float scores, taken in descending order of what bounds allow until the next one
// cannot be among them; zeros after them. `missed`: fewer than k lie above a guess that has left others out.
Status settle(Finalists &left, int64_t k, float guess, float *values, int64_t *indices, bool &missed) {
    std::vector<std::pair<float, size_t>> open;
    for (size_t c = 0; c < left.nominees.size(); c++) {
        const float upper = left.nominees[c].guess + left.nominees[c].bound;
        open.push_back({upper == upper ? upper : INFINITY, c});
    }
    std::sort(open.begin(), open.end(), std::greater<>());
    const auto row = [&](size_t at) { return at < open.size() ? left.row(open[at].second) : nullptr; };
    Floor best(k, 1, guess);
    std::vector<Scored> found;
    for (size_t at = 0; at < open.size() && !(open[at].first < best.thresholds[0]); at++) {
        const size_t c = open[at].second;
        announce(row(at + 2), left.batch.d);
        if (Status status = left.score(c, row(at + 1))) return status;
        best.offer(0, left.scores[c]);
        found.push_back({left.scores[c], left.nominees[c].latent});
    }
    missed = guess > -INFINITY && best.sizes[0] < k;
    place(found, k, values, indices);
    return FINE;
}

// Of an image's k best those in `only`, and zeros after them.
Status settle_some(Finalists &left, int64_t k, const uint8_t *only, float *values, int64_t *indices) {
    std::vector<Scored> found;
    for (size_t c = 0; c < left.nominees.size(); c++) {
        const int64_t latent = left.nominees[c].latent;
        bool best = true;
        if (!only[latent]) continue;
        if (Status status = left.score(c)) return status;
        if (Status status = left.among_best(c, k, best)) return status;
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
    float per_norm;  // the guess over |x|, or -infinity
    int64_t scored = 0;

    float guess(float norm) const { return per_norm > -INFINITY ? per_norm * norm : -INFINITY; }
};

// A guess for the images to come: four standard deviations below the mean of the k-th scores over |x|, so that hardly
// one is searched twice; -infinity where that says nothing.
float guess_of(const Batch &batch, const float *values, int64_t k) {
    double sum = 0, squares = 0, least = INFINITY;
    for (int64_t i = 0; i < batch.b; i++) {
        const double part = double(values[i * k + k - 1]) / batch.sizes.norm[i];
        sum += part, squares += part * part, least = std::fmin(least, part);
    }
    const double mean = sum / batch.b, spread = std::sqrt(std::fmax(squares / batch.b - mean * mean, 0));
    const double guess = std::fmin(least, mean - 4 * spread);
    return std::isfinite(guess) ? float(guess) : -INFINITY;
}

// All latents against a batch, each block of them by one thread.
std::vector<Search> searched(const Batch &batch, const Request &asked, const Wanted *wanted) {
    const size_t counts = wanted ? wanted->scores.size() : 0;
    Floor best(asked.k, batch.padded);
    for (int64_t i = 0; i < batch.b; i++) best.thresholds[i] = asked.guess(batch.sizes.norm[i]);
    std::vector<Search> searches(
        asked.threads, Search{batch, asked.latents, best, Floor(asked.k_among, batch.padded),
                              std::vector<std::vector<Nominee>>(wanted ? 0 : batch.b), wanted,
                              std::vector<int32_t>(counts), std::vector<int32_t>(counts)});
    const int64_t n = asked.latents.n, size = asked.product.block;
    share((n + size - 1) / size, asked.threads, [&](int64_t block, int thread) {
        searches[thread].block(asked.product, asked.judge, block * size, std::min(n, (block + 1) * size));
    });
    return searches;
}

Status search(const Batch &batch, Request &asked);

// A search of some of a batch's images, without a guess.
Status search_again(const Batch &batch, const std::vector<int64_t> &images, Request &asked) {
    if (images.empty()) return FINE;
    const int64_t count = images.size(), k = asked.k, among = asked.k_among, d = batch.d;
    std::vector<float> rows, values(count * k), other_values(count * among);
    std::vector<int64_t> indices(count * k), other_indices(count * among);
    for (int64_t i : images) rows.insert(rows.end(), batch.x + i * d, batch.x + (i + 1) * d);
    Batch part(rows.data(), count, d, batch.width, batch.numbers);
    if (!part.pack()) return INPUT_NOT_FINITE;
    Request rest = asked;
    rest.values = values.data(), rest.indices = indices.data(), rest.scored = 0, rest.per_norm = -INFINITY;
    rest.other_values = other_values.data(), rest.other_indices = other_indices.data();
    if (Status status = search(part, rest)) return status;
    for (int64_t i = 0; i < count; i++) {
        std::copy_n(values.data() + i * k, k, asked.values + images[i] * k);
        std::copy_n(indices.data() + i * k, k, asked.indices + images[i] * k);
        std::copy_n(other_values.data() + i * among, among, asked.other_values + images[i] * among);
        std::copy_n(other_indices.data() + i * among, among, asked.other_indices + images[i] * among);
    }
    asked.scored += rest.scored;
    return FINE;
}

Status search(const Batch &batch, Request &asked) {
    std::vector<Search> searches = searched(batch, asked, nullptr);
    std::vector<uint8_t> missed(batch.b);
    std::atomic<int> status{FINE};
    std::vector<int64_t> counts(asked.threads, 0);
    share(batch.b, asked.threads, [&](int64_t i, int thread) {
        const int64_t k = asked.k, k_among = asked.k_among;
        Finalists best(searches, &Search::best, false, i);
        float *values = asked.values + i * k;
        int64_t *indices = asked.indices + i * k;
        bool again = false, never;
        Status own = asked.only ? settle_some(best, k, asked.only, values, indices)
                                : settle(best, k, asked.guess(batch.sizes.norm[i]), values, indices, again);
        if (own == FINE && again) {
            missed[i] = 1;
            return;
        }
        counts[thread] += best.scored;
        if (own == FINE && k_among) {
            Finalists others(searches, &Search::others, true, i);
            own = settle(others, k_among, -INFINITY, asked.other_values + i * k_among,
                         asked.other_indices + i * k_among, never);
            counts[thread] += others.scored;
        }
        if (own != FINE) status = own;
    });
    for (int64_t count : counts) asked.scored += count;
    if (status != FINE) return Status(status.load());
    std::vector<int64_t> open;
    for (int64_t i = 0; i < batch.b; i++)
        if (missed[i]) open.push_back(i);
    return search_again(batch, open, asked);
}

// The codes of a few latents by counting; an image for which the counts do not tell is searched.
Status search_few(const Batch &batch, const Wanted &wanted, Request &asked) {
    const std::vector<Search> searches = searched(batch, asked, &wanted);
    const int64_t k = asked.k;
    std::vector<int64_t> open;
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
        if (!told) open.push_back(i);
        place(found, k, asked.values + i * k, asked.indices + i * k);
        asked.scored += wanted.latents.size();
    }
    return search_again(batch, open, asked);
}

}  // namespace

extern "C" {

// What this processor can do: see products.h.
int revelio_instructions() { return revelio::instructions_here(); }

// Copies all rows of W (n d) into q (n rounded up to a multiple of WHOLE, width); rows: (scale, norm, rest) of each.
int revelio_quantise(const float *W, int64_t n, int64_t d, int64_t width, void *q, float *rows, int instructions,
                     int threads) {
    const revelio::Copy copy = revelio::copy_of(q, rows, width, instructions);
    std::atomic<int> bad{0};
    revelio::share((n + 255) / 256, threads, [&](int64_t block, int) {
        for (int64_t j = block * 256; j < std::min(n, block * 256 + 256); j++)
            if (!copy.renew(j, W + j * d, d)) bad = 1;
    });
    return bad;
}

// The k best latents of each of b images, and the k_among best of those with among[latent] != 0; with `only`, of the k
// best those with only[latent] != 0, where what is not above `least` may be missing. per_norm: null, or the guess over
// |x| to start from, in whose place the next one is written.
int revelio_encode(const float *x, int64_t b, int64_t d, const float *W, const float *bias, int64_t n, void *q,
                   int64_t width, float *rows, int64_t k, const uint8_t *among, int64_t k_among, const uint8_t *only,
                   float least, float *values, int64_t *indices, float *other_values, int64_t *other_indices,
                   int64_t *scored, float *per_norm, int instructions, int threads) {
    const Product product = product_of(Instructions(instructions));
    Batch batch(x, b, d, width, product.numbers);
    if (!batch.pack()) return INPUT_NOT_FINITE;
    const Latents latents{n, W, bias, copy_of(q, rows, width, instructions), among};
    Request asked{latents, product, judge_of(Instructions(instructions)), k, k_among, only, threads,
                  values, indices, other_values, other_indices, per_norm ? *per_norm : -INFINITY};
    const Wanted wanted = wanted_of(batch, latents, only, least, threads);
    const Status status = wanted.latents.empty() ? search(batch, asked) : search_few(batch, wanted, asked);
    *scored = asked.scored;
    if (status == FINE && per_norm) *per_norm = guess_of(batch, values, k);
    return status;
}
}
