// Products of packed latents and packed images, by what the processor has: chosen at run time.
#pragma once
#include <cstdint>

namespace revelio {

// In ascending order of speed. AMX multiplies bfloat16, the others int16.
enum Instructions : int { AVX2 = 0, AVX512 = 1, AMX = 2 };

constexpr int PANEL = 16;   // images side by side in the packed batch: [width / 2][16 images][2]
constexpr int WHOLE = 96;   // the copy's rows come in multiples of it: whole tiles for every product
constexpr int DEPTH = 32;   // the copy's width comes in multiples of it
constexpr int MOST = 1024;  // sums in the largest tile
constexpr int TALLEST = 32, BLOCK = 384;  // latents of the tallest tile and of the largest block

// One tile of sums, [panels][latents][16 images], int32 or (AMX) float.
struct Product {
    int latents, panels;  // of a tile
    int block;            // latents that stay in the second-level cache while all images pass
    bool floats;
    // `ahead`: the latents that come next, or null if they need no fetching.
    void (*multiply)(const int16_t *w, int64_t width, const int16_t *x, const int16_t *ahead, void *sums);
};

Product product_of(Instructions instructions);

// What this processor and system allow; asks the system for AMX's tile registers.
Instructions best_instructions();

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
