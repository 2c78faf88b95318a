// Products of packed latents and packed images, by what the processor has: chosen at run time.
#pragma once
#include <cstdint>

#include "rows.h"

namespace revelio {

// In ascending order of speed, of x86 and of Arm.
enum Instructions : int { AVX2, AVX2_INT8, AVX_VNNI_INT8, AVX512, AVX512_INT8, AMX, NEON, NEON_INT8 };

constexpr int PANEL = 16;   // images side by side in the packed batch: [width / 2][16 images][2] of 16 bits
constexpr int WHOLE = 96;   // the copy's rows come in multiples of it: whole tiles for every product
constexpr int DEPTH = 32;   // the copy's width comes in multiples of it
constexpr int MOST = 1024;  // sums in the largest tile
constexpr int TALLEST = 32, BLOCK = 384;  // latents of the tallest tile and of the largest block

// What a copy is made of; int8 are raised (rows.h). PIECES are int8 as well, small enough that the sums of a piece fit
// into int16.
enum class Numbers { INT16, INT8, PIECES, BFLOAT16 };
constexpr bool bytes(Numbers numbers) { return numbers == Numbers::INT8 || numbers == Numbers::PIECES; }

// A panel of int8: what an image's sums start from, so that they come out as if nothing was raised (16 int32), then
// [width / 4][16 images][4]. Of pieces: both in turn, the starts two int16 an image, of the columns c with c % 4 < 2
// and of the others, and behind them two int16 by which such sums are multiplied.
constexpr int64_t STARTS = PANEL * 4;
constexpr int64_t panel_bytes(int64_t width, Numbers numbers) {
    if (numbers == Numbers::PIECES) return pieces_of(width) * 2 * STARTS + PANEL * width;
    return numbers == Numbers::INT8 ? STARTS + PANEL * width : 2 * PANEL * width;
}

// One tile of sums, [panels][latents][16 images], int32 or (AMX) float.
struct Product {
    int latents, panels;  // of a tile
    int block;            // latents that stay in the second-level cache while all images pass
    Numbers numbers;
    // `ahead`: the latents that come next, or null if they need no fetching.
    void (*multiply)(const void *w, int64_t width, const void *x, const void *ahead, void *sums);
    // Of int8, the product of a row and an image's l (images.h), from `start` on, for what q leaves in: l is hardly
    // off, so x's part of the bound is gone.
    int32_t (*finer)(const uint8_t *w, const int8_t *l, int64_t width, int32_t start);
};

Product product_of(Instructions instructions);

// What this processor and system allow, a bit each; asks the system for AMX's tile registers.
int instructions_here();

// Tiles set up for AMX in this thread while this lives; what they were before is restored.
class Tiles {
   public:
    explicit Tiles(bool wanted);
    ~Tiles();
    Tiles(const Tiles &) = delete;

   private:
    bool wanted;
    alignas(64) uint8_t before[64];
};

// How a latent is judged: the upper bound of its score is guess + bound, see encode.cpp.
struct RowTerms {
    float scale, bias, by_norm, by_rest, fixed;
    bool among;  // whether it may be among the others' best, too
};
struct ImageTerms {
    const float *scale, *norm, *rest, *limit, *other_limit;
};

// For some latents, the images of a panel (bits) whose upper bound is not below the limit, NaN included.
using Judge = void (*)(const void *sums, const RowTerms *rows, int64_t count, const ImageTerms &images,
                       uint16_t *bits);
Judge judge_of(Instructions instructions);

}  // namespace revelio
