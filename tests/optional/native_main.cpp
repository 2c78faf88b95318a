// A training of a small k-SAE by the native kernel alone, on numbers drawn here: one line of hashes a step. Compiled for
// two processors, or told other instructions, it prints the same lines. `tests/optional/check_arm.py` runs it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
int revelio_instructions();
int revelio_quantise(const float *, int64_t, int64_t, int64_t, void *, float *, int, int);
int revelio_encode(const float *, int64_t, int64_t, const float *, const float *, int64_t, void *, int64_t, float *,
                   int64_t, const uint8_t *, int64_t, const uint8_t *, float, float *, int64_t *, float *, int64_t *,
                   int64_t *, float *, int, int);
void revelio_decode(const float *, const int64_t *, int64_t, int64_t, const float *, int64_t, float *, int);
void revelio_code_gradients(const float *, const int64_t *, int64_t, int64_t, const float *, int64_t, float *, int);
void revelio_unit_norm(float *, const int64_t *, int64_t, int64_t, int);
int revelio_update(float *const *, int64_t *, int64_t, int64_t, void *, int64_t, float *, const int64_t *const *,
                   const float *const *, int64_t, int64_t, double, double, double, double, int, int, int);
}

namespace {

uint64_t state = 88172645463325252ull;

// Between -1 and 1, of 24 bits: exact on every processor.
float drawn() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return float(int64_t(state >> 40) - (1 << 23)) / (1 << 23);
}

template <class Number>
uint64_t hashed(const std::vector<Number> &numbers, uint64_t hash = 14695981039346656037ull) {
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(numbers.data());
    for (size_t i = 0; i < numbers.size() * sizeof(Number); i++) hash = (hash ^ bytes[i]) * 1099511628211ull;
    return hash;
}

void train(int64_t d, int64_t n, int64_t k, int64_t b, int instructions, int threads, int steps) {
    const int64_t width = (d + 31) / 32 * 32, rows = (n + 95) / 96 * 96;
    std::vector<float> W(n * d), D(n * d), bias(n), mean_enc(n * d), square_enc(n * d), mean_dec(n * d), square_dec(n * d);
    for (int64_t j = 0; j < n; j++) {
        const float size = j % 7 == 3 ? 4.0f : 1.0f;  // norms that differ
        for (int64_t i = 0; i < d; i++) W[j * d + i] = size * drawn(), D[j * d + i] = drawn();
        bias[j] = 0.1f * drawn();
    }
    std::vector<int64_t> last(n, 1), few(n);
    revelio_unit_norm(D.data(), last.data(), n, d, threads);
    last.assign(n, 0);
    std::vector<uint8_t> q(rows * width * 2), among(n), only(n);
    for (int64_t j = 0; j < n; j++) among[j] = j % 3 == 0, only[j] = j % 97 == 5;
    std::vector<float> about(rows * 3);
    if (revelio_quantise(W.data(), n, d, width, q.data(), about.data(), instructions, threads)) std::exit(3);
    float guess = -INFINITY;
    for (int step = 1; step <= steps; step++) {
        std::vector<float> x(b * d), values(b * k), others(b * 2), out(b * d), pulls(b * k), some(b * k);
        std::vector<int64_t> chosen(b * k), other_chosen(b * 2), some_chosen(b * k);
        for (float &value : x) value = drawn();
        int64_t scored = 0;
        const auto encode = [&](const uint8_t *only, std::vector<float> &to, std::vector<int64_t> &which, int64_t others_k) {
            const int status = revelio_encode(x.data(), b, d, W.data(), bias.data(), n, q.data(), width, about.data(), k,
                                              among.data(), others_k, only, only ? 0.5f : -INFINITY, to.data(), which.data(),
                                              others.data(), other_chosen.data(), &scored, only ? nullptr : &guess,
                                              instructions, threads);
            if (status) std::printf("status %d\n", status), std::exit(4);
        };
        encode(nullptr, values, chosen, 2);
        // int8's bounds do not tell how latents rank beside a few (revelio/sae/kernels/native.py).
        const bool tells = instructions == 0 || instructions == 3 || instructions == 6;
        if (tells) {
            encode(only.data(), some, some_chosen, 0);
            std::printf("few %016lx\n", long(hashed(some, hashed(some_chosen))));
        }
        revelio_decode(values.data(), chosen.data(), b, k, D.data(), d, out.data(), threads);
        for (int64_t i = 0; i < b * d; i++) out[i] -= x[i];
        revelio_code_gradients(out.data(), chosen.data(), b, k, D.data(), d, pulls.data(), threads);
        std::vector<int64_t> latents, images;
        std::vector<float> of_values, of_pulls;
        for (int64_t j = 0; j < n; j++)
            for (int64_t e = 0; e < b * k; e++)
                if (chosen[e] == j)
                    latents.push_back(j), images.push_back(e / k), of_values.push_back(values[e]), of_pulls.push_back(pulls[e]);
        float *const matrices[] = {W.data(), D.data(), mean_enc.data(), square_enc.data(), mean_dec.data(), square_dec.data()};
        const int64_t *const places[] = {latents.data(), images.data(), images.data()};
        const float *const weights[] = {of_values.data(), of_pulls.data(), x.data(), out.data()};
        if (revelio_update(matrices, last.data(), n, d, q.data(), width, about.data(), places, weights, latents.size(), step,
                           1e-2, 0.9, 0.999, 1e-8, 1, instructions, threads))
            std::exit(5);
        std::printf("d %ld n %ld k %ld step %d: %016lx %016lx %016lx %016lx %016lx\n", long(d), long(n), long(k), step,
                    long(hashed(values, hashed(chosen))), long(hashed(others, hashed(other_chosen))),
                    long(hashed(out, hashed(pulls))), long(hashed(W, hashed(D))),
                    long(hashed(mean_enc, hashed(square_dec, hashed(last)))));
    }
}

}  // namespace

int main(int count, char **words) {
    if (count < 2) return std::printf("%d\n", revelio_instructions()), 0;
    const int instructions = std::atoi(words[1]);
    if (!(revelio_instructions() >> instructions & 1)) return 2;
    train(33, 500, 5, 37, instructions, 1, 4);
    train(64, 1000, 8, 20, instructions, 2, 4);
    train(100, 700, 1, 3, instructions, 3, 3);
    train(256, 400, 32, 16, instructions, 1, 20);
}
