// What a search works on: packed images, quantised latents, and the few latents whose codes alone are wanted.
#pragma once
#include "products.h"
#include "rows.h"

namespace revelio {

// Latents that are wanted are few if there are so many times as many in all.
constexpr int64_t FEW = 64;

struct Batch {
    int64_t b, padded, d, width;
    bool floats;
    const float *x;
    std::vector<int16_t> panels;
    std::vector<float> scale, norm, rest;
};

inline bool pack(Batch &batch) {
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

// A few latents that are wanted, with their scores (latents, padded images): infinite where the code is not wanted,
// NaN where it is not finite.
struct Wanted {
    std::vector<int64_t> latents;
    std::vector<float> scores;
};

inline Wanted wanted_of(const Batch &batch, const Latents &latents, const uint8_t *only, float least, int threads) {
    Wanted wanted;
    for (int64_t j = 0; only && j < latents.n; j++)
        if (only[j]) wanted.latents.push_back(j);
    if (int64_t(wanted.latents.size()) * FEW > latents.n) wanted.latents.clear();
    wanted.scores.assign(wanted.latents.size() * batch.padded, INFINITY);
    share(batch.b, threads, [&](int64_t i, int) {
        for (size_t w = 0; w < wanted.latents.size(); w++) {
            const int64_t j = wanted.latents[w];
            const float score = dot(latents.W + j * batch.d, batch.x + i * batch.d, batch.d) + latents.bias[j];
            if (!(score <= least)) wanted.scores[w * batch.padded + i] = std::isfinite(score) ? score : NAN;
        }
    });
    return wanted;
}

}  // namespace revelio
