// What follows the choice of latents: sums of few rows, and one pass of gradient, projection, Adam, unit length.
//
// The pass visits the rows that can change (revelio/sae/adam.py says which and why), each by one thread, and
// quantises an encoder row anew while it is in the cache.
#include <algorithm>

#include "copy.h"
#include "products.h"
#include "rows.h"

namespace {

using namespace revelio;

struct Adam {
    int64_t t;
    float beta1, beta2, one_less_beta1, one_less_beta2, eps, step, root;  // step, root: bias-corrected factors
    int unit_norm;
};

// A parameter's row with its moments.
struct Moved {
    float *w, *mean, *square;
};

// One step on a row, while the row that comes next is fetched; true if a bit of it changed.
bool adam(Moved row, const float *__restrict gradients, const Moved *next, const Adam &a, int64_t d) {
    constexpr int64_t CHUNK = 64;
    int changed = 0;
    for (int64_t at = 0; at < d; at += CHUNK) {
        float *__restrict w = row.w + at, *__restrict mean = row.mean + at, *__restrict square = row.square + at;
        const float *__restrict gradient = gradients + at;
        const int64_t count = std::min(CHUNK, d - at);
        if (next)
            for (const float *part : {next->w, next->mean, next->square}) fetch(part + at, count);
        for (int64_t i = 0; i < count; i++) {
            mean[i] = a.beta1 * mean[i] + a.one_less_beta1 * gradient[i];
            square[i] = a.beta2 * square[i] + a.one_less_beta2 * (gradient[i] * gradient[i]);
            const float moved = w[i] - a.step * mean[i] / (std::sqrt(square[i]) * a.root + a.eps);
            changed |= moved != w[i];
            w[i] = moved;
        }
    }
    return changed;
}

// The decay that a resting row missed, multiplied step by step as if it had not rested.
void decay(float *moments, float beta, int64_t steps, int64_t d) {
    constexpr int64_t CHUNK = 64;
    for (int64_t i = 0; i < d; i += CHUNK) {
        const int64_t count = std::min(CHUNK, d - i);
        float held[CHUNK] = {0};
        std::copy(moments + i, moments + i + count, held);
        for (int64_t step = 0; step < steps; step++)
            for (int64_t c = 0; c < CHUNK; c++) held[c] *= beta;
        std::copy(held, held + count, moments + i);
    }
}

void unit(float *row, int64_t d) {
    const float length = std::sqrt(dot(row, row, d));
    if (!(length > 0)) return;
    for (int64_t i = 0; i < d; i++) row[i] /= length;
}

struct Parameters {
    float *W_enc, *W_dec, *mean_enc, *square_enc, *mean_dec, *square_dec;
    int64_t *last;
    int64_t n, d;
    Copy copy;

    Moved enc(int64_t latent) const { return {W_enc + latent * d, mean_enc + latent * d, square_enc + latent * d}; }
    Moved dec(int64_t latent) const { return {W_dec + latent * d, mean_dec + latent * d, square_dec + latent * d}; }
};

struct Terms {
    const int64_t *latents, *images, *output_rows;  // latents ascend
    const float *values, *gradients, *inputs, *outputs;
    int64_t count;

    // Rows of a term; null behind the last.
    const float *input(int64_t e, int64_t d) const { return e < count ? inputs + images[e] * d : nullptr; }
    const float *output(int64_t e, int64_t d) const { return e < count ? outputs + output_rows[e] * d : nullptr; }
};

struct Row {
    int64_t latent, first, end;
};

// The latents that can change, with their terms.
std::vector<Row> moving(const Parameters &p, const Terms &terms) {
    std::vector<Row> found;
    int64_t at = 0;
    for (int64_t latent = 0; latent < p.n; latent++) {
        const int64_t first = at;
        while (at < terms.count && terms.latents[at] == latent) at++;
        if (at > first || p.last[latent] > 0) found.push_back({latent, first, at});
    }
    return found;
}

// One row's update; false if it is no longer finite. `next`: the row that comes next, or null.
bool update(const Parameters &p, const Terms &terms, const Adam &a, Row row, const Row *next, float *d_enc,
            float *d_dec) {
    const int64_t d = p.d;
    const bool active = row.end > row.first;
    const Moved enc = p.enc(row.latent), dec = p.dec(row.latent);
    const Moved next_enc = p.enc(next ? next->latent : 0), next_dec = p.dec(next ? next->latent : 0);
    int64_t &last = p.last[row.latent];
    if (last < 0) {
        for (float *mean : {enc.mean, dec.mean}) decay(mean, a.beta1, a.t - 1 + last, d);
        for (float *square : {enc.square, dec.square}) decay(square, a.beta2, a.t - 1 + last, d);
    }
    std::fill(d_enc, d_enc + d, 0.0f);
    std::fill(d_dec, d_dec + d, 0.0f);
    for (int64_t e = row.first; e < row.end; e++) {
        add_scaled(d_enc, terms.input(e, d), terms.gradients[e], d, terms.input(e + 1, d));
        add_scaled(d_dec, terms.output(e, d), terms.values[e], d, terms.output(e + 1, d));
    }
    if (active) add_scaled(d_dec, dec.w, -dot(d_dec, dec.w, d), d);
    const bool enc_changed = adam(enc, d_enc, next ? &next_enc : nullptr, a, d);
    const bool dec_changed = adam(dec, d_dec, next ? &next_dec : nullptr, a, d);
    if (a.unit_norm && (active || dec_changed)) unit(dec.w, d);
    if (active) last = a.t;
    else if (a.t >= 15 && !enc_changed && !dec_changed) last = -a.t;
    if (!enc_changed) return true;
    return p.copy.renew(row.latent, enc.w, d);
}

}  // namespace

