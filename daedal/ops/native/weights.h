// Packed weights and the activations that meet them. Where codes, scales and zero points of a panel lie (packed.py is
// the truth), and how a row of activations is made ready: rounded to eight bits per group of columns for the integer
// formats, as numbers for the others. Knows nothing of how products are summed. Included inside each level's namespace.
#pragma once

enum class Format : int { BF16, INT8, INT4, FP8, FP4 };

// As `FORMATS` of packed.py, in its order.
struct Layout {
    int bits, group, scale, zero;
    bool shared;
};
constexpr Layout LAYOUTS[] = {
    {16, 32, 0, 0, false}, {8, 64, 2, 0, false}, {4, 32, 2, 1, false}, {8, 128, 4, 0, true}, {4, 32, 1, 0, false},
};
template <Format F>
constexpr Layout layout = LAYOUTS[static_cast<int>(F)];

constexpr int64_t PANEL = 16;

// Formats whose products are summed as integers.
template <Format F>
constexpr bool whole = F == Format::INT8 || F == Format::INT4 || F == Format::FP4;

constexpr int64_t ceiling(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
constexpr int64_t padded(int64_t count, int64_t unit) { return ceiling(count, unit) * unit; }

struct Panel {
    const uint8_t *codes, *scales, *zeros;
};

// A matrix of a stack: [rows, columns].
template <Format F>
struct Matrix {
    const uint8_t* data;
    int64_t groups, codes_bytes, scales_bytes, panel_bytes;

    Matrix(const uint8_t* data_, int64_t columns) : data(data_), groups(ceiling(columns, layout<F>.group)) {
        constexpr int64_t rows = layout<F>.shared ? 1 : PANEL;
        codes_bytes = groups * layout<F>.group * PANEL * layout<F>.bits / 8;
        scales_bytes = groups * rows * layout<F>.scale;
        panel_bytes = padded(codes_bytes + scales_bytes + groups * PANEL * layout<F>.zero, 64);
    }

    Panel panel(int64_t index) const {
        const uint8_t* codes = data + index * panel_bytes;
        return {codes, codes + codes_bytes, codes + codes_bytes + scales_bytes};
    }
};

inline F16 bytes_as_floats(const uint8_t* from) {
#if defined(__AVX512F__)
    return (F16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    C16 bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, I16), F16);
#endif
}

// The scales of a panel's rows in one group. An e8m0 byte is float32's own exponent; 0 stands for 2^-127.
template <Format F>
inline F16 scales(const Panel& panel, int64_t group) {
    if constexpr (F == Format::FP8) {
        return fill(reinterpret_cast<const float*>(panel.scales)[group]);
    } else if constexpr (F == Format::FP4) {
        C16 bytes;
        std::memcpy(&bytes, panel.scales + group * PANEL, sizeof bytes);
        const I16 bits = __builtin_convertvector(bytes, I16) << 23;
        return (F16)(bits > 0x400000 ? bits : I16{} + 0x400000);
    } else {
        return load(reinterpret_cast<const bf16*>(panel.scales) + group * PANEL);
    }
}

inline F16 zeros(const Panel& panel, int64_t group) { return bytes_as_floats(panel.zeros + group * PANEL); }

// What a row of activations becomes: numbers, padded with 0 to whole groups, and behind them, for integer formats, for
// each group its scale and what its integer sum lacks (weights stand shifted into the unsigned range).
struct Side {
    float scale, fix;
};

#if defined(__AVX512BF16__)
using Real = bf16;
#else
using Real = float;
#endif
// Bytes where the machine multiplies them; elsewhere the same whole numbers as floats.
#if defined(__AVX512BF16__) || defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
using Code = int8_t;
#else
using Code = float;
#endif
template <Format F>
using Activation = std::conditional_t<whole<F>, Code, Real>;

// `columns`: with padding.
template <Format F>
struct Rows {
    int64_t columns, sides_at, bytes;

    explicit Rows(int64_t columns_) : columns(padded(columns_, layout<F>.group)) {
        sides_at = columns * sizeof(Activation<F>);
        bytes = padded(sides_at + (whole<F> ? columns / layout<F>.group * sizeof(Side) : 0), 64);
    }
};

template <typename T>
inline F16 load_part(const T* from, int64_t count) {
    if (count >= 16) return load(from);
    F16 value{};
    for (int64_t i = 0; i < count; ++i) value[i] = load_one(from + i);
    return value;
}

