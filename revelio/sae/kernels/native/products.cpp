// The products of x86 processors.
#if !defined(__aarch64__)
#include "products.h"

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "judge.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// What older compilers cannot write is left out: the next slower product is used.
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define REVELIO_AVX_VNNI __attribute__((target("avxvnni")))
#define REVELIO_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#if defined(__linux__) && defined(__x86_64__)
#define REVELIO_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif
#endif

namespace revelio {

namespace {

// 6 latents times 16 images. Twelve sums, two pieces of x and two temporaries are all 16 registers: compilers
// spill some and lose 40 %, hence by hand.
void avx2_products(const void *latents, int64_t width, const void *images, const void *, void *sums) {
    const int16_t *w = static_cast<const int16_t *>(latents), *x = static_cast<const int16_t *>(images);
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

// A piece of the same of int8, `fours` times 4 columns. vpmaddubsw adds two products in int16 and would saturate, but
// 255 * 128 < 2^15. Sums of raised numbers wrap on the way, and come out right, since those of the piece itself fit
// (rows.h).
void avx2_piece(const uint8_t *w, int64_t width, const uint8_t *x, int64_t fours, int32_t *sums) {
    const uint8_t *lower = w + 3 * width;
#define REVELIO_INT8_ROW(address, one, two)                                     \
    "vpbroadcastd " address ",%%ymm14\n\tvpmaddubsw %%ymm12,%%ymm14,%%ymm15\n\t" \
    "vpaddw %%ymm15,%%ymm" one ",%%ymm" one "\n\t"                              \
    "vpmaddubsw %%ymm13,%%ymm14,%%ymm14\n\tvpaddw %%ymm14,%%ymm" two ",%%ymm" two "\n\t"
#define REVELIO_START(one, two) "vmovdqa %%ymm0,%%ymm" one "\n\tvmovdqa %%ymm1,%%ymm" two "\n\t"
#define REVELIO_WIDEN(i, factors, place)                                                             \
    "vpmaddwd %%ymm" factors ",%%ymm" i ",%%ymm" i "\n\tvpaddd " place "(%[o]),%%ymm" i ",%%ymm" i "\n\t" \
    REVELIO_STORE(i, place)
#define REVELIO_ADD(one, two, place, beside) REVELIO_WIDEN(one, "12", place) REVELIO_WIDEN(two, "13", beside)
    asm volatile(
        "vmovdqu (%[x]),%%ymm0\n\tvmovdqu 32(%[x]),%%ymm1\n\tadd $64,%[x]\n\t"
        REVELIO_START("2", "3") REVELIO_START("4", "5") REVELIO_START("6", "7") REVELIO_START("8", "9")
        REVELIO_START("10", "11")
        ".p2align 5\n1:\n\tvmovdqu (%[x]),%%ymm12\n\tvmovdqu 32(%[x]),%%ymm13\n\t"
        REVELIO_INT8_ROW("(%[w])", "0", "1") REVELIO_INT8_ROW("(%[w],%[s])", "2", "3")
        REVELIO_INT8_ROW("(%[w],%[s],2)", "4", "5") REVELIO_INT8_ROW("(%[v])", "6", "7")
        REVELIO_INT8_ROW("(%[v],%[s])", "8", "9") REVELIO_INT8_ROW("(%[v],%[s],2)", "10", "11")
        "add $4,%[w]\n\tadd $4,%[v]\n\tadd $64,%[x]\n\tdec %[p]\n\tjnz 1b\n\t"
        "vmovdqu (%[x]),%%ymm12\n\tvmovdqu 32(%[x]),%%ymm13\n\t"
        REVELIO_ADD("0", "1", "0", "32") REVELIO_ADD("2", "3", "64", "96")
        REVELIO_ADD("4", "5", "128", "160") REVELIO_ADD("6", "7", "192", "224")
        REVELIO_ADD("8", "9", "256", "288") REVELIO_ADD("10", "11", "320", "352")
        : [w] "+r"(w), [v] "+r"(lower), [x] "+r"(x), [p] "+r"(fours)
        : [s] "r"(width), [o] "r"(sums)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

void avx2_int8_products(const void *latents, int64_t width, const void *images, const void *, void *sums) {
    const uint8_t *w = static_cast<const uint8_t *>(latents), *x = static_cast<const uint8_t *>(images);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) _mm256_storeu_si256(static_cast<__m256i *>(sums) + i, _mm256_setzero_si256());
    for (int64_t c = 0; c < width; c += PIECE, x += panel_bytes(PIECE, Numbers::PIECES))
        avx2_piece(w + c, width, x, std::min<int64_t>(PIECE, width - c) / 4, static_cast<int32_t *>(sums));
}

int32_t avx2_finer(const uint8_t *w, const int8_t *l, int64_t width, int32_t start) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_zextsi128_si256(_mm_cvtsi32_si128(start));
    for (int64_t i = 0; i < width; i += DEPTH) {
        const __m256i numbers = _mm256_loadu_si256((const __m256i *)(l + i));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)(w + i)), numbers);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

#ifdef REVELIO_AVX_VNNI

// 6 latents times 16 images of int8, where there is no AVX-512.
REVELIO_AVX_VNNI void avx_vnni_products(const void *latents, int64_t width, const void *images, const void *,
                                        void *sums) {
    constexpr int ROWS = 6;
    const uint8_t *w = static_cast<const uint8_t *>(latents), *x = static_cast<const uint8_t *>(images);
    const auto load = [](const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); };
    __m256i left[ROWS], right[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) left[r] = load(x), right[r] = load(x + 32);
    x += STARTS;
    for (int64_t c = 0; c < width; c += 4) {
        const __m256i one = load(x + PANEL * c), two = load(x + PANEL * c + 32);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            int32_t four;
            std::memcpy(&four, w + r * width + c, sizeof(four));
            const __m256i raised = _mm256_set1_epi32(four);
            left[r] = _mm256_dpbusd_avx_epi32(left[r], raised, one);
            right[r] = _mm256_dpbusd_avx_epi32(right[r], raised, two);
        }
    }
    __m256i *out = static_cast<__m256i *>(sums);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        _mm256_storeu_si256(out + 2 * r, left[r]);
        _mm256_storeu_si256(out + 2 * r + 1, right[r]);
    }
}

