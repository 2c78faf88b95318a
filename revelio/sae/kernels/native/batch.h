// What a search works on: packed images, quantised latents, and the few latents whose codes alone are wanted.
#pragma once
#include <algorithm>
#include <numeric>

#include "copy.h"
#include "images.h"
#include "products.h"
#include "rows.h"

namespace revelio {

// Latents that are wanted are few if there are so many times as many in all.
constexpr int64_t FEW = 64;

// Of packed images: see Quantised.
struct Sizes {
    std::vector<float> scale, norm, rest;

    explicit Sizes(int64_t count) : scale(count), norm(count), rest(count) {}

    void put(int64_t image, const Quantised &found) {
        scale[image] = found.scale, norm[image] = found.norm, rest[image] = found.rest;
    }
};

struct Batch {
    int64_t b, padded, d, width;
    Numbers numbers;
    const float *x;
    std::vector<uint8_t> panels;  // see products.h
    Sizes sizes;
    // Beside int8 q, the l that make it finer (images.h), and what a product with raised int8 starts from.
    std::vector<int8_t> finer;
    Sizes finer_sizes;
    std::vector<int32_t> starts;

    Batch(const float *x, int64_t b, int64_t d, int64_t width, Numbers numbers)
        : b(b), padded((b + 2 * PANEL - 1) / (2 * PANEL) * (2 * PANEL)), d(d), width(width), numbers(numbers), x(x),
          panels(padded / PANEL * panel_bytes(width, numbers)), sizes(padded), finer(int8() ? b * width : 0),
          finer_sizes(int8() ? b : 0), starts(int8() ? b : 0) {}

    bool int8() const { return bytes(numbers); }
    bool bfloat16() const { return numbers == Numbers::BFLOAT16; }

    // The panel that an image is in.
    const uint8_t *panel(int64_t image) const { return panels.data() + image / PANEL * panel_bytes(width, numbers); }

    // False where a number is NaN or infinite.
    bool pack() {
        std::vector<int16_t> row(width);
        Image image(width);
        for (int64_t i = 0; i < b; i++) {
            Quantised found;
            const float *own = x + i * d;
            uint8_t *place = panels.data() + i / PANEL * panel_bytes(width, numbers) + i % PANEL * 4;
            if (!int8()) {
                if (!quantise(own, d, width, bfloat16(), row.data(), found)) return false;
                sizes.put(i, found);
                spread(row.data(), width, place);
                continue;
            }
            if (!image.take(own, d, numbers == Numbers::PIECES)) return false;
            sizes.put(i, image.coarse), finer_sizes.put(i, image.fine);
            if (numbers == Numbers::PIECES) pieces(image, place);
            else {
                const int32_t start = start_of(image.q);
                std::memcpy(place, &start, sizeof(start));
                spread(image.q.data(), width, place + STARTS);
            }
            std::copy_n(image.l.begin(), width, finer.begin() + i * width);
            starts[i] = start_of(image.l);
        }
        return true;
    }

   private:
    // A row's numbers, four bytes side by side, into its panel.
    template <class Integer>
    static void spread(const Integer *row, int64_t count, uint8_t *place) {
        for (int64_t c = 0; c < count; c += 4 / sizeof(Integer), place += PANEL * 4) std::memcpy(place, row + c, 4);
    }

    // What takes off what raised numbers add to a product.
    static int32_t start_of(const std::vector<int8_t> &row) {
        return -RAISED * std::accumulate(row.begin(), row.end(), 0);
    }

    // The same by pieces, each between what its sums start from and what they are multiplied by.
    void pieces(const Image &image, uint8_t *place) const {
        for (int64_t c = 0; c < width; c += PIECE) {
            const int64_t count = std::min<int64_t>(PIECE, width - c);
            int16_t starts[2] = {0, 0};
            for (int64_t i = 0; i < count; i++) starts[i / 2 % 2] -= RAISED * image.q[c + i];
            std::memcpy(place, starts, sizeof(starts));
            spread(image.q.data() + c, count, place + STARTS);
            std::memcpy(place + STARTS + PANEL * count, image.factors.data() + 2 * c / PIECE, sizeof(starts));
            place += panel_bytes(count, Numbers::PIECES);
        }
    }
};

struct Latents {
    int64_t n;
    const float *W, *bias;
    Copy copy;
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
