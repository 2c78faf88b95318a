// The products of 64-bit Arm processors: NEON's int16, and int8 where there are products of four (DotProd).
#if defined(__aarch64__)
#include <cstring>

#include "judge.h"
#include "products.h"
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// What older compilers cannot write is left out.
#if defined(__ARM_FEATURE_DOTPROD)
#define REVELIO_DOTPROD
#elif defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 9
#define REVELIO_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

namespace revelio {

namespace {

constexpr int ROWS = 4;  // latents of a tile: with 16 images 16 of the 32 registers

void neon_products(const void *latents, int64_t width, const void *images, const void *, void *sums) {
    const int16_t *w = static_cast<const int16_t *>(latents), *x = static_cast<const int16_t *>(images);
    int32x4_t sum[ROWS][4];
    for (auto &row : sum)
        for (auto &four : row) four = vdupq_n_s32(0);
    for (int64_t c = 0; c < width; c += 2, x += 2 * PANEL) {
        // Eight images each: their even columns, and their odd ones.
        const int16x8x2_t left = vld2q_s16(x), right = vld2q_s16(x + PANEL);
        for (int r = 0; r < ROWS; r++) {
            const int16_t even = w[r * width + c], odd = w[r * width + c + 1];
            const auto add = [&](int32x4_t to, int16x4_t one, int16x4_t two) {
                return vmlal_n_s16(vmlal_n_s16(to, one, even), two, odd);
            };
            sum[r][0] = add(sum[r][0], vget_low_s16(left.val[0]), vget_low_s16(left.val[1]));
            sum[r][1] = add(sum[r][1], vget_high_s16(left.val[0]), vget_high_s16(left.val[1]));
            sum[r][2] = add(sum[r][2], vget_low_s16(right.val[0]), vget_low_s16(right.val[1]));
            sum[r][3] = add(sum[r][3], vget_high_s16(right.val[0]), vget_high_s16(right.val[1]));
        }
    }
    int32_t *out = static_cast<int32_t *>(sums);
    for (int r = 0; r < ROWS; r++)
        for (int q = 0; q < 4; q++) vst1q_s32(out + r * PANEL + 4 * q, sum[r][q]);
}

#ifdef REVELIO_DOTPROD

// Latents without what they were raised by: sums start from nothing then.
REVELIO_DOTPROD void neon_int8_products(const void *latents, int64_t width, const void *images, const void *,
                                        void *sums) {
    const uint8_t *w = static_cast<const uint8_t *>(latents);
    const int8_t *x = static_cast<const int8_t *>(images) + STARTS;
    const uint8x16_t raise = vdupq_n_u8(RAISED);
    int32x4_t sum[ROWS][4];
    for (auto &row : sum)
        for (auto &four : row) four = vdupq_n_s32(0);
    for (int64_t c = 0; c < width; c += 16) {
        int8x16_t row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + r * width + c), raise));
#define REVELIO_FOUR(lane)                                                                       \
    for (int q = 0; q < 4; q++) {                                                                \
        const int8x16_t four = vld1q_s8(x + PANEL * (c + 4 * lane) + 16 * q);                     \
        for (int r = 0; r < ROWS; r++) sum[r][q] = vdotq_laneq_s32(sum[r][q], four, row[r], lane); \
    }
        REVELIO_FOUR(0)
        REVELIO_FOUR(1)
        REVELIO_FOUR(2)
        REVELIO_FOUR(3)
#undef REVELIO_FOUR
    }
    int32_t *out = static_cast<int32_t *>(sums);
    for (int r = 0; r < ROWS; r++)
        for (int q = 0; q < 4; q++) vst1q_s32(out + r * PANEL + 4 * q, sum[r][q]);
}

REVELIO_DOTPROD int32_t neon_finer(const uint8_t *w, const int8_t *l, int64_t width, int32_t) {
    const uint8x16_t raise = vdupq_n_u8(RAISED);
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t i = 0; i < width; i += 16)
        sum = vdotq_s32(sum, vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + i), raise)), vld1q_s8(l + i));
    return vaddvq_s32(sum);
}

#endif

bool dot_products_here() {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    constexpr unsigned long ASIMDDP = 1ul << 20;
    return getauxval(AT_HWCAP) & ASIMDDP;
#elif defined(__APPLE__)
    int yes = 0;
    size_t size = sizeof(yes);
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &yes, &size, nullptr, 0) && yes;
#else
    return false;
#endif
}

}  // namespace

Product product_of(Instructions instructions) {
#ifdef REVELIO_DOTPROD
    if (instructions == NEON_INT8) return {ROWS, 1, 192, Numbers::INT8, neon_int8_products, neon_finer};
#endif
    return {ROWS, 1, 96, Numbers::INT16, neon_products, nullptr};
}

Judge judge_of(Instructions) { return judge; }

int instructions_here() {
    int here = 1 << NEON;
#ifdef REVELIO_DOTPROD
    if (dot_products_here()) here |= 1 << NEON_INT8;
#endif
    return here;
}

Tiles::Tiles(bool wanted) : wanted(wanted) {}
Tiles::~Tiles() {}

}  // namespace revelio
#endif