#endif
#ifdef REVELIO_AVX512

template <bool int8>
REVELIO_AVX512 inline __m512i add_products(__m512i sum, __m512i w, __m512i x) {
    return int8 ? _mm512_dpbusd_epi32(sum, w, x) : _mm512_dpwssd_epi32(sum, w, x);
}

// 12 latents times 32 images of int16, or of int8: twice the products an instruction, from half the memory.
template <bool int8>
REVELIO_AVX512 void avx512_products(const void *latents, int64_t width, const void *images, const void *next,
                                    void *sums) {
    constexpr int ROWS = 12;
    const int64_t bytes = int8 ? width : 2 * width;
    const uint8_t *w = static_cast<const uint8_t *>(latents), *x = static_cast<const uint8_t *>(images);
    const uint8_t *beside = x + panel_bytes(width, int8 ? Numbers::INT8 : Numbers::INT16);
    const char *ahead = static_cast<const char *>(next ? next : latents);
    __m512i left[ROWS], right[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        left[r] = int8 ? _mm512_loadu_si512(x) : _mm512_setzero_si512();
        right[r] = int8 ? _mm512_loadu_si512(beside) : _mm512_setzero_si512();
    }
    if (int8) x += STARTS, beside += STARTS;
    for (int64_t c = 0; c < bytes; c += 4) {
        const __m512i one = _mm512_loadu_si512(x + PANEL * c), two = _mm512_loadu_si512(beside + PANEL * c);
        _mm_prefetch(ahead + ROWS * c, _MM_HINT_T1);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            int32_t four;
            std::memcpy(&four, w + r * bytes + c, sizeof(four));
            const __m512i all = _mm512_set1_epi32(four);
            left[r] = add_products<int8>(left[r], all, one);
            right[r] = add_products<int8>(right[r], all, two);
        }
    }
    int32_t *out = static_cast<int32_t *>(sums);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        _mm512_storeu_si512(out + r * PANEL, left[r]);
        _mm512_storeu_si512(out + (ROWS + r) * PANEL, right[r]);
    }
}

REVELIO_AVX512 int32_t avx512_finer(const uint8_t *w, const int8_t *l, int64_t width, int32_t start) {
    __m512i sum = _mm512_zextsi128_si512(_mm_cvtsi32_si128(start));
    int64_t i = 0;
    for (; i + 64 <= width; i += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(w + i), _mm512_loadu_si512(l + i));
    if (i < width) {
        const __m256i raised = _mm256_loadu_si256((const __m256i *)(w + i));
        const __m256i numbers = _mm256_loadu_si256((const __m256i *)(l + i));
        sum = _mm512_dpbusd_epi32(sum, _mm512_zextsi256_si512(raised), _mm512_zextsi256_si512(numbers));
    }
    return _mm512_reduce_add_epi32(sum);
}