extern "C" {

// The code times rows of a matrix: out (b d), the k terms of an image added in their order.
void revelio_decode(const float *values, const int64_t *indices, int64_t b, int64_t k, const float *rows,
                    int64_t d, float *out, int threads) {
    revelio::share(b, threads, [&](int64_t i, int) {
        const auto row = [&](int64_t c) { return c < i * k + k ? rows + indices[c] * d : nullptr; };
        std::fill(out + i * d, out + i * d + d, 0.0f);
        for (int64_t c = i * k; c < i * k + k; c++) {
            revelio::announce(row(c + 2), d);
            revelio::add_scaled(out + i * d, row(c), values[c], d, row(c + 1));
        }
    });
}

// out (b k): the products of an image's output gradient with the rows of its latents.
void revelio_code_gradients(const float *outputs, const int64_t *indices, int64_t b, int64_t k,
                            const float *rows, int64_t d, float *out, int threads) {
    revelio::share(b, threads, [&](int64_t i, int) {
        const auto row = [&](int64_t c) { return c < i * k + k ? rows + indices[c] * d : nullptr; };
        for (int64_t c = i * k; c < i * k + k; c++) {
            revelio::announce(row(c + 2), d);
            out[c] = revelio::dot(outputs + i * d, row(c), d, row(c + 1));
        }
    });
}

// Scale the moving rows of a matrix to unit length.
void revelio_unit_norm(float *rows, const int64_t *last, int64_t n, int64_t d, int threads) {
    revelio::share((n + 63) / 64, threads, [&](int64_t block, int) {
        const int64_t end = std::min(n, block * 64 + 64);
        for (int64_t j = block * 64; j < end; j++) {
            if (j + 1 < end && last[j + 1] > 0) revelio::fetch(rows + (j + 1) * d, d);
            if (last[j] > 0) unit(rows + j * d, d);
        }
    });
}

// One Adam step of both matrices. Gives 1 if an encoder row is no longer finite.
int revelio_update(float *const *matrices, int64_t *last, int64_t n, int64_t d, void *q, int64_t width, float *rows,
                   const int64_t *const *places, const float *const *weights, int64_t count,
                   int64_t t, double rate, double beta1, double beta2, double eps, int unit_norm, int instructions,
                   int threads) {
    const Parameters p{matrices[0], matrices[1], matrices[2], matrices[3], matrices[4], matrices[5],
                       last, n, d, copy_of(q, rows, width, instructions)};
    const Terms terms{places[0], places[1], places[2], weights[0], weights[1], weights[2], weights[3], count};
    const Adam a{t, float(beta1), float(beta2), float(1 - beta1), float(1 - beta2), float(eps),
                 float(rate / (1 - std::pow(beta1, t))), float(1 / std::sqrt(1 - std::pow(beta2, t))), unit_norm};
    const std::vector<Row> todo = moving(p, terms);
    std::vector<std::vector<float>> gradients(threads, std::vector<float>(2 * d));
    std::atomic<int> bad{0};
    constexpr int64_t BLOCK = 16;
    revelio::share((todo.size() + BLOCK - 1) / BLOCK, threads, [&](int64_t block, int thread) {
        float *buffer = gradients[thread].data();
        const int64_t end = std::min<int64_t>(todo.size(), block * BLOCK + BLOCK);
        for (int64_t i = block * BLOCK; i < end; i++)
            if (!update(p, terms, a, todo[i], i + 1 < end ? &todo[i + 1] : nullptr, buffer, buffer + d)) bad = 1;
    });
    return bad;
}
}
