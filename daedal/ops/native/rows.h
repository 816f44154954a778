// Kernels that go over rows: norms, rotation, gated units, routing, and the plain tensor operations (copies, sums,
// gathers) that join the others in a recorded step. All compute in float32. Included inside each level's namespace.
#pragma once

// Element types of arguments, as `program.py` numbers them.
enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, INT64 = 2, INT32 = 3, BOOL = 4 };

template <typename T, typename W>
inline void norm_row(const T* x, const W* weight, T* y, int64_t dim, float eps) {
    F16 squares = fill(0.0f);
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
        const F16 value = load(x + i);
        squares += value * value;
    }
    for (; i < dim; ++i) rest += load_one(x + i) * load_one(x + i);
    const float scale = 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(dim) + eps);
    for (i = 0; i + 16 <= dim; i += 16) {
        const F16 value = load(x + i) * scale;
        store(y + i, weight == nullptr ? value : value * load(weight + i));
    }
    for (; i < dim; ++i) {
        const float value = load_one(x + i) * scale;
        store_one(y + i, weight == nullptr ? value : value * load_one(weight + i));
    }
}

// x, x row stride (elements), x type, weight or null, weight type, y (contiguous), rows, dim, eps
inline void rms_norm(const Word* a, const Team& team) {
    const int64_t rows = a[6], dim = a[7];
    const float eps = real(a[8]);
    const Range mine = team.share(rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const auto typed = [&](auto* x, auto* y) {
            if (a[4] == BFLOAT16)
                norm_row(x + row * a[1], pointer<const bf16>(a[3]), y + row * dim, dim, eps);
            else
                norm_row(x + row * a[1], pointer<const float>(a[3]), y + row * dim, dim, eps);
        };
        if (a[2] == BFLOAT16)
            typed(pointer<const bf16>(a[0]), pointer<bf16>(a[5]));
        else
            typed(pointer<const float>(a[0]), pointer<float>(a[5]));
    }
}

#define DAEDAL_ROWS_KERNELS {"rms_norm", rms_norm},