template <bool floats>
REVELIO_AVX512 void avx512_judge(const void *sums, const RowTerms *rows, int64_t count,
                                 const ImageTerms &images, uint16_t *bits) {
    const __m512 scale = _mm512_loadu_ps(images.scale), norm = _mm512_loadu_ps(images.norm);
    const __m512 rest = _mm512_loadu_ps(images.rest), limit = _mm512_loadu_ps(images.limit);
    const __m512 lower = _mm512_min_ps(limit, _mm512_loadu_ps(images.other_limit));
    const int32_t *sum = static_cast<const int32_t *>(sums);
    for (int64_t r = 0; r < count; r++, sum += PANEL) {
        const RowTerms &row = rows[r];
        __m512 guess = floats ? _mm512_loadu_ps(sum) : _mm512_cvtepi32_ps(_mm512_loadu_si512(sum));
        guess = _mm512_mul_ps(_mm512_mul_ps(guess, _mm512_set1_ps(row.scale)), scale);
        guess = _mm512_add_ps(guess, _mm512_set1_ps(row.bias));
        const __m512 by_norm = _mm512_mul_ps(_mm512_set1_ps(row.by_norm), norm);
        const __m512 by_rest = _mm512_mul_ps(_mm512_set1_ps(row.by_rest), rest);
        const __m512 bound = _mm512_add_ps(_mm512_add_ps(by_norm, by_rest), _mm512_set1_ps(row.fixed));
        const __m512 upper = _mm512_add_ps(guess, bound);
        bits[r] = _mm512_cmp_ps_mask(upper, row.among ? lower : limit, _CMP_NLT_UQ);
    }
}

#endif
#ifdef REVELIO_AMX

// 32 latents times 32 images. Loads of tiles start no hardware prefetch.
REVELIO_AMX void amx_products(const void *latents, int64_t width, const void *images, const void *next, void *sums) {
    const int16_t *w = static_cast<const int16_t *>(latents), *x = static_cast<const int16_t *>(images);
    const int16_t *ahead = static_cast<const int16_t *>(next);
    const int16_t *below = w + 16 * width, *beside = x + PANEL * width;
    float *out = static_cast<float *>(sums);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < width; c += DEPTH) {
        _tile_loadd(4, w + c, 2 * width);
        _tile_loadd(6, x + PANEL * c, 64);
        _tile_loadd(5, below + c, 2 * width);
        _tile_loadd(7, beside + PANEL * c, 64);
        for (int line = 0; ahead && line < 32; line++) _mm_prefetch(ahead + DEPTH * (c + line), _MM_HINT_T1);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
}

REVELIO_AMX void load(const uint8_t *configuration) {
    // Some compilers' headers claim that the instruction reads eight bytes of the 64.
    asm volatile("" : : "r"(configuration) : "memory");
    _tile_loadconfig(configuration);
}

// Eight tiles of 16 rows of 64 bytes.
REVELIO_AMX void configure(uint8_t *before) {
    alignas(64) uint8_t wanted[64] = {1};
    for (int tile = 0; tile < 8; tile++) wanted[16 + 2 * tile] = 64, wanted[48 + tile] = 16;
    _tile_storeconfig(before);
    asm volatile("" : : "r"(before) : "memory");
    load(wanted);
}

// Linux hands out the tile registers on demand, to a process at a time.
bool tiles_allowed() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned STATES = 3u << 17;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return (low & STATES) == STATES && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

#endif

}  // namespace

Product product_of(Instructions instructions) {
#ifdef REVELIO_AMX
    if (instructions == AMX) return {32, 2, 384, Numbers::BFLOAT16, amx_products, nullptr};
#endif
#ifdef REVELIO_AVX512
    if (instructions == AVX512_INT8) return {12, 2, 384, Numbers::INT8, avx512_products<true>, avx512_finer};
    if (instructions == AVX512) return {12, 2, 384, Numbers::INT16, avx512_products<false>, nullptr};
#endif
#ifdef REVELIO_AVX_VNNI
    if (instructions == AVX_VNNI_INT8) return {6, 1, 192, Numbers::INT8, avx_vnni_products, avx2_finer};
#endif
    if (instructions == AVX2_INT8) return {6, 1, 192, Numbers::PIECES, avx2_int8_products, avx2_finer};
    return {6, 1, 96, Numbers::INT16, avx2_products, nullptr};
}

Judge judge_of(Instructions instructions) {
#ifdef REVELIO_AVX512
    if (instructions == AMX) return avx512_judge<true>;
    if (instructions == AVX512 || instructions == AVX512_INT8) return avx512_judge<false>;
#endif
    return judge;
}

int instructions_here() {
    int here = 1 << AVX2 | 1 << AVX2_INT8;
#ifdef REVELIO_AVX_VNNI
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)) here |= 1 << AVX_VNNI_INT8;
#endif
#ifdef REVELIO_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni")) {
        here |= 1 << AVX512 | 1 << AVX512_INT8;
#ifdef REVELIO_AMX
        if (tiles_allowed()) here |= 1 << AMX;
#endif
    }
#endif
    return here;
}

Tiles::Tiles(bool wanted) : wanted(wanted) {
#ifdef REVELIO_AMX
    if (wanted) configure(before);
#endif
}

Tiles::~Tiles() {
#ifdef REVELIO_AMX
    if (wanted) load(before);
#endif
}

}  // namespace revelio
#endif
