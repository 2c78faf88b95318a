// The copy of W that searches multiply.
#pragma once
#include "products.h"
#include "rows.h"

namespace revelio {

struct Copy {
    void *q;  // (n rounded up to a multiple of WHOLE, width) of `numbers`
    Quantised *rows;
    int64_t width;
    Numbers numbers;

    const void *row(int64_t latent) const { return address(latent); }

    // Copies a latent's row anew; false where a value is NaN or infinite.
    bool renew(int64_t latent, const float *w, int64_t d) const {
        const bool floats = numbers == Numbers::BFLOAT16;
        if (bytes(numbers))
            return quantise(w, d, width, false, static_cast<uint8_t *>(address(latent)), rows[latent],
                            numbers == Numbers::PIECES);
        return quantise(w, d, width, floats, static_cast<int16_t *>(address(latent)), rows[latent]);
    }

   private:
    void *address(int64_t latent) const {
        return static_cast<uint8_t *>(q) + latent * width * (bytes(numbers) ? 1 : 2);
    }
};

inline Copy copy_of(void *q, float *rows, int64_t width, int instructions) {
    return {q, reinterpret_cast<Quantised *>(rows), width, product_of(Instructions(instructions)).numbers};
}

}  // namespace revelio