template <typename T>
inline void store_part(T* to, F16 value, int64_t count) {
    if (count >= 16) return store(to, value);
    for (int64_t i = 0; i < count; ++i) store_one(to + i, value[i]);
}

inline int32_t fold_max(I16 value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)value);
#else
    int32_t result = value[0];
    for (int lane = 1; lane < 16; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
#endif
}

inline int32_t fold_sum(I16 value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)value);
#else
    int32_t result = 0;
    for (int lane = 0; lane < 16; ++lane) result += value[lane];
    return result;
#endif
}

inline void store_codes(int8_t* to, I16 codes) {
    const B16 bytes = __builtin_convertvector(codes, B16);
    std::memcpy(to, &bytes, sizeof bytes);
}
inline void store_codes(float* to, I16 codes) { store(to, __builtin_convertvector(codes, F16)); }

// Byte products take fp4 doubled, so that it is whole. What some machines want unsigned is shifted up by so much.
#if defined(__AVX512BF16__)
constexpr float SHIFT_FP4 = 12, SHIFT_INT8 = 128;
#elif defined(__AVX2__)
constexpr float SHIFT_FP4 = 12, SHIFT_INT8 = 0;
#else
constexpr float SHIFT_FP4 = 0, SHIFT_INT8 = 0;
#endif

// What the shifted form of a group's weights adds to a sum, undone.
template <Format F>
inline Side side(float scale, int32_t sum) {
    const float total = static_cast<float>(sum);
    if constexpr (F == Format::INT4) return {scale, total / 16.0f};
    if constexpr (F == Format::FP4) return {sizeof(Code) == 1 ? scale * 0.5f : scale, -SHIFT_FP4 * total};
    return {scale, -SHIFT_INT8 * total};
}

// One group of a row, of which `count` columns exist, to 8-bit codes: the largest magnitude becomes 127. A NaN is
// larger than all numbers when compared by bits, and makes the group's scale NaN.
template <Format F, typename T>
inline Side quantise(const T* x, int64_t count, Activation<F>* codes) {
    constexpr int VECTORS = layout<F>.group / 16;
    F16 values[VECTORS];
    I16 peaks{};
    for (int i = 0; i < VECTORS; ++i) {
        values[i] = load_part(x + 16 * i, std::max<int64_t>(count - 16 * i, 0));
        const I16 magnitude = (I16)values[i] & 0x7fffffff;
        peaks = magnitude > peaks ? magnitude : peaks;
    }
    const int32_t bits = fold_max(peaks);
    float peak;
    std::memcpy(&peak, &bits, sizeof peak);
    const bool empty = peak < 1e-30f;
    const float inverse = empty ? 0.0f : 127.0f / peak;
    I16 total{};
    for (int i = 0; i < VECTORS; ++i) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
        const F16 shifted = values[i] * inverse + 12582912.0f;
        const I16 nearest = (I16)((U16)shifted - 0x4b400000u);
        total += nearest;
        store_codes(codes + 16 * i, nearest);
    }
    return side<F>(empty ? 0.0f : peak / 127.0f, fold_sum(total));
}

// Columns `begin` up to `begin + width` of a row, in whole groups for integer formats. Of x, which holds these columns,
// `count` exist.
template <Format F, typename T>
inline void prepare_columns(const T* x, int64_t count, const Rows<F>& form, uint8_t* row, int64_t begin,
                            int64_t width) {
    auto* to = reinterpret_cast<Activation<F>*>(row) + begin;
    if constexpr (whole<F>) {
        constexpr int64_t GROUP = layout<F>.group;
        Side* sides = reinterpret_cast<Side*>(row + form.sides_at) + begin / GROUP;
        for (int64_t k = 0; k < width; k += GROUP)
            sides[k / GROUP] = quantise<F>(x + k, std::min(count - k, GROUP), to + k);
    } else {
        for (int64_t k = 0; k < width; k += 16) store(to + k, load_part(x + k, std::max<int64_t>(count - k, 0)));
    }
}

template <Format F, typename T>
inline void prepare_row(const T* x, int64_t count, const Rows<F>& form, uint8_t* row) {
    prepare_columns<F>(x, count, form, row, 0, form.columns);
}
